"""Tests other image sizes: stretched positions, evaluation, and smaller images first."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from tests.conftest import run_model, small_config
from vit_jax import opening
from vit_jax.data import sources
from vit_jax.evaluation import exact
from vit_jax.figures import maps
from vit_jax.inference import cost, summary
from vit_jax.model import positions, variants
from vit_jax.optim import losses, plan
from vit_jax.training import loop, trainer
from vit_jax.training.loop import Run
from vit_jax.weights import pretrained
from vit_jax.workdir import stored, writer

IMAGES = np.random.RandomState(0).normal(size=(3, 8, 16, 3)).astype(np.float32)
WHOLE = (4, 6)  # grid of patches that positions are made for; `IMAGES` have 2 x 4 patches


def test_patches_of_another_grid_are_placed_at_their_centres():
  y, x = positions.coordinates((2, 3), (4, 6))
  np.testing.assert_array_equal(y, [[0.5] * 3, [2.5] * 3])  # between rows 0 and 1, 2 and 3
  np.testing.assert_array_equal(x, [[0.5, 2.5, 4.5]] * 2)
  y, x = positions.coordinates((14, 11), (14, 11))
  np.testing.assert_array_equal((y, x), np.mgrid[:14, :11])  # exactly


def test_stretched_sincos_and_rope_equal_the_closed_form():
  table = positions.sincos(2, 4, 16, WHOLE)[0]
  model = variants.make('tiny', 5, width=16, num_heads=2, pool='cls')
  cos, sin = positions.patch_angles(model, (2, 4), WHOLE)
  places = itertools.product((0.5, 2.5), [6 / 4 * (i + 0.5) - 0.5 for i in range(4)])
  for token, (y, x) in enumerate(places):
    omega = [10_000 ** -(i / 3) for i in range(4)]
    want = [f(p * o) for p in (x, y) for f in (math.sin, math.cos) for o in omega]
    np.testing.assert_allclose(table[token], want, atol=1e-6)
    angle = np.array([y, y / 10, x, x / 10])
    np.testing.assert_allclose(cos[token + 1], np.cos(angle), atol=1e-6)
    np.testing.assert_allclose(sin[token + 1], np.sin(angle), atol=1e-6)


def small(**fields):
  return variants.make('tiny', 5, width=16, depth=1, mlp_dim=8, patch_size=4, **fields)


def random_params(model, image=IMAGES):
  params = jax.eval_shape(model.init, jax.random.key(0), image)['params']
  draw = np.random.RandomState(1)
  return jax.tree.map(lambda x: draw.normal(size=x.shape).astype(np.float32), params)


def resized_by_pillow(position_1ND, before, after, prefix=0, method='bilinear'):
  """Resizes positions like `resize_positions`, but with Pillow, which averages when it shrinks."""
  filter_ = getattr(Image.Resampling, method.upper())
  planes = np.moveaxis(np.asarray(position_1ND)[0, prefix:].reshape(*before, -1), 2, 0)
  resized = [np.asarray(Image.fromarray(p).resize(after[::-1], filter_)) for p in planes]
  table_1ND = np.stack(resized, axis=2).reshape(1, math.prod(after), -1)
  return np.concatenate([position_1ND[:, :prefix], table_1ND], axis=1)


@pytest.mark.parametrize('method', ['bilinear', 'bicubic'])
@pytest.mark.parametrize('after', [(3, 5), (4, 4), (12, 9), (1, 1)])
def test_positions_are_resized_like_images_in_pillow(method, after):
  table = np.random.RandomState(5).normal(size=(1, 2 + 8 * 6, 3)).astype(np.float32)
  want = resized_by_pillow(table, (8, 6), after, 2, method)
  for array in (table, jnp.asarray(table)):
    found = positions.resize_positions(array, (8, 6), after, 2, method)
    np.testing.assert_allclose(found, want, atol=1e-5)


@pytest.mark.slow_after_first
@pytest.mark.parametrize('fields', [
    dict(pool='cls'), dict(pool='gap'),
    dict(pool='cls', num_registers=2, position_prefix='all'),
])  # fmt: skip
def test_learned_positions_are_resized_in_the_model_like_images_in_pillow(fields):
  model = small(position_grid=WHOLE, **fields)
  params = random_params(model)
  prefix = model.num_positions
  assert params['pos_embedding'].shape == (1, prefix + 24, 16)
  resized = resized_by_pillow(params['pos_embedding'], WHOLE, (2, 4), prefix)
  resized = params | {'pos_embedding': resized}
  want = jax.jit(model.clone(position_grid=None).apply)({'params': resized}, IMAGES)
  found = jax.jit(model.apply)({'params': params}, IMAGES)
  np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


def test_every_position_of_the_table_has_a_gradient():
  """Resizing is a linear map; the resized unit vectors are its matrix."""
  basis = np.eye(24, dtype=np.float32)[None]  # `[1, 24, 24]`, one unit vector per position
  matrix = positions.resize_positions(basis, WHOLE, (2, 4), 0)[0]  # `[8, 24]`
  weight = np.random.RandomState(2).normal(size=(1, 8, 24)).astype(np.float32)
  function = lambda table: (positions.resize_positions(table, WHOLE, (2, 4), 0) * weight).sum()
  gradient = jax.jit(jax.grad(function))(jnp.asarray(basis))
  np.testing.assert_allclose(gradient[0], matrix.T @ weight[0], atol=1e-5)
  assert (np.abs(gradient) > 1e-4).any(axis=2).all()


@pytest.mark.slow_after_first
@pytest.mark.parametrize('position', ['sincos', 'rope', 'none'])
def test_positions_without_parameters_are_stretched(position):
  model = small(pool='gap', position=position, position_grid=WHOLE)
  params = random_params(model)
  stretched = run_model(model, params, IMAGES)
  plain = run_model(model.clone(position_grid=None), params, IMAGES)
  assert np.allclose(stretched, plain, atol=1e-5) == (position == 'none')
  own = np.random.RandomState(3).normal(size=(3, 16, 24, 3)).astype(np.float32)  # 4 x 6 patches
  np.testing.assert_array_equal(
    run_model(model, params, own),
    run_model(model.clone(position_grid=None), params, own),
  )


def test_position_figure_uses_the_grid_of_the_image():
  for position in ('learned', 'sincos'):
    model = small(pool='gap', position=position, position_grid=WHOLE)
    found = maps.position_embeddings(model, random_params(model), (2, 4))
    assert found.shape == (2, 4, 16)
  np.testing.assert_allclose(found.reshape(8, 16), positions.sincos(2, 4, 16, WHOLE)[0], atol=1e-6)


@pytest.mark.slow
def test_run_can_be_evaluated_at_another_size(trained):
  workdir, _ = trained
  found = exact.evaluate(workdir, {'data.image_size': '16'})
  model, params = pretrained.load(workdir, grid=(4, 4))  # this resizes the table
  source = sources.synthetic('', '', (16, 16))
  _, images, labels = zip(*source.read('test', range(256)))
  logits = jax.jit(model.apply)({'params': params}, np.stack(images) / 127.5 - 1)
  assert found['examples'] == 256
  label = np.array(labels)
  assert found['accuracy'] == pytest.approx((logits.argmax(1) == label).mean())
  assert found['loss'] == pytest.approx(float(losses.softmax(logits, label).mean()), rel=1e-4)


def test_size_not_divisible_into_patches_is_rejected(trained):
  with pytest.raises(ValueError, match='does not divide into patches of 4x4'):
    exact.evaluate(trained[0], {'data.image_size': '10'})


def test_experiment_at_another_size_reads_files_at_that_size(trained, monkeypatch):
  exp = opening.from_workdir(trained[0])[0]
  assert exp.at((8, 8)) is exp
  larger = exp.at((16, 16))
  assert larger.task.stored_size == larger.image_shape[:2] == (16, 16)
  assert larger.at((4, 4)).model.position_grid == (2, 2)  # the run's grid
  assert exp.image_shape == (8, 8, 3)


STAGES = {'data.image_size': '16', 'progressive.sizes': '8', 'progressive.until': '0.375'}
STAGES |= {'data.train_split': 'train[:512]', 'data.eval_split': 'test[:32]', 'batch_size': '16'}
STAGES |= {'eval_every': '0', 'ema': '0.9'}  # 12 of the 32 steps see images of 8x8


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A run with smaller images first: (workdir, [step, image size, ...] of each compilation)."""
  workdir, seen = tmp_path_factory.mktemp('stages'), []
  real = loop.compile_step

  def compiles(exp, training, mesh, state, batch):
    seen.extend((int(state.step), exp.image_shape[:2]))
    return real(exp, training, mesh, state, batch)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, 'compile_step', compiles)
    trainer.train(small_config(**STAGES), workdir)
  return workdir, seen


