"""Exact evaluation: each example counts exactly once, for any batch size and number of devices."""

from collections.abc import Callable, Mapping
import math
import pathlib

from clu import metrics
import jax
import numpy as np

from vit_jax import limits, opening, progress
from vit_jax.data import Source, Split, eval_batches
from vit_jax.distributed import add_up, batch_sharding, inference_mesh, replicate, start_up
from vit_jax.evaluation.data import load_split, open_test
from vit_jax.evaluation.real import load_real_labels
from vit_jax.evaluation.scoring import score, summarize
from vit_jax.experiment import Experiment
from vit_jax.names import local
from vit_jax.opening import Request

EvalStep = Callable[[dict[str, jax.Array], dict], metrics.Collection]


def make_eval_step(exp: Experiment, mesh: jax.sharding.Mesh, held: int = 0) -> EvalStep:
  """Returns the compiled function `(batch, params) -> metrics` for one padded batch.

  `held` is the number of bytes that other arrays occupy on each device.
  """

  def score_part(part, params):
    logits_BL = exp.logits(params, part)
    loss_B = exp.loss(logits_BL, part['label'])
    return score(logits_BL, part['label'], loss_B, part['mask'], part.get('real'))

  return exp.fitted(lambda parts: jax.jit(add_up(score_part, mesh, parts)), mesh, held)


@limits.memory_for('Evaluation')
def score_split(
  eval_step: EvalStep,
  params: dict,
  examples: Split,
  batch_size: int,
  mesh: jax.sharding.Mesh,
  **extra: np.ndarray,
) -> dict[str, float]:
  """Returns the loss, the accuracies and the number of examples of a split.

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
  return summarize([jax.device_get(eval_step(batch, params)) for batch in batches])


def evaluate(
  workdir: str | pathlib.Path, overrides: Mapping[str, str] | None = None, *, step: str = ''
) -> dict[str, float]:
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
def evaluate_checkpoint(request: Request) -> dict[str, float]:
  """Evaluates the checkpoint that a request names.

  Returns:
    The step, and the loss, accuracies and number of examples from `score_split`. `left_out` is
    the number of images that were not scored because the weights were trained on them. The key is
    missing if the number is zero.
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
  result = {'step': loaded} | score_split(eval_step, params, examples, batch_size, mesh, **extra)
  return result | ({'left_out': left_out} if left_out else {})


def load_real(experiment: Experiment, split: str, source: Source) -> np.ndarray | None:
  """Loads the ReaL labels of a split, bool `[N, L]`; None if `data.real_labels` is not set.

  Raises:
    ValueError: the labels cannot be read, or belong to other data.
  """
  path = experiment.config.data.real_labels
  return load_real_labels(local(path), source, split) if path else None
