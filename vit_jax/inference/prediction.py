"""What a model says of image files: their classes, or their features."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import csv
import json
import pathlib
import sys

import jax.numpy as jnp
import numpy as np

from vit_jax import opening, progress
from vit_jax.data import find_images
from vit_jax.distributed import start_up
from vit_jax.evaluation import map_files, probabilities
from vit_jax.names import choose, local
from vit_jax.opening import Request

KINDS = ('pooled', 'tokens')  # of features


def predict(
  workdir: str | pathlib.Path | None,
  images: Sequence[str],
  topk: int = 5,
  *,
  init: str = '',
  step: str = '',
  overrides: Mapping[str, str] | None = None,
) -> Iterator[dict]:
  """For each image file its `topk` classes, or why it can't be read, in the order given.

      for row in vit_jax.predict('runs/digits', ['cat.png', 'photos/']): print(row)

  Args:
    workdir: folder of a training run; None with `init`.
    images: files, folders and patterns such as `photos/*.jpg`.
    topk: number of classes per image.
    init: published weights instead of a workdir, anything that `vit_jax.load` reads.
    step: checkpoint of the workdir: `best`, `last` or a number; by default the best by validation
      accuracy, else the last.
    overrides: dotted config keys and their values as text, e.g. `{'model.dtype': 'bfloat16'}`.

  Returns:
    An iterator over what `predict_files` yields.

  Raises:
    ValueError: as `predict_files`.
  """
  start_up()
  folder = None if workdir is None else local(workdir)
  request = Request(folder, init, step, overrides or {})
  return predict_files(request, list(images), topk)


def predict_files(request: Request, paths: list[str], topk: int) -> Iterator[dict]:
  """For each file its `topk` classes, or why it can't be read, in the order given.

  Yields:
    `{'file': ..., 'predictions': [{'class': ..., 'probability': ...}, ...]}`, best first, or
    `{'file': ..., 'error': ...}`.

  Raises:
    ValueError: no such weights, no such folder, or overrides that contradict the weights.
  """
  if topk < 1:
    raise ValueError(f'--topk must be positive, got {topk}.')
  files = find_images(paths)
  exp, params, _ = opening.open_model(request)
  names = exp.task.class_names
  found = map_files(exp, params, files, probabilities(exp))
  if not sys.stdout.isatty():  # where what is printed shows how far it is
    found = progress.bar(found, 'Predicting', 'image', len(files))
  for file, row in found:
    if isinstance(row, str):
      yield {'file': str(file), 'error': row}
      continue
    best = np.argsort(-row, kind='stable')[:topk]
    found = [{'class': names[i], 'probability': float(row[i])} for i in best]
    yield {'file': str(file), 'predictions': found}


def features(
  request: Request, paths: list[str], kind: str
) -> tuple[dict[str, np.ndarray], list[str]]:
  """What the model makes of each file, without its head.

  Args:
    request: which model; published weights need no head.
    paths: files, folders and patterns.
    kind: `pooled`, what the head takes: `[N, D]`; or `tokens`, all that the pool reads, class
      token and registers first, after the last LayerNorm where that comes before the pool:
      `[N, T, D]`.

  Returns:
    `{'path': [N], 'feature': [N, ...]}`, the features float32; and of each file that can't be read
    why.

  Raises:
    ValueError: as `predict_files`; or no file at all could be read.
  """
  choose('--features', kind, KINDS)
  files = find_images(paths)
  exp, params, _ = opening.open_model(request, 'any')
  backbone = exp.model.clone(num_classes=None)
  if kind == 'tokens':
    has_class = exp.model.has_class  # else it would go with the pool that reads it
    backbone = backbone.clone(pool='none', class_token=has_class, representation_size=None)

  def extract(image_BHWC, params):
    return backbone.apply({'params': params}, exp.normalize(image_BHWC)).astype(jnp.float32)

  found = map_files(exp, params, files, extract)
  found = progress.bar(found, 'Computing features', 'image', len(files))
  return stack(found, len(files))


def stack(
  found: Iterable[tuple[pathlib.Path, np.ndarray | str]], count: int
) -> tuple[dict[str, np.ndarray], list[str]]:
  """What `map_files` gives of `count` files, in arrays as `features` gives them: once in memory.

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
    raise ValueError(f'None of the {count} files is a readable image, e.g. {errors[0]}')
  return {'path': np.array(paths), 'feature': feature[: len(paths)]}, errors


def as_table(found: Iterable[dict]) -> None:
  """For each file its name and, below, its classes."""
  for row in found:
    if 'predictions' in row:
      print(row['file'])
      for guess in row['predictions']:
        print(f'  {guess["probability"]:7.2%}  {guess["class"]}', flush=True)


def as_json(found: Iterable[dict]) -> None:
  """An object a line, as `predict` gives it."""
  for row in found:
    print(json.dumps(row), flush=True)


def as_csv(found: Iterable[dict]) -> None:
  """A line for each class of each file, the likeliest first."""
  lines = csv.writer(sys.stdout, lineterminator='\n')
  for i, row in enumerate(found):
    if not i:  # the model is open by now
      lines.writerow(('file', 'rank', 'class', 'probability'))
    for rank, guess in enumerate(row.get('predictions', ()), start=1):
      lines.writerow((row['file'], rank, guess['class'], guess['probability']))


FORMATS = {'table': as_table, 'json': as_json, 'csv': as_csv}


def print_predictions(found: Iterable[dict], format: str) -> list[str]:
  """Prints what was predicted; returns of each file that can't be read why."""
  errors = []

  def noted():
    for row in found:
      errors.extend([row['error']] if 'error' in row else [])
      yield row

  choose('--format', format, FORMATS)(noted())
  return errors
