"""Reads a dataset from a label file, for `data.source=labels:<CSV or JSONL file>`.

Decisions:
  * If any row of the label file has more than one label, the dataset is multi-label. Its labels are
    multi-hot, and an image without a label belongs to no class. If no row has more than one label,
    a missing label is a mistake.
  * An image is identified by a hash of its path, as in `folder.py`. The hash ignores leading
    folders that are named like a split or a class. So the sources `labels:` and `folder:` hold out
    the same images of a folder for testing. A model that was trained with one of the two sources
    can be tested with the other one.
  * Some images can be outside the folder at which relative paths start. For such an image, the hash
    ignores the path up to the last split or class folder. If the path has no such folder, the hash
    ignores the common parent folder of all outside images. So the images can be moved.
  * A mistake in the label file raises an error that names the line. Two rows for the same image are
    a mistake if their labels or their splits differ.
"""

from collections.abc import Mapping, Sequence
import functools
import itertools
import os
import pathlib
import unicodedata

import numpy as np

from vit_jax import progress
from vit_jax.bucket import is_remote
from vit_jax.data.folder import HELD_OUT, Files, Folder, without
from vit_jax.data.label_rows import SEPARATOR, SPLITS, Row, read_rows, refuse
from vit_jax.data.splits import TEST_NAMES, hash_name, repeated_names, test_splits
from vit_jax.names import abridged


def open_labels(file: pathlib.Path, top: pathlib.Path) -> Folder:
  """Reads the classes and the images of each split from a label file.

  The first name of `TEST_NAMES` that occurs in the column `split` becomes the split `test`. If no
  such name occurs, or the label file has no column `split`, a hash of the files selects the split
  `test`: the images whose `splits.position`, a number from 0 to 1, is below `HELD_OUT`.

  Args:
    file: the label file, `.csv` or `.jsonl`, with the columns `path`, `label` and optionally
      `split`.
    top: folder at which relative paths in the label file start.

  Returns:
    A `Folder` with the class names, sorted, and the files of each split. If any image has several
    labels, the labels are multi-hot: `label_N` of the files is `[N, L]`.

  Raises:
    ValueError: the file cannot be read, or has a mistake; the message names the line.
  """
  # `start` is absolute, so that `identities` can compare it with absolute paths in the label file.
  start = top if is_remote(top) else pathlib.Path(os.path.abspath(top))
  rows, warnings = merged(file, start, read_rows(file))
  paths = locate(file, top, rows)
  class_names = tuple(sorted({label for row in rows for label in row.labels}))
  label_N = as_array(file, rows, class_names)
  if len(class_names) < 2:
    raise ValueError(
      f"{file}: expected at least two classes in column 'label', found {len(class_names)}"
      f'{": " if class_names else ""}{", ".join(class_names)}. To recognise a single class, also '
      "list images that do not show it, with a label such as 'other'."
    )
  removed = {name.casefold() for name in (*SPLITS, *class_names)}
  texts = identities([row.path for row in rows], start, removed)
  hash_N = np.array([hash_name(text) for text in texts], np.uint64)
  path_N = np.array([os.fsencode(path) for path in paths], np.bytes_)
  order = np.lexsort((path_N, hash_N))
  listed = Files(top, path_N[order], label_N[order], hash_N[order])
  split_N = np.array([row.split for row in rows])[order]
  files = by_column(file, listed, split_N, warnings)
  check_splits(file, class_names, files)
  if absent := without(class_names, files['test']):
    warnings.append(
      f'{file}: no test images for class {abridged(absent)}, so the test covers only other classes.'
    )
  return Folder(class_names, files, tuple(warnings))


def as_array(file: pathlib.Path, rows: Sequence[Row], class_names: tuple[str, ...]) -> np.ndarray:
  """Returns the labels of the rows: class indices, int32 `[N]`, or multi-hot, uint8 `[N, L]`.

  If any row has more than one label, the dataset is multi-label, and its labels are multi-hot.

  Raises:
    ValueError: a row has no label, and the dataset is not multi-label.
  """
  number = {name: i for i, name in enumerate(class_names)}
  if any(len(row.labels) > 1 for row in rows):
    label_NL = np.zeros((len(rows), len(class_names)), np.uint8)
    for label_L, row in zip(label_NL, rows):
      label_L[[number[label] for label in row.labels]] = 1
    return label_NL
  for row in rows:
    if not row.labels:
      refuse(
        file,
        row.line,
        f"column 'label' of {row.path!r} is empty. Write the class. For images of no class, write "
        "an additional class such as 'none'. "
        'Images without a label are allowed only if some image in the file has several labels.',
      )
  return np.array([number[row.labels[0]] for row in rows], np.int32)


def identities(paths: Sequence[str], top: pathlib.Path, removed: set[str]) -> list[str]:
  """Returns the text that identifies each image: its path without split and class folders.

  For an image in `top`, the text is the path relative to `top`, without leading folders that are
  named like a split or a class. For an image outside `top`, the text is the part of the path after
  the last such folder. If the path has no such folder, the text is the path relative to the common
  parent of all images outside `top`.

  Args:
    paths: absolute paths, and paths relative to `top`.
    top: folder at which relative paths start: an absolute path, or a folder in a bucket.
    removed: casefolded names of splits and classes.
  """
  is_removed = lambda folder: unicodedata.normalize('NFC', folder).casefold() in removed
  base = os.path.normpath(top)
  places = [pathlib.PurePath(os.path.normpath(os.path.join(top, path))) for path in paths]
  outside = [place.parent for place in places if not place.is_relative_to(base)]
  shared = pathlib.PurePath(os.path.commonpath(outside) if outside else '').parts
  texts = []
  for place in places:
    if place.is_relative_to(base):
      *folders, name = place.relative_to(base).parts
      kept = itertools.dropwhile(is_removed, folders)
    else:
      *folders, name = place.parts
      ends = [i for i, folder in enumerate(folders, start=1) if is_removed(folder)]
      kept = folders[ends[-1] if ends else len(shared) :]
    texts.append('/'.join([*kept, name]))
  return texts


