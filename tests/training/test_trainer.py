"""Tests the loop: resuming bit for bit, exact evaluation, workdir content, rejected runs."""

from collections.abc import Callable
import dataclasses
import itertools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from tests.conftest import ROOT, run_model, small_config
from vit_jax import config as config_lib
from vit_jax import evaluation, experiment, opening
from vit_jax.data import batching
from vit_jax.data.memory import Examples
from vit_jax.distributed import Target, cluster, compiled_for, sharding
from vit_jax.distributed import devices as devices_lib
from vit_jax.evaluation import exact, scoring
from vit_jax.experiment import Experiment
from vit_jax.optim import plan as plan_lib
from vit_jax.training import compiling, loop, meter, resume, session, state, step, trainer
from vit_jax.training.compiling import Compiled
from vit_jax.training.loop import Run
from vit_jax.training.step import make_train_step
from vit_jax.weights import reader
from vit_jax.workdir import Task, lock, stored, writer

TRAIN = """
import sys, json
from tests.conftest import small_config
from vit_jax.training import trainer
trainer.train(small_config(**json.loads(sys.argv[2])), sys.argv[1])
assert 'tensorflow' not in sys.modules, 'training imports TensorFlow'
"""


def start_process(workdir, **overrides):
  """Starts a separate training process."""
  command = [sys.executable, '-c', TRAIN, str(workdir), json.dumps(overrides)]
  return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.long  # .ci/run kills runs with benchmarks/faults.py
def test_killed_run_resumes_bit_for_bit(tmp_path):
  overrides = {'epochs': '10', 'ema': '0.9', 'augment.pad_crop.padding': '1'}
  whole = start_process(tmp_path / 'whole', **overrides)
  assert whole.wait(120) == 0, whole.stderr.read().decode()

  killed = start_process(tmp_path / 'killed', **overrides)
  while (stored.latest_step(tmp_path / 'killed') or 0) < 96:
    assert killed.poll() is None, killed.stderr.read().decode()
    time.sleep(0.01)
  os.kill(killed.pid, signal.SIGKILL)
  assert killed.wait() == -signal.SIGKILL
  assert not (tmp_path / 'killed' / 'result.json').exists()
  resumed = start_process(tmp_path / 'killed', **overrides)
  assert resumed.wait(120) == 0, resumed.stderr.read().decode()

  step, params, saved = stored.load_checkpoint(tmp_path / 'whole')
  again, same_params, _ = stored.load_checkpoint(tmp_path / 'killed')
  assert step == again == 10 * 32 and saved['config']['ema'] == 0.9
  last = writer.read_metrics(tmp_path / 'whole')[-1]
  assert last['split'] == 'test' and 0 < abs(last['raw_loss'] - last['loss']) < 1
  assert_equal(params, same_params)
  for item in ('params', 'state'):
    assert_equal(
      *[stored.restore_item(tmp_path / name, step, item) for name in ('whole', 'killed')]
    )
  lines = [writer.read_metrics(tmp_path / name) for name in ('whole', 'killed')]
  test = [[line for line in part if line['split'] == 'test'] for part in lines]
  assert test[0] == test[1]  # no line twice, none missing, equal to the last digit
  assert 'Resuming from step' in (tmp_path / 'killed' / 'log.txt').read_text()


def test_xla_accepts_the_deterministic_option():
  double = jax.jit(lambda x: 2 * x, compiler_options=step.DETERMINISTIC)
  assert double(jnp.ones(())) == 2  # XLA rejects unknown options


@pytest.mark.parametrize('platform, wanted, options', [
    ('cuda', True, step.DETERMINISTIC), ('rocm', True, step.DETERMINISTIC), ('cuda', False, None),
    ('cpu', True, None), ('tpu', True, None),
])  # fmt: skip
def test_only_a_deterministic_run_on_a_gpu_gets_the_option(monkeypatch, platform, wanted, options):
  monkeypatch.setattr(step, 'jax', types.SimpleNamespace(jit=lambda function, **given: given))
  exp = types.SimpleNamespace(config=types.SimpleNamespace(deterministic=wanted))
  with compiled_for(Target(platform)):
    given = make_train_step(exp, None, None)
  assert given == {'donate_argnums': 0, 'compiler_options': options}


def test_run_writes_result_config_metrics_and_examples(trained):
  workdir, result = trained
  assert json.loads((workdir / 'result.json').read_text()) == result
  assert json.loads((workdir / 'config.json').read_text()) == result['config']
  assert result['steps'] == 32 and result['examples'] == 256
  assert result['test_accuracy'] > 0.5  # ten noisy patterns, so chance is 0.1
  lines = writer.read_metrics(workdir)
  train = [line for line in lines if line['split'] == 'train']
  assert [line['step'] for line in train] == [8, 16, 24, 32]
  assert all(line['examples'] == 256 and line['images_per_second'] > 0 for line in train)
  rates = [line['learning_rate'] for line in train]
  assert rates[0] == pytest.approx(1e-2 * (1 + np.cos(np.pi * 1 / 26)) / 2, rel=1e-4)
  assert rates[-1] > 0 and rates == sorted(rates, reverse=True)
  test = [line for line in lines if line['split'] == 'test']
  assert [line['step'] for line in test] == [16, 32]
  assert test[-1]['accuracy'] == result['test_accuracy']
  assert all('top5_accuracy' not in line for line in train)
  assert list((workdir / 'tensorboard').glob('events.*'))
  assert 'block_0/attention/query/kernel' in (workdir / 'log.txt').read_text()
  assert len(list((workdir / 'examples').glob('*.png'))) == 8


def test_long_class_names_are_cut_to_a_valid_file_name(tmp_path):
  exp = types.SimpleNamespace(task=Task(('猫' * 99, 'dog'), (4, 4), 3))
  test = Examples(np.zeros((2, 4, 4, 3), np.uint8), np.arange(2, dtype=np.int32))
  resume.save_examples(exp, test, tmp_path)
  names = sorted(path.name for path in (tmp_path / 'examples').iterdir())
  assert names == [f'0_{"猫" * 33}.png', '1_dog.png']


