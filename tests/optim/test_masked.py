"""Compares masked autoencoding with independent references: masks, loss, gradients, FLOPs."""

import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import init_params, run_model, small_config
import vit_jax
from vit_jax import cli
from vit_jax.check import check
from vit_jax.experiment import assemble
from vit_jax.model.layers import Dropout
from vit_jax.optim import fill_in, masked
from vit_jax.training import tracing
from vit_jax.training.step import loss_fn
from vit_jax.workdir import Task

MASKED = {
  'objective': 'masked',
  'masked.decoder_width': '16', 'masked.decoder_depth': '1', 'masked.decoder_heads': '2',
  'data.image_size': '16',
}  # fmt: skip
KEY = jax.random.key(5)


def opened(**overrides):
  """Returns an experiment for images of 4x4 patches, its parameters, and a batch of 6 images."""
  config = small_config(**MASKED | overrides)
  exp = assemble(config, Task((), (16, 16), 3))
  params = init_params(exp.model, jnp.zeros((1, *exp.image_shape)))
  params |= jax.jit(lambda: masked.init_decoder(exp, jax.random.key(1)))()
  image_BHWC = np.random.RandomState(0).randint(0, 256, (6, 16, 16, 3)).astype(np.uint8)
  return exp, params, {'image': image_BHWC, 'example': jnp.arange(6), 'label': jnp.zeros(6, int)}


@functools.lru_cache(maxsize=1)
def filled():
  exp, params, batch = opened()
  return exp, batch, jax.jit(functools.partial(fill_in, exp))(params, batch, KEY)


@pytest.mark.parametrize('count, share, unseen', [(64, 0.75, 48), (196, 0.75, 147), (10, 0.75, 8)])
def test_the_paper_s_number_of_patches_is_hidden(count, share, unseen):
  assert masked.num_unseen(count, share) == unseen == count - int(count * (1 - share))


def test_masks_divide_the_patches_depend_on_the_example_and_hide_all_patches_equally():
  draw = jax.jit(lambda example_B: masked.draw_masks(KEY, example_B, 16, 12))
  seen_BS, unseen_BU = map(np.asarray, draw(jnp.arange(4000)))
  assert seen_BS.shape == (4000, 4) and unseen_BU.shape == (4000, 12)
  both = np.sort(np.concatenate([seen_BS, unseen_BU], axis=1), axis=1)
  assert (both == np.arange(16)).all()
  share_N = np.bincount(unseen_BU.ravel(), minlength=16) / 4000
  assert abs(share_N - 0.75).max() < 5 * (0.75 * 0.25 / 4000) ** 0.5
  other_BS, _ = masked.draw_masks(KEY, jnp.arange(10, 14), 16, 12)
  np.testing.assert_array_equal(other_BS, seen_BS[10:14])


def test_the_loss_is_the_error_of_normalised_hidden_patches_in_float64():
  _, batch, found = filled()
  image = (batch['image'] / 255.0 - 0.5) / 0.5
  want = []
  for i, unseen_U in enumerate(np.asarray(found.unseen_BU)):
    errors = []
    for guess_P, place in zip(np.asarray(found.predicted_BUP, np.float64)[i], unseen_U):
      row, column = divmod(place, 4)
      patch = image[i, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].ravel()
      patch = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
      errors.append(((guess_P - patch) ** 2).mean())
    want.append(np.mean(errors))
  np.testing.assert_allclose(found.loss_B, want, rtol=1e-5)
  assert found.unseen_BU.shape == (6, 12) and np.std(want) > 0


