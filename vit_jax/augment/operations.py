"""Applies Pillow's image operations to a batch, in which each image has its own operation.

Decisions:
  * All images go through the same three passes: a lookup table, a blend with a grey or smoothed
    copy, and an affine warp. The operation of each image sets the parameters of the passes. A pass
    that the operation does not need leaves the image unchanged. So a call of `operate` computes
    only three passes, instead of one pass for each possible operation.
  * Pillow defines what each operation does, including its rounding. `test_randaugment.py` compares
    every operation with Pillow.
  * Pixels are computed with integers, so that the result for an image does not depend on the batch
    size. XLA compiles a program for each batch size, and these programs would round floats
    differently. Operations such as `equalize` would amplify the differences.
  * Optimization barriers prevent XLA from fusing the passes. In fused passes, a pixel is computed
    several times if several pixels of the next pass depend on it. On a CPU, the barriers halved the
    time of the passes.
  * Warps interpolate bilinearly. Output pixels that a warp would read from outside the image become
    grey (128), as in AutoAugment's code.
"""

import jax
import jax.numpy as jnp

OPERATIONS = (
  'identity', 'autocontrast', 'equalize', 'invert', 'posterize', 'solarize', 'solarize_add',
  'brightness', 'contrast', 'color', 'sharpness', 'rotate', 'shear_x', 'shear_y', 'translate_x',
  'translate_y', 'translate_x_relative', 'translate_y_relative', 'cutout',
)  # fmt: skip
FILL = 128
BITS = 16  # number of fractional bits of fixed-point numbers
ONE = 1 << BITS

apart = jax.lax.optimization_barrier


def operate(
  operation_B: jax.Array,
  argument_B: jax.Array,
  centre_B2: jax.Array | None,
  image_BHWC: jax.Array,
) -> jax.Array:
  """Applies one operation to each image, and returns uint8 images of the same shape.

  Every channel value is within 1 of Pillow's result. The meaning of `argument_B` depends on the
  operation:

    * brightness, contrast, color, sharpness: Pillow's enhancement factor; 1 changes nothing.
    * solarize: the threshold; grey levels at or above the threshold are inverted.
    * solarize_add: the amount added to grey levels below 128.
    * posterize: the number of high bits to keep.
    * rotate: the angle in degrees, counter-clockwise.
    * translate_x (translate_y): the content moves this many pixels to the left (up).
    * translate_x_relative (translate_y_relative): the content moves to the left (up) by this share
      of the image's width (height).
    * shear_x (shear_y): each pixel moves to the left (up) by this number times the distance of its
      centre from the image's top (left) edge.
    * cutout: half the side length, in pixels, of the square that becomes grey.
    * All other operations ignore the argument.

  Args:
    operation_B: index of each image's operation in `OPERATIONS`.
    argument_B: argument of each image's operation.
    centre_B2: centre of the cutout square, as fractions of height and width. None if no image gets
      the operation cutout.
    image_BHWC: uint8 images with 1 or 3 channels.
  """
  chosen = {name: operation_B == i for i, name in enumerate(OPERATIONS)}
  table_BCV = apart(make_table(chosen, argument_B, image_BHWC))
  image_BHWC = apart(look_up(table_BCV, image_BHWC))
  image_BHWC = apart(blend(chosen, argument_B, image_BHWC))
  hidden_BHW = None
  if centre_B2 is not None:
    hidden_BHW = cutout_square(chosen['cutout'], argument_B, centre_B2, image_BHWC.shape)
  return warp(make_matrix(chosen, argument_B, image_BHWC.shape), image_BHWC, hidden_BHW)