def test_examples_are_named_after_all_their_labels(tmp_path):
  exp = types.SimpleNamespace(task=Task(('cat', 'red dog'), (4, 4), 3, multi_label=True))
  label_NL = np.array([[1, 1], [0, 1], [0, 0]], np.uint8)
  resume.save_examples(exp, Examples(np.zeros((3, 4, 4, 3), np.uint8), label_NL), tmp_path)
  names = sorted(path.name for path in (tmp_path / 'examples').iterdir())
  assert names == ['0_cat-red-dog.png', '1_red-dog.png', '2_no-label.png']


def test_training_a_finished_run_changes_no_file(trained):
  workdir, result = trained
  snapshot = lambda: {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in workdir.rglob('*')}
  before = snapshot()
  assert trainer.train(small_config(), workdir) == result
  assert snapshot() == before


def test_a_result_belongs_to_its_epochs_and_test_split(trained):
  workdir, result = trained
  found = lambda **others: resume.finished_result(small_config(**others), workdir)
  assert found() == found(log_every='3') == result
  assert found(epochs='2') is found(**{'data.eval_split': 'test[:50%]'}) is None


def test_no_scores_of_another_test_split_are_kept(trained, tmp_path):
  workdir = shutil.copytree(trained[0], tmp_path / 'run')
  lines = lambda: [line for line in writer.read_metrics(workdir) if line['split'] == 'test']
  tested = lambda: {line['step']: line['examples'] for line in lines()}
  assert tested() == {16: 256, 32: 256}
  result = trainer.train(small_config(**{'data.eval_split': 'test[:50%]'}), workdir)
  assert tested() == {32: 128} and result['examples'] == 128


@pytest.mark.slow
def test_bfloat16_moments_survive_a_resume(tmp_path):
  rounded = {'optimizer.moment_dtype': 'bfloat16'}  # checkpoints must store this type too
  trainer.train(small_config(epochs='0.25', **rounded), tmp_path)
  result = trainer.train(small_config(epochs='0.5', log_every='4', **rounded), tmp_path)
  assert result['steps'] == 16 and stored.latest_step(tmp_path) == 16


def test_other_epochs_are_rejected_before_the_run_is_finished(trained, tmp_path):
  workdir = shutil.copytree(trained[0], tmp_path / 'run')
  shutil.rmtree(workdir / 'checkpoints' / '32')
  before = contents(workdir)
  for epochs in ('0.75', '2'):
    with pytest.raises(ValueError, match=f'at step 16 of 32: epochs=1 cannot become {epochs}'):
      trainer.train(small_config(epochs=epochs), workdir)
  assert contents(workdir) == before


@pytest.mark.long
def test_resume_without_config_uses_all_cores(tmp_path):
  """Uses separate processes, because conftest sets the number of devices in this one."""
  new = [
      '--config=configs/digits.py', '--config.model.depth=1', '--config.batch_size=64',
      '--config.data.source=synthetic', '--config.eval_batch_size=64', '--config.epochs=0.1',
  ]  # fmt: skip
  for flags in (new, ['--config.epochs=0.2']):
    command = [sys.executable, 'main.py', f'--workdir={tmp_path}', *flags]
    subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.PIPE)
  log = (tmp_path / 'log.txt').read_text()
  devices = f'on {min(cluster.num_cores(), 2)} cpu device(s)'
  assert log.count(devices) == 2 and 'Resuming from step 2' in log


@pytest.mark.slow
def test_too_few_devices_for_the_batch_are_logged(tmp_path):
  script = (
    'import sys, jax; jax.devices(); from tests.conftest import small_config\n'
    'from vit_jax.distributed import cluster\n'
    'from vit_jax.training import trainer; cluster.num_cores = lambda: 4\n'
    "trainer.train(small_config(epochs='0', batch_size='96'), sys.argv[1])"
  )
  script = script.replace('from tests', 'jax.config.update = lambda *_: None; from tests')
  subprocess.run([sys.executable, '-c', script, tmp_path], cwd=ROOT, check=True)
  warning = 'WARNING JAX was started with 1 CPU device(s), but batch_size=96 would use 3. '
  assert warning in (tmp_path / 'log.txt').read_text()


def test_processes_may_differ_only_in_where_and_how_they_read_data(monkeypatch, tmp_path):
  compared = {}
  monkeypatch.setattr(resume, 'check_same', lambda what, values: compared.update(values))
  config = small_config()
  resume.check_in_all_processes(config, tmp_path)
  left_out = config_lib.flatten(config).keys() - compared.keys()
  assert left_out == {'data.dir', 'data.workers', 'data.threads'}


def test_another_config_is_rejected(trained):
  workdir, _ = trained
  with pytest.raises(ValueError, match=r'optimizer\.lr: 0\.01 in the workdir, 0\.1 given'):
    trainer.train(small_config(**{'optimizer.lr': '0.1'}), workdir)


@pytest.mark.parametrize('batch_size', [7, 64, 256, 1000])
def test_evaluation_is_exact_for_any_batch_size(trained, batch_size):
  workdir, result = trained
  out = exact.evaluate(workdir, {'eval_batch_size': str(batch_size)})
  assert out['examples'] == 256 and out['accuracy'] == result['test_accuracy']
  assert out['loss'] == pytest.approx(result['test_loss'], abs=1e-6)


def test_evaluation_equals_the_mean_in_float64(trained):
  workdir, result = trained
  exp, params, _ = opening.from_workdir(workdir)
  test = evaluation.load_split(exp, 'test')
  logits = run_model(exp.model, params, exp.normalize(test.image_NHWC))
  logits = np.asarray(logits, np.float64)
  log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  assert result['test_loss'] == pytest.approx(-log_p[np.arange(256), test.label_N].mean(), abs=1e-6)
  assert result['test_accuracy'] == (logits.argmax(1) == test.label_N).mean()
  top5 = (logits.argsort(axis=1)[:, -5:] == test.label_N[:, None]).any(axis=1).mean()
  assert writer.read_metrics(workdir)[-1]['top5_accuracy'] == top5


