"""Where examples come from: `SOURCES`, a table of kinds.

Decisions:
  * A split is resolved to index ranges before anything is decoded, so that every source
    speaks TFDS notation and only what is asked for is read.
  * A source is read by split and index, in any order, and may be sent to another process: what
    reads it holds names and paths, not open files.
  * A percentage of a folder's split is one of its files' positions (`folder.py`), of every other
    split one of its size.
  * TensorFlow runs in a child process only, to download and prepare (`prepare.py`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
import logging
import os
import pathlib
import re
import subprocess
import sys
from typing import NoReturn

import jax
import numpy as np

from vit_jax import cluster, splits
from vit_jax import folder as folder_lib
from vit_jax import image as image_lib
from vit_jax.names import choose
from vit_jax.paths import local

Example = tuple[str, pathlib.Path | bytes | np.ndarray, int]  # name; file, its bytes, pixels; label

READ_AHEAD = 1024  # examples that are held encoded

CONVERTED = 'array_record'  # in it: TFDS data, beside the person's own files, which stay


@dataclasses.dataclass(frozen=True)
class Source:
  """A dataset whose examples can be read by split and index.

  Attributes:
    sizes: number of examples in each whole split.
    class_names: name of each label.
    channels: 1 or 3.
    read: `(split, indices) -> iterator of (name, image, label)`, the image a file, its
      bytes or a uint8 array; not yet looked at, see `pixels`.
    fingerprint: of the training split's names and labels; empty where unknown.
    files: of a folder's splits; empty for other kinds.
    left_out: which files of a split are not given, bool `[N]` by the name of the split.
    warnings: what a person should know about the data.
  """

  sizes: dict[str, int]
  class_names: tuple[str, ...]
  channels: int
  read: Callable[[str, Sequence[int]], Iterator[Example]]
  fingerprint: str = ''
  files: Mapping[str, folder_lib.Files] = dataclasses.field(default_factory=dict)
  left_out: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  warnings: tuple[str, ...] = ()

  def pieces(self, split: str) -> list[splits.Piece]:
    """The ranges of examples that a split names, without files that are left out.

    Raises:
      ValueError: bad notation, an unknown name, or no examples.
    """
    positions = {name: files.position_N for name, files in self.files.items()}
    pieces = splits.resolve(split, self.sizes, positions)
    return splits.leave_out(pieces, self.left_out)


def open_source(spec: str, data_dir: str, image_size: tuple[int, int]) -> Source:
  """Opens `tfds:<name>`, `folder:<path>`, `digits` or `synthetic`.

  Raises:
    ValueError: an unknown kind, or a source that can't be read; the message says what to do.
  """
  kind, _, argument = spec.partition(':')
  if kind not in SOURCES and ('/' in kind or folder_root(kind, data_dir).is_dir()):
    raise ValueError(f'data.source={spec!r}: write folder:{spec} to read a folder of images.')
  return choose('data.source', kind, SOURCES)(argument, data_dir, image_size)


def look(spec: str, data_dir: str, image_size: tuple[int, int]) -> Source | None:
  """As `open_source`, of data that need not be there, and without preparing it.

  Returns:
    The source, without `sizes` where they are unknown; None where nothing is known.
  """
  kind, _, name = spec.partition(':')
  if kind == 'folder' and not (name and folder_root(name, data_dir).is_dir()):
    return None
  if kind != 'tfds':
    return open_source(spec, data_dir, image_size)
  root = tfds_root(name, data_dir)
  found = [find_builder(name, directory) for directory in (root, root / CONVERTED)]
  if not any(found):
    check_known(name)
  return tfds_source(name, max(filter(None, found), key=lambda one: len(one.info.splits)))


def pixels(
  source: Source, example: Example, size: tuple[int, int], fit: image_lib.Fit
) -> np.ndarray:
  """The pixels of an example, fitted to `size`: `image_HWC`. An array of that size stays whole.

  Raises:
    image.BadImage: it can't be decoded, or has a label that the source has not.
  """
  name, encoded, label = example
  check_label(source, name, label)
  if isinstance(encoded, np.ndarray):
    return encoded if encoded.shape[:2] == size else image_lib.refit(encoded, size, fit)
  return fit(image_lib.decode(as_bytes(encoded), name, source.channels), size)


def own_size(example: Example) -> tuple[int, int]:
  """Height and width of an example, as its array or the header of its file says.

  Raises:
    image.BadImage: the header can't be read.
  """
  name, encoded, _ = example
  if isinstance(encoded, np.ndarray):
    return encoded.shape[:2]
  return image_lib.upright_size(as_bytes(encoded), name)


def read_pieces(
  source: Source, pieces: Iterable[tuple[str, int, int]]
) -> Iterator[Iterator[Example]]:
  """The examples of `splits.resolve`'s pieces in order, at most `READ_AHEAD` at once."""
  for split, start, stop in pieces:
    for first in range(start, stop, READ_AHEAD):
      yield source.read(split, range(first, min(first + READ_AHEAD, stop)))


