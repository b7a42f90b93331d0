"""A folder of images: which files it holds, in which order, and which of them are held out.

Decisions:
  * A file is known by a hash of its name below its class's folder. The hash alone decides its
    position in [0, 1), and the position decides whether it is held out. So no file moves to another
    split when others are added, removed or given another class.
  * The order of a split's files is that of their positions: mixed, independent of file system and
    NumPy version, and a percentage of a split is a range of it.
  * Whatever is passed over is named in a warning.
"""

import collections
from collections.abc import Iterator, Sequence
import dataclasses
import hashlib
import os
import pathlib
import unicodedata

import numpy as np

from vit_jax import progress
from vit_jax.data import image as image_lib
from vit_jax.names import choose

TEST_NAMES = ('test', 'val', 'valid', 'validation')
HELD_OUT = 0.2  # share of a folder's files, where no others are there to test on
SHOWN = 5  # names in a warning
# Folders of these names are hardly classes.
SPLIT_LIKE = {'train', 'training', 'testing', 'eval', 'evaluation', 'dev', *TEST_NAMES}


@dataclasses.dataclass(frozen=True)
class Files:
  """The files of a split, in the order of their positions. A million paths take little memory.

  Attributes:
    top: the folder that holds the classes.
    path_N: from `top`, bytes.
    label_N: int32.
    hash_N: `hash_name` of each, uint64.
    span: the positions that the split covers.
  """

  top: pathlib.Path
  path_N: np.ndarray
  label_N: np.ndarray
  hash_N: np.ndarray
  span: tuple[float, float] = (0.0, 1.0)

  def __len__(self) -> int:
    return len(self.hash_N)

  @property
  def position_N(self) -> np.ndarray:
    """The rising positions in [0, 1), spread over the whole range where the split is a part."""
    low, high = self.span
    return (position(self.hash_N) - low) / (high - low)

  def within(self, low: float, high: float) -> 'Files':
    """The files at these positions."""
    start, stop = np.searchsorted(position(self.hash_N), (low, high))
    arrays = (array[start:stop] for array in (self.path_N, self.label_N, self.hash_N))
    return Files(self.top, *arrays, (low, high))

  def fingerprint(self) -> str:
    """16 hex digits that other files, other labels or another order would change."""
    digest = hashlib.sha256()
    for label, path in zip(self.label_N.tolist(), self.path_N.tolist()):
      digest.update(b'%d %b\0' % (label, path))
    return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Folder:
  """A folder's classes, its files by split, and warnings about what is odd there."""

  class_names: tuple[str, ...]
  files: dict[str, Files]
  warnings: tuple[str, ...]


def hash_name(name: str) -> int:
  """64 bits of a file's name below its class's folder, whatever its case and Unicode form."""
  text = os.fsencode(name).decode('utf-8', 'surrogateescape')  # also where the locale is not UTF-8
  text = unicodedata.normalize('NFC', text).casefold()
  digest = hashlib.sha256(text.encode('utf-8', 'surrogateescape')).digest()
  return int.from_bytes(digest[:8], 'big')


def position(hash_N: np.ndarray) -> np.ndarray:
  """The position in [0, 1) of each hash: of as many bits as float64 holds."""
  return (hash_N >> np.uint64(11)) * 2.0**-53


def open_folder(root: pathlib.Path) -> Folder:
  """Lists `train/<class>/*` with one of `TEST_NAMES` beside it, or plain `<class>/*`.

  The first of `TEST_NAMES` there is the split `test`, and the others keep their names. Without
  any, the files at positions below `HELD_OUT` are.

  Raises:
    ValueError: fewer than two classes, one without a training image, or no image to test on.
  """
  split = (root / 'train').is_dir()
  held_out = [name for name in TEST_NAMES if split and (root / name).is_dir()]
  top = root / 'train' if split else root
  class_names, passed_over = subfolders(top), collections.Counter()
  if len(class_names) < 2:
    raise ValueError(
      f'{root}: found {len(class_names)} class folders ({", ".join(class_names) or "none"}) and '
      'need two or more: <path>/<class>/*.jpg, or <path>/train/<class>/*.jpg beside test/.'
    )
  split_like = [name for name in class_names if name.casefold() in SPLIT_LIKE]
  if split_like and not split:
    raise ValueError(
      f'{root}: {some(split_like)} would be a class, and looks like a part of the data. Name the '
      f'parts train/ and {"/ or ".join(TEST_NAMES)}/, each with a folder for every class.'
    )
  listed = list_files(top, class_names, passed_over)
  files = {'train': listed}
  if held_out:  # the first answers to `test` alone: it can't be chosen by as `val` as well
    names = ['test', *held_out[1:]]
    for name, folder in zip(names, held_out):
      files[name] = list_files(root / folder, class_names, passed_over)
  else:
    files = {'train': listed.within(HELD_OUT, 1.0), 'test': listed.within(0.0, HELD_OUT)}
  check_classes(root, class_names, listed, files)
  return Folder(class_names, files, tuple(warnings(root, class_names, files, passed_over)))