def prepare(parts, devices, cycles=(), **overrides):
  """Returns the step, a first state and batches, in `parts` micro-batches on `devices` devices.

  All parameters are random, because a head of zeros would hide the gradient of the other ones.
  """
  config = small_config(micro_batches=str(parts), **overrides)
  exp, training = opening.from_config(config, cycles=cycles)
  mesh = devices_lib.make_mesh(32, parts, shape=devices_lib.ALL_DATA | {'data': devices})
  train_state, _ = state.start_state(exp, training, mesh, NoCheckpoints())
  draw = np.random.RandomState(0).normal
  params = jax.tree.map(lambda x: x + 0.1 * draw(size=x.shape), train_state.params)
  train_state = train_state.replace(params=params)
  step = make_train_step(exp, training, mesh)
  batches = batching.train_batches(training.train, 32, 0, 0, sharding.batch_sharding(mesh))
  return step, train_state, batches


@pytest.mark.slow
def test_training_does_not_compute_top_5_accuracy():
  step, train_state, batches = prepare(2, 1)
  assert 'top_k' not in step.lower(train_state, next(batches)).as_text()


def two_steps(parts, devices, **overrides):
  """Returns parameters and metrics after two steps."""
  step, train_state, batches = prepare(parts, devices, **overrides)
  for _ in range(2):
    train_state, metrics = step(train_state, next(batches))
  return jax.device_get(train_state.params), jax.device_get(metrics)


def test_evaluation_uses_averaged_weights_and_also_reports_raw_ones():
  score = lambda params, examples: {'loss': params, 'accuracy': params + 1, 'examples': 8}
  run = types.SimpleNamespace(
    training=types.SimpleNamespace(val=None, test=[]),
    records=types.SimpleNamespace(write=lambda *_, **__: None),
    score=score,
  )
  now = state.TrainState(step=4, params=20, opt_state=None, ema=10)
  scores = Run.evaluate(run, 4, now)
  averaged = {'loss': 10, 'accuracy': 11, 'examples': 8}
  assert scores == {'test': averaged | {'raw_loss': 20, 'raw_accuracy': 21}}
  assert Run.evaluate(run, 4, now.replace(ema=None)) == {'test': score(20, [])}


class NoCheckpoints:
  def latest(self):
    return None


def test_average_starts_at_the_weights_of_init(monkeypatch):
  random, weights = {'kernel': jnp.zeros(3)}, {'kernel': np.arange(3, dtype=np.float32)}
  blank = state.TrainState(jnp.int32(0), random, (), random)
  monkeypatch.setattr(state, 'init_state', lambda *_: blank)
  exp, training = opening.from_config(small_config(ema='0.9'))
  training = dataclasses.replace(training, params=weights)
  begun, _ = state.start_state(exp, training, devices_lib.make_mesh(), NoCheckpoints())
  assert_equal(begun.params, weights)
  assert_equal(begun.ema, weights)


@dataclasses.dataclass(frozen=True)
class Simple(Experiment):
  """An experiment with one parameter, whose gradient is a function of the step's key."""

  slope: Callable = lambda key: 7.0

  def logits(self, params, batch, key=None):
    return params['weight'] * self.slope(key) * jnp.ones((len(batch['label']), 10))


def simple(exp, slope):
  """Returns a `Simple` experiment whose loss is the first logit."""
  augment_and_mix = lambda key, example_B, image_BHWC, early: (image_BHWC, jnp.ones(len(example_B)))
  loss = lambda logits_BL, label_B: logits_BL[:, 0]
  return Simple(**vars(exp) | dict(augment_and_mix=augment_and_mix, loss=loss), slope=slope)


SIMPLE_BATCH = {'image': np.zeros(32, np.float32), 'label': np.zeros(32, np.int32)}


@pytest.mark.slow
def test_draws_differ_between_steps_and_seeds():
  def draws(seed):
    exp, training = opening.from_config(small_config(seed=str(seed), micro_batches='2'))
    mesh = devices_lib.make_mesh(32, 2)
    step = make_train_step(simple(exp, jax.random.uniform), training, mesh)
    params = {'weight': jnp.ones(())}
    for i in (0, 1, 2, 1):
      now = state.TrainState(jnp.int32(i), params, training.optimizer.init(params), None)
      yield float(step(jax.tree.map(jnp.array, now), SIMPLE_BATCH)[1]['grad_norm'])

  zero, one, two, again = draws(0)
  assert len({zero, one, two, *draws(1)}) == 6
  assert again == one


def test_gradient_norm_is_reported_before_clipping():
  exp, training = opening.from_config(small_config(**{'optimizer.clip': '0.1'}))
  step = make_train_step(simple(exp, lambda key: 7.0), training, devices_lib.make_mesh(1))
  params = {'weight': jnp.ones(())}
  now = state.TrainState(jnp.int32(0), params, training.optimizer.init(params), None)
  assert float(step(now, SIMPLE_BATCH)[1]['grad_norm']) == 7


def test_a_step_counts_the_bad_images_of_its_batch():
  exp, training = opening.from_config(small_config())
  step = make_train_step(simple(exp, lambda key: 7.0), training, devices_lib.make_mesh(1))
  params = {'weight': jnp.ones(())}
  now = state.TrainState(jnp.int32(0), params, training.optimizer.init(params), None)
  bad_B = np.arange(32) % 5 == 0
  assert int(step(now, SIMPLE_BATCH | {'bad': bad_B})[1]['bad_images']) == 7


def test_bad_images_are_counted_since_the_last_log_line():
  score = scoring.training_score(jnp.zeros((2, 3)), jnp.zeros(2, int), jnp.ones(2))
  metrics = {'score': score, 'grad_norm': 1.0, 'learning_rate': 0.1}
  step = Compiled(None, 0, False, None)
  lines = meter.Meter(devices_lib.make_mesh(1), 'float32')
  lines.add(1, metrics | {'bad_images': np.int32(2)}, step)
  lines.add(2, metrics | {'bad_images': np.int32(1)}, step)
  assert lines.read()['bad_images'] == 3
  lines.add(3, metrics | {'bad_images': np.int32(0)}, step)
  assert lines.read()['bad_images'] == 0
  lines.add(4, metrics, step)
  assert 'bad_images' not in lines.read()


