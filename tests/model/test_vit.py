"""Checks the model against the outputs of the paper's code, float64 and exact properties."""

import functools
import math
import re
import types

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import DATA, init_params, run_model
from vit_jax.model import pooling, positions, resnet, variants
from vit_jax.model.encoder import Encoder, block_tokens
from vit_jax.model.layers import Attention, Block, CpuLayerNorm, Dropout, matmul

# Parameter names in the paper's files, as patterns for both of their spellings, and our names.
PAPER_NAMES = (
  (r'Transformer/posembed_input/', ''),
  (r'Transformer/encoder_norm', 'norm'),
  (r'Transformer/encoderblock_(\d+)', r'block_\1'),
  (r'LayerNorm_0', 'attention_norm'),
  (r'LayerNorm_[12]', 'mlp_norm'),
  (r'MultiHeadDotProductAttention_\d', 'attention'),
  (r'MlpBlock_\d/Dense_0', 'mlp/up'),
  (r'MlpBlock_\d/Dense_1', 'mlp/down'),
)


def paper_params(path):
  """Returns the weights of one of the paper's npz files as a tree with our names."""
  tree = {}
  for name, array in np.load(path).items():
    for pattern, ours in PAPER_NAMES:
      name = re.sub(pattern, ours, name)
    *parents, leaf = name.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = array
  return tree


@pytest.mark.parametrize(
  'folder, fields',
  [
    ('paper_token', dict(patch_size=4, num_heads=2, mlp_dim=40, pool='cls')),
    ('paper_gap', dict(patch_size=8, num_heads=3, mlp_dim=48, pool='gap')),
  ],
)
def test_logits_equal_the_papers_code(folder, fields):
  model = variants.make('tiny', 5, width=24, depth=2, **fields)
  params = paper_params(DATA / folder / 'weights.npz')
  io = np.load(DATA / folder / 'io.npz')
  logits = run_model(model, params, io['image'])
  np.testing.assert_allclose(logits, io['output'], atol=2e-5)


@pytest.mark.parametrize(
  'variant, size, classes, count',
  [
    ('B/16', 224, 1000, 86_567_656),
    ('L/16', 224, 1000, 304_326_632),
    ('H/14', 224, 1000, 632_045_800),
    ('tiny', 32, 10, 119_194),
    ('small', 32, 10, 3_722_250),
  ],
)
def test_variants_have_the_published_parameter_counts(variant, size, classes, count):
  image = jnp.zeros((1, size, size, 3))
  variables = jax.eval_shape(variants.make(variant, classes).init, jax.random.key(0), image)
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables)) == count


@pytest.mark.parametrize(
  'variant, width, depth, heads, mlp_dim',
  [
    ('Ti', 192, 12, 3, 768),  # Touvron et al. 2020, 2012.12877, Table 1
    ('S', 384, 12, 6, 1536),
    ('B', 768, 12, 12, 3072),  # Dosovitskiy et al. 2020, 2010.11929, Table 1
    ('L', 1024, 24, 16, 4096),
    ('H', 1280, 32, 16, 5120),
    ('g', 1408, 40, 16, 6144),  # Zhai et al. 2021, 2106.04560, Table 2
    ('G', 1664, 48, 16, 8192),
  ],
)
def test_variants_have_the_sizes_of_the_papers(variant, width, depth, heads, mlp_dim):
  """The number of heads changes no parameter count."""
  model = variants.make(f'{variant}/16', 10)
  assert (model.width, model.depth, model.num_heads, model.mlp_dim) == (
    width, depth, heads, mlp_dim
  )  # fmt: skip


def small(**fields):
  sizes = dict(num_classes=5, width=16, depth=2, num_heads=2, mlp_dim=24)
  return variants.make('tiny', **sizes | fields)


def perturbed(model, image, seed=0):
  """Returns parameters that are all random, including biases, scales and the head."""
  params = model.init(jax.random.key(seed), image)['params']
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
  leaves = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
  return {'params': jax.tree.unflatten(tree, leaves)}


