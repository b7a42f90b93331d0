"""Tests products with stored transposes, activations, LayerNorm, and the masks of dropout."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.distributed import Target, compiled_for
from vit_jax.model import products
from vit_jax.model.layers import ACTIVATIONS, CpuLayerNorm, Dense, keep_mask, norm_layer


@pytest.mark.slow_after_first
@pytest.mark.parametrize('shape', [(1, 7, 5), (12, 33, 64), (200, 64, 130)])
def test_products_with_stored_transposes_have_the_gradient_of_float64(shape):
  rows, inputs, outputs = shape
  random = np.random.default_rng(0)
  draw = lambda *size: jnp.asarray(random.normal(size=size), jnp.bfloat16)
  x_NI, kernel_IO, dy_NO = draw(rows, inputs), draw(inputs, outputs), draw(rows, outputs)
  y_NO, gradient = jax.vjp(products.with_stored_transposes, x_NI, kernel_IO)
  got = (y_NO, *gradient(dy_NO))
  x, kernel, dy = (np.asarray(a, np.float64) for a in (x_NI, kernel_IO, dy_NO))
  for array, exact in zip(got, (x @ kernel, dy @ kernel.T, x.T @ dy)):
    assert array.dtype == jnp.bfloat16
    np.testing.assert_allclose(
      np.asarray(array, np.float64), exact, atol=2**-7 * np.abs(exact).max()
    )


def test_the_gradient_of_a_bias_is_the_sum_of_float64():
  layer = Dense((16,), dtype=jnp.bfloat16)
  x_NI = jnp.ones((3000, 8), jnp.bfloat16)
  dy_NO = jnp.asarray(np.random.default_rng(0).normal(size=(3000, 16)), jnp.bfloat16)
  params = layer.init(jax.random.key(0), x_NI)
  (gradient,) = jax.vjp(lambda params: layer.apply(params, x_NI), params)[1](dy_NO)
  exact = np.asarray(dy_NO, np.float64).sum(0)
  np.testing.assert_allclose(gradient['params']['bias'], exact, atol=1e-4)


@pytest.mark.parametrize(
  'platform, dtype, version, stored',
  [
    ('cpu', 'bfloat16', (0, 12, 0), True),
    ('cpu', 'bfloat16', (0, 11, 9), False),
    ('cpu', 'float32', (0, 12, 0), False),
    ('tpu', 'bfloat16', (0, 12, 0), False),
  ],
)
def test_transposes_are_stored_only_where_it_is_faster(
  monkeypatch, platform, dtype, version, stored
):
  monkeypatch.setattr(jax, '__version_info__', version)
  called = []
  monkeypatch.setattr(products, 'with_stored_transposes', lambda x, w: called.append(1) or x @ w)
  with compiled_for(Target(platform)):
    products.matmul(jnp.ones((2, 3), dtype), jnp.ones((3, 4), dtype))
  assert bool(called) == stored


@pytest.mark.slow_after_first
@pytest.mark.parametrize('shape', [(100, 300), (300, 101), (30001, 1)])
def test_a_mask_keeps_each_value_with_the_same_probability(shape):
  keep = np.asarray(keep_mask(jax.random.key(1), 0.3, shape))
  assert keep.shape == shape
  assert abs(keep.mean() - 0.7) < 4 * (0.3 * 0.7 / keep.size) ** 0.5


def test_the_two_values_of_a_random_number_are_independent():
  keep = np.asarray(keep_mask(jax.random.key(2), 0.5, (500, 400)))
  halves = keep[:, :200], keep[:, 200:]
  same = (halves[0] == halves[1]).mean()
  assert abs(same - 0.5) < 4 * 0.5 / halves[0].size ** 0.5


@pytest.mark.parametrize('name', ACTIVATIONS)
def test_activations_in_bfloat16_are_those_of_float64_rounded_once(name):
  random = np.random.default_rng(0)
  x, dy = (jnp.asarray(random.normal(size=2000), jnp.bfloat16) for _ in range(2))
  y, gradient = jax.vjp(lambda x: products.activate(ACTIVATIONS[name], x), x)
  with jax.enable_x64(True):
    exact_y, exact_gradient = jax.vjp(ACTIVATIONS[name], jnp.asarray(x, jnp.float64))
    exact = exact_y, *exact_gradient(jnp.asarray(dy, jnp.float64))
  for array, reference in zip((y, *gradient(dy)), exact):
    assert array.dtype == jnp.bfloat16
    # rtol: half of the distance between neighbouring values of bfloat16
    np.testing.assert_allclose(np.asarray(array, np.float64), reference, rtol=2**-8, atol=1e-6)


def test_the_backward_pass_stores_the_input_of_an_activation_in_bfloat16():
  x = jnp.ones((8, 4), jnp.bfloat16)
  _, gradient = jax.vjp(lambda x: products.activate(ACTIVATIONS['gelu'], x), x)
  assert [(a.shape, a.dtype) for a in jax.tree.leaves(gradient) if a.ndim] == [(x.shape, x.dtype)]


@pytest.mark.parametrize('axes, dtype', [(1, 'float32'), (2, 'float32'), (1, 'bfloat16')])
def test_layer_norm_and_its_gradient_equal_those_of_float64(axes, dtype):
  random = np.random.default_rng(0)
  shape = (3, 7, 4, 10)
  x = jnp.asarray(random.normal(20, 3, size=shape), dtype)  # a mean far from 0
  dy = jnp.asarray(random.normal(size=shape), dtype)
  params = {k: jnp.asarray(random.normal(size=shape[-axes:])) for k in ('scale', 'bias')}

  def results(layer, params, x, dy):
    y, gradient = jax.vjp(lambda *args: layer.apply({'params': args[0]}, args[1]), params, x)
    dparams, dx = gradient(dy)
    return y, dx, dparams['scale'], dparams['bias']

  got = results(CpuLayerNorm(0.1, dtype, axes), params, x, dy)
  last = tuple(range(-axes, 0))
  with jax.enable_x64(True):
    doubles = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (params, x, dy))
    layer = nn.LayerNorm(0.1, dtype='float64', reduction_axes=last, feature_axes=last)
    exact = results(layer, *doubles)
  assert [array.dtype for array in got] == [dtype, dtype, 'float32', 'float32']
  for array, reference in zip(got, exact):
    atol = np.abs(reference).max() * (2e-6 if array.dtype == 'float32' else 2**-7)
    np.testing.assert_allclose(np.asarray(array, np.float64), reference, atol=atol)


@pytest.mark.parametrize('platform', ['cpu', 'cuda', ''])
@pytest.mark.parametrize('axes', [1, 2])
def test_only_cpus_use_their_own_layer_norm(platform, axes):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3, 4)), 'float32')
  with compiled_for(Target(platform)):
    layer = norm_layer(1e-6, 'float32', axes=axes)
  assert isinstance(layer, CpuLayerNorm if platform == 'cpu' else nn.LayerNorm)
  params = layer.init(jax.random.key(0), x)['params']
  assert {name: leaf.shape for name, leaf in params.items()} == dict.fromkeys(
    ('scale', 'bias'), x.shape[-axes:]
  )
  last = tuple(range(-axes, 0))
  exact = (x - x.mean(last, keepdims=True)) / (x.var(last, keepdims=True) + 1e-6) ** 0.5
  np.testing.assert_allclose(layer.apply({'params': params}, x), exact, atol=1e-5)
