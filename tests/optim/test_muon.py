"""Tests of Muon against the singular value decomposition and against optax."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.conftest import small_config
from vit_jax.distributed import devices, replicated
from vit_jax.optim import muon, optimizers, training_recipe

MESH = devices.make_mesh()


def test_both_first_moments_of_muon_can_be_bfloat16():
  params = {'block_0': {'up': {'kernel': jnp.ones((2, 3)), 'bias': jnp.ones(3)}}}
  optimizer = optimizers.make_optimizer(
    'muon', lambda _: 0.1, clip=0.0, moment_dtype='bfloat16',
    weight_decay=0.0, b1=0.9, b2=0.99, momentum=0.9,
  )  # fmt: skip
  leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(optimizer.init, params))
  moments = [(jax.tree_util.keystr(path), x.dtype) for path, x in leaves if x.ndim]
  first = {name: dtype for name, dtype in moments if '.mu' in name}
  assert len(first) == 2 and {*first.values()} == {jnp.dtype('bfloat16')}
  assert {dtype for name, dtype in moments if name not in first} == {jnp.dtype('float32')}


@pytest.mark.parametrize(('dtype', 'tolerance'), [('float32', 1e-5), ('bfloat16', 0.05)])
def test_muon_orthogonalizes_the_matrices_of_blocks(dtype, tolerance):
  """Checks the first step by the singular values: Newton-Schulz is a polynomial in each of them."""
  draw = np.random.RandomState(0).normal
  shapes = {'query': (6, 2, 3), 'out': (2, 3, 6)}
  kernels = {name: {'kernel': draw(size=shape)} for name, shape in shapes.items()}
  grads = {'block_0': {'attention': kernels, 'mlp': {'up': {'kernel': draw(size=(6, 9))}}}}
  grads |= {'embedding': {'kernel': draw(size=(6, 6))}}
  params = jax.tree.map(lambda g: jnp.asarray(draw(size=g.shape), jnp.float32), grads)
  optimizer = optimizers.make_optimizer(
    'muon', lambda _: 0.1, clip=0.0, weight_decay=0.3, b1=0.9, b2=0.99, momentum=0.95
  )
  grads32 = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grads)
  updates, _ = optimizer.update(grads32, optimizer.init(params), params, mesh=MESH, dtype=dtype)
  up = grads['block_0']['mlp']['up']['kernel']
  for name, grad, matrix in (
    ('query', kernels['query']['kernel'], (6, 6)),
    ('out', kernels['out']['kernel'], (6, 6)),
    ('up', up, up.shape),
  ):
    left, values, right = np.linalg.svd(grad.reshape(matrix), full_matrices=False)
    values = values / np.linalg.norm(values)
    for _ in range(5):  # Jordan's coefficients
      values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    want = 0.2 * math.sqrt(max(matrix)) * (left * values @ right).reshape(grad.shape)
    block, old = updates['block_0'], params['block_0']
    kind = 'mlp' if name == 'up' else 'attention'
    want = -0.1 * (want + 0.3 * np.array(old[kind][name]['kernel']))
    np.testing.assert_allclose(block[kind][name]['kernel'], want, rtol=1e-3, atol=tolerance)
  old = params['embedding']['kernel']
  adam = updates['embedding']['kernel'] + 0.1 * 0.3 * old  # the first step of Nesterov's Adam
  np.testing.assert_allclose(np.abs(adam), np.abs(adam)[0, 0], rtol=1e-4)


def kernels_of_blocks(seed):
  """Returns random kernels of three blocks, so that two devices get different numbers of them."""
  draw = np.random.RandomState(seed).normal
  shapes = {'attention': {'query': (6, 2, 3), 'out': (2, 3, 6)}, 'mlp': {'down': (9, 6)}}
  return {
    f'block_{i}': {
      part: {
        name: {'kernel': jnp.asarray(draw(size=shape), jnp.float32)} for name, shape in x.items()
      }
      for part, x in shapes.items()
    }
    for i in range(3)
  } | {'head': {'kernel': jnp.asarray(draw(size=(6, 3)), jnp.float32)}}


@pytest.mark.slow
@pytest.mark.slow_after_first
@pytest.mark.parametrize('axis', devices.AXES)
def test_muon_equals_the_muon_of_optax(axis):
  mesh = devices.make_mesh(shape={'data': 1, 'fsdp': 1, 'tensor': 1} | {axis: -1})
  params = kernels_of_blocks(0)
  ours = optimizers.make_optimizer(
    'muon', lambda _: 0.1, clip=0.0, weight_decay=0.0, b1=0.9, b2=0.99, momentum=0.95
  )
  theirs = optax.contrib.muon(
    0.1, beta=0.95, adam_b1=0.9, adam_b2=0.99, consistent_rms=0.2,
    muon_weight_dimension_numbers=muon.block_matrices,
  )  # fmt: skip
  states = ours.init(params), theirs.init(params)
  for seed in range(1, 4):
    grads = kernels_of_blocks(seed)
    found, state = ours.update(grads, states[0], params, mesh=mesh, dtype=jnp.float32)
    want, other = theirs.update(grads, states[1], params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), found, want)
    states = state, other
  moments = [optax.tree.get(x, 'mu', filtering=lambda path, _: 'muon' in str(path)) for x in states]
  jax.tree.map(np.testing.assert_array_equal, *moments)


@pytest.mark.parametrize(('dtype', 'short'), [('float32', 'f32'), ('bfloat16', 'bf16')])
def test_each_device_orthogonalizes_its_share_in_the_given_type(dtype, short):
  optimizer = training_recipe(small_config(**{'optimizer.name': 'muon'}), 1024)['optimizer']
  params = kernels_of_blocks(0)
  update = functools.partial(optimizer.update, mesh=MESH, dtype=jnp.dtype(dtype))
  program = jax.jit(update).lower(params, optimizer.init(params), params).as_text()
  assert MESH.size == 2 and 'tensor<2x6x9xf32>' in program  # a share of three matrices
  products = [line for line in program.splitlines() if 'dot_general' in line]
  assert products and all(f'x{short}>' in line for line in products)


def test_devices_exchange_each_group_of_equal_shapes_only_once():
  optimizer = training_recipe(small_config(**{'optimizer.name': 'muon'}), 1024)['optimizer']
  params = kernels_of_blocks(0)
  args = jax.device_put((params, optimizer.init(params), params), replicated(MESH))
  update = functools.partial(optimizer.update, mesh=MESH, dtype=jnp.float32)
  program = jax.jit(update, out_shardings=replicated(MESH)).lower(*args).compile().as_text()
  exchanges = re.findall(r' (all-[a-z]+|collective-[a-z]+|reduce-scatter)\(', program)
  assert exchanges == ['all-gather'] * 2  # shapes 6 x 6 and 6 x 9


@pytest.mark.slow
def test_muon_passes_both_decays_to_the_adam_of_biases():
  params = {'block_0': {'up': {'kernel': jnp.ones((2, 3)), 'bias': jnp.ones(3)}}}
  gradients = [
    jax.tree.map(lambda x, size=size: size * jnp.ones_like(x), params) for size in (1, 3)
  ]
  updates = []
  for b2 in (0.9, 0.99):
    optimizer = optimizers.make_optimizer(
      'muon', lambda _: 0.1, clip=0.0, weight_decay=0.0, b1=0.8, b2=b2, momentum=0.9
    )
    state = optimizer.init(params)
    for gradient in gradients:
      update, state = optimizer.update(gradient, state, params, mesh=MESH, dtype=jnp.float32)
    updates.append(float(update['block_0']['up']['bias'][0]))
    moment = 0.8 * 0.2 * 1 + 0.2 * 3
    first = 0.8 * moment / (1 - 0.8**3) + 0.2 * 3 / (1 - 0.8**2)  # Nesterov's first moment
    second = (b2 * (1 - b2) * 1 + (1 - b2) * 9) / (1 - b2**2)
    assert updates[-1] == pytest.approx(-0.1 * first / second**0.5, rel=1e-4)
  assert updates[0] != updates[1]