IMAGE = np.random.RandomState(0).normal(size=(4, 8, 16, 3)).astype(np.float32)


@pytest.mark.slow
@pytest.mark.slow_after_first
@pytest.mark.parametrize('pool, shape', [
    ('cls', (4, 5)), ('gap', (4, 5)), ('map', (4, 5)), ('none', (4, 8 + 2, 5)),
])  # fmt: skip
@pytest.mark.parametrize('position', positions.POSITIONS)
def test_every_pool_and_position(pool, position, shape):
  model = small(
    pool=pool,
    position=position,
    num_registers=2,
    qk_norm=True,
    layer_scale=0.1,
    representation_size=12,
  )
  variables = perturbed(model, IMAGE)
  logits = model.apply(variables, IMAGE)
  assert logits.shape == shape and logits.dtype == jnp.float32
  # Swapping patches changes the pooled logits only if there are position embeddings.
  swapped = model.apply(
    variables, IMAGE[:, :, ::-1].reshape(4, 8, 4, 4, 3)[:, :, :, ::-1].reshape(IMAGE.shape)
  )
  if pool != 'none':
    assert np.allclose(logits, swapped, atol=1e-5) == (position == 'none')


def rope_angles(grid, position='rope', **fields):
  """Returns the angles of a model with heads of size 8 and, by default, a class token."""
  model = small(position=position, **{'pool': 'cls'} | fields)
  return positions.POSITIONS[position].angles(model, grid, grid)


def test_sincos_positions_equal_the_closed_form():
  table = positions.sincos(3, 5, 16)[0]
  for token, (y, x) in enumerate((y, x) for y in range(3) for x in range(5)):
    omega = [10_000 ** -(i / 3) for i in range(4)]
    want = [f(p * o) for p in (x, y) for f in (math.sin, math.cos) for o in omega]
    np.testing.assert_allclose(table[token], want, atol=1e-6)


def test_rope_attention_between_equal_tokens_depends_only_on_their_offset():
  module, x_BND = Attention(Block(num_heads=2, head_dim=8, mlp_dim=1)), jnp.ones((1, 13, 16))
  params = jax.jit(module.init)(jax.random.key(0), x_BND)['params']
  rope_NE = rope_angles((3, 4))
  _, sown = module.apply({'params': params}, x_BND, None, rope_NE, mutable=['intermediates'])
  logit_KNN = np.log(sown['intermediates']['attention_BKNN'][0][0, :, 1:, 1:])
  logit_KNN -= np.einsum('knn->kn', logit_KNN)[..., None]
  at = logit_KNN.reshape(2, 3, 4, 3, 4)
  np.testing.assert_allclose(at[:, 0, 0, 1, 2], at[:, 1, 1, 2, 3], atol=1e-5)
  np.testing.assert_allclose(at[:, 2, 3, 0, 1], at[:, 2, 2, 0, 0], atol=1e-5)
  assert np.abs(at[:, 0, 0]).max() > 0.01


def normalising_attention(x_ND, rope_NE=None, **fields):
  """Returns random parameters and the weights `[N, N]` of one head with `qk_norm`."""
  module = Attention(Block(num_heads=1, head_dim=8, mlp_dim=1, qk_norm=True, **fields))
  shapes = jax.eval_shape(module.init, jax.random.key(0), x_ND[None])['params']
  draw = np.random.RandomState(1)
  params = jax.tree.map(lambda x: draw.normal(size=x.shape).astype(np.float32), shapes)
  apply = jax.jit(functools.partial(module.apply, mutable=['intermediates']))
  _, sown = apply({'params': params}, x_ND[None], rope_NE=rope_NE)
  return params, np.asarray(sown['intermediates']['attention_BKNN'][0][0, 0])