@pytest.mark.slow
def test_predictions_see_only_seen_patches_and_targets_are_only_unseen_patches():
  exp, params, batch = opened()
  pixels = lambda image: dataclasses.replace(exp, normalize=lambda _: image)
  image_BHWC = exp.normalize(batch['image'])

  @jax.jit
  def gradients(image_BHWC):
    """Returns the size of the gradient of predictions and of targets in each patch, `[B, N]`."""
    run = lambda image: fill_in(pixels(image), params, batch, KEY)
    of = lambda part: jax.grad(lambda image: (getattr(run(image), part) ** 3).sum())(image_BHWC)
    parts = (masked.as_patches(of(part), (4, 4)) for part in ('predicted_BUP', 'target_BUP'))
    return *(abs(x).max(axis=-1) for x in parts), run(image_BHWC).unseen_BU

  guess_BN, target_BN, unseen_BU = map(np.asarray, gradients(image_BHWC))
  hidden_BN = np.zeros(guess_BN.shape, bool)
  np.put_along_axis(hidden_BN, unseen_BU, True, axis=1)
  np.testing.assert_array_equal(guess_BN > 0, ~hidden_BN)
  np.testing.assert_array_equal(target_BN > 0, hidden_BN)


@pytest.mark.slow_after_first
@pytest.mark.parametrize('position', ['learned', 'rope', 'sincos'])
def test_the_encoder_computes_seen_patches_at_their_own_places(position):
  """All patches in any order give the tokens of the whole image, in this order."""
  model = vit_jax.make(
    'tiny', None, width=16, depth=2, mlp_dim=32, pool='none', position=position, num_registers=2
  )
  image_BHWC = np.random.RandomState(1).normal(size=(3, 16, 8, 3)).astype(np.float32)
  params = init_params(model, image_BHWC)
  order_BN = np.stack([np.random.RandomState(i).permutation(8) for i in range(3)])
  function = jax.jit(
    lambda params, seen_BS: model.apply({'params': params}, image_BHWC, seen_BS=seen_BS)
  )
  whole_BND, found_BND = run_model(model, params, image_BHWC), function(params, order_BN)
  np.testing.assert_allclose(found_BND[:, :2], whole_BND[:, :2], atol=1e-5)
  want_BND = np.take_along_axis(np.asarray(whole_BND)[:, 2:], order_BN[..., None], axis=1)
  np.testing.assert_allclose(found_BND[:, 2:], want_BND, atol=1e-5)
  assert function(params, order_BN[:, :3]).shape == (3, 5, 16)
  assert abs(want_BND - np.asarray(whole_BND)[:, 2:]).max() > 0.1


