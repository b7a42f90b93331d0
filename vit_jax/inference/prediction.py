"""Predicts the classes of image files, or computes their features."""

from collections.abc import Iterable, Iterator, Mapping
import csv
import json
import pathlib
import sys

import jax.numpy as jnp
import numpy as np

from vit_jax import opening, progress
from vit_jax.distributed import start_up
from vit_jax.evaluation import (
  PathLike,
  find_images,
  given_labels,
  map_files,
  probabilities,
  request_for,
)
from vit_jax.model import unit, without_pool
from vit_jax.names import check_positive, choose, one_line
from vit_jax.opening import Request

TOPK = 5  # number of classes per image, unless an image can have several labels
KINDS = ('pooled', 'tokens')  # kinds of features


def predict(
  workdir: str | pathlib.Path | None,
  images: PathLike | Iterable[PathLike],
  topk: int | None = None,
  *,
  init: str | pathlib.Path = '',
  step: str | int = '',
  overrides: Mapping[str, object] | None = None,
  classes: str | pathlib.Path | None = None,
  max_patches: int | None = None,
) -> Iterator[dict]:
  """Predicts the classes of each image file, in the given order.

      for row in vit_jax.predict('runs/digits', ['cat.png', 'photos/']): print(row)

  Args:
    workdir: folder of a training run; None if `init` is given.
    images: a path or a list of paths: files, folders and patterns such as `photos/*.jpg`.
    topk: number of classes per image, the most likely first. None: five classes. If an image can
      have several labels, None gives every label whose probability is at or above its threshold.
    init: published weights, if there is no workdir: anything that `vit_jax.load` reads.
    step: checkpoint of the workdir: `best`, `last` or a number. The default is the checkpoint with
      the best validation accuracy, or the last one if no checkpoint has a validation accuracy.
    overrides: dotted config keys and their values, e.g. `{'model.dtype': 'bfloat16'}`.
    classes: npz file with text embeddings of the classes, for weights of CLIP or SigLIP in `init`.
      `optim/zero_shot.py` describes the file.
    max_patches: maximum number of patches of an image; each image then keeps its aspect ratio.
      None: all images are resized to `data.image_size`.

  Returns:
    An iterator over one dict for each file. The dict is `{'file': ..., 'predictions': [{'class':
    ..., 'probability': ...}, ...]}`, or `{'file': ..., 'error': ...}` if the file cannot be read.

  Raises:
    ValueError: the weights or a folder do not exist, or the overrides do not fit the weights. Or
      both `workdir` and `init` are given, or neither is.
  """
  request = request_for(workdir, init, step, overrides, classes, max_patches)
  start_up()
  return predict_files(request, images, topk)


def predict_files(
  request: Request, paths: PathLike | Iterable[PathLike], topk: int | None
) -> Iterator[dict]:
  """Predicts the classes of each image file, in the given order.

  Args:
    request: names the model: a checkpoint of a workdir, or published weights.
    paths: files, folders and patterns, as `images` in `predict`.
    topk: number of classes per image, as in `predict`.

  Yields:
    `{'file': ..., 'predictions': [{'class': ..., 'probability': ...}, ...]}`, with the most likely
    class first. If an image can have several labels and `topk` is None, the list has only the
    classes that reach their threshold, so it can be empty.
    `{'file': ..., 'error': message}` if the file cannot be read.

  Raises:
    ValueError: the weights or a folder do not exist, or the overrides do not fit the weights.
  """
  if topk is not None:
    check_positive('topk', topk)
  files = find_images(paths)
  exp, params, _ = opening.open_model(request)
  names = exp.task.class_names
  found = map_files(exp, params, files, probabilities(exp))
  if not sys.stdout.isatty():  # on a terminal, the printed predictions show the progress
    found = progress.bar(found, 'Predicting', 'image', len(files))
  for file, row in found:
    if isinstance(row, str):
      yield {'file': str(file), 'error': row}
      continue
    if exp.task.multi_label and topk is None:
      best = given_labels(row, exp.calibration.thresholds)
    else:
      best = np.argsort(-row, kind='stable')[: topk or TOPK]
    likely = [{'class': names[i], 'probability': float(row[i])} for i in best]
    yield {'file': str(file), 'predictions': likely}