def test_queries_and_keys_are_normalised_before_rotation():
  """If the norm came second, its scales would make the logits depend on more than the offset."""
  rope_NE = rope_angles((3, 4), pool='gap')
  at = np.log(normalising_attention(np.ones((12, 8), np.float32), rope_NE)[1]).reshape(3, 4, 3, 4)
  at -= np.einsum('hwhw->hw', at)[..., None, None]
  np.testing.assert_allclose(at[0, 0, 1, 2], at[1, 1, 2, 3], atol=1e-4)
  assert np.abs(at).max() > 0.1


def test_queries_and_keys_are_normalised_with_the_models_epsilon():
  x_ND = np.random.RandomState(0).normal(size=(6, 8)).astype(np.float32)
  params, got_NN = normalising_attention(x_ND, norm_epsilon=0.5)

  def normalised(name):
    dense, norm = params[name], params[f'{name}_norm']
    y_NE = x_ND @ dense['kernel'][:, 0] + dense['bias'][0]
    y_NE = (y_NE - y_NE.mean(1, keepdims=True)) / np.sqrt(y_NE.var(1, keepdims=True) + 0.5)
    return y_NE * norm['scale'] + norm['bias']

  weights_NN = np.exp(normalised('query') @ normalised('key').T / math.sqrt(8))
  weights_NN /= weights_NN.sum(1, keepdims=True)
  np.testing.assert_allclose(got_NN, weights_NN, atol=1e-5)


def test_map_pooling_has_biases_and_no_norms_for_any_encoder():
  model = small(pool='map', qk_norm=True, qkv_bias=False)
  params = jax.eval_shape(model.init, jax.random.key(0), IMAGE)['params']
  query, norm = params['block_0']['attention']['query'], params['block_0']['attention']['key_norm']
  assert set(query) == {'kernel'} and set(norm) == {'scale', 'bias'}
  own = params['map']['attention']
  assert set(own) == {'query', 'key', 'value', 'out'}
  assert all(set(leaves) == {'kernel', 'bias'} for leaves in own.values())


@pytest.mark.parametrize('norm_after_pool', [False, True])
def test_every_norm_uses_the_epsilon_of_the_model(norm_after_pool):
  found = {}

  def note(call, args, kwargs, context):
    if isinstance(context.module, CpuLayerNorm):
      found['/'.join(context.module.path)] = context.module.epsilon
    return call(*args, **kwargs)

  model = small(depth=1, pool='map', pre_norm=True, qk_norm=True, norm_epsilon=0.5)
  model = model.clone(norm_after_pool=norm_after_pool)
  with nn.intercept_methods(note):
    jax.eval_shape(model.init, jax.random.key(0), IMAGE)
  inside = ('attention_norm', 'attention/query_norm', 'attention/key_norm', 'mlp_norm')
  names = {'pre_norm', *(f'block_0/{name}' for name in inside), 'norm', 'map/mlp_norm'}
  assert found == dict.fromkeys(names, 0.5)


def test_stem_kernels_are_standardised_with_epsilon_1e_5():
  kernel = np.random.RandomState(0).normal(size=(1, 1, 3, 4)).astype(np.float32) * 1e-5
  image = np.random.RandomState(1).normal(size=(2, 5, 5, 3)).astype(np.float32)
  want = image @ ((kernel - kernel.mean(2)) / (kernel.std(2) + 1e-5))[0, 0]
  found = resnet.StdConv(4, 1).apply({'params': {'kernel': kernel}}, image)
  np.testing.assert_allclose(found, want, atol=1e-5)


def test_a_unit_of_the_stem_starts_as_the_identity():
  image = np.random.RandomState(0).rand(1, 3, 3, 128).astype(np.float32)
  out, _ = jax.jit(resnet.Unit(32).init_with_output)(jax.random.key(0), image)
  np.testing.assert_array_equal(out, image)