def first_size(source: Source, split: str) -> tuple[int, int] | None:
  """(height, width) of a split's first image; None where it is bad."""
  name, start, _ = source.pieces(split)[0]
  (example,) = source.read(name, [start])
  try:
    return own_size(example)
  except image_lib.BadImage:
    return None


def stop_at(error: image_lib.BadImage) -> NoReturn:
  """Raises what a bad image raises where none is skipped, with what to do about it."""
  raise image_lib.BadImage(
    f'{error} Mend the file, or do without it: --config.data.skip_bad_images=True.'
  ) from error


def check_label(source: Source, name: str, label: int) -> None:
  """Raises BadImage for a label without a class."""
  if not 0 <= label < len(source.class_names):
    raise image_lib.BadImage(
      f'{name}: label {label} is none of the {len(source.class_names)} classes, 0 to '
      f'{len(source.class_names) - 1}.'
    )


def as_bytes(encoded: pathlib.Path | bytes) -> bytes:
  """The file that an example is."""
  return image_lib.read(encoded) if isinstance(encoded, pathlib.Path) else encoded


def chunks(items: Iterable, size: int) -> Iterator[list]:
  """Lists of at most `size` items."""
  chunk = []
  for item in items:
    chunk.append(item)
    if len(chunk) == size:
      yield chunk
      chunk = []
  yield chunk


def digits(argument: str, data_dir: str, image_size: tuple[int, int]) -> Source:
  """scikit-learn's 1,797 handwritten digits, 8x8 grey; 360 held out, stratified, fixed."""
  del argument, data_dir, image_size
  from sklearn import datasets, model_selection

  bunch = datasets.load_digits()
  image_NHWC = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
  train, test = model_selection.train_test_split(
    np.arange(len(bunch.target)), test_size=360, stratify=bunch.target, random_state=0
  )
  members = {'train': train, 'test': test}

  def read(split, indices):
    for i in members[split][indices]:
      yield f'digits/{i}', image_NHWC[i], int(bunch.target[i])

  return Source({'train': 1437, 'test': 360}, tuple('0123456789'), 1, read)


def synthetic(argument: str, data_dir: str, image_size: tuple[int, int]) -> Source:
  """Noise over one pattern a class, ten classes, at `data.image_size`: for trying things."""
  del argument, data_dir
  shape = (*image_size, 3)
  patterns = np.random.RandomState(0).randint(64, 192, (10, *shape))
  sizes = {'train': 1024, 'test': 256}

  def read(split, indices):
    for i in indices:
      noise = np.random.RandomState([list(sizes).index(split), i]).randint(-63, 64, shape)
      yield f'synthetic/{split}/{i}', (patterns[i % 10] + noise).astype(np.uint8), i % 10

  return Source(sizes, tuple(f'pattern {i}' for i in range(10)), 3, read)


def folder(path: str, data_dir: str, image_size: tuple[int, int]) -> Source:
  """A folder of images, one folder a class; see `folder.open_folder` for its splits.

  A relative path starts at `data_dir`.
  """
  del image_size
  root = folder_root(path, data_dir)
  if not path:
    raise ValueError("data.source: 'folder:' has no path; write folder:<path of the images>.")
  if not root.is_dir():
    raise ValueError(f'data.source: no folder {str(root)!r}; write folder:<path of the images>.')
  found = folder_lib.open_folder(root)
  files = found.files

  def read(split, indices):
    top, path_N, label_N = files[split].top, files[split].path_N, files[split].label_N
    for i in indices:
      file = top / os.fsdecode(bytes(path_N[i]))
      yield str(file), file, int(label_N[i])

  return Source(
    {name: len(part) for name, part in files.items()},
    found.class_names,
    3,
    read,
    files['train'].fingerprint(),
    files,
    warnings=found.warnings,
  )


def folder_root(path: str, data_dir: str) -> pathlib.Path:
  """Where a folder lies; a relative path starts at `data_dir`."""
  return local(data_dir) / local(path)


def tfds(name: str, data_dir: str, image_size: tuple[int, int]) -> Source:
  """An image classification dataset of tensorflow-datasets, without TensorFlow."""
  del image_size
  root = tfds_root(name, data_dir)
  if jax.distributed.is_initialized():  # of several processes one prepares what they may share
    cluster.from_first(lambda: prepared_builder(name, root) and None)
  return tfds_source(name, prepared_builder(name, root))