def features(
  request: Request, paths: PathLike | Iterable[PathLike], kind: str
) -> tuple[dict[str, np.ndarray], list[str]]:
  """Computes the features of each image file: the output of the model without its head.

  Args:
    request: names the model: a checkpoint of a workdir, or published weights, which need no head.
    paths: image files, folders and patterns, as `images` in `predict`.
    kind: `pooled` or `tokens`. `pooled` is the input of the head, `[N, D]` for N files. `tokens`
      are all T tokens after the last LayerNorm, without pooling: `[N, T, D]`. The class token and
      the registers come before the patches.

  Returns:
    A dict of two arrays for the N readable files: `path`, text `[N]`, and `feature`, float32
      `[N, D]` or `[N, T, D]`.
    A list with an error message for each file that cannot be read.

  Raises:
    ValueError: the weights or a folder do not exist, the overrides do not fit the weights, or no
      file could be read.
  """
  choose('--features', kind, KINDS)
  if kind == 'tokens' and request.max_patches is not None:
    raise ValueError(
      '--features=tokens needs images of one size, but --max_patches keeps their aspect ratio. '
      'Remove --max_patches, or use --features=pooled.'
    )
  files = find_images(paths)
  exp, params, _ = opening.open_model(request, 'any')
  backbone = without_pool(exp.model) if kind == 'tokens' else exp.model.clone(num_classes=None)

  def extract(image_BHWC, params):
    found = backbone.apply({'params': params}, exp.normalize(image_BHWC)).astype(jnp.float32)
    return unit(found) if kind == 'pooled' and exp.model.cosine else found

  found = map_files(exp, params, files, extract)
  found = progress.bar(found, 'Computing features', 'image', len(files))
  return stack(found, len(files))


def stack(
  found: Iterable[tuple[pathlib.Path, np.ndarray | str]], count: int
) -> tuple[dict[str, np.ndarray], list[str]]:
  """Collects the features of all files: returns the arrays and messages that `features` returns.

  The array for all files is allocated first and then filled, so that the features are in memory
  only once.

  Args:
    found: pairs of a file and its feature array or error message, from `map_files`.
    count: number of files.

  Raises:
    ValueError: no file could be read.
  """
  paths, errors, feature = [], [], None
  for file, row in found:
    if isinstance(row, str):
      errors.append(row)
      continue
    if feature is None:
      feature = np.empty((count, *row.shape), row.dtype)
    feature[len(paths)] = row
    paths.append(str(file))
  if not paths:
    raise ValueError(f'None of the {count} files is a readable image. First error: {errors[0]}')
  return {'path': np.array(paths), 'feature': feature[: len(paths)]}, errors


def as_table(found: Iterable[dict]) -> None:
  """Prints each file name, and below it one line for each predicted class, or `no label`.

  Files that cannot be read are skipped.
  """
  for row in found:
    if 'predictions' in row:
      print(one_line(row['file']))
      for guess in row['predictions']:
        print(f'  {guess["probability"]:7.2%}  {one_line(guess["class"])}', flush=True)
      if not row['predictions']:
        print('           no label', flush=True)


def as_json(found: Iterable[dict]) -> None:
  """Prints each dict of `predict_files` as a JSON object on one line."""
  for row in found:
    print(json.dumps(row), flush=True)


def as_csv(found: Iterable[dict]) -> None:
  """Prints one CSV line for each predicted class of a file, the most likely class first.

  A file without a predicted label has one line, in which all columns except `file` are empty. Files
  that cannot be read are skipped.
  """
  lines = csv.writer(sys.stdout, lineterminator='\n')
  for i, row in enumerate(found):
    if not i:  # print no header if opening the model fails
      lines.writerow(('file', 'rank', 'class', 'probability'))
    for rank, guess in enumerate(row.get('predictions', ()), start=1):
      lines.writerow((row['file'], rank, guess['class'], guess['probability']))
    if row.get('predictions') == []:
      lines.writerow((row['file'], '', '', ''))


FORMATS = {'table': as_table, 'json': as_json, 'csv': as_csv}


def print_predictions(found: Iterable[dict], format: str) -> list[str]:
  """Prints predictions, and returns one error message for each file that cannot be read.

  Args:
    found: the dicts of `predict_files`.
    format: one of `FORMATS`.
  """
  errors = []

  def noted():
    for row in found:
      errors.extend([row['error']] if 'error' in row else [])
      yield row

  choose('--format', format, FORMATS)(noted())
  return errors
