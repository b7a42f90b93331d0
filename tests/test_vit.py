"""The model against the paper's own outputs, float64 and exact properties."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import DATA
from vit_jax import positions, vit
from vit_jax.matmul import matmul

# The paper's names, in both spellings, and ours.
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
  """The weights of one of the paper's npz files as our tree."""
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
def test_logits_are_those_of_the_papers_code(folder, fields):
  model = vit.make('tiny', 5, width=24, depth=2, **fields)
  params = paper_params(DATA / folder / 'weights.npz')
  io = np.load(DATA / folder / 'io.npz')
  logits = model.apply({'params': params}, io['image'], train=False)
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
def test_parameter_counts(variant, size, classes, count):
  image = jnp.zeros((1, size, size, 3))
  variables = jax.eval_shape(vit.make(variant, classes).init, jax.random.key(0), image)
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables)) == count


def small(**fields):
  return vit.make('tiny', 5, **{'width': 16, 'depth': 2, 'num_heads': 2, 'mlp_dim': 24} | fields)


def perturbed(model, image, seed=0):
  """Parameters of the model, all random: biases, scales and head too."""
  params = jax.jit(model.init)(jax.random.key(seed), image)['params']
  draw = np.random.RandomState(seed).normal
  return {'params': jax.tree.map(lambda x: x + 0.3 * draw(size=x.shape).astype(x.dtype), params)}


IMAGE = np.random.RandomState(0).normal(size=(4, 8, 16, 3)).astype(np.float32)


@pytest.mark.parametrize('pool, shape', [
    ('cls', (4, 5)), ('gap', (4, 5)), ('map', (4, 5)), ('none', (4, 8 + 2, 5)),
])  # fmt: skip
@pytest.mark.parametrize('position', vit.POSITIONS)
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
  # Patches swapped: without positions the pooled logits stay, with positions they don't.
  swapped = model.apply(
    variables, IMAGE[:, :, ::-1].reshape(4, 8, 4, 4, 3)[:, :, :, ::-1].reshape(IMAGE.shape)
  )
  if pool != 'none':
    assert np.allclose(logits, swapped, atol=1e-5) == (position == 'none')


def test_sincos_positions_are_the_closed_form():
  table = positions.sincos(3, 5, 16)[0]
  for token, (y, x) in enumerate((y, x) for y in range(3) for x in range(5)):
    omega = [10_000 ** -(i / 3) for i in range(4)]
    want = [f(p * o) for p in (x, y) for f in (math.sin, math.cos) for o in omega]
    np.testing.assert_allclose(table[token], want, atol=1e-6)


def test_rope_depends_on_the_offset_alone():
  cos, sin = positions.rope_angles(4, 6, 8, prefix=1)
  query, key = np.random.RandomState(1).normal(size=(2, 8))
  turn = lambda x: np.asarray(
    positions.rotate(jnp.tile(x, (1, 25, 1, 1)).astype(jnp.float32), cos, sin)
  )
  product = turn(query)[0, 1:, 0] @ turn(key)[0, 1:, 0].T
  at = lambda y, x: y * 6 + x
  np.testing.assert_allclose(product[at(0, 0), at(1, 2)], product[at(2, 3), at(3, 5)], atol=1e-5)
  assert abs(product[at(0, 0), at(1, 2)] - product[at(0, 0), at(2, 1)]) > 1e-3
  np.testing.assert_allclose(turn(query)[0, 0, 0], query, atol=1e-6)  # the prefix: no position


def test_attention_maps_are_sown_only_when_asked_for():
  model = small(pool='cls')
  variables = perturbed(model, IMAGE)
  logits, sown = model.apply(variables, IMAGE, mutable=['intermediates'])
  maps = [sown['intermediates'][f'block_{i}']['attention']['attention_BKNN'][0] for i in range(2)]
  assert [m.shape for m in maps] == [(4, 2, 9, 9)] * 2
  np.testing.assert_allclose(np.sum(maps, axis=-1), 1, atol=1e-5)
  np.testing.assert_allclose(logits, model.apply(variables, IMAGE), atol=1e-6)


