"""Computes and draws charts of the accuracy and the calibration of predictions."""

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib import ticker
from matplotlib.figure import Figure
import numpy as np

from vit_jax.figures import canvas
from vit_jax.figures.maps import Missing

# With more than `NUMBERED` classes, cells of the confusion matrix have no numbers. With more than
# `LABELLED` classes, the matrix has no class names, and only the `LOWEST` classes with the lowest
# accuracy have a bar.
NUMBERED, LABELLED = 20, 40
LOWEST = 20
DRAWN = 2000  # maximum number of classes in a confusion matrix


def confusion(label_N: np.ndarray, predicted_N: np.ndarray, num_classes: int) -> np.ndarray:
  """Counts examples by true class (row) and predicted class (column): `count_LL`.

  Raises:
    Missing: there are more than `DRAWN` classes, for which the array would need much memory.
  """
  if num_classes > DRAWN:
    raise Missing(f'a confusion matrix of more than {DRAWN:,} classes is not legible.')
  pair_N = np.asarray(label_N, np.int64) * num_classes + predicted_N
  return np.bincount(pair_N, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_accuracy(count_LL: np.ndarray) -> np.ndarray:
  """Returns the accuracy of each class: `[L]`, with NaN for a class without examples."""
  total_L = count_LL.sum(axis=1)
  return np.where(total_L > 0, np.diag(count_LL) / np.maximum(total_L, 1), np.nan)


@canvas.styled
def draw_confusion(
  count_LL: np.ndarray, accuracy_L: np.ndarray, class_names: Sequence[str]
) -> Figure:
  """Draws the confusion matrix, and next to it the accuracy of each class as a bar.

  Args:
    count_LL: number of examples by true class (row) and predicted class (column).
    accuracy_L: accuracy of each class, 0 to 1; NaN for a class without examples.
    class_names: names of the L classes.
  """
  classes = len(class_names)
  total_L1 = count_LL.sum(axis=1, keepdims=True)
  share_LL = np.where(total_L1 > 0, count_LL / np.maximum(total_L1, 1), np.nan)
  figure = Figure((canvas.WIDTH, min(max(0.42 * classes, 1.5), 4.2) + 1.2), layout='constrained')
  matrix, bars = figure.subplots(1, 2, width_ratios=(2.4, 1))
  norm = matplotlib.colors.PowerNorm(1 if classes <= NUMBERED else 0.5, 0, 1)
  shades = matrix.imshow(share_LL, cmap='Blues', norm=norm, aspect='auto')
  number = '' if classes <= LABELLED else ' (number)'
  matrix.set(xlabel=f'predicted class{number}', ylabel=f'true class{number}')
  matrix.tick_params(length=0)
  if classes <= LABELLED:
    names = [canvas.short(name) for name in class_names]
    matrix.set_yticks(range(classes), names, fontsize=small(classes))
    turn = dict(rotation=45, ha='right', rotation_mode='anchor')
    turn = turn if max(map(len, names)) > 2 else {}
    matrix.set_xticks(range(classes), names, fontsize=small(classes), **turn)
  if classes <= NUMBERED:
    matrix.set_title('percent of the true class')
    matrix.spines[:].set_visible(False)
    for (i, j), share in np.ndenumerate(share_LL):
      if share >= 0.005:
        colour = 'white' if share > 0.55 else 'black'
        matrix.text(j, i, f'{100 * share:.0f}', ha='center', va='center', color=colour, size=8)
  else:
    matrix.spines[:].set_visible(True)
    bar = canvas.add_colours(figure, shades, matrix, 'share of the true class', location='left')
    bar.ax.yaxis.set_major_formatter(ticker.PercentFormatter(1.0))
  class_bars(bars, accuracy_L, class_names)
  return figure


def small(labels: int) -> int:
  """Returns the font size, in points, for an axis with the given number of labels."""
  return 8 if labels <= NUMBERED else 6


def class_bars(axis, accuracy_L: np.ndarray, class_names: Sequence[str]) -> None:
  """Draws the accuracy of each class as a bar on a matplotlib axis.

  If there are more than `LABELLED` classes, only `LOWEST` classes are drawn: those with the lowest
  accuracy.
  """
  order = np.arange(len(class_names))
  title = 'accuracy of each class'
  if len(order) > LABELLED:
    order = np.argsort(accuracy_L, kind='stable')[:LOWEST]  # NaN is sorted last
    title = f'the {LOWEST} lowest of {len(class_names):,} classes'
  names = [canvas.short(class_names[i]) for i in order]
  axis.barh(range(len(order)), np.nan_to_num(accuracy_L[order]), height=0.7, color=canvas.BLUE)
  axis.set_yticks(range(len(order)), names, fontsize=small(len(order)))
  axis.set(ylim=(len(order) - 0.5, -0.5), xlim=(0, 1), xlabel='accuracy', title=title)
  axis.tick_params(axis='y', length=0)
  axis.xaxis.set_major_formatter(ticker.PercentFormatter(1.0))
  axis.xaxis.set_major_locator(ticker.MultipleLocator(0.5))
  axis.grid(axis='x')
  for i, value in enumerate(accuracy_L[order]):
    if np.isnan(value):
      axis.text(0.02, i, 'no example', va='center', size=small(len(order)))
    elif len(order) > NUMBERED:
      continue
    elif value > 0.3:
      axis.text(value - 0.02, i, f'{100 * value:.1f}', va='center', ha='right', color='w', size=8)
    else:
      axis.text(value + 0.02, i, f'{100 * value:.1f}', va='center', size=8)


@canvas.styled
def draw_reliability(
  bins: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray] | None = None
) -> Figure:
  """Draws a reliability diagram: accuracy and share of the examples in each confidence bin.

  Args:
    bins: the result of `evaluation.reliability`.
    before: the result of `evaluation.reliability` for the probabilities before calibration, to be
      drawn for comparison. None if no calibration was fitted.
  """
  figure = Figure((canvas.WIDTH, 3.6), layout='constrained')
  left, right = figure.subplots(1, 2)
  places = dict(x=bins['low'], width=bins['high'] - bins['low'], align='edge', edgecolor='white')
  left.plot([0, 1], [0, 1], color=canvas.GREY, linestyle=(0, (4, 3)), label='perfect calibration')
  label = 'all examples' if before is None else 'with temperature'
  left.bar(height=np.nan_to_num(bins['accuracy']), color=canvas.BLUE, label=label, **places)
  total = bins['examples'].sum()
  right.bar(height=bins['examples'] / total, color=canvas.BLUE, label=label, **places)
  if before is not None:
    there = before['examples'] > 0
    line = dict(color=canvas.ORANGE, marker='.', label='without temperature')
    left.plot(before['confidence'][there], before['accuracy'][there], **line)
    edge_B = np.append(before['low'], before['high'][-1:])
    line = dict(color=canvas.ORANGE, label='without temperature', linewidth=1.5)
    right.stairs(before['examples'] / total, edge_B, **line)
  left.set(ylabel='accuracy', ylim=(0, 1))
  right.set(ylabel='share of the examples', ylim=(0, None))
  for axis in (left, right):
    axis.set(xlabel='confidence: probability of the predicted class', xlim=(0, 1))
    axis.xaxis.set_major_formatter(ticker.PercentFormatter(1.0))
    axis.yaxis.set_major_formatter(ticker.PercentFormatter(1.0))
    axis.grid()
  figure.legend(*left.get_legend_handles_labels(), loc='outside upper left', ncols=3)
  return figure


@canvas.styled
def draw_coverage(curve: Mapping[str, np.ndarray]) -> Figure:
  """Draws two curves for a model that classifies only the images of which it is most confident.

  The curves show the accuracy on the classified images, and the lowest confidence among these
  images. The horizontal axis is the coverage: the share of all images that are classified.

  Args:
    curve: the result of `evaluation.coverage_curve`.
  """
  figure = Figure((canvas.WIDTH, 3.0), layout='constrained')
  left, right = figure.subplots(1, 2)
  left.plot(curve['coverage'], curve['accuracy'], color=canvas.BLUE, clip_on=False)
  right.plot(curve['coverage'], curve['confidence'], color=canvas.BLUE)
  low = curve['accuracy'].min()
  left.set(ylabel='accuracy on these images', ylim=(low - 0.05 * (1 - low) - 0.001, 1))
  right.set(ylabel='lowest confidence among these images', ylim=(0, 1.02))
  for axis in (left, right):
    axis.set(xlabel='coverage: share of images that are classified', xlim=(0, 1))
    axis.xaxis.set_major_formatter(ticker.PercentFormatter(1.0))
    axis.yaxis.set_major_formatter(ticker.PercentFormatter(1.0))
    axis.grid()
  return figure
