"""Computes loss and accuracies, and sums them exactly over batches."""

from collections.abc import Mapping
import functools

from clu import metrics
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


def hits(predicted_B: jax.Array, label_B: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns whether each predicted class is a label of the image, and whether the image has labels.

  Args:
    predicted_B: number of the most likely class.
    label_B: number of the class, or multi-hot `[B, L]`.
  """
  if label_B.ndim == 1:
    return predicted_B == label_B, jnp.ones(len(label_B), bool)
  hit_B1 = jnp.take_along_axis(label_B, predicted_B[:, None], axis=1) > 0
  return hit_B1[:, 0], label_B.any(axis=1)


@flax.struct.dataclass
class Accuracy(metrics.Average):
  """Share of the images with labels whose most likely class is a label of the image."""

  @classmethod
  def from_model_output(cls, *, predicted_B, mask, label_B, **_):
    hit_B, labelled_B = hits(predicted_B, label_B)
    return super().from_model_output(hit_B, mask=mask & labelled_B)


@flax.struct.dataclass
class RealAccuracy(Accuracy):
  """ReaL accuracy: share of labelled images whose predicted class is among the ReaL labels."""

  @classmethod
  def from_model_output(cls, *, predicted_B, mask, real_BL, **_):
    return super().from_model_output(predicted_B=predicted_B, mask=mask, label_B=real_BL)


KINDS = {'accuracy': Accuracy, 'real_accuracy': RealAccuracy}


@functools.cache  # JAX can only add metrics of one and the same class
def averages(*names: str) -> type[metrics.Collection]:
  """Returns a `metrics.Collection` type that averages the metrics of these names."""
  return metrics.Collection.create(
    **{name: KINDS.get(name) or metrics.Average.from_output(name) for name in names}
  )


def training_score(
  logits_BL: jax.Array, label_B: jax.Array, loss_B: jax.Array
) -> metrics.Collection:
  """Returns the loss and accuracy of a micro-batch in training, where every row counts."""
  return averages('loss', 'accuracy').single_from_model_output(
    loss=loss_B,
    predicted_B=logits_BL.argmax(axis=1),
    label_B=label_B,
    mask=jnp.ones(len(label_B), bool),
  )


def score(
  logits_BL: jax.Array,
  label_B: jax.Array,
  loss_B: jax.Array,
  mask_B: jax.Array,
  real_BL: jax.Array | None = None,
) -> metrics.Collection:
  """Returns the loss and accuracies of a batch in evaluation.

  The top-5 accuracy is included only with more than five classes and one label per image.

  Args:
    logits_BL: the model's logits.
    label_B: the true labels: numbers of classes, or multi-hot `[B, L]`.
    loss_B: the loss of each example.
    mask_B: 0 for rows that do not count, such as padding.
    real_BL: labels from `load_real_labels`; None to skip the ReaL accuracy.
  """
  top5 = label_B.ndim == 1 and logits_BL.shape[1] > 5
  names = ['loss', 'accuracy'] + ['top5_accuracy'] * top5
  names += ['real_accuracy'] * (real_BL is not None)
  top5_BL = jax.lax.top_k(logits_BL, min(5, logits_BL.shape[1]))[1]
  return averages(*names).single_from_model_output(
    loss=loss_B,
    label_B=label_B,
    top5_accuracy=(top5_BL == label_B[:, None]).any(axis=1) if top5 else None,
    mask=mask_B.astype(bool),
    predicted_B=top5_BL[:, 0],
    real_BL=real_BL,
  )


def quality(values: Mapping[str, float]) -> float:
  """Returns the value by which checkpoints are compared; more is better.

  It is the mean average precision of images with several labels, else the accuracy.
  """
  return values.get('mean_average_precision', values['accuracy'])


def summarize(batches: list[metrics.Collection]) -> dict[str, float]:
  """Returns the means over all batches, summed in float64, and the number of examples.

  With ReaL labels, also returns the number of examples that have such a label.
  """
  sums = jax.tree.map(lambda *parts: np.sum(np.array(parts, np.float64)), *batches)
  fields = {name: getattr(sums, name) for name in type(sums).__annotations__}
  means = {
    name: float(average.total / max(average.count, 1))  # perhaps no image has a label
    for name, average in fields.items()
    if isinstance(average, metrics.Average)
  }
  real = (
    {'real_examples': round(float(sums.real_accuracy.count))} if 'real_accuracy' in means else {}
  )
  return means | {'examples': round(float(sums.loss.count))} | real
