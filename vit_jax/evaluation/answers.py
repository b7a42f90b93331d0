"""Computes the logits of a split once, and derives losses and predictions from these logits.

Decisions:
  * Every process gets the logits of the whole batch, and computes predictions and probabilities
    from them with NumPy in float64. So the step from logits to predictions does not depend on the
    number of devices, processes or micro-batches.
  * The logits of one batch are dropped before the next batch is computed. The logits of all batches
    of a large split would not fit into memory: for ImageNet-21k, there are billions of logits.
  * If images can have several labels, the probabilities of all images stay in memory, because
    average precision ranks all images of the split.
"""

from collections.abc import Callable, Iterator, Sequence
import logging
import math
import pathlib

import jax
import numpy as np

from vit_jax import limits, progress
from vit_jax.data import Split, eval_batches
from vit_jax.distributed import batch_sharding, concatenate, place_params, replicated, to_host
from vit_jax.evaluation import measures
from vit_jax.evaluation.multilabel import Labelled, best_thresholds
from vit_jax.evaluation.scoring import NOT_CALIBRATED, Answers, Losses, Scores
from vit_jax.experiment import Experiment
from vit_jax.workdir import Calibration, restore_weights, save_calibration

log = logging.getLogger(__name__)

EvalStep = Callable[[dict[str, jax.Array], dict], dict[str, jax.Array]]

FITTED = 2**26  # approximate maximum number of logits for fitting a calibration: 256 MiB


def make_eval_step(exp: Experiment, mesh: jax.sharding.Mesh, held: int = 0) -> EvalStep:
  """Returns a compiled function that evaluates one batch: `(batch, params) -> rows`.

  `batch` is a dict of arrays from `eval_batches`. `rows` is a dict of arrays with a row per image.
  `rows` contains the outputs that the config's `objective` defines, such as `logits` `[B, L]` and
  `loss` `[B]`, and all arrays of `batch` except images and features.

  Args:
    exp: the experiment.
    mesh: the devices.
    held: bytes of memory on each device that are occupied by arrays other than the batch and the
      parameters. The compiled function must fit into the remaining memory.
  """

  def answer(part, params):
    rest = {name: array for name, array in part.items() if name not in ('image', 'feature')}
    return rest | exp.objective.rows(exp, params, part)

  def build(parts):
    return jax.jit(concatenate(answer, mesh, parts), out_shardings=replicated(mesh))

  return exp.fitted(build, mesh, held)


def answer_split(
  eval_step: EvalStep,
  params: dict,
  examples: Split,
  batch_size: int,
  mesh: jax.sharding.Mesh,
  **extra: np.ndarray,
) -> Iterator[Answers]:
  """Yields an `Answers` with the model's outputs for each batch of a split, in order.

  Args:
    eval_step: the function from `make_eval_step`.
    params: the model's parameters, on the devices of the mesh.
    examples: the split.
    batch_size: number of examples per batch, summed over all devices.
    mesh: the devices.
    **extra: optionally `real`: ReaL labels from `load_real_labels`, with one row per example.
  """
  # With `objective=masked`, the index of an image in the split seeds its mask.
  index = {'example': np.arange(len(examples), dtype=np.int32)}
  batches = eval_batches(examples, batch_size, batch_sharding(mesh), **extra, **index)
  count = math.ceil(len(examples) / batch_size)
  for i, batch in enumerate(progress.bar(batches, 'Evaluating', 'batch', count)):
    rows = to_host(eval_step(batch, params))
    row_N = np.flatnonzero(rows['mask'])
    label_N, loss_N = rows['label'][row_N], rows['loss'][row_N]
    logits_NL, real_NL = (
      rows[name][row_N] if name in rows else None for name in ('logits', 'real')
    )
    yield Answers(i * batch_size + row_N, label_N, logits_NL, loss_N, real_NL)


@limits.memory_for('Evaluation')
def score_examples(
  eval_step: EvalStep,
  params: dict,
  examples: Split,
  batch_size: int,
  mesh: jax.sharding.Mesh,
  calibration: Calibration = NOT_CALIBRATED,
  **extra: np.ndarray,
) -> Scores | Labelled | Losses:
  """Returns the model's losses and predictions for all examples of a split.

  The result is a `Labelled` if images can have several labels, a `Losses` if the model has no
  classes, and otherwise a `Scores`. `calibration` gives the temperature for the probabilities in
  `Scores`. All other arguments are described in `answer_split`.
  """
  parts = []
  for found in answer_split(eval_step, params, examples, batch_size, mesh, **extra):
    if found.logits_NL is None:
      parts.append(Losses(found.loss_N))
    elif found.label_N.ndim == 2:
      parts.append(Labelled.of(found.logits_NL, found.label_N, found.loss_N))
    else:
      parts.append(Scores.of(found, calibration))
  return type(parts[0]).joined(parts)