def tfds_root(name: str, data_dir: str) -> pathlib.Path:
  """Where TFDS data lies.

  Raises:
    ValueError: `name` is no dataset's.
  """
  if not re.fullmatch(r'\w+([/:].+)?', name):
    raise ValueError(f'data.source: got tfds:{name}, expected tfds:<name>, e.g. tfds:cifar10.')
  root = data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  return local(root)


def tfds_source(name: str, builder) -> Source:
  """The source of a TFDS builder.

  Raises:
    ValueError: it is of no image classification dataset.
  """
  import tensorflow_datasets

  image_key, label_key = builder.info.supervised_keys or ('image', 'label')
  features, kinds = dict(builder.info.features.items()), tensorflow_datasets.features
  feature, label = features.get(image_key), features.get(label_key)
  if not isinstance(feature, kinds.Image) or not isinstance(label, kinds.ClassLabel):
    raise ValueError(
      f'tfds:{name} is not an image classification dataset: its supervised keys are '
      f'{builder.info.supervised_keys} of types {type(feature).__name__} and '
      f'{type(label).__name__}.'
    )
  directory = str(builder.data_path)  # a builder could not be sent to another process

  def read(split, indices):
    try:
      records = open_records(directory, split, image_key)
      for chunk in chunks(indices, 4096):
        for i, record in zip(chunk, records.__getitems__(chunk) if chunk else ()):
          file = f' ({record["file_name"].decode()})' if 'file_name' in record else ''
          yield f'tfds:{name}/{split}/{i}{file}', record[image_key], int(record[label_key])
    except Exception as error:  # TFDS and array_record raise many kinds
      raise ValueError(
        f'tfds:{name}/{split}: {directory} can not be read: {error}. A shard is missing or '
        'damaged: copy it again, or remove that folder, which is then prepared anew.'
      ) from error

  sizes = {name: info.num_examples for name, info in builder.info.splits.items()}
  channels = 1 if feature.shape[-1] == 1 else 3
  return Source(sizes, tuple(label.names), channels, read)


@functools.lru_cache(maxsize=8)
def open_records(directory: str, split: str, image_key: str):
  """The records of a split, whose shards this process opens once; images stay encoded."""
  import tensorflow_datasets

  decoders = {image_key: tensorflow_datasets.decode.SkipDecoding()}
  builder = tensorflow_datasets.builder_from_directory(directory)
  return builder.as_data_source(split=split, decoders=decoders)


def prepared_builder(name: str, root: pathlib.Path):
  """The TFDS builder of data prepared as array_record, preparing it if need be."""
  converted = root / CONVERTED
  if not find_builder(name, root):
    check_known(name)
  for attempt in ('find', 'prepare'):
    for directory in (root, converted):
      builder = find_builder(name, directory)
      if builder and builder.info.splits and builder.info.file_format.value == 'array_record':
        return builder
    if attempt == 'find':
      prepare(name, root, converted)
  raise AssertionError(f'{name} was prepared below {root} and is not there')


def find_builder(name: str, directory: pathlib.Path):
  """TFDS's builder of a dataset that it knows, or that lies prepared in the directory."""
  import tensorflow_datasets

  try:
    return tensorflow_datasets.builder(name, data_dir=directory)
  except tensorflow_datasets.core.DatasetNotFoundError:
    return None


def check_known(name: str) -> None:
  """Raises ValueError for a dataset that TFDS doesn't have."""
  import tensorflow_datasets

  known = tensorflow_datasets.list_builders(with_community_datasets=False)
  choose('data.source: dataset', re.split('[/:]', name)[0], known)


def prepare(name: str, root: pathlib.Path, converted: pathlib.Path) -> None:
  """Runs `prepare.py` in a child process.

  Raises:
    ValueError: it failed; the message holds its reason and how to get the data.
  """
  logging.getLogger(__name__).info('Preparing %s below %s (once) ...', name, root)
  command = [sys.executable, '-m', 'vit_jax.prepare', name, str(root), str(converted)]
  package = str(pathlib.Path(__file__).resolve().parents[1])
  path = os.pathsep.join(filter(None, [package, os.environ.get('PYTHONPATH')]))
  env = os.environ | {'PYTHONPATH': path, 'TF_CPP_MIN_LOG_LEVEL': '3'}
  child = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, errors='replace')
  if child.returncode:
    lines = [line for line in child.stderr.splitlines() if line.strip()]
    reason = lines[-1][:500] if lines else f'exit code {child.returncode}'
    raise ValueError(
      f'tfds:{name} is not prepared below {str(root)!r} and could not be: {reason}\n'
      'On a machine with a network, with tensorflow installed, run\n'
      f'    tfds build {name} --file_format=array_record --data_dir={root}\n'
      'and copy the folder here; or point data.dir (or TFDS_DATA_DIR) at prepared data; or '
      'use data.source=folder:<path>.'
    )


SOURCES = {'tfds': tfds, 'folder': folder, 'digits': digits, 'synthetic': synthetic}
