"""Each picture of a run: what it is drawn from, and its caption.

A picture is a function of a `Subject` that gives a figure and one or two sentences on it, or
raises `Missing` where the subject lacks what it shows.
"""

from collections.abc import Callable
import dataclasses

from matplotlib.figure import Figure
import numpy as np

from vit_jax.data import Split
from vit_jax.experiment import Experiment
from vit_jax.figures import draw, maps
from vit_jax.figures.maps import Missing
from vit_jax.model import POOLS, POSITIONS

MISTAKES = 10  # drawn


@dataclasses.dataclass(frozen=True)
class Scores:
  """What the model made of each test example: a class, and its probability.

  `index_N` are their places in the split, from which bad images may be missing.
  """

  index_N: np.ndarray
  label_N: np.ndarray
  predicted_N: np.ndarray
  confidence_N: np.ndarray


@dataclasses.dataclass(frozen=True)
class AttentionMaps:
  """`rollout` and `heads` of the images drawn; `distance_DK`, a mean over all measured."""

  rollout: np.ndarray
  heads: np.ndarray
  distance_DK: np.ndarray
  measured: int


@dataclasses.dataclass(frozen=True)
class Subject:
  """What the pictures are of; of each part that is not there the reason why.

  Attributes:
    lines: of `metrics.jsonl`.
    exp: the experiment of the weights.
    params: its parameters.
    test: the test split.
    scores: of the test split.
    shown: `[B, H, W, C]` uint8, the images drawn as the model sees them.
    attention: over these, and some more.
    step: of the checkpoint; None for published weights.
  """

  lines: list[dict] | Missing
  exp: Experiment | Missing
  params: dict | Missing
  test: Split | Missing
  scores: Scores | Missing
  shown: np.ndarray | Missing
  attention: AttentionMaps | Missing
  step: int | None = None

  def need(self, *names: str) -> list:
    """These parts.

    Raises:
      Missing: the first that is not there.
    """
    parts = [getattr(self, name) for name in names]
    for part in parts:
      if isinstance(part, Missing):
        raise part
    return parts


def picture_curves(subject: Subject) -> tuple[Figure, str]:
  """Of the metrics."""
  (lines,) = subject.need('lines')
  return draw.draw_curves(lines), (
    'Loss and accuracy over training: of the augmented training batches, averaged between log '
    'lines, and of whole splits that were held out.'
  )


def picture_confusion(subject: Subject) -> tuple[Figure, str]:
  """Of the test split."""
  exp, scores = subject.need('exp', 'scores')
  names, count = exp.task.class_names, len(scores.label_N)
  count_LL = maps.confusion(scores.label_N, scores.predicted_N, len(names))
  right = np.trace(count_LL)
  return draw.draw_confusion(count_LL, maps.class_accuracy(count_LL), names), (
    f'What {count:,} test images were taken for, in percent of each true class, and beside it '
    f'the diagonal: {right:,} are right, {right / count:.2%}.'
  )


def picture_mistakes(subject: Subject) -> tuple[Figure, str]:
  """Of the test split."""
  exp, test, scores = subject.need('exp', 'test', 'scores')
  index = maps.mistakes(scores.label_N, scores.predicted_N, scores.confidence_N, MISTAKES)
  if not len(index):
    raise Missing('no test image was taken for another class.')
  name = lambda labels: [exp.task.class_names[label] for label in labels]
  figure = draw.draw_mistakes(
    test.some(scores.index_N[index]).image_NHWC,
    name(scores.label_N[index]),
    name(scores.predicted_N[index]),
    scores.confidence_N[index],
  )
  return figure, (
    'The wrong predictions that the model gave the highest probability, the surest first. Some '
    'show what it can not tell apart, some a label that is doubtful.'
  )


def picture_patches(subject: Subject) -> tuple[Figure, str]:
  """Of the first image."""
  exp, shown = subject.need('exp', 'shown')
  figure = draw.draw_patches(shown[0], maps.patches(shown[0], exp.model.patch_size))
  return figure, (
    'An image as the model sees it is cut into patches, read row by row: each becomes a token '
    '(Figure 1 of the paper).'
  )


def picture_filters(subject: Subject) -> tuple[Figure, str]:
  """Of the patch embedding."""
  exp, params = subject.need('exp', 'params')
  filter_FpqC, share_F = maps.filters(exp.model, params)
  return draw.draw_filters(filter_FpqC, share_F), (
    f'The first {len(share_F)} principal components of the {exp.model.width} filters that embed a '
    'patch, with their share of the variance; each is scaled by itself, zero is mid-grey '
    '(Figure 7 of the paper, left).'
  )


def picture_positions(subject: Subject) -> tuple[Figure, str]:
  """Of the position embeddings."""
  exp, params = subject.need('exp', 'params')
  position_hwD = maps.position_embeddings(exp.model, params, grid(exp))
  figure = draw.draw_position_similarity(maps.position_similarity(position_hwD))
  return figure, (
    f"Each small map is the cosine similarity of one patch's "
    f'{POSITIONS[exp.model.position].caption} to those of all patches, where they lie in the '
    'image (Figure 7 of the paper, centre).'
  )


def picture_distance(subject: Subject) -> tuple[Figure, str]:
  """Of all images looked at."""
  exp, attention = subject.need('exp', 'attention')
  even = maps.patch_distances(grid(exp), exp.model.patch_size).mean()
  return draw.draw_attention_distance(attention.distance_DK, even), (
    'How far each head looks: the distance in the image between a patch and those that it attends '
    f'to, averaged over {attention.measured} images. A dot is a head (Figure 7 of the paper, '
    'right).'
  )


def picture_rollout(subject: Subject) -> tuple[Figure, str]:
  """Of the images drawn."""
  shown, attention = subject.need('shown', 'attention')
  return draw.draw_rollout(shown, attention.rollout), (
    'Where the output comes from: attention rollout from the pooled output down to the patches, '
    'and the images lit by it (Figure 6 of the paper). 1 is what a patch would have if all were '
    'alike.'
  )


def picture_heads(subject: Subject) -> tuple[Figure, str]:
  """Of the first image."""
  exp, shown, attention = subject.need('exp', 'shown', 'attention')
  map_RKhw = attention.heads[0]
  rows = [f'block {i}' for i in range(1, exp.model.depth + 1)] + ['pool']
  return draw.draw_head_attention(shown[0], map_RKhw, rows[: len(map_RKhw)]), (
    f'What {POOLS[exp.model.pool].caption}, by block and head. Each map is scaled by its own '
    'largest value.'
  )


# By the name of its file: its title, and the function.
PICTURES: dict[str, tuple[str, Callable[[Subject], tuple[Figure, str]]]] = {
  'curves': ('Loss and accuracy', picture_curves),
  'confusion': ('Which class is taken for which', picture_confusion),
  'mistakes': ('Most confident mistakes', picture_mistakes),
  'patches': ('An image as patches', picture_patches),
  'filters': ('Filters of the patch embedding', picture_filters),
  'positions': ('Similarity of position embeddings', picture_positions),
  'distance': ('Mean attention distance', picture_distance),
  'rollout': ('Attention rollout', picture_rollout),
  'heads': ('Attention by head', picture_heads),
}


def grid(exp: Experiment) -> tuple[int, int]:
  """Patches (down, across) of the model's input."""
  height, width, _ = exp.image_shape
  return height // exp.model.patch_size[0], width // exp.model.patch_size[1]
