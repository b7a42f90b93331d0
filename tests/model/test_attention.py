"""Compares every attention kernel and its gradients with the formula in float64."""

import types

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.distributed import Target, compiled_for, inference_mesh, microbatch, target
from vit_jax.distributed.backend import ANY, target_of
from vit_jax.model import attention
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
@pytest.mark.parametrize('kernel', [attention.plain, attention.with_gradient])
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


CPU, TPU, HOPPER = Target('cpu'), Target('tpu'), Target('cuda', 9.0)


@pytest.mark.parametrize(
  ('devices', 'choice', 'dtype', 'size', 'dropout', 'kernel'),
  [
    (HOPPER, 'auto', 'bfloat16', 64, False, 'flash'),
    (HOPPER, 'cudnn', 'bfloat16', 64, False, 'flash'),
    (HOPPER, 'plain', 'bfloat16', 64, False, 'plain'),
    (HOPPER, 'auto', 'bfloat16', 64, True, 'plain'),  # cuDNN would draw another mask
    (HOPPER, 'cudnn', 'bfloat16', 64, True, 'plain'),
    (HOPPER, 'auto', 'float32', 64, False, 'plain'),
    (HOPPER, 'auto', 'bfloat16', 12, False, 'plain'),
    (HOPPER, 'auto', 'bfloat16', 128, False, 'flash'),  # the largest head
    (HOPPER, 'auto', 'bfloat16', 136, False, 'plain'),
    (Target('cuda', 8.0), 'auto', 'bfloat16', 64, False, 'flash'),  # an A100
    (Target('cuda', 7.5), 'auto', 'bfloat16', 64, False, 'plain'),
    (Target('rocm'), 'auto', 'bfloat16', 64, False, 'plain'),
    (TPU, 'auto', 'bfloat16', 64, False, 'plain'),
    (ANY, 'auto', 'bfloat16', 64, False, 'plain'),
    (ANY, 'cudnn', 'bfloat16', 64, False, 'plain'),
    (CPU, 'auto', 'bfloat16', 64, False, 'with_gradient'),
    (CPU, 'plain', 'bfloat16', 64, False, 'plain'),
  ],
)
def test_devices_and_arrays_choose_the_kernel(devices, choice, dtype, size, dropout, kernel):
  tokens = jax.ShapeDtypeStruct((2, 5, 3, size), dtype)
  one = jax.ShapeDtypeStruct((2, 1, 3, size), dtype)  # the query of the MAP head
  with compiled_for(devices):
    assert attention.select_kernel(choice, tokens, tokens, dropout) is getattr(attention, kernel)
    of_one = 'plain' if kernel == 'flash' else kernel
    assert attention.select_kernel(choice, one, tokens, dropout) is getattr(attention, of_one)


@pytest.mark.parametrize(
  ('platform', 'generation', 'found'),
  [
    ('cpu', None, CPU),
    ('gpu', '9.0', HOPPER),
    ('gpu', '12.0', Target('cuda', 12.0)),
    ('gpu', 'gfx942', Target('rocm')),
    ('tpu', None, TPU),
  ],
)
def test_a_device_is_described(platform, generation, found):
  device = types.SimpleNamespace(platform=platform, compute_capability=generation)
  assert target_of(device) == found


def test_a_program_takes_the_kernels_of_its_mesh_and_not_of_this_machine():
  chosen, mesh = [], inference_mesh(2)
  gpu = types.SimpleNamespace(platform='gpu', compute_capability='9.0')
  described = types.SimpleNamespace(devices=np.array([gpu]))  # a mesh of hardware that is not here
  assert target(described) == HOPPER and target(mesh) == target() == CPU
  assert microbatch.micro_batches(mesh, 64, 1024, 48) > 1

  def double(x):
    chosen.append(target())
    return 2 * x

  microbatch.concatenate(double, mesh, 1)(jnp.zeros((2, 3)))
  assert set(chosen) == {CPU}
  with compiled_for(HOPPER):
    chosen.clear()
    microbatch.concatenate(double, mesh, 1)(jnp.zeros((2, 3)))
    microbatch.add_up(lambda x: double(x).sum(), mesh, 1)(jnp.zeros((2, 3)))
    assert set(chosen) == {HOPPER}
    assert microbatch.micro_batches(mesh, 64, 1024, 48) == 1


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
  model = ViT(
    num_classes=3, patch_size=(16, 16), width=16, depth=1, num_heads=2, mlp_dim=16,
    pool='cls' if class_token else 'gap', dtype=dtype,
  )  # fmt: skip
  image_BHWC = jax.ShapeDtypeStruct((2, *image, 3), np.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), image_BHWC)
  gradient = jax.grad(lambda variables, image_BHWC: model.apply(variables, image_BHWC).sum())
  with compiled_for(HOPPER):
    traced = jax.jit(gradient).trace(variables, image_BHWC)
  program = traced.lower(lowering_platforms=('cuda',)).as_text()
  for kernel in ('__cudnn$fmhaSoftmax', '__cudnn$fmhaSoftmaxBackward'):
    assert (f'@{kernel}(' in program) == flash, kernel
