"""`LOSSES`: loss functions `(logits_BL, label_B, ...) -> loss_B`, by the value of `loss.name`.

The labels are integers `[B]`. Each config key `loss.<name>` is passed to a loss as the argument
`<name>`, if the loss has an argument of this name. A loss with `**kwargs` gets all of these keys.
Other packages can add an entry:

    LOSSES['mine'] = lambda logits_BL, label_B, gamma: my_loss(logits_BL, label_B, gamma)

A loss that supports several labels per image also accepts multi-hot labels `[B, L]`, and has the
argument `positive_L`: a weight for each class, or None. The weight multiplies the loss of the class
for images that have the class.
"""

from collections.abc import Callable
import inspect

import jax
import jax.numpy as jnp
import optax

Loss = Callable[..., jax.Array]


def softmax(logits_BL: jax.Array, label_B: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
  """Returns the softmax cross-entropy of each image, `[B]`.

  With label smoothing s and L classes, the target is `1 - s + s / L` for the label, and `s / L` for
  other classes (Szegedy et al. 2015, 1512.00567, Section 7).
  """
  if not label_smoothing:
    return optax.softmax_cross_entropy_with_integer_labels(logits_BL, label_B)
  target_BL = optax.smooth_labels(jax.nn.one_hot(label_B, logits_BL.shape[-1]), label_smoothing)
  return optax.softmax_cross_entropy(logits_BL.astype(jnp.float32), target_BL)


def sigmoid(
  logits_BL: jax.Array,
  label_B: jax.Array,
  label_smoothing: float = 0.0,
  positive_L: jax.Array | None = None,
) -> jax.Array:
  """Returns the loss of each image, `[B]`: the binary cross-entropies of all classes, summed.

  This is the loss of Beyer et al. 2020, 2006.07159. With label smoothing s, the target of an image
  with k labels is `1 - s + s k / L` for its labels and `s k / L` for other classes. For k = 1, the
  target is the same as in `softmax`.

  Args:
    logits_BL: logits.
    label_B: integer labels `[B]`, or multi-hot labels `[B, L]`.
    label_smoothing: s.
    positive_L: for each class, a factor of the positive part of its loss, `target * log sigmoid`,
      for images that have the class. None: all factors are 1.
  """
  logits_BL = logits_BL.astype(jnp.float32)
  if label_B.ndim == 1:
    label_B = jax.nn.one_hot(label_B, logits_BL.shape[-1])
  label_BL = label_B.astype(jnp.float32)
  share_B1 = label_BL.mean(axis=-1, keepdims=True)
  target_BL = (1 - label_smoothing) * label_BL + label_smoothing * share_B1
  if positive_L is None:
    return optax.sigmoid_binary_cross_entropy(logits_BL, target_BL).sum(-1)
  # Other images keep their small smoothed target: the weight of a rare class would make it large.
  positive_BL = jnp.where(label_BL > 0, positive_L, 1) * target_BL * jax.nn.log_sigmoid(logits_BL)
  return -(positive_BL + (1 - target_BL) * jax.nn.log_sigmoid(-logits_BL)).sum(-1)


LOSSES: dict[str, Loss] = {'softmax': softmax, 'sigmoid': sigmoid}


def choose_loss(name: str, several: bool) -> Loss:
  """Returns the loss function `LOSSES[name]`, if it supports the labels of a dataset.

  Args:
    name: name of the loss.
    several: whether images of the dataset can have several labels.

  Raises:
    ValueError: images can have several labels, but the loss expects one.
  """
  able = [key for key, loss in LOSSES.items() if 'positive_L' in inspect.signature(loss).parameters]
  if several and name not in able:
    raise ValueError(
      f'loss.name={name} expects one label per image, but these images can have several. Set '
      f'loss.name to {" or ".join(able)}.'
    )
  return LOSSES[name]
