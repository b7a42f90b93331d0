"""Writes a data set with several labels per image: two images side by side, with both labels.

    python -m benchmarks.pairs --source=folder:cifar10 --out=pairs
    python main.py --config=configs/folder.py:tiny --config.data.source=labels:pairs/labels.csv \\
        --config.data.image_size=32,64 --workdir=runs/pairs

Each image is used at most once, in a picture of its own split. Of 16 pictures, one has noise
instead of the right image, and another one has noise instead of both images. Noise has no label.
"""

import argparse
import csv
import pathlib

import numpy as np
from PIL import Image

from benchmarks.arguments import Parser, count
from vit_jax.data import Examples, Reading, Source, fit_image, open_source, open_split


def write_pairs(source: Source, out: pathlib.Path, most: dict[str, int], size: int) -> None:
  """Writes `out/labels.csv` and the pictures `out/<split>/*.png`, which are twice as wide as high.

  Args:
    source: images with one label each.
    out: folder to create.
    most: for each split to write, the maximum number of pictures.
    size: height of a picture in pixels.
  """
  out.mkdir(parents=True)
  with (out / 'labels.csv').open('w', encoding='utf-8', newline='') as file:
    rows = csv.writer(file)
    rows.writerow(('path', 'label', 'split'))
    for split, number in most.items():
      (out / split).mkdir()
      examples = open_split(Reading('memory', fit_image), source, split, (size, size))
      for i, (pixels, labels) in enumerate(pictures(examples, number)):
        name = f'{split}/{split}_{i:05}.png'
        Image.fromarray(pixels).save(out / name)
        names = sorted({source.class_names[label] for label in labels})
        rows.writerow((name, ';'.join(names), split))


def pictures(examples: Examples, most: int):
  """Yields at most `most` pictures, as (uint8 pixels, labels). Each shows up to two images."""
  random = np.random.RandomState(0)
  order = random.permutation(len(examples))
  for i in range(min(most, len(order) // 2)):
    pair = examples.some(order[2 * i : 2 * i + 2])
    images = pair.image_NHWC.copy()
    shown = {7: 1, 15: 0}.get(i % 16, 2)
    images[shown:] = random.randint(0, 256, images[shown:].shape)
    pixels_HWC = np.concatenate(images, axis=1)
    yield pixels_HWC[..., 0] if pixels_HWC.shape[-1] == 1 else pixels_HWC, pair.label_N[:shown]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
  """Parses the command line."""
  parser = Parser(__spec__, __doc__)
  parser.add_argument('--source', required=True, help='data.source of images with one label each')
  parser.add_argument('--out', type=pathlib.Path, required=True, help='folder to create')
  parser.add_argument('--size', type=count, default=32, help='height of a picture in pixels')
  parser.add_argument('--train', type=count, default=25_000, help='maximum training pictures')
  parser.add_argument('--test', type=count, default=5_000, help='maximum test pictures')
  args = parser.parse_args(arguments)
  if args.out.exists():
    parser.error(f'{args.out} already exists')
  return args


if __name__ == '__main__':
  given = parse()
  found = open_source(given.source, '', (given.size, given.size))
  write_pairs(found, given.out, {'train': given.train, 'test': given.test}, given.size)
