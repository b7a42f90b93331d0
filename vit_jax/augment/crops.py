"""Augmentations that move or replace the pixels of single images: crops, flips, erasing."""

import jax
import jax.numpy as jnp

PAD_MODES = ('reflect', 'constant')


def pad_crop(key_B: jax.Array, image_BHWC: jax.Array, padding: int, mode: str) -> jax.Array:
  """Pads each image on all sides, then crops it to its original size at a random position.

  Args:
    key_B: random key of each example.
    image_BHWC: images; the result has the same shape and type.
    padding: width of the added border, in pixels.
    mode: `reflect` for a border that mirrors the image, `constant` for a black border.
  """
  border = ((0, 0), (padding, padding), (padding, padding), (0, 0))
  padded_BHWC = jnp.pad(image_BHWC, border, mode=mode)

  def crop(key, image_HWC):
    y, x = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return jax.lax.dynamic_slice(image_HWC, (y, x, 0), image_BHWC.shape[1:])

  return jax.vmap(crop)(key_B, padded_BHWC)


def flip(key_B: jax.Array, image_BHWC: jax.Array, probability: float) -> jax.Array:
  """Mirrors each image horizontally with the given probability."""
  mirror_B = jax.vmap(lambda key: jax.random.bernoulli(key, probability))(key_B)
  return jnp.where(mirror_B[:, None, None, None], image_BHWC[:, :, ::-1], image_BHWC)


def resized_crop(
  key_B: jax.Array, image_BHWC: jax.Array, min_area: float, max_aspect: float
) -> jax.Array:
  """Crops a random part of each image, and scales this part bilinearly to the image's size.

  This is the crop of Szegedy et al. 2014 (1409.4842), Section 6.

  Args:
    key_B: random key of each example.
    image_BHWC: uint8 images.
    min_area: smallest area of the part, as a fraction of the image's area. The fraction is drawn
      uniformly from `min_area` to 1.
    max_aspect: highest ratio of the part's longer side to its shorter side. A part exceeds this
      ratio only if no part with the drawn area and a lower ratio fits into the image.
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
  """Draws the size of a rectangle that fits into an image: (height, width) in pixels, float `[2]`.

  First, the area is drawn uniformly from `min_area` to `max_area`, as a fraction of the image's
  area. Then one of the possible aspect ratios is drawn, uniformly on a logarithmic scale. A ratio
  is possible if the rectangle fits into the image, and the rectangle's longer side is at most
  `max_aspect` times its shorter side. If no ratio is possible, the result is the least elongated
  rectangle of the drawn area that fits into the image.

  Here, all areas are equally likely, because the area is drawn only once. Other implementations
  draw again if a rectangle does not fit, so large areas are less likely.
  """
  area_key, aspect_key = jax.random.split(key)
  area = jax.random.uniform(area_key, (), minval=min_area, maxval=max_area)
  whole, most = jnp.log(width / height), jnp.log(max_aspect)
  tallest, widest = jnp.clip(jnp.stack([-most, most]), whole + jnp.log(area), whole - jnp.log(area))
  aspect = jnp.exp(jax.random.uniform(aspect_key, (), minval=tallest, maxval=widest))
  pixels = area * height * width
  size = jnp.sqrt(jnp.stack([pixels / aspect, pixels * aspect]))
  return jnp.minimum(size, jnp.array([height, width]))  # a rounded side could exceed the image


def erasing(
  key_B: jax.Array,
  image_BHWC: jax.Array,
  probability: float,
  min_area: float,
  max_area: float,
  max_aspect: float,
) -> jax.Array:
  """Replaces a random rectangle of an image with noise (Zhong et al. 2017, 1708.04896).

  Each image has its own rectangle. The noise is drawn separately for every pixel and channel,
  uniformly from 0 to 255.

  Args:
    key_B: random key of each example.
    image_BHWC: uint8 images with at most four channels.
    probability: probability that an image is changed.
    min_area: smallest area of the rectangle, as a fraction of the image's area. The fraction is
      drawn uniformly from `min_area` to `max_area`.
    max_area: largest area of the rectangle, as a fraction of the image's area.
    max_aspect: highest ratio of the rectangle's longer side to its shorter side. A rectangle
      exceeds this ratio only if no rectangle with the drawn area and a lower ratio fits into the
      image.
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
    # Each pixel has one random 32-bit number, whose bytes are the noise of its channels. Drawing
    # one number per channel would take ten times as long.
    bits_HW1 = jax.random.bits(noise_key, (height, width, 1), jnp.uint32)
    noise_HWC = bits_HW1 >> (8 * jnp.arange(channels, dtype=jnp.uint32)) & 255
    return jnp.where(happens & inside_HW1, noise_HWC.astype(jnp.uint8), image_HWC)

  return jax.vmap(erase)(key_B, image_BHWC)


def box(size: tuple[int, int], top, bottom, left, right) -> jax.Array:
  """Returns a bool mask `[H, W, 1]` that is True inside a rectangle and False outside.

  The rectangle has the rows `top` to `bottom - 1` and the columns `left` to `right - 1`. `size` is
  the (height, width) of the mask.
  """
  y_H11, x_1W1 = jnp.arange(size[0])[:, None, None], jnp.arange(size[1])[None, :, None]
  return (y_H11 >= top) & (y_H11 < bottom) & (x_1W1 >= left) & (x_1W1 < right)