def test_rope_products_depend_only_on_the_offset():
  cos, sin = rope_angles((4, 6))
  query, key = np.random.RandomState(1).normal(size=(2, 8))
  turn = lambda x: np.asarray(
    positions.rotate(jnp.tile(x, (1, 25, 1, 1)).astype(jnp.float32), cos, sin)
  )
  product = turn(query)[0, 1:, 0] @ turn(key)[0, 1:, 0].T
  at = lambda y, x: y * 6 + x
  np.testing.assert_allclose(product[at(0, 0), at(1, 2)], product[at(2, 3), at(3, 5)], atol=1e-5)
  assert abs(product[at(0, 0), at(1, 2)] - product[at(0, 0), at(2, 1)]) > 1e-3
  np.testing.assert_allclose(turn(query)[0, 0, 0], query, atol=1e-6)  # the prefix has no position


@pytest.mark.slow
def test_sowing_attention_maps_does_not_change_the_logits():
  model = small(pool='cls')
  variables = perturbed(model, IMAGE)
  logits, sown = model.apply(variables, IMAGE, mutable=['intermediates'])
  maps = [sown['intermediates'][f'block_{i}']['attention']['attention_BKNN'][0] for i in range(2)]
  assert [m.shape for m in maps] == [(4, 2, 9, 9)] * 2
  np.testing.assert_allclose(np.sum(maps, axis=-1), 1, atol=1e-5)
  np.testing.assert_allclose(logits, model.apply(variables, IMAGE), atol=1e-6)


def test_products_with_few_outputs_use_the_barrier_and_keep_their_gradient():
  x, kernel = np.random.RandomState(5).normal(size=(2, 40, 40)).astype(np.float32)
  kernel = kernel[:, :8]
  assert 'optimization_barrier' in str(jax.make_jaxpr(matmul)(x, kernel))
  assert 'optimization_barrier' not in str(jax.make_jaxpr(matmul)(x[:, :8], kernel.T))
  y, pull = jax.vjp(matmul, x, kernel)
  dx, dkernel = pull(y)
  np.testing.assert_allclose(y, x @ kernel, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(dx, y @ kernel.T, rtol=1e-4, atol=1e-3)
  np.testing.assert_allclose(dkernel, x.T @ y, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('remat', ['dots', 'full'])
def test_remat_changes_nothing(remat):
  def gradient(model):
    loss = lambda p: model.apply(p, IMAGE, train=True, rngs={'dropout': jax.random.key(3)}) ** 2
    return jax.jit(jax.grad(lambda p: loss(p).mean()))(perturbed(model, IMAGE))

  plain, saved = gradient(small(dropout=0.1)), gradient(small(dropout=0.1, remat=remat))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, saved)


@pytest.mark.slow
def test_bfloat16_computes_near_float32_and_keeps_float32_parameters():
  model = small(dtype='bfloat16')
  variables = perturbed(model, IMAGE)
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  exact = jax.jit(small().apply)(variables, IMAGE)
  logits = jax.jit(model.apply)(variables, IMAGE)
  assert logits.dtype == jnp.float32  # the head's product is computed in float32 too
  assert 0 < np.abs(logits - exact).max() < 0.1 * np.abs(exact).max()


def test_logits_are_float32_and_features_have_the_type_of_the_computation():
  image = jax.ShapeDtypeStruct(IMAGE.shape, jnp.float32)
  for classes, wanted in ((5, 'float32'), (None, 'bfloat16')):
    model = small(dtype='bfloat16', num_classes=classes)
    out, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), image)
    assert out.dtype == wanted


@pytest.mark.slow_after_first
@pytest.mark.parametrize('rate', ['dropout', 'attention_dropout', 'stochastic_depth'])
def test_dropout_depends_only_on_the_example(rate):
  model = small(**{rate: 0.3})
  variables = perturbed(model, IMAGE)
  key = {'dropout': jax.random.key(4)}

  @jax.jit
  def apply(image_BHWC, example_B):
    return model.apply(variables, image_BHWC, train=True, example_B=example_B, rngs=key)

  rows = np.array([3, 1, 0, 2])
  whole = apply(IMAGE, np.arange(4))
  np.testing.assert_allclose(apply(IMAGE[rows], rows), whole[rows], atol=1e-5)
  assert np.abs(apply(IMAGE, np.arange(4, 8)) - whole).max() > 0.01


