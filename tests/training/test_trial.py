"""Tests the choice between cuDNN's attention and the plain one, with a stand-in for cuDNN.

The stand-in runs on a CPU: it is XLA's attention, or a broken or slow version of it.
"""

import re
import time
import types

import jax
import jax.numpy as jnp
import pytest

from tests.conftest import small_config
from vit_jax.distributed import Target, compiled_for, make_mesh
from vit_jax.experiment import assemble
from vit_jax.inference import summary
from vit_jax.model import attention, plain
from vit_jax.optim import Training, training_recipe
from vit_jax.training import compiling, step, trial
from vit_jax.workdir import Task

HOPPER = Target('cuda', 9.0)
MASKED = {
  'objective': 'masked', 'masked.decoder_width': '32', 'masked.decoder_depth': '1',
  'masked.decoder_heads': '2',
}  # fmt: skip
GPU = {'model.dtype': 'bfloat16', 'model.width': '16', 'model.num_heads': '2'}


def choose(earlier=None, **overrides):
  """Returns the choice for a small model on a GPU."""
  exp, examples, _ = summary.summary_of_config(small_config(**GPU | overrides))
  recipe = training_recipe(exp.config, examples)
  training = Training(None, None, None, params=None, **recipe)
  with compiled_for(HOPPER):
    found = trial.choose_attention(exp, training, make_mesh(32), earlier)
  assert found.config.model.attention == exp.config.model.attention  # as the user has written it
  return found


@pytest.fixture
def cudnn(monkeypatch):
  """Returns a function that replaces cuDNN's kernel and the times of the two kernels."""

  def replace(kernel=plain, seconds=(1.0, 2.0)):
    trial.value_and_gradients.cache_clear()
    monkeypatch.setattr(trial, 'flash', kernel)
    times = {kernel: seconds[0], plain: seconds[1]}
    if kernel is not plain:
      monkeypatch.setattr(trial, 'duration', lambda kernel, *_: times[kernel])

  return replace


def scaled(error):
  """Returns a kernel whose output is `1 + error(query)` times the correct one."""

  def kernel(query, key, value, keep, rate):
    accurate = plain(*(x.astype(jnp.float32) for x in (query, key, value)), keep, rate)
    return (accurate * (1 + error(query))).astype(query.dtype)

  return kernel


exact = scaled(lambda query: 0.0)


@pytest.mark.slow_after_first
@pytest.mark.parametrize('seconds, choice', [((1.0, 2.0), 'cudnn'), ((2.0, 1.0), 'plain')])
def test_the_faster_of_two_correct_kernels_is_used(cudnn, seconds, choice):
  cudnn(exact, seconds)
  assert choose().model.attention == choice


@pytest.mark.slow_after_first
@pytest.mark.parametrize('error', [
    lambda query: 0.2,
    lambda query: jnp.where(jnp.abs(query).max() > 8, jnp.nan, 0),  # only for large logits
    lambda query: jnp.where(query.mean() > 3, 0.2, 0),  # only for very negative logits
])  # fmt: skip
def test_an_incorrect_kernel_is_not_used(cudnn, error, caplog):
  cudnn(scaled(error))
  assert choose().model.attention == 'plain'
  assert 'cuDNN does not compute attention correctly here (output' in caplog.text


def test_a_kernel_with_an_incorrect_gradient_is_not_used(cudnn, caplog):
  @jax.custom_vjp
  def kernel(query, key, value):
    return exact(query, key, value, None, 0.0)

  def backward(saved, dy):
    dquery, dkey, dvalue = jax.vjp(lambda *qkv: plain(*qkv, None, 0.0), *saved)[1](dy)
    return dquery, dkey * jnp.nan, dvalue

  kernel.defvjp(lambda *qkv: (kernel(*qkv), qkv), backward)
  cudnn(lambda query, key, value, keep, rate: kernel(query, key, value))
  assert choose().model.attention == 'plain'
  assert 'gradient of the key, usual logits, shape' in caplog.text


@pytest.mark.slow
def test_a_correct_kernel_is_used_although_plain_is_not_accurate(cudnn):
  """The head size of H/14: its square root is not a power of two, and bfloat16 rounds queries."""
  shape = (2, 17, 2, 80)
  cudnn(plain)
  assert 'large logits' in trial.first_difference(shape, jnp.bfloat16)
  cudnn(exact)
  assert trial.first_difference(shape, jnp.bfloat16) == ''


@pytest.mark.parametrize('error', [
    jax.errors.JaxRuntimeError('INTERNAL: No valid engine configs\nfor a graph'),
    RuntimeError('cuDNN is not detected.'),
    NotImplementedError('head size'),
    NotImplementedError(),
])  # fmt: skip
def test_a_kernel_that_raises_an_error_is_not_used(cudnn, error, caplog):
  def kernel(*_):
    raise error

  cudnn(kernel)
  assert choose().model.attention == 'plain'
  reason = str(error).partition('\n')[0] or 'NotImplementedError'
  assert re.search(rf'here \(shape [\dx]+: {reason}\)\.', caplog.text)


def test_lack_of_memory_is_no_fault_of_the_kernel(cudnn):
  def kernel(*_):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory')

  cudnn(kernel)
  with pytest.raises(jax.errors.JaxRuntimeError, match='RESOURCE_EXHAUSTED'):
    choose()


@pytest.mark.parametrize('adapt', ['', 'lora'])
def test_a_model_is_checked_without_cudnn(monkeypatch, adapt):
  monkeypatch.setattr(attention, 'flash', None)
  with compiled_for(HOPPER):
    assemble(small_config(**GPU | {'adapt': adapt}), Task(('a', 'b'), (8, 8), 3))