def test_a_resume_counts_earlier_time_and_creates_no_second_state():
  given = []

  def restore(like):
    given.extend(jax.tree.leaves(like))
    return like.replace(step=jnp.int32(5)), {'seconds': 1000.0}

  found = types.SimpleNamespace(latest=lambda: 5, restore=restore)
  exp, training = opening.from_config(small_config(ema='0.9'))
  begun, seconds = state.start_state(exp, training, devices_lib.make_mesh(), found)
  assert begun.step == 5 and seconds == 1000
  assert {type(x) for x in given} == {jax.ShapeDtypeStruct}  # no arrays on the devices


def test_seconds_of_earlier_sessions_count_in_the_result(monkeypatch):
  blank = state.TrainState(jnp.int32(32), {'w': jnp.zeros((2, 3)), 'b': jnp.zeros(3)}, (), None)
  scores = {'test': {'loss': 1.5, 'accuracy': 0.25, 'examples': 256}}
  monkeypatch.setattr(loop, 'start_state', lambda *_: (blank, 1000.0))
  monkeypatch.setattr(loop, 'make_eval_step', lambda *_, **__: None)
  monkeypatch.setattr(Run, 'evaluate_start', lambda *_: scores)
  kept = types.SimpleNamespace(latest=lambda: 32, wait=lambda: None)
  exp, training = opening.from_config(small_config())
  run = Run(exp, training, devices_lib.make_mesh(32), None, kept, None, {'lr': 0.5})
  result = run.run()
  assert 1000 <= result['seconds'] < 1100
  assert (result['test_loss'], result['test_accuracy'], result['examples']) == (1.5, 0.25, 256)
  assert (result['steps'], result['params'], result['lr']) == (32, 9, 0.5)


def test_a_run_reads_images_in_the_order_of_its_seed_from_its_step(monkeypatch):
  given = []

  def train_batches(examples, *arguments):
    given.append((examples, arguments[:3]))
    raise KeyboardInterrupt

  monkeypatch.setattr(loop, 'train_batches', train_batches)
  exp, training = opening.from_config(small_config(seed='7'))
  run = Run(exp, training, devices_lib.make_mesh(32), None, None, None, {})
  with pytest.raises(KeyboardInterrupt):
    run.loop(None, 5, 32)
  assert given == [(training.train, (32, 7, 5))]  # batch size, seed, first step


def test_initial_weights_depend_on_the_seed(monkeypatch):
  """Stand-ins for the model, the adapter and the decoder show which random key each one gets."""
  draw = lambda key: {'w': jax.random.normal(key, (4,))}
  monkeypatch.setattr(state, 'adapted', lambda params, key, *_: params | {'lora': draw(key)})
  mesh, found = devices_lib.make_mesh(), []
  for seed in (0, 1):
    exp = types.SimpleNamespace(
      config=small_config(seed=str(seed)),
      model=types.SimpleNamespace(init=lambda key, image_BHWC: {'params': draw(key)}),
      image_shape=(8, 8, 3),
      objective=types.SimpleNamespace(init=lambda exp, key: {'decoder': draw(key)}),
      split=lambda params: (params, {}),
    )
    optimizer = types.SimpleNamespace(init=lambda params: ())
    params = state.init_state(exp, types.SimpleNamespace(optimizer=optimizer), mesh).params
    found += [tuple(leaf.tolist()) for leaf in jax.tree.leaves(params)]
  assert len({*found}) == len(found) == 6


def test_dropout_of_a_training_step_depends_on_the_example():
  exp, _ = opening.from_config(small_config(**{'model.dropout': '0.5', 'model.depth': '1'}))
  shape = (*exp.task.stored_size, exp.task.channels)
  params = jax.eval_shape(exp.model.init, jax.random.key(0), jnp.zeros((1, *shape)))['params']
  draw = np.random.RandomState(0)
  params = jax.tree.map(lambda x: draw.normal(size=x.shape).astype(np.float32), params)
  image_BHWC = np.repeat(draw.randint(0, 256, (1, *shape)).astype(np.uint8), 3, axis=0)
  batch = {'image': image_BHWC, 'example': np.array([4, 4, 5])}
  first, again, other = jax.jit(exp.logits)(params, batch, jax.random.key(0))
  np.testing.assert_array_equal(first, again)
  assert abs(first - other).max() > 0.01


@pytest.mark.slow
def test_micro_batches_and_devices_change_only_rounding():
  settings = {'model.dropout': '0.2', 'optimizer.name': 'sgd', 'optimizer.lr': '0.1'}
  params, metrics = two_steps(1, 1, **settings)
  summary = scoring.summarize([metrics['score']])
  for parts, devices in ((1, 2), (4, 2)):
    other, other_metrics = two_steps(parts, devices, **settings)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), params, other)
    assert scoring.summarize([other_metrics['score']]) == pytest.approx(summary, rel=1e-5)


STRONG = {
  'augment.rand_augment.num_layers': '1', 'augment.rand_augment.probability': '1',
  'augment.mix.probability': '0.9', 'model.depth': '1',
}  # fmt: skip


@pytest.mark.long
def test_micro_batches_and_devices_mix_the_same_images():
  settings = STRONG | {'optimizer.name': 'sgd', 'optimizer.lr': '0.1', 'loss.name': 'sigmoid'}
  params, metrics = two_steps(1, 1, **settings)
  other, other_metrics = two_steps(4, 2, **settings)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), params, other)
  assert float(other_metrics['grad_norm']) == pytest.approx(float(metrics['grad_norm']), rel=1e-5)


@pytest.mark.slow
def test_strong_augmentation_ends_at_off_for_last():
  norms = {}
  for name, settings in {
    'weak': {'model.depth': '1'},
    'strong': STRONG | {'augment.off_for_last': '0.25'},
  }.items():
    step, train_state, batches = prepare(1, 1, **settings)
    kept, batch = jax.device_get(train_state), next(batches)
    for i in (0, 23, 24, 31):  # the run has 32 steps
      state = kept.replace(step=np.int32(i))
      metrics = step(jax.tree.map(jnp.array, state), batch)[1]
      norms[name, i] = float(metrics['grad_norm'])
  for i in (0, 23):
    assert norms['weak', i] != pytest.approx(norms['strong', i], rel=1e-2)
  for i in (24, 31):
    assert norms['weak', i] == pytest.approx(norms['strong', i], rel=1e-5)


