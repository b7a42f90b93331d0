"""Losses, predictions and accuracies of evaluated splits and of training batches."""

from collections.abc import Mapping
import dataclasses

from clu import metrics
import flax
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.workdir import Calibration

NOT_CALIBRATED = Calibration()


@dataclasses.dataclass(frozen=True)
class Answers:
  """Outputs of a model for some examples of a split, without padding and bad images.

  Attributes:
    index_N: index of each example in the split.
    label_N: true classes; multi-hot `[N, L]` if images can have several labels.
    logits_NL: float32 logits; None if the model has no classes.
    loss_N: loss of each example, computed as the config defines it, e.g. with label smoothing.
    real_NL: ReaL labels, bool; None if ReaL labels are not used.
  """

  index_N: np.ndarray
  label_N: np.ndarray
  logits_NL: np.ndarray | None
  loss_N: np.ndarray
  real_NL: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Scores:
  """Predictions for the examples of a split, one row per example.

  Attributes:
    index_N: index of each example in the split. Unreadable images have no row.
    label_N: true classes.
    predicted_N: predicted classes.
    confidence_N: calibrated probabilities of the predicted classes.
    raw_N: probabilities of the predicted classes before calibration.
    loss_N: loss of each example.
    top5_N: whether the true class is among the five most likely classes. None if the model has at
      most five classes.
    real_N: 1 if the predicted class is among the ReaL labels, else 0; NaN for an image without ReaL
      labels. None if ReaL labels are not used.
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
    """Computes predictions and confidences from the logits of some examples."""
    logits_NL, label_N1 = answers.logits_NL.astype(np.float64), answers.label_N[:, None]
    predicted_N, top5_N, real_N = logits_NL.argmax(axis=1), None, None
    gap_NL = logits_NL - logits_NL.max(axis=1, keepdims=True)

    def confidence(temperature):
      if calibration.sigmoid:
        return np.exp(-np.logaddexp(0, -logits_NL.max(axis=1)))
      return 1 / np.exp(gap_NL / temperature).sum(axis=1)

    if logits_NL.shape[1] > 5:  # if logits are equal, the first one counts as larger, as in argmax
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
    """Concatenates the rows of several `Scores`, in order."""
    columns = {name: [vars(part)[name] for part in parts] for name in vars(parts[0])}
    return cls(**{k: None if v[0] is None else np.concatenate(v) for k, v in columns.items()})

  @property
  def correct_N(self) -> np.ndarray:
    """Whether the predicted class of each example is the true class, bool `[N]`."""
    return self.predicted_N == self.label_N

  def means(self) -> dict[str, float]:
    """Returns a dict with the mean loss, the accuracies and the number of examples.

    The keys are `loss`, `accuracy` and `examples`. If there are more than five classes, the dict
    also has `top5_accuracy`. If there are ReaL labels, the dict also has `real_accuracy`, and the
    number of images with a ReaL label as `real_examples`.
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


@dataclasses.dataclass(frozen=True)
class Losses:
  """Losses of the examples of a split, one per example, for a model without classes."""

  loss_N: np.ndarray

  @classmethod
  def joined(cls, parts: list['Losses']) -> 'Losses':
    """Concatenates the losses of several `Losses`, in order."""
    return cls(np.concatenate([part.loss_N for part in parts]))

  def means(self) -> dict[str, float]:
    """Returns a dict with the mean `loss` and the number of `examples`."""
    return {'loss': float(self.loss_N.mean(dtype=np.float64)), 'examples': len(self.loss_N)}


@flax.struct.dataclass
class Accuracy(metrics.Average):
  """Accuracy: the share of images whose label is the class with the largest logit.

  If an image has several labels, the class must be one of these labels. Images without a label
  do not count.
  """

  @classmethod
  def from_model_output(cls, *, logits_BL, label_B, **_):
    predicted_B = logits_BL.argmax(axis=1)
    if label_B.ndim == 1:
      return super().from_model_output(predicted_B == label_B)
    hit_B1 = jnp.take_along_axis(label_B, predicted_B[:, None], axis=1) > 0
    return super().from_model_output(hit_B1[:, 0], mask=label_B.any(axis=1))


@flax.struct.dataclass
class Score(metrics.Collection):
  """Loss and accuracy of a training batch, stored as sums so that batches can be added up."""

  loss: metrics.Average.from_output('loss')
  accuracy: Accuracy


@flax.struct.dataclass
class LossScore(metrics.Collection):
  """Loss of a training batch in a run without labels, stored as a sum over the examples."""

  loss: metrics.Average.from_output('loss')


def training_score(
  logits_BL: jax.Array | None, label_B: jax.Array, loss_B: jax.Array
) -> metrics.Collection:
  """Returns the loss and the accuracy of a training micro-batch, as sums that can be added up.

  A micro-batch is a part of a training batch. Training batches have no padding, so the loss counts
  every image. The accuracy counts every image that has a label.

  Args:
    logits_BL: logits; None in a run without labels. The result then has no accuracy.
    label_B: class of each image, or multi-hot labels `[B, L]`.
    loss_B: loss of each image.
  """
  if logits_BL is None:
    return LossScore.single_from_model_output(loss=loss_B)
  return Score.single_from_model_output(loss=loss_B, logits_BL=logits_BL, label_B=label_B)


def quality(values: Mapping[str, float]) -> float:
  """Returns the value by which the best checkpoint is chosen; a higher value is better.

  The value is the mean average precision if images can have several labels, else the accuracy. For
  a model without classes, it is the negative loss.

  Args:
    values: the result of `means` of `Scores`, `Labelled` or `Losses`.
  """
  for name in ('mean_average_precision', 'accuracy'):
    if name in values:
      return values[name]
  return -values['loss']


def summarize(batches: list[metrics.Collection]) -> dict[str, float]:
  """Returns the `loss`, the `accuracy` and the number of `examples` of several training batches.

  Loss and accuracy are means over all examples. A run without labels has no `accuracy`.

  Args:
    batches: a result of `training_score` for each batch.
  """
  sums = jax.tree.map(lambda *parts: np.sum(np.array(parts, np.float64)), *batches)
  fields = {name: getattr(sums, name) for name in type(sums).__annotations__}
  means = {
    name: float(average.total / max(average.count, 1))  # the count is 0 if no image has a label
    for name, average in fields.items()
    if isinstance(average, metrics.Average)
  }
  return means | {'examples': round(float(sums.loss.count))}
