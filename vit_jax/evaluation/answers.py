"""Computes the logits of every example of a split exactly once, and reduces them to scores.

Decisions:
  * Every process gets the logits of the whole batch. Scores are then computed with NumPy in
    float64, so they do not depend on devices, processes or micro-batches.
  * Only one batch of logits is in memory at a time, because a split of ImageNet-21k has billions.
    If images can have several labels, all probabilities are kept, because the average precision
    compares all images.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import logging
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import limits, progress
from vit_jax.data import Split, eval_batches
from vit_jax.distributed import batch_sharding, concatenate, place_params, replicated, to_host
from vit_jax.evaluation import measures
from vit_jax.evaluation.multilabel import Labelled, best_thresholds
from vit_jax.experiment import Experiment
from vit_jax.workdir import Calibration, restore_weights, save_calibration

log = logging.getLogger(__name__)

EvalStep = Callable[[dict[str, jax.Array], dict], dict[str, jax.Array]]

NOT_CALIBRATED = Calibration()
FITTED = 2**26  # maximum number of logits to which a temperature is fitted: 256 MiB


@dataclasses.dataclass(frozen=True)
class Answers:
  """What a model answers to some examples of a split; padding and bad images are left out.

  Attributes:
    index_N: index of each example in the split.
    label_N: true classes; multi-hot `[N, L]` if images can have several labels.
    logits_NL: float32 logits.
    loss_N: loss of the config, e.g. with label smoothing.
    real_NL: ReaL labels; None without them.
  """

  index_N: np.ndarray
  label_N: np.ndarray
  logits_NL: np.ndarray
  loss_N: np.ndarray
  real_NL: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Scores:
  """Predictions for the examples of a split, one row per example.

  Attributes:
    index_N: index of each example in the split; unreadable images are left out.
    label_N: true classes.
    predicted_N: predicted classes.
    confidence_N: calibrated probabilities of the predicted classes.
    raw_N: the same probabilities before calibration.
    loss_N: losses.
    top5_N: whether the true class is among the five most likely ones; None with at most 5 classes.
    real_N: whether the predicted class is among the ReaL labels, NaN for an image without labels;
      None without ReaL labels.
  """

  index_N: np.ndarray
  label_N: np.ndarray
  predicted_N: np.ndarray
  confidence_N: np.ndarray
  raw_N: np.ndarray
  loss_N: np.ndarray
  top5_N: np.ndarray | None = None
  real_N: np.ndarray | None = None

  @classmethod
  def of(cls, answers: Answers, calibration: Calibration = NOT_CALIBRATED) -> 'Scores':
    """Reduces the logits of some examples to their scores."""
    logits_NL, label_N1 = answers.logits_NL.astype(np.float64), answers.label_N[:, None]
    predicted_N, top5_N, real_N = logits_NL.argmax(axis=1), None, None
    gap_NL = logits_NL - logits_NL.max(axis=1, keepdims=True)

    def confidence(temperature):
      if calibration.sigmoid:
        return np.exp(-np.logaddexp(0, -logits_NL.max(axis=1)))
      return 1 / np.exp(gap_NL / temperature).sum(axis=1)

    if logits_NL.shape[1] > 5:  # of equal logits, the first counts as the larger, as in argmax
      own_N1 = np.take_along_axis(logits_NL, label_N1, axis=1)
      earlier_NL = np.arange(logits_NL.shape[1]) < label_N1
      above_NL = (logits_NL > own_N1) | ((logits_NL == own_N1) & earlier_NL)
      top5_N = above_NL.sum(axis=1) < 5
    if (real_NL := answers.real_NL) is not None:
      hit_N = np.take_along_axis(real_NL, predicted_N[:, None], axis=1)[:, 0]
      real_N = np.where(real_NL.any(axis=1), hit_N, np.nan)
    return cls(
      answers.index_N,
      answers.label_N,
      predicted_N,
      confidence(calibration.temperature),
      confidence(1),
      answers.loss_N.astype(np.float64),
      top5_N,
      real_N,
    )

  @classmethod
  def joined(cls, parts: list['Scores']) -> 'Scores':
    """Returns the rows of all parts."""
    columns = {name: [vars(part)[name] for part in parts] for name in vars(parts[0])}
    return cls(**{k: None if v[0] is None else np.concatenate(v) for k, v in columns.items()})

  @property
  def correct_N(self) -> np.ndarray:
    """Whether the predicted class is the true class."""
    return self.predicted_N == self.label_N

  def means(self) -> dict[str, float]:
    """Returns loss, accuracies and number of examples; with ReaL labels, also the number of these.

    The top-5 accuracy is included only with more than five classes.
    """
    found = {'loss': self.loss_N.mean(), 'accuracy': self.correct_N.mean()}
    if self.top5_N is not None:
      found['top5_accuracy'] = self.top5_N.mean()
    if self.real_N is not None:
      found['real_accuracy'] = np.nanmean(self.real_N)
    found = {name: float(value) for name, value in found.items()} | {'examples': len(self.label_N)}
    if self.real_N is not None:
      found['real_examples'] = int(np.isfinite(self.real_N).sum())
    return found


def make_eval_step(exp: Experiment, mesh: jax.sharding.Mesh, held: int = 0) -> EvalStep:
  """Returns the compiled function `(batch, params) -> rows` for one padded batch.

  The rows are `logits` `[B, L]` and `loss` `[B]`, and the batch without its images. `held` is the
  number of bytes that other arrays occupy on each device.
  """

  def answer(part, params):
    logits_BL = exp.logits(params, part).astype(jnp.float32)
    rest = {name: array for name, array in part.items() if name != 'image'}
    return rest | {'logits': logits_BL, 'loss': exp.loss(logits_BL, part['label'])}

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
  """Yields the answers to all examples of a split, in order, one batch at a time.

  Args:
    eval_step: the function from `make_eval_step`.
    params: the model's parameters, on the devices of the mesh.
    examples: the split.
    batch_size: examples per batch, on all devices together.
    mesh: the devices.
    **extra: optionally `real`, the labels from `load_real_labels`, with one row per example.
  """
  batches = eval_batches(examples, batch_size, batch_sharding(mesh), **extra)
  count = math.ceil(len(examples) / batch_size)
  for i, batch in enumerate(progress.bar(batches, 'Evaluating', 'batch', count)):
    rows = to_host(eval_step(batch, params))
    row_N = np.flatnonzero(rows['mask'])
    found = {name: rows[name][row_N] for name in ('label', 'logits', 'loss', *extra)}
    real_NL = found.get('real')
    yield Answers(i * batch_size + row_N, found['label'], found['logits'], found['loss'], real_NL)


@limits.memory_for('Evaluation')
def score_examples(
  eval_step: EvalStep,
  params: dict,
  examples: Split,
  batch_size: int,
  mesh: jax.sharding.Mesh,
  calibration: Calibration = NOT_CALIBRATED,
  **extra: np.ndarray,
) -> Scores | Labelled:
  """Returns the scores of all examples of a split; the arguments are those of `answer_split`.

  They are `Labelled` if images can have several labels.
  """
  parts = []
  for found in answer_split(eval_step, params, examples, batch_size, mesh, **extra):
    several = found.label_N.ndim == 2
    rows = found.logits_NL, found.label_N, found.loss_N
    parts.append(Labelled.of(*rows) if several else Scores.of(found, calibration))
  return type(parts[0]).joined(parts)


@limits.memory_for('Evaluation')
def calibrate(
  eval_step: EvalStep,
  params: dict,
  examples: Split,
  batch_size: int,
  mesh: jax.sharding.Mesh,
) -> Calibration:
  """Fits the temperature on a validation split; the arguments are those of `answer_split`.

  If images can have several labels, the threshold of each class is fitted instead.
  Of a very large split, evenly spaced examples are used, at most `FITTED` logits.
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
  """Fits the calibrations of a run's checkpoints on its validation split, and keeps them.

  Args:
    exp: experiment of the run.
    val: validation split.
    mesh: the devices.
    workdir: folder of the run.
    steps: steps of the checkpoints.
  """
  eval_step = make_eval_step(exp, mesh)
  for step in steps:
    params = place_params(mesh, restore_weights(workdir, step))
    found = calibrate(eval_step, params, val, exp.config.eval_batch_size, mesh)
    log_calibration(step, found)
    save_calibration(workdir, step, found)


def log_calibration(step: int, found: Calibration) -> None:
  """Logs what was fitted for a checkpoint."""
  fitted = f'temperature {found.temperature:.4g}'
  if found.thresholds:
    low, high = min(found.thresholds), max(found.thresholds)
    fitted = f'thresholds of the classes from {low:.4g} to {high:.4g}'
  log.info('Step %d: %s, fitted on %d validation examples.', step, fitted, found.examples)


def trust(scores: Scores | Labelled, class_names: Sequence[str], calibration: Calibration) -> dict:
  """Returns the measures that tell how far predictions can be trusted.

  Returns:
    `accuracy_interval`, the 95% Wilson interval `[low, high]`. `balanced_accuracy`, the mean recall
    of the classes. `ece`, the expected calibration error in 15 bins, and `ece_uncalibrated`, the
    same at temperature 1. `temperature`, and `temperature_examples`, the number of validation
    examples it was fitted on. `per_class`, the precision, recall, F1 and support of each class.
    `confusion`, `{true class: {predicted class: examples}}` without zeros. `reliability`, the rows
    of `measures.reliability`. `coverage`, the rows of `measures.coverage_curve`. Undefined values
    are None. If images can have several labels, the measures are those of `Labelled.trust`.
  """
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