def drops(**fields):
  """Returns (module, rate, whole, shape) of each `Dropout` call in a training step, in order."""
  calls = []

  def spy(call, args, kwargs, context):
    module = context.module
    if isinstance(module, Dropout) and module.rate:
      calls.append((module.path[:-1], round(module.rate, 6), module.whole, args[0].shape))
    return call(*args, **kwargs)

  model = small(depth=3, **fields)
  init = lambda key, image: model.init({'params': key, 'dropout': key}, image, train=True)
  with nn.intercept_methods(spy):
    jax.eval_shape(init, jax.random.key(0), IMAGE)
  return calls


TOKENS = (4, 9, 16)  # shape of the tokens of `IMAGE`: 8 patches and the class token
BLOCKS = ('block_0', 'block_1', 'block_2')


def test_dropout_follows_positions_branches_and_hidden_mlp_layers():
  """The paper's code has dropout in the same places; its second one in an MLP ends the branch."""
  want = [((), 0.1, False, TOKENS)]
  for block in BLOCKS:
    want += [
      ((block,), 0.1, False, TOKENS),
      ((block, 'mlp'), 0.1, False, (4, 9, 24)),
      ((block,), 0.1, False, TOKENS),
    ]
  assert drops(dropout=0.1) == want


def test_attention_dropout_has_its_own_rate():
  weights = (4, 2, 9, 9)
  want = [((block, 'attention'), 0.2, False, weights) for block in BLOCKS]
  assert drops(attention_dropout=0.2) == want
  assert [call for call in drops(dropout=0.1, attention_dropout=0.2) if call[3] == weights] == want


class Twice(nn.Module):
  """Applies dropout in two places."""

  @nn.compact
  def __call__(self, x, example_B):
    return jnp.stack([Dropout(0.5)(x, example_B), Dropout(0.5)(x, example_B)])


@pytest.mark.slow
def test_dropout_masks_differ_between_places_and_keys():
  apply = lambda seed: Twice().apply(
    {}, jnp.ones((4, 50)), jnp.arange(4), rngs={'dropout': jax.random.key(seed)}
  )
  masks = np.concatenate([apply(0), apply(1)]).reshape(16, 50)
  assert len({tuple(mask) for mask in masks}) == 16


@pytest.mark.slow
def test_attention_dropout_keeps_the_mean():
  """Eight equal tokens have weight 1/8 each: if k are kept, the output is k / (8 (1 - rate))."""
  module = Attention(Block(num_heads=1, head_dim=3, mlp_dim=1, attention_dropout=0.25))
  x_BND = jnp.ones((64, 8, 2))
  params = jax.jit(module.init)(jax.random.key(0), x_BND)
  key = {'dropout': jax.random.key(1)}
  kept = 6 * module.apply(params, x_BND, jnp.arange(64), rngs=key) / module.apply(params, x_BND)
  np.testing.assert_allclose(kept, np.round(kept), atol=1e-4)
  assert kept.min() < 5 and kept.max() > 7.9 and abs(kept.mean() - 6) < 0.2


def test_stochastic_depth_rises_linearly_from_zero():
  want = [((block,), rate, True, TOKENS) for block, rate in (('block_1', 0.2), ('block_2', 0.4))]
  assert drops(stochastic_depth=0.4) == [want[0]] * 2 + [want[1]] * 2


@pytest.mark.slow_after_first
@pytest.mark.parametrize('whole', [False, True])
def test_dropout_keeps_the_mean(whole):
  x = jnp.ones((4000, 3, 5))
  y = Dropout(0.25, whole=whole).apply({}, x, jnp.arange(4000), rngs={'dropout': jax.random.key(0)})
  assert set(np.unique(y)) == {0, np.float32(1 / 0.75)}
  assert abs(y.mean() - 1) < 0.03
  one_draw_an_example = bool((y.reshape(4000, -1).std(axis=1) == 0).all())
  assert one_draw_an_example == whole


