"""Checks that `--mode=verify` repeats steps exactly, and notices other numbers."""

from contextlib import nullcontext
import shutil

import jax
import jax.numpy as jnp
import pytest

from tests.conftest import call, error, small_config
from vit_jax.distributed import cluster
from vit_jax.profiling import replay
from vit_jax.storage import TRY_AGAIN
from vit_jax.training import loop
from vit_jax.training.state import TrainState
from vit_jax.workdir import stored


def files(workdir):
  return {path: path.stat().st_mtime_ns for path in workdir.rglob('*')}


def changed(monkeypatch, step, factor):
  """Makes the saved state of a step differ in one number of two kernels (query and key)."""
  restore = replay.restore_state

  def other(workdir, wanted, like):
    state, config = restore(workdir, wanted, like)
    if wanted == step:
      keyed = lambda path: jax.tree_util.keystr(path, simple=True, separator='/').endswith(
        'y/kernel'
      )
      change = lambda path, x: (x + 0).at[(0,) * x.ndim].multiply(factor) if keyed(path) else x
      block = jax.tree_util.tree_map_with_path(change, state.params['block_0'])
      state = state.replace(params=state.params | {'block_0': block})
    return state, config

  monkeypatch.setattr(replay, 'restore_state', other)


def test_repeated_steps_give_the_same_bits_and_nothing_is_written(trained, capsys):
  workdir, _ = trained
  before = files(workdir)
  code, out, _ = call(capsys, '--mode=verify', f'--workdir={workdir}')
  assert code in (0, None) and 'Repeating steps 17 to 32 gave the same' in out
  assert files(workdir) == before


@pytest.mark.parametrize('key', ['optimizer.lr', 'epochs'])
def test_other_settings_are_refused_before_a_device_is_blamed(trained, capsys, key):
  message = error(capsys, '--mode=verify', f'--workdir={trained[0]}', f'--config.{key}=2')
  assert key in message


@pytest.mark.slow
def test_other_numbers_are_named_and_give_exit_code_1(trained, capsys, monkeypatch):
  changed(monkeypatch, 32, 1.5)
  code, out, _ = call(capsys, '--mode=verify', f'--workdir={trained[0]}')
  assert code == 1 and 'other numbers in 2 of' in out
  assert 'params/block_0/attention/query/kernel: largest difference' in out


@pytest.mark.slow
def test_the_plan_is_that_of_the_checkpoint_from_which_steps_are_repeated(trained, monkeypatch):
  real, given = replay.prepared, []
  monkeypatch.setattr(replay, 'prepared', lambda *args: given.append(args[-1]) or real(*args))
  replay.verify(trained[0])
  assert given == [stored.restore_item(trained[0], 16, 'config')]
  assert given != [stored.restore_item(trained[0], 32, 'config')]


def test_a_run_without_two_checkpoints_is_refused(trained, tmp_path, capsys):
  workdir = shutil.copytree(trained[0], tmp_path / 'run')
  shutil.rmtree(workdir / 'checkpoints' / '16')
  assert 'two checkpoints, but' in error(capsys, '--mode=verify', f'--workdir={workdir}')
  assert stored.saved_steps(workdir) == [32]


def states(change):
  """Returns two states whose parameters differ by this factor."""
  w = jnp.arange(1.0, 101.0)
  return [TrainState(jnp.int32(5), {'w': each}, {}, None) for each in (w * (1 + change), w)]


@pytest.mark.parametrize('then', [None, {'kind': 'cpu', 'data': 2}])
@pytest.mark.parametrize('change, same', [(1e-4, True), (0.1, False)])
def test_other_devices_may_differ_by_rounding_only(then, change, same):
  ended, wanted = states(change)
  found = replay.judged((1, 5), ended, wanted, then, {'kind': 'cpu', 'data': 4})
  assert found.same == same
  assert ('data=2; now kind=cpu, data=4' if then else 'not record') in found.text
  assert (
    'difference from the saved arrays is at most 0.0001'
    if same
    else 'params/w: largest difference 10'
  ) in found.text


