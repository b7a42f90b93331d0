"""Checks that checkpoints open anywhere, damage is detected, and a full disk destroys nothing."""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import zlib

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tensorboardX.proto import event_pb2

from tests.conftest import ROOT, small_config
from vit_jax import experiment, storage
from vit_jax.distributed import agreement
from vit_jax.evaluation import exact
from vit_jax.training import state, trainer
from vit_jax.workdir import checkpoint, digests, items, manager, restoring, stored, trained, writer


def test_three_documented_lines_restore_anywhere(trained, tmp_path):
  workdir, _ = trained
  page = (ROOT / 'docs' / 'workdir.md').read_text()
  lines = re.search(r'```python\n(import orbax.*?)```', page, re.DOTALL).group(1)
  assert len([line for line in lines.splitlines() if line]) == 3
  step, params, _ = stored.load_checkpoint(workdir)
  lines = re.sub(r"'[^']*/params'", repr(f'{workdir}/checkpoints/{step}/params'), lines)
  script = lines + (
    "\nimport jax, numpy, sys; assert jax.device_count() == 1 and 'vit_jax' not in sys.modules"
    f'\nnumpy.save({str(tmp_path / "kernel.npy")!r}, params["head"]["kernel"])'
  )
  subprocess.run([sys.executable, '-c', script], cwd=tmp_path, check=True)
  np.testing.assert_array_equal(np.load(tmp_path / 'kernel.npy'), params['head']['kernel'])
  assert jax.device_count() == 2  # it was written from two devices


def test_the_docs_name_the_place_of_the_averaged_weights(tmp_path):
  page = ' '.join((ROOT / 'docs' / 'workdir.md').read_text().split())
  assert 'under the key `ema` in the item `state`' in page
  blank = state.TrainState(
    jnp.int32(1), {'w': jnp.zeros(3)}, {'mu': jnp.zeros(3)}, {'w': jnp.ones(3)}
  )
  saved = {'config': {'ema': 0.9}, 'task': {}, 'seconds': 0}
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(blank, saved | {'names': trained.TrainingFiles().item()})
  raw = ocp.StandardCheckpointer().restore(tmp_path / 'checkpoints/1/params')
  averaged = ocp.StandardCheckpointer().restore(tmp_path / 'checkpoints/1/state')['ema']
  assert not raw['w'].any() and averaged['w'].all()
  np.testing.assert_array_equal(stored.load_checkpoint(tmp_path)[1]['w'], averaged['w'])


def test_training_overwrites_a_state_before_orbax_takes_it_over(tmp_path, monkeypatch):
  go = threading.Event()
  save = ocp.CheckpointManager.save
  monkeypatch.setattr(
    ocp.CheckpointManager, 'save', lambda *args, **kwargs: go.wait() and save(*args, **kwargs)
  )
  train = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  mesh = experiment.mesh_for(small_config(**{'mesh.data': '1', 'mesh.fsdp': '2'}))
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('fsdp'))
  params = {'w': jax.device_put(np.arange(6.0), split), 'b': jnp.ones((3, 2))}
  now = state.TrainState(jnp.int32(1), params, {}, None)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    for _ in range(2):  # the second copy uses the arrays of the first
      go.clear()
      checkpoints.save(now, {'config': {}, 'names': trained.TrainingFiles().item()})
      now = train(now)
      go.set()
      checkpoints.wait()
  for step in (1, 2):
    saved = ocp.StandardCheckpointer().restore(tmp_path / f'checkpoints/{step}/params')
    np.testing.assert_array_equal(saved['w'], np.arange(6.0) + step - 1)
    np.testing.assert_array_equal(saved['b'], np.full((3, 2), step))


