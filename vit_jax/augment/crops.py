"""Crops, flips and erasing: what needs one image and moves no grey level."""

import jax
import jax.numpy as jnp

PAD_MODES = ('reflect', 'constant')


def pad_crop(key_B: jax.Array, image_BHWC: jax.Array, padding: int, mode: str) -> jax.Array:
  """Adds a border of `padding` pixels and crops the old size at a random place.

  `mode` is `reflect`, or `constant` for a black border.
  """
  border = ((0, 0), (padding, padding), (padding, padding), (0, 0))
  padded_BHWC = jnp.pad(image_BHWC, border, mode=mode)

  def crop(key, image_HWC):
    y, x = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return jax.lax.dynamic_slice(image_HWC, (y, x, 0), image_BHWC.shape[1:])

  return jax.vmap(crop)(key_B, padded_BHWC)


def flip(key_B: jax.Array, image_BHWC: jax.Array, probability: float) -> jax.Array:
  """Mirrors left to right with the probability given."""
  mirror_B = jax.vmap(lambda key: jax.random.bernoulli(key, probability))(key_B)
  return jnp.where(mirror_B[:, None, None, None], image_BHWC[:, :, ::-1], image_BHWC)


def resized_crop(
  key_B: jax.Array, image_BHWC: jax.Array, min_area: float, max_aspect: float
) -> jax.Array:
  """Enlarges a random part to the old size, bilinearly (Szegedy et al. 2014, 1409.4842, Section 6).

  Args:
    key_B: of each example.
    image_BHWC: uint8.
    min_area: of the part, as a share of the image's; it is uniform from there to all of it.
    max_aspect: of width to height and of height to width, as far as the area allows.
  """
  height, width, _ = image_BHWC.shape[1:]

  def crop(key, image_HWC):
    size_key, place_key = jax.random.split(key)
    size = rectangle(size_key, height, width, min_area, 1.0, max_aspect)
    corner = jax.random.uniform(place_key, (2,)) * (jnp.array([height, width]) - size)
    scale = jnp.array([height, width]) / size
    return jax.image.scale_and_translate(
      image_HWC, image_HWC.shape, (0, 1), scale, -corner * scale, 'linear'
    )

  new_BHWC = jax.vmap(crop)(key_B, image_BHWC.astype(jnp.float32))
  return jnp.clip(jnp.round(new_BHWC), 0, 255).astype(jnp.uint8)


def rectangle(
  key: jax.Array, height: int, width: int, min_area: float, max_area: float, max_aspect: float
) -> jax.Array:
  """Height and width, in pixels, of a random part of an image.

  Its share of the image's area is uniform. The logarithm of its aspect ratio is so too, within
  what fits into the image: where others draw again until all fits, only the shape gives way.
  """
  area_key, aspect_key = jax.random.split(key)
  area = jax.random.uniform(area_key, (), minval=min_area, maxval=max_area)
  whole, most = jnp.log(width / height), jnp.log(max_aspect)
  tallest, widest = jnp.clip(jnp.stack([-most, most]), whole + jnp.log(area), whole - jnp.log(area))
  aspect = jnp.exp(jax.random.uniform(aspect_key, (), minval=tallest, maxval=widest))
  pixels = area * height * width
  size = jnp.sqrt(jnp.stack([pixels / aspect, pixels * aspect]))
  return jnp.minimum(size, jnp.array([height, width]))  # which rounding may overstep


def erasing(
  key_B: jax.Array,
  image_BHWC: jax.Array,
  probability: float,
  min_area: float,
  max_area: float,
  max_aspect: float,
) -> jax.Array:
  """Noise in the place of a rectangle (Zhong et al. 2017, 1708.04896): any level in every pixel.

  Args:
    key_B: of each example.
    image_BHWC: uint8, of four channels at most.
    probability: of an image losing a part.
    min_area: of the part, as a share of the image's; it is uniform.
    max_area: likewise.
    max_aspect: of width to height and of height to width, as far as the area allows.
  """
  height, width, channels = image_BHWC.shape[1:]

  def erase(key, image_HWC):
    happens_key, size_key, place_key, noise_key = jax.random.split(key, 4)
    size = rectangle(size_key, height, width, min_area, max_area, max_aspect)
    high, wide = jnp.round(size).astype(jnp.int32)
    y, x = jax.random.uniform(place_key, (2,))
    top = (y * (height - high + 1)).astype(jnp.int32)
    left = (x * (width - wide + 1)).astype(jnp.int32)
    inside_HW1 = box((height, width), top, top + high, left, left + wide)
    happens = jax.random.bernoulli(happens_key, probability)
    # A byte of one number for each channel: a number for each would take ten times as long.
    bits_HW1 = jax.random.bits(noise_key, (height, width, 1), jnp.uint32)
    noise_HWC = bits_HW1 >> (8 * jnp.arange(channels, dtype=jnp.uint32)) & 255
    return jnp.where(happens & inside_HW1, noise_HWC.astype(jnp.uint8), image_HWC)

  return jax.vmap(erase)(key_B, image_BHWC)


def box(size: tuple[int, int], top, bottom, left, right) -> jax.Array:
  """Whether a pixel is in the rectangle, `[H, W, 1]`; bottom and right are beyond it."""
  y_H11, x_1W1 = jnp.arange(size[0])[:, None, None], jnp.arange(size[1])[None, :, None]
  return (y_H11 >= top) & (y_H11 < bottom) & (x_1W1 >= left) & (x_1W1 < right)
