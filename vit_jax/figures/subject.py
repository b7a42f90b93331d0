"""Collects the data for all figures of a run, so that everything is computed only once.

The drawn test images are the first images of each class in the split. If there are more classes
than drawn images, they show classes with evenly spaced numbers. The choice is not random, so all
calls and all runs on one dataset draw the same images.
"""

from collections.abc import Iterable, Iterator, Mapping
import logging
import math
import pathlib

import jax
import numpy as np

from vit_jax import opening, progress
from vit_jax.data import Examples, Split, eval_batches
from vit_jax.distributed import batch_sharding, concatenate, inference_mesh, replicate
from vit_jax.evaluation import (
  PathLike,
  Scores,
  find_images,
  load_split,
  make_eval_step,
  open_test,
  read_image,
  score_examples,
)
from vit_jax.experiment import Experiment
from vit_jax.figures import maps
from vit_jax.figures.maps import Missing
from vit_jax.figures.neighbours import ROWS, Neighbours, find_neighbours
from vit_jax.figures.pictures import AttentionMaps, Subject, worst
from vit_jax.opening import Request
from vit_jax.workdir import latest_step, read_metrics

log = logging.getLogger(__name__)

NO_TEST = Missing('weights of --init come without test data.')
SHOWN = 8  # number of images that are drawn
MEASURED = 128  # number of images over which attention distance is averaged, as in the paper


def collect(request: Request, images: PathLike | Iterable[PathLike] | None) -> Subject:
  """Reads and computes the data for all figures; `gallery.visualize` describes the arguments."""
  workdir, init = request.workdir, request.init
  lines = read_lines(workdir)
  if init and images is None:
    raise ValueError(
      'Weights of --init have no test images. Set --images=a.png,folder/, or give the folder of a '
      'run as --workdir.'
    )
  files = None if images is None else find_images(images)
  asked = init or files or request.overrides or request.config or request.step
  if not asked and latest_step(workdir) is None:
    if isinstance(lines, Missing):
      raise ValueError(
        f'{workdir}: no metrics.jsonl and no checkpoint to draw. Pass the --workdir of a '
        'training run.'
      )
    return Subject(lines, *[Missing('the run has not saved a checkpoint yet.')] * 6)

  exp, params, loaded = opening.open_model(request, 'any')
  chosen = read_images(files, exp) if files else None
  mesh = inference_mesh(SHOWN if init else exp.config.eval_batch_size)
  on_device = replicate(mesh, params)
  test = NO_TEST if init else load_test(exp, request.overrides)
  scores, nearest = predicted(exp, on_device, test, mesh)
  if chosen is None and isinstance(test, Missing):
    shown = attention = test
  else:
    chosen = choose_images(test, exp) if chosen is None else chosen
    shown, attention = as_seen(exp, chosen[:SHOWN]), attention_over(exp, on_device, chosen, mesh)
  return Subject(
    lines=lines,
    exp=exp,
    params=params,
    test=test,
    scores=scores,
    nearest=nearest,
    shown=shown,
    attention=attention,
    step=loaded,
  )


def read_lines(workdir: pathlib.Path | None) -> list[dict] | Missing:
  """Returns the lines of `metrics.jsonl` as dicts, or a `Missing` with the reason."""
  if workdir is None:
    return Missing('weights of --init come without metrics.')
  if not (workdir / 'metrics.jsonl').exists():
    return Missing('the workdir has no metrics.jsonl.')
  return read_metrics(workdir) or Missing('metrics.jsonl has no lines yet.')


def load_test(exp: Experiment, overrides: Mapping[str, str]) -> Split | Missing:
  """Opens the test split, without the files that the weights were trained on.

  If the split cannot be read, and the user has not overridden a `data.*` key, the result is a
  `Missing` with the reason.

  Args:
    exp: the experiment of the weights.
    overrides: config keys that the user has overridden, and their values.

  Raises:
    ValueError, OSError: the split cannot be read, and the user has overridden a `data.*` key.
  """
  try:
    source, _ = open_test(exp)
    return load_split(exp, exp.config.data.eval_split, source)
  except (ValueError, OSError) as error:
    if any(key.startswith('data.') for key in overrides):
      raise
    log.warning('Cannot read the test data: %s', error)
    return Missing(f'cannot read the test data: {error}')


def predicted(
  exp: Experiment, params: dict, test: Split | Missing, mesh: jax.sharding.Mesh
) -> tuple[Scores | Missing, Neighbours | Missing]:
  """Returns the predictions for the test split, and training images that are similar to mistakes.

  If they cannot be computed, both results are a `Missing` with the reason.
  """
  if isinstance(test, Missing):
    reason = test
  elif not exp.task.class_names:
    reason = Missing('this figure needs classes, but the run has no labels.')
  elif exp.task.multi_label:
    reason = Missing('this figure needs one label per image, but images have several.')
  else:
    scores = answers(exp, params, test, mesh)
    return scores, near_mistakes(exp, params, test, scores, mesh)
  return reason, reason