def make_table(chosen: dict, argument_B: jax.Array, image_BHWC: jax.Array) -> jax.Array:
  """Returns a lookup table of new grey levels for each image and channel: uint8 `[B, C, 256]`.

  The table of an image changes no grey level if the image's operation needs no table, e.g. rotate.

  Args:
    chosen: {name from `OPERATIONS`: bool `[B]`, True for each image that gets this operation}.
    argument_B: argument of each image's operation.
    image_BHWC: uint8 images.
  """
  level_V = jnp.arange(256)
  count_BCV = histogram(image_BHWC)
  argument_B11 = argument_B[:, None, None]
  whole_B11 = argument_B11.astype(jnp.int32)
  tables = {
    'autocontrast': stretch(count_BCV),
    'equalize': equalized(count_BCV),
    'invert': 255 - level_V,
    'posterize': level_V & -(1 << (8 - whole_B11)),
    'solarize': jnp.where(level_V < argument_B11, level_V, 255 - level_V),
    'solarize_add': jnp.where(level_V < 128, level_V + whole_B11, level_V),
    'brightness': between(0, level_V, fixed(argument_B11)),
    'contrast': between(mean(image_BHWC)[:, None, None], level_V, fixed(argument_B11)),
  }
  table_BCV = jnp.broadcast_to(level_V, count_BCV.shape)
  for name, other_BCV in tables.items():
    table_BCV = jnp.where(chosen[name][:, None, None], other_BCV, table_BCV)
  return jnp.clip(table_BCV, 0, 255).astype(jnp.uint8)


def places(image_BHWC: jax.Array) -> jax.Array:
  """Returns each pixel value's index in a flattened table `[B, C, 256]`: int32 `[B, H, W, C]`."""
  batch, _, _, channels = image_BHWC.shape
  start_BC = 256 * jnp.arange(batch * channels).reshape(batch, channels)
  return start_BC[:, None, None] + image_BHWC


def look_up(table_BCV: jax.Array, image_BHWC: jax.Array) -> jax.Array:
  """Replaces every grey level with its value in the table of its image and channel."""
  return table_BCV.reshape(-1).at[places(image_BHWC)].get(mode='promise_in_bounds')


def histogram(image_BHWC: jax.Array) -> jax.Array:
  """Counts the pixels of each grey level in each image and channel: int32 `[B, C, 256]`."""
  batch, _, _, channels = image_BHWC.shape
  count = jnp.zeros(batch * channels * 256, jnp.int32)  # a flat array is far faster on a CPU
  count = count.at[places(image_BHWC).reshape(-1)].add(1, mode='promise_in_bounds')
  return count.reshape(batch, channels, 256)