@pytest.mark.slow
def test_the_rows_with_very_negative_logits_are_below_minus_88():
  factor, offset = trial.INPUTS['very negative logits']
  query, key, *_ = trial.draw((2, 9, 2, 64), jnp.float32, factor, offset)
  logits = jnp.einsum('bqke,bnke->bkqn', query, key) * 64**-0.5
  assert jax.nn.logsumexp(logits, axis=-1).max() < -88


def test_deterministic_runs_do_not_measure_time(cudnn, monkeypatch):
  cudnn(exact)
  monkeypatch.setattr(trial, 'duration', None)
  assert choose(deterministic='True').model.attention == 'cudnn'


@pytest.mark.parametrize('deterministic', [False, True])
def test_cudnn_is_compiled_for_its_trial_like_the_training_step(cudnn, monkeypatch, deterministic):
  jit, used = jax.jit, []

  def recorded(function, compiler_options=None):
    used.append(compiler_options)
    return jit(function)

  cudnn(exact)
  monkeypatch.setattr(trial.jax, 'jit', recorded)
  with compiled_for(HOPPER):
    assert trial.decide([(2, 3, 2, 8)], jnp.bfloat16, deterministic) == 'cudnn'
  assert used == [step.DETERMINISTIC if deterministic else None, None]  # `plain` is the reference


@pytest.mark.parametrize('overrides, tokens', [
    ({'progressive.sizes': '4', 'progressive.until': '0.5'}, [1, 4]),  # patches of 4x4 pixels
    ({'patch_sizes': '2,4,8'}, [1, 4, 16]),  # images of 8x8 pixels
    (MASKED, [1, 4]),  # the blocks see a quarter of the patches, the decoder sees all
])  # fmt: skip
def test_kernels_are_compared_at_all_sizes_and_timed_at_the_longest_sequence(
  monkeypatch, overrides, tokens
):
  compared, timed = [], []
  monkeypatch.setattr(trial, 'first_difference', lambda shape, *_: compared.append(shape) or '')
  monkeypatch.setattr(trial, 'duration', lambda kernel, shape, dtype: timed.append(shape) or 1.0)
  choose(**overrides)
  assert [shape[1] for shape in compared] == tokens
  assert [shape[1] for shape in timed] == 2 * tokens[-1:]


def test_kernels_are_tried_with_the_rows_and_heads_of_one_device():
  sizes = {'batch_size': '64', 'micro_batches': '4', 'data.image_size': '8,16'}
  exp, *_ = summary.summary_of_config(small_config(**GPU | sizes | {'model.pool': 'cls'}))
  mesh = types.SimpleNamespace(shape={'data': 2, 'fsdp': 2, 'tensor': 2})
  # 64 rows on 4 devices in 4 parts; 2 x 4 patches and the class token; 2 heads of size 8 on 2.
  assert compiling.attention_shapes(exp, mesh) == [(4, 9, 1, 8)]
  mesh.shape['tensor'] = 4  # does not divide the heads, so each device computes both
  assert compiling.attention_shapes(exp, mesh) == [(4, 9, 2, 8)]


@pytest.mark.parametrize('overrides, fused', [
    ({}, True), ({'model.attention_dropout': '0.1'}, False), ({'model.attention': 'plain'}, False),
])  # fmt: skip
def test_a_step_is_fused_if_its_blocks_use_cudnn(overrides, fused):
  exp, *_ = summary.summary_of_config(small_config(**GPU | overrides))
  with compiled_for(HOPPER):
    assert compiling.uses_flash(exp, make_mesh(32)) == fused


def test_an_error_is_relative_only_to_values_above_one():
  large, little = jnp.array([-100.0, 50.0]), jnp.array([0.1, -0.05])
  broken = jnp.array([0.1, jnp.nan])
  found = trial.errors((large + 2, little + 0.01, little, broken), (large, little, little, little))
  assert found['output'] == pytest.approx(0.02, rel=1e-5)
  assert found['query'] == pytest.approx(0.01, rel=1e-5)
  assert found['key'] == 0 and found['value'] != found['value']  # NaN


@pytest.mark.parametrize('earlier', ['cudnn', 'plain'])
def test_a_resumed_run_keeps_its_kernel(monkeypatch, earlier):
  monkeypatch.setattr(trial, 'decide', None)
  found = choose(earlier)
  assert found.model.attention == found.saved()['attention'] == earlier


def test_attention_dropout_chooses_plain_for_training_and_evaluation(monkeypatch):
  monkeypatch.setattr(trial, 'decide', None)
  found = choose(**{'model.attention_dropout': '0.1'})
  assert found.model.attention == found.saved()['attention'] == 'plain'


@pytest.mark.parametrize('overrides', [
    {'model.attention': 'plain'}, {'model.dtype': 'float32'}, {'model.head_dim': '12'},
])  # fmt: skip
def test_nothing_is_tried_where_the_choice_is_clear(monkeypatch, overrides):
  monkeypatch.setattr(trial, 'decide', None)
  found = choose(**overrides)
  assert found.model.attention == found.config.model.attention
  assert found.saved()['attention'] == 'auto'


def test_cudnn_is_refused_where_it_cannot_run():
  with pytest.raises(
    ValueError, match='model.attention=cudnn: .* model.dtype=float32 is not bfloat16. Set'
  ):
    choose(**{'model.attention': 'cudnn', 'model.dtype': 'float32'})


def test_a_duration_is_the_time_of_a_call(monkeypatch):
  clock = iter([10.0, 15.0])
  monkeypatch.setattr(trial, 'time', type(time)('clock'))
  trial.time.perf_counter = lambda: next(clock)
  assert trial.duration(plain, (1, 3, 1, 8), jnp.bfloat16) == 5.0 / trial.REPEATS