def answers(exp: Experiment, params: dict, test: Split, mesh: jax.sharding.Mesh) -> Scores:
  """Returns the model's predictions for all readable examples of the test split."""
  size = exp.config.eval_batch_size
  return score_examples(make_eval_step(exp, mesh), params, test, size, mesh, exp.calibration)


def near_mistakes(
  exp: Experiment, params: dict, test: Split, scores: Scores, mesh: jax.sharding.Mesh
) -> Neighbours | Missing:
  """Returns the most similar training images for each of the most confident mistakes.

  If there are no mistakes, or the training data cannot be read, the result is a `Missing` with the
  reason.
  """
  try:
    index = worst(scores, ROWS)
    train = load_split(exp, exp.config.data.train_split)
    return find_neighbours(exp, params, test.some(scores.index_N[index]), train, mesh)
  except Missing as reason:
    return reason
  except (ValueError, OSError) as error:
    log.warning('Cannot read the training data: %s', error)
    return Missing(f'cannot read the training data: {error}')


def batches(
  examples: Examples, size: int, mesh: jax.sharding.Mesh, what: str
) -> Iterator[dict[str, jax.Array]]:
  """Yields all examples in batches, as `eval_batches` does, and shows a progress bar.

  Args:
    examples: the examples.
    size: number of examples per batch.
    mesh: the devices.
    what: name of the activity, for the progress bar.
  """
  found = eval_batches(examples, size, batch_sharding(mesh))
  return progress.bar(found, what, 'batch', math.ceil(len(examples) / size))


def choose_images(test: Split, exp: Experiment) -> np.ndarray:
  """Returns test images that are spread evenly over the classes, uint8 `[B, H, W, C]`.

  The figures show the first `SHOWN` images. All images are used for the mean attention distance.
  """
  classes = len(exp.task.class_names)
  label_N = test.label_N
  if label_N.ndim == 2:  # multi-hot: use the first label
    label_N = label_N.argmax(axis=1)
  shown, measured = (maps.spread_over_classes(label_N, classes, n) for n in (SHOWN, MEASURED))
  contrast = test.some(shown).image_NHWC.std(axis=(1, 2, 3))
  # The figures of patches and heads show only the first image, so the image with the highest
  # contrast comes first.
  shown = shown[np.argsort(-contrast, kind='stable')]
  index = np.concatenate([shown, np.setdiff1d(measured, shown)])[:MEASURED]
  return test.some(index).image_NHWC


def read_images(files: list[pathlib.Path], exp: Experiment) -> np.ndarray:
  """Returns the readable images among the first `MEASURED` files, uint8 `[B, H, W, C]`.

  Raises:
    ValueError: none of the files can be read.
  """
  if len(files) > MEASURED:
    log.warning('Using the first %d of %d images.', MEASURED, len(files))
  rows = [read_image(file, exp) for file in files[:MEASURED]]
  good = [row for row in rows if not isinstance(row, str)]
  bad = [row for row in rows if isinstance(row, str)]
  if not good:
    raise ValueError(
      f'--images: none of {len(rows)} files is a readable image. First error: {bad[0]}'
    )
  for row in bad:
    log.warning('Skipped: %s', row)
  return np.stack(good)


def as_seen(exp: Experiment, image_BHWC: np.ndarray) -> np.ndarray:
  """Resizes images to the size of the model's input: returns uint8 `[B, H, W, C]`.

  `image_BHWC` contains uint8 images at the stored size (`Task.stored_size`).
  """
  mean, std = (np.array(exp.config.data[name]) for name in ('mean', 'std'))
  pixels = np.asarray(exp.normalize(image_BHWC)) * std + mean
  return np.round(255 * np.clip(pixels, 0, 1)).astype(np.uint8)


def attention_over(
  exp: Experiment, params: dict, image_BHWC: np.ndarray, mesh: jax.sharding.Mesh
) -> AttentionMaps | Missing:
  """Computes attention maps of the first `SHOWN` images.

  The mean attention distances are computed over all images. If the pool has no attention maps, the
  result is a `Missing` with the reason.
  """

  def summary(image_BHWC, params):
    return maps.attention_summary(exp.model, params, exp.normalize(image_BHWC))

  step = jax.jit(concatenate(summary, mesh, parts=1))
  count = len(image_BHWC)
  examples = Examples(image_BHWC, np.zeros(count, np.int32))
  first, distances = None, []
  for batch in batches(examples, SHOWN, mesh, 'Attention'):
    try:
      arrays = step(batch['image'], params)
    except Missing as reason:
      return reason
    found = jax.tree.map(lambda x: np.asarray(x)[:SHOWN], arrays)
    first = first or found
    distances.append(found['distance'])
  rollout, heads = first['rollout'][:count], first['heads'][:count]
  return AttentionMaps(rollout, heads, np.concatenate(distances)[:count].mean(axis=0), count)
