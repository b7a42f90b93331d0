"""Scores for images with several labels: average precision, F1 and thresholds of each class.

Decisions:
  * Average precision is the sum over all thresholds of the precision times the increase in recall,
    without interpolation, as `average_precision_score` in scikit-learn. Images with equal scores
    share a threshold.
  * Means over the classes skip classes without a positive image, because their average precision
    and recall are not defined.
  * A label is given to an image if its probability is at or above the threshold of the class.
"""

from collections.abc import Mapping, Sequence
import dataclasses

import numpy as np

THRESHOLD = 0.5  # used if no threshold was chosen


def cumulative(
  score_N: np.ndarray, label_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns each distinct score in decreasing order, and what a threshold at this score gives.

  Returns:
    score_T: the distinct scores.
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
    score_NL: scores such as logits or probabilities; only their order within a class counts.
    label_NL: 1 for each label of an image, else 0.
  """
  found_L = []
  for score_N, label_N in zip(score_NL.T, label_NL.T):
    _, found_T, given_T = cumulative(score_N, label_N)
    gain_T = np.diff(found_T, prepend=0)
    found_L.append((gain_T * found_T / given_T).sum() / found_T[-1] if found_T[-1] else np.nan)
  return np.array(found_L)


def best_thresholds(probability_NL: np.ndarray, label_NL: np.ndarray) -> np.ndarray:
  """Returns for each class the threshold with the highest F1 on these images, `[L]`.

  A threshold lies halfway between two probabilities that occur, so that rounding errors do not
  change a decision. Of equal F1 scores, the highest threshold is chosen. A class without positive
  images gets `THRESHOLD`. Choose thresholds on validation images, never on test images.
  """
  chosen_L = []
  for probability_N, label_N in zip(probability_NL.T.astype(np.float64), label_NL.T):
    probability_T, found_T, given_T = cumulative(probability_N, label_N)
    best = np.argmax(2 * found_T / (given_T + found_T[-1]))
    below = np.append(probability_T, 0.0)[best + 1]
    middle = (probability_T[best] + below) / 2
    chosen_L.append(middle if found_T[-1] else THRESHOLD)
  return np.array(chosen_L)


def given_labels(
  probability_L: np.ndarray, threshold_L: np.ndarray | float = THRESHOLD
) -> np.ndarray:
  """Returns the classes at or above their thresholds, the most likely class first: indices."""
  order = np.argsort(-probability_L, kind='stable')
  return order[(probability_L >= threshold_L)[order]]


@dataclasses.dataclass(frozen=True)
class Labelled:
  """The probabilities and the labels of examples, both `[N, L]`; a label is 1 or 0."""

  probability_NL: np.ndarray
  label_NL: np.ndarray

  @classmethod
  def join(cls, batches: Sequence[Mapping[str, np.ndarray] | None]) -> 'Labelled | None':
    """Joins the rows of the batches without padding; None if the batches have no rows.

    Args:
      batches: for each batch None, or `logits` and `label` `[B, L]`, and `mask` `[B]`.
    """
    if batches[0] is None:
      return None
    whole = lambda name: np.concatenate([batch[name][batch['mask'] > 0] for batch in batches])
    logits_NL = whole('logits').astype(np.float64)
    return cls(np.exp(-np.logaddexp(0, -logits_NL)), whole('label'))  # the sigmoid

  def by_class(
    self, class_names: Sequence[str], threshold_L: np.ndarray | float = THRESHOLD
  ) -> dict[str, dict[str, float]]:
    """Returns the scores of each class by name.

    Returns:
      For each class, `average_precision` (NaN without positive images), `precision`, `recall`,
      `f1`, `support` (number of positive images) and `threshold`. A ratio without images is 0.
    """
    given_NL, label_NL = self.probability_NL >= threshold_L, self.label_NL.astype(bool)
    hits_L, given_L = (given_NL & label_NL).sum(axis=0), given_NL.sum(axis=0)
    support_L = label_NL.sum(axis=0)
    columns = {
      'average_precision': average_precision(self.probability_NL, label_NL),
      'precision': hits_L / np.maximum(given_L, 1),
      'recall': hits_L / np.maximum(support_L, 1),
      'f1': 2 * hits_L / np.maximum(given_L + support_L, 1),
      'support': support_L,
      'threshold': np.broadcast_to(threshold_L, len(class_names)),
    }
    return {
      name: {column: values[i].item() for column, values in columns.items()}
      for i, name in enumerate(class_names)
    }

  def summary(self) -> dict[str, float]:
    """Returns the mean average precision, and the mean F1 at `THRESHOLD`, over the classes.

    Classes without positive images are skipped; without any positive image, both are 0.
    """
    rows = self.by_class(range(self.label_NL.shape[1])).values()
    rows = [row for row in rows if row['support']]
    mean = lambda column: float(np.mean([row[column] for row in rows])) if rows else 0.0
    return {'mean_average_precision': mean('average_precision'), 'macro_f1': mean('f1')}
