"""Finds mistakes in data: rare classes, copies, unreadable files, examples that were trained on.

Decisions:
  * A test must not use examples that the weights were trained on. In data sets of files,
    `trained.leave_out_trained` removes these files. In data sets without files (digits, TFDS),
    `check_untrained` raises an error. In a validation split, `open_validation` removes such files,
    or keeps the examples with a warning.
  * All other checks are for data sets of files, and are done before training.
  * These other checks only log warnings. They change nothing, and training continues.
  * Only cheap checks are done. To find copies, a file is read only if a file of another split has
    the same size in bytes. With more than `MOST_FILES` files, no file is read at all. If the search
    for copies would read more than `MOST_BYTES`, it is skipped. The log reports both cases.
    Files in a bucket are not read.
  * A copy with the same name as its original is not reported. If the original is a training file,
    evaluation recognises the copy by this name, and leaves it out.
  * If images are streamed (decoded during training), unreadable images are found from the header of
    each file. Images kept in memory need no check, because they are all decoded before training.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
import concurrent.futures
import dataclasses
import hashlib
import itertools
import logging
import os
import pathlib

from ml_collections import ConfigDict
import numpy as np

from vit_jax import progress
from vit_jax.bucket import is_remote
from vit_jax.data import Source, count_labels, open_header, overlap
from vit_jax.distributed import is_first
from vit_jax.names import abridged
from vit_jax.workdir.trained import NothingLeft, TrainingFiles, leave_out_trained

log = logging.getLogger(__name__)

FEW = 10  # a warning names each class with fewer training images
MOST_FILES = 100_000  # maximum number of files among which copies are searched
MOST_BYTES = 2**28  # maximum number of bytes that are read to find copies


@dataclasses.dataclass(frozen=True)
class File:
  """Properties by which files are compared.

  A file and a link to it are equal if their names have the same hash. A link with a different name
  counts as a copy.

  Attributes:
    hash: hash of the file name, as in `folder.Files`.
    place: device and inode, which are the same for a file and the links to it.
    size: number of bytes; 0 if the file cannot be read.
  """

  hash: int
  place: tuple[int, int]
  size: int


Hashes = dict[pathlib.Path, int]  # hash of the name of each file


def report_mistakes(source: Source, splits: Sequence[str], settings: ConfigDict) -> None:
  """Logs warnings about the files of a data set, in process 0.

  Args:
    source: the data set. For a data set without files, such as a TFDS data set, nothing is logged.
    splits: the splits that a run uses, in TFDS notation; the first is the training split.
    settings: the config keys `data.*`.
  """
  remote = any(is_remote(files.top) for files in source.files.values())
  if remote and is_first():  # every file would be downloaded
    for warning in few_images(source, splits[0]):
      log.warning('%s', warning)
  elif source.files and is_first():
    for warning in audit(source, splits, settings.cache == 'stream', settings.skip_bad_images):
      log.warning('%s', warning)


def audit(
  source: Source, splits: Sequence[str], streamed: bool, skipped: bool = False
) -> Iterator[str]:
  """Yields warnings about the files of a data set.

  Args:
    source: a data set of files.
    splits: as in `report_mistakes`.
    streamed: whether images are decoded during training.
    skipped: whether training skips unreadable images.
  """
  yield from few_images(source, splits[0])
  hashes = {split: hashes_of(source, split) for split in splits}
  everything = dict(itertools.chain.from_iterable(own.items() for own in hashes.values()))
  if len(everything) > MOST_FILES:
    unchecked = 'copies or unreadable images' if streamed else 'copies'
    yield (
      f'{source.spec}: more than {MOST_FILES:,} files, so splits were not searched for {unchecked}.'
    )
    return
  with (
    progress.announced('Checking the files ...'),
    concurrent.futures.ThreadPoolExecutor() as pool,
  ):
    if streamed:
      yield from unreadable(pool, list(everything), skipped)
    files = dict(zip(everything, pool.map(look_at, everything, everything.values())))
    yield from copies(pool, hashes, files)


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


def hashes_of(source: Source, split: str) -> Hashes:
  """Returns the path of each file in a split, with the hash of its name."""
  found = {}
  for name, start, stop in source.pieces(split):
    paths = (path for _, path, _ in source.read(name, range(start, stop)))
    found |= zip(paths, source.files[name].hash_N[start:stop].tolist())
  return found


def look_at(path: pathlib.Path, name_hash: int) -> File:
  """Returns the properties of a file; its size is 0 if it cannot be read."""
  try:
    found = os.stat(path)
    return File(name_hash, (found.st_dev, found.st_ino), found.st_size)
  except OSError:  # the error is reported when the file is decoded
    return File(name_hash, (0, 0), 0)


def unreadable(
  pool: concurrent.futures.Executor, paths: Sequence[pathlib.Path], skipped: bool
) -> Iterator[str]:
  """Yields a warning that names the files without the header of an accepted image format."""

  def is_bad(path):
    if not path.is_file():  # opening a pipe might never end
      return True
    try:
      with open_header(path):
        return False
    except Exception:  # Pillow's decoders raise many kinds of errors
      return True

  bad = [str(path) for path, is_so in zip(paths, pool.map(is_bad, paths)) if is_so]
  if bad:
    remedy = (
      'They are skipped (data.skip_bad_images=True).'
      if skipped
      else 'Repair or remove them, or skip them: --config.data.skip_bad_images=True.'
    )
    yield f'{len(bad):,} of {len(paths):,} files are not readable images: {abridged(bad)}. {remedy}'


def copies(
  pool: concurrent.futures.Executor,
  paths: Mapping[str, Collection[pathlib.Path]],
  files: Mapping[pathlib.Path, File],
) -> Iterator[str]:
  """Yields a warning for each pair of splits that contain files with the same bytes.

  Copies that have the same name are not reported. The docstring of this module gives the reason.

  Args:
    pool: threads that read the files.
    paths: `{split: paths of the files in the split}`.
    files: properties of each file.
  """
  others, doubtful = {}, {}  # `doubtful` keeps the order of its keys
  for one, other in itertools.combinations(paths, 2):
    known = {files[path] for path in paths[one]}
    own_sizes = {file.size for file in known} - {0}
    others[one, other] = [
      p for p in paths[other] if files[p] not in known and files[p].size in own_sizes
    ]
    sizes = {files[path].size for path in others[one, other]}
    doubtful |= dict.fromkeys(others[one, other])
    doubtful |= dict.fromkeys(path for path in paths[one] if files[path].size in sizes)
  if sum(files[path].size for path in doubtful) > MOST_BYTES:
    yield (
      f'{len(doubtful):,} files have the same size as a file of another split and could be copies. '
      f'They were not compared, because together they have more than {MOST_BYTES >> 20} MiB.'
    )
    return
  digests = dict(zip(doubtful, pool.map(digest_of, doubtful)))
  for (one, other), candidates in others.items():
    first = {digests[path]: path for path in reversed(paths[one]) if digests.get(path)}
    recognised = {(files[path].hash, digests.get(path)) for path in paths[one]}
    found = [
      (path, first[d])
      for path in candidates
      if (d := digests[path]) in first and (files[path].hash, d) not in recognised
    ]
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


def check_untrained(source: Source, split: str, names: TrainingFiles) -> None:
  """Raises ValueError if a test split overlaps a split that the weights were trained on.

  Args:
    source: dataset of the test.
    split: the test split, in TFDS notation.
    names: files and splits that the weights were trained on.
  """
  if trained_on := overlapping(source, split, names.all_splits):
    raise ValueError(
      f'Split {split!r} shares examples with {trained_on!r} of {source.spec}. The weights were '
      'trained on these examples, so a test on them is not valid. Choose a different '
      'data.eval_split.'
    )


def open_validation(source: Source, split: str, names: TrainingFiles) -> Source:
  """Returns the data set of a validation split without files that the weights were trained on.

  If the `init` weights or the teacher were trained on all files of the split, e.g. in pre-training
  without labels, the files stay. In data sets without files, the examples stay too. In both cases,
  a warning is logged. The run is not refused, because its test is still valid.

  Args:
    source: dataset of the run.
    split: the validation split, in TFDS notation.
    names: files and splits that the weights were trained on.

  Raises:
    ValueError: the run itself trains on all files of the split.
  """
  trained = 'the weights of init or the teacher were trained'
  found = overlapping(source, split, names.inherited_splits)
  why = found and f'it shares examples with {found!r} of {source.spec}, on which {trained}'
  try:
    source, _ = leave_out_trained(source, split, names)
  except NothingLeft:
    source, _ = leave_out_trained(source, split, names.own())
    why = f'{trained} on all its images, so none is left out'
  if why:
    log.warning(
      'data.val_split=%r: %s. So the validation accuracy can be too high, and the best checkpoint, '
      'the learning rate of a sweep and the temperature can be wrong. Choose a data.val_split '
      'without these examples. If no such split exists, train the weights of init or '
      'distill.teacher again, with the data.train_split of this run.',
      split,
      why,
    )
  return source


def overlapping(source: Source, split: str, others: Sequence[tuple[str, str]]) -> str:
  """Returns the first split in `others` that shares examples with `split`; '' if there is none.

  `others` contains pairs `(data.source, split)`. For data sets with files, the result is always ''.
  """
  for spec, other in () if source.files else others:
    if spec == source.spec and overlap(source.pieces(split), source.pieces(other)):
      return other
  return ''