def test_an_interrupt_while_orbax_takes_over_the_arrays_loses_no_checkpoint(tmp_path, monkeypatch):
  go, interrupts = threading.Event(), [KeyboardInterrupt]
  save, result = ocp.CheckpointManager.save, agreement.Agreement.result
  monkeypatch.setattr(
    ocp.CheckpointManager, 'save', lambda *args, **kwargs: go.wait() and save(*args, **kwargs)
  )

  def interrupted(self, future):
    if interrupts:
      threading.Timer(0.5, go.set).start()
      raise interrupts.pop()
    return result(self, future)

  monkeypatch.setattr(agreement.Agreement, 'result', interrupted)
  now = state.TrainState(jnp.int32(1), {'w': jnp.ones(3)}, {}, None)
  with pytest.raises(KeyboardInterrupt), checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(now, {'config': {}, 'names': trained.TrainingFiles().item()})
    checkpoints.wait()
  assert stored.saved_steps(tmp_path) == [1]


def test_an_error_while_orbax_takes_over_the_arrays_is_raised(tmp_path, monkeypatch):
  def fail(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(ocp.CheckpointManager, 'save', fail)
  now = state.TrainState(jnp.int32(1), {'w': jnp.ones(3)}, {}, None)
  config = {'config': {}, 'names': trained.TrainingFiles().item()}
  for finish in (checkpoint.Checkpoints.wait, lambda _: None):  # the context also waits
    with (
      pytest.raises(storage.Unwritten, match='No space left'),
      checkpoint.Checkpoints(tmp_path) as checkpoints,
    ):
      checkpoints.save(now, config)
      finish(checkpoints)


def test_a_workdir_without_a_checkpoint_is_refused(tmp_path):
  with pytest.raises(ValueError, match='no checkpoint'):
    stored.load_checkpoint(tmp_path)
  assert not list(tmp_path.iterdir())


def copied(trained, folder):
  """Copies the finished run, without its result, as if it was stopped after its last checkpoint."""
  workdir = shutil.copytree(trained[0], folder / 'run')
  (workdir / 'result.json').unlink()
  return workdir


def damage(workdir, step, item, how):
  """Damages the files that hold an item's arrays, or its JSON."""
  folder = workdir / 'checkpoints' / str(step) / item
  files = [*folder.rglob('d/*')] or [folder / 'metadata']
  assert files[0].exists()
  for path in files:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes({'flip': data, 'cut': data[: len(data) // 2], 'empty': b''}[how])


def assert_same_end(workdir, trained):
  for item in ('params', 'state'):
    ends = [stored.restore_item(path, 32, item) for path in (workdir, trained[0])]
    jax.tree.map(np.testing.assert_array_equal, *ends)


@pytest.mark.parametrize('item', ['config', 'params', 'state', 'names'])
@pytest.mark.parametrize('how', ['flip', 'cut', 'empty'])
def test_damaged_item_is_detected(trained, tmp_path, item, how):
  workdir = copied(trained, tmp_path)
  damage(workdir, 32, item, how)
  with pytest.raises(items.Damaged, match=r'checkpoints/32 is damaged'):
    stored.restore_item(workdir, 32, item)


@pytest.mark.slow
def test_previous_checkpoint_is_used_if_the_newest_is_damaged(trained, tmp_path, caplog):
  workdir = copied(trained, tmp_path)
  damage(workdir, 32, 'params', 'flip')
  with caplog.at_level(logging.WARNING):
    assert exact.evaluate(workdir, {})['step'] == 16
  assert 'checkpoints/32 is damaged' in caplog.text and 'The checkpoint of step 16' in caplog.text
  assert trainer.train(small_config(), workdir)['steps'] == 32
  assert len(list((workdir / 'damaged').glob('32-*/params'))) == 1  # kept, not deleted
  assert_same_end(workdir, trained)


@pytest.mark.parametrize('item', ['config', 'params', 'state', 'names'])
def test_a_checkpoint_is_set_aside_if_any_item_is_damaged(trained, tmp_path, item):
  workdir = copied(trained, tmp_path)
  damage(workdir, 32, item, 'flip')
  stored.set_aside_damaged(workdir)
  assert stored.saved_steps(workdir) == [16]
  assert len(list((workdir / 'damaged').glob(f'32-*/{item}'))) == 1


def test_a_damaged_checkpoint_on_another_disk_is_set_aside(trained, tmp_path, monkeypatch):
  workdir = copied(trained, tmp_path)
  (workdir / 'checkpoints').rename(tmp_path / 'disk')
  (workdir / 'checkpoints').symlink_to(tmp_path / 'disk')
  damage(workdir, 32, 'params', 'flip')

  def fail(number):
    def refuse(*_, **__):
      raise OSError(number, os.strerror(number))

    return refuse

  monkeypatch.setattr(os, 'rename', fail(errno.EXDEV))
  with monkeypatch.context() as patch:
    patch.setattr(shutil, 'copyfile', fail(errno.ENOSPC))
    with pytest.raises(storage.Unwritten, match='damaged/32-.*No space left.*Free disk space'):
      stored.set_aside_damaged(workdir)
  assert stored.saved_steps(workdir) == [32, 16]
  stored.set_aside_damaged(workdir)
  assert stored.saved_steps(workdir) == [16]
  assert not (tmp_path / 'disk/32').exists() and [*(workdir / 'damaged').glob('32-*/params/d/*')]


def test_a_checkpoint_that_the_user_renamed_does_not_count(trained, tmp_path):
  workdir = copied(trained, tmp_path)
  (workdir / 'checkpoints/32').rename(workdir / 'checkpoints/best_32')
  stored.set_aside_damaged(workdir)
  assert stored.saved_steps(workdir) == [16]
  assert (workdir / 'checkpoints/best_32/params').is_dir()  # not changed


@pytest.mark.slow
def test_run_starts_again_only_after_all_checkpoints_were_reported_damaged(trained, tmp_path):
  workdir = copied(trained, tmp_path)
  damage(workdir, 32, 'params', 'cut')
  damage(workdir, 16, 'config', 'empty')
  with pytest.raises(items.Damaged, match='checkpoints/16 is damaged'):
    exact.evaluate(workdir, {})
  with pytest.raises(ValueError, match='all checkpoints are damaged.*from the beginning'):
    trainer.train(small_config(), workdir)
  trainer.train(small_config(), workdir)
  assert_same_end(workdir, trained)


def test_temporarily_unreadable_checkpoint_is_not_moved(trained, tmp_path, monkeypatch):
  workdir = copied(trained, tmp_path)
  for step in (16, 32):
    damage(workdir, step, 'params', 'cut')

  def refuse(path, mode):
    raise PermissionError(13, 'Permission denied', str(path))

  monkeypatch.setattr(items, 'open', refuse, raising=False)
  with pytest.raises(OSError, match='checkpoints/32 cannot be read .*denied.* not changed'):
    trainer.train(small_config(), workdir)
  assert stored.saved_steps(workdir) == [32, 16]


@pytest.mark.parametrize(
  'error',
  [
    AssertionError(),  # from JAX, if JAX_PLATFORMS names a missing device
    RuntimeError("Unable to initialize backend 'cuda'"),
    OSError(24, 'Too many open files'),
    ValueError('Error opening "zarr" driver: Too many open files'),
    ValueError('RESOURCE_EXHAUSTED: out of memory'),
    AttributeError("module 'jax' has no attribute 'other'"),  # an orbax for another JAX
  ],
)
def test_process_errors_do_not_mark_checkpoints_as_damaged(trained, tmp_path, monkeypatch, error):
  def fail(*_, **__):
    raise error

  workdir = copied(trained, tmp_path)
  monkeypatch.setattr(ocp.StandardCheckpointHandler, 'restore', fail)
  for use in (lambda: trainer.train(small_config(), workdir), lambda: exact.evaluate(workdir, {})):
    with pytest.raises(type(error), match=re.escape(str(error)) or None) as raised:
      use()
    assert not isinstance(raised.value, items.Damaged)
  assert stored.saved_steps(workdir) == [32, 16] and not (workdir / 'damaged').exists()


@pytest.mark.slow_after_first
@pytest.mark.parametrize('text', ['[]', '{}', '{"config": {}}'])
def test_config_item_without_its_keys_counts_as_damaged(trained, tmp_path, text):
  workdir = copied(trained, tmp_path)
  (workdir / 'checkpoints' / '32' / 'config' / 'metadata').write_text(text)
  assert exact.evaluate(workdir, {})['step'] == 16


@pytest.mark.parametrize('file', ['digests.json', 'config/metadata'])
def test_a_checkpoint_whose_json_is_nested_too_deeply_is_damaged(trained, tmp_path, file):
  workdir = copied(trained, tmp_path)
  (workdir / 'checkpoints' / '32' / file).write_text('[' * 100_000)
  if file != 'digests.json':
    (workdir / 'checkpoints' / '32' / 'digests.json').unlink()
  with pytest.raises(items.Damaged, match='checkpoints/32 is damaged'):
    stored.restore_item(workdir, 32, 'config')


def test_records_whose_json_is_nested_too_deeply_count_as_damaged(tmp_path):
  line = json.dumps({'step': 1, 'split': 'train', 'loss': 0.5})
  (tmp_path / 'metrics.jsonl').write_text(f'{"[" * 100_000}\n{"9" * 5000}\n{line}\n')
  assert writer.read_metrics(tmp_path) == [json.loads(line)]
  (tmp_path / 'result.json').write_text('{"a": ' * 100_000)
  assert writer.read_json(tmp_path / 'result.json') is None


@pytest.mark.slow
def test_finished_run_with_a_damaged_last_checkpoint_resumes(trained, tmp_path):
  workdir = shutil.copytree(trained[0], tmp_path / 'run')
  damage(workdir, 32, 'params', 'flip')
  assert trainer.train(small_config(), workdir)['steps'] == 32
  assert stored.latest_step(workdir) == 32
  assert_same_end(workdir, trained)


def save_rated(workdir, keep, accuracies, start=0, finished=()):
  """Saves a checkpoint for each accuracy, and rates it if the accuracy is not None."""
  blank = state.TrainState(jnp.int32(0), {'w': jnp.zeros(3)}, {'mu': jnp.zeros(3)}, None)
  saved = {'config': {'ema': 0}, 'task': {}, 'seconds': 0, 'names': trained.TrainingFiles().item()}
  with checkpoint.Checkpoints(workdir, keep, finished) as checkpoints:
    for step, accuracy in enumerate(accuracies, start + 1):
      checkpoints.save(blank.replace(step=jnp.int32(step)), saved)
      if accuracy is not None:
        with (workdir / 'metrics.jsonl').open('a') as file:
          file.write(json.dumps({'step': step, 'split': 'val', 'accuracy': accuracy}) + '\n')
        checkpoints.rate(step, accuracy)
      checkpoints.wait()


def test_best_checkpoint_is_kept_after_resuming(tmp_path):
  save_rated(tmp_path, 1, [0.9, 0.5, 0.9, 0.4])
  assert stored.saved_steps(tmp_path) == [4, 3]
  save_rated(tmp_path, 1, [0.6, None, 0.3], start=4)
  assert stored.saved_steps(tmp_path) == [7, 3]


def test_the_ends_of_earlier_cycles_are_kept(tmp_path):
  save_rated(tmp_path, 1, [None, None])
  save_rated(tmp_path, 1, [None, None], start=2, finished=(2,))
  save_rated(tmp_path, 1, [None, None], start=4, finished=(2, 4))
  assert stored.saved_steps(tmp_path) == [6, 4, 2]


def test_a_line_without_a_score_does_not_hide_the_accuracies(trained, tmp_path):
  workdir = shutil.copytree(trained[0], tmp_path / 'run')
  lines = [{'step': 16, 'split': 'val', 'accuracy': 0.5}, {'step': 32, 'split': 'val'}]
  (workdir / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  assert stored.accuracies(workdir) == {16: 0.5}


def test_several_labels_are_rated_by_the_mean_average_precision(trained, tmp_path):
  workdir = shutil.copytree(trained[0], tmp_path / 'run')
  scores = {'split': 'val', 'loss': 0.7, 'accuracy': 0.9, 'mean_average_precision': 0.4}
  (workdir / 'metrics.jsonl').write_text(json.dumps({'step': 16, **scores}))
  assert stored.accuracies(workdir) == {16: 0.4}


def test_a_run_without_labels_is_rated_by_the_negative_loss(trained, tmp_path):
  workdir = shutil.copytree(trained[0], tmp_path / 'run')
  (workdir / 'metrics.jsonl').write_text(json.dumps({'step': 16, 'split': 'val', 'loss': 0.7}))
  assert stored.accuracies(workdir) == {16: -0.7}


@pytest.mark.parametrize('size', [0, 3, 4, 5, 11])
def test_the_checksum_covers_the_whole_file(tmp_path, monkeypatch, size):
  monkeypatch.setattr(digests, 'CHUNK', 4)
  data = bytes(range(size))
  (tmp_path / 'file').write_bytes(data)
  assert digests.checksum(tmp_path / 'file') == [size, zlib.crc32(data)]


@pytest.mark.parametrize(
  'others, shared', [((), True), ((True,), True), ((False,), False), ((True, False), False)]
)
@pytest.mark.parametrize('written', [True, False])
def test_a_checkpoint_is_shared_if_all_processes_see_its_checksums(
  tmp_path, monkeypatch, others, shared, written
):
  """Each value in `others` tells whether another process sees the same file as this process."""
  if written:
    digests.write_digests(tmp_path)
  gather = lambda own: [own, *(own if same else 7 for same in others)]
  monkeypatch.setattr(restoring, 'from_all', gather)
  assert restoring.is_visible(tmp_path) == (shared and (written or not others))


def test_every_file_is_checked_by_exactly_one_process(tmp_path):
  files = [tmp_path / 'params' / name for name in 'abcde']
  files[0].parent.mkdir()
  for file in files:
    file.write_bytes(b'whole')
  digests.write_digests(tmp_path)

  def finds_damage(process):
    try:
      return not digests.compare_files(tmp_path, share=(process, 3))
    except items.Damaged:
      return True

  for file in files:
    file.write_bytes(b'other')
    assert [finds_damage(process) for process in range(3)].count(True) == 1
    file.write_bytes(b'whole')


def test_a_checkpoint_that_orbax_did_not_complete_is_an_error(tmp_path, monkeypatch):
  monkeypatch.setattr(manager, 'take_folders_literally', lambda: None)
  kind = type(epath.Path())
  monkeypatch.setattr(kind, 'glob', lambda *_: iter(()))  # orbax then finds no files to merge
  now = state.TrainState(jnp.int32(3), {'head': {'bias': jnp.zeros(2)}}, {}, None)
  message = 'Cannot write .*orbax did not write params/manifest.ocdbt, state/manifest.ocdbt, names'
  with (
    pytest.raises(storage.Unwritten, match=message),
    checkpoint.Checkpoints(tmp_path) as checkpoints,
  ):
    checkpoints.save(now, {'config': {}, 'names': trained.TrainingFiles().item()})
  assert not stored.all_steps(tmp_path)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_a_parameter_that_is_not_finite_is_named_and_not_saved(tmp_path, bad):
  head = {'bias': jnp.zeros(2), 'kernel': jnp.array([1.0, bad, 2.0])}
  now = state.TrainState(jnp.int32(3), {'head': head, 'norm': jnp.ones(1)}, {}, None)
  message = 'Parameter head/kernel is not finite after step 3'
  with (
    pytest.raises(FloatingPointError, match=message),
    checkpoint.Checkpoints(tmp_path) as checkpoints,
  ):
    checkpoints.save(now, {'config': {}, 'names': trained.TrainingFiles().item()})
  assert not stored.all_steps(tmp_path)


@pytest.mark.parametrize('step', ['24', '016a', '-16', 'newest'])
def test_a_step_without_a_checkpoint_is_refused(trained, step):
  message = f'--step={step}: .* has the checkpoints 16, 32. Use'
  with pytest.raises(ValueError, match=message):
    stored.load_checkpoint(trained[0], step)


def test_the_newest_checkpoint_replaces_a_damaged_best_one(tmp_path):
  save_rated(tmp_path, 3, [0.9, None, None])
  assert stored.load_checkpoint(tmp_path, '')[0] == 1
  damage(tmp_path, 1, 'params', 'flip')
  assert stored.load_checkpoint(tmp_path, '')[0] == 3
  with pytest.raises(items.Damaged, match='checkpoints/1 is damaged'):
    stored.load_checkpoint(tmp_path, 'best')


def events_of(workdir):
  """Returns all events in the only event file of a workdir."""
  (path,) = (workdir / 'tensorboard').iterdir()
  data, found = path.read_bytes(), []
  while data:  # length, its checksum, the event, its checksum
    (size,) = struct.unpack('<Q', data[:8])
    found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
    data = data[16 + size :]
  return found


def test_tensorboard_drops_events_after_the_resumed_step(tmp_path):
  with writer.Writer(tmp_path, 16):
    pass
  start = event_pb2.SessionLog.START
  started = [event.step for event in events_of(tmp_path) if event.session_log.status == start]
  assert started == [17]  # which, and all after it, TensorBoard takes for void


def test_writing_events_does_not_import_pytorch(tmp_path):
  (tmp_path / 'torch.py').write_text('')
  script = (
    'import sys; from vit_jax.workdir import events; assert "torch" not in sys.modules\n'
    'import torch; assert torch.__file__.startswith(sys.path[1]), torch'
  )
  environment = os.environ | {'PYTHONPATH': f'{tmp_path}{os.pathsep}{ROOT}'}
  subprocess.run([sys.executable, '-c', script], env=environment, check=True)


def test_tensorboard_gets_each_metric_with_its_split_and_step(tmp_path):
  with writer.Writer(tmp_path, 0) as records:
    records.write(8, 'train', loss=0.5, accuracy=0.25)
    records.write(16, 'test', loss=2.0)
  values = [(event.step, value) for event in events_of(tmp_path) for value in event.summary.value]
  found = [(step, value.tag, value.simple_value) for step, value in values]
  assert found == [(8, 'train/loss', 0.5), (8, 'train/accuracy', 0.25), (16, 'test/loss', 2.0)]


@contextlib.contextmanager
def small_disk(folder, size):
  """Mounts a file system of `size` bytes; skips the test if this is not possible."""
  folder.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', folder]
  if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
    pytest.skip('mounting a file system needs root rights')
  try:
    yield folder
  finally:
    subprocess.run(['umount', '--lazy', folder], check=True)


def space(folder):
  """Returns the bytes that a folder takes in a file system with pages of 4 KiB."""
  return sum(-(-p.stat().st_size // 4096) * 4096 for p in folder.rglob('*') if p.is_file())


def test_full_disk_is_reported_from_any_orbax_error(tmp_path):
  error = ValueError('Error writing ' + 'a/long/path/' * 50 + ': No space left on device')
  said = f'Cannot write {tmp_path}/checkpoints .No space left on device'
  with pytest.raises(storage.Unwritten, match=said), checkpoint.saving(tmp_path):
    raise error


@pytest.mark.slow
def test_full_disk_leaves_the_last_checkpoint_intact(trained, tmp_path, capfd):
  checkpoints = trained[0] / 'checkpoints'
  room = space(trained[0]) - space(checkpoints) + 3 * space(checkpoints / '16') // 2
  with small_disk(tmp_path / 'disk', room) as disk:
    workdir = disk / 'run'
    said = 'Cannot write .*run/.* .No space left.* step 16 is complete: the same command'
    with pytest.raises(storage.Unwritten, match=said):
      trainer.train(small_config(), workdir)
    assert 'Traceback' not in capfd.readouterr().err
    assert stored.latest_step(workdir) == 16
    subprocess.run(['mount', '-o', f'remount,size={4 * room}', disk], check=True)
    assert trainer.train(small_config(), workdir)['steps'] == 32
    assert_same_end(workdir, trained)


@pytest.mark.parametrize('name', ['log.txt', 'metrics.jsonl', 'result.json'])
def test_unwritable_record_is_named(tmp_path, capfd, name):
  said = f'{name} .No space left on device'
  full = tmp_path / {'result.json': f'result.json.{os.getpid()}.partial'}.get(name, name)
  with pytest.raises(storage.Unwritten, match=said), contextlib.ExitStack() as stack:
    if name == 'log.txt':
      full.symlink_to('/dev/full')
    records = stack.enter_context(writer.Writer(tmp_path, 0))
    if name != 'log.txt':
      full.symlink_to('/dev/full')
    writer.LOG.info('A line.')
    records.write(1, 'train', loss=1.0)
    writer.write_json(tmp_path / 'result.json', {})
  err = capfd.readouterr().err
  assert 'Traceback' not in err and 'Logging error' not in err
  assert not [*tmp_path.glob('*.partial')]


def test_two_processes_can_replace_a_file_at_once(tmp_path):
  path = tmp_path / 'predictions.csv'
  other = 'import pathlib, sys; from vit_jax.storage import replace; '
  other += 'replace(pathlib.Path(sys.argv[1]), "b")'
  with storage.replacing(path) as partial:
    partial.write_text('a')
    subprocess.run([sys.executable, '-c', other, path], cwd=ROOT, check=True)
    assert path.read_text() == 'b' and partial.read_text() == 'a'
  assert path.read_text() == 'a' and [*tmp_path.iterdir()] == [path]


@pytest.mark.slow
def test_read_only_workdir_refuses_training_but_allows_evaluation(trained, tmp_path):
  with small_disk(tmp_path / 'disk', 4 * space(trained[0])) as disk:
    workdir = shutil.copytree(trained[0], disk / 'run')
    subprocess.run(['mount', '-o', 'remount,ro', disk], check=True)
    with pytest.raises(ValueError, match='Cannot write to .*read-only'):
      trainer.train(small_config(epochs='2'), workdir)
    assert exact.evaluate(workdir, {})['step'] == 32
    assert trainer.train(small_config(), workdir) == trained[1]  # it had finished before


def test_a_checkpoint_that_training_replaces_during_reading_is_not_damaged(
  trained, tmp_path, monkeypatch, caplog
):
  workdir = shutil.copytree(trained[0], tmp_path / 'run')
  folder, read = workdir / 'checkpoints', stored.read_item
  (folder / '32').rename(tmp_path / 'newest')

  def replaced(*arguments):
    if (folder / '16').exists():
      (tmp_path / 'newest').rename(folder / '32')
      shutil.rmtree(folder / '16')
    return read(*arguments)

  monkeypatch.setattr(stored, 'read_item', replaced)
  assert stored.load_checkpoint(workdir, 'last')[0] == 32
  assert 'damaged' not in caplog.text


def test_steps_that_reuse_the_memory_of_the_state_do_not_change_what_is_written(tmp_path):
  step = jax.jit(lambda now: jax.tree.map(lambda x: x + 1, now), donate_argnums=0)
  first = np.arange(2**24, dtype=np.float32)  # 64 MiB, which are still written during the steps
  now = state.TrainState(jnp.int32(0), {'w': jnp.asarray(first)}, {'mu': jnp.zeros(3)}, None)
  now = step(now)
  saved = {'config': {}, 'task': {}, 'seconds': 0, 'names': trained.TrainingFiles().item()}
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(now, saved)
    for _ in range(50):
      now = step(now)
    jax.block_until_ready(now)
  np.testing.assert_array_equal(stored.restore_item(tmp_path, 1, 'params')['w'], first + 1)
  assert stored.restore_item(tmp_path, 1, 'state')['step'] == 1
