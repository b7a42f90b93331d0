"""Sets up two CPU devices, a compilation cache for the session, and a trained workdir."""

import functools
import os
import pathlib
import shutil
import tempfile

import jax
import numpy as np
import pytest

from vit_jax import cli
from vit_jax import config as config_lib

if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:  # if it is set, the parent process made the cache
  CACHE = tempfile.TemporaryDirectory(prefix='vit_jax_tests_')
  os.environ['JAX_COMPILATION_CACHE_DIR'] = CACHE.name
jax.config.update('jax_compilation_cache_dir', os.environ['JAX_COMPILATION_CACHE_DIR'])
# By default, JAX caches only programs that take a second to compile. Tests compile small programs.
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'  # for the processes that tests start
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
jax.config.update('jax_num_cpu_devices', 2)
# Disables LLVM's passes but not XLA's, because most of the suite's time is compilation.
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'  # for the processes that tests start
jax.config.update('jax_disable_most_optimizations', True)

ROOT = pathlib.Path(__file__).resolve().parents[1]
DATA = ROOT / 'tests' / 'fixtures'


@pytest.hookimpl(tryfirst=True)  # before pytest deselects slow tests
def pytest_collection_modifyitems(items):
  """Marks the cases of tests that have the mark `slow_after_first`.

  All cases but the first get the mark `slow`, or `long` if the test already has the mark `slow`.
  """
  seen = set()
  for item in items:
    if item.get_closest_marker('slow_after_first'):
      test = item.location[0], item.originalname
      if test in seen:
        item.add_marker('long' if item.get_closest_marker('slow') else 'slow')
      seen.add(test)


def small_config(**overrides):
  """Returns the config of a run of 32 steps on synthetic 8x8 images, which takes a second.

  Overrides are dotted keys with their values as text.
  """
  config = config_lib.default_config()
  settings = {
      'epochs': '1', 'batch_size': '32', 'eval_batch_size': '100', 'log_every': '8',
      'eval_every': '16', 'checkpoint_every': '16', 'data.source': 'synthetic',
      'data.image_size': '8', 'model.variant': 'tiny', 'model.width': '16', 'model.depth': '2',
      'model.mlp_dim': '32', 'model.pool': 'gap', 'optimizer.lr': '1e-2',
      'augment.flip.probability': '0.5',
      'model.stochastic_depth': '0.2',
  }  # fmt: skip
  for key, text in {**settings, **overrides}.items():
    config_lib.override(config, key, text)
  return config


@functools.partial(jax.jit, static_argnums=0)
def init_params(model, image_BHWC):
  """Returns initial parameters; one program, because compiling single operations takes seconds."""
  return model.init(jax.random.key(0), image_BHWC)['params']


@functools.partial(jax.jit, static_argnums=0)
def run_model(model, params, image_BHWC):
  """Returns the logits or tokens of a model, computed by one compiled program."""
  return model.apply({'params': params}, image_BHWC)


def call(capsys, *argv):
  """Runs main.py and returns (exit code, stdout, stderr)."""
  code = cli.main(list(argv))
  out, err = capsys.readouterr()
  assert 'Traceback' not in err
  return code, out, err


def error(capsys, *argv):
  """Returns the error message of a command that must fail with exit code 2."""
  code, _, err = call(capsys, *argv)
  assert code == 2 and '\nerror: ' in f'\n{err}', err  # warnings may precede the error
  return err


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
  """A finished run: (workdir, result)."""
  from vit_jax.training import trainer

  workdir = tmp_path_factory.mktemp('run') / 'lr=[0.1]'  # `glob` must take the name literally
  return workdir, trainer.train(small_config(), workdir)


def assert_equal(a, b):
  """Asserts that two trees have equal arrays, bit for bit."""
  jax.tree.map(np.testing.assert_array_equal, a, b)


def check_resumes_exactly(overrides, init, tmp_path):
  """Asserts that an interrupted run ends like an uninterrupted one, even without the `init` folder.

  The runs are `whole` and `cut` in `tmp_path`. Returns the result of `whole` and the item `state`.
  """
  from vit_jax.training import trainer
  from vit_jax.training.loop import Run
  from vit_jax.workdir import stored

  whole = trainer.train(small_config(**overrides), tmp_path / 'whole')

  def stop(*_):
    raise KeyboardInterrupt

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Run, 'log', lambda self, step, *_: stop() if step == 24 else None)
    with pytest.raises(KeyboardInterrupt):
      trainer.train(small_config(**overrides), tmp_path / 'cut')
  assert stored.latest_step(tmp_path / 'cut') == 16
  shutil.rmtree(init)  # its weights are in the run's checkpoints
  resumed = trainer.train(small_config(**overrides), tmp_path / 'cut')
  assert resumed['test_loss'] == whole['test_loss'] and resumed['steps'] == 32
  for item in ('params', 'state'):
    a, b = (stored.restore_item(tmp_path / name, 32, item) for name in ('whole', 'cut'))
    assert_equal(a, b)
  return whole, b
