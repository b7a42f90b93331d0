"""RandAugment and TrivialAugment: which operation an image gets, and how strong.

What a strength means is a table, `SPACES`: the papers and the codes differ.
"""

from collections.abc import Callable
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vit_jax.augment.operations import OPERATIONS, operate

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
    drawn = jax.vmap(lambda key: draw_operation(key, space, strength, probability))(layer_key_B)
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
  drawn = jax.vmap(lambda key: draw_operation(key, 'wide', any_strength, probability))(key_B)
  return operate(*drawn, image_BHWC)


def any_strength(key: jax.Array) -> jax.Array:
  """One of TrivialAugment's, each as likely."""
  return jax.random.randint(key, (), 0, STRENGTHS) / (STRENGTHS - 1)


def draw_operation(
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
