"""Micro-batches and `model.remat` are chosen so that a training step fits into memory."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.conftest import call, small_config
from vit_jax import experiment, opening
from vit_jax.distributed import batch_sharding, layout, make_mesh, needed_bytes
from vit_jax.evaluation import summarize
from vit_jax.inference import cost
from vit_jax.limits import OutOfMemory
from vit_jax.model import kept_bytes
from vit_jax.training import compiling, tracing, trainer
from vit_jax.training.compiling import Plan
from vit_jax.training.state import init_state
from vit_jax.training.step import make_train_step
from vit_jax.workdir import newest_config

pytestmark = pytest.mark.slow  # these tests train small models

WIDE = {
  'model.width': '64', 'model.mlp_dim': '256', 'data.image_size': '32', 'model.patch_size': '4',
  'batch_size': '64', 'data.train_split': 'train[:64]', 'data.eval_split': 'test[:8]',
}  # fmt: skip


class Step:
  """A training step that is lowered from shapes; `compiled` counts the compilations."""

  def __init__(self, **overrides):
    self.exp, self.training = opening.from_config(small_config(**WIDE | overrides))
    self.mesh, self.plans = experiment.mesh_for(self.exp.config), []
    shapes = jax.eval_shape(lambda: init_state(self.exp, self.training, self.mesh))
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    self.state = jax.tree.map(place, shapes, layout(self.mesh, shapes))
    rows, size = batch_sharding(self.mesh), self.exp.config.batch_size
    self.batch = {
      'image': jax.ShapeDtypeStruct((size, 32, 32, 3), 'uint8', sharding=rows),
      'label': jax.ShapeDtypeStruct((size,), 'int32', sharding=rows),
    }

  def lower(self, exp):
    self.plans.append(compiling.plan_of(exp, self.mesh))
    return make_train_step(exp, self.training, self.mesh).lower(self.state, self.batch)

  def fit(self):
    return compiling.fit_step(self.exp, self.lower, self.mesh, self.state)


@pytest.mark.parametrize(
  'pixels, dtype', [('12', 'float32'), ('32', 'float32'), ('32', 'bfloat16')]
)
def test_the_c_library_keeps_the_temporary_memory_of_a_step_on_a_cpu(pixels, dtype):
  sizes = {'width': '128', 'mlp_dim': '256', 'depth': '6', 'num_heads': '2', 'dtype': dtype}
  model = {f'model.{key}': value for key, value in sizes.items()}
  step = Step(**model, **{'data.image_size': pixels, 'batch_size': '256', 'epochs': '4'})
  _, compiled = step.fit()
  assert compiled.memory_analysis().temp_size_in_bytes < 32 * 2**20
  tokens, exact = (int(pixels) // 4) ** 2, tracing.activations(step.exp, step.state.params).total()
  estimate = tokens * kept_bytes(step.exp.model, tokens)
  assert dtype == 'bfloat16' or 0.75 < estimate / exact < 1.25


def test_the_chosen_step_fits_90_percent_of_the_memory_and_is_compiled_once():
  gib = 0.012
  step = Step(device_memory=str(gib))
  exp, compiled = step.fit()
  assert needed_bytes(compiled) <= 0.9 * gib * 2**30
  assert exp.parts > step.exp.training_parts(step.mesh) and len(step.plans) == 1
  whole = step.lower(step.exp).compile()
  assert needed_bytes(whole) > 0.9 * gib * 2**30


def test_plans_use_more_micro_batches_before_they_recompute():
  step = Step(micro_batches='None')
  plans = compiling.possible_plans(step.exp, step.mesh)
  assert plans[0] == compiling.plan_of(step.exp, step.mesh)
  assert [plan.remat for plan in plans] == sorted(
    (plan.remat for plan in plans), key=['none', 'dots', 'full'].index
  )
  counts = [plan.micro_batches for plan in plans if plan.remat == 'none']
  assert counts == sorted(counts) and counts[-1] == 64 // step.mesh.size
  step = Step(**{'augment.mix.probability': '1'})
  assert all(
    64 // step.mesh.size // plan.micro_batches % 2 == 0  # mixed pairs
    for plan in compiling.possible_plans(step.exp, step.mesh)
  )


def test_values_that_the_config_sets_are_kept():
  step = Step(micro_batches='4', device_memory='1e-5', **{'model.remat': 'dots'})
  exp, _ = step.fit()  # the user decides, even if it does not fit
  assert compiling.plan_of(exp, step.mesh) == Plan(4, 'dots') and exp.parts is None
  step = Step(micro_batches='4', device_memory='0.01')
  assert {plan.micro_batches for plan in compiling.possible_plans(step.exp, step.mesh)} == {4}


def test_programs_may_use_90_percent_of_the_memory_of_a_device():
  step = Step(device_memory='2')
  assert step.exp.budget(step.mesh) == pytest.approx(0.9 * 2 * 1024**3)
  assert step.exp.fitted(None, step.mesh, held=10**6)._budget == step.exp.budget(step.mesh) - 10**6


def test_without_a_limit_the_fastest_micro_batches_are_used():
  step = Step()
  exp, _ = step.fit()
  assert exp.budget(step.mesh) is None and exp.parts is None
  assert exp.saved()['plan'] is None


def test_frozen_models_and_several_patch_sizes_do_not_limit_the_activations():
  sizes = {'model.width': '16', 'model.depth': '16', 'batch_size': '128', 'epochs': '4'}
  parts = lambda **given: Step(**sizes, **given).exp.training_parts(make_mesh())
  whole = parts()
  assert whole > parts(freeze='backbone') == parts(patch_sizes='(4, 8)')


@pytest.mark.parametrize('plan', [Plan(1, 'none'), Plan(32, 'none')])
def test_the_estimate_is_close_to_the_compiled_step(plan):
  step = Step()
  need = compiling.estimator(step.exp, step.mesh, step.state)
  compiled = needed_bytes(step.lower(compiling.planned(step.exp, plan)).compile())
  assert compiled < sum(need(plan)) < 1.4 * compiled


def test_two_plans_compute_the_same_step_up_to_rounding():
  step, found = Step(batch_size='16'), []
  for plan in (Plan(1, 'none'), Plan(16 // step.mesh.size, 'full')):
    exp = compiling.planned(step.exp, plan)
    state = init_state(exp, step.training, step.mesh)
    batch = {
      'image': np.random.RandomState(0).randint(0, 256, (16, 32, 32, 3)).astype(np.uint8),
      'label': np.arange(16, dtype=np.int32) % 10,
    }
    state, metrics = make_train_step(exp, step.training, step.mesh)(state, batch)
    found.append((state.params, summarize([metrics['score']]), metrics['grad_norm']))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), *found)


def test_a_run_that_nothing_fits_says_what_to_lower(tmp_path, capsys):
  with pytest.raises(OutOfMemory) as raised:
    trainer.train(small_config(device_memory='1e-5'), tmp_path / 'run')
  text = str(raised.value)
  assert 'micro_batches=16 with model.remat=full needs the least memory: ' in text
  for key in ('data.image_size', 'model.variant', 'model.dtype=bfloat16', 'mesh.fsdp=-1'):
    assert key in text
  argv = ['--config=tests/small.py', f'--workdir={tmp_path}/cli', '--config.device_memory=1e-5']
  code, _, err = call(capsys, *argv)
  assert (
    code == 2
    and 'error: Training does not fit into memory' in err
    and 'the limit is 9e-06 GiB' in err
  )


def test_a_resumed_run_keeps_its_plan(tmp_path, caplog):
  caplog.set_level('INFO')
  config = small_config(epochs='0.5', device_memory='0.00025')
  trainer.train(config, tmp_path)
  plan = newest_config(tmp_path)['plan']
  assert plan['micro_batches'] > 1
  config.epochs, config.device_memory = 1.0, 64.0
  trainer.train(config, tmp_path)
  assert newest_config(tmp_path)['plan'] == plan
  lines = [text for text in caplog.text.splitlines() if 'a training step needs' in text]
  assert len(lines) == 2 and all('compiled 1 time' in line for line in lines)


def test_a_plan_of_fewer_devices_is_dropped_on_more_devices():
  step = Step()
  rows = 64 // step.mesh.size
  step.exp = dataclasses.replace(step.exp, parts=2 * rows)  # each device had more rows
  exp, _ = step.fit()
  assert exp.parts is None and step.plans[-1].micro_batches <= rows
  kept = dataclasses.replace(step.exp, parts=rows)
  step.exp = kept
  assert step.fit()[0].parts == rows


@pytest.fixture
def full(monkeypatch):
  """Makes the first `count` executed training steps run out of memory; returns their plans."""

  def replace(count):
    plans, real = [], compiling.fit_step

    def fit_step(exp, lower, mesh, state):
      exp, step = real(exp, lower, mesh, state)
      plans.append(compiling.plan_of(exp, mesh))

      def run(*args):
        if len(plans) <= count:
          raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.')
        return step(*args)

      return exp, run

    monkeypatch.setattr(compiling, 'fit_step', fit_step)
    return plans

  return replace


def test_a_run_out_of_memory_is_repeated_once_with_twice_the_micro_batches(full, tmp_path):
  plans = full(1)
  result = trainer.train(small_config(), tmp_path)
  first, second = plans
  assert result['steps'] == 32 and second.micro_batches == 2 * first.micro_batches
  assert newest_config(tmp_path)['plan'] == dataclasses.asdict(second)


def test_the_next_plan_has_micro_batches_of_at_most_half_the_size_or_recomputes_more():
  step = Step(batch_size='96', micro_batches='None', **{'mesh.data': '2'})  # 48 rows each

  def after(plan):
    found = compiling.halved(compiling.planned(step.exp, plan), step.mesh)
    return found and compiling.plan_of(found, step.mesh)

  first = compiling.plan_of(step.exp, step.mesh).micro_batches
  assert first <= 3
  assert after(Plan(3, 'none')) == Plan(6, 'none')  # not 4, which also divides 48
  assert after(Plan(48, 'none')) == Plan(first, 'dots')
  assert after(Plan(48, 'full')) is None


def test_a_run_that_is_out_of_memory_again_says_what_to_lower(full, tmp_path):
  plans = full(2)
  with pytest.raises(OutOfMemory, match='Raise micro_batches or set model.remat=full'):
    trainer.train(small_config(), tmp_path)
  assert len(plans) == 2


def test_given_micro_batches_are_not_changed_when_memory_runs_out(full, tmp_path):
  plans = full(1)
  with pytest.raises(OutOfMemory):
    trainer.train(small_config(micro_batches='2', **{'model.remat': 'none'}), tmp_path)
  assert plans == [Plan(2, 'none')]


def test_inspect_estimates_the_plan_for_a_memory_limit():
  exp, _ = opening.from_config(small_config(**WIDE))
  free = cost.measure(exp, 64)
  exp.config.device_memory = 0.012
  found = cost.measure(exp, 64)
  assert found.at_once < free.at_once
  assert f'micro_batches={found.exp.parts} and model.remat=none' in cost.as_text(found)
  assert found.exp.saved()['plan'] == {
    'micro_batches': 64 // found.devices // found.at_once,
    'remat': 'none',
  }


@pytest.mark.long
def test_b16_at_384_pixels_fits_8_gib_with_a_batch_of_512(monkeypatch):
  """Compiles for this CPU; `benchmarks.compile` does the same for an H200."""
  from benchmarks import compile as compiler

  config = compiler.load('configs/finetune.py:b16,cifar10 --config.device_memory=8', 512)
  exp, training = compiler.build(config)
  mesh, plans = make_mesh(512), []
  shapes = compiler.shapes_of(exp, training)

  def lower(exp):
    plans.append(compiling.plan_of(exp, mesh))
    return compiler.trace_step(exp, training, mesh).lower()

  # As on an accelerator: the micro-batches that suit a CPU's cache would fit anyway.
  monkeypatch.setattr(experiment, 'micro_batches', lambda *_: 1)
  _, step = compiling.fit_step(exp, lower, mesh, shapes)
  assert needed_bytes(step) <= 0.9 * 8 * 2**30 and len(plans) <= 3
