"""Reads the rows of a label file: a CSV or JSONL file that lists images with their labels.

Every mistake in the file raises an error that names the file, the line and the remedy.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import csv
import dataclasses
import io
import json
import os
import pathlib
from typing import NoReturn
import unicodedata

import numpy as np

from vit_jax.bucket import is_remote
from vit_jax.data.splits import TEST_NAMES
from vit_jax.names import choose

COLUMNS = ('path', 'label', 'split')
OPTIONAL = ('split',)
SPLITS = ('train', *TEST_NAMES)
SEPARATOR = ';'  # between several labels of one image


@dataclasses.dataclass(frozen=True)
class Row:
  """One row of a label file: an image with its labels and its split.

  Attributes:
    line: line number in the label file, from 1.
    path: normalised path of the image. A relative path in the label file stays relative.
    labels: class names without repetitions; empty if the image has no label.
    split: name from `SPLITS`; empty if the label file has no column `split`.
  """

  line: int
  path: str
  labels: tuple[str, ...]
  split: str


def refuse(file: pathlib.Path, line: int, problem: str) -> NoReturn:
  """Raises ValueError; the message names the label file, the line and the problem."""
  raise ValueError(f'{file}, line {line}: {problem}')


def read_rows(file: pathlib.Path) -> list[Row]:
  """Returns the rows of a `.csv` or `.jsonl` file with the columns `path`, `label` and `split`.

  The column `split` is optional.

  Raises:
    ValueError: the file cannot be read, lists no images, or has a mistake in a line.
  """
  rows = list(choose(f'{file}: type of the file', file.suffix.lower(), READERS)(file))
  if not rows:
    raise ValueError(f'{file}: no images are listed. List one image on each line.')
  bare = next((row for row in rows if not row.split), None)
  named = next((row for row in rows if row.split), None)
  if bare and named:  # only possible in JSONL: in CSV, the header holds for all rows
    refuse(
      file,
      bare.line,
      f"{bare.path!r} has no 'split', but line {named.line} has one. Write 'split' in every line, "
      'or in none.',
    )
  return rows


def read_csv(file: pathlib.Path) -> Iterator[Row]:
  """Yields the rows of a CSV file with a header.

  Raises:
    ValueError: the header or a row is wrong.
  """
  lines = csv.reader(io.StringIO(text_of(file), newline=''), strict=True)
  try:
    header = [name.strip().lower() for name in next(lines, [])]
    check_header(file, header)
    for values in lines:
      if not values:
        continue
      line, values = lines.line_num, [value.strip() for value in values]
      if len(values) != len(header):
        refuse(
          file,
          line,
          f'{len(values)} values for the columns {",".join(header)}. If a value contains a comma, '
          f'put the value into double quotes. Join several labels with {SEPARATOR!r}.',
        )
      yield make_row(file, line, dict(zip(header, values)))
  except csv.Error as error:
    refuse(file, lines.line_num, f'not a valid CSV file: {error}.')


def check_header(file: pathlib.Path, header: list[str]) -> None:
  """Raises ValueError if the names in `header`, the first line of a file, are not valid."""
  text = ','.join(header)
  for delimiter, name in ((';', 'semicolons'), ('\t', 'tabs')):
    if delimiter in text and 'path' in text.split(delimiter):
      refuse(
        file, 1, f'the columns are separated by {name}. Separate them by commas: path,label,split.'
      )
  if 'path' not in header and 'label' not in header:
    refuse(
      file, 1, f'expected the header path,label or path,label,split, got {text[:80]!r}. Add the '
      'header as the first line.',
    )  # fmt: skip
  check_columns(file, 1, header)


def check_columns(file: pathlib.Path, line: int, names: Sequence[str]) -> None:
  """Raises ValueError if a column in `names` is unknown or repeated, or a column is missing."""
  for name in names:
    if name not in COLUMNS:
      refuse(
        file, line, f'unknown column {name!r}. Valid: {", ".join(COLUMNS)}. Rename or remove it.'
      )
  for name in COLUMNS:
    if names.count(name) > 1 or (name not in names and name not in OPTIONAL):
      count = 'missing' if name not in names else 'given twice'
      refuse(file, line, f'the column {name!r} is {count}. Give it exactly once.')


def read_jsonl(file: pathlib.Path) -> Iterator[Row]:
  """Yields the rows of a JSONL file, which has one JSON object per line.

  The value of `label` is a text as in a CSV file, or a list of the image's class names.

  Raises:
    ValueError: a line is not valid JSON, or its object has wrong keys or values.
  """
  for line, text in enumerate(text_of(file).split('\n'), start=1):
    if not text.strip():
      continue
    try:
      found = json.loads(text)
    except (ValueError, RecursionError) as error:  # brackets can be nested too deeply
      refuse(file, line, f'not valid JSON ({error}).')
    if not isinstance(found, dict):
      refuse(file, line, 'expected an object such as {"path": "a.jpg", "label": ["cat", "dog"]}.')
    check_columns(file, line, list(found))
    for name, value in found.items():
      several = name == 'label' and isinstance(value, list)
      for item in value if several else [value]:
        if not isinstance(item, str):
          kinds = 'a text or a list of texts' if name == 'label' else 'a text'
          refuse(file, line, f'{name!r} must be {kinds}, got {json.dumps(value)[:80]}.')
    yield make_row(file, line, found)


READERS: dict[str, Callable[[pathlib.Path], Iterator[Row]]] = {
  '.csv': read_csv,
  '.jsonl': read_jsonl,
}


def text_of(file: pathlib.Path) -> str:
  """Returns the text of a UTF-8 file, without a byte order mark.

  Raises:
    ValueError: the file cannot be read, or is not UTF-8.
  """
  try:
    content = file.read_bytes()
  except OSError as error:
    raise ValueError(f'data.source: cannot read {str(file)!r}: {error.strerror}.') from error
  try:
    return content.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    line = content[: error.start].count(b'\n') + 1
    refuse(file, line, 'not UTF-8. Save the file in the encoding UTF-8.')


def make_row(file: pathlib.Path, line: int, values: Mapping[str, str | list[str]]) -> Row:
  """Converts the values of a line, {column: value}, to a `Row`.

  Raises:
    ValueError: the path or a label is empty, the path is in a bucket, or the split is unknown.
  """
  label, split = values['label'], values.get('split', '').strip()
  if not values['path'].strip():
    refuse(file, line, "column 'path' is empty. Write the path of an image, or remove the line.")
  if isinstance(label, str):
    label = label.split(SEPARATOR) if label.strip() else []
  labels = [unicodedata.normalize('NFC', name.strip()) for name in label]
  if not all(labels):
    refuse(
      file,
      line,
      f"column 'label' has an empty label: {SEPARATOR.join(labels)!r}. Name or remove it.",
    )
  if 'split' in values:
    choose(f"{file}, line {line}: column 'split'", split, SPLITS)
  if is_remote(path := values['path'].strip()):
    refuse(
      file,
      line,
      f'paths of images in a bucket must be relative, got {path!r}. Set data.dir to the folder in '
      'the bucket at which relative paths start, and shorten the paths.',
    )
  return Row(line, os.path.normpath(path), tuple(dict.fromkeys(labels)), split)


def label_text(label: int | Sequence[int]) -> str:
  """Returns a label as text: its class index or, for a multi-hot label, all indices, e.g. `1,4`."""
  return str(label) if isinstance(label, int) else ','.join(map(str, np.flatnonzero(label)))


def count_labels(label_N: np.ndarray, num_classes: int) -> np.ndarray:
  """Returns the number of images of each class: `[L]`. Labels are class indices or multi-hot."""
  if label_N.ndim == 2:
    return label_N.sum(axis=0, dtype=np.int64)
  return np.bincount(label_N, minlength=num_classes)
