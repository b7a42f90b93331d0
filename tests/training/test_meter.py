"""Tests the speed and the utilisation that a run reports."""

import types

import jax
import numpy as np
import pytest

from tests.conftest import small_config
from vit_jax.distributed import peak_tflops, portable
from vit_jax.evaluation import training_score
from vit_jax.inference import cost, summary
from vit_jax.model import REMAT, make
from vit_jax.training import meter as meter_module
from vit_jax.training import tracing
from vit_jax.training.compiling import Compiled
from vit_jax.training.meter import Meter
from vit_jax.training.state import init_params
from vit_jax.workdir import read_metrics


def device(kind, stats=None):
  return types.SimpleNamespace(device_kind=kind, memory_stats=lambda: stats)


def mesh_of(kind, count, stats=None):
  return types.SimpleNamespace(local_devices=[device(kind, stats)] * 2, size=count)


def metrics():
  score = training_score(np.zeros((8, 3), np.float32), np.zeros(8, np.int32), np.ones(8))
  return {'score': jax.device_get(score), 'grad_norm': 1.0, 'learning_rate': 0.1}


@pytest.fixture
def clock(monkeypatch):
  """A clock that the test sets."""
  time = types.SimpleNamespace(now=0.0)
  monkeypatch.setattr(meter_module, 'time', types.SimpleNamespace(perf_counter=lambda: time.now))
  return time


def read(clock, mesh, dtype):
  """Measures two steps of 4 x 10^15 FLOPs in 5 seconds."""
  meter = Meter(mesh, dtype)
  for step in range(2):
    meter.add(step, metrics(), Compiled(None, 4 * 10**15, False, None))
  clock.now += 5
  return meter.read()


def test_utilisation_is_the_flops_per_second_divided_by_the_peak(clock):
  values = read(clock, mesh_of('NVIDIA H200', 4, {'bytes_in_use': 3 * 2**29}), 'bfloat16')
  assert values['images_per_second'] == 16 / 5
  assert values['tflops_per_device'] == 400
  assert values['mfu'] == round(400 / 989, 4)
  assert values['memory_gib'] == 1.5


def test_a_line_counts_only_the_training_since_the_last_line(clock):
  meter = Meter(mesh_of('cpu', 1), 'float32')
  for seconds, waited, evaluating, steps in ((4, 1, 100, 2), (2, 1, 50, 1)):
    with meter.waiting():
      clock.now += waited
    clock.now += seconds - waited
    for step in range(steps):
      meter.add(step, metrics(), Compiled(None, 10**12, False, None))
    with meter.paused():
      clock.now += evaluating
    values = meter.read()
    assert values['examples'] == 8 * steps and values['loss'] == 1
    assert values['images_per_second'] == 8 * steps / seconds
    assert values['data_wait'] == waited / seconds
    assert values['tflops_per_device'] == steps / seconds


@pytest.mark.parametrize('kind, dtype', [('cpu', 'bfloat16'), ('NVIDIA H200', 'float32')])
def test_without_a_known_peak_only_the_speed_is_reported(kind, dtype, clock):
  values = read(clock, mesh_of(kind, 2), dtype)
  assert values['tflops_per_device'] == 800
  assert not {'mfu', 'memory_gib'} & values.keys()


@pytest.mark.parametrize('kind, peak', [
    ('NVIDIA A100-SXM4-80GB', 312), ('NVIDIA H100 80GB HBM3', 989), ('NVIDIA H100 PCIe', 756),
    ('NVIDIA H200 141GB HBM3e', 989), ('NVIDIA H200 NVL', 835), ('NVIDIA GH200 480GB', 989),
    ('NVIDIA H200 MIG 1g.18gb', None), ('NVIDIA A100-SXM4-40GB MIG 1g.5gb', None), ('TPU v4', 275),
    ('TPU v4 lite', 138), ('TPU v5 lite', 197), ('TPU v5', 459), ('TPU v5p', 459),
    ('TPU v6 lite', 918), ('NVIDIA GeForce RTX 3060', None), ('cpu', None),
])  # fmt: skip
def test_the_peak_follows_from_the_name_of_the_device(kind, peak):
  assert peak_tflops(device(kind)) == peak


def test_a_run_reports_the_flops_that_inspect_counts(trained):
  workdir, _ = trained
  exp, examples, _ = summary.summary_of_config(small_config())
  counted = cost.measure(exp, examples)
  line = [line for line in read_metrics(workdir) if line['split'] == 'train'][-1]
  tflops = counted.train_flops * line['images_per_second'] / counted.devices / 1e12
  np.testing.assert_allclose(line['tflops_per_device'], tflops, rtol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['B/16', 'R50+B/16'])
def test_forward_flops_are_within_3_percent_of_the_count_of_xla(name):
  model = make(name, num_classes=1000)
  image_BHWC = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), image_BHWC)
  with portable():
    program = jax.make_jaxpr(model.apply)(variables, image_BHWC)
    lowered = jax.jit(model.apply).lower(variables, image_BHWC)
  ours = sum(count for _, count in tracing.products(program.jaxpr))
  np.testing.assert_allclose(ours, lowered.cost_analysis()['flops'], rtol=0.03)


@pytest.mark.slow
def test_recomputation_does_not_count_as_work_of_the_model():
  kept, repeated = (
    summary.summary_of_config(small_config(**{'model.remat': remat}))[0]
    for remat in ('none', 'full')
  )
  params = init_params(kept.model, kept.image_shape, 0)
  assert tracing.step_flops(repeated, params) > tracing.step_flops(kept, params)
  assert tracing.model_flops(repeated, params) == tracing.step_flops(kept, params)


def counted(**overrides):
  """Returns the FLOPs of a training step for one image, and the bytes of activations by module."""
  exp, *_ = summary.summary_of_config(small_config(**{'model.depth': '1'} | overrides))
  params = jax.eval_shape(lambda: init_params(exp.model, exp.image_shape, 0))
  return tracing.step_flops(exp, params), tracing.activations(exp, params)


def test_an_image_in_a_mixed_pair_costs_as_much_as_an_image_alone():
  (flops, kept), (mixed_flops, mixed_kept) = counted(), counted(**{'augment.mix.probability': '1'})
  assert mixed_flops == flops > 0
  for part in ('block_*/attention', 'block_*/mlp'):
    assert mixed_kept[part] == kept[part] > 0


def test_each_further_kind_of_recomputation_keeps_fewer_activations():
  bytes_of = {remat: counted(**{'model.remat': remat})[1].total() for remat in REMAT}
  assert list(bytes_of) == ['none', 'dots', 'full']
  assert bytes_of['none'] > bytes_of['dots'] > bytes_of['full']


@pytest.mark.parametrize('fused', [False, True])
def test_a_loss_that_is_not_finite_names_the_fused_kernel(fused, clock):
  broken = metrics() | {'grad_norm': float('nan')}
  meter = Meter(mesh_of('cpu', 1), 'float32')
  meter.add(3, broken, Compiled(None, 0, fused, None))  # does not wait for the step
  with pytest.raises(FloatingPointError, match='gradient norm of step 3 is nan') as error:
    meter.flush()
  assert ('--config.model.attention=plain' in str(error.value)) == fused
