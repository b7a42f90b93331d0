"""Defines the figures of a run, with their captions.

Each `picture_*` function takes a `Subject` with the data of a run, and returns a figure and its
caption. The function raises `Missing` if the data for the figure is not available.
"""

from collections.abc import Callable
import dataclasses
import functools

from matplotlib.figure import Figure
import numpy as np

from vit_jax.data import Split
from vit_jax.evaluation import Scores, coverage_curve, reliability, trust
from vit_jax.experiment import Experiment
from vit_jax.figures import charts, components, draw, maps
from vit_jax.figures.maps import Missing
from vit_jax.figures.neighbours import ROWS, Neighbours, draw_neighbours
from vit_jax.figures.reconstruction import draw_reconstruction, reconstruct
from vit_jax.model import POOLS, POSITIONS

MISTAKES = 10  # number of mistakes drawn
POINTS = 200  # number of points of the coverage curve
NOT_COMPARED = Missing('the test split was not evaluated.')


@dataclasses.dataclass(frozen=True)
class AttentionMaps:
  """Attention maps of B images, and attention distances averaged over these and further images.

  Attributes:
    rollout: `[B, h, w]`, attention rollout of the B images, for h x w patches.
    heads: `[B, R, K, h, w]`, an attention map for each image, layer and head. The R layers
      are the blocks and, if the pooling uses attention, the pooling as the last one.
    distance_DK: attention distance of D blocks and K heads in pixels, averaged over images.
    measured: number of images over which `distance_DK` is averaged.
  """

  rollout: np.ndarray
  heads: np.ndarray
  distance_DK: np.ndarray
  measured: int


@dataclasses.dataclass(frozen=True)
class Subject:
  """The data for all figures. If an attribute is not available, it is a `Missing` with the reason.

  Attributes:
    lines: lines of `metrics.jsonl`.
    exp: experiment with the model and the config of the weights.
    params: parameters of the model.
    test: test split.
    scores: predictions for the test split.
    shown: `[B, H, W, C]` uint8, the images to draw, at the size of the model's input.
    attention: attention maps of the images `shown`, and attention distances over more images.
    step: step number of the checkpoint; None for published weights.
    nearest: the most similar training images for each of the most confident mistakes.
  """

  lines: list[dict] | Missing
  exp: Experiment | Missing
  params: dict | Missing
  test: Split | Missing
  scores: Scores | Missing
  shown: np.ndarray | Missing
  attention: AttentionMaps | Missing
  step: int | None = None
  nearest: Neighbours | Missing = NOT_COMPARED

  @functools.cached_property
  def trust(self) -> dict:
    """The result of `evaluation.trust` for `scores`; raises `Missing` if `scores` is missing."""
    exp, scores = self.need('exp', 'scores')
    return trust(scores, exp.task.class_names, exp.calibration)

  def need(self, *names: str) -> list:
    """Returns the values of the attributes with the given names, in order.

    Raises:
      Missing: one of these attributes is not available.
    """
    parts = [getattr(self, name) for name in names]
    for part in parts:
      if isinstance(part, Missing):
        raise part
    return parts


def picture_curves(subject: Subject) -> tuple[Figure, str]:
  """Returns the figure of the training curves, and its caption."""
  (lines,) = subject.need('lines')
  return draw.draw_curves(lines), (
    'Loss and accuracy during training. Training values are averages over the augmented batches '
    'since the last log line. Validation and test values are computed on whole splits.'
  )


def picture_confusion(subject: Subject) -> tuple[Figure, str]:
  """Returns the figure with the test split's confusion matrix, and its caption."""
  exp, scores = subject.need('exp', 'scores')
  names, count = exp.task.class_names, len(scores.label_N)
  count_LL = charts.confusion(scores.label_N, scores.predicted_N, len(names))
  right = np.trace(count_LL)
  return charts.draw_confusion(count_LL, charts.class_accuracy(count_LL), names), (
    f'Predicted classes of {count:,} test images, in percent of each true class, and the accuracy '
    f'of each class. {right:,} predictions are correct ({right / count:.2%}).'
  )