@pytest.mark.slow
def test_parameters_start_as_in_the_papers_code():
  """LayerScale starts at its constant, and registers are drawn like positions.

  Random parameters are checked by the standard deviation of their draws.
  """
  model = small(width=64, head_dim=24, mlp_dim=96, depth=1, num_registers=8, layer_scale=0.3)
  params = jax.jit(model.init)(jax.random.key(0), IMAGE)['params']
  found = {
    jax.tree_util.keystr(path, simple=True, separator='/').removeprefix('block_0/'): x
    for path, x in jax.tree_util.tree_leaves_with_path(params)
  }
  constant = {'cls': 0, 'attention_scale': 0.3, 'mlp_scale': 0.3, 'head/kernel': 0, 'head/bias': 0}
  constant |= {f'{name}norm/scale': 1 for name in ('', 'mlp_', 'attention_')}
  constant |= {f'{name}norm/bias': 0 for name in ('', 'mlp_', 'attention_')}
  heads = [f'attention/{name}' for name in ('query', 'key', 'value', 'out')]
  constant |= {f'{name}/bias': 0 for name in ('embedding', *heads)}
  deviation = {'pos_embedding': 0.02, 'registers': 0.02, 'mlp/up/bias': 1e-6, 'mlp/down/bias': 1e-6}
  deviation |= {'embedding/kernel': (4 * 4 * 3) ** -0.5}  # LeCun initialisation
  sums = {'mlp/up': 64 + 96, 'mlp/down': 96 + 64} | dict.fromkeys(heads, 64 + 2 * 24)
  deviation |= {f'{name}/kernel': (2 / total) ** 0.5 for name, total in sums.items()}  # Xavier
  assert found.keys() == constant.keys() | deviation.keys()
  for name, value in constant.items():
    np.testing.assert_array_equal(found[name], np.float32(value), err_msg=name)
  for name, value in deviation.items():
    draws = found[name].size
    assert found[name].std() == pytest.approx(value, rel=4 / (2 * draws) ** 0.5), name
    assert abs(found[name].mean()) < 4 * value / draws**0.5, name
  for name, total in sums.items():  # Xavier's draws are uniform, so they have an upper bound
    edge = np.abs(found[f'{name}/kernel']).max() / (6 / total) ** 0.5
    assert 0.99 < edge <= 1 + 1e-6, name


def test_the_head_starts_at_zero():
  model = small()
  assert not model.apply(model.init(jax.random.key(0), IMAGE), IMAGE).any()


@pytest.mark.parametrize(
  'fields, message',
  [
    (dict(variant='B/17x'), 'B/16'),
    (dict(variant='B'), 'patch'),
    (dict(variant='tinny'), 'Did you mean tiny'),
    (dict(width=51), 'model.head_dim'),
    (dict(pool='clss'), 'Did you mean cls'),
    (dict(position='rope', head_dim=6), 'divisible by 4'),
    (dict(position='sincos', width=18), 'divisible by 4'),
    (dict(widht=8), 'Did you mean width'),
    (dict(dropout=1.0), r'model.dropout must be in \[0, 1\)'),
    (dict(attention_dropout=-0.1), r'model.attention_dropout must be in \[0, 1\)'),
    (dict(stochastic_depth=1.0), r'model.stochastic_depth must be in \[0, 1\)'),
    (dict(depth=0), 'positive'),
    (dict(patch_size=(4, 4, 4)), 'patch_size'),
    (dict(position_grid=(0, 2)), 'model.position_grid must be two positive integers'),
    (dict(position_grid=(14.5, 14)), 'model.position_grid must be two positive integers'),
    (dict(resnet=(2, 1.5), patch_size=8), 'a positive number of units for each stage'),
    (dict(resnet=(2, 0), patch_size=8), 'a positive number of units for each stage'),
    (dict(resnet=(1,), resnet_width=48), 'a width that is a positive multiple of 32'),
    (dict(resnet=(1,), resnet_width=0), 'a width that is a positive multiple of 32'),
    (dict(resnet=(1,), resnet_width=-32), 'a width that is a positive multiple of 32'),
    (dict(pool='distilled', num_registers=1, cosine=True), 'model.cosine is not supported'),
  ],
)
def test_invalid_models_are_rejected(fields, message):
  with pytest.raises(ValueError, match=message):
    small(**fields) if 'variant' not in fields else variants.make(fields['variant'], 5)