@pytest.mark.parametrize('epochs, steps', [('1', 3), ('0.3', 1), ('0.4', 1), ('7', 21)])
def test_number_of_steps_is_rounded(epochs, steps):
  assert plan_lib.num_steps(small_config(epochs=epochs), 95) == steps  # batches of 32


@pytest.mark.slow
def test_added_cycle_has_only_weak_augmentation():
  norms = {}
  for name, settings in {'weak': {'model.depth': '1'}, 'strong': STRONG}.items():
    step, train_state, batches = prepare(1, 1, cycles=(32,), epochs='2', **settings)
    kept, batch = jax.device_get(train_state), next(batches)
    for i in (31, 32):
      metrics = step(jax.tree.map(jnp.array, kept.replace(step=np.int32(i))), batch)[1]
      norms[name, i] = float(metrics['grad_norm'])
  assert norms['weak', 31] != pytest.approx(norms['strong', 31], rel=1e-2)
  assert norms['weak', 32] == pytest.approx(norms['strong', 32], rel=1e-5)


def test_added_cycles_warm_up_to_half_the_peak_and_decay():
  config = small_config(epochs='3', **{'schedule.warmup': '0.125', 'progressive.sizes': '4',
                                       'progressive.until': '0.5'})  # fmt: skip
  found = plan_lib.training_recipe(config, 1024, (32, 64))
  rates = [float(found['schedule'](jnp.int32(i))) for i in range(96)]
  cycle = [min((i + 1) / 4, (1 + np.cos(np.pi * max(i - 4, 0) / 28)) / 2) for i in range(32)]
  expected = np.concatenate([0.01 * np.array(cycle), *2 * [0.005 * np.array(cycle)]])
  np.testing.assert_allclose(rates, expected, rtol=1e-4)
  assert found['stages'] == ((16, (4, 4)), (96, (8, 8)))
  assert (found['steps'], found['early_steps']) == (96, 32)


@pytest.mark.parametrize('epochs, start, cycles', [('0', 0, ()), ('1', 32, (32,))])
def test_a_run_of_zero_steps_resumes_in_its_first_cycle(epochs, start, cycles, tmp_path):
  item = {'config': config_lib.to_dict(small_config(epochs=epochs))}
  item |= {'task': {'train_examples': 1024}}
  assert resume.add_cycle(small_config(epochs='2'), item, start, tmp_path) == cycles


def die(step):
  """Returns a `Run.log` that interrupts the run at this step."""

  def log(self, now, *_):
    if now == step:
      raise KeyboardInterrupt

  return log


@pytest.mark.slow
def test_more_epochs_on_a_finished_run_add_a_cycle_that_resumes_bit_for_bit(trained, tmp_path):
  whole, killed = (shutil.copytree(trained[0], tmp_path / name) for name in ('whole', 'killed'))
  result = trainer.train(small_config(epochs='2'), whole)
  assert result['steps'] == 64 and result['config']['epochs'] == 2
  line = 'cycle 2, steps 33 to 64: 6 steps of warm-up to a rate of 0.005, then cosine. '
  assert line + 'Images are only cropped and flipped.' in (whole / 'log.txt').read_text()
  rates = {
    line['step']: line['learning_rate']
    for line in writer.read_metrics(whole)
    if line['split'] == 'train'
  }
  assert rates[40] == pytest.approx(0.0025 * (1 + np.cos(np.pi * 1 / 26)), rel=1e-4)

  for end in (40, 56):  # before and after the cycle's first checkpoint
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(Run, 'log', die(end))
      overrides = {'epochs': '2'} if end == 40 else {}
      with pytest.raises(KeyboardInterrupt):
        trainer.train(resume.saved_config(killed, overrides), killed)
  with pytest.raises(ValueError, match='at step 48 of 64: epochs=2 cannot become 3 before'):
    trainer.train(small_config(epochs='3'), killed)
  trainer.train(resume.saved_config(killed, {}), killed)
  for item in ('params', 'state'):
    assert_equal(*[stored.restore_item(path, 64, item) for path in (whole, killed)])
  assert sorted(stored.saved_steps(whole)) == [32, 48, 64]  # the first cycle's end is kept too

  with pytest.raises(ValueError, match='step 64, but a run with epochs=1 ends at step 32'):
    trainer.train(small_config(), whole)
  finished, _, cycles = resume.begin(small_config(epochs='2.5'), whole)
  assert not finished and cycles == (32, 64)


VALIDATED = {
  'eval_every': '0', 'checkpoint_every': '8', 'keep_checkpoints': '1', 'data.train_split':
  'train[:50%]', 'data.val_split': 'train[50%:]', 'epochs': '2',
}  # fmt: skip


@pytest.fixture
def scored(monkeypatch):
  """Makes evaluations return given accuracies, the best ones in the middle, the last one twice."""
  scores = {'val': [0.2, 0.9, 0.4, 0.5], 'test': [0.3, 0.4, 0.8, 0.6]}
  scores = {name: iter([*values, values[-1]]) for name, values in scores.items()}

  def score(self, params, examples):
    split = 'val' if examples is self.training.val else 'test'
    return {'accuracy': next(scores[split]), 'loss': 1.0, 'examples': len(examples)}

  monkeypatch.setattr(Run, 'score', score)


def assert_best_is_used(workdir, result):
  """Checks that step 16 is kept in addition to the last step, and loaded by default."""
  assert sorted(stored.saved_steps(workdir)) == [16, 32]
  assert result['best'] == {'step': 16, 'val_accuracy': 0.9, 'test_accuracy': 0.4}
  assert result['last'] == {'step': 32, 'val_accuracy': 0.5, 'test_accuracy': 0.6}
  assert (result['test_accuracy'], result['val_accuracy'], result['steps']) == (0.6, 0.5, 32)
  steps = {step: stored.load_checkpoint(workdir, step)[0] for step in ('', 'best', 'last', '32')}
  assert steps == {'': 16, 'best': 16, 'last': 32, '32': 32}


