"""ReaL: which classes are in ImageNet's validation images (Beyer et al. 2020, 2006.07159)."""

import json
import pathlib
import re

import numpy as np

from vit_jax.data import Source

NUMBER = re.compile(r'ILSVRC2012_val_(\d{8})')  # of a file, from 1 on
CLASS = re.compile(r'n\d{8}')  # in whose order the labels number the classes


def load_real_labels(path: pathlib.Path, source: Source, split: str) -> np.ndarray:
  """Which classes are in the images of a split, bool `[N, L]`; none in those without a label.

  Images are known by the names of their files, so that any part of them in any order will do.
  Of TFDS every record is read for that, once more than for evaluation.

  Args:
    path: of `real.json`: for each of the files, in their order, a list of numbers of classes.
    source: of ImageNet's validation images.
    split: in TFDS notation.

  Raises:
    ValueError: no such labels, or other images or classes than theirs.
  """
  name, classes = f'data.real_labels={path}', source.class_names
  if not all(map(CLASS.fullmatch, classes)) or list(classes) != sorted(classes):
    raise ValueError(
      f"{name} numbers ImageNet's classes in the order of their names, n01440764 to n15075141; "
      f'those here are {", ".join(classes[:3])}, ...'
    )
  labels = read(path, name, len(classes))
  found = []
  for part, start, stop in source.pieces(split):
    for example, _, _ in source.read(part, range(start, stop)):
      number = NUMBER.search(example)
      if not number or not 0 < int(number[1]) <= len(labels):
        raise ValueError(
          f'{name} is of the files ILSVRC2012_val_00000001 to {len(labels):08d}: {example} is none.'
        )
      found.append(labels[int(number[1]) - 1])
  if not any(found):
    raise ValueError(f'{name}: no image of {split} has a label there.')
  real_NL = np.zeros((len(found), len(classes)), bool)
  for row_L, label in zip(real_NL, found):
    row_L[label] = True
  return real_NL


def read(path: pathlib.Path, name: str, count: int) -> list[list[int]]:
  """The labels in a file, each a number below `count`.

  Raises:
    ValueError: there are none.
  """
  try:
    labels = json.loads(path.read_text(encoding='utf-8'))
    if {type(number) for label in labels for number in label} - {int}:
      raise ValueError('it holds something else than numbers')
  except (OSError, ValueError, TypeError) as error:
    raise ValueError(
      f'{name} is no list of lists of numbers ({error}). It is real.json of '
      'github.com/google-research/reassessed-imagenet.'
    ) from error
  others = {number for label in labels for number in label} - set(range(count))
  if others:
    raise ValueError(f'{name} has class {min(others)}, the data 0 to {count - 1}.')
  return labels