@limits.memory_for('Evaluation')
def calibrate(
  eval_step: EvalStep,
  params: dict,
  examples: Split,
  batch_size: int,
  mesh: jax.sharding.Mesh,
) -> Calibration:
  """Fits the softmax temperature of a model on a validation split; returns a `Calibration`.

  If images can have several labels, a threshold for each class is fitted instead. If the examples
  of the split have more than `FITTED` logits in all, only evenly spaced examples are used. The
  arguments are described in `answer_split`.
  """
  logits, labels = [], []
  for answers in answer_split(eval_step, params, examples, batch_size, mesh):
    every = math.ceil(len(examples) * answers.logits_NL.shape[1] / FITTED)
    chosen = answers.index_N % every == 0
    logits.append(answers.logits_NL[chosen])
    labels.append(answers.label_N[chosen])
  logits_NL, label_N = np.concatenate(logits), np.concatenate(labels)
  if label_N.ndim == 2:
    rows = Labelled.of(logits_NL, label_N)
    thresholds = tuple(best_thresholds(rows.probability_NL, label_N).tolist())
    return Calibration(thresholds=thresholds, examples=len(label_N))
  return Calibration(measures.fit_temperature(logits_NL, label_N), examples=len(label_N))


def calibrate_run(
  exp: Experiment,
  val: Split,
  mesh: jax.sharding.Mesh,
  workdir: pathlib.Path,
  steps: Sequence[int],
) -> None:
  """Fits a `Calibration` for each given checkpoint of a run, and saves it in the workdir.

  A damaged checkpoint is skipped with a warning.

  Args:
    exp: experiment of the run.
    val: validation split of the run.
    mesh: the devices.
    workdir: folder of the run.
    steps: step numbers of the checkpoints.
  """
  eval_step = make_eval_step(exp, mesh)
  for step in steps:
    weights = restore_weights(workdir, step)
    if weights is None:
      log.warning('Step %d: the probabilities are not calibrated.', step)
      continue
    params = place_params(mesh, weights)
    found = calibrate(eval_step, params, val, exp.config.eval_batch_size, mesh)
    log_calibration(step, found)
    save_calibration(workdir, step, found)


def log_calibration(step: int, found: Calibration) -> None:
  """Logs the temperature or the thresholds that were fitted for the checkpoint of step `step`."""
  fitted = f'temperature {found.temperature:.4g}'
  if found.thresholds:
    low, high = min(found.thresholds), max(found.thresholds)
    fitted = f'thresholds of the classes from {low:.4g} to {high:.4g}'
  log.info('Step %d: %s, fitted on %d validation examples.', step, fitted, found.examples)


def trust(
  scores: Scores | Labelled | Losses, class_names: Sequence[str], calibration: Calibration
) -> dict:
  """Returns measures of how reliable predictions are, as a dict that can be written as JSON.

  Args:
    scores: scores of the examples of a split.
    class_names: names of the classes.
    calibration: the calibration that `scores` was computed with.

  Returns:
    For `Losses`, an empty dict. For `Labelled`, the result of `Labelled.trust`. For `Scores`, a
    dict with these keys (undefined values are None):
    `accuracy_interval`: `[low, high]`, the 95% Wilson confidence interval of the accuracy.
    `balanced_accuracy`: the recall, averaged over the classes that have examples.
    `ece`: the expected calibration error, computed with 15 bins.
    `ece_uncalibrated`: the expected calibration error of the probabilities at temperature 1.
    `temperature`: the temperature of the calibration.
    `temperature_examples`: the number of validation examples that the temperature was fitted on.
    `per_class`: a dict from each class name to the class's `precision`, `recall`, `f1` and
      `support`.
    `confusion`: `{true class: {predicted class: number of examples}}`. A pair of classes
      without examples is left out.
    `reliability`: a list of dicts, one for each bin of `measures.reliability`.
    `coverage`: a list of dicts, one for each point of `measures.coverage_curve`.
  """
  if isinstance(scores, Losses):
    return {}
  if isinstance(scores, Labelled):
    return scores.trust(class_names, calibration)
  label_N, predicted_N, correct_N = scores.label_N, scores.predicted_N, scores.correct_N
  classes = measures.class_scores(label_N, predicted_N, len(class_names))
  bins = measures.reliability(scores.confidence_N, correct_N)
  before = measures.reliability(scores.raw_N, correct_N)
  return {
    'accuracy_interval': [*measures.wilson_interval(int(correct_N.sum()), len(label_N))],
    'balanced_accuracy': measures.balanced_accuracy(classes['recall']),
    'ece': measures.calibration_error(bins),
    'ece_uncalibrated': measures.calibration_error(before),
    'temperature': calibration.temperature,
    'temperature_examples': calibration.examples,
    'per_class': dict(zip(class_names, measures.rows_of(classes))),
    'confusion': measures.confused(label_N, predicted_N, class_names),
    'reliability': measures.rows_of(bins),
    'coverage': measures.rows_of(measures.coverage_curve(scores.confidence_N, correct_N)),
  }
