"""Loads ReaL, the reassessed labels of ImageNet's validation set (Beyer et al. 2020, 2006.07159).

Unlike the original labels, ReaL lists every class that an image shows.
"""

import json
import pathlib
import re

import numpy as np

from vit_jax.bucket import to_path
from vit_jax.data import Source
from vit_jax.experiment import Experiment
from vit_jax.names import WORDNET_ID

NUMBER = re.compile(r'ILSVRC2012_val_(\d{8})')  # file name of an image; the first number is 1


def real_labels(exp: Experiment, split: str, source: Source, count: int) -> dict[str, np.ndarray]:
  """Returns the ReaL labels of a split as `{'real': bool [N, L]}`.

  The result is an empty dict if the config key `data.real_labels` is empty.

  Args:
    exp: the experiment. `data.real_labels` of its config is the path of the file `real.json`.
    split: the split in TFDS notation.
    source: dataset that contains the split.
    count: N, the number of examples that were loaded from the split.

  Raises:
    ValueError: one of these cases: the labels cannot be read; they belong to other images or
      classes; bad images were skipped, so labels and images cannot be matched; the model predicts
      several labels per image.
  """
  path = exp.config.data.real_labels
  if not path:
    return {}
  if exp.task.multi_label:
    raise ValueError(
      'data.real_labels needs a model that predicts one label, but this model can predict several. '
      'Remove data.real_labels.'
    )
  real_NL = load_real_labels(to_path(path), source, split)
  if len(real_NL) != count:
    raise ValueError(
      f'data.real_labels: {len(real_NL) - count} of the {len(real_NL)} images are bad and '
      'were skipped, so labels and images cannot be matched. Set data.cache=stream, so that bad '
      'images keep their places in the split.'
    )
  return {'real': real_NL}


def load_real_labels(path: pathlib.Path, source: Source, split: str) -> np.ndarray:
  """Returns which classes each image of a split shows, bool `[N, L]`.

  The row of an image without a label is all False. Images are matched to labels by file name, so
  the split can be any subset of ImageNet's validation images, in any order. To get the file names,
  this function reads every example of the split. If the dataset is from TFDS, the evaluation has to
  read the examples a second time.

  Args:
    path: path of `real.json`. This file has a list of class numbers for each image, in the order of
      the file names.
    source: dataset with ImageNet's validation images.
    split: the split in TFDS notation.

  Raises:
    ValueError: the labels cannot be read, or belong to other images or classes.
  """
  name, classes = f'data.real_labels={path}', source.class_names
  if not all(map(WORDNET_ID.fullmatch, classes)) or list(classes) != sorted(classes):
    raise ValueError(
      f"{name}: the numbers in this file stand for ImageNet's 1000 classes, sorted by name from "
      f'n01440764 to n15075141, but the data has the classes {", ".join(classes[:3])}, ...'
    )
  labels = read(path, name, len(classes))
  found = []
  for part, start, stop in source.pieces(split):
    for example, _, _ in source.read(part, range(start, stop)):
      number = NUMBER.search(example)
      if not number or not 0 < int(number[1]) <= len(labels):
        raise ValueError(
          f'{name}: the labels are for the files ILSVRC2012_val_00000001 to {len(labels):08d}, but '
          f'the data has the file {example}.'
        )
      found.append(labels[int(number[1]) - 1])
  if not any(found):
    raise ValueError(f'{name}: no image of {split} has a label. Check data.real_labels.')
  real_NL = np.zeros((len(found), len(classes)), bool)
  for row_L, label in zip(real_NL, found):
    row_L[label] = True
  return real_NL


def read(path: pathlib.Path, name: str, count: int) -> list[list[int]]:
  """Reads a file with labels: returns a list of class numbers, all below `count`, for each image.

  Args:
    path: path of the file.
    name: config key and path of the file; error messages begin with this text.
    count: number of classes.

  Raises:
    ValueError: the file cannot be read, is not a list of lists of integers, or contains a number
      that is not a class.
  """
  try:
    labels = json.loads(path.read_text(encoding='utf-8'))
    if {type(number) for label in labels for number in label} - {int}:
      raise ValueError('the file contains values that are not integers')
  except (OSError, ValueError, TypeError, RecursionError) as error:
    raise ValueError(
      f'{name}: expected a list of lists of numbers ({error}). Use real.json from '
      'github.com/google-research/reassessed-imagenet.'
    ) from error
  others = {number for label in labels for number in label} - set(range(count))
  if others:
    raise ValueError(
      f'{name} contains label {min(others)}, but the labels of the data are 0 to {count - 1}.'
    )
  return labels
