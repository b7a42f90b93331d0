"""Compares augmentation with NumPy and Pillow; `test_randaugment.py` tests RandAugment."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from tests.conftest import small_config
from vit_jax import config as config_lib
from vit_jax import opening
from vit_jax.augment import crops, pipeline
from vit_jax.augment.mixing import mix, partner
from vit_jax.check import check
from vit_jax.distributed import devices, microbatch
from vit_jax.experiment import Experiment
from vit_jax.training.step import loss_fn

IMAGES = np.random.RandomState(0).randint(0, 256, (16, 6, 8, 3)).astype(np.uint8)
KEY = jax.random.key(0)


def arguments(**changes):
  """Returns the default arguments with changes, given as name=dict(...)."""
  section = config_lib.default_config().augment.to_dict()
  for name, values in changes.items():
    section[name] = section[name] | values if isinstance(values, dict) else values
  return section


def run(images, example, padding=0, probability=0.0, mode='reflect'):
  settings = arguments(
    pad_crop={'padding': padding, 'mode': mode}, flip={'probability': probability}
  )
  return np.asarray(pipeline.augment(KEY, jnp.asarray(example), images, settings))


@pytest.mark.parametrize('mode', crops.PAD_MODES)
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


@pytest.mark.parametrize('probability', [0.2, 0.5, 1.0])
def test_flip_mirrors_images_with_its_probability(probability):
  images = np.concatenate([IMAGES] * 64)
  out = run(images, np.arange(1024), probability=probability)
  mirrored = (out == images[:, :, ::-1]).all((1, 2, 3))
  same = (out == images).all((1, 2, 3))
  assert np.all(mirrored ^ same)
  assert mirrored.mean() == pytest.approx(probability, abs=0.07)  # 4.5 standard deviations at 0.5


@pytest.mark.slow
def test_draws_depend_only_on_the_example():
  whole = run(IMAGES, np.arange(16), padding=2, probability=0.5)
  rows = np.array([9, 3, 14])
  np.testing.assert_array_equal(run(IMAGES[rows], rows, 2, 0.5), whole[rows])


def test_each_step_augmentation_and_example_has_its_own_key():
  places = [*range(len(pipeline.AUGMENTATIONS)), pipeline.MIX_PLACE]
  keys = [pipeline.keys(key, i, jnp.arange(5)) for key in jax.random.split(KEY) for i in places]
  data = np.concatenate([jax.random.key_data(key_B) for key_B in keys])
  assert len(np.unique(data, axis=0)) == 2 * len(places) * 5


@pytest.mark.slow
def test_augmentation_and_dropout_draw_from_different_keys():
  seen = []

  class Spy(Experiment):
    def logits(self, params, batch, key=None):
      seen.append(key)
      return jnp.zeros((2, 10))

  def augment_and_mix(key, *_, early):
    seen.append(key)
    return None, None

  exp, _ = opening.from_config(small_config())
  batch = {'image': None, 'label': jnp.arange(2), 'example': jnp.arange(2)}
  spy = Spy(**vars(exp) | {'augment_and_mix': augment_and_mix})
  loss_fn(batch, {}, {}, KEY, True, spy)
  loss_fn(batch, {}, {}, jax.random.key(1), True, spy)
  assert len({tuple(np.asarray(jax.random.key_data(key))) for key in seen}) == 4


def test_default_arguments_change_nothing():
  np.testing.assert_array_equal(run(IMAGES, np.arange(16)), IMAGES)
  assert pipeline.active(arguments()) == []
  out, own = pipeline.augment_and_mix(KEY, jnp.arange(16), IMAGES, arguments(), early=True)
  np.testing.assert_array_equal(out, IMAGES)
  np.testing.assert_array_equal(own, np.ones(16))


# Arguments of each augmentation; the first one enables it.
ON = {
  'pad_crop': {'padding': 2},
  'flip': {'probability': 0.5},
  'resized_crop': {'min_area': 0.1},
  'rand_augment': {'num_layers': 2, 'probability': 1.0},
  'trivial_augment': {'probability': 1.0},
  'erasing': {'probability': 1.0},
  'mix': {'probability': 1.0},
}


def test_switch_enables_its_augmentation():
  assert list(ON) == [*pipeline.AUGMENTATIONS, 'mix']
  for name, values in ON.items():
    assert pipeline.active(arguments(**{name: values})) == [name]
  others = {'rand_augment': {'magnitude': 1.0}, 'mix': {'switch': 0.1}, 'off_for_last': 0.5}
  assert pipeline.active(arguments(**others)) == []


def test_strong_augmentations_are_those_that_a_run_switches_off_at_its_end():
  strong = {name for name, found in pipeline.AUGMENTATIONS.items() if found.strong}
  assert strong == {'rand_augment', 'trivial_augment', 'erasing'}


@functools.cache
def early_and_late():
  """Returns a compiled step with nearly all of `ON`; `early` enables strong augmentations."""
  most = {name: values for name, values in ON.items() if name != 'trivial_augment'}
  settings = arguments(**most, off_for_last=0.5)
  return jax.jit(
    lambda example, images, early: pipeline.augment_and_mix(KEY, example, images, settings, early)
  )


@pytest.mark.slow
def test_mixed_pairs_depend_only_on_their_positions():
  images, places = DRAWN[:16], np.arange(16)
  out, own = map(np.asarray, early_and_late()(places, images, True))
  assert (out != images).any((1, 2, 3)).all() and out.dtype == np.uint8
  pairs = np.array([8, 9, 2, 3, 14, 15, 0, 1, 6, 7, 4, 5, 12, 13, 10, 11])
  other, other_own = early_and_late()(pairs, images[pairs], True)
  np.testing.assert_array_equal(other, out[pairs])
  np.testing.assert_array_equal(other_own, own[pairs])
  again, _ = early_and_late()(places + 16, images, True)
  assert (np.asarray(again) != out).any((1, 2, 3)).all()


@pytest.mark.slow
def test_images_are_only_cropped_and_flipped_at_the_end_of_a_run():
  images, places = DRAWN[:16], np.arange(16)
  out, own = early_and_late()(places, images, False)
  np.testing.assert_array_equal(own, np.ones(16))
  weak = {name: ON[name] for name in ('pad_crop', 'flip', 'resized_crop')}
  run = jax.jit(lambda images: pipeline.augment(KEY, places, images, arguments(**weak)))
  want = np.asarray(run(images)).astype(int)
  np.testing.assert_allclose(np.asarray(out), want, atol=1)  # another program rounds differently
  assert (np.asarray(out) == want).mean() > 0.999


DRAWN = np.random.RandomState(1).randint(0, 256, (256, 12, 16, 3)).astype(np.uint8)
KEYS = jax.random.split(KEY, 256)


def rectangles(count, height, width, min_area, max_area, max_aspect):
  """Returns (heights, widths) of many random rectangles."""
  draw = lambda key: crops.rectangle(key, height, width, min_area, max_area, max_aspect)
  keys = jax.random.split(KEY, count)
  return np.asarray(jax.jit(jax.vmap(draw))(keys)).T


def test_rectangles_have_uniform_area_and_log_aspect_ratio():
  height, width = rectangles(20_000, 40, 60, 0.08, 0.4, 4 / 3)
  area = height * width / 2400
  assert area.min() > 0.0799 and area.max() < 0.4001
  np.testing.assert_allclose(np.quantile(area, [0.25, 0.5, 0.75]), [0.16, 0.24, 0.32], atol=0.005)
  shape = np.log(width / height) / np.log(4 / 3)
  assert np.abs(shape).max() < 1.0001
  np.testing.assert_allclose(np.quantile(shape, [0.25, 0.5, 0.75]), [-0.5, 0, 0.5], atol=0.02)


@pytest.mark.parametrize('size', [(40, 60), (60, 40), (10, 80)])
def test_rectangles_of_any_area_fit_into_the_image(size):
  height, width = rectangles(2000, *size, 0.5, 1.0, 4 / 3)
  assert (height <= size[0]).all() and (width <= size[1]).all()
  area = height * width / (size[0] * size[1])
  np.testing.assert_allclose(np.quantile(area, [0.25, 0.75]), [0.625, 0.875], atol=0.02)


@pytest.mark.slow
def test_resized_crop_equals_pillows(monkeypatch):
  boxes = [  # top, left, height, width
    (0.0, 0.0, 12.0, 16.0), (0.0, 0.0, 6.0, 8.0), (3.25, 5.5, 4.7, 9.3), (6.1, 1.0, 5.9, 15.0),
    (11.0, 15.0, 1.0, 1.0),
  ]  # fmt: skip
  for top, left, height, width in boxes:
    monkeypatch.setattr(crops, 'rectangle', lambda *_, size=(height, width): jnp.array(size))
    free = np.array([12 - height, 16 - width])
    share = np.array([top, left]) / np.where(free > 0, free, 1)
    monkeypatch.setattr(jax.random, 'uniform', lambda *_, share=share: jnp.asarray(share))
    out = crops.resized_crop(KEYS[:1], DRAWN[:1], 0.1, 1.3)[0]
    place = (left, top, left + width, top + height)
    want = Image.fromarray(DRAWN[0]).resize((16, 12), Image.Resampling.BILINEAR, box=place)
    np.testing.assert_allclose(np.asarray(out).astype(int), want, atol=1)


def test_full_crop_keeps_the_image_and_smaller_crops_lie_anywhere():
  crop = jax.jit(crops.resized_crop)
  # The first and the last level of a cropped ramp show where the crop was.
  ramp = np.broadcast_to(
    np.arange(0, 240, 5, dtype=np.uint8)[None, None, :, None], (256, 12, 48, 1)
  )
  np.testing.assert_array_equal(crop(KEYS, ramp, 1.0, 1.0), ramp)
  out = np.asarray(crop(KEYS, ramp, 0.2, 4 / 3)).astype(int)
  left, right = out[:, 0, 0, 0] / 5, out[:, 0, -1, 0] / 5
  assert left.min() < 1 and right.max() > 46 and (right - left).min() < 16
  assert (np.diff(out, axis=2) >= 0).all() and np.ptp(out, axis=1).max() == 0


SIDE = 48
CROP = jax.jit(crops.resized_crop)  # of two channels with this side, so it compiles once


def random_crops(max_aspect):
  """Returns (first rows and columns, heights and widths) of random crops, each `[2, 256]`."""
  ramp = np.arange(0, 5 * SIDE, 5, dtype=np.uint8)
  image_HWC = np.stack(np.meshgrid(ramp, ramp, indexing='ij'), axis=-1)  # rows, columns
  image_BHWC = np.broadcast_to(image_HWC, (256, SIDE, SIDE, 2))
  out = np.asarray(CROP(KEYS, image_BHWC, 0.05, max_aspect)).astype(float) / 5
  first = np.stack([out[:, 0, SIDE // 2, 0], out[:, SIDE // 2, 0, 1]])
  last = np.stack([out[:, -1, SIDE // 2, 0], out[:, SIDE // 2, -1, 1]])
  return first, (last - first) * SIDE / (SIDE - 1)


def test_row_and_column_of_a_crop_are_independent():
  first, length = random_crops(4 / 3)
  shares = first / (SIDE - length)
  small = (length < 40).all(0)  # larger crops fit in few places only
  assert small.sum() > 100 and np.ptp(shares[:, small]) > 0.9
  assert abs(np.corrcoef(shares[:, small])[0, 1]) < 0.3


@pytest.mark.parametrize('most', [1.0, 2.0])
def test_the_aspect_ratio_of_a_crop_is_at_most_the_given_one(most):
  _, length = random_crops(most)
  high, wide = length[:, (length > 12).all(0)]  # shorter sides are known less exactly
  assert max((high / wide).max(), (wide / high).max()) == pytest.approx(most, rel=0.1)


def test_the_area_of_a_crop_is_uniform_from_the_smallest_to_the_whole_image():
  _, length = random_crops(4 / 3)
  area = length.prod(0) / SIDE**2
  quantiles = np.quantile(area, [0.1, 0.25, 0.5, 0.75, 0.9])
  np.testing.assert_allclose(quantiles, [0.145, 0.2875, 0.525, 0.7625, 0.905], atol=0.08)


def test_crops_are_as_light_as_their_images():
  """The two channels of each pixel have the sum 235, and rounding keeps this sum on average."""
  ramp = np.broadcast_to(np.arange(0, 5 * SIDE, 5, dtype=np.uint8)[:, None], (SIDE, SIDE))
  image_BHWC = np.broadcast_to(np.stack([ramp, 235 - ramp], axis=-1), (256, SIDE, SIDE, 2))
  out = np.asarray(CROP(KEYS, image_BHWC, 0.05, 4 / 3)).astype(int)
  assert out.sum(-1).mean() == pytest.approx(235, abs=0.05)


ERASE = jax.jit(crops.erasing)  # of one shape, which compiles once


def test_erasing_puts_noise_into_a_rectangle():
  images = np.full((256, 20, 30, 3), 7, np.uint8)
  out = np.asarray(ERASE(KEYS, images, 0.6, 0.02, 1 / 3, 10 / 3))
  hit = (out != 7).any(3)
  erased = hit.any((1, 2))
  assert abs(erased.mean() - 0.6) < 0.1
  areas, tops, lefts = [], [], []
  for mask in hit[erased]:
    y, x = np.nonzero(mask)
    high, wide = np.ptp(y) + 1, np.ptp(x) + 1
    assert mask.sum() == high * wide  # a noise pixel that drew 7 in all channels would break this
    areas.append(high * wide / 600)
    tops.append(y.min())
    lefts.append(x.min())
  assert 0.01 < min(areas) < 0.04 and 0.3 < max(areas) < 0.36
  assert abs(np.mean(areas) - (0.02 + 1 / 3) / 2) < 0.02
  assert min(tops) == min(lefts) == 0 and hit[:, -1].any() and hit[:, :, -1].any()
  levels = out[hit]
  assert abs(levels.mean() - 127.5) < 1 and levels.min() == 0 and levels.max() == 255


def test_erasing_reaches_every_row_and_column():
  images = np.full((256, 20, 30, 3), 7, np.uint8)
  hit = (np.asarray(ERASE(KEYS, images, 1.0, 1 / 600, 1 / 600, 1.0)) != 7).any(3)
  assert (hit.sum((1, 2)) == 1).all()
  assert hit.any((0, 2)).all() and hit.any((0, 1)).all()  # each row and each column


def test_each_erased_pixel_has_its_own_noise():
  images = np.full((256, 20, 30, 3), 7, np.uint8)
  out = np.asarray(ERASE(KEYS, images, 1.0, 0.02, 1 / 3, 10 / 3))
  colours = out[(out != 7).any(3)]
  assert len(np.unique(colours, axis=0)) > 0.99 * len(colours)


def test_noise_of_one_channel_does_not_depend_on_the_others():
  images = np.full((256, 20, 30, 3), 7, np.uint8)
  out = np.asarray(ERASE(KEYS, images, 1.0, 0.02, 1 / 3, 10 / 3))
  levels = out[(out != 7).any(3)].astype(float)
  assert np.abs(np.corrcoef(levels.T) - np.eye(3)).max() < 0.03


MIX = jax.jit(mix)  # always called with the same shape, so it compiles once


def mixed(images, probability=1.0, mixup_alpha=0.0, cutmix_alpha=0.0, switch=0.5):
  out, own = MIX(KEYS, images, probability, mixup_alpha, cutmix_alpha, switch)
  return np.asarray(out).astype(int), np.asarray(own)


# Each white image has a black partner, so every mixed pixel shows the shares of both images.
BLACK_AND_WHITE = np.stack([np.full((12, 16, 1), 255 * (i % 2), np.uint8) for i in range(256)])


def own_parts(images, out):
  """Returns each pixel's share of the image's own value, `[B, H, W]`."""
  return np.where(images == 255, out, 255 - out)[..., 0] / 255


def test_the_partner_is_the_neighbour():
  np.testing.assert_array_equal(partner(jnp.arange(6)), [1, 0, 3, 2, 5, 4])
  out = partner(IMAGES)
  np.testing.assert_array_equal(out, IMAGES[np.arange(16) ^ 1])
  with pytest.raises(AssertionError, match='5 examples'):
    partner(IMAGES[:5])


def test_mixup_is_a_mean_weighted_like_the_label():
  images = DRAWN[..., :1]
  out, own = mixed(images, mixup_alpha=0.8)
  weight = own[:, None, None, None]
  want = weight * images + (1 - weight) * images[np.arange(256) ^ 1]
  np.testing.assert_allclose(out, want, atol=0.51)
  assert own.min() < 0.05 and own.max() > 0.95 and len(set(own)) == 256
  # Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1)).
  assert abs(own.mean() - 0.5) < 0.07 and abs(own.var() - 1 / (4 * 2.6)) < 0.02


def test_cutmix_replaces_a_rectangle_and_the_label_loses_its_area():
  images = BLACK_AND_WHITE
  out, own = mixed(images, cutmix_alpha=1.0)
  parts = own_parts(images, out)
  assert set(np.unique(parts)) == {0, 1}
  np.testing.assert_allclose(parts.mean((1, 2)), own, atol=1e-6)
  for part in parts:
    y, x = np.nonzero(part == 0)
    assert len(y) == 0 or len(y) == (np.ptp(y) + 1) * (np.ptp(x) + 1)
  lost = parts == 0
  assert lost[:, 0, 0].any() and lost[:, -1, -1].any() and lost[:, 6, 8].mean() > 0.3
  shapes = [(np.ptp(y) + 1, np.ptp(x) + 1) for y, x in map(np.nonzero, lost) if len(y)]
  assert max(high for high, _ in shapes) >= 10 and max(wide for _, wide in shapes) >= 14


def test_cutmix_reaches_all_pixels_of_an_elongated_image():
  images = np.zeros((256, 8, 32, 1), np.uint8)
  images[::2] = 255
  out, _ = mixed(images, cutmix_alpha=1.0)
  replaced_HW = (out != images).mean((0, 3))
  assert replaced_HW.min() > 0.05
  np.testing.assert_allclose(replaced_HW, replaced_HW[::-1, ::-1], atol=0.15)


@pytest.mark.parametrize('probability, switch, alphas, shares', [
    (1.0, 0.5, (0.8, 1.0), (0.5, 0.5)), (0.5, 0.8, (0.8, 1.0), (0.1, 0.4)),
    (0.5, 0.5, (0.8, 1.0), (0.25, 0.25)), (1.0, 0.0, (0.0, 1.0), (0.0, 1.0)),
    (1.0, 1.0, (0.8, 0.0), (1.0, 0.0)), (0.0, 0.5, (0.8, 1.0), (0.0, 0.0)),
])  # fmt: skip
def test_each_image_switches_between_mixup_cutmix_and_neither(probability, switch, alphas, shares):
  images = BLACK_AND_WHITE
  out, own = mixed(images, probability, *alphas, switch)
  parts = own_parts(images, out)
  cut = (parts == 0).any((1, 2)) & (parts == 1).any((1, 2))
  blended = (parts[:, 0, 0] > 0) & (parts[:, 0, 0] < 1)
  # Some mixed images have an own share of nearly one, so mixing is not visible in them.
  assert abs(blended.mean() - shares[0]) < 0.12 and abs(cut.mean() - shares[1]) < 0.15
  np.testing.assert_allclose(parts.mean((1, 2)), own, atol=0.003)
  if probability == 0:
    np.testing.assert_array_equal(out, images)
    np.testing.assert_array_equal(own, 1)


@pytest.mark.slow
def test_the_loss_is_weighted_between_the_two_labels():
  settings = {'augment.mix.probability': '1', 'loss.label_smoothing': '0.1'}
  exp, _ = opening.from_config(small_config(**settings))
  labels = np.arange(8) % 10
  logits = np.random.RandomState(0).normal(size=(8, 10)).astype(np.float32)
  own = np.linspace(0, 1, 8).astype(np.float32)
  fixed = {'augment_and_mix': lambda *_, early: (None, own)}
  exp = Fixed(**{**vars(exp), **fixed}, logits_BL=logits)
  batch = {'image': None, 'label': jnp.asarray(labels), 'example': jnp.arange(8)}
  loss, _ = loss_fn(batch, {}, {}, KEY, True, exp)
  log_p = logits - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
  target = own[:, None] * np.eye(10)[labels] + (1 - own[:, None]) * np.eye(10)[labels ^ 1]
  want = -((0.9 * target + 0.01) * log_p).sum() / exp.config.batch_size
  np.testing.assert_allclose(loss, want, rtol=1e-5)


@dataclasses.dataclass(frozen=True)
class Fixed(Experiment):
  """An experiment whose model always returns the same logits."""

  logits_BL: np.ndarray = None

  def logits(self, params, batch, key=None):
    return self.logits_BL


@pytest.mark.parametrize('overrides, message', [
    ({'erasing.min_area': '0.5'}, 'min_area=0.5 must not exceed max_area=0.333'),
    ({'mix.probability': '2'}, 'mix.probability must be from 0 to 1'),
    ({'mix.probability': '1', 'mix.mixup_alpha': '0', 'mix.cutmix_alpha': '0'}, 'above 0'),
    ({'rand_augment.space': 'huge'}, 'standard, timm, wide'),
    ({'rand_augment.magnitude': '11'}, 'from 0 to 10 for space=standard'),
    ({'rand_augment.magnitude': '31', 'rand_augment.space': 'big_vision'}, 'from 0 to 30'),
    ({'rand_augment.magnitude': 'nan'}, 'must be a number'),
    ({'resized_crop.min_area': '0'}, 'min_area must be from 0.001'),
])  # fmt: skip
def test_invalid_arguments_are_rejected(overrides, message):
  overrides = {f'augment.{key}': text for key, text in overrides.items()}
  with pytest.raises(ValueError, match=message):
    check(small_config(**overrides))


@pytest.mark.parametrize('batch, parts, multiple', [('33', 'None', 2), ('24', '8', 16)])
def test_batch_that_leaves_an_image_without_a_partner_is_rejected(batch, parts, multiple):
  settings = {'batch_size': batch, 'micro_batches': parts}
  check(small_config(**settings))
  with pytest.raises(ValueError, match=f'Set batch_size to a multiple of {multiple}'):
    check(small_config(**settings, **{'augment.mix.probability': '1'}))


def test_pairs_stay_on_one_device_and_in_one_micro_batch():
  assert devices.make_mesh(6, 1).size == 2 and devices.make_mesh(6, 1, group=2).size == 1
  assert devices.make_mesh(8, 1, group=2).size == 2
  with pytest.raises(ValueError, match='multiple of 6 .3 micro-batches x 2'):
    devices.make_mesh(9, 3, group=2)
  mesh = devices.make_mesh(2)
  # Without pairs, 15 examples per device and part would be best, but 15 is odd.
  assert microbatch.micro_batches(mesh, 60, 64, 48) == 2
  assert microbatch.micro_batches(mesh, 60, 64, 48, group=2) in (1, 3, 5)


def test_normalize_subtracts_the_mean_and_divides_by_the_deviation():
  out = pipeline.normalize(IMAGES, (6, 8), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
  want = (IMAGES / 255.0 - [0.4, 0.5, 0.6]) / [0.2, 0.25, 0.3]
  np.testing.assert_allclose(out, want, atol=1e-5)


def test_enlarging_is_bicubic_like_pillows():
  grey = IMAGES[0, :, :, 0].astype(np.float32)
  out = pipeline.normalize(grey[None, :, :, None].astype(np.uint8), (12, 24), (0.0,), (1.0,))
  want = Image.fromarray(grey).resize((24, 12), Image.Resampling.BICUBIC)
  # The border is left out, because the two extend the image differently there.
  np.testing.assert_allclose(255 * out[0, 4:-4, 6:-6, 0], np.asarray(want)[4:-4, 6:-6], atol=0.01)


@pytest.mark.slow
def test_mixup_and_cutmix_each_use_their_own_alpha():
  images = np.zeros((256, 8, 8, 3), np.uint8)
  _, own = mix(KEYS, images, 1.0, mixup_alpha=1e-3, cutmix_alpha=1e4, switch=0.5)
  # Mixup with cutmix's large alpha would give 1/2. In cutmix, whole pixels make the rectangle
  # smaller than one half.
  assert not (np.abs(np.asarray(own) - 0.5) < 0.05).any()
