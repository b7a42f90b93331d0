"""Compares every attention kernel and its gradients with the formula in float64."""

import types

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.model import attention, layers
from vit_jax.model.vit import ViT

# Relative rounding error of each dtype; tolerances are multiples of it.
ROUNDING = {'float32': 2.0**-24, 'bfloat16': 2.0**-8}


def reference(query, key, value, keep, dy):
  """Returns y and three gradients in float64, by equations 5 to 7 and the softmax Jacobian."""
  scale = query.shape[-1] ** -0.5
  logits = np.einsum('bqke,bnke->bkqn', query, key) * scale
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  y = np.einsum('bkqn,bnke->bqke', weights * keep, value)
  dweights = np.einsum('bqke,bnke->bkqn', dy, value) * keep
  jacobian = np.einsum('bkqn,nm->bkqnm', weights, np.eye(weights.shape[-1]))
  jacobian -= np.einsum('bkqn,bkqm->bkqnm', weights, weights)
  dlogits = np.einsum('bkqnm,bkqm->bkqn', jacobian, dweights) * scale
  dquery = np.einsum('bkqn,bnke->bqke', dlogits, key)
  dkey = np.einsum('bkqn,bqke->bnke', dlogits, query)
  return y, dquery, dkey, np.einsum('bkqn,bqke->bnke', weights * keep, dy)


def draw(shape, dtype, rate, seed):
  """Returns query, key, value, the dropout mask, the rate and the gradient of the output.

  The mask is None at rate 0.
  """
  batch, queries, tokens, heads, size = shape
  random = np.random.RandomState(seed)
  array = lambda n: jnp.asarray(random.normal(size=(batch, n, heads, size)), dtype)
  keep = random.uniform(size=(batch, heads, queries, tokens)) >= rate if rate else None
  return array(queries), array(tokens), array(tokens), keep, rate, array(queries)


def value_and_gradients(kernel, query, key, value, keep, rate, dy):
  y, pull = jax.vjp(lambda *qkv: kernel(*qkv, keep, rate), query, key, value)
  return y, *pull(dy)


shapes = st.tuples(
  st.integers(1, 3), st.integers(1, 9), st.integers(1, 21), st.integers(1, 3), st.integers(1, 16)
)


@pytest.mark.slow
@pytest.mark.parametrize('kernel', [attention.plain, attention.with_gradient, attention.attention])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(shapes, st.sampled_from(sorted(ROUNDING)), st.sampled_from([0.0, 0.3]), st.integers(0, 99))
def test_kernels_agree_with_float64(kernel, shape, dtype, rate, seed):
  given = draw(shape, dtype, rate, seed)
  got = jax.jit(value_and_gradients, static_argnums=(0, 5))(kernel, *given)
  query, key, value, keep, _, dy = [x if x is None else np.asarray(x, np.float64) for x in given]
  exact = reference(query, key, value, 1.0 if keep is None else keep / (1 - rate), dy)
  for name, mine, want in zip(('y', 'dquery', 'dkey', 'dvalue'), got, exact):
    assert mine.dtype == dtype
    error = np.abs(np.asarray(mine, np.float64) - want).max()
    assert error <= 16 * ROUNDING[dtype] * max(np.abs(want).max(), 1), name


@pytest.mark.parametrize('kernel', [attention.plain, attention.with_gradient])
def test_logits_are_not_rounded_to_the_compute_type(kernel):
  """The logits are 256 and 257, which bfloat16 would round to the same number."""
  array = lambda *rows: jnp.array(rows, jnp.bfloat16)[None, :, None]
  query, key = array([32, 2, 0, 0]), array([16, 0, 0, 0], [16, 1, 0, 0])
  value, dy = array([0] * 4, [1] * 4), array([1] * 4)
  compute = jax.jit(value_and_gradients, static_argnums=(0, 5))
  y, *_ = compute(kernel, query, key, value, None, 0.0, dy)
  np.testing.assert_allclose(np.float32(y), 1 / (1 + np.exp(-1)), rtol=2**-7)


def test_large_logits_do_not_overflow():
  query, key, value, _, _, dy = draw((1, 4, 5, 2, 8), 'float32', 0, 0)
  got = value_and_gradients(attention.with_gradient, 300 * query, 300 * key, value, None, 0, dy)
  assert all(np.isfinite(x).all() for x in got)


def test_inspecting_attention_weights_does_not_change_the_output():
  query, key, value, *_ = draw((2, 3, 7, 2, 4), 'float32', 0, 1)
  seen = []
  looked = attention.attention(query, key, value, inspect=seen.append)
  np.testing.assert_allclose(seen[0].sum(-1), 1, atol=1e-6)
  np.testing.assert_allclose(looked, attention.attention(query, key, value), atol=1e-6)


