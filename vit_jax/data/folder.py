"""Lists the images in a folder in a fixed order, and decides which images are held out for testing.

Decisions:
  * A file is identified by a hash of its path without the class folder. For example, the file
    `cat/a/1.jpg` is identified by the hash of `a/1.jpg`. This hash alone gives the file a position
    in [0, 1), and the position decides whether the file is held out. So a file stays in its split
    when other files are added or removed, or when the file is moved to another class.
  * The files of a split are sorted by position. This order mixes the classes, and does not depend
    on the file system or the NumPy version. A percentage, as in `train[:90%]`, is a range of
    positions, so it selects only about this percentage of the files.
  * Warnings report ignored files and folders, except hidden ones.
"""

import collections
from collections.abc import Collection, Iterator
import dataclasses
import hashlib
import os
import pathlib
import unicodedata

import numpy as np

from vit_jax import bucket, progress
from vit_jax.data import image as image_lib
from vit_jax.data import splits
from vit_jax.data.label_rows import count_labels, label_text
from vit_jax.data.splits import TEST_NAMES
from vit_jax.names import abridged, choose

HELD_OUT = 0.2  # fraction of the files that are held out for testing if there is no test folder
MORE = '{}, or divide them into train/<class>/ and test/<class>/.'
NO_LABELS = (
  'If the images in {name}/ have no labels, rename this folder. Then another folder '
  f'({", ".join(TEST_NAMES[1:])}) or a part of the training images is used for testing.'
)


@dataclasses.dataclass(frozen=True)
class Files:
  """The image files of a split, sorted by `splits.position`, as arrays to save memory.

  Attributes:
    top: folder at which the paths start, such as the parent of the class folders.
    path_N: path of each file, relative to `top`, as bytes.
    label_N: class index of each file, int32. If an image can have several labels: multi-hot
      labels, uint8 `[N, L]`, which are 1 for each class of the image.
    hash_N: result of `hash_name` for each file, uint64.
    span: range (low, high) of `splits.position` that selects the files; (0, 1): no selection.
  """

  top: pathlib.Path
  path_N: np.ndarray
  label_N: np.ndarray
  hash_N: np.ndarray
  span: tuple[float, float] = (0.0, 1.0)

  def __len__(self) -> int:
    return len(self.hash_N)

  @property
  def by_hash(self) -> bool:
    """Whether positions, and not a folder or a label file, selected the files."""
    return self.span != (0.0, 1.0)

  @property
  def position_N(self) -> np.ndarray:
    """`splits.position` of each file, increasing; rescaled so that `span` becomes [0, 1)."""
    low, high = self.span
    return (splits.position(self.hash_N) - low) / (high - low)

  def within(self, low: float, high: float) -> 'Files':
    """Returns the files whose hashes have a `position` in [low, high)."""
    start, stop = np.searchsorted(splits.position(self.hash_N), (low, high))
    arrays = (array[start:stop] for array in (self.path_N, self.label_N, self.hash_N))
    return Files(self.top, *arrays, (low, high))

  def hold_out(self) -> dict[str, 'Files']:
    """Divides the files by their positions into the splits `train` and `test`."""
    return {'train': self.within(HELD_OUT, 1.0), 'test': self.within(0.0, HELD_OUT)}

  def fingerprint(self) -> str:
    """Returns 16 hex digits that identify the file paths, their labels and their order."""
    digest = hashlib.sha256()
    label_N = self.label_N if self.label_N.ndim == 2 else self.label_N.tolist()  # lists are larger
    for label, path in zip(label_N, self.path_N.tolist()):
      digest.update(b'%b %b\0' % (label_text(label).encode(), path))
    return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Folder:
  """The class names of a dataset, the files of each split, and warnings for the user."""

  class_names: tuple[str, ...]
  files: dict[str, Files]
  warnings: tuple[str, ...]


