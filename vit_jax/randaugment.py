"""RandAugment and TrivialAugment: Pillow's operations on a batch, a different one for each image.

Decisions:
  * No image goes through all operations. The one drawn for it becomes the parameters of three
    passes over the batch, which leave it as it is where they are not concerned: a lookup table, a
    blend with a grey or smoothed version, an affine warp. A layer costs three passes, however
    many operations there are.
  * Pillow is what an operation means, its rounding down included; `tests/test_randaugment.py`
    holds every one to it.
  * What a strength means is a table, `SPACES`: the papers and the codes differ.
  * Pixels are computed in whole numbers: a program for another batch size rounds floats otherwise,
    and equalize and the layers to come make more of it.
  * XLA would merge the passes into one another, and compute a pixel again for each of its
    readers; barriers keep them apart, which halved their time on a CPU.
  * Pixels from outside are grey, 128, as in AutoAugment's code; warps are bilinear.
"""

from collections.abc import Callable
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

OPERATIONS = (
  'identity', 'autocontrast', 'equalize', 'invert', 'posterize', 'solarize', 'solarize_add',
  'brightness', 'contrast', 'color', 'sharpness', 'rotate', 'shear_x', 'shear_y', 'translate_x',
  'translate_y', 'translate_x_relative', 'translate_y_relative', 'cutout',
)  # fmt: skip
FILL = 128
BITS = 16  # after the point, of whole numbers that stand for others
ONE = 1 << BITS
FULL = 10  # magnitude of RandAugment at which the strength is 1


class Argument(NamedTuple):
  """What an operation is called with, from the weakest, strength 0, to the strongest, 1.

  Attributes:
    weakest: at strength 0.
    strongest: at strength 1, linear between.
    around: what is added to it.
    signed: whether it is taken from `around` as often as added.
    whole: whether the way from `weakest` is cut to a whole number.
    bounds: the least and the most that it may become.
    period: from here on it begins at 0 again.
  """

  weakest: float = 0.0
  strongest: float = 0.0
  around: float = 0.0
  signed: bool = False
  whole: bool = False
  bounds: tuple[float, float] = (-math.inf, math.inf)
  period: float = math.inf


def signed(strongest: float, around: float = 0.0) -> Argument:
  return Argument(0.0, strongest, around, signed=True)


def whole(weakest: float, strongest: float, **limits) -> Argument:
  return Argument(weakest, strongest, whole=True, **limits)