def check_classes(
  root: pathlib.Path, class_names: tuple[str, ...], listed: Files, files: dict[str, Files]
) -> None:
  """Raises ValueError where a class has no training image, or the test split no image."""
  absent = without(class_names, listed)
  if absent:
    raise ValueError(
      f'{root}: no images for class {some(absent)}; looked for {", ".join(image_lib.EXTENSIONS)}. '
      'Add some, or remove the folder.'
    )
  absent = without(class_names, files['train'])
  if absent:
    raise ValueError(
      f'{root}: all images of class {some(absent)} are held out: the hash of its name decides that '
      f'for {HELD_OUT:.0%} of all files. Add images, or divide them into train/ and test/.'
    )
  if not len(files['test']):
    raise ValueError(
      f'{files["test"].top}: no image to test on. Without a folder test/ beside train/, the hash '
      f'of its name holds a file out, {HELD_OUT:.0%} of many: add images, or divide them into '
      'train/<class>/ and test/<class>/.'
    )


def warnings(
  root: pathlib.Path,
  class_names: tuple[str, ...],
  files: dict[str, Files],
  passed_over: collections.Counter,
) -> Iterator[str]:
  """Yields what a person should know of: classes without test images, files and folders unused."""
  if absent := without(class_names, files['test']):
    yield f'{root}: no test image of class {some(absent)}: the test says nothing about them.'
  if passed_over:
    most = sorted(passed_over, key=lambda kind: (-passed_over[kind], kind))
    yield (
      f'{root}: {passed_over.total():,} files are not used: '
      f'{some([f"{passed_over[kind]:,} {kind}" for kind in most])}. Images are '
      f'{", ".join(image_lib.EXTENSIONS)}.'
    )
  others = sorted(set(subfolders(root)) - {'train', *TEST_NAMES})
  if others and files['train'].top != root:
    yield (
      f'{root}: not used beside train/: {some(others)}. Folders to test on are '
      f'{", ".join(TEST_NAMES)}.'
    )


def without(class_names: tuple[str, ...], files: Files) -> list[str]:
  """The classes without a file."""
  count_L = np.bincount(files.label_N, minlength=len(class_names))
  return [class_names[label] for label in np.flatnonzero(count_L == 0)]


def some(names: Sequence[str]) -> str:
  """The first few names, and how many more there are."""
  more = len(names) - SHOWN
  return ', '.join(names[:SHOWN]) + (f' and {more:,} more' if more > 0 else '')


def subfolders(root: pathlib.Path) -> tuple[str, ...]:
  """The classes: the folders in `root`, sorted, hidden ones left out."""
  return tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and p.name[0] != '.'))


def list_files(
  top: pathlib.Path, class_names: tuple[str, ...], passed_over: collections.Counter
) -> Files:
  """Every image below the class folders in `top`; counts other files by their extensions.

  Only names are looked at: a link that leads nowhere is found when it is read.

  Raises:
    ValueError: a class folder that is not among `class_names`, or a folder that can't be read.
  """
  there = subfolders(top)
  for name in there:
    choose(f'{top}: class folder', name, class_names)

  def refuse(error):
    raise ValueError(f'{error.filename}: {error.strerror}.') from error

  found = []
  with progress.announced(f'Listing the images in {top} ...'):
    for label, class_name in enumerate(class_names):
      if class_name not in there:
        continue
      for folder, _, names in os.walk(top / class_name, onerror=refuse):
        inside = '' if folder == str(top / class_name) else folder[len(str(top / class_name)) + 1 :]
        for name in names:
          if image_lib.has_image_name(name):
            below = os.path.join(inside, name)
            found.append((hash_name(below), os.fsencode(f'{class_name}/{below}'), label))
          elif not name.startswith('.'):
            passed_over[pathlib.PurePath(name).suffix.lower() or 'without an extension'] += 1
    found.sort()  # one name in several classes has one hash: then the path decides
  hashes, paths, labels = zip(*found) if found else ((), (), ())
  arrays = np.array(paths, np.bytes_), np.array(labels, np.int32), np.array(hashes, np.uint64)
  return Files(top, *arrays)