def open_folder(root: pathlib.Path) -> Folder:
  """Lists the images of each split of the folder `root`.

  If `root` has a folder `train/`, the training images are in `train/<class>/`, and test images are
  in folders with names from `TEST_NAMES`. The first of these folders becomes the split `test`;
  other test folders keep their names as splits. If `root` has no folder `train/`, all images are in
  `<class>/`. Without `train/` or without test folders, the files whose `position` is below
  `HELD_OUT` become the split `test`.

  Raises:
    ValueError: fewer than two classes, a class named like a split if there is no `train/`, a class
      without a training image, or no test images.
  """
  split = (root / 'train').is_dir()
  held_out = splits.test_splits([name for name in TEST_NAMES if split and (root / name).is_dir()])
  top = root / 'train' if split else root
  class_names = tuple(sorted({unicodedata.normalize('NFC', name) for name in subfolders(top)}))
  passed_over = collections.Counter()
  if len(class_names) < 2:
    if split:
      check_train_is_split(root, class_names)
    raise ValueError(
      f'{root}: found {len(class_names)} class folders ({", ".join(class_names) or "none"}), '
      'expected at least two. Store images as <path>/<class>/*.jpg, or as '
      '<path>/train/<class>/*.jpg and <path>/test/<class>/*.jpg.'
    )
  if (names := splits.split_like(class_names)) and not split:
    raise ValueError(
      f'{root}: expected classes, found names of splits: {abridged(names)}. Name the training '
      f'split train/, and the test split {"/ or ".join(TEST_NAMES)}/, each with a folder per class.'
    )
  listed = list_files(top, class_names, passed_over)
  files = {'train': listed} if held_out else listed.hold_out()
  for name, folder in held_out.items():
    files[name] = list_files(root / folder, class_names, passed_over)
  check_classes(root, class_names, listed, files)
  return Folder(class_names, files, tuple(warnings(root, class_names, files, passed_over)))


def check_train_is_split(root: pathlib.Path, inside: tuple[str, ...]) -> None:
  """Raises ValueError if `train/` is probably a class. `inside` lists folders in `train/`."""
  others = [name for name in subfolders(root) if name not in ('train', *TEST_NAMES)]
  classes = [name for name in others if any(walk_images(root / name, collections.Counter()))]
  if classes:
    raise ValueError(
      f'{root}: train/ was read as the training split, but has {len(inside)} class folders '
      f'({", ".join(inside) or "none"}), expected at least two. Folders next to it have images: '
      f'{abridged(classes)}. If train is a class, rename its folder, or list the images in a file: '
      'data.source=labels:<csv>. If train/ is the training split, move the class folders into it.'
    )


def check_classes(
  root: pathlib.Path, class_names: tuple[str, ...], listed: Files, files: dict[str, Files]
) -> None:
  """Raises ValueError if a class has no training image, or if the test split is empty."""
  if absent := without(class_names, listed):
    raise ValueError(
      f'{root}: no images for class {abridged(absent)} (looked for '
      f'{", ".join(image_lib.EXTENSIONS)}). Add images, or remove the folder.'
    )
  more = MORE.format(splits.repeated_names(listed.hash_N) or 'Add images')
  if absent := without(class_names, files['train']):
    raise ValueError(
      f'{root}: all images of class {abridged(absent)} are held out for testing. A hash of the '
      f'file name selects {HELD_OUT:.0%} of the files on average, sometimes all in a class. {more}'
    )
  if not len(test := files['test']):
    if test.by_hash:
      how = f'A hash of the file name selects {HELD_OUT:.0%} of the files on average. {more}'
    else:
      how = f'Test images must be in {test.top}/<class>/. {NO_LABELS.format(name=test.top.name)}'
    raise ValueError(f'{test.top}: no test images. {how}')


def warnings(
  root: pathlib.Path,
  class_names: tuple[str, ...],
  files: dict[str, Files],
  passed_over: collections.Counter,
) -> Iterator[str]:
  """Yields warnings: classes without test images, unused files and folders, renamed splits."""
  if absent := without(class_names, files['test']):
    yield (
      f'{root}: no test images for class {abridged(absent)}, so the test covers only other classes.'
    )
  yield from not_used(root, passed_over)
  tops = [part.top for part in files.values()]
  yield from unused(root, tops, unread=(root, *tops))
  held_out = {name: part.top.name for name, part in files.items() if name != 'train'}
  if len(held_out) > 1 and held_out['test'] != 'test':
    shown = (f'{folder}/ is the split {name!r}' for name, folder in held_out.items())
    yield f'{root}: {", ".join(shown)}.'


