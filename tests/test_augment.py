"""Augmentation against NumPy and Pillow."""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from vit_jax import augment

IMAGES = np.random.RandomState(0).randint(0, 256, (16, 6, 8, 3)).astype(np.uint8)
KEY = jax.random.key(0)


def run(images, example, padding=0, probability=0.0, mode='reflect'):
  arguments = {
    'pad_crop': {'padding': padding, 'mode': mode},
    'flip': {'probability': probability},
  }
  return np.asarray(augment.augment(KEY, jnp.asarray(example), images, arguments))


@pytest.mark.parametrize('mode', augment.PAD_MODES)
def test_pad_crop_takes_a_window_of_the_padded_image(mode):
  images = np.concatenate([IMAGES] * 8)
  out = run(images, np.arange(128), padding=2, mode=mode)
  padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode=mode)
  windows = set()
  for crop, whole in zip(out, padded):
    found = [
      (y, x)
      for y in range(5)
      for x in range(5)
      if np.array_equal(whole[y : y + 6, x : x + 8], crop)
    ]
    assert len(found) >= 1
    windows.add(found[0])
  assert len(windows) == 25  # every window is drawn


def test_flip_mirrors_about_half():
  images = np.concatenate([IMAGES] * 16)
  out = run(images, np.arange(256), probability=0.5)
  mirrored = [np.array_equal(a, b[:, ::-1]) for a, b in zip(out, images)]
  same = [np.array_equal(a, b) for a, b in zip(out, images)]
  assert np.all(np.logical_xor(mirrored, same))
  assert 90 < sum(mirrored) < 166


def test_draws_depend_on_the_example_alone():
  whole = run(IMAGES, np.arange(16), padding=2, probability=0.5)
  rows = np.array([9, 3, 14])
  np.testing.assert_array_equal(run(IMAGES[rows], rows, 2, 0.5), whole[rows])


def test_nothing_happens_by_default():
  np.testing.assert_array_equal(run(IMAGES, np.arange(16)), IMAGES)


def test_normalize():
  out = augment.normalize(IMAGES, (6, 8), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
  want = (IMAGES / 255.0 - [0.4, 0.5, 0.6]) / [0.2, 0.25, 0.3]
  np.testing.assert_allclose(out, want, atol=1e-5)


def test_enlarging_is_bicubic_as_in_pillow():
  grey = IMAGES[0, :, :, 0].astype(np.float32)
  out = augment.normalize(grey[None, :, :, None].astype(np.uint8), (12, 24), (0.0,), (1.0,))
  want = Image.fromarray(grey).resize((24, 12), Image.Resampling.BICUBIC)
  # Away from the border: there the two extend the image differently.
  np.testing.assert_allclose(255 * out[0, 4:-4, 6:-6, 0], np.asarray(want)[4:-4, 6:-6], atol=0.01)