def stretch(count_BCV: jax.Array) -> jax.Array:
  """Returns the lookup tables of autocontrast, `[B, C, 256]`, from the output of `histogram`.

  A table maps the channel's darkest level to 0, its lightest level to 255, and the levels between
  them linearly. If all pixels of a channel have the same level, the channel stays unchanged.
  """
  level_V = jnp.arange(256)
  low_BC1 = jnp.argmax(count_BCV > 0, axis=2, keepdims=True)
  high_BC1 = 255 - jnp.argmax(count_BCV[:, :, ::-1] > 0, axis=2, keepdims=True)
  span_BC1 = jnp.maximum(high_BC1 - low_BC1, 1)
  return jnp.where(low_BC1 == high_BC1, level_V, (level_V - low_BC1) * 255 // span_BC1)


def equalized(count_BCV: jax.Array) -> jax.Array:
  """Returns the lookup tables of equalize, `[B, C, 256]`, from the output of `histogram`.

  A table makes all levels of a channel about equally frequent.
  """
  up_to_BCV = jnp.cumsum(count_BCV, axis=2)
  darker_BCV = up_to_BCV - count_BCV
  # Pixels per new level: the number of pixels darker than the lightest level, divided by 255.
  step_BC1 = jnp.where(count_BCV > 0, darker_BCV, 0).max(2, keepdims=True) // 255
  flat_BCV = (step_BC1 // 2 + darker_BCV) // jnp.maximum(step_BC1, 1)
  return jnp.where(step_BC1 == 0, jnp.arange(256), flat_BCV)


def grey(image_BHWC: jax.Array) -> jax.Array:
  """Converts grey or RGB images to grey, as in Pillow's mode L: int32 `[B, H, W, 1]`."""
  image_BHWC = image_BHWC.astype(jnp.int32)
  if image_BHWC.shape[3] == 1:
    return image_BHWC
  weighted_BHWC = image_BHWC * jnp.array([19595, 38470, 7471])  # ITU-R 601-2 times 2^16
  return (weighted_BHWC.sum(3, keepdims=True) + 2**15) >> 16


def mean(image_BHWC: jax.Array) -> jax.Array:
  """Returns the mean grey level of each image, rounded to a whole number: int32 `[B]`."""
  pixels = image_BHWC.shape[1] * image_BHWC.shape[2]
  return (2 * grey(image_BHWC).sum((1, 2, 3)) + pixels) // (2 * pixels)


def smooth(image_BHWC: jax.Array) -> jax.Array:
  """Replaces each pixel with a weighted mean of its 3x3 neighbourhood: int32 `[B, H, W, C]`.

  The pixel itself has the weight 5/13, and each of its eight neighbours has the weight 1/13. Pixels
  at the border of the image stay unchanged.
  """
  image_BHWC = image_BHWC.astype(jnp.int32)
  height, width = image_BHWC.shape[1:3]
  if min(height, width) < 3:
    return image_BHWC
  rows_BHWC = image_BHWC[:, :-2] + image_BHWC[:, 1:-1] + image_BHWC[:, 2:]
  box_BHWC = rows_BHWC[:, :, :-2] + rows_BHWC[:, :, 1:-1] + rows_BHWC[:, :, 2:]
  inner_BHWC = (2 * (box_BHWC + 4 * image_BHWC[:, 1:-1, 1:-1]) + 13) // 26
  return image_BHWC.at[:, 1:-1, 1:-1].set(inner_BHWC)


def blend(chosen: dict, argument_B: jax.Array, image_BHWC: jax.Array) -> jax.Array:
  """Applies the operations color and sharpness; images with other operations stay unchanged.

  Color blends an image with a grey copy of itself. Sharpness blends an image with a smoothed copy.
  The arguments are the same as in `make_table`. The result is uint8.
  """
  color_B111 = chosen['color'][:, None, None, None]
  any_B111 = color_B111 | chosen['sharpness'][:, None, None, None]
  other_BHWC = jnp.where(color_B111, grey(image_BHWC), smooth(image_BHWC))
  factor_B111 = fixed(argument_B)[:, None, None, None]
  new_BHWC = between(other_BHWC, image_BHWC.astype(jnp.int32), factor_B111)
  new_BHWC = jnp.clip(new_BHWC, 0, 255).astype(jnp.uint8)
  return jnp.where(any_B111, new_BHWC, image_BHWC)


def fixed(number: jax.Array) -> jax.Array:
  """Converts a float to a fixed-point number: int32 in units of 2^-16."""
  return jnp.round(number * ONE).astype(jnp.int32)


def between(start: jax.Array, end: jax.Array, factor: jax.Array) -> jax.Array:
  """Interpolates or extrapolates linearly between two integer arrays, rounding down.

  `factor` is a fixed-point number, as returned by the function `fixed`. A factor that stands for 0
  gives `start`, and a factor that stands for 1 gives `end`.
  """
  return start + (factor * (end - start) >> BITS)


def make_matrix(chosen: dict, argument_B: jax.Array, shape: tuple) -> jax.Array:
  """Returns the matrices `[B, 2, 3]` that map an output point (x, y, 1) to the input point (x, y).

  Points are measured in pixels from the image's top left corner. The matrices are int32 in units of
  2^-16.

  Args:
    chosen: {name from `OPERATIONS`: bool `[B]`, True for each image that gets this operation}.
    argument_B: argument of each image's operation.
    shape: shape of the image batch, `(B, H, W, C)`.
  """
  _, height, width, _ = shape
  only = lambda name: jnp.where(chosen[name], argument_B, 0.0)
  angle_B = jnp.deg2rad(only('rotate'))
  cos_B, sin_B = fixed(jnp.cos(angle_B)), fixed(jnp.sin(angle_B))
  right_B = fixed(only('translate_x') + width * only('translate_x_relative'))
  down_B = fixed(only('translate_y') + height * only('translate_y_relative'))
  row_x = (  # a rotation keeps the centre of the image in place
    cos_B,
    fixed(only('shear_x')) - sin_B,
    ((ONE - cos_B) * width + sin_B * height) // 2 + right_B,
  )
  row_y = (
    fixed(only('shear_y')) + sin_B,
    cos_B,
    ((ONE - cos_B) * height - sin_B * width) // 2 + down_B,
  )
  return jnp.stack([jnp.stack(row_x, -1), jnp.stack(row_y, -1)], -2)


def cutout_square(
  chosen_B: jax.Array, half_B: jax.Array, centre_B2: jax.Array, shape: tuple
) -> jax.Array:
  """Returns a bool mask `[B, H, W]` of the pixels that cutout replaces with grey.

  Cutout is described by DeVries and Taylor 2017 (1708.04552).

  Args:
    chosen_B: whether each image gets a square of replaced pixels, bool.
    half_B: half the side length of the square, in pixels. The square is clipped at the border of
      the image.
    centre_B2: centre of the square, as fractions of height and width. The centre is rounded down to
      whole pixels.
    shape: shape of the image batch, `(B, H, W, C)`.
  """
  inside = []
  for size, centre_B in zip(shape[1:3], centre_B2.T):
    from_centre_BN = jnp.arange(size) - jnp.floor(centre_B * size)[:, None]
    inside.append((from_centre_BN >= -half_B[:, None]) & (from_centre_BN < half_B[:, None]))
  return chosen_B[:, None, None] & inside[0][:, :, None] & inside[1][:, None, :]


def warp(
  matrix_B23: jax.Array, image_BHWC: jax.Array, hidden_BHW: jax.Array | None = None
) -> jax.Array:
  """Warps each image with its matrix from `make_matrix`, with bilinear interpolation.

  An output pixel becomes grey (`FILL`) if its input point is outside the image, or if `hidden_BHW`
  is True for the output pixel. Each channel of the other output pixels is interpolated from the
  values of the four input pixels around the input point. These four values are packed into one
  uint32, so that a single read from memory is enough. Returns uint8 images of the same shape.
  """
  batch, height, width, channels = image_BHWC.shape
  twice_x_HW, twice_y_HW = jnp.meshgrid(2 * jnp.arange(width) + 1, 2 * jnp.arange(height) + 1)
  part = lambda row, column: matrix_B23[:, row, column, None, None]
  x_BHW, y_BHW = (
    (part(i, 0) * twice_x_HW + part(i, 1) * twice_y_HW) // 2 + part(i, 2) for i in (0, 1)
  )
  inside_BHW = (x_BHW >= 0) & (x_BHW < width * ONE) & (y_BHW >= 0) & (y_BHW < height * ONE)
  if hidden_BHW is not None:
    inside_BHW &= ~hidden_BHW
  # The image gets a border of one pixel. From here on, coordinates are relative to the centre of
  # the border's top left pixel.
  x_BHW, y_BHW = x_BHW + ONE // 2, y_BHW + ONE // 2
  place_BHW = jnp.where(inside_BHW, (y_BHW >> BITS) * (width + 1) + (x_BHW >> BITS), 0)

  framed = jnp.pad(image_BHWC, ((0, 0), (1, 1), (1, 1), (0, 0)), mode='edge').astype(jnp.uint32)
  above, below = framed[:, :-1], framed[:, 1:]
  corners = (above[:, :, :-1], above[:, :, 1:], below[:, :, :-1], below[:, :, 1:])
  packed = sum(pixel << (8 * i) for i, pixel in enumerate(corners)).reshape(batch, -1, channels)
  packed, place_BP1 = apart((packed, place_BHW.reshape(batch, -1, 1)))
  read = jnp.take_along_axis(packed, place_BP1, axis=1, mode='promise_in_bounds')
  read = apart(read).reshape(image_BHWC.shape)
  a, b, c, d = (((read >> (8 * i)) & 255).astype(jnp.int32) for i in range(4))
  # The weights have 11 bits, so that a grey level (8 bits) times two weights fits into an int32.
  right, down = (((xy & (ONE - 1)) >> (BITS - 11))[..., None] for xy in (x_BHW, y_BHW))
  upper, lower = (a << 11) + right * (b - a), (c << 11) + right * (d - c)
  new_BHWC = (upper << 11) + down * (lower - upper) >> 22
  return jnp.where(inside_BHW[..., None], new_BHWC, FILL).astype(jnp.uint8)
