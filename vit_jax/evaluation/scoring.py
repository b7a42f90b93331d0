"""Computes loss and accuracy of training batches, and sums them exactly over batches."""

from collections.abc import Mapping

from clu import metrics
import flax
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class Accuracy(metrics.Average):
  """Share of the images with labels whose most likely class is a label of the image."""

  @classmethod
  def from_model_output(cls, *, logits_BL, label_B, **_):
    predicted_B = logits_BL.argmax(axis=1)
    if label_B.ndim == 1:
      return super().from_model_output(predicted_B == label_B)
    hit_B1 = jnp.take_along_axis(label_B, predicted_B[:, None], axis=1) > 0
    return super().from_model_output(hit_B1[:, 0], mask=label_B.any(axis=1))


@flax.struct.dataclass
class Score(metrics.Collection):
  """Sums of the loss and the accuracy of training batches."""

  loss: metrics.Average.from_output('loss')
  accuracy: Accuracy


def training_score(
  logits_BL: jax.Array, label_B: jax.Array, loss_B: jax.Array
) -> metrics.Collection:
  """Returns the loss and accuracy of a micro-batch in training, where every row counts.

  Labels are numbers of classes, or multi-hot `[B, L]`.
  """
  return Score.single_from_model_output(loss=loss_B, logits_BL=logits_BL, label_B=label_B)


def quality(values: Mapping[str, float]) -> float:
  """Returns the value by which checkpoints are compared; more is better.

  It is the mean average precision of images with several labels, else the accuracy.
  """
  return values.get('mean_average_precision', values['accuracy'])


def summarize(batches: list[metrics.Collection]) -> dict[str, float]:
  """Returns the means over all batches, summed in float64, and the number of examples."""
  sums = jax.tree.map(lambda *parts: np.sum(np.array(parts, np.float64)), *batches)
  fields = {name: getattr(sums, name) for name in type(sums).__annotations__}
  means = {
    name: float(average.total / max(average.count, 1))  # perhaps no image has a label
    for name, average in fields.items()
    if isinstance(average, metrics.Average)
  }
  return means | {'examples': round(float(sums.loss.count))}
