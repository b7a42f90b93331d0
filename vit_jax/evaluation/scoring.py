"""Loss and accuracies, added up exactly."""

import functools

from clu import metrics
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


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
    real_BL: of `load_real_labels`; None without ReaL's accuracy.
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
