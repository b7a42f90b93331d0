"""Measures how good and how trustworthy predictions are, from NumPy arrays.

`N` is the number of examples. `confidence_N` is the probability of the predicted class.

Decisions:
  * An undefined value is NaN, e.g. the recall of a class without examples. `rows_of` turns it into
    None, which JSON writes as null.
  * Examples with equal confidences are treated as one group, so no result depends on the order of
    the examples.
"""

from collections.abc import Sequence
import math
import statistics

import numpy as np

LEVEL = 0.95  # probability with which a confidence interval covers the true accuracy
BINS = 15  # number of bins of the calibration error, as in Guo et al. 2017 (1706.04599), Section 5
POINTS = 20  # number of points of `coverage_curve`

COLDEST, HOTTEST = 0.01, 100.0  # limits of a fitted temperature
CHUNK = 2**22  # maximum number of logits that are converted to float64 at once


def wilson_interval(correct: int, examples: int) -> tuple[float, float]:
  """Returns the 95% confidence interval of an accuracy (Wilson 1927).

  Unlike the interval of the normal approximation, this interval always has a positive length and
  never leaves [0, 1].

  Args:
    correct: number of correct predictions.
    examples: number of predictions, at least 1.
  """
  z = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)
  share, ratio = correct / examples, z**2 / examples
  half = z * math.sqrt((share * (1 - share) + ratio / 4) / examples)
  low, high = ((share + ratio / 2 + sign * half) / (1 + ratio) for sign in (-1, 1))
  return max(low, 0.0), min(high, 1.0)


def class_scores(
  label_N: np.ndarray, predicted_N: np.ndarray, num_classes: int
) -> dict[str, np.ndarray]:
  """Returns a dict of arrays `[L]`: `precision`, `recall`, `f1` and `support` of each class.

  The support is the number of examples of a class. The precision is NaN for a class that is never
  predicted. The recall is NaN for a class without examples. F1 is NaN for a class that has no
  examples and is never predicted.

  Args:
    label_N: true class of each example.
    predicted_N: predicted class of each example.
    num_classes: L, the number of classes.
  """
  label_N, predicted_N = np.asarray(label_N), np.asarray(predicted_N)
  count = lambda classes: np.bincount(classes, minlength=num_classes)
  return ratios(*map(count, (label_N[label_N == predicted_N], predicted_N, label_N)))


def ratios(
  right_L: np.ndarray, given_L: np.ndarray, support_L: np.ndarray
) -> dict[str, np.ndarray]:
  """Computes the result of `class_scores` from three counts of each class.

  Args:
    right_L: number of correct predictions of each class.
    given_L: number of all predictions of each class.
    support_L: number of examples of each class.
  """
  share = lambda part_L, all_L: np.where(all_L > 0, part_L / np.maximum(all_L, 1), np.nan)
  return {
    'precision': share(right_L, given_L),
    'recall': share(right_L, support_L),
    'f1': share(2 * right_L, given_L + support_L),
    'support': support_L,
  }


def balanced_accuracy(recall_L: np.ndarray) -> float:
  """Returns the mean recall of the classes that have examples."""
  return float(np.nanmean(recall_L))


def confused(
  label_N: np.ndarray, predicted_N: np.ndarray, names: Sequence[str]
) -> dict[str, dict[str, int]]:
  """Returns the confusion matrix as `{true class: {predicted class: number of examples}}`.

  If a pair of true and predicted class has no example, the pair is left out.

  Args:
    label_N: true class of each example.
    predicted_N: predicted class of each example.
    names: names of the classes, which become the keys.
  """
  pair_P2, count_P = np.unique(np.stack([label_N, predicted_N], axis=1), axis=0, return_counts=True)
  found = {}
  for (label, predicted), count in zip(pair_P2.tolist(), count_P.tolist()):
    found.setdefault(names[label], {})[names[predicted]] = count
  return found


def reliability(confidence_N: np.ndarray, correct_N: np.ndarray) -> dict[str, np.ndarray]:
  """Groups examples by confidence in bins of equal width, and returns the accuracy of each bin.

  This is the data of a reliability diagram (Guo et al. 2017, Section 2).

  Args:
    confidence_N: probability of the predicted class of each example.
    correct_N: whether each prediction is correct.

  Returns:
    A dict with an array `[BINS]` for each key:
    `low` and `high`: limits of the bin, which contains confidences above `low` and up to `high`.
    `examples`: number of examples in the bin.
    `confidence`: mean confidence of the examples in the bin; NaN in an empty bin.
    `accuracy`: accuracy on the examples in the bin; NaN in an empty bin.
  """
  edge_B = np.linspace(0, 1, BINS + 1)
  bin_N = np.searchsorted(edge_B[1:-1], confidence_N)
  total = lambda weight_N: np.bincount(bin_N, weight_N, minlength=BINS)
  examples_B = np.bincount(bin_N, minlength=BINS)
  mean = lambda weight_N: np.where(
    examples_B > 0, total(weight_N) / np.maximum(examples_B, 1), np.nan
  )
  return {
    'low': edge_B[:-1],
    'high': edge_B[1:],
    'examples': examples_B,
    'confidence': mean(confidence_N),
    'accuracy': mean(correct_N),
  }