# Operations that one is drawn from, each as likely, with their arguments (units: `operate`).
SPACES = {
  # The 14 of RandAugment (1909.13719, Section 3), and of AutoAugment (1805.09501, Table 6) their
  # bits; the other ranges are those of `timm`, whose `increasing` form makes all grow with the
  # magnitude.
  'standard': {
    'identity': Argument(),
    'autocontrast': Argument(),
    'equalize': Argument(),
    'rotate': signed(30),
    'solarize': whole(256, 0),
    'color': signed(0.9, around=1),
    'posterize': whole(8, 4),
    'contrast': signed(0.9, around=1),
    'brightness': signed(0.9, around=1),
    'sharpness': signed(0.9, around=1),
    'shear_x': signed(0.3),
    'shear_y': signed(0.3),
    'translate_x_relative': signed(0.45),
    'translate_y_relative': signed(0.45),
  },
  # The 15 of timm's `rand-...-inc1`: no identity, and posterize may leave nothing.
  'timm': {
    'autocontrast': Argument(),
    'equalize': Argument(),
    'invert': Argument(),
    'rotate': signed(30),
    'posterize': whole(4, 0),
    'solarize': whole(256, 0),
    'solarize_add': whole(0, 110),
    'color': signed(0.9, around=1),
    'contrast': signed(0.9, around=1),
    'brightness': signed(0.9, around=1),
    'sharpness': signed(0.9, around=1),
    'shear_x': signed(0.3),
    'shear_y': signed(0.3),
    'translate_x_relative': signed(0.45),
    'translate_y_relative': signed(0.45),
  },
  # The 16 of AutoAugment's TensorFlow code, which AugReg (2106.10270) and big_vision go by. They do
  # not all grow with the magnitude: solarize and posterize weaken, solarize to begin anew at 10 and
  # 20; color, contrast, brightness and sharpness go from less to more. Lengths are of images of 224
  # pixels.
  'big_vision': {
    'autocontrast': Argument(),
    'equalize': Argument(),
    'invert': Argument(),
    'rotate': signed(30),
    'posterize': whole(0, 4, bounds=(1, 8)),  # TensorFlow shifts by 7 bits at most
    'solarize': whole(0, 256, period=256),  # and has thresholds of a byte
    'color': Argument(0.1, 1.9),
    'contrast': Argument(0.1, 1.9),
    'brightness': Argument(0.1, 1.9),
    'sharpness': Argument(0.1, 1.9),
    'shear_x': signed(0.3),
    'shear_y': signed(0.3),
    'translate_x': signed(100),
    'translate_y': signed(100),
    'cutout': whole(0, 40),
    'solarize_add': whole(0, 110),
  },
  # TrivialAugment's Wide (2103.10158, Table 1 and its code): translations in pixels of any image.
  'wide': {
    'identity': Argument(),
    'autocontrast': Argument(),
    'equalize': Argument(),
    'rotate': signed(135),
    'solarize': whole(256, 0),
    'color': Argument(0.01, 2),
    'posterize': whole(8, 2),
    'contrast': Argument(0.01, 2),
    'brightness': Argument(0.01, 2),
    'sharpness': Argument(0.01, 2),
    'shear_x': signed(0.99),
    'shear_y': signed(0.99),
    'translate_x': signed(32),
    'translate_y': signed(32),
  },
}
MAX_MAGNITUDES = dict.fromkeys(SPACES, FULL) | {'big_vision': 30}  # beyond 10 a line goes on
STRENGTHS = 31  # of TrivialAugment, from 0 to 1

apart = jax.lax.optimization_barrier


def rand_augment(
  key_B: jax.Array,
  image_BHWC: jax.Array,
  num_layers: int,
  magnitude: float,
  mstd: float,
  probability: float,
  space: str,
) -> jax.Array:
  """`num_layers` operations, one after the other (Cubuk et al. 2019, 1909.13719).

  timm's `rand-m9-mstd0.5-inc1` is `num_layers=2, magnitude=9, mstd=0.5, probability=0.5,
  space='timm'`, with bilinear warps (there: bicubic as often) and grey beside them (there: the
  mean of the data). The paper's is `mstd=0, probability=1, space='standard'`. AugReg's
  `randaug(2,15)` is `num_layers=2, magnitude=15, mstd=0, probability=1, space='big_vision'`, with
  bilinear warps (there: the nearest pixel) and contrast about the image's mean (there: about the
  number of its pixels over 256).

  Args:
    key_B: of each example.
    image_BHWC: uint8.
    num_layers: operations an image, drawn with replacement.
    magnitude: their strength, 0 to what `MAX_MAGNITUDES` has for the space.
    mstd: standard deviation of the strength, about `magnitude` and within the same bounds.
    probability: of an operation that was drawn taking place.
    space: of `SPACES`.
  """
  most = MAX_MAGNITUDES[space]
  strength = functools.partial(strength_near, magnitude=magnitude, mstd=mstd, most=most)

  def layer(i, image_BHWC):
    layer_key_B = jax.vmap(lambda key: jax.random.fold_in(key, i))(key_B)
    drawn = jax.vmap(lambda key: draw(key, space, strength, probability))(layer_key_B)
    return operate(*drawn, image_BHWC)

  return jax.lax.fori_loop(0, num_layers, layer, image_BHWC)


