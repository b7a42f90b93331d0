"""Mixup and cutmix: augmentations that combine two images."""

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
  """Mixes each image with its partner, a neighbour in the batch, by mixup or by cutmix.

  Mixup (Zhang et al. 2017, 1710.09412) computes a weighted mean of an image and its partner. Cutmix
  (Yun et al. 2019, 1905.04899) copies a rectangle of the partner into the image. The rectangle is
  centred on a random pixel and clipped at the image's border. Every example has its own random
  draws, so it is possible that an image is mixed and its partner is not.

  Args:
    key_B: random key of each example.
    image_BHWC: an even number of uint8 images.
    probability: probability that an image is mixed.
    mixup_alpha: the image's own weight is drawn from Beta(`mixup_alpha`, `mixup_alpha`); 0 disables
      mixup.
    cutmix_alpha: the fraction of the image's area that is kept is drawn from Beta(`cutmix_alpha`,
      `cutmix_alpha`). If the rectangle is clipped, the image keeps more. 0 disables cutmix.
    switch: probability that a mixed image uses cutmix instead of mixup, if both are enabled.

  Returns:
    image_BHWC: the mixed uint8 images.
    own_B: share of each mixed image that comes from the image itself, float from 0 to 1. In mixup,
      the share is the image's own weight; in cutmix, it is the fraction of the image's area that is
      kept. For an image that is not mixed, the share is 1.
  """
  height, width, _ = image_BHWC.shape[1:]
  both = jnp.logical_and(mixup_alpha > 0, cutmix_alpha > 0)
  cutmix_share = jnp.where(both, switch, jnp.where(cutmix_alpha > 0, 1.0, 0.0))

  def draw(key):
    """Draws how an image is mixed.

    Returns:
      The image's own weight at each pixel: int32 `[H, W, 1]` in units of 2^-16. The weight of the
      partner is 1 minus this weight.
      The mean of the image's own weight over all pixels, from 0 to 1. The caller must ignore this
        mean if the image is not mixed.
      Whether the image is mixed at all.
    """
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
  """Swaps the rows of each pair along the first axis: `[a, b, c, d]` becomes `[b, a, d, c]`."""
  assert len(x_B) % 2 == 0, f'{len(x_B)} examples do not form pairs: expected an even number.'
  pairs = x_B.reshape(-1, 2, *x_B.shape[1:])
  return pairs[:, ::-1].reshape(x_B.shape)
