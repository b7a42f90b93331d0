"""Checks that streaming one epoch of an image folder yields every image exactly once.

    python -m benchmarks.streamed tiny_imagenet 64 folder
    python -m benchmarks.streamed generated 224 folder      # a folder from benchmarks.photos

TFDS copies the files of `folder/<split>/<class>/` into an array_record, without re-encoding. Then
the folder and the array_record are streamed one after the other (`data.cache=stream`), for one
epoch over all splits, without random crops. Every image must be identical to a file that Pillow
decoded, and every file must occur exactly once. The number of files must be a multiple of `BATCH`.
For the folder and for the array_record, `results/streamed.json` holds three numbers of images: all
streamed images, unexpected images and missing images.
"""

import argparse
import collections
import concurrent.futures
import hashlib
import pathlib
import sys
import tempfile

import numpy as np
from PIL import Image, ImageOps

from benchmarks import arguments, collect
from vit_jax.data import batching, sources, stream
from vit_jax.data import image as image_lib
from vit_jax.distributed import devices, sharding
from vit_jax.workdir import writer

BATCH = 100
NAME = 'folder_as_tfds'

Seen = collections.Counter[tuple[int, bytes]]  # (label, hash of the pixels)


def write_tfds(folder: pathlib.Path, root: pathlib.Path) -> None:
  """Writes all files as the split `train` of a TFDS dataset below `root`."""
  import tensorflow_datasets as tfds

  class FolderAsTfds(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
      names = sorted(path.name for path in (folder / 'train').iterdir())
      label = tfds.features.ClassLabel(names=names)
      features = {'image': tfds.features.Image(shape=(None, None, 3)), 'label': label}
      features = tfds.features.FeaturesDict(features)
      return self.dataset_info_from_configs(features=features, supervised_keys=('image', 'label'))

    def _split_generators(self, dl_manager):
      return {'train': self._generate_examples()}

    def _generate_examples(self):
      for path in sorted(folder.glob('*/*/*')):
        name = path.relative_to(folder).as_posix()
        yield name, {'image': str(path), 'label': path.parent.name}

  FolderAsTfds(data_dir=root, file_format='array_record').download_and_prepare()


def expected(folder: pathlib.Path, size: int) -> Seen:
  """Decodes every file with Pillow, and counts the images: `{(label, hash of image): number}`."""
  names = sorted(path.name for path in (folder / 'train').iterdir())

  def read(path):
    opened = Image.open(path).convert('RGB')
    if opened.size != (size, size):
      opened = ImageOps.fit(opened, (size, size), Image.Resampling.BICUBIC)
    return names.index(path.parent.name), digest(np.asarray(opened))

  with concurrent.futures.ThreadPoolExecutor() as pool:
    return collections.Counter(pool.map(read, folder.glob('*/*/*')))


def digest(image_HWC: np.ndarray) -> bytes:
  return hashlib.sha256(np.ascontiguousarray(image_HWC)).digest()


def epoch(source: str, data_dir: str, size: int) -> Seen:
  """Streams one epoch of training, and counts the images: `{(label, hash of image): number}`."""
  found = sources.open_source(source, data_dir, (size, size))
  arguments = dict(size=(size, size), fit=image_lib.fit_image, threads=stream.best_threads(0))
  examples = stream.open_stream(found, '+'.join(found.sizes), **arguments)
  over_batch = sharding.batch_sharding(devices.make_mesh(BATCH))
  batches, seen = batching.train_batches(examples, BATCH, 0, 0, over_batch), collections.Counter()
  for _ in range(len(examples) // BATCH):
    batch = next(batches)
    seen.update(zip(np.asarray(batch['label']).tolist(), map(digest, np.asarray(batch['image']))))
  batches.close()
  return seen


def parse(argv: list[str]) -> argparse.Namespace:
  parser = arguments.Parser(__spec__, __doc__)
  parser.add_argument('name', help='name of the row in results/streamed.json')
  parser.add_argument('size', type=arguments.count, help='size of the images in pixels')
  parser.add_argument('folder', type=pathlib.Path, help='folder that contains train/<class>/')
  args = parser.parse_args(argv)
  if not (args.folder / 'train').is_dir():
    parser.error(f'{args.folder}/train is not a folder; expected images in train/<class>/')
  return args


def main(argv: list[str]) -> None:
  args = parse(argv)
  name, size, folder = args.name, args.size, args.folder.resolve()
  wanted = expected(folder, size)
  row = {'images': wanted.total(), 'size': size}
  with tempfile.TemporaryDirectory() as root:
    write_tfds(folder, pathlib.Path(root))
    places = {'folder': (f'folder:{folder}', ''), 'array_record': (f'tfds:{NAME}', root)}
    for kind, where in places.items():
      seen = epoch(*where, size)
      row[kind] = {
        'seen': seen.total(),
        'not_those_of_pillow': (seen - wanted).total(),
        'not_seen': (wanted - seen).total(),
      }
  path = collect.RESULTS / 'streamed.json'
  writer.write_json(path, (writer.read_json(path) or {}) | {name: row | collect.circumstances()})
  print(name, row)


if __name__ == '__main__':
  main(sys.argv[1:])