@pytest.mark.slow
def test_dropped_patches_are_as_if_the_image_did_not_have_them():
  model = vit_jax.make('tiny', None, width=16, depth=2, mlp_dim=32, pool='gap', position='none')
  image_BHWC = np.random.RandomState(1).normal(size=(1, 8, 16, 3)).astype(np.float32)
  params = init_params(model, image_BHWC)
  seen_BS = jnp.array([[1, 4, 6]])  # of 2x4 patches
  found_BD = jax.jit(functools.partial(model.apply, seen_BS=seen_BS))(
    {'params': params}, image_BHWC
  )
  strip = [image_BHWC[:, 4 * (n // 4) :][:, :4, 4 * (n % 4) :][:, :, :4] for n in (1, 4, 6)]
  want_BD = run_model(model, params, np.concatenate(strip, axis=2))
  np.testing.assert_allclose(found_BD, want_BD, atol=1e-5)


def test_the_decoder_does_not_depend_on_the_order_of_its_tokens():
  """The paper restores the order of the image; here, seen patches come first."""
  exp, params, _ = opened()
  x_BTD = np.random.RandomState(2).normal(size=(2, 4, 16)).astype(np.float32)
  order_BN = np.stack([np.random.RandomState(i).permutation(16) for i in range(2)])
  seen_BS, unseen_BU = order_BN[:, :4], order_BN[:, 4:]
  decoder = masked.make_decoder(exp)
  decode = jax.jit(
    lambda x, seen, unseen: decoder.apply({'params': params['decoder']}, x, seen, unseen, (4, 4))
  )
  want = np.asarray(decode(x_BTD, seen_BS, unseen_BU))
  found = decode(x_BTD[:, ::-1], seen_BS[:, ::-1], unseen_BU[:, ::-1])
  np.testing.assert_allclose(found[:, ::-1], want, atol=1e-5)
  moved = decode(x_BTD[:, ::-1], seen_BS, unseen_BU)
  assert abs(np.asarray(moved) - want).max() > 1e-3


def test_patches_and_their_inverse():
  image_BHWC = np.random.RandomState(0).normal(size=(2, 8, 12, 3))
  patch_BNP = masked.as_patches(image_BHWC, (4, 3))
  np.testing.assert_array_equal(patch_BNP[1, 5], image_BHWC[1, 4:, 3:6].ravel())
  np.testing.assert_array_equal(masked.as_images(patch_BNP, (4, 3), (8, 12, 3)), image_BHWC)


@pytest.mark.slow
def test_a_step_costs_a_fraction_of_a_supervised_step():
  exp, params, _ = opened(**{'masked.decoder_width': '4', 'data.image_size': '64'})
  whole = assemble(small_config(**{'data.image_size': '64'}), Task(tuple('ab'), (64, 64), 3))
  alone = {name: leaves for name, leaves in params.items() if name != 'decoder'}
  alone['head'] = {'kernel': jnp.zeros((16, 2)), 'bias': jnp.zeros(2)}
  ratio = tracing.step_flops(exp.at((64, 64)), params) / tracing.step_flops(whole, alone)
  assert ratio < 0.4


@pytest.mark.slow
def test_a_small_batch_can_be_filled_in():
  exp, params, batch = opened(**{'model.stochastic_depth': '0', 'augment.flip.probability': '0'})
  batch['image'] = (
    np.asarray(jax.image.resize(batch['image'][:, :2, :2] / 1.0, (6, 16, 16, 3), 'cubic'))
    .clip(0, 255)
    .astype(np.uint8)
  )
  import optax

  optimizer = optax.adam(1e-2)

  @jax.jit
  def train(params):
    def step(carry, i):
      params, state = carry
      function = lambda params: fill_in(
        exp, params, batch, jax.random.fold_in(KEY, i)
      ).loss_B.mean()
      loss, grads = jax.value_and_grad(function)(params)
      updates, state = optimizer.update(grads, state)
      return (optax.apply_updates(params, updates), state), loss

    return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(150))[1]

  loss_N = np.asarray(train(params))
  assert loss_N[-10:].mean() < 0.4 * loss_N[:10].mean()


@pytest.mark.slow
def test_training_and_evaluation_hide_different_patches_and_evaluation_always_the_same():
  exp, params, batch = opened()
  rows = jax.jit(lambda params, batch: exp.objective.rows(exp, params, batch)['loss'])
  whole_B = np.asarray(rows(params, batch))
  part = {name: x[2:5] for name, x in batch.items()}
  np.testing.assert_allclose(rows(params, part), whole_B[2:5], rtol=1e-5)
  step = jax.jit(lambda key: loss_fn(batch, params, {}, key, None, exp)[0])
  losses = [float(step(jax.random.key(i))) for i in range(3)]
  assert len({*losses, float(whole_B.sum() / 32)}) == 4
  exp = dataclasses.replace(exp, config=exp.config.copy_and_resolve_references())
  exp.config.seed = 1
  np.testing.assert_allclose(exp.objective.rows(exp, params, batch)['loss'], whole_B, rtol=1e-5)


def shapes_of(**overrides):
  """Returns an experiment, and the shapes of its parameters and of a batch of 2 images."""
  exp = assemble(small_config(**MASKED | overrides), Task((), (16, 16), 3))
  image_BHWC = jnp.zeros((1, *exp.image_shape))
  init = lambda: exp.model.init(KEY, image_BHWC)['params'] | masked.init_decoder(exp, KEY)
  batch = {'image': jax.ShapeDtypeStruct((2, 16, 16, 3), 'uint8')}
  return exp, jax.eval_shape(init), batch | {'example': jax.ShapeDtypeStruct((2,), 'int32')}


def test_only_training_uses_dropout():
  exp, *shapes = shapes_of(**{'model.dropout': '0.5'})
  drops = set()

  def note(call, args, kwargs, context):
    if isinstance(context.module, Dropout) and context.module.rate:
      drops.add(args[1] is not None)  # without the examples, nothing is dropped
    return call(*args, **kwargs)

  with nn.intercept_methods(note):
    jax.eval_shape(lambda params, batch: exp.objective.loss(exp, params, batch, KEY)[0], *shapes)
    assert drops == {True}
    drops.clear()
    jax.eval_shape(lambda params, batch: exp.objective.rows(exp, params, batch), *shapes)
    assert drops == {False}


def test_the_decoder_has_its_own_sizes_and_the_functions_of_the_model():
  exp, params, _ = shapes_of(**{
    'masked.decoder_width': '24', 'masked.decoder_depth': '3', 'masked.decoder_heads': '4',
    'model.activation': 'silu', 'model.norm_epsilon': '1e-5', 'model.dtype': 'bfloat16',
  })  # fmt: skip
  blocks, block = params['decoder']['encoder'], masked.make_decoder(exp).block
  assert blocks.keys() == {'block_0', 'block_1', 'block_2', 'norm'}
  assert blocks['block_2']['attention']['query']['kernel'].shape == (24, 4, 6)
  assert blocks['block_2']['mlp']['up']['kernel'].shape == (24, 4 * 24)
  assert params['decoder']['embedding']['kernel'].shape == (16, 24)
  assert params['decoder']['pixels']['kernel'].shape == (24, 4 * 4 * 3)
  assert (block.activation, block.norm_epsilon, block.dtype) == ('silu', 1e-5, 'bfloat16')


@pytest.mark.parametrize(
  'variant, sizes', [('b16,cifar10', (512, 8, 16)), ('tiny,folder', (48, 2, 4))]
)
def test_the_config_has_the_decoder_and_the_settings_of_the_paper(variant, sizes):
  config = cli.load_file(f'configs/mae.py:{variant}')
  own = config.masked
  assert (own.decoder_width, own.decoder_depth, own.decoder_heads) == sizes
  assert (own.share, config.optimizer.b2, config.optimizer.weight_decay) == (0.75, 0.95, 0.05)
  if variant.startswith('b16'):  # Section 4 and Table 8 of He et al. 2021
    assert config.optimizer.lr == pytest.approx(1.5e-4 * 4096 / 256)
    assert (config.batch_size, config.epochs, config.schedule.warmup) == (4096, 800, 40)


@pytest.mark.parametrize('overrides, message', [
  ({'masked.share': '0.95'}, 'leaves at least one patch hidden and one patch visible'),
  ({'freeze': 'backbone'}, 'freeze=backbone.*Pretrain first'),
  ({'optimizer.layer_decay': '0.7'}, 'optimizer.layer_decay=0.7'),
  (
    {'masked.decoder_width': '10', 'masked.decoder_heads': '4'},
    'masked.decoder_width=10 must be divisible',
  ),
  ({'distill.teacher': 'runs/a'}, 'remove distill.teacher=runs/a'),
  ({'model.resnet': '1', 'model.patch_size': '4'}, 'the stem .model.resnet. would let'),
  ({'model.pool': 'map'}, 'layers that these keys add after the blocks: model.pool=map. So weight'),
  ({'model.projection': '8'}, 'after the blocks: model.projection=8'),
  ({'objective': 'distilled'}, 'set distill.teacher'),
  ({'objective': 'mask'}, 'Did you mean masked'),
])  # fmt: skip
def test_contradictions_are_refused(overrides, message):
  with pytest.raises(ValueError, match=message):
    config = small_config(**MASKED | overrides)
    check(config)
    exp = assemble(config, Task((), (16, 16), 3))
    masked.init_decoder(exp, KEY)


def test_the_decoder_measures_positions_in_the_grid_of_full_size_images():
  exp, params, _ = opened()
  in_grid = lambda grid: masked.make_decoder(
    dataclasses.replace(exp, model=exp.model.clone(position_grid=grid))
  )
  x_BTD = np.random.RandomState(2).normal(size=(1, 4, 16)).astype(np.float32)
  places = (np.arange(4)[None], np.arange(4, 16)[None])
  decode = lambda decoder: decoder.apply({'params': params['decoder']}, x_BTD, *places, (4, 4))
  own, same, stretched = (np.asarray(decode(in_grid(grid))) for grid in (None, (4, 4), (8, 8)))
  np.testing.assert_allclose(same, own, atol=1e-6)
  assert abs(stretched - own).max() > 1e-3