def test_narrowing_products_have_their_gradient_arranged_and_unchanged():
  x, kernel = np.random.RandomState(5).normal(size=(2, 40, 40)).astype(np.float32)
  kernel = kernel[:, :8]
  assert 'optimization_barrier' in str(jax.make_jaxpr(matmul)(x, kernel))
  assert 'optimization_barrier' not in str(jax.make_jaxpr(matmul)(x[:, :8], kernel.T))
  y, pull = jax.vjp(matmul, x, kernel)
  dx, dkernel = pull(y)
  np.testing.assert_allclose(y, x @ kernel, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(dx, y @ kernel.T, rtol=1e-4, atol=1e-3)
  np.testing.assert_allclose(dkernel, x.T @ y, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('remat', ['dots', 'full'])
def test_remat_changes_nothing(remat):
  def gradient(model):
    loss = lambda p: model.apply(p, IMAGE, train=True, rngs={'dropout': jax.random.key(3)}) ** 2
    return jax.jit(jax.grad(lambda p: loss(p).mean()))(perturbed(model, IMAGE))

  plain, saved = gradient(small(dropout=0.1)), gradient(small(dropout=0.1, remat=remat))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, saved)


def test_bfloat16_computes_near_float32_and_keeps_float32_parameters():
  model = small(dtype='bfloat16')
  variables = perturbed(model, IMAGE)
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  exact = small().apply(variables, IMAGE)
  assert 0 < np.abs(model.apply(variables, IMAGE) - exact).max() < 0.1 * np.abs(exact).max()


def test_dropout_depends_on_the_example_alone():
  model = small(dropout=0.3, attention_dropout=0.3, stochastic_depth=0.3)
  variables = perturbed(model, IMAGE)
  apply = lambda rows: model.apply(
    variables,
    IMAGE[rows],
    train=True,
    example_B=jnp.array(rows),
    rngs={'dropout': jax.random.key(4)},
  )
  whole = apply([0, 1, 2, 3])
  np.testing.assert_allclose(whole[2:], apply([2, 3]), atol=1e-5)
  np.testing.assert_allclose(whole[1], apply([3, 1])[1], atol=1e-5)
  assert np.abs(whole - model.apply(variables, IMAGE)).max() > 0.01


@pytest.mark.parametrize('whole', [False, True])
def test_dropout_keeps_the_mean(whole):
  x = jnp.ones((4000, 3, 5))
  y = vit.Dropout(0.25, whole=whole).apply(
    {}, x, jnp.arange(4000), rngs={'dropout': jax.random.key(0)}
  )
  assert set(np.unique(y)) == {0, np.float32(1 / 0.75)}
  assert abs(y.mean() - 1) < 0.03
  one_draw_an_example = bool((y.reshape(4000, -1).std(axis=1) == 0).all())
  assert one_draw_an_example == whole


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
    (dict(dropout=1.0), r'\[0, 1\)'),
    (dict(depth=0), 'positive'),
    (dict(patch_size=(4, 4, 4)), 'patch_size'),
  ],
)
def test_impossible_models_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    small(**fields) if 'variant' not in fields else vit.make(fields['variant'], 5)


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_the_tokens_of_each_block(remat):
  model, image_BHWC = small(depth=3, remat=remat, pool='gap'), jnp.ones((2, 8, 8, 3))
  params = model.init(jax.random.key(0), image_BHWC)['params']
  blocks = vit.block_tokens(model, params, image_BHWC)
  assert len(blocks) == 3
  shorter = model.clone(depth=2, num_classes=None, pool='none')
  kept = {name: leaves for name, leaves in params.items() if name not in ('block_2', 'head')}
  norm = {'scale': jnp.ones_like(params['norm']['scale']), 'bias': params['norm']['bias']}
  out = shorter.apply({'params': kept | {'norm': norm}}, image_BHWC)
  x = blocks[1]
  want = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + model.norm_epsilon)
  np.testing.assert_allclose(out, want, atol=1e-5)


def test_an_image_that_patches_do_not_divide_is_refused():
  with pytest.raises(ValueError, match='10x16 pixels does not divide into patches of 4x4'):
    small().init(jax.random.key(0), jnp.zeros((1, 10, 16, 3)))
