"""Checks gated MLPs, the rotary positions of DINOv3 and EVA-02, and that all tables know them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from tests.conftest import run_model
from vit_jax.distributed import devices, sharding
from vit_jax.model import (
  ADAPTED,
  MLPS,
  POSITIONS,
  adapted,
  applied,
  check_parameters,
  make,
  merged,
)
from vit_jax.model.layers import Block, Mlp
from vit_jax.optim import muon, optimizers
from vit_jax.training import tracing
from vit_jax.weights import flatten_params

SIZES = dict(patch_size=4, width=16, depth=2, num_heads=2, mlp_dim=24)
IMAGE = np.random.RandomState(0).normal(size=(2, 8, 12, 3)).astype(np.float32)
LORA = {'lora': {'rank': 3, 'scale': 0.7}}


def build(**fields):
  """Returns a small model and parameters that are all random."""
  model = make(None, 5, **SIZES | fields)
  shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGE)['params']
  draw = np.random.RandomState(1)
  return model, jax.tree.map(lambda x: draw.normal(size=x.shape).astype(np.float32) / 3, shapes)


F64 = {
  'gelu': lambda x: x * special.ndtr(x),
  'silu': lambda x: x * special.expit(x),
}


@pytest.mark.parametrize('kind', MLPS)
@pytest.mark.parametrize('activation', F64)
def test_every_mlp_equals_its_formula_in_float64(kind, activation):
  block = Block(1, 1, mlp_dim=24, mlp=kind, activation=activation, norm_epsilon=1e-3)
  x_BND = np.random.RandomState(0).normal(size=(2, 3, 16)).astype(np.float32)
  shapes = jax.eval_shape(Mlp(block).init, jax.random.key(0), x_BND)['params']
  draw = np.random.RandomState(1)
  params = jax.tree.map(lambda x: draw.normal(size=x.shape).astype(np.float32), shapes)
  p = jax.tree.map(np.float64, params)
  linear = lambda name, x: x @ p[name]['kernel'] + p[name]['bias']
  if kind == 'plain':
    hidden = F64[activation](linear('up', x_BND))
  else:
    hidden = F64[activation](linear('gate', x_BND)) * linear('up', x_BND)
  if kind == 'gated_norm':
    deviation = np.sqrt(hidden.var(-1, keepdims=True) + 1e-3)
    hidden = (hidden - hidden.mean(-1, keepdims=True)) / deviation
    hidden = hidden * p['hidden_norm']['scale'] + p['hidden_norm']['bias']
  found = jax.jit(Mlp(block).apply)({'params': params}, x_BND)
  want = linear('down', hidden)
  np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())


def test_dinov3_angles_equal_the_closed_form_on_any_grid():
  model = make(None, 5, **SIZES, position='rope_unit', pool='cls', num_registers=2, rope_theta=9)
  for h, w in ((2, 3), (4, 6), (5, 1)):
    cos, sin = POSITIONS['rope_unit'].angles(model, (h, w), (7, 7))
    assert cos.shape == (3 + h * w, 4) and cos.dtype == np.float32
    np.testing.assert_array_equal((cos[:3], sin[:3]), [np.ones((3, 4)), np.zeros((3, 4))])
    for token in range(h * w):
      y, x = token // w, token % w
      y, x = (2 * (i + 0.5) / n - 1 for i, n in ((y, h), (x, w)))
      angle = [2 * math.pi * c / period for c in (y, x) for period in (1, 3)]
      np.testing.assert_allclose(cos[3 + token], np.cos(angle), atol=1e-6)
      np.testing.assert_allclose(sin[3 + token], np.sin(angle), atol=1e-6)


def test_eva_angles_measure_corners_in_the_reference_grid():
  fields = dict(position='learned_rope', pool='cls', rope_theta=100, rope_grid=(16, 8))
  model = make(None, 5, **SIZES, **fields)
  cos, sin = POSITIONS['learned_rope'].angles(model, (4, 2), (4, 2))
  for token in range(8):
    y, x = token // 2 * 16 / 4, token % 2 * 8 / 2
    angle = [y, y / 10, x, x / 10]
    np.testing.assert_allclose(cos[1 + token], np.cos(angle), atol=1e-6)
    np.testing.assert_allclose(sin[1 + token], np.sin(angle), atol=1e-6)
  own = POSITIONS['learned_rope'].angles(model.clone(rope_grid=None), (4, 2), (4, 2))
  again = POSITIONS['learned_rope'].angles(model.clone(rope_grid=(4, 2)), (4, 2), (9, 9))
  np.testing.assert_array_equal(own, again)


@pytest.mark.parametrize('position', ['rope_unit', 'learned_rope'])
def test_swapping_patches_changes_the_output(position):
  model, params = build(position=position, pool='cls')
  if position == 'learned_rope':  # only the rotation is left
    params = params | {'pos_embedding': np.zeros_like(params['pos_embedding'])}
  swapped = np.concatenate([IMAGE[:, 4:], IMAGE[:, :4]], axis=1)
  change = run_model(model, params, IMAGE) - run_model(model, params, swapped)
  assert np.abs(change).max() > 1e-3


def test_a_key_bias_is_absent_and_not_zero():
  for fields, query, key in (
    (dict(key_bias=False), True, False),
    (dict(), True, True),
    (dict(qkv_bias=False, key_bias=True), False, True),
    (dict(qkv_bias=False), False, False),
  ):
    _, params = build(**fields)
    attention = params['block_1']['attention']
    assert ('bias' in attention['query']) == ('bias' in attention['value']) == query
    assert ('bias' in attention['key']) == key


def test_map_pooling_stays_plain_in_a_gated_model():
  _, params = build(pool='map', mlp='gated_norm', out_norm=True, key_bias=False)
  assert set(params['map']['mlp']) == {'up', 'down'}
  assert set(params['map']['attention']) == {'query', 'key', 'value', 'out'}
  assert set(params['map']['attention']['key']) == {'kernel', 'bias'}


@pytest.mark.parametrize('fields, message', [
    (dict(mlp='swiglu'), "model.mlp: unknown 'swiglu'. .*Valid: gated, gated_norm, plain"),
    (dict(position='rope_unit', head_dim=6), 'model.position=rope_unit needs a head size'),
    (dict(position='rope_unit', rope_theta=0.0), 'rope_theta must be positive, got 0.0'),
    (dict(position='rope_unit', rope_theta=float('inf')), 'rope_theta must be positive'),
    (dict(position='learned_rope', rope_grid=(16,)), 'rope_grid must be two positive integers'),
])  # fmt: skip
def test_invalid_choices_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    make(None, 5, **SIZES | fields)


@pytest.mark.parametrize('kind', MLPS)
def test_every_table_knows_every_parameter_of_a_block(kind):
  """Adapters, weight decay, Muon, splitting, freezing and layer decay, by the parameter's name."""
  _, params = build(mlp=kind, qk_norm=True, out_norm=True, layer_scale=0.1, position='rope_unit')
  whole = adapted(params, jax.random.key(0), 'lora', LORA)
  kernels = {n for n in flatten_params(params) if n.startswith('block_') and n.endswith('kernel')}
  found = {n.removeprefix('lora/').rpartition('/')[0] for n in flatten_params(whole['lora'])}
  assert found == {name.rpartition('/')[0] for name in kernels}
  assert len(kernels) == 2 * (6 + (kind != 'plain'))
  assert {name.split('/')[-2] for name in kernels} <= set(ADAPTED)

  decayed = flatten_params(optimizers.is_matrix(params))
  assert {n for n, yes in decayed.items() if yes} == kernels | {'embedding/kernel', 'head/kernel'}
  sides = muon.block_matrices(params)['block_0']['mlp']
  assert all(sides[name]['kernel'].reduction_axis == (0,) for name in sides if 'norm' not in name)
  scaled = optimizers.scale_by_layer(0.5).update(params, ())[0]
  np.testing.assert_array_equal(scaled['block_0']['mlp']['up']['kernel'],
                                params['block_0']['mlp']['up']['kernel'] / 4)  # fmt: skip
  trained, frozen = optimizers.split_frozen(params, 'backbone')
  assert set(trained) == {'head'} and 'block_0' in frozen

  mesh = jax.sharding.AbstractMesh((1, 1, 2), devices.AXES)
  whole_on_each = ('query_norm', 'key_norm', 'attention_norm', 'mlp_norm')
  for path, x in jax.tree_util.tree_leaves_with_path(params['block_0']):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    whole = any(f'{part}/' in f'/{name}' and 'hidden' not in name for part in whole_on_each)
    whole |= name in ('attention/out/bias', 'mlp/down/bias', 'attention_scale', 'mlp_scale')
    assert ('tensor' in sharding.partition(mesh, path, x.shape)) != whole, name


