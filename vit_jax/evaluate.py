"""Exact evaluation: every example counts once, for any batch size and number of devices."""

from collections.abc import Callable
import functools
import math
import pathlib

from clu import metrics
import flax.struct
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from vit_jax import data, experiment, limits, progress, sharding

EvalStep = Callable[[dict[str, jax.Array], dict], metrics.Collection]


@flax.struct.dataclass
class RealAccuracy(metrics.Average):
  """Of the images that have a label of ReaL's, how many are said to be of one of its classes."""

  @classmethod
  def from_model_output(cls, *, predicted_B, mask, real_BL, **_):
    hit_B = jnp.take_along_axis(real_BL, predicted_B[:, None], axis=1)[:, 0]
    return super().from_model_output(hit_B, mask=mask & real_BL.any(axis=1))


@functools.cache  # one class for the same metrics, so that JAX takes sums of them
def averages(*names: str) -> type[metrics.Collection]:
  """The metrics of these names."""
  kinds = {'real_accuracy': RealAccuracy}
  return metrics.Collection.create(
    **{name: kinds.get(name) or metrics.Average.from_output(name) for name in names}
  )


def training_score(
  logits_BL: jax.Array, label_B: jax.Array, loss_B: jax.Array
) -> metrics.Collection:
  """Loss and accuracy of a micro-batch in training, where every row counts."""
  return averages('loss', 'accuracy').single_from_model_output(
    loss=loss_B, accuracy=logits_BL.argmax(axis=1) == label_B
  )


def score(
  logits_BL: jax.Array,
  label_B: jax.Array,
  loss_B: jax.Array,
  mask_B: jax.Array,
  real_BL: jax.Array | None = None,
) -> metrics.Collection:
  """Loss and accuracies of a batch in evaluation; top-5 where there are more than 5 classes.

  Args:
    logits_BL: of the model.
    label_B: of the data.
    loss_B: of each example.
    mask_B: 0 for rows that don't count.
    real_BL: of `real.load`; None without ReaL's accuracy.
  """
  names = ['loss', 'accuracy'] + ['top5_accuracy'] * (logits_BL.shape[1] > 5)
  names += ['real_accuracy'] * (real_BL is not None)
  top5_BL = jax.lax.top_k(logits_BL, min(5, logits_BL.shape[1]))[1]
  return averages(*names).single_from_model_output(
    loss=loss_B,
    accuracy=top5_BL[:, 0] == label_B,
    top5_accuracy=(top5_BL == label_B[:, None]).any(axis=1),
    mask=mask_B.astype(bool),
    predicted_B=top5_BL[:, 0],
    real_BL=real_BL,
  )


def summarize(batches: list[metrics.Collection]) -> dict[str, float]:
  """The means over all batches, added up in float64, and the number of examples.

  With ReaL's labels also how many have one.
  """
  sums = jax.tree.map(lambda *parts: np.sum(np.array(parts, np.float64)), *batches)
  fields = {name: getattr(sums, name) for name in type(sums).__annotations__}
  means = {
    name: float(average.total / average.count)
    for name, average in fields.items()
    if isinstance(average, metrics.Average)
  }
  real = (
    {'real_examples': round(float(sums.real_accuracy.count))} if 'real_accuracy' in means else {}
  )
  return means | {'examples': round(float(sums.loss.count))} | real


def make_eval_step(exp: experiment.Experiment, mesh: jax.sharding.Mesh) -> EvalStep:
  """`(batch, params) -> metrics` of one padded batch."""

  def score_part(part, params):
    logits_BL = exp.logits(params, part)
    loss_B = exp.loss(logits_BL, part['label'])
    return score(logits_BL, part['label'], loss_B, part['mask'], part.get('real'))

  def eval_step(batch, params):
    parts = exp.micro_batches(mesh, len(batch['mask']))
    return sharding.add_up(score_part, mesh, parts)(batch, params)

  return jax.jit(eval_step)


@limits.memory_for('Evaluation')
def evaluate(
  eval_step: EvalStep,
  params: dict,
  examples: experiment.Split,
  batch_size: int,
  mesh: jax.sharding.Mesh,
  **beside: np.ndarray,
) -> dict[str, float]:
  """Loss, accuracies and the number of examples counted.

  `beside` may be `real`, of `real.load`, with a row for each example.
  """
  batches = data.eval_batches(examples, batch_size, sharding.over_batch(mesh), **beside)
  count = math.ceil(len(examples) / batch_size)
  batches = progress.bar(batches, 'Evaluating', 'batch', count)
  return summarize([jax.device_get(eval_step(batch, params)) for batch in batches])


@limits.memory_for('Evaluation')
def run(
  workdir: pathlib.Path,
  overrides: dict[str, str],
  config: ConfigDict | None = None,
  step: str = '',
) -> dict[str, float]:
  """Evaluates a checkpoint of a workdir on its `data.eval_split`.

  `step` says which, as in `checkpoint.preferred`.

  Returns:
    The step and what `evaluate` gives. `left_out` is the number of images that are not scored
    because the weights were trained on files of their names; missing where there is none.
  """
  exp, params, loaded = experiment.from_workdir(workdir, overrides, config, step)
  batch_size = exp.config.eval_batch_size
  split = exp.config.data.eval_split
  source, left_out = experiment.open_test(exp)
  examples = experiment.load_split(exp, split, source)
  real_NL = experiment.load_real(exp, split, source)
  if real_NL is not None and len(real_NL) != len(examples):
    raise ValueError(
      f'data.real_labels: {len(real_NL) - len(examples)} of the {len(real_NL)} images were left '
      'out as bad ones, and which label is whose is not known then: set data.cache=stream.'
    )
  beside = {} if real_NL is None else {'real': real_NL}
  mesh = sharding.inference_mesh(batch_size)
  params = sharding.replicate(mesh, params)
  eval_step = make_eval_step(exp, mesh)
  result = {'step': loaded} | evaluate(eval_step, params, examples, batch_size, mesh, **beside)
  return result | ({'left_out': left_out} if left_out else {})