@pytest.mark.parametrize('step', [16, 32])
def test_other_devices_of_either_checkpoint_are_reported(trained, monkeypatch, step):
  restore_item, restore_state = replay.restore_item, replay.restore_state
  devices = lambda found: {'devices': {'kind': 'TPU v9'}} if found == step else {}
  other = lambda workdir, found, item: restore_item(workdir, found, item) | devices(found)
  monkeypatch.setattr(replay, 'restore_item', other)
  loop_ = lambda _, begin, first, last: restore_state(trained[0], last, begin)
  monkeypatch.setattr(replay.Replay, 'loop', loop_)
  changed(monkeypatch, 32, 1.0001)
  found = replay.verify(trained[0])
  assert found.same and 'used other devices (kind=TPU v9; now ' in found.text


def two_states(params, changed):
  """Returns two train states with these parameters; the first one has changed parameters."""
  return [TrainState(jnp.int32(5), tree, {}, None) for tree in (params | changed, params)]


def test_rounding_is_measured_over_all_parameters_together():
  """The gradient of a key bias is only rounding errors, so its relative difference is large."""
  params = {'kernel': jnp.full(100, 3.0), 'bias': jnp.full(1, 1e-3)}
  for bias, same in ((0.1, True), (1.0, False)):  # the norm of all parameters is 30
    states = two_states(params, {'bias': jnp.full(1, 1e-3 + bias)})
    found = replay.judged((1, 5), *states, {'kind': 'gpu'}, {'kind': 'cpu'})
    assert found.same == same, found.text


def test_the_five_largest_differences_are_named_first():
  params = {f'w{i}': jnp.ones(2) for i in range(9)}
  states = two_states(params, {f'w{i}': jnp.ones(2) + i for i in range(9)})
  devices = {'kind': 'cpu'}
  lines = replay.judged((1, 5), *states, devices, devices).text.splitlines()
  assert 'other numbers in 8 of 10 arrays' in lines[0]
  names = [line.partition(':')[0] for line in lines[1:6]]
  assert names == [f'params/w{i}' for i in (8, 7, 6, 5, 4)]
  assert lines[6:] == ['... and 3 more']


@pytest.mark.parametrize('first, refused', [(8, True), (16, False), (24, False)])
def test_steps_of_two_learning_rate_cycles_are_not_repeated(tmp_path, first, refused):
  check = lambda: replay.check_repeatable(tmp_path, small_config(), (8, 16), first, first + 8)
  with pytest.raises(ValueError, match='began after step 16') if refused else nullcontext():
    check()


def test_a_number_that_is_not_finite_is_never_the_same():
  ended, wanted = (
    TrainState(jnp.int32(2), {'w': jnp.ones(3)}, {'mu': mu}, None)
    for mu in (jnp.array([1, 1, jnp.nan]), jnp.ones(3))
  )
  assert not replay.judged((1, 2), ended, wanted, None, {'kind': 'cpu'}).same


def test_the_same_devices_may_not_differ_at_all():
  ended, wanted = states(1e-6)
  devices = {'kind': 'cpu', 'data': 4}
  assert not replay.judged((1, 5), ended, wanted, devices, devices).same


def test_a_stop_signal_ends_the_repetition_without_a_traceback(trained, capsys, monkeypatch):
  monkeypatch.setattr(cluster.Preemption, 'is_due', lambda _: True)
  code, _, err = call(capsys, '--mode=verify', f'--workdir={trained[0]}')
  assert code == TRY_AGAIN and 'verify was stopped' in err and 'Traceback' not in err


def test_the_devices_of_a_run_include_the_number_of_processes(monkeypatch):
  """Within one process, sums over the same mesh are rounded differently."""
  mesh = jax.make_mesh((2, 1, 1), ('data', 'fsdp', 'tensor'))
  now = loop.devices_of(mesh)
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  then = loop.devices_of(mesh)
  found = replay.judged((1, 5), *states(1e-4), then, now)
  assert found.same and 'processes=2' in found.text and 'processes=1' in found.text


def test_zeros_of_another_sign_are_other_bits():
  ended, wanted = (
    TrainState(jnp.int32(2), {'w': jnp.array([zero, 1.0])}, {'mu': jnp.ones(1)}, None)
    for zero in (-0.0, 0.0)
  )
  assert not replay.judged((1, 2), ended, wanted, {'kind': 'cpu'}, {'kind': 'cpu'}).same
  assert replay.judged((1, 2), wanted, wanted, {'kind': 'cpu'}, {'kind': 'cpu'}).same