@pytest.mark.slow
@pytest.mark.parametrize('remat', ['none', 'full'])
def test_block_tokens_returns_the_tokens_after_each_block(remat):
  model, image_BHWC = small(depth=3, remat=remat, pool='gap'), jnp.ones((2, 8, 8, 3))
  params = init_params(model, image_BHWC)
  blocks = block_tokens(model, params, image_BHWC)
  assert len(blocks) == 3
  shorter = model.clone(depth=2, num_classes=None, pool='none')
  kept = {name: leaves for name, leaves in params.items() if name not in ('block_2', 'head')}
  norm = {'scale': jnp.ones_like(params['norm']['scale']), 'bias': params['norm']['bias']}
  out = run_model(shorter, kept | {'norm': norm}, image_BHWC)
  x = blocks[1]
  want = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + model.norm_epsilon)
  np.testing.assert_allclose(out, want, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('remat', ['none', 'dots'])
def test_encoder_draws_are_the_same_alone_and_in_a_model(remat):
  """Random draws depend on module paths, and an encoder in a model adds nothing to them."""
  fields = dict(attention_dropout=0.1, stochastic_depth=0.3, layer_scale=0.1, remat=remat)
  model = small(num_classes=None, pool='none', position='none', class_token=False, **fields)
  params = init_params(model, IMAGE)
  embedding = lambda module, _: module.name == 'embedding'
  apply = functools.partial(model.apply, {'params': params}, IMAGE, train=True)
  key = {'dropout': jax.random.key(1)}
  want, state = apply(rngs=key, capture_intermediates=embedding)
  x_BND = state['intermediates']['embedding']['__call__'][0].reshape(4, 8, 16)

  encoder = Encoder(model.block, model.depth, remat=remat)
  own = init_params(encoder, x_BND)
  assert own.keys() == {'block_0', 'block_1', 'norm'} == params.keys() - {'embedding'}
  jax.tree.map(np.testing.assert_array_equal, own, {name: params[name] for name in own})
  np.testing.assert_array_equal(
    encoder.apply({'params': own}, x_BND, jnp.arange(4), rngs=key), want
  )


def test_image_not_divisible_into_patches_is_rejected():
  with pytest.raises(ValueError, match='10x16 pixels does not divide into patches of 4x4'):
    small().init(jax.random.key(0), jnp.zeros((1, 10, 16, 3)))


def test_the_attention_of_a_map_head_is_zero_before_the_patches():
  share_BK1P = np.random.RandomState(0).random((2, 3, 1, 4))
  sown = {'map': {'attention': {'attention_BKNN': (share_BK1P,)}}}
  found_BKN = pooling.map_probe(types.SimpleNamespace(num_prefix=2), sown)
  assert not found_BKN[:, :, :2].any()
  np.testing.assert_array_equal(found_BKN[:, :, 2:], share_BK1P[:, :, 0].astype(np.float32))


@pytest.mark.parametrize('name', ['B/16', 'S/32', 'tiny', 'wide', 'R50+B/16', 'R+Ti/32'])
def test_the_variant_of_a_model_is_found_from_its_sizes(name):
  assert variants.variant_of(variants.make(name, 10)) == name
  assert variants.variant_of(variants.make(name, 10, depth=3)) is None
