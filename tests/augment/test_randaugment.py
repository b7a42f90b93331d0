"""Compares every operation with Pillow's, and the draws with the tables of the papers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
import pytest

from vit_jax.augment import randaugment
from vit_jax.augment.operations import OPERATIONS, operate
from vit_jax.augment.randaugment import rand_augment, trivial_augment

AFFINE, BILINEAR = Image.Transform.AFFINE, Image.Resampling.BILINEAR


def enhance(kind):
  return lambda image, factor: kind(image).enhance(factor)


def affine(*matrix):
  """Returns a warp; matrix entries are numbers or functions of (argument, width, height)."""

  def run(image, argument):
    numbers = [n(argument, *image.size) if callable(n) else n for n in matrix]
    grey = (128,) * len(image.getbands())
    return image.transform(image.size, AFFINE, numbers, BILINEAR, fillcolor=grey)

  return run


def rotate(image, degrees):
  return image.rotate(degrees, BILINEAR, fillcolor=(128,) * len(image.getbands()))


def solarize_add(image, amount):
  return image.point([i + amount if i < 128 else i for i in range(256)] * len(image.getbands()))


def posterize(image, bits):
  return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


CENTRE = (0.3, 0.9)  # centre of the cutout square, (down, across)


def cutout(image, half):
  y, x = int(CENTRE[0] * image.height), int(CENTRE[1] * image.width)
  if half:
    corners = (
      x - half,
      y - half,
      x + half - 1,
      y + half - 1,
    )  # Pillow fills the last row and column too
    ImageDraw.Draw(image).rectangle(corners, fill=(128,) * len(image.getbands()))
  return image


just = lambda argument, width, height: argument
FACTORS = (0.0, 0.1, 0.55, 1.0, 1.3, 1.9, 3.7)
TURNS = (-135.0, -27.3, -1.0, 0.0, 15.0, 30.0, 90.5)
SHEARS = (-0.99, -0.27, 0.1, 0.3)
SHIFTS = (-32.0, -3.7, 0.25, 3.0, 9.45)
SHARES = (-0.45, -0.11, 0.203, 0.45)
PILLOW = {  # operation: (Pillow's function, arguments to try)
  'identity': (lambda image, _: image, (0.0,)),
  'autocontrast': (lambda image, _: ImageOps.autocontrast(image), (0.0,)),
  'equalize': (lambda image, _: ImageOps.equalize(image), (0.0,)),
  'invert': (lambda image, _: ImageOps.invert(image), (0.0,)),
  'posterize': (posterize, (0, 1, 2, 4, 5, 8)),
  'solarize': (ImageOps.solarize, (0, 1, 100, 128, 255, 256, 384)),
  'solarize_add': (solarize_add, (0, 55, 110)),
  'brightness': (enhance(ImageEnhance.Brightness), FACTORS),
  'contrast': (enhance(ImageEnhance.Contrast), FACTORS),
  'color': (enhance(ImageEnhance.Color), FACTORS),
  'sharpness': (enhance(ImageEnhance.Sharpness), FACTORS),
  'rotate': (rotate, TURNS),
  'shear_x': (affine(1, just, 0, 0, 1, 0), SHEARS),
  'shear_y': (affine(1, 0, 0, just, 1, 0), SHEARS),
  'translate_x': (affine(1, 0, just, 0, 1, 0), SHIFTS),
  'translate_y': (affine(1, 0, 0, 0, 1, just), SHIFTS),
  'translate_x_relative': (affine(1, 0, lambda a, w, h: a * w, 0, 1, 0), SHARES),
  'translate_y_relative': (affine(1, 0, 0, 0, 1, lambda a, w, h: a * h), SHARES),
  'cutout': (cutout, (0, 1, 5, 12)),
}  # fmt: skip
CASES = [(name, value) for name, (_, values) in PILLOW.items() for value in values]
operate = jax.jit(operate)


def images(height, width, channels, kind):
  """Returns one image for each of `CASES`."""
  draw = np.random.RandomState(height + channels)
  shape = (len(CASES), height, width, channels)
  if kind == 'noise':
    return draw.randint(0, 256, shape).astype(np.uint8)
  if kind == 'dull':  # few levels, so that contrast and histograms have an effect
    return draw.normal(90, 12, shape).astype(np.uint8)
  return np.full(shape, draw.randint(0, 256, (len(CASES), 1, 1, channels)), np.uint8)


@functools.cache
def results(height, width, channels, kind):
  """Returns (our results, Pillow's results) for `CASES`; ours come from a single batch."""
  before = images(height, width, channels, kind)
  operation = jnp.asarray([OPERATIONS.index(name) for name, _ in CASES])
  centre = jnp.tile(jnp.asarray(CENTRE), (len(CASES), 1))
  ours = operate(operation, jnp.asarray([float(value) for _, value in CASES]), centre, before)
  squeeze = lambda array: array[:, :, 0] if channels == 1 else array
  theirs = [
    np.asarray(PILLOW[name][0](Image.fromarray(squeeze(array)), value))
    for (name, value), array in zip(CASES, before)
  ]
  return [squeeze(array) for array in np.asarray(ours)], theirs


@pytest.mark.slow_after_first
@pytest.mark.parametrize('name', PILLOW)
@pytest.mark.parametrize('kind', ['noise', 'dull', 'flat'])
@pytest.mark.parametrize('shape', [(32, 32, 3), (17, 25, 3), (17, 25, 1)], ids=str)
def test_operation_equals_pillows(shape, kind, name):
  for case, our, their in zip(CASES, *results(*shape, kind)):
    if case[0] == name:
      assert our.shape == their.shape and our.dtype == np.uint8
      np.testing.assert_allclose(our.astype(int), their, atol=1, err_msg=str(case))


def test_rounding_equals_pillows():
  """Lookups are exact; other results are off by one only if they lie just below a whole number."""
  exact = ('identity', 'equalize', 'invert', 'posterize', 'solarize', 'solarize_add', 'cutout')
  for case, our, their in zip(CASES, *results(32, 32, 3, 'noise')):
    assert abs((our.astype(int) - their).mean()) <= (0.0 if case[0] in exact else 0.1), case


def test_every_operation_is_tested():
  assert tuple(PILLOW) == OPERATIONS
  assert {name for space in randaugment.SPACES.values() for name in space} == {*PILLOW}


KEYS = jax.random.split(jax.random.key(0), 20_000)


@functools.cache
def drawer(space):
  """Returns a compiled `(keys, strength, probability) -> (operation, argument)`."""
  draw = lambda key, strength, probability: randaugment.draw_operation(
    key, space, lambda _: strength, probability
  )
  return jax.jit(jax.vmap(draw, in_axes=(0, None, None)))


def drawn(space, strength, probability=1.0):
  """Returns {operation: its arguments} of many draws at a strength."""
  operation, argument = map(np.asarray, drawer(space)(KEYS, strength, probability)[:2])
  assert operation.max() < len(OPERATIONS)
  return {name: argument[operation == i] for i, name in enumerate(OPERATIONS)}


# (smallest, largest) argument at strength 1, from the papers' tables and code.
STRONGEST = {
  'standard': {
    'rotate': (-30, 30), 'shear_x': (-0.3, 0.3), 'shear_y': (-0.3, 0.3),
    'translate_x_relative': (-0.45, 0.45), 'translate_y_relative': (-0.45, 0.45),
    'color': (0.1, 1.9), 'contrast': (0.1, 1.9), 'brightness': (0.1, 1.9),
    'sharpness': (0.1, 1.9), 'posterize': (4, 4), 'solarize': (0, 0),
    'identity': (0, 0), 'autocontrast': (0, 0), 'equalize': (0, 0),
  },
  'wide': {
    'rotate': (-135, 135), 'shear_x': (-0.99, 0.99), 'shear_y': (-0.99, 0.99),
    'translate_x': (-32, 32), 'translate_y': (-32, 32), 'color': (2, 2), 'contrast': (2, 2),
    'brightness': (2, 2), 'sharpness': (2, 2), 'posterize': (2, 2), 'solarize': (0, 0),
    'identity': (0, 0), 'autocontrast': (0, 0), 'equalize': (0, 0),
  },
}  # fmt: skip
STRONGEST['timm'] = {
  **{name: ends for name, ends in STRONGEST['standard'].items() if name != 'identity'},
  **{'posterize': (0, 0), 'solarize_add': (110, 110), 'invert': (0, 0)},
}
STRONGEST['big_vision'] = {
  **STRONGEST['timm'],
  **{name: (1.9, 1.9) for name in ('color', 'contrast', 'brightness', 'sharpness')},
  **{'posterize': (4, 4), 'solarize': (0, 0), 'cutout': (40, 40)},
  **{'translate_x': (-100, 100), 'translate_y': (-100, 100)},
}
for name in ('translate_x_relative', 'translate_y_relative'):
  del STRONGEST['big_vision'][name]


@pytest.mark.parametrize('space', STRONGEST)
def test_operations_are_equally_likely_and_as_strong_as_in_the_papers(space):
  out, want = drawn(space, 1.0), STRONGEST[space]
  share = len(KEYS) / len(want)
  for name, arguments in out.items():
    if name not in want:
      assert len(arguments) == 0
      continue
    assert abs(len(arguments) - share) < 5 * np.sqrt(share), name
    assert set(np.round(arguments, 5)) == set(np.round(np.float32(want[name]), 5)), name
    least, most = want[name]
    if least != most:
      assert abs((arguments > (least + most) / 2).mean() - 0.5) < 0.1, (
        name
      )  # both signs are equally likely


def test_strength_0_changes_nothing():
  out = drawn('standard', 0.0)
  assert set(out['posterize']) == {8} and set(out['solarize']) == {256}
  for name in ('color', 'contrast', 'brightness', 'sharpness'):
    assert set(out[name]) == {1}
  for name in ('rotate', 'shear_x', 'shear_y', 'translate_x_relative'):
    assert set(np.abs(out[name])) == {0}


def test_whole_arguments_are_truncated_as_in_timm():
  for level in (0.24, 0.26, 0.5, 0.91):
    out = drawn('timm', level)
    assert set(out['posterize']) == {4 - int(level * 4)}
    assert set(out['solarize']) == {256 - int(level * 256)}
    assert set(out['solarize_add']) == {int(level * 110)}
    np.testing.assert_allclose(np.abs(out['rotate']), 30 * level, rtol=1e-5)


@pytest.mark.parametrize('magnitude', [0, 9, 10, 15, 20, 30])
def test_big_vision_arguments_equal_autoaugments_code(magnitude):
  """The code is `level_to_arg`. Posterize keeps 1 to 8 bits; solarize's threshold is a byte."""
  part = magnitude / 10
  want = {
    'rotate': 30 * part, 'shear_x': 0.3 * part, 'shear_y': 0.3 * part, 'translate_x': 100 * part,
    'translate_y': 100 * part, 'cutout': int(40 * part), 'solarize': int(256 * part) % 256,
    'solarize_add': int(110 * part), 'posterize': min(max(int(4 * part), 1), 8),
    **dict.fromkeys(('color', 'contrast', 'brightness', 'sharpness'), 1.8 * part + 0.1),
  }  # fmt: skip
  out = drawn('big_vision', part)
  for name, argument in want.items():
    np.testing.assert_allclose(np.abs(out[name]), argument, rtol=1e-5, err_msg=name)


def test_only_big_vision_magnitudes_may_exceed_10():
  strength = jax.jit(jax.vmap(randaugment.strength_near, in_axes=(0, None, None, None)))
  for space, most in randaugment.MAX_MAGNITUDES.items():
    assert strength(KEYS, 20.0, 0.0, most).max() == (2 if space == 'big_vision' else 1)


def test_cutout_centre_is_uniform():
  draw = lambda key: randaugment.draw_operation(key, 'big_vision', lambda _: 1.0, 1.0)
  operation, _, centre = jax.jit(jax.vmap(draw))(KEYS)
  cut = np.asarray(operation) == OPERATIONS.index('cutout')
  for share in np.asarray(centre)[cut].T:
    counts, _ = np.histogram(share, 8, (0, 1))
    assert np.abs(counts - cut.sum() / 8).max() < 5 * np.sqrt(cut.sum() / 8)


def test_operation_is_applied_with_its_probability():
  out = drawn('timm', 1.0, probability=0.3)
  assert abs(len(out['identity']) / len(KEYS) - 0.7) < 0.02


def test_strength_is_normal_around_the_magnitude_and_clipped():
  strength = jax.jit(jax.vmap(randaugment.strength_near, in_axes=(0, None, None, None)))
  near = strength(KEYS, 5.0, 0.5, 10.0)
  assert abs(near.mean() - 0.5) < 0.002 and abs(near.std() - 0.05) < 0.002
  clipped = strength(KEYS, 9.0, 4.0, 10.0)
  assert clipped.max() == 1 and clipped.min() == 0 and 0.3 < (clipped == 1).mean() < 0.5


def test_trivial_augment_draws_31_equally_likely_strengths():
  strengths = np.asarray(jax.jit(jax.vmap(randaugment.any_strength))(KEYS)) * 30
  values, counts = np.unique(np.round(strengths), return_counts=True)
  np.testing.assert_allclose(strengths, np.round(strengths), atol=1e-4)
  np.testing.assert_array_equal(values, np.arange(31))
  assert np.abs(counts - len(KEYS) / 31).max() < 5 * np.sqrt(len(KEYS) / 31)


def test_randaugment_draws_with_its_probability_and_magnitudes(monkeypatch):
  """In place of an image, each example returns the angle of its rotation, or NaN."""
  rotate = OPERATIONS.index('rotate')
  angle = lambda operation, argument, *_: jnp.where(operation == rotate, abs(argument), jnp.nan)
  monkeypatch.setattr(randaugment, 'operate', angle)
  run = jax.jit(rand_augment, static_argnums=(6,))
  found = np.asarray(run(KEYS, jnp.zeros(len(KEYS)), 1, 20.0, 3.0, 0.5, 'big_vision'))
  found = found[np.isfinite(found)]
  assert len(found) / len(KEYS) == pytest.approx(0.5 / 16, abs=0.006)
  magnitude = found / 3  # magnitude 10 turns by 30 degrees
  assert magnitude.mean() == pytest.approx(20, abs=0.6)
  assert magnitude.std() == pytest.approx(3, abs=0.4)


IMAGES = images(17, 25, 3, 'noise')  # `operate` is already compiled for this shape
IMAGE_KEYS = KEYS[: len(IMAGES)]


@pytest.mark.slow
def test_each_layer_gets_the_output_of_the_one_before():
  """Each layer has its own draws."""
  draw = jax.jit(
    jax.vmap(lambda key: randaugment.draw_operation(key, 'standard', lambda _: 0.9, 1.0))
  )
  run = jax.jit(rand_augment, static_argnums=(6,))
  image, seen = IMAGES, []
  for layer in range(2):
    key_B = jax.vmap(lambda key, layer=layer: jax.random.fold_in(key, layer))(IMAGE_KEYS)
    drawn = draw(key_B)
    image = operate(*drawn, image)
    seen.append(drawn[0])
  np.testing.assert_array_equal(run(IMAGE_KEYS, IMAGES, 2, 9.0, 0.0, 1.0, 'standard'), image)
  assert (seen[0] != seen[1]).any()
  np.testing.assert_array_equal(run(IMAGE_KEYS, IMAGES, 0, 9.0, 0.0, 1.0, 'standard'), IMAGES)


@pytest.mark.slow
def test_trivial_augment_applies_one_operation_or_none():
  run = jax.jit(trivial_augment)
  np.testing.assert_array_equal(run(IMAGE_KEYS, IMAGES, 0.0), IMAGES)
  draw = jax.jit(
    jax.vmap(lambda key: randaugment.draw_operation(key, 'wide', randaugment.any_strength, 1.0))
  )
  once = operate(*draw(IMAGE_KEYS), IMAGES)
  np.testing.assert_array_equal(run(IMAGE_KEYS, IMAGES, 1.0), once)
  assert (np.asarray(once) != IMAGES).any()