def strength_near(key: jax.Array, magnitude: float, mstd: float, most: float) -> jax.Array:
  """Normal about `magnitude`, of which `FULL` is 1, and from 0 to `most`."""
  level = magnitude + mstd * jax.random.normal(key)
  return jnp.clip(level, 0, most) / FULL


def trivial_augment(key_B: jax.Array, image_BHWC: jax.Array, probability: float) -> jax.Array:
  """One operation of any strength (Müller and Hutter 2021, 2103.10158), with the probability given.

  The paper's probability is 1. Its warps take the nearest pixel and fill with black.
  """
  drawn = jax.vmap(lambda key: draw(key, 'wide', any_strength, probability))(key_B)
  return operate(*drawn, image_BHWC)


def any_strength(key: jax.Array) -> jax.Array:
  """One of TrivialAugment's, each as likely."""
  return jax.random.randint(key, (), 0, STRENGTHS) / (STRENGTHS - 1)


def draw(
  key: jax.Array, space: str, strength: Callable[[jax.Array], jax.Array], probability: float
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """An operation, its place in `OPERATIONS`; its argument; and what `operate` takes for cutout.

  Args:
    key: of the example and the layer.
    space: of `SPACES`.
    strength: of a key; from 0 to 1, or beyond.
    probability: of anything but the identity.
  """
  names, arguments = zip(*SPACES[space].items())
  weakest, strongest, around, has_sign, is_whole, bounds, period = map(jnp.asarray, zip(*arguments))
  strength_key, key = jax.random.split(key)
  which, sign, happens = jax.random.uniform(key, (3,))
  i = (which * len(names)).astype(jnp.int32)
  way = strength(strength_key) * (strongest[i] - weakest[i])
  way = jnp.where(is_whole[i], jnp.trunc(way), way)
  sign = jnp.where(has_sign[i] & (sign < 0.5), -1, 1)
  operation = jnp.asarray([OPERATIONS.index(name) for name in names])[i]
  argument = jnp.clip(around[i] + sign * (weakest[i] + way), *bounds[i])
  argument = jnp.where(argument >= period[i], argument % period[i], argument)
  centre = jax.random.uniform(jax.random.fold_in(key, 0), (2,)) if 'cutout' in names else None
  return jnp.where(happens < probability, operation, 0), argument, centre


def operate(
  operation_B: jax.Array,
  argument_B: jax.Array,
  centre_B2: jax.Array | None,
  image_BHWC: jax.Array,
) -> jax.Array:
  """Each image under its own operation, within a grey level of Pillow.

  Args:
    operation_B: places in `OPERATIONS`.
    argument_B: what Pillow's function takes: the factor of brightness, contrast, color and
      sharpness, the threshold of solarize and the amount that solarize_add adds below 128, the
      bits that posterize keeps, counter-clockwise degrees, pixels to the right or down for each
      of the output's that a shear or a translation reads at, of the relative ones the share of
      the width or height, and half of the side of cutout's square. The others take none.
    centre_B2: of cutout's square, as shares of height and width; None where there is no cutout.
    image_BHWC: uint8, 1 or 3 channels.
  """
  chosen = {name: operation_B == i for i, name in enumerate(OPERATIONS)}
  table_BCV = apart(make_table(chosen, argument_B, image_BHWC))
  image_BHWC = apart(look_up(table_BCV, image_BHWC))
  image_BHWC = apart(blend(chosen, argument_B, image_BHWC))
  hidden_BHW = None
  if centre_B2 is not None:
    hidden_BHW = square(chosen['cutout'], argument_B, centre_B2, image_BHWC.shape)
  return warp(make_matrix(chosen, argument_B, image_BHWC.shape), image_BHWC, hidden_BHW)


def make_table(chosen: dict, argument_B: jax.Array, image_BHWC: jax.Array) -> jax.Array:
  """What becomes of each grey level, uint8 `[B, C, 256]`: the operations that see one pixel."""
  level_V = jnp.arange(256)
  count_BCV = histogram(image_BHWC)
  argument_B11 = argument_B[:, None, None]
  whole_B11 = argument_B11.astype(jnp.int32)
  tables = {
    'autocontrast': stretch(count_BCV),
    'equalize': flatten(count_BCV),
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
  """Where the value of each pixel is in a flat `[B, C, 256]`."""
  batch, _, _, channels = image_BHWC.shape
  start_BC = 256 * jnp.arange(batch * channels).reshape(batch, channels)
  return start_BC[:, None, None] + image_BHWC


def look_up(table_BCV: jax.Array, image_BHWC: jax.Array) -> jax.Array:
  """Replaces every pixel by what the table has at its value."""
  return table_BCV.reshape(-1).at[places(image_BHWC)].get(mode='promise_in_bounds')


def histogram(image_BHWC: jax.Array) -> jax.Array:
  """How often each level is there, int32 `[B, C, 256]`."""
  batch, _, _, channels = image_BHWC.shape
  count = jnp.zeros(batch * channels * 256, jnp.int32)  # flat: far faster on a CPU
  count = count.at[places(image_BHWC).reshape(-1)].add(1, mode='promise_in_bounds')
  return count.reshape(batch, channels, 256)


def stretch(count_BCV: jax.Array) -> jax.Array:
  """The table by which the darkest level of each channel becomes 0 and the lightest 255."""
  level_V = jnp.arange(256)
  low_BC1 = jnp.argmax(count_BCV > 0, axis=2, keepdims=True)
  high_BC1 = 255 - jnp.argmax(count_BCV[:, :, ::-1] > 0, axis=2, keepdims=True)
  span_BC1 = jnp.maximum(high_BC1 - low_BC1, 1)
  return jnp.where(low_BC1 == high_BC1, level_V, (level_V - low_BC1) * 255 // span_BC1)


def flatten(count_BCV: jax.Array) -> jax.Array:
  """The table that makes all levels of each channel about as frequent."""
  up_to_BCV = jnp.cumsum(count_BCV, axis=2)
  darker_BCV = up_to_BCV - count_BCV
  # All but the pixels of the lightest level there is, shared out to 255 levels.
  step_BC1 = jnp.where(count_BCV > 0, darker_BCV, 0).max(2, keepdims=True) // 255
  flat_BCV = (step_BC1 // 2 + darker_BCV) // jnp.maximum(step_BC1, 1)
  return jnp.where(step_BC1 == 0, jnp.arange(256), flat_BCV)


def grey(image_BHWC: jax.Array) -> jax.Array:
  """Luma `[B, H, W, 1]`, int32, as Pillow's mode L (ITU-R 601-2)."""
  image_BHWC = image_BHWC.astype(jnp.int32)
  if image_BHWC.shape[3] == 1:
    return image_BHWC
  weighted_BHWC = image_BHWC * jnp.array([19595, 38470, 7471])  # 2^16 together
  return (weighted_BHWC.sum(3, keepdims=True) + 2**15) >> 16


def mean(image_BHWC: jax.Array) -> jax.Array:
  """The mean luma of each image, rounded: `[B]`, int32."""
  pixels = image_BHWC.shape[1] * image_BHWC.shape[2]
  return (2 * grey(image_BHWC).sum((1, 2, 3)) + pixels) // (2 * pixels)


def smooth(image_BHWC: jax.Array) -> jax.Array:
  """A 3x3 mean, 5 for the centre and 1 around it, of 13; the border stays. int32."""
  image_BHWC = image_BHWC.astype(jnp.int32)
  height, width = image_BHWC.shape[1:3]
  if min(height, width) < 3:
    return image_BHWC
  rows_BHWC = image_BHWC[:, :-2] + image_BHWC[:, 1:-1] + image_BHWC[:, 2:]
  box_BHWC = rows_BHWC[:, :, :-2] + rows_BHWC[:, :, 1:-1] + rows_BHWC[:, :, 2:]
  inner_BHWC = (2 * (box_BHWC + 4 * image_BHWC[:, 1:-1, 1:-1]) + 13) // 26
  return image_BHWC.at[:, 1:-1, 1:-1].set(inner_BHWC)


def blend(chosen: dict, argument_B: jax.Array, image_BHWC: jax.Array) -> jax.Array:
  """Color and sharpness: away from a grey or smoothed version, or towards it."""
  color_B111 = chosen['color'][:, None, None, None]
  any_B111 = color_B111 | chosen['sharpness'][:, None, None, None]
  other_BHWC = jnp.where(color_B111, grey(image_BHWC), smooth(image_BHWC))
  factor_B111 = fixed(argument_B)[:, None, None, None]
  new_BHWC = between(other_BHWC, image_BHWC.astype(jnp.int32), factor_B111)
  new_BHWC = jnp.clip(new_BHWC, 0, 255).astype(jnp.uint8)
  return jnp.where(any_B111, new_BHWC, image_BHWC)


def fixed(number: jax.Array) -> jax.Array:
  """A number in units of 2^-16, int32."""
  return jnp.round(number * ONE).astype(jnp.int32)


def between(zero: jax.Array, one: jax.Array, factor: jax.Array) -> jax.Array:
  """`zero` at factor 0, `one` at factor `ONE`, and in a straight line beyond; rounded down."""
  return zero + (factor * (one - zero) >> BITS)


def make_matrix(chosen: dict, argument_B: jax.Array, shape: tuple) -> jax.Array:
  """Where each image's output pixels are read, int32 `[B, 2, 3]`: (x, y) from (x, y, 1).

  In pixels from the image's corner to the middle of each pixel; units of 2^-16.
  """
  _, height, width, _ = shape
  only = lambda name: jnp.where(chosen[name], argument_B, 0.0)
  angle_B = jnp.deg2rad(only('rotate'))
  cos_B, sin_B = fixed(jnp.cos(angle_B)), fixed(jnp.sin(angle_B))
  right_B = fixed(only('translate_x') + width * only('translate_x_relative'))
  down_B = fixed(only('translate_y') + height * only('translate_y_relative'))
  row_x = (  # a rotation leaves the middle where it is
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


def square(chosen_B: jax.Array, half_B: jax.Array, centre_B2: jax.Array, shape: tuple) -> jax.Array:
  """Which pixels cutout hides (DeVries and Taylor 2017, 1708.04552): bool `[B, H, W]`.

  Args:
    chosen_B: for which images.
    half_B: of the square's side; what is beyond the border is cut off.
    centre_B2: shares of height and width, cut to a whole pixel.
    shape: of the images.
  """
  inside = []
  for size, centre_B in zip(shape[1:3], centre_B2.T):
    from_centre_BN = jnp.arange(size) - jnp.floor(centre_B * size)[:, None]
    inside.append((from_centre_BN >= -half_B[:, None]) & (from_centre_BN < half_B[:, None]))
  return chosen_B[:, None, None] & inside[0][:, :, None] & inside[1][:, None, :]


def warp(
  matrix_B23: jax.Array, image_BHWC: jax.Array, hidden_BHW: jax.Array | None = None
) -> jax.Array:
  """Reads the images at other places, between pixels bilinearly; `FILL` where there is nothing.

  Nothing is also where `hidden_BHW` says so.

  The four pixels around a place lie in one uint32, so that it is read once and not four times.
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
  # From here on in a frame of one pixel about the image, from the middle of its first pixel.
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
  # 11 bits are what leaves room for two products with a grey level.
  right, down = (((xy & (ONE - 1)) >> (BITS - 11))[..., None] for xy in (x_BHW, y_BHW))
  upper, lower = (a << 11) + right * (b - a), (c << 11) + right * (d - c)
  new_BHWC = (upper << 11) + down * (lower - upper) >> 22
  return jnp.where(inside_BHW[..., None], new_BHWC, FILL).astype(jnp.uint8)