@pytest.mark.slow
def test_best_checkpoint_on_val_is_kept_besides_the_newest(tmp_path, scored, caplog):
  result = trainer.train(small_config(**VALIDATED), tmp_path)
  with caplog.at_level('INFO'):
    assert_best_is_used(tmp_path, result)
  assert 'step 16, validation accuracy 90.00%, the best of the 2 checkpoint(s) kept' in caplog.text
  assert 'step 32, the last checkpoint' in caplog.text
  assert exact.evaluate(tmp_path, {})['step'] == 16
  assert reader.read_weights(tmp_path).run['step'] == 32  # `init` starts from the last step


@pytest.mark.slow
def test_resume_evaluates_the_checkpoint_saved_by_a_stop(tmp_path, scored, monkeypatch):
  calls = itertools.count(1)
  with monkeypatch.context() as patch:
    patch.setattr(cluster.Preemption, 'is_due', lambda self: next(calls) == 16)
    with pytest.raises(cluster.Preempted):
      trainer.train(small_config(**VALIDATED), tmp_path)
  assert stored.accuracies(tmp_path) == {8: 0.2}
  assert_best_is_used(tmp_path, trainer.train(small_config(**VALIDATED), tmp_path))


@pytest.mark.slow
def test_a_damaged_best_checkpoint_does_not_keep_a_run_from_finishing(tmp_path, scored, caplog):
  result = trainer.train(small_config(**VALIDATED), tmp_path)
  (tmp_path / 'result.json').unlink()
  for path in (tmp_path / 'checkpoints/16/params').rglob('d/*'):
    path.write_bytes(b'')
  again = trainer.train(small_config(**VALIDATED), tmp_path)
  assert again['last'] == result['last'] and (tmp_path / 'result.json').exists()
  assert 'checkpoints/16 is damaged' in caplog.text and 'not calibrated' in caplog.text


@pytest.mark.parametrize('name, content, message', [
  ('config.json', '{"model_type": "vit"}', 'config.json is not the config of a run'),
  ('checkpoints', None, 'checkpoints is a link to .*nowhere, which does not exist'),
  ('result.json', '{"steps": 32}', 'the result of a finished run, but .* has no checkpoint'),
  ('config.json', '{"optimizer": {}, "checkpoint_every": 4}', 'step 9, so the run has saved'),
])  # fmt: skip
def test_a_new_run_replaces_nothing_that_a_folder_holds(tmp_path, name, content, message):
  if content is None:
    (tmp_path / name).symlink_to(tmp_path / 'nowhere')
  else:
    (tmp_path / name).write_text(content)
  (tmp_path / 'metrics.jsonl').write_text('{"step": 9, "split": "train"}\n')
  with pytest.raises(ValueError, match=message):
    trainer.train(small_config(), tmp_path)
  assert {path.name for path in tmp_path.iterdir()} == {'metrics.jsonl', name}
  assert writer.read_metrics(tmp_path)[0]['step'] == 9


@pytest.mark.parametrize('every, damaged', [(5, ''), (0, ''), (4, '4-123')])
def test_a_run_that_may_not_have_saved_a_checkpoint_starts_again(tmp_path, caplog, every, damaged):
  (tmp_path / 'config.json').write_text(f'{{"optimizer": {{}}, "checkpoint_every": {every}}}')
  (tmp_path / 'metrics.jsonl').write_text('{"step": 9, "split": "train"}\n')
  (tmp_path / 'damaged' / damaged).mkdir(parents=True)
  trainer.check_new(tmp_path, '')
  assert 'metrics up to step 9, but no checkpoint. Training starts again' in caplog.text


def test_a_key_without_a_value_keeps_the_value_of_the_run(tmp_path, monkeypatch, caplog):
  saved = config_lib.to_dict(small_config(**{'model.remat': 'full'}))
  item = {'config': saved, 'task': {'train_examples': 1024}, 'version': '0.2.0'}
  monkeypatch.setattr(resume, 'latest_step', lambda _: 8)
  monkeypatch.setattr(resume, 'restore_item', lambda *_: item)
  caplog.set_level('INFO')
  resume.begin(small_config(checkpoint_every='None'), tmp_path)
  assert 'keep the value of the run: checkpoint_every=16, model.remat=full.' in caplog.text


def test_a_stop_signal_before_the_second_attempt_is_not_forgotten(tmp_path, monkeypatch):
  exp, training = opening.from_config(small_config())
  mesh = experiment.mesh_for(exp.config)

  def attempt(exp, *_, retries=True):
    with cluster.Preemption() as preemption:
      if retries:
        signal.raise_signal(signal.SIGTERM)
        return exp  # as if memory ran out
      raise cluster.Preempted('second') if preemption.is_due() else AssertionError

  monkeypatch.setattr(session, 'attempt', attempt)
  with pytest.raises(cluster.Preempted, match='second'):
    session.fit(exp, training, mesh, tmp_path)


@pytest.mark.slow
def test_run_interrupted_before_its_result_is_finished_without_training(tmp_path):
  result = trainer.train(small_config(), tmp_path)
  lines = writer.read_metrics(tmp_path)
  (tmp_path / 'result.json').write_text('{"half')
  again = trainer.train(small_config(), tmp_path)
  assert again['test_loss'] == result['test_loss'] and writer.read_metrics(tmp_path) == lines


@pytest.mark.slow
def test_run_killed_before_its_calibration_is_calibrated_by_the_next_start(tmp_path, monkeypatch):
  def kill(*_):
    raise KeyboardInterrupt

  config = small_config(**VALIDATED | {'epochs': '0.5'})
  with monkeypatch.context() as patch:
    patch.setattr(session, 'calibrate_run', kill)
    with pytest.raises(KeyboardInterrupt):
      trainer.train(config, tmp_path)
  result = trainer.train(config, tmp_path)
  fitted = writer.read_json(tmp_path / 'calibration.json')
  assert {int(step) for step in fitted} == {result['last']['step'], result['best']['step']}


