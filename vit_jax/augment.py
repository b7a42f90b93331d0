"""What the device does to a batch of images: augmentation, enlargement, normalisation.

Decisions:
  * An augmentation is a pure function `(key_B, image_BHWC, **arguments) -> image_BHWC` on
    uint8 images with one key an example, so that a draw depends on the example alone.
  * Each does nothing at its default arguments, and `AUGMENTATIONS` gives the order.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

PAD_MODES = ('reflect', 'constant')


def pad_crop(key_B: jax.Array, image_BHWC: jax.Array, padding: int, mode: str) -> jax.Array:
  """Adds a border of `padding` pixels and crops the old size at a random place.

  `mode` is `reflect`, or `constant` for a black border.
  """
  if not padding:
    return image_BHWC
  border = ((0, 0), (padding, padding), (padding, padding), (0, 0))
  padded_BHWC = jnp.pad(image_BHWC, border, mode=mode)

  def crop(key, image_HWC):
    y, x = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return jax.lax.dynamic_slice(image_HWC, (y, x, 0), image_BHWC.shape[1:])

  return jax.vmap(crop)(key_B, padded_BHWC)


def flip(key_B: jax.Array, image_BHWC: jax.Array, probability: float) -> jax.Array:
  """Mirrors left to right with the probability given."""
  if not probability:
    return image_BHWC
  mirror_B = jax.vmap(lambda key: jax.random.bernoulli(key, probability))(key_B)
  return jnp.where(mirror_B[:, None, None, None], image_BHWC[:, :, ::-1], image_BHWC)


AUGMENTATIONS = {'pad_crop': pad_crop, 'flip': flip}


def augment(
  key: jax.Array, example_B: jax.Array, image_BHWC: jax.Array, arguments: Mapping[str, Mapping]
) -> jax.Array:
  """Applies each of `AUGMENTATIONS` with its arguments.

  Args:
    key: of the step.
    example_B: positions in the global batch, which the draws derive from.
    image_BHWC: uint8.
    arguments: for each name its keyword arguments.
  """
  for i, (name, function) in enumerate(AUGMENTATIONS.items()):
    step_key = jax.random.fold_in(key, i)
    key_B = jax.vmap(lambda example, key=step_key: jax.random.fold_in(key, example))(example_B)
    image_BHWC = function(key_B, image_BHWC, **arguments[name])
  return image_BHWC


def normalize(
  image_BHWC: jax.Array, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
  """uint8 to what the model takes: float32, resized to `size` (bicubic), normalised."""
  batch, height, width, channels = image_BHWC.shape
  image_BHWC = image_BHWC.astype(jnp.float32) / 255
  if (height, width) != tuple(size):
    image_BHWC = jax.image.resize(image_BHWC, (batch, *size, channels), 'cubic')
  return (image_BHWC - jnp.asarray(mean)) / jnp.asarray(std)
