"""Tests LoRA's arithmetic: merging, gradients, and a block written in PyTorch."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import run_model, small_config
from vit_jax import check
from vit_jax.model import ADAPTED, ADAPTERS, adapted, applied, check_adapter, make, merged
from vit_jax.model.adapters import Adapter
from vit_jax.weights import flatten_params

SETTINGS = {'lora': {'rank': 3, 'scale': 0.7}}
SIZES = dict(patch_size=4, width=16, depth=1, num_heads=2, head_dim=12, mlp_dim=24, dtype='float32')
IMAGES = np.random.RandomState(0).normal(size=(3, 8, 8, 3)).astype(np.float32)


def build(**overrides):
  """Returns a model, random parameters at the start (B is zero), and the same after training."""
  model = make(None, 5, **SIZES | overrides)

  def init(key):
    return adapted(model.init(key, IMAGES)['params'], key, 'lora', SETTINGS)

  random = np.random.RandomState(1)
  draw = lambda x: random.normal(size=x.shape).astype(np.float32) / 4
  trained = jax.tree.map(draw, jax.eval_shape(init, jax.random.key(0)))
  lora = jax.tree_util.tree_map_with_path(
    lambda path, x: np.zeros_like(x) if path[-1].key == 'b' else x, trained['lora']
  )
  return model, trained | {'lora': lora}, trained


@functools.partial(jax.jit, static_argnums=0)
def unmerged(model, params):
  """Returns the logits as a training step computes them."""
  with applied(params, SETTINGS):
    return model.apply({'params': params}, IMAGES)


def test_training_starts_exactly_at_the_base_model():
  model, start, _ = build()
  base = {name: leaves for name, leaves in start.items() if name != 'lora'}
  jax.tree.map(np.testing.assert_array_equal, merged(start, SETTINGS), base)
  np.testing.assert_array_equal(unmerged(model, start), run_model(model, base, IMAGES))


@pytest.mark.slow
def test_a_is_gaussian_with_variance_one_over_the_inputs_and_b_is_zero():
  model = make('S/16', 10, mlp='gated')
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))['params']
  params = {'block_0': jax.tree.map(lambda x: np.zeros(x.shape), shapes['block_0'])}
  settings = {'lora': {'rank': 16, 'scale': 1.0}}
  found = flatten_params(adapted(params, jax.random.key(0), 'lora', settings)['lora'])
  assert len(found) == 2 * len(ADAPTED)
  for name, leaf in found.items():
    inputs = 1536 if 'down' in name else 384
    wanted = inputs**-0.5 if name.endswith('/a') else 0
    assert np.sqrt(np.mean(np.square(leaf))) == pytest.approx(wanted, rel=0.05), name
  draws = [leaf.ravel()[:8].tolist() for name, leaf in found.items() if name.endswith('/a')]
  assert len({*map(tuple, draws)}) == len(draws)  # no two layers share their numbers


def test_merged_kernels_equal_the_papers_formula_in_float64():
  _, _, params = build()
  own = merged(params, SETTINGS)
  assert 'lora' not in own
  base = {name: leaves for name, leaves in params.items() if name != 'lora'}
  changed = set()
  for name, leaf in flatten_params(own).items():
    before = flatten_params(base)[name]
    factors, layer = flatten_params(params['lora']), name.removesuffix('/kernel')
    if f'{layer}/a' not in factors:
      np.testing.assert_array_equal(leaf, before)
      continue
    changed.add(name)
    a, b = (factors[f'{layer}/{letter}'].astype(np.float64) for letter in 'ab')
    update = {1: 'ir,r...->i...', 2: 'ijr,r...->ij...'}[a.ndim - 1]
    np.testing.assert_allclose(leaf, before + 0.7 * np.einsum(update, a, b), atol=1e-6)
  assert len(changed) == 6  # query, key, value, out, up and down


@pytest.mark.slow_after_first
@pytest.mark.parametrize(
  'overrides',
  [
    {},
    dict(pool='map', position='rope', qk_norm=True, layer_scale=0.1, num_registers=2),
    dict(remat='full', attention='plain', pool='gap', qkv_bias=False),
    dict(remat='dots', norm_after_pool=True, pool='gap', position='sincos'),
  ],
  ids=['plain', 'map_rope', 'remat_full', 'remat_dots'],
)
def test_unmerged_model_equals_the_merged_one(overrides):
  model, start, params = build(**overrides)
  own = merged(params, SETTINGS)
  wanted, found = run_model(model, own, IMAGES), unmerged(model, params)
  np.testing.assert_allclose(found, wanted, atol=2e-5)
  untrained = run_model(model, start, IMAGES)
  assert np.abs(wanted - untrained).max() > 0.01  # the factors matter
  assert ('map' in params['lora']) == (model.pool == 'map')


@pytest.mark.slow
def test_gradients_follow_the_chain_rule_from_the_merged_kernels():
  """For W' = W + s A B: dL/dA = s dL/dW' B^T and dL/dB = s A^T dL/dW'."""
  model, _, params = build(remat='full')
  loss = lambda logits_BL: (logits_BL * jnp.cos(jnp.arange(15.0).reshape(3, 5))).sum()
  own = jax.jit(jax.grad(lambda p: loss(unmerged(model, p))))(params)['lora']
  whole = jax.jit(jax.grad(lambda p: loss(run_model(model, p, IMAGES))))(merged(params, SETTINGS))
  whole, factors = flatten_params(whole), flatten_params(params['lora'])
  for name, found in flatten_params(own).items():
    layer = name.rpartition('/')[0]
    a, b = (factors[f'{layer}/{x}'].astype(np.float64) for x in 'ab')
    a, b = a.reshape(-1, 3), b.reshape(3, -1)
    gradient = np.asarray(whole[f'{layer}/kernel'], np.float64).reshape(len(a), -1)
    wanted = 0.7 * (gradient @ b.T if name.endswith('/a') else a.T @ gradient)
    np.testing.assert_allclose(found.reshape(wanted.shape), wanted, atol=2e-4, err_msg=name)


