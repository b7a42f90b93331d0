"""Computes loss and accuracy of training batches, and sums them exactly over batches."""

import functools

from clu import metrics
import jax
import numpy as np


@functools.cache  # JAX can only add metrics of one and the same class
def averages(*names: str) -> type[metrics.Collection]:
  """Returns a `metrics.Collection` type that averages the metrics of these names."""
  return metrics.Collection.create(**{name: metrics.Average.from_output(name) for name in names})


def training_score(
  logits_BL: jax.Array, label_B: jax.Array, loss_B: jax.Array
) -> metrics.Collection:
  """Returns the loss and accuracy of a micro-batch in training, where every row counts."""
  return averages('loss', 'accuracy').single_from_model_output(
    loss=loss_B, accuracy=logits_BL.argmax(axis=1) == label_B
  )


def summarize(batches: list[metrics.Collection]) -> dict[str, float]:
  """Returns the means over all batches, summed in float64, and the number of examples."""
  sums = jax.tree.map(lambda *parts: np.sum(np.array(parts, np.float64)), *batches)
  fields = {name: getattr(sums, name) for name in type(sums).__annotations__}
  means = {
    name: float(average.total / average.count)
    for name, average in fields.items()
    if isinstance(average, metrics.Average)
  }
  return means | {'examples': round(float(sums.loss.count))}