@pytest.mark.slow
def test_progressive_run_starts_with_smaller_images(whole):
  workdir, seen = whole
  assert seen == [0, (8, 8), 12, (16, 16)]
  _, params, _ = stored.load_checkpoint(workdir)
  assert params['pos_embedding'].shape == (1, 16, 16)  # always for full-size images
  lines = writer.read_metrics(workdir)
  assert [line['step'] for line in lines if line['split'] == 'train'] == [8, 16, 24, 32]
  assert exact.evaluate(workdir, {})['accuracy'] > 0.2  # ten classes, so chance is 0.1
  assert exact.evaluate(workdir, {'data.image_size': '4'})['examples'] == 32


@pytest.mark.slow
@pytest.mark.parametrize('stop', [8, 12])
def test_progressive_run_resumes_bit_for_bit_before_and_at_the_change(whole, stop, tmp_path):
  settings = STAGES | {'checkpoint_every': str(stop)}
  save = Run.save

  def save_and_die(self, *args):
    save(self, *args)
    self.checkpoints.wait()
    raise KeyboardInterrupt

  with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(Run, 'save', save_and_die)
    trainer.train(small_config(**settings), tmp_path)
  assert stored.latest_step(tmp_path) == stop
  trainer.train(small_config(**settings), tmp_path)
  for item in ('params', 'state'):
    jax.tree.map(
      np.testing.assert_array_equal,
      *(stored.restore_item(workdir, 32, item) for workdir in (whole[0], tmp_path)),
    )


