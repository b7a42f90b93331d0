"""Exact evaluation: every example counts once, for any batch size and number of devices."""

from collections.abc import Callable
import functools
import math
import pathlib

from clu import metrics
import jax
from ml_collections import ConfigDict
import numpy as np

from vit_jax import config as config_lib
from vit_jax import data, experiment, progress, sharding

Averages = type[metrics.Collection]
EvalStep = Callable[[dict[str, jax.Array], dict], metrics.Collection]


@functools.cache  # one class for the same metrics, so that JAX takes sums of them
def averages(num_classes: int) -> Averages:
  """The metrics: loss, accuracy, and top-5 accuracy where there are more than 5 classes."""
  names = ['loss', 'accuracy'] + ['top5_accuracy'] * (num_classes > 5)
  return metrics.Collection.create(**{n: metrics.Average.from_output(n) for n in names})


def score(
  logits_BL: jax.Array, label_B: jax.Array, loss_B: jax.Array, mask_B: jax.Array | None = None
) -> metrics.Collection:
  """The metrics of a batch; `mask_B` is 0 for rows that don't count."""
  label_B1 = label_B[:, None]
  top5_BL = jax.lax.top_k(logits_BL, min(5, logits_BL.shape[1]))[1]
  return averages(logits_BL.shape[1]).single_from_model_output(
    loss=loss_B,
    accuracy=top5_BL[:, 0] == label_B,
    top5_accuracy=(top5_BL == label_B1).any(axis=1),
    mask=None if mask_B is None else mask_B.astype(bool),
  )


def summarize(batches: list[metrics.Collection]) -> dict[str, float]:
  """The means over all batches, added up in float64, and the number of examples."""
  sums = jax.tree.map(lambda *parts: np.sum(np.array(parts, np.float64)), *batches)
  fields = {name: getattr(sums, name) for name in type(sums).__annotations__}
  means = {
    name: float(average.total / average.count)
    for name, average in fields.items()
    if isinstance(average, metrics.Average)
  }
  return means | {'examples': round(float(sums.loss.count))}


def make_eval_step(exp: experiment.Experiment, mesh: jax.sharding.Mesh) -> EvalStep:
  """`(batch, params) -> metrics` of one padded batch."""

  def score_part(part, params):
    logits_BL = exp.logits(params, part)
    loss_B = exp.loss(logits_BL, part['label'])
    return score(logits_BL, part['label'], loss_B, part['mask'])

  def eval_step(batch, params):
    parts = exp.micro_batches(mesh, len(batch['mask']))
    return sharding.add_up(score_part, mesh, parts)(batch, params)

  return jax.jit(eval_step)


def evaluate(
  eval_step: EvalStep,
  params: dict,
  examples: experiment.Split,
  batch_size: int,
  mesh: jax.sharding.Mesh,
) -> dict[str, float]:
  """Loss, accuracies and the number of examples counted."""
  batches = data.eval_batches(examples, batch_size, sharding.over_batch(mesh))
  count = math.ceil(len(examples) / batch_size)
  batches = progress.bar(batches, 'Evaluating', 'batch', count)
  return summarize([jax.device_get(eval_step(batch, params)) for batch in batches])


def run(
  workdir: pathlib.Path, overrides: dict[str, str], config: ConfigDict | None = None
) -> dict[str, float]:
  """Evaluates the newest checkpoint of a workdir on its `data.eval_split`."""
  sharding.start_up(config_lib.default_config().eval_batch_size)  # before orbax starts JAX
  exp, params, step = experiment.from_workdir(workdir, overrides, config)
  batch_size = exp.config.eval_batch_size
  examples = experiment.load_split(exp, exp.config.data.eval_split)
  mesh = sharding.make_mesh()
  params = sharding.replicate(mesh, params)
  return {'step': step} | evaluate(make_eval_step(exp, mesh), params, examples, batch_size, mesh)
