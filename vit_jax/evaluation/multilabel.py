"""Evaluates models that give an image several labels: average precision, F1 and thresholds.

Decisions:
  * Average precision is computed without interpolation, as in `average_precision_score` of
    scikit-learn. At each threshold, the precision is multiplied by the increase in recall, and the
    products are summed. Images with equal scores are counted at the same threshold.
  * A positive image of a class is an image that has the class as a label. Means over the classes
    skip classes without a positive image, for which average precision and recall are not defined.
  * A class is predicted for an image if its probability is at or above the threshold of the class.
"""

from collections.abc import Mapping, Sequence
import dataclasses

import numpy as np

from vit_jax.evaluation import measures
from vit_jax.workdir import Calibration

THRESHOLD = 0.5  # the threshold of a class if none was fitted


def cumulative(
  score_N: np.ndarray, label_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Counts the images whose score for a class is at or above each possible threshold.

  Args:
    score_N: score of each image for this class.
    label_N: 1 for a positive image, which has the class as a label; else 0.

  Returns:
    score_T: the T distinct scores, in decreasing order; each is used as a threshold.
    found_T: number of positive images at or above the threshold.
    given_T: number of all images at or above the threshold.
  """
  order = np.argsort(-score_N, kind='stable')
  score_N, hit_N = score_N[order], label_N[order].astype(np.int64)
  last_T = np.append(np.flatnonzero(np.diff(score_N)), len(score_N) - 1)
  return score_N[last_T], np.cumsum(hit_N)[last_T], last_T + 1


def average_precision(score_NL: np.ndarray, label_NL: np.ndarray) -> np.ndarray:
  """Returns the average precision of each class, `[L]`; NaN for a class without positive images.

  Args:
    score_NL: scores, e.g. logits or probabilities; only their order within a class matters.
    label_NL: multi-hot labels: 1 if the image has the class as a label, else 0.
  """
  found_L = []
  for score_N, label_N in zip(score_NL.T, label_NL.T):
    _, found_T, given_T = cumulative(score_N, label_N)
    gain_T = np.diff(found_T, prepend=0)
    found_L.append((gain_T * found_T / given_T).sum() / found_T[-1] if found_T[-1] else np.nan)
  return np.array(found_L)


def best_thresholds(probability_NL: np.ndarray, label_NL: np.ndarray) -> np.ndarray:
  """Returns for each class the threshold with the highest F1 on the given images, `[L]`.

  A threshold lies halfway between two neighbouring probabilities of the images, or between the
  lowest probability and 0. Therefore, rounding errors do not change predictions. If several
  thresholds have the highest F1, the largest of these thresholds is chosen. A class without
  positive images gets `THRESHOLD`. Fit thresholds on validation images, never on test images.

  Args:
    probability_NL: probability of each class.
    label_NL: multi-hot labels.
  """
  threshold_L = []
  for probability_N, label_N in zip(probability_NL.T.astype(np.float64), label_NL.T):
    probability_T, found_T, given_T = cumulative(probability_N, label_N)
    best = np.argmax(2 * found_T / (given_T + found_T[-1]))
    below = np.append(probability_T, 0.0)[best + 1]
    middle = (probability_T[best] + below) / 2
    threshold_L.append(middle if found_T[-1] else THRESHOLD)
  return np.array(threshold_L)


def given_labels(
  probability_L: np.ndarray, threshold_L: Sequence[float] | None = None
) -> np.ndarray:
  """Returns the indices of the classes that are predicted for an image, the most likely first.

  A class is predicted if its probability is at or above its threshold. If `threshold_L` is None,
  the threshold of each class is `THRESHOLD`.
  """
  order = np.argsort(-probability_L, kind='stable')
  return order[(probability_L >= chosen(threshold_L, len(order)))[order]]


def chosen(threshold_L: Sequence[float] | None, classes: int) -> np.ndarray:
  """Returns the threshold of each class as an array `[L]`.

  If `threshold_L` is None, each threshold is `THRESHOLD`. `classes` is L, the number of classes.

  Raises:
    ValueError: the number of thresholds is not the number of classes.
  """
  if threshold_L is None:
    return np.full(classes, THRESHOLD)
  if len(threshold_L) != classes:
    raise ValueError(f'Expected {classes} thresholds, one per class, got {len(threshold_L)}.')
  return np.asarray(threshold_L)


@dataclasses.dataclass(frozen=True)
class Labelled:
  """Probabilities, labels and losses of examples that can have several labels, one row per example.

  Attributes:
    probability_NL: probability of each class.
    label_NL: multi-hot labels.
    loss_N: loss of each example; None if losses are not needed.
  """

  probability_NL: np.ndarray
  label_NL: np.ndarray
  loss_N: np.ndarray | None = None

  @classmethod
  def of(
    cls, logits_NL: np.ndarray, label_NL: np.ndarray, loss_N: np.ndarray | None = None
  ) -> 'Labelled':
    """Creates a `Labelled` from logits; the probabilities are the sigmoids of the logits."""
    probability_NL = np.exp(-np.logaddexp(0, -logits_NL.astype(np.float64)))  # the sigmoid
    return cls(probability_NL, label_NL, loss_N)

  @classmethod
  def joined(cls, parts: Sequence['Labelled']) -> 'Labelled':
    """Concatenates the rows of several `Labelled`, in order; each must have `loss_N`."""
    names = [field.name for field in dataclasses.fields(cls)]
    return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

  def means(self) -> dict[str, float]:
    """Returns a dict with mean loss, accuracy, the values of `summary`, and number of examples.

    The accuracy is the share of images whose most likely class is one of their labels. Images
    without a label do not count for the accuracy. If no image has a label, the accuracy is 0.
    """
    first_N1 = self.probability_NL.argmax(axis=1)[:, None]
    hits = int(np.take_along_axis(self.label_NL.astype(bool), first_N1, axis=1).sum())
    labelled = int(self.label_NL.any(axis=1).sum())
    found = {'loss': float(self.loss_N.mean(dtype=np.float64)), 'accuracy': hits / max(labelled, 1)}
    return found | self.summary() | {'examples': len(self.label_NL)}

  def by_class(
    self, class_names: Sequence[str], threshold_L: Sequence[float] | None = None
  ) -> dict[str, dict[str, float | None]]:
    """Returns the measures of each class, as `{class name: {measure: value}}`.

    Args:
      class_names: names of the L classes.
      threshold_L: threshold of each class; None: `THRESHOLD` for each class.

    Returns:
      For each class, `average_precision`, `precision`, `recall`, `f1`, `support` (number of
      positive images) and `threshold`. Undefined values are None.
    """
    threshold_L, label_NL = chosen(threshold_L, len(class_names)), self.label_NL.astype(bool)
    given_NL = self.probability_NL >= threshold_L
    counts = (given_NL & label_NL).sum(axis=0), given_NL.sum(axis=0), label_NL.sum(axis=0)
    precision_L = average_precision(self.probability_NL, label_NL)
    columns = {'average_precision': precision_L} | measures.ratios(*counts)
    rows = measures.rows_of(columns | {'threshold': threshold_L})
    return dict(zip(class_names, rows))

  def summary(self) -> dict[str, float]:
    """Returns a dict with average precision and F1, each averaged over the classes.

    F1 is computed at `THRESHOLD`. Classes without positive images are skipped.
    """
    rows = self.by_class(range(self.label_NL.shape[1]))
    return {
      'mean_average_precision': mean_of('average_precision', rows),
      'macro_f1': mean_of('f1', rows),
    }

  def trust(self, class_names: Sequence[str], calibration: Calibration) -> dict:
    """Returns the measures of each class, and the mean F1 of the classes, at the fitted thresholds.

    Args:
      class_names: names of the classes.
      calibration: contains the fitted threshold of each class. Without fitted thresholds,
        `THRESHOLD` is used.

    Returns:
      A dict with these keys:
      `macro_f1_at_thresholds`: the mean F1 over the classes with positive images.
      `threshold_examples`: the number of validation examples that the thresholds were fitted on; 0
        if they were not fitted.
      `per_class`: the result of `by_class`.
    """
    rows = self.by_class(class_names, calibration.thresholds)
    return {
      'macro_f1_at_thresholds': mean_of('f1', rows),
      'threshold_examples': calibration.examples if calibration.thresholds else 0,
      'per_class': rows,
    }


def mean_of(column: str, rows: Mapping[object, dict]) -> float:
  """Returns the mean of a measure over the classes that have positive images.

  If no class has a positive image, the result is 0.

  Args:
    column: name of the measure, e.g. `f1`.
    rows: the result of `by_class`.
  """
  values = [row[column] for row in rows.values() if row['support']]
  return float(np.mean(values)) if values else 0.0
