"""`CLASSIFIERS`: heads that are computed from the features of the training images, in one pass.

`knn` classifies an image by the votes of the nearest training images (`model.knn_logits`).

`ridge` is the few-shot classifier of the ViT paper (2010.11929, Section 4.1). It is a regularised
least-squares regression from frozen features to {-1, 1}^L targets, solved in closed form. The
details follow big_vision's `evaluators/fewshot_lsr.py`:
  * Each feature is centred and divided by its standard deviation (plus 1e-5) over the images.
  * The bias comes from an additional feature, which is 100 for every image.
  * The L2 penalty has the strength 2^10 and also applies to the bias.

Decisions:
  * The regression is solved on the host in float64. If there are fewer examples than features, the
    dual form is solved, because it is smaller.
  * Centring, scaling and the additional feature are folded into the kernel and the bias, so the
    classifier is an ordinary linear head.
"""

from collections.abc import Callable
import dataclasses

import jax
import numpy as np

from vit_jax.model import knn_logits, unit

L2 = 2.0**10  # strength of the L2 penalty
BIAS = 100.0  # value of the additional feature; large, so that the penalty hardly affects the bias
BLOCK = 8192  # training images that `ridge` processes at a time
ROWS = 1024  # test images that `knn` compares with all training images at a time


@dataclasses.dataclass(frozen=True)
class Classifier:
  """A way to compute a head from features.

  Attributes:
    fit: `(feature_ND, label_N, classes) -> head` returns the parameters of the head. The features
      and integer labels belong to N training images; `classes` is the number of classes.
    scores: `(feature_ND, head, classes) -> score_NL` returns the scores of N test images. The class
      with the highest score is the prediction.
    stores: whether the head contains the features of the training images.
  """

  fit: Callable[[np.ndarray, np.ndarray, int], dict[str, np.ndarray]]
  scores: Callable[[np.ndarray, dict[str, np.ndarray], int], np.ndarray]
  stores: bool = False


def fit_ridge(feature_ND: np.ndarray, label_N: np.ndarray, classes: int) -> dict[str, np.ndarray]:
  """Returns the `kernel` `[D, L]` and `bias` `[L]` of the ridge regression, in float64.

  If there are more images than features, the images are processed in blocks, so that no float64
  copy of all features is needed.

  Args:
    feature_ND: features of the training images.
    label_N: integer label of each image.
    classes: L, number of classes.
  """
  count, width = feature_ND.shape
  starts, mean_D = range(0, count, BLOCK), feature_ND.mean(axis=0, dtype=np.float64)
  squares = sum(((feature_ND[i : i + BLOCK] - mean_D) ** 2).sum(axis=0) for i in starts)
  std_D = np.sqrt(squares / count) + 1e-5

  def prepared(rows):
    scaled = (feature_ND[rows] - mean_D) / std_D
    scaled = np.pad(scaled, ((0, 0), (0, 1)), constant_values=BIAS)
    return scaled, 2.0 * np.eye(classes)[label_N[rows]] - 1

  if count <= width:  # the dual form is smaller
    x_ND, y_NL = prepared(slice(None))
    w_DL = x_ND.T @ np.linalg.solve(x_ND @ x_ND.T + L2 * np.eye(count), y_NL)
  else:
    gram_DD, target_DL = L2 * np.eye(width + 1), np.zeros((width + 1, classes))
    for i in starts:
      x_ND, y_NL = prepared(slice(i, i + BLOCK))
      gram_DD += x_ND.T @ x_ND
      target_DL += x_ND.T @ y_NL
    w_DL = np.linalg.solve(gram_DD, target_DL)
  kernel = w_DL[:-1] / std_D[:, None]
  return {'kernel': kernel, 'bias': BIAS * w_DL[-1] - mean_D @ kernel}


def linear_scores(feature_ND: np.ndarray, head: dict[str, np.ndarray], classes: int) -> np.ndarray:
  """Returns the scores `[N, L]` of a linear head for N images, in float64."""
  del classes
  return feature_ND.astype(np.float64) @ head['kernel'] + head['bias']


def fit_knn(feature_ND: np.ndarray, label_N: np.ndarray, classes: int) -> dict[str, np.ndarray]:
  """Returns a k-NN head: the `feature` `[N, D]`, scaled to length 1, and the `label` `[N]`."""
  del classes
  return {'feature': np.asarray(unit(feature_ND)), 'label': label_N.astype(np.float32)}


def knn_scores(feature_ND: np.ndarray, head: dict[str, np.ndarray], classes: int) -> np.ndarray:
  """Returns the logits `[N, L]` of a k-NN head for N images."""
  parts = [feature_ND[i : i + ROWS] for i in range(0, len(feature_ND), ROWS)]
  logits = jax.jit(knn_logits, static_argnums=3)
  stored = head['feature'], head['label']
  return np.concatenate([np.asarray(logits(part, *stored, classes)) for part in parts])


# {value of the config key `classifier`: Classifier}
CLASSIFIERS = {
  'ridge': Classifier(fit_ridge, linear_scores),
  'knn': Classifier(fit_knn, knn_scores, stores=True),
}


def check_classifier(name: str, multi_label: bool) -> None:
  """Raises ValueError if the key `classifier` is set, but images can have several labels."""
  if name and multi_label:
    raise ValueError(
      f'classifier={name} expects one label per image, but these images can have several. Train a '
      'linear probe instead: --config=configs/linear_probe.py.'
    )