def picture_reliability(subject: Subject) -> tuple[Figure, str]:
  """Returns the reliability diagram of the test split, and its caption."""
  exp, scores = subject.need('exp', 'scores')
  fitted = exp.calibration.examples > 0
  found = subject.trust
  bins = reliability(scores.confidence_N, scores.correct_N)
  before = reliability(scores.raw_N, scores.correct_N) if fitted else None
  text = (
    'Accuracy on the test images, grouped by the probability of the predicted class. If the '
    'probabilities can be trusted, the bars end at the dashed line. The expected calibration error '
    f'is {found["ece"]:.2%}'
  )
  if fitted:
    text += (
      f'; without the temperature {found["temperature"]:.4g}, it would be '
      f'{found["ece_uncalibrated"]:.2%}'
    )
  return charts.draw_reliability(bins, before), f'{text}.'


def picture_coverage(subject: Subject) -> tuple[Figure, str]:
  """Returns the figure of accuracy against coverage on the test split, and its caption."""
  (scores,) = subject.need('scores')
  curve = coverage_curve(scores.confidence_N, scores.correct_N, POINTS)
  half = POINTS // 2 - 1
  return charts.draw_coverage(curve), (
    'Left: accuracy if the model classifies only the images with the highest confidence. Right: '
    'lowest confidence among these images. On the more confident half of all images, accuracy is '
    f'{curve["accuracy"][half]:.2%}.'
  )


def worst(scores: Scores, count: int) -> np.ndarray:
  """Returns the indices of the `count` most confident mistakes in `scores`.

  Raises:
    Missing: the model made no mistake.
  """
  index = maps.mistakes(scores.label_N, scores.predicted_N, scores.confidence_N, count)
  if not len(index):
    raise Missing('the model classified every test image correctly.')
  return index


def picture_mistakes(subject: Subject) -> tuple[Figure, str]:
  """Returns the figure of the most confident mistakes on the test split, and its caption."""
  exp, test, scores = subject.need('exp', 'test', 'scores')
  index = worst(scores, MISTAKES)
  name = lambda labels: [exp.task.class_names[label] for label in labels]
  figure = draw.draw_mistakes(
    test.some(scores.index_N[index]).image_NHWC,
    name(scores.label_N[index]),
    name(scores.predicted_N[index]),
    scores.confidence_N[index],
  )
  return figure, (
    'Wrong predictions with the highest probability, in decreasing order. Some images show classes '
    'that the model cannot tell apart, others have a doubtful label.'
  )


def picture_neighbours(subject: Subject) -> tuple[Figure, str]:
  """Returns the figure of mistakes and their most similar training images, and its caption."""
  exp, test, scores, nearest = subject.need('exp', 'test', 'scores', 'nearest')
  index, names = worst(scores, ROWS), exp.task.class_names
  titles = [
    (names[label], names[predicted], f'{100 * share:.1f}%')
    for label, predicted, share in zip(
      scores.label_N[index], scores.predicted_N[index], scores.confidence_N[index]
    )
  ]
  image_RHWC = test.some(scores.index_N[index]).image_NHWC
  return draw_neighbours(image_RHWC, titles, nearest, names), (
    'Left: the most confident mistakes. Right: the training images with the most similar features '
    f'among {nearest.among:,} training images, with their classes and cosine similarities. The '
    'true class of the test image is green, the predicted class is orange.'
  )


def picture_reconstruction(subject: Subject) -> tuple[Figure, str]:
  """Returns the figure of the patches that a masked autoencoder predicts, and its caption."""
  exp, params, shown = subject.need('exp', 'params', 'shown')
  if exp.config.objective != 'masked':
    raise Missing('this figure needs a run with objective=masked.')
  return draw_reconstruction(reconstruct(exp, params, shown)), (
    f'Top: images. Middle: {exp.config.masked.share:.0%} of the patches are hidden from the model. '
    'Bottom: predictions replace the hidden patches. The model predicts normalised pixels, so each '
    'predicted patch is drawn with the brightness and the contrast of the true patch.'
  )


def picture_patches(subject: Subject) -> tuple[Figure, str]:
  """Returns the figure that shows the first image as patches, and its caption."""
  exp, shown = subject.need('exp', 'shown')
  figure = draw.draw_patches(shown[0], maps.patches(shown[0], exp.model.patch_size))
  return figure, (
    'The model cuts its input image into patches, row by row. Each patch becomes a token '
    '(Figure 1 of the paper).'
  )


