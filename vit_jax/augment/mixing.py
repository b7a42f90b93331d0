"""Mixup and cutmix: what needs two images."""

import jax
import jax.numpy as jnp

from vit_jax.augment import crops
from vit_jax.augment.operations import BITS, ONE


def mix(
  key_B: jax.Array,
  image_BHWC: jax.Array,
  probability: float,
  mixup_alpha: float,
  cutmix_alpha: float,
  switch: float,
) -> tuple[jax.Array, jax.Array]:
  """Puts something of its `partner` into each image, by mixup or by cutmix.

  Mixup (Zhang et al. 2017, 1710.09412) takes a weighted mean; cutmix (Yun et al. 2019,
  1905.04899) a rectangle about a random pixel, cut off at the border. Every example draws for
  itself, so that its partner may come out unmixed.

  Args:
    key_B: of each example.
    image_BHWC: uint8; an even number of them.
    probability: of an image being mixed.
    mixup_alpha: of the Beta(alpha, alpha) that the own image's weight is drawn from; 0: no mixup.
    cutmix_alpha: the same for cutmix, before the rectangle is cut off; 0: no cutmix.
    switch: probability of cutmix where both are on.

  Returns:
    image_BHWC, uint8, and own_B: the weight, or the part of the area, that is the image's own.
  """
  height, width, _ = image_BHWC.shape[1:]
  both = jnp.logical_and(mixup_alpha > 0, cutmix_alpha > 0)
  cutmix_share = jnp.where(both, switch, jnp.where(cutmix_alpha > 0, 1.0, 0.0))

  def draw(key):
    """The own image's weight at each pixel, `[H, W, 1]` in units of 2^-16."""
    choice_key, weight_key, place_key = jax.random.split(key, 3)
    happens, cut = jax.random.uniform(choice_key, (2,)) < jnp.stack([probability, cutmix_share])
    alpha = jnp.where(cut, cutmix_alpha, mixup_alpha)
    own = jax.random.beta(weight_key, alpha, alpha)
    high, wide = (jnp.array([height, width]) * jnp.sqrt(1 - own)).astype(jnp.int32) // 2
    y, x = (jax.random.uniform(place_key, (2,)) * jnp.array([height, width])).astype(jnp.int32)
    outside_HW1 = ~crops.box((height, width), y - high, y + high, x - wide, x + wide)
    own_HW1 = jnp.where(cut, ONE * outside_HW1, jnp.round(own * ONE).astype(jnp.int32))
    return jnp.where(happens, own_HW1, ONE), jnp.where(cut, outside_HW1.mean(), own), happens

  own_BHW1, own_B, happens_B = jax.vmap(draw)(key_B)
  one_BHWC, other_BHWC = (x.astype(jnp.int32) for x in (image_BHWC, partner(image_BHWC)))
  mixed_BHWC = other_BHWC + (own_BHW1 * (one_BHWC - other_BHWC) + ONE // 2 >> BITS)
  return mixed_BHWC.astype(jnp.uint8), jnp.where(happens_B, own_B, 1.0)


def partner(x_B: jax.Array) -> jax.Array:
  """What belongs to the example that each is mixed with: its neighbour."""
  assert len(x_B) % 2 == 0, f'{len(x_B)} examples have no partners'
  pairs = x_B.reshape(-1, 2, *x_B.shape[1:])
  return pairs[:, ::-1].reshape(x_B.shape)
