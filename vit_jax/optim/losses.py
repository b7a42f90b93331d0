"""`LOSSES`: loss functions `(logits_BL, label_B, ...) -> loss_B`; labels are integers.

Each config key `loss.<name>` is passed to a loss as the argument `<name>` if the loss has an
argument of this name. A loss with `**kwargs` gets all keys. Other packages can add an entry:

    LOSSES['mine'] = lambda logits_BL, label_B, gamma: my_loss(logits_BL, label_B, gamma)
"""

import jax
import jax.numpy as jnp
import optax


def softmax(logits_BL: jax.Array, label_B: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
  """Returns the cross-entropy over the classes.

  With label smoothing s, the target is `1 - s + s / L` for the label and `s / L` for other classes
  (Szegedy et al. 2015, 1512.00567, Section 7).
  """
  if not label_smoothing:
    return optax.softmax_cross_entropy_with_integer_labels(logits_BL, label_B)
  target_BL = optax.smooth_labels(jax.nn.one_hot(label_B, logits_BL.shape[-1]), label_smoothing)
  return optax.softmax_cross_entropy(logits_BL.astype(jnp.float32), target_BL)


def sigmoid(logits_BL: jax.Array, label_B: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
  """Returns the sum of one binary cross-entropy per class (Beyer et al. 2020, 2006.07159).

  Label smoothing gives the same target as in `softmax`.
  """
  target_BL = optax.smooth_labels(jax.nn.one_hot(label_B, logits_BL.shape[-1]), label_smoothing)
  return optax.sigmoid_binary_cross_entropy(logits_BL.astype(jnp.float32), target_BL).sum(-1)


LOSSES = {'softmax': softmax, 'sigmoid': sigmoid}