def picture_filters(subject: Subject) -> tuple[Figure, str]:
  """Returns the figure of the patch embedding's filters, and its caption."""
  exp, params = subject.need('exp', 'params')
  filter_FpqC, share_F = maps.filters(exp.model, params)
  return draw.draw_filters(filter_FpqC, share_F), (
    f'The first {len(share_F)} principal components of the {exp.model.width} filters that embed a '
    'patch, with their shares of the variance. Each component is scaled by its own largest value. '
    'Mid-grey is zero (Figure 7 of the paper, left).'
  )


def picture_positions(subject: Subject) -> tuple[Figure, str]:
  """Returns the figure that compares position embeddings, and its caption."""
  exp, params = subject.need('exp', 'params')
  position_hwD = maps.position_embeddings(exp.model, params, grid(exp))
  figure = draw.draw_position_similarity(maps.position_similarity(position_hwD))
  return figure, (
    'Each small map belongs to one patch. The map shows how similar the '
    f'{POSITIONS[exp.model.position].caption} of this patch is to the embedding of every patch '
    '(cosine similarity). Maps are arranged as in the image (Figure 7 of the paper, centre).'
  )


def picture_distance(subject: Subject) -> tuple[Figure, str]:
  """Returns the figure of each head's mean attention distance, and its caption."""
  exp, attention = subject.need('exp', 'attention')
  even = maps.patch_distances(grid(exp), exp.model.patch_size).mean()
  return draw.draw_attention_distance(attention.distance_DK, even), (
    'How far each head looks: the distance in pixels between a patch and the patches it attends '
    f'to, averaged over {attention.measured} images. Each dot is a head (Figure 7 of the paper, '
    'right).'
  )


def picture_rollout(subject: Subject) -> tuple[Figure, str]:
  """Returns the figure of attention rollout in the images `shown`, and its caption."""
  shown, attention = subject.need('shown', 'attention')
  return draw.draw_rollout(shown, attention.rollout), (
    'Attention rollout: how much of the output comes from each patch, relative to a mean of 1. The '
    'middle row darkens each image where rollout is low (Figure 6 of the paper).'
  )


def picture_heads(subject: Subject) -> tuple[Figure, str]:
  """Returns the figure of each head's attention in the first image, and its caption."""
  exp, shown, attention = subject.need('exp', 'shown', 'attention')
  map_RKhw = attention.heads[0]
  rows = [f'block {i}' for i in range(1, exp.model.depth + 1)] + ['pool']
  return draw.draw_head_attention(shown[0], map_RKhw, rows[: len(map_RKhw)]), (
    f'What {POOLS[exp.model.pool].caption}, for each block and head. Each map is scaled by its own '
    'largest value.'
  )


def picture_components(subject: Subject) -> tuple[Figure, str]:
  """Returns the figure that shows patch features as colours, and its caption."""
  shown = subject.need('exp', 'params', 'shown')
  map_BhwF, share_F = components.of_images(*shown)
  shares = ', '.join(f'{share:.1%}' for share in share_F)
  return draw.draw_components(shown[-1], components.component_colours(map_BhwF)), (
    'Red, green and blue are the first three principal components of the patch features. They '
    f'explain {shares} of the variance. Similar colours mean similar features, also across images.'
  )


# Maps the file name of each figure, without `.png`, to its title and function.
PICTURES: dict[str, tuple[str, Callable[[Subject], tuple[Figure, str]]]] = {
  'curves': ('Loss and accuracy', picture_curves),
  'confusion': ('Confusion matrix', picture_confusion),
  'reliability': ('Reliability of the probabilities', picture_reliability),
  'coverage': ('Accuracy and coverage', picture_coverage),
  'mistakes': ('Most confident mistakes', picture_mistakes),
  'neighbours': ('Nearest training images of the mistakes', picture_neighbours),
  'reconstruction': ('Hidden patches, filled in', picture_reconstruction),
  'patches': ('An image as patches', picture_patches),
  'filters': ('Filters of the patch embedding', picture_filters),
  'positions': ('Similarity of position embeddings', picture_positions),
  'distance': ('Mean attention distance', picture_distance),
  'rollout': ('Attention rollout', picture_rollout),
  'heads': ('Attention by head', picture_heads),
  'components': ('Principal components of the patch features', picture_components),
}


def grid(exp: Experiment) -> tuple[int, int]:
  """Returns the number of patches (down, across) in the model's input."""
  height, width, _ = exp.image_shape
  return height // exp.model.patch_size[0], width // exp.model.patch_size[1]