@pytest.mark.slow
def test_stop_request_saves_without_evaluating(trained, tmp_path, monkeypatch):
  steps = lambda lines: [(line['step'], line['split']) for line in lines]
  calls = itertools.count(1)  # one call after each step
  with monkeypatch.context() as patch:
    patch.setattr(cluster.Preemption, 'is_due', lambda self: next(calls) == 16)
    patch.setattr(Run, 'evaluate', None)  # calling it would fail
    with pytest.raises(cluster.Preempted, match='step 16 of 32 is saved'):
      trainer.train(small_config(), tmp_path)
  assert steps(writer.read_metrics(tmp_path)) == [(8, 'train'), (16, 'train')]
  trainer.train(small_config(), tmp_path)
  whole, stopped = (writer.read_metrics(workdir) for workdir in (trained[0], tmp_path))
  assert steps(stopped) == steps(whole)
  test = [[line for line in part if line['split'] == 'test'] for part in (whole, stopped)]
  assert test[0] == test[1]


@pytest.mark.slow
def test_a_stop_between_two_log_lines_loses_no_metrics(tmp_path, monkeypatch):
  calls = itertools.count(1)
  with monkeypatch.context() as patch:
    patch.setattr(cluster.Preemption, 'is_due', lambda self: next(calls) == 13)
    with pytest.raises(cluster.Preempted, match='step 13 of 32 is saved'):
      trainer.train(small_config(), tmp_path)
  trainer.train(small_config(), tmp_path)
  lines = [line for line in writer.read_metrics(tmp_path) if line['split'] == 'train']
  examples = {line['step']: line['examples'] for line in lines}
  assert examples == {8: 256, 13: 160, 16: 96, 24: 256, 32: 256}


def contents(folder):
  """Returns the modification time and the bytes of each file in a folder."""
  files = [path for path in folder.rglob('*') if path.is_file()]
  return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.mark.parametrize('seed', ['0', '1'])
def test_rejected_command_changes_no_file(trained, tmp_path, seed):
  """The first command fails because the workdir is locked, the second because of its seed."""
  workdir = shutil.copytree(trained[0], tmp_path / 'run')
  (workdir / 'result.json').unlink()
  before = contents(workdir)
  with lock.held(workdir), pytest.raises(ValueError, match='another run is writing here'):
    trainer.train(small_config(log_every='4', seed=seed), workdir)
  assert contents(workdir) == before
  if seed == '1':
    with pytest.raises(ValueError, match='seed: 0 in the workdir, 1 given'):
      trainer.train(small_config(log_every='4', seed=seed), workdir)
    assert contents(workdir) == before


def test_rejected_data_changes_no_file(trained, tmp_path, monkeypatch):
  workdir = shutil.copytree(trained[0], tmp_path / 'run')
  (workdir / 'result.json').unlink()
  before = contents(workdir)
  monkeypatch.setattr(Task, 'load', lambda saved: Task((), (1, 1), 3))
  with pytest.raises(ValueError, match='the data of synthetic changed'):
    trainer.train(small_config(log_every='4'), workdir)
  assert contents(workdir) == before


def test_workdir_can_be_locked_once_and_empty_workdirs_are_removed(tmp_path):
  workdir = tmp_path / 'new' / 'run'
  with lock.held(workdir), pytest.raises(ValueError, match='another run'), lock.held(workdir):
    pass
  assert not list(tmp_path.iterdir())
  with lock.held(workdir):
    (workdir / 'config.json').touch()
  assert [path.name for path in workdir.iterdir()] == ['config.json']


def test_run_resumes_with_the_config_of_its_checkpoint(trained, tmp_path):
  workdir = shutil.copytree(trained[0], tmp_path / 'run')
  writer.write_json(workdir / 'config.json', {'seed': 7})
  assert resume.saved_config(workdir, {}).seed == 0
  shutil.rmtree(workdir / 'checkpoints')
  assert resume.saved_config(workdir, {}).seed == 7


@pytest.mark.slow
def test_failed_evaluation_loses_no_step(trained, tmp_path, monkeypatch):
  def bad(*_):
    raise ValueError('test/3.jpg: not a readable image')

  with monkeypatch.context() as patch:
    patch.setattr(Run, 'score', bad)
    with pytest.raises(ValueError, match='not a readable'):
      trainer.train(small_config(), tmp_path)
  assert stored.latest_step(tmp_path) == 16
  assert trainer.train(small_config(), tmp_path)['test_accuracy'] == trained[1]['test_accuracy']
  ends = [
    [(line['step'], line['loss']) for line in writer.read_metrics(path) if line['split'] == 'test']
    for path in (tmp_path, trained[0])
  ]
  assert ends[0] == ends[1] and len(ends[0]) == 2


@pytest.mark.slow
def test_failed_evaluation_of_a_validated_run_loses_no_step(tmp_path, scored, monkeypatch):
  def bad(*_):
    raise ValueError('test/3.jpg: not a readable image')

  with monkeypatch.context() as patch:
    patch.setattr(Run, 'score', bad)
    with pytest.raises(ValueError, match='not a readable'):
      trainer.train(small_config(**VALIDATED), tmp_path)
  assert stored.latest_step(tmp_path) == 8
  assert_best_is_used(tmp_path, trainer.train(small_config(**VALIDATED), tmp_path))


def test_fewer_epochs_than_already_done_are_rejected(trained, tmp_path):
  workdir = shutil.copytree(trained[0], tmp_path / 'run')
  (workdir / 'result.json').unlink()
  with pytest.raises(ValueError, match='step 32, but a run with epochs=0.5 ends at step 16'):
    trainer.train(small_config(epochs='0.5'), workdir)


@pytest.mark.slow
def test_file_name_that_is_not_valid_utf_8_is_logged(tmp_path):
  script = (
    'import os, pathlib, sys; from vit_jax.workdir import writer\n'
    'with writer.Writer(pathlib.Path(sys.argv[1]), 0):\n'
    "  writer.LOG.warning('%s and naïve.jpg', os.fsdecode(b'na\\xefve.jpg'))"
  )
  command = [
    sys.executable,
    '-c',
    script,
    tmp_path,
  ]  # parallel pytest workers could not report this name
  child = subprocess.run(command, stderr=subprocess.PIPE, cwd=ROOT, check=True)
  assert b'Logging error' not in child.stderr
  assert 'na\\udcefve.jpg and naïve.jpg' in (tmp_path / 'log.txt').read_text(encoding='utf-8')


