"""What a model makes of image files: their classes, or their features.

Files are decoded by threads while the device works on those before them.
"""

from collections.abc import Callable, Iterable, Iterator
import concurrent.futures
import csv
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from vit_jax import experiment, image, progress, sharding
from vit_jax.names import choose

Function = Callable[[jax.Array, dict], jax.Array]

BATCH = 64  # images at once
KINDS = ('pooled', 'tokens')  # of features


def predict(
  workdir: pathlib.Path | None,
  paths: list[str],
  topk: int = 5,
  overrides: dict[str, str] | None = None,
  config: ConfigDict | None = None,
  init: str = '',
  step: str = '',
) -> Iterator[dict]:
  """For each file its `topk` classes, or why it can't be read, in the order given.

  The model is that of a workdir's checkpoint, `step` as in `checkpoint.preferred`, or published
  weights as they are: `init`.

  Yields:
    `{'file': ..., 'predictions': [{'class': ..., 'probability': ...}, ...]}`, best first, or
    `{'file': ..., 'error': ...}`.

  Raises:
    ValueError: no checkpoint, no such folder, or overrides that contradict the checkpoint.
  """
  if topk < 1:
    raise ValueError(f'--topk must be positive, got {topk}.')
  files = image.find(paths)
  exp, params, _ = experiment.open_model(workdir, init, overrides or {}, config, step=step)
  names = exp.task.class_names
  found = rows(exp, params, files, probabilities(exp))
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
  workdir: pathlib.Path | None,
  paths: list[str],
  kind: str,
  overrides: dict[str, str] | None = None,
  config: ConfigDict | None = None,
  init: str = '',
  step: str = '',
) -> tuple[dict[str, np.ndarray], list[str]]:
  """What the model makes of each file, without its head.

  Args:
    workdir: of a run; None with `init`.
    paths: files, folders and patterns.
    kind: `pooled`, what the head takes: `[N, D]`; or `tokens`, all that the pool reads, class
      token and registers first, after the last LayerNorm where that comes before the pool:
      `[N, T, D]`.
    overrides: dotted keys and values put over the model's config.
    config: what the run must have been trained with; None to trust it.
    init: published weights, which need no head.
    step: which checkpoint of the workdir, as in `checkpoint.preferred`.

  Returns:
    `{'path': [N], 'feature': [N, ...]}`, the features float32; and of each file that can't be read
    why.

  Raises:
    ValueError: as `predict`; or no file at all could be read.
  """
  choose('--features', kind, KINDS)
  files = image.find(paths)
  exp, params, _ = experiment.open_model(workdir, init, overrides or {}, config, 'any', step)
  backbone = exp.model.clone(num_classes=None)
  if kind == 'tokens':
    has_class = exp.model.has_class  # else it would go with the pool that reads it
    backbone = backbone.clone(pool='none', class_token=has_class, representation_size=None)

  def extract(image_BHWC, params):
    return backbone.apply({'params': params}, exp.normalize(image_BHWC)).astype(jnp.float32)

  found = rows(exp, params, files, extract)
  found = progress.bar(found, 'Computing features', 'image', len(files))
  return stack(found, len(files))


def stack(
  found: Iterable[tuple[pathlib.Path, np.ndarray | str]], count: int
) -> tuple[dict[str, np.ndarray], list[str]]:
  """What `rows` gives of `count` files, in arrays as `features` gives them: once in memory.

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


def rows(
  exp: experiment.Experiment, params: dict, files: list[pathlib.Path], function: Function
) -> Iterator[tuple[pathlib.Path, np.ndarray | str]]:
  """For each file what `function(image_BHWC, params)` makes of it, or why it can't be read.

  Args:
    exp: whose preprocessing it is.
    params: of its model.
    files: one at least.
    function: of uint8 images; it gives an array with a row for each.
  """
  batch_size = min(len(files), BATCH)
  mesh = sharding.inference_mesh(batch_size)
  batch_size = -(-batch_size // mesh.size) * mesh.size
  params = sharding.replicate(mesh, params)
  step = make_step(exp, mesh, function)
  blank = np.zeros((*exp.task.stored_size, exp.task.channels), np.uint8)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    chunks = [files[start : start + BATCH] for start in range(0, len(files), BATCH)]
    submit = lambda chunk: [pool.submit(read, file, exp) for file in chunk]
    reading = submit(chunks[0])
    for chunk, following in zip(chunks, [*chunks[1:], []]):
      images = [future.result() for future in reading]
      reading = submit(following)  # goes on while the device works
      good = [row for row in images if isinstance(row, np.ndarray)]
      values = iter(())
      if good:
        image_BHWC = np.stack(good + [blank] * (batch_size - len(good)))
        image_BHWC = jax.device_put(image_BHWC, sharding.over_batch(mesh))
        values = iter(np.asarray(step(image_BHWC, params)))
      for file, row in zip(chunk, images):
        yield file, row if isinstance(row, str) else next(values)


def probabilities(exp: experiment.Experiment) -> Function:
  """`(image_BHWC, params) -> probability_BL` of uint8 images."""
  return lambda image_BHWC, params: jax.nn.softmax(
    exp.model.apply({'params': params}, exp.normalize(image_BHWC))
  )


def make_step(exp: experiment.Experiment, mesh: jax.sharding.Mesh, function: Function) -> Function:
  """The function on every device, compiled."""

  def step(image_BHWC, params):
    parts = exp.micro_batches(mesh, len(image_BHWC))
    return sharding.concatenate(function, mesh, parts)(image_BHWC, params)

  return jax.jit(step)


def read(file: pathlib.Path, exp: experiment.Experiment) -> np.ndarray | str:
  """The image as the model was trained to see it, or why there is none."""
  try:
    decoded = image.decode(image.read(file), file, exp.task.channels)
  except image.BadImage as error:
    return str(error)
  return exp.fit(decoded, exp.task.stored_size)


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
  lines.writerow(('file', 'rank', 'class', 'probability'))
  for row in found:
    for rank, guess in enumerate(row.get('predictions', ()), start=1):
      lines.writerow((row['file'], rank, guess['class'], guess['probability']))


FORMATS = {'table': as_table, 'json': as_json, 'csv': as_csv}


def show(found: Iterable[dict], format: str) -> list[str]:
  """Prints what was predicted; returns of each file that can't be read why."""
  errors = []

  def noted():
    for row in found:
      errors.extend([row['error']] if 'error' in row else [])
      yield row

  choose('--format', format, FORMATS)(noted())
  return errors
