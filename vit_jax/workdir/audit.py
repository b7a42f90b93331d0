"""Finds mistakes in a data set of files before training: few images, copies, unreadable files.

Decisions:
  * Mistakes are warnings. Nothing is changed, and training continues.
  * Only cheap checks are done. To find copies, a file is read only if a file of another split has
    the same size in bytes. If there are more than `MOST_FILES` files, no file is read. If more than
    `MOST_BYTES` would be read, copies are not searched for. In both cases, the log reports this.
    Files in a bucket are not read.
  * To find unreadable images, only the header of each file is read, and only if images are
    streamed. Images that are kept in memory need no check, because they are all decoded before
    training.
"""

import collections
from collections.abc import Iterator, Sequence
import concurrent.futures
import hashlib
import itertools
import logging
import os
import pathlib

import numpy as np
from PIL import Image

from vit_jax import progress
from vit_jax.bucket import is_remote
from vit_jax.data import Source, count_labels
from vit_jax.distributed import is_first
from vit_jax.names import abridged

log = logging.getLogger(__name__)

FEW = 10  # a warning names each class with fewer training images
MOST_FILES = 100_000  # maximum number of files among which copies are searched
MOST_BYTES = 2**28  # maximum number of bytes that are read to find copies

Sizes = dict[pathlib.Path, int]  # size of each file in bytes; 0 for a file that cannot be read


def report_mistakes(source: Source, splits: Sequence[str], streamed: bool) -> None:
  """Logs warnings about the files of a data set, in process 0.

  Args:
    source: the data set. For a data set without files, such as a TFDS data set, nothing is logged.
    splits: the splits that a run uses, in TFDS notation; the first is the training split.
    streamed: whether images are decoded during training.
  """
  remote = any(is_remote(files.top) for files in source.files.values())
  if remote and is_first():  # every file would be downloaded
    for warning in few_images(source, splits[0]):
      log.warning('%s', warning)
  elif source.files and is_first():
    for warning in audit(source, splits, streamed):
      log.warning('%s', warning)


def audit(source: Source, splits: Sequence[str], streamed: bool) -> Iterator[str]:
  """Yields warnings about the files of a data set; arguments as in `report_mistakes`."""
  yield from few_images(source, splits[0])
  paths = {split: paths_of(source, split) for split in splits}
  if sum(map(len, paths.values())) > MOST_FILES:
    yield (
      f'{source.spec}: more than {MOST_FILES:,} files, so splits were not searched for copies.'
    )
    return
  with (
    progress.announced('Checking the files ...'),
    concurrent.futures.ThreadPoolExecutor() as pool,
  ):
    everything = list(itertools.chain(*paths.values()))
    if streamed:
      yield from unreadable(pool, everything)
    yield from copies(pool, paths, dict(zip(everything, pool.map(size_of, everything))))


def few_images(source: Source, split: str) -> Iterator[str]:
  """Yields a warning that names the classes with fewer than `FEW` training images."""
  labels = [source.files[name].label_N[start:stop] for name, start, stop in source.pieces(split)]
  count_L = count_labels(np.concatenate(labels), len(source.class_names))
  few = sorted((count, name) for name, count in zip(source.class_names, count_L) if count < FEW)
  if few:
    yield (
      f'{split}: {len(few):,} of {len(count_L):,} classes have fewer than {FEW} images: '
      f'{abridged([f"{name} {count}" for count, name in few])}.'
    )


def paths_of(source: Source, split: str) -> list[pathlib.Path]:
  """Returns the paths of the files in a split."""
  parts = (source.read(name, range(start, stop)) for name, start, stop in source.pieces(split))
  return [path for _, path, _ in itertools.chain.from_iterable(parts)]


def size_of(path: pathlib.Path) -> int:
  """Returns the size of a file in bytes; 0 if it cannot be read."""
  try:
    return os.stat(path).st_size
  except OSError:  # the error is reported when the file is decoded
    return 0


def unreadable(pool: concurrent.futures.Executor, paths: Sequence[pathlib.Path]) -> Iterator[str]:
  """Yields a warning that names the files without a valid image header."""

  def is_bad(path):
    if not path.is_file():  # opening a pipe might never end
      return True
    try:
      with Image.open(path):
        return False
    except Exception:  # Pillow's decoders raise many kinds of errors
      return True

  bad = [str(path) for path, is_so in zip(paths, pool.map(is_bad, paths)) if is_so]
  if bad:
    yield (
      f'{len(bad):,} of {len(paths):,} files are not readable images: {abridged(bad)}. Repair or '
      'remove them, or skip them: --config.data.skip_bad_images=True.'
    )


def copies(
  pool: concurrent.futures.Executor, paths: dict[str, list[pathlib.Path]], sizes: Sizes
) -> Iterator[str]:
  """Yields a warning for each pair of splits that contain files with the same bytes.

  Args:
    pool: threads that read the files.
    paths: `{split: paths of the files in the split}`.
    sizes: size of each file in bytes.
  """
  present = collections.defaultdict(set)  # {size: splits with a file of this size}
  for split, files in paths.items():
    for path in files:
      present[sizes[path]].add(split)
  doubtful = [path for path, size in sizes.items() if size and len(present[size]) > 1]
  if sum(sizes[path] for path in doubtful) > MOST_BYTES:
    yield (
      f'{len(doubtful):,} files have the same size as a file of another split and could be copies. '
      f'They were not compared, because together they have more than {MOST_BYTES >> 20} MiB.'
    )
    return
  digests = dict(zip(doubtful, pool.map(digest_of, doubtful)))
  for one, other in itertools.combinations(paths, 2):
    first = {digests[path]: path for path in reversed(paths[one]) if digests.get(path)}
    found = [(path, first[d]) for path in paths[other] if (d := digests.get(path)) in first]
    if found:
      yield (
        f'{len(found):,} images of {other} are exact copies of images of {one}: '
        f'{abridged([f"{path} = {original}" for path, original in found])}. These copies make the '
        f'scores of {other} too good. Remove them.'
      )


def digest_of(path: pathlib.Path) -> bytes:
  """Returns the SHA-256 of a file; empty if it cannot be read."""
  try:
    return hashlib.sha256(path.read_bytes()).digest()
  except OSError:
    return b''
