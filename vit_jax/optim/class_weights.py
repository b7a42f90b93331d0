"""Class weights in the training loss, e.g. to make up for classes that have fewer images.

Decisions:
  * Weights are scaled so that their mean over all training labels is 1. Therefore, a learning rate
    that works without weights also works with weights. PyTorch keeps the scale of the loss in
    another way. It divides the weighted loss of a batch by the sum of the weights in the batch.
  * If each image has one label, the loss of an image is multiplied by the weight of its class. If
    images can have several labels, the weight of a class multiplies the loss of this class for
    images that have the class. PyTorch's `BCEWithLogitsLoss` calls this weight `pos_weight`. There,
    it also multiplies the smoothed targets of other images.
  * Only training uses the weights. Evaluation reports the loss without them.
"""

from collections.abc import Mapping, Sequence
import logging
import math
import re

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.data import Split, count_labels
from vit_jax.names import abridged, choose
from vit_jax.optim.losses import Loss

log = logging.getLogger(__name__)

ENTRY = re.compile(r'(.+?)=([^=,]+)(?:,|$)')  # class names may contain commas


def parse_weights(text: str) -> dict[str, float] | None:
  """Returns the `{class: weight}` in a text like `cat=2,dog=0.5`; None for `none` and `balanced`.

  Raises:
    ValueError: the text has another form, or a weight is not a positive number.
  """
  if text in ('none', 'balanced'):
    return None
  try:
    found = {name.strip(): float(weight) for name, weight in ENTRY.findall(text)}
  except ValueError:
    found = {}
  rest = ENTRY.sub('', text).strip()
  if not found or rest or not all(0 < weight < math.inf for weight in found.values()):
    raise ValueError(
      f'loss.class_weights={text!r}: expected "none", "balanced", or positive weights of '
      'classes, such as cat=2,dog=0.5. Classes that are not named have the weight 1.'
    )
  return found


def class_weights(text: str, count_L: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
  """Returns the weight of each class in the training loss, float32 `[L]`.

  The weights are scaled so that their mean over all training labels is 1. With `balanced`, the
  weight of a class is inversely proportional to its number of training labels, as in
  `compute_class_weight` of scikit-learn.

  Args:
    text: value of `loss.class_weights`, except `none`.
    count_L: number of training labels of each class, `[L]`.
    class_names: names of the classes.

  Raises:
    ValueError: the text is not valid, or names an unknown class.
  """
  given = parse_weights(text)
  weight_L = 1 / np.maximum(count_L, 1) if given is None else named_weights(given, class_names)
  return np.float32(weight_L * (count_L.sum() / (weight_L @ count_L)))


def check_weights(text: str, class_names: Sequence[str]) -> None:
  """Raises ValueError if a text for `loss.class_weights` is invalid or names an unknown class."""
  named_weights(parse_weights(text) or {}, class_names)


def training_weights(text: str, train: Split, class_names: Sequence[str]) -> np.ndarray | None:
  """Returns the weight of each class in the training loss, float32 `[L]`, and logs the weights.

  Args:
    text: value of `loss.class_weights`. For `none`, the result is None.
    train: the training split.
    class_names: names of the L classes.

  Raises:
    ValueError: the text is not valid, or names an unknown class.
  """
  if text == 'none':  # counting the labels of TFDS data reads all records
    return None
  count_L = count_labels(train.label_N, len(class_names))
  weight_L = class_weights(text, count_L, class_names)
  rows = zip(class_names, weight_L, count_L)
  rows = [f'{name} {weight:.3g} ({count:,} images)' for name, weight, count in rows]
  log.info('Class weights: %s.', abridged(rows))
  return weight_L


def named_weights(given: Mapping[str, float], class_names: Sequence[str]) -> np.ndarray:
  """Returns the weight of each class, float64 `[L]`; 1 for a class that is not in `given`.

  Raises:
    ValueError: `given` has a class that is not in `class_names`.
  """
  for name in given:
    choose('loss.class_weights: class', name, class_names)
  return np.array([given.get(name, 1.0) for name in class_names])


def weighted(loss: Loss, weight_L: np.ndarray | None) -> Loss:
  """Returns a loss function that applies class weights to `loss`.

  For labels `[B]`, the loss of an image is multiplied by the weight of its class. For multi-hot
  labels `[B, L]`, the weights are passed to `loss` as its argument `positive_L`.

  Args:
    loss: a function in `LOSSES`.
    weight_L: weight of each class, `[L]`; None returns `loss` unchanged.
  """
  if weight_L is None:
    return loss
  weight_L = jnp.asarray(weight_L)

  def apply(logits_BL: jax.Array, label_B: jax.Array) -> jax.Array:
    if label_B.ndim == 2:
      return loss(logits_BL, label_B, positive_L=weight_L)
    return weight_L[label_B] * loss(logits_BL, label_B)

  return apply
