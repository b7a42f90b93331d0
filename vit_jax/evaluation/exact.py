"""Exact evaluation: each example counts exactly once, for any batch size and number of devices.

Decisions:
  * Loss and accuracies are sums over examples, which are added on the devices. The average
    precision of images with several labels is no such sum. So their logits are collected on the
    host.
"""

from collections.abc import Callable, Mapping
import math
import pathlib

from clu import metrics
import jax
import numpy as np

from vit_jax import limits, opening, progress
from vit_jax.data import Split, eval_batches
from vit_jax.distributed import (
  add_up,
  batch_sharding,
  concatenate,
  inference_mesh,
  replicate,
  start_up,
  to_host,
)
from vit_jax.evaluation.data import load_real, load_split, open_test
from vit_jax.evaluation.multilabel import Labelled
from vit_jax.evaluation.scoring import score, summarize
from vit_jax.experiment import Experiment
from vit_jax.names import local
from vit_jax.opening import Request

EvalStep = Callable[
  [dict[str, jax.Array], dict], tuple[metrics.Collection, dict[str, jax.Array] | None]
]


def make_eval_step(exp: Experiment, mesh: jax.sharding.Mesh) -> EvalStep:
  """Returns the compiled function `(batch, params) -> metrics, rows` for one padded batch.

  If images can have several labels, `rows` holds the arrays `logits` `[B, L]`, `label` and `mask`.
  Otherwise it is None.
  """

  def logits_of(part, params):
    return exp.logits(params, part)

  def scored(part, logits_BL):
    loss_B = exp.loss(logits_BL, part['label'])
    return score(logits_BL, part['label'], loss_B, part['mask'], part.get('real'))

  def eval_step(batch, params):
    parts = exp.micro_batches(mesh, len(batch['mask']))
    if not exp.task.multi_label:
      whole = lambda part, params: scored(part, logits_of(part, params))
      return add_up(whole, mesh, parts)(batch, params), None
    logits_BL = concatenate(logits_of, mesh, parts)(batch, params)
    rows = {'logits': logits_BL, 'label': batch['label'], 'mask': batch['mask']}
    return scored(batch, logits_BL), rows

  return jax.jit(eval_step)


def score_split(
  eval_step: EvalStep,
  params: dict,
  examples: Split,
  batch_size: int,
  mesh: jax.sharding.Mesh,
  **extra: np.ndarray,
) -> dict[str, float]:
  """Returns the loss, the accuracies and the number of examples of a split.

  If images can have several labels, the mean average precision and the mean F1 are added. The
  arguments are those of `scan_split`.
  """
  return scan_split(eval_step, params, examples, batch_size, mesh, **extra)[0]


@limits.memory_for('Evaluation')
def scan_split(
  eval_step: EvalStep,
  params: dict,
  examples: Split,
  batch_size: int,
  mesh: jax.sharding.Mesh,
  **extra: np.ndarray,
) -> tuple[dict[str, float], Labelled | None]:
  """Returns the scores of a split, and the probabilities and labels of its examples.

  Probabilities and labels are None if each image has one label.

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
  batches = progress.bar(batches, 'Evaluating', 'batch', count)
  found = [to_host(eval_step(batch, params)) for batch in batches]
  values = summarize([sums for sums, _ in found])
  rows = Labelled.join([rows for _, rows in found])
  return (values | rows.summary() if rows else values), rows


def evaluate(
  workdir: str | pathlib.Path, overrides: Mapping[str, str] | None = None, *, step: str = ''
) -> dict[str, object]:
  """Evaluates a checkpoint of a workdir on the split that `data.eval_split` names.

      vit_jax.evaluate('runs/digits', step='last')['accuracy']

  Args:
    workdir: folder of a training run.
    overrides: dotted config keys and their values as text, e.g. `{'eval_batch_size': '64'}`.
    step: checkpoint to evaluate: `best`, `last` or a number. The default is the checkpoint with the
      best validation accuracy, or the last one if no checkpoint has a validation accuracy.

  Returns:
    The result of `evaluate_checkpoint`.

  Raises:
    ValueError: the workdir has no such checkpoint, or data or overrides contradict the checkpoint.
  """
  start_up()
  return evaluate_checkpoint(Request(local(workdir), step=step, overrides=overrides or {}))


@limits.memory_for('Evaluation')
def evaluate_checkpoint(request: Request) -> dict[str, object]:
  """Evaluates the checkpoint that a request names.

  Returns:
    The step, and the loss, accuracies and number of examples from `score_split`. `left_out` is
    the number of images that were not scored because the weights were trained on them. The key is
    missing if the number is zero. If images can have several labels, `per_class` holds the scores
    of each class (`Labelled.by_class`).
  """
  exp, params, loaded = opening.open_model(request)
  batch_size = exp.config.eval_batch_size
  split = exp.config.data.eval_split
  source, left_out = open_test(exp)
  examples = load_split(exp, split, source)
  real_NL = load_real(exp, split, source)
  if real_NL is not None and len(real_NL) != len(examples):
    raise ValueError(
      f'data.real_labels: {len(real_NL) - len(examples)} of the {len(real_NL)} images are bad and '
      'were skipped, so labels and images cannot be matched. Set data.cache=stream.'
    )
  extra = {} if real_NL is None else {'real': real_NL}
  mesh = inference_mesh(batch_size)
  params = replicate(mesh, params)
  eval_step = make_eval_step(exp, mesh)
  values, rows = scan_split(eval_step, params, examples, batch_size, mesh, **extra)
  result = {'step': loaded} | values | ({'left_out': left_out} if left_out else {})
  return result | ({'per_class': rows.by_class(exp.task.class_names)} if rows else {})