def test_length_of_a_run_is_logged_before_training(caplog, tmp_path):
  for name in 'ab':
    (tmp_path / name).mkdir()
    for i in range(40):
      Image.new('RGB', (30, 20)).save(tmp_path / name / f'{name}{i}.png')
  config = small_config(**{'data.source': f'folder:{tmp_path}', 'batch_size': '16', 'epochs': '3'})
  with caplog.at_level(logging.INFO):
    _, training = opening.from_config(config)
  count, steps = len(training.train), training.steps
  line = f'Training on {count} images of 8x8 pixels (the first file has 20x30): {steps} steps'
  assert f'{line} with 16 images each; the first {steps // 5} steps are warm-up.' in caplog.text
  few = f'{steps} steps are too few to learn much: set a smaller batch_size (e.g. '
  assert f'{few}{3 * count // 100}) or more epochs (e.g. {-(-1600 // count)}).' in caplog.text
  caplog.clear()
  with caplog.at_level(logging.INFO):
    opening.from_config(small_config(epochs='10'))
  assert (
    'Training on 1,024 images of 8x8 pixels: 320 steps with 32 images each; the first 64 '
    in caplog.text
  )
  assert 'too few' not in caplog.text


def test_data_that_changed_since_the_run_began_is_rejected(trained, tmp_path):
  workdir = shutil.copytree(trained[0], tmp_path / 'run')
  config = small_config(epochs='2')
  exp, _ = opening.from_config(config)
  changed = dataclasses.replace(exp.task, class_names=('zebra', *exp.task.class_names[1:]))
  with pytest.raises(ValueError, match='class_names was'):
    resume.check_same_data(dataclasses.replace(exp, task=changed), workdir)
  resume.check_same_data(exp, workdir)
  known = dataclasses.replace(exp.task, fingerprint='0123456789abcdef')  # the run began without one
  resume.check_same_data(dataclasses.replace(exp, task=known), workdir)


@pytest.mark.long
def test_run_without_checkpoint_can_be_replaced_by_another(tmp_path):
  bad = {'optimizer.lr': '1e30', 'optimizer.name': 'sgd', 'optimizer.clip': '0'}
  with pytest.raises(FloatingPointError, match='training diverged'):
    trainer.train(small_config(**bad), tmp_path)
  assert stored.latest_step(tmp_path) is None
  assert trainer.train(small_config(epochs='0.25'), tmp_path)['steps'] == 8


def test_val_split_that_overlaps_another_split_is_rejected():
  with pytest.raises(ValueError, match='shares examples with data.train_split'):
    opening.from_config(small_config(**{'data.val_split': 'train[98%:]'}))
  overrides = {'data.val_split': 'test[:5]', 'data.train_split': 'train'}
  with pytest.raises(ValueError, match='shares examples with data.eval_split'):
    opening.from_config(small_config(**overrides))


@pytest.mark.slow
@pytest.mark.slow_after_first
@pytest.mark.parametrize('last, stops', [(21, False), (32, False), (21, True)])
def test_diverged_step_is_not_saved(tmp_path, monkeypatch, last, stops):
  """Training diverges between two saves, at a save, and when the run is asked to stop."""
  real, calls = make_train_step, itertools.count(1)
  monkeypatch.setattr(cluster.Preemption, 'is_due', lambda self: stops and next(calls) == last)

  def breaks(*arguments):
    step = real(*arguments)

    def broken(state, batch, teacher):
      state, metrics = step(state, batch, teacher)
      bad = jnp.where(state.step == last, jnp.nan, 1.0)
      score = metrics['score']
      score = score.replace(loss=score.loss.replace(total=score.loss.total * bad))
      return state, metrics | {'score': score}

    return jax.jit(broken, donate_argnums=0)

  monkeypatch.setattr(compiling, 'make_train_step', breaks)
  with pytest.raises(FloatingPointError, match=f'loss of step {last} is nan'):
    trainer.train(small_config(), tmp_path)
  assert stored.latest_step(tmp_path) == 16
  if last == 21 and not stops:
    monkeypatch.undo()
    assert trainer.train(small_config(), tmp_path)['steps'] == 32


@pytest.mark.slow
def test_init_starts_from_the_weights_of_another_run(trained, tmp_path):
  workdir, result = trained
  out = trainer.train(small_config(epochs='0', init=str(workdir)), tmp_path)
  assert out['steps'] == 0 and out['test_accuracy'] == result['test_accuracy']
  assert_equal(stored.load_checkpoint(tmp_path)[1], stored.load_checkpoint(workdir)[1])
  with pytest.raises(ValueError, match=r'model.width: 32 in the config, 16 in the weights'):
    config = small_config(init=str(workdir), **{'model.width': '32'})
    trainer.train(config, tmp_path / 'wide')


@pytest.mark.parametrize('overrides, message', [
    ({'batch_size': '0'}, 'batch_size'), ({'epochs': '-1'}, 'epochs'),
    ({'eval_batch_size': '0'}, 'eval_batch_size'), ({'data.image_size': '10'}, 'patches'),
    ({'data.image_size': '0'}, 'positive'), ({'loss.name': 'hinge'}, 'softmax'),
    ({'model.dtype': 'float8'}, 'bfloat16'), ({'init': '/nowhere'}, 'no such file or folder'),
    ({'model.pool': 'none'}, 'pool'), ({'data.mean': '1,2'}, 'data.mean'),
    ({'data.std': '0'}, 'above 0'), ({'optimizer.clip': '-1'}, 'optimizer.clip'),
    ({'ema': 'nan'}, 'ema'), ({'epochs': '0.001'}, 'zero training steps'),
    ({'model.num_heads': '0'}, 'model.num_heads'), ({'model.head_dim': '-4'}, 'head_dim'),
])  # fmt: skip
def test_bad_values_are_rejected_and_leave_no_files(tmp_path, overrides, message):
  with pytest.raises(ValueError, match=message):
    trainer.train(small_config(**overrides), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