@pytest.mark.slow
def test_early_steps_see_images_reduced_like_pillows(whole):
  """The border is left out."""
  exp, _, _ = opening.from_workdir(whole[0])
  image = np.random.RandomState(4).randint(0, 256, (1, 16, 16, 3)).astype(np.uint8)
  out = np.asarray(exp.at((8, 8)).normalize(image))[0]
  for channel in range(3):
    plane = Image.fromarray(image[0, :, :, channel].astype(np.float32))
    want = np.asarray(plane.resize((8, 8), Image.Resampling.BICUBIC)) / 127.5 - 1
    np.testing.assert_allclose(out[2:-2, 2:-2, channel], want[2:-2, 2:-2], atol=1e-3)


@pytest.mark.slow
def test_inspect_counts_the_flops_of_each_size():
  exp, *_ = summary.summary_of_config(small_config(**STAGES))
  found = cost.measure(exp, 512)
  each = {n: cost.measure(exp.at((n, n)), 512).train_flops for n in (8, 16)}
  assert found.train_flops == each[16] > 3 * each[8]
  assert found.run_flops == 16 * (12 * each[8] + 20 * each[16])


def test_smaller_images_keep_the_aspect_ratio():
  sizes = {'data.image_size': '12,24', 'progressive.sizes': '4,6', 'progressive.until': '0.2,0.5'}
  config = small_config(**sizes)
  stages = ((6, (4, 8)), (16, (6, 12)), (32, (12, 24)))
  assert plan.image_stages(config, 32) == stages
  fits = lambda patch: plan.check_stages(config, small(pool='gap').clone(patch_size=patch))
  fits((2, 4))
  with pytest.raises(ValueError, match='images of 4x8 pixels do not divide into patches of 4x3'):
    fits((4, 3))


@pytest.mark.parametrize('overrides, message', [
    ({'progressive.sizes': '8'}, 'one for each'),
    ({'progressive.sizes': '8,12', 'progressive.until': '0.5,0.5'}, 'increasing'),
    ({'progressive.sizes': '8', 'progressive.until': '1.0'}, 'between 0 and 1'),
    ({'progressive.sizes': '32', 'progressive.until': '0.5'}, 'at most 16'),
    ({'progressive.sizes': '10', 'progressive.until': '0.5'}, 'patches of 4x4'),
    ({'progressive.sizes': '8', 'progressive.until': '0.5', 'data.image_size': '12,16'}, '10.6667'),
    ({'progressive.sizes': '8', 'progressive.until': '0.5', 'freeze': 'backbone'}, 'freeze'),
])  # fmt: skip
def test_invalid_sizes_are_rejected(overrides, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    trainer.train(small_config(**{'data.image_size': '16', **overrides}), tmp_path / 'run')