@pytest.mark.slow
def test_block_and_its_gradients_equal_a_lora_block_in_pytorch():
  torch = pytest.importorskip('torch')
  model, _, params = build(pool='gap', position='none', class_token=False)
  ours = jax.jit(jax.grad(lambda p: (unmerged(model, p) ** 2).sum()))(params)

  tensor = lambda x: torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True)
  p = {name: tensor(leaf) for name, leaf in flatten_params(params).items()}

  def linear(name, x, inputs=1):
    kernel = p[f'{name}/kernel']
    matrix = kernel.reshape(int(np.prod(kernel.shape[:inputs])), -1)
    y = x @ matrix + p[f'{name}/bias'].reshape(-1)
    if f'lora/{name}/a' in p:  # h = W0 x + s B A x: equation 3 of the paper
      y = y + 0.7 * (x @ p[f'lora/{name}/a'].reshape(-1, 3)) @ p[f'lora/{name}/b'].reshape(3, -1)
    return y

  def norm(name, x):
    return torch.nn.functional.layer_norm(
      x, x.shape[-1:], p[f'{name}/scale'], p[f'{name}/bias'], eps=1e-6
    )

  x = torch.tensor(IMAGES, dtype=torch.float64).reshape(3, 2, 4, 2, 4, 3)
  x = linear('embedding', x.permute(0, 1, 3, 2, 4, 5).reshape(3, 4, 48), inputs=3)
  y = norm('block_0/attention_norm', x)
  query, key, value = (
    linear(f'block_0/attention/{name}', y).reshape(3, 4, 2, 12).transpose(1, 2)
    for name in ('query', 'key', 'value')
  )
  y = torch.nn.functional.scaled_dot_product_attention(query, key, value)
  x = x + linear('block_0/attention/out', y.transpose(1, 2).reshape(3, 4, 24), inputs=2)
  y = linear('block_0/mlp/up', norm('block_0/mlp_norm', x))
  x = x + linear('block_0/mlp/down', torch.nn.functional.gelu(y, approximate='tanh'))
  logits = linear('head', norm('norm', x).mean(dim=1))
  np.testing.assert_allclose(unmerged(model, params), logits.detach(), atol=1e-5)
  (logits**2).sum().backward()
  for name, gradient in flatten_params(ours['lora']).items():
    np.testing.assert_allclose(gradient, p[f'lora/{name}'].grad, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize('rank, message', [(16, None), (17, r'key \(16x24\).*at most 16')])
def test_rank_above_a_side_of_a_kernel_is_rejected(rank, message):
  model, settings = make(None, 5, **SIZES), {'lora': {'rank': rank, 'scale': 1.0}}
  if message is None:
    return check_adapter(model, (8, 8, 3), 'lora', settings)
  with pytest.raises(ValueError) as error:
    check_adapter(model, (8, 8, 3), 'lora', settings)
  assert re.search(rf'lora.rank={rank} is larger.*{message}', str(error.value))


def test_an_adapter_of_another_package_is_valid_and_needs_no_keys(monkeypatch):
  def merge(params, added):
    return params | {'head': {'bias': params['head']['bias'] + added['shift']}}

  init = lambda key, params: {'shift': 2 * np.ones_like(params['head']['bias'])}
  monkeypatch.setitem(ADAPTERS, 'shift', Adapter(init, merge, contextlib.nullcontext))
  params = {'head': {'bias': np.arange(3.0)}}
  with_shift = adapted(params, jax.random.key(0), 'shift', SETTINGS)
  assert with_shift.keys() == {'head', 'shift'}
  assert merged(with_shift, SETTINGS)['head']['bias'].tolist() == [2, 3, 4]
  check.check(small_config(adapt='shift'))
