"""RandAugment and TrivialAugment, which draw operations and their strengths for each image.

The table `SPACES` contains several sets of operations, because papers and implementations use
different ones. For each operation, the table defines how its argument depends on the strength. The
strength is a number from 0 to 1, or from 0 to 3 in the set `big_vision`.
"""

from collections.abc import Callable
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vit_jax.augment.operations import OPERATIONS, operate

FULL = 10  # the magnitude in RandAugment's scale that corresponds to strength 1


class Argument(NamedTuple):
  """Defines the argument of an operation as a function of the strength.

  The argument is the sum of the constant `around` and an amount that is linear in the strength.

  Attributes:
    weakest: amount at strength 0.
    strongest: amount at strength 1.
    around: constant to which the amount is added.
    signed: True: with probability 1/2, the amount is subtracted from `around`, not added.
    whole: True: the difference between the amount and `weakest` is truncated to a whole number.
    bounds: (smallest, largest) argument; the argument is clipped to this range.
    period: an argument of at least `period` is replaced with its remainder modulo `period`.
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


# {name of a set: {operation: argument}}. `operations.operate` describes the arguments. All
# operations of a set are equally likely.
SPACES = {
  # The 14 operations of RandAugment (1909.13719, Section 3). Posterize keeps as many bits as in
  # AutoAugment (1805.09501, Table 6). The other ranges come from timm's `increasing` form, in which
  # every operation becomes stronger with the magnitude.
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
  # The 15 operations of timm's `rand-...-inc1`. The identity is not one of these operations.
  # Posterize keeps 0 bits at strength 1, which gives a black image.
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
  # The 16 operations of AutoAugment's TensorFlow code, which AugReg (2106.10270) and big_vision
  # use. A higher magnitude does not make all operations stronger. Posterize and solarize become
  # weaker, but solarize returns to its strongest form at magnitudes 10, 20 and 30. A low magnitude
  # reduces color, contrast, brightness and sharpness (factors below 1), and a high magnitude
  # increases them (factors above 1). Arguments in pixels are meant for images of 224 pixels.
  'big_vision': {
    'autocontrast': Argument(),
    'equalize': Argument(),
    'invert': Argument(),
    'rotate': signed(30),
    'posterize': whole(0, 4, bounds=(1, 8)),  # TensorFlow shifts by at most 7 bits
    'solarize': whole(0, 256, period=256),  # TensorFlow's threshold is a byte, modulo 256
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
  # TrivialAugment's Wide space (2103.10158: Table 1 and the authors' code). Translations have
  # the same length in pixels for every image size.
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
MAX_MAGNITUDES = dict.fromkeys(SPACES, FULL) | {'big_vision': 30}  # magnitude 30 is strength 3
STRENGTHS = 31  # number of TrivialAugment's strengths, evenly spaced from 0 to 1


def rand_augment(
  key_B: jax.Array,
  image_BHWC: jax.Array,
  num_layers: int,
  magnitude: float,
  mstd: float,
  probability: float,
  space: str,
) -> jax.Array:
  """Applies `num_layers` random operations to each image (Cubuk et al. 2019, 1909.13719).

  Published settings:

    * The paper: `mstd=0, probability=1, space='standard'`.
    * timm's `rand-m9-mstd0.5-inc1`: `num_layers=2, magnitude=9, mstd=0.5, probability=0.5,
      space='timm'`. Here, warps interpolate bilinearly, and pixels from outside the image are grey.
      In timm, half of the warps interpolate bicubically, and pixels from outside the image have the
      mean colour of the data.
    * AugReg's `randaug(2,15)`: `num_layers=2, magnitude=15, mstd=0, probability=1,
      space='big_vision'`. Here, warps interpolate bilinearly; in AugReg, they take the nearest
      pixel. Here, contrast blends an image with the image's mean grey level. AugReg's code instead
      uses a grey level that equals the number of pixels divided by 256.

  Args:
    key_B: random key of each example.
    image_BHWC: uint8 images.
    num_layers: number of operations per image, drawn with replacement.
    magnitude: mean of the random magnitudes, from 0 to `MAX_MAGNITUDES[space]`. An operation's
      strength is its magnitude divided by 10 (`FULL`).
    mstd: standard deviation of the random magnitudes. Each magnitude is clipped to the range from
      0 to `MAX_MAGNITUDES[space]`.
    probability: probability that a drawn operation is applied.
    space: name of a set of operations in `SPACES`.
  """
  most = MAX_MAGNITUDES[space]
  strength = functools.partial(strength_near, magnitude=magnitude, mstd=mstd, most=most)

  def layer(i, image_BHWC):
    layer_key_B = jax.vmap(lambda key: jax.random.fold_in(key, i))(key_B)
    drawn = jax.vmap(lambda key: draw_operation(key, space, strength, probability))(layer_key_B)
    return operate(*drawn, image_BHWC)

  return jax.lax.fori_loop(0, num_layers, layer, image_BHWC)


def strength_near(key: jax.Array, magnitude: float, mstd: float, most: float) -> jax.Array:
  """Draws a strength: a random magnitude divided by `FULL`, float scalar.

  The random magnitude has a normal distribution with the mean `magnitude` and the standard
  deviation `mstd`. Magnitudes outside the range from 0 to `most` are clipped to this range.
  """
  level = magnitude + mstd * jax.random.normal(key)
  return jnp.clip(level, 0, most) / FULL


def trivial_augment(key_B: jax.Array, image_BHWC: jax.Array, probability: float) -> jax.Array:
  """Applies one random operation to each image (Müller and Hutter 2021, 2103.10158).

  The operation has a random strength, and is applied with the given probability (1 in the paper).
  Here, warps interpolate bilinearly, and pixels from outside the image are grey. In the paper's
  code, warps take the nearest pixel, and pixels from outside the image are black.
  """
  drawn = jax.vmap(lambda key: draw_operation(key, 'wide', any_strength, probability))(key_B)
  return operate(*drawn, image_BHWC)


def any_strength(key: jax.Array) -> jax.Array:
  """Draws a strength for TrivialAugment: one of `STRENGTHS` equally likely values from 0 to 1."""
  return jax.random.randint(key, (), 0, STRENGTHS) / (STRENGTHS - 1)


def draw_operation(
  key: jax.Array, space: str, strength: Callable[[jax.Array], jax.Array], probability: float
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Draws an operation and its argument for one example.

  Args:
    key: random key, a different one for each call.
    space: name of a set of operations in `SPACES`.
    strength: function `key -> strength` that draws the strength.
    probability: probability that the result is the drawn operation, and not the identity.

  Returns:
    The operation's index in `OPERATIONS`, an int32 scalar.
    The operation's argument, a float scalar.
    The centre of the cutout square as fractions of height and width, float `[2]`. None if the space
      has no cutout.
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