def calibration_error(bins: dict[str, np.ndarray]) -> float:
  """Computes the expected calibration error, 0 to 1, from the result of `reliability`.

  The error of a bin is the absolute difference between its accuracy and its mean confidence. The
  bins' errors are averaged, weighted by the number of examples (Guo et al. 2017, equation 3).
  """
  gap_B = np.nan_to_num(np.abs(bins['accuracy'] - bins['confidence']))
  return float((gap_B * bins['examples']).sum() / bins['examples'].sum())


def coverage_curve(
  confidence_N: np.ndarray, correct_N: np.ndarray, points: int = POINTS
) -> dict[str, np.ndarray]:
  """Returns the accuracy of a model that classifies only its most confident examples.

  The accuracy is computed for several coverages. A coverage is the share of the examples that the
  model classifies (Geifman and El-Yaniv 2017, 1705.08500).

  Args:
    confidence_N: probability of the predicted class of each example.
    correct_N: whether each prediction is correct.
    points: number of points P of the curve.

  Returns:
    A dict with an array `[P]` for each key:
    `coverage`: share of the examples that the model classifies, from 1/P to 1.
    `accuracy`: accuracy on the classified examples. Examples with equal confidences all count with
      their mean accuracy, so that their order has no effect.
    `confidence`: lowest confidence among the classified examples.
  """
  order_N = np.argsort(-np.asarray(confidence_N), kind='stable')
  falling_N, count = np.asarray(confidence_N)[order_N], len(order_N)
  last = np.flatnonzero(np.append(falling_N[1:] != falling_N[:-1], True))  # end of each group
  right = np.cumsum(np.asarray(correct_N, np.float64)[order_N])[last]
  coverage_P = np.arange(1, points + 1) / points
  answered_P = coverage_P * count
  right_P = np.interp(answered_P, [0, *(last + 1)], [0, *right])
  return {
    'coverage': coverage_P,
    'accuracy': right_P / answered_P,
    'confidence': falling_N[np.ceil(answered_P - 1e-9).astype(int) - 1],
  }


def fit_temperature(logits_NL: np.ndarray, label_N: np.ndarray) -> float:
  """Returns the temperature that minimises the log loss (Guo et al. 2017, Section 4.2).

  The loss is computed in float64. The temperature is between `COLDEST` and `HOTTEST`. If all
  predictions are correct, the function returns 1, because no temperature is best: the loss falls
  as the temperature falls towards 0.

  Args:
    logits_NL: logits of the examples, not yet divided by a temperature.
    label_N: true class of each example.
  """
  from scipy import optimize  # imported only here, because importing SciPy takes 0.4 s

  logits_NL, label_N = np.asarray(logits_NL), np.asarray(label_N)
  rows = max(1, CHUNK // logits_NL.shape[1])
  chunks = [slice(start, start + rows) for start in range(0, len(label_N), rows)]

  def loss(log_temperature):
    total = 0.0
    for chunk in chunks:
      gap_BL = logits_NL[chunk].astype(np.float64)
      gap_BL -= gap_BL.max(axis=1, keepdims=True)
      gap_BL /= math.exp(log_temperature)
      own_B = np.take_along_axis(gap_BL, label_N[chunk, None], axis=1)[:, 0]
      total += (np.log(np.exp(gap_BL).sum(axis=1)) - own_B).sum()
    return total / len(label_N)

  if (logits_NL.argmax(axis=1) == label_N).all():
    return 1.0
  bounds = math.log(COLDEST), math.log(HOTTEST)
  found = optimize.minimize_scalar(loss, bounds=bounds, method='bounded', options={'xatol': 1e-6})
  return math.exp(found.x)


def rows_of(columns: dict[str, np.ndarray]) -> list[dict[str, float | int | None]]:
  """Converts a dict of arrays `[R]` to a list of R dicts, for JSON; NaN becomes None."""
  plain = [
    [None if value != value else value for value in np.asarray(column).tolist()]
    for column in columns.values()
  ]
  return [dict(zip(columns, row)) for row in zip(*plain)]
