"""Classes of image files, by a trained model."""

from collections.abc import Callable, Iterator
import json
import logging
import pathlib

import jax
from ml_collections import ConfigDict
import numpy as np

from vit_jax import experiment, image, sharding

log = logging.getLogger(__name__)

BATCH = 64  # images at once


def predict(
  workdir: pathlib.Path | None,
  paths: list[str],
  topk: int = 5,
  overrides: dict[str, str] | None = None,
  config: ConfigDict | None = None,
  init: str = '',
) -> Iterator[dict]:
  """For each file its `topk` classes, or why it can't be read, in the order given.

  The model is that of a workdir, or published weights as they are: `init`.

  Yields:
    `{'file': ..., 'predictions': [{'class': ..., 'probability': ...}, ...]}`, best first, or
    `{'file': ..., 'error': ...}`.

  Raises:
    ValueError: no checkpoint, no such folder, or overrides that contradict the checkpoint.
  """
  if topk < 1:
    raise ValueError(f'--topk must be positive, got {topk}.')
  files = image.find(paths)
  batch_size = min(len(files), BATCH)
  sharding.start_up(batch_size)
  exp, params = experiment.open_model(workdir, init, overrides or {}, config)
  names = exp.task.class_names

  mesh = sharding.make_mesh()
  batch_size = -(-batch_size // mesh.size) * mesh.size
  params = jax.device_put(params, sharding.replicated(mesh))
  predict_step = make_predict_step(exp, mesh)
  blank = np.zeros((*exp.task.stored_size, exp.task.channels), np.uint8)

  for start in range(0, len(files), BATCH):
    rows = [read(file, exp) for file in files[start : start + BATCH]]
    good = [row for row in rows if isinstance(row, np.ndarray)]
    scores = iter(())
    if good:
      image_BHWC = np.stack(good + [blank] * (batch_size - len(good)))
      image_BHWC = jax.device_put(image_BHWC, sharding.over_batch(mesh))
      scores = iter(np.asarray(predict_step(image_BHWC, params)))
    for file, row in zip(files[start : start + BATCH], rows):
      if isinstance(row, str):
        yield {'file': str(file), 'error': row}
        continue
      score_L = next(scores)
      best = np.argsort(-score_L, kind='stable')[:topk]
      found = [{'class': names[i], 'probability': float(score_L[i])} for i in best]
      yield {'file': str(file), 'predictions': found}


def make_predict_step(exp: experiment.Experiment, mesh: jax.sharding.Mesh) -> Callable:
  """`(image_BHWC, params) -> probability_BL` of uint8 images."""

  def probabilities(image_BHWC, params):
    return jax.nn.softmax(exp.model.apply({'params': params}, exp.normalize(image_BHWC)))

  def predict_step(image_BHWC, params):
    parts = exp.micro_batches(mesh, len(image_BHWC))
    return sharding.concatenate(probabilities, mesh, parts)(image_BHWC, params)

  return jax.jit(predict_step)


def read(file: pathlib.Path, exp: experiment.Experiment) -> np.ndarray | str:
  """The image as the model was trained to see it, or why there is none."""
  try:
    decoded = image.decode(image.read(file), file, exp.task.channels)
  except image.BadImage as error:
    return str(error)
  return exp.fit(decoded, exp.task.stored_size)


def show(rows: Iterator[dict], as_json: bool) -> int:
  """Prints a table, or a JSON object a line; returns how many files could not be read."""
  failed = []
  for row in rows:
    if 'error' in row:
      failed.append(row['error'])
    if as_json:
      print(json.dumps(row), flush=True)
    elif 'predictions' in row:
      print(row['file'])
      for found in row['predictions']:
        print(f'  {found["probability"]:7.2%}  {found["class"]}', flush=True)
  for error in failed:
    log.error('%s', error)
  return len(failed)