def by_column(
  file: pathlib.Path, listed: Files, split_N: np.ndarray, warnings: list[str]
) -> dict[str, Files]:
  """Divides the listed files into splits by the column `split`, and returns {split: files}.

  `split_N` is the value of the column for each file. If no value is in `TEST_NAMES`, the files are
  divided by position, as in `folder.open_folder`. If some values are in `TEST_NAMES`, but none is
  `test`, the function appends a message to `warnings`.

  Raises:
    ValueError: some values are in `TEST_NAMES`, but none is `train`.
  """
  arrays = listed.path_N, listed.label_N, listed.hash_N
  found = {name: Files(listed.top, *(a[split_N == name] for a in arrays)) for name in SPLITS}
  held_out = test_splits([name for name in TEST_NAMES if len(found[name])])
  if not held_out:
    return listed.hold_out()
  if not len(found['train']):
    raise ValueError(f"{file}: column 'split' has no 'train'. Write train for training images.")
  if (first := held_out['test']) != 'test':
    warnings.append(
      f"{file}: no image has the split 'test', so the split {first!r} is used for testing."
    )
  return {'train': found['train']} | {name: found[own] for name, own in held_out.items()}


def check_splits(
  file: pathlib.Path, class_names: tuple[str, ...], files: Mapping[str, Files]
) -> None:
  """Raises ValueError if a class has no training image, or if the test split is empty."""
  absent, reason, remedy = without(class_names, files['train']), '', ''
  if files['train'].by_hash:
    reason = (
      f' A hash of the path selects about {HELD_OUT:.0%} of the images for testing. If there are '
      'only a few images, the hash can select all of them or none.'
    )
    if repeated := repeated_names(np.concatenate([part.hash_N for part in files.values()])):
      reason += f' {repeated}.'
    remedy = ", or add a column 'split' with the values train and test"
  if absent:
    raise ValueError(
      f'{file}: no training images for class {abridged(absent)}.{reason} List more images of this '
      f'class, or remove it{remedy}.'
    )
  if not len(files['test']):
    raise ValueError(f'{file}: no test images.{reason} List more images{remedy}.')


def merged(
  file: pathlib.Path, top: pathlib.Path, rows: Sequence[Row]
) -> tuple[list[Row], list[str]]:
  """Removes rows that repeat an earlier row; returns the other rows and a list of warnings.

  If no row is removed, there are no warnings. Two rows are for the same image even if one has the
  image's relative path, and the other its absolute path.

  Raises:
    ValueError: two rows are for the same image, but have different labels or splits.
  """
  known, repeated = {}, []
  for row in rows:
    first = known.setdefault(os.path.normpath(os.path.join(top, row.path)), row)
    if first is row:
      continue
    for column, ours, theirs in (
      ('label', set(first.labels), set(row.labels)),
      ('split', {first.split}, {row.split}),
    ):
      if ours != theirs:
        texts = (SEPARATOR.join(sorted(names)) for names in (ours, theirs))
        before, now = (repr(text) for text in texts)
        refuse(
          file,
          row.line,
          f'{row.path!r} has {column} {now}, but line {first.line} gives {before}. List each image '
          f'once; join several labels of an image with {SEPARATOR!r}.',
        )
    repeated.append(f'{row.path} (line {row.line})')
  if not repeated:
    return list(rows), []
  return list(known.values()), [
    f'{file}: ignored {len(repeated):,} rows that repeat an earlier row: {abridged(repeated)}.'
  ]


def locate(file: pathlib.Path, top: pathlib.Path, rows: Sequence[Row]) -> list[str]:
  """Returns the path of each row's image, absolute or relative to `top`.

  In Unicode, a letter such as an umlaut can be encoded in two ways. If the label file and the disk
  encode a letter differently, the result has the encoding of the disk.

  Raises:
    ValueError: an image does not exist.
  """

  @functools.cache  # listing a folder is faster than looking for each of its files
  def names_in(folder: str) -> set[str]:
    if is_remote(top):
      inside = folder.removeprefix(str(top)).strip('/')
      return {path.name for path in (top / inside if inside else top).iterdir()}
    try:
      return set(os.listdir(folder))
    except OSError:
      return set()

  def spelled(path: str) -> str | None:
    for form in (None, 'NFC', 'NFD'):
      text = unicodedata.normalize(form, path) if form else path
      folder, name = os.path.split(os.path.join(top, text))
      if name in names_in(folder):
        return text
    return None

  with progress.announced(f'Looking for the images of {file} ...'):
    found = [spelled(row.path) for row in rows]
  missing = [f'{row.path} (line {row.line})' for row, path in zip(rows, found) if path is None]
  if missing:
    slashes = " Write '/' instead of '\\'." if '\\' in missing[0] else ''
    raise ValueError(
      f'{file}: {len(missing):,} of {len(rows):,} images do not exist: {abridged(missing)}. '
      f"Relative paths start at {top}.{slashes} Correct the column 'path', or set "
      'data.dir to the folder at which the paths start. A relative path of the label file would '
      'then also start at data.dir, so give its absolute path.'
    )
  return found
