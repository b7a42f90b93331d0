"""Computes loss and accuracies, and sums them exactly over batches."""

import functools

from clu import metrics
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class RealAccuracy(metrics.Average):
  """ReaL accuracy: share of labelled images whose predicted class is among the ReaL labels."""

  @classmethod
  def from_model_output(cls, *, predicted_B, mask, real_BL, **_):
    hit_B = jnp.take_along_axis(real_BL, predicted_B[:, None], axis=1)[:, 0]
    return super().from_model_output(hit_B, mask=mask & real_BL.any(axis=1))


@functools.cache  # JAX can only add metrics of one and the same class
def averages(*names: str) -> type[metrics.Collection]:
  """Returns a `metrics.Collection` type that averages the metrics of these names."""
  kinds = {'real_accuracy': RealAccuracy}
  return metrics.Collection.create(
    **{name: kinds.get(name) or metrics.Average.from_output(name) for name in names}
  )


def training_score(
  logits_BL: jax.Array, label_B: jax.Array, loss_B: jax.Array
) -> metrics.Collection:
  """Returns the loss and accuracy of a micro-batch in training, where every row counts."""
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
  """Returns the loss and accuracies of a batch in evaluation.

  The top-5 accuracy is included only with more than five classes.

  Args:
    logits_BL: the model's logits.
    label_B: the true labels.
    loss_B: the loss of each example.
    mask_B: 0 for rows that do not count, such as padding.
    real_BL: labels from `load_real_labels`; None to skip the ReaL accuracy.
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
  """Returns the means over all batches, summed in float64, and the number of examples.

  With ReaL labels, also returns the number of examples that have such a label.
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