@pytest.mark.parametrize(
  ('backend', 'version', 'capability', 'dtype', 'size', 'dropout', 'kernel'),
  [
    ('gpu', 'cuda 13000', '9.0', 'bfloat16', 64, False, 'cudnn'),
    ('gpu', 'cuda 13000', '9.0', 'bfloat16', 64, True, 'plain'),  # cuDNN would draw another mask
    ('gpu', 'cuda 13000', '9.0', 'float32', 64, False, 'plain'),
    ('gpu', 'cuda 13000', '9.0', 'bfloat16', 12, False, 'plain'),
    ('gpu', 'cuda 13000', '7.5', 'bfloat16', 64, False, 'plain'),
    ('gpu', 'rocm 70000', '9.0', 'bfloat16', 64, False, 'plain'),
    ('tpu', 'libtpu', '', 'bfloat16', 64, False, 'plain'),
    ('cpu', 'cpu', '', 'bfloat16', 64, False, 'with_gradient'),
  ],
)
def test_backend_dtype_and_head_size_choose_the_kernel(
  monkeypatch, backend, version, capability, dtype, size, dropout, kernel
):
  """XLA replaces cuDNN's kernel here, because that kernel needs a GPU."""
  given = draw((2, 5, 5, 2, size), dtype, 0.3 * dropout, 2)[:5]
  want = attention.plain(*given)
  calls, fused = [], jax.nn.dot_product_attention

  def flash(*qkv, implementation, **lengths):
    calls.append(implementation)
    return fused(*qkv, implementation='xla', **lengths)

  def spy(name):
    function = getattr(attention, name)
    monkeypatch.setattr(attention, name, lambda *x: calls.append(name) or function(*x))

  client = types.SimpleNamespace(platform_version=version)
  device = types.SimpleNamespace(client=client, compute_capability=capability)
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  monkeypatch.setattr(jax, 'devices', lambda: [device])
  monkeypatch.setattr(jax.nn, 'dot_product_attention', flash)
  spy('plain')
  spy('with_gradient')
  y = attention.attention(*given)
  assert calls == [kernel]
  np.testing.assert_allclose(np.float32(y), np.float32(want), atol=0.02)


@pytest.mark.parametrize('tokens', [6, 7])
def test_flash_attention_is_exact_for_an_odd_number_of_tokens(monkeypatch, tokens):
  """XLA replaces cuDNN's kernel; the token that was added is masked and its output cut off."""
  fused = jax.nn.dot_product_attention
  xla = lambda *qkv, implementation, **lengths: fused(*qkv, implementation='xla', **lengths)
  monkeypatch.setattr(jax.nn, 'dot_product_attention', xla)
  given = draw((2, tokens, tokens, 3, 8), 'float32', 0, 3)
  compute = jax.jit(value_and_gradients, static_argnums=(0, 5))
  got = compute(lambda query, key, value, *_: attention.flash(query, key, value), *given)
  for mine, theirs in zip(got, compute(attention.plain, *given), strict=True):
    np.testing.assert_allclose(mine, theirs, atol=1e-6)


@pytest.mark.parametrize(
  ('dtype', 'image', 'class_token', 'flash'),
  [
    ('bfloat16', (224, 224), False, True),  # 196 tokens
    ('bfloat16', (224, 224), True, True),  # 197 tokens
    ('bfloat16', (256, 256), True, True),  # 257 tokens
    ('float32', (224, 224), True, False),
  ],
)
def test_gradients_lower_to_flash_attention_on_an_nvidia_gpu(
  monkeypatch, dtype, image, class_token, flash
):
  from jax._src.cudnn import fused_attention_stablehlo

  monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91000)
  for module in (attention, layers):
    monkeypatch.setattr(module, 'target_backend', lambda: 'gpu')
  monkeypatch.setattr(attention, 'is_ampere', lambda: True)
  model = ViT(
    num_classes=3, patch_size=(16, 16), width=16, depth=1, num_heads=2, mlp_dim=16,
    pool='cls' if class_token else 'gap', dtype=dtype,
  )  # fmt: skip
  image_BHWC = jax.ShapeDtypeStruct((2, *image, 3), np.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), image_BHWC)
  gradient = jax.grad(lambda variables, image_BHWC: model.apply(variables, image_BHWC).sum())
  traced = jax.jit(gradient).trace(variables, image_BHWC)
  program = traced.lower(lowering_platforms=('cuda',)).as_text()
  for kernel in ('__cudnn$fmhaSoftmax', '__cudnn$fmhaSoftmaxBackward'):
    assert (f'@{kernel}(' in program) == flash, kernel