def test_an_mlp_with_a_layer_that_no_table_lists_is_refused(monkeypatch):
  mine = lambda block, dense, x_BND: dense((block.mlp_dim,), name='mine')(x_BND)
  monkeypatch.setitem(MLPS, 'mine', mine)
  with pytest.raises(
    ValueError,
    match='model.mlp=mine creates layers that are missing in vit_jax.model.ADAPTED: mine',
  ):
    check_parameters(make(None, 5, **SIZES, mlp='mine'), (8, 8, 3))
  monkeypatch.setitem(ADAPTED, 'mine', 1)
  check_parameters(make(None, 5, **SIZES, mlp='mine'), (8, 8, 3))


@pytest.mark.parametrize('kind', ['gated', 'gated_norm'])
def test_lora_on_a_gated_mlp_equals_the_merged_kernels(kind):
  model, params = build(mlp=kind, activation='silu', out_norm=True)
  draw = np.random.RandomState(2)
  random = lambda x: draw.normal(size=x.shape).astype(np.float32) / 3
  factors = adapted(params, jax.random.key(0), 'lora', LORA)['lora']
  params = params | {'lora': jax.tree.map(random, factors)}
  base = {name: leaves for name, leaves in params.items() if name != 'lora'}
  with applied(params, LORA):
    found = jax.jit(model.apply)({'params': params}, IMAGE)
  want = run_model(model, merged(params, LORA), IMAGE)
  np.testing.assert_allclose(found, want, atol=1e-4 * np.abs(want).max())
  assert np.abs(want - run_model(model, base, IMAGE)).max() > 0.01


def test_a_gated_mlp_costs_one_and_a_half_times_the_flops_of_a_plain_one():
  flops = {}
  for kind in MLPS:
    model, params = build(mlp=kind)
    image = jax.ShapeDtypeStruct((1, *IMAGE.shape[1:]), jnp.float32)
    flops[kind] = tracing.forward_flops(model, params, image)['block_*/mlp']
  tokens, blocks = 7, 2  # 6 patches and the class token
  assert flops['plain'] == blocks * 2 * tokens * (2 * 16 * 24)
  assert flops['gated'] == flops['gated_norm'] == flops['plain'] * 3 // 2