def unused(
  root: pathlib.Path, tops: Collection[pathlib.Path], unread: Collection[pathlib.Path]
) -> Iterator[str]:
  """Yields warnings: unused folders in `root` and splits (`tops`), images directly in `unread`."""
  for folder in dict.fromkeys((root, *tops)):
    inside = sorted(folder.iterdir(), key=lambda path: path.name)
    if skipped := [p.name for p in inside if p.is_dir() and useless(p)]:
      yield (
        f'{folder}: folders not used: {abridged(skipped)}. Each of them is a link to a folder that '
        'contains the link, or was added by macOS.'
      )
    loose = [p.name for p in inside if image_lib.has_image_name(p.name) and p.is_file()]
    if loose and folder in unread:
      yield f'{folder}: images not used: {abridged(loose)}. Move them into another folder.'
  if root not in tops and (others := set(subfolders(root)) - {'train', *TEST_NAMES}):
    yield (
      f'{root}: folders not used: {abridged(sorted(others))}. Test images are read from the '
      f'folders {", ".join(TEST_NAMES)}, and training images from the folder train.'
    )


def not_used(root: pathlib.Path, passed_over: collections.Counter) -> Iterator[str]:
  """Yields a warning if there are unused files; `passed_over` is {extension: number of files}."""
  if passed_over:
    most = sorted(passed_over, key=lambda kind: (-passed_over[kind], kind))
    yield (
      f'{root}: {passed_over.total():,} files are not used: '
      f'{abridged([f"{passed_over[kind]:,} {kind}" for kind in most])}. Images must have one of '
      f'the extensions {", ".join(image_lib.EXTENSIONS)}.'
    )


def without(class_names: tuple[str, ...], files: Files) -> list[str]:
  """Returns the names of the classes without a file in `files`."""
  count_L = count_labels(files.label_N, len(class_names))
  return [class_names[label] for label in np.flatnonzero(count_L == 0)]


def subfolders(root: pathlib.Path) -> tuple[str, ...]:
  """Returns the sorted names of the folders in `root` that are searched for images."""
  return tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and is_searched(p)))


def is_searched(folder: pathlib.Path) -> bool:
  """Returns whether a folder is searched for images; hidden and `useless` folders are not."""
  return not folder.name.startswith('.') and not useless(folder)


def useless(folder: pathlib.Path) -> bool:
  """Returns whether a folder is named `__MACOSX`, or is a link to a folder above the link."""
  # A search would follow such a link forever. Check all parents, as the path can have more links.
  loops = folder.is_symlink() and any(
    above.resolve().is_relative_to(folder.resolve()) for above in folder.parents
  )
  return folder.name == '__MACOSX' or loops


def list_files(
  top: pathlib.Path, class_names: tuple[str, ...], passed_over: collections.Counter
) -> Files:
  """Lists all images in the class folders in `top`; counts other files in `passed_over`.

  Only the names of files are checked, so a broken link is reported later, when it is read.

  Raises:
    ValueError: `top` has a class folder that is not in `class_names`, or a folder is unreadable.
  """
  label_of, found = {}, []
  for name in subfolders(top):
    try:
      class_name = choose(f'{top}: class folder', unicodedata.normalize('NFC', name), class_names)
    except ValueError as error:
      raise ValueError(f'{error} {NO_LABELS.format(name=top.name)}') from None
    label_of[name] = class_names.index(class_name)
  with progress.announced(f'Listing the images in {top} ...'):
    for name, label in label_of.items():
      for below in walk_images(top / name, passed_over):
        found.append((splits.hash_name(below), os.fsencode(f'{name}/{below}'), label))
  return as_files(top, found)


def walk_images(root: pathlib.Path, passed_over: collections.Counter) -> Iterator[str]:
  """Yields the path of each image, relative to `root`; counts other files in `passed_over`.

  Links to folders are followed. Folders for which `is_searched` is False are skipped.
  """

  def refuse(error):
    raise ValueError(f'{error.filename}: {error.strerror}.') from error

  walk = root.walk() if bucket.is_remote(root) else os.walk(root, onerror=refuse, followlinks=True)
  for folder, below, names in walk:
    below[:] = [name for name in below if is_searched(pathlib.Path(folder, name))]
    inside = '' if folder == str(root) else folder[len(str(root)) + 1 :]
    # In a bucket, `walk` also yields folders that must not be searched.
    if any(part[:1] == '.' or part == '__MACOSX' for part in inside.split(os.sep)):
      continue
    for name in image_lib.only_images(names, passed_over):
      yield os.path.join(inside, name)


def as_files(top: pathlib.Path, found: list[tuple[int, bytes, int]]) -> Files:
  """Converts a list of (hash, path, label) to `Files`, sorted by hash, then by path."""
  hashes, paths, labels = zip(*sorted(found)) if found else ((), (), ())
  arrays = np.array(paths, np.bytes_), np.array(labels, np.int32), np.array(hashes, np.uint64)
  return Files(top, *arrays)
