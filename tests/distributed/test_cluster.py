"""Checks runs of several real processes: failures, preemption, start-up and shared values."""

import concurrent.futures
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import jax
from jax._src.clusters import k8s_cluster
import numpy as np
from PIL import Image
import pytest

from benchmarks.pairs import write_pairs
from tests.conftest import ROOT, small_config
from vit_jax import bucket, evaluation, limits, storage
from vit_jax.data import open_source
from vit_jax.distributed import agreement, backend, children, cluster, joining
from vit_jax.storage import TRY_AGAIN
from vit_jax.training import trainer
from vit_jax.workdir import stored, writer

STEPS = 60
SETTINGS = {
  'model.width': '16', 'model.depth': '1', 'epochs': str(STEPS / 32), 'log_every': '1',
  'checkpoint_every': '10', 'eval_every': '0', 'ema': '0.9',
}  # fmt: skip


def free_port():
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return free.getsockname()[1]


def start(workdir, port, process_id, more):
  """Starts main.py on the small run, with two CPU devices per process."""
  flags = [
    sys.executable, 'main.py', '--config=tests/small.py', f'--workdir={workdir}',
    f'--coordinator=127.0.0.1:{port}', '--num_processes=2',
    f'--process_id={process_id}', *(f'--config.{k}={v}' for k, v in SETTINGS.items()), *more,
  ]  # fmt: skip
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  pipes = dict(stdout=subprocess.DEVNULL, stderr=(workdir.parent / f'{process_id}.log').open('w'))
  return subprocess.Popen(flags, cwd=ROOT, env=environment, **pipes)


def start_both(workdir, more=((), ())):
  port = free_port()
  return [start(workdir, port, i, more[i]) for i in range(2)]


def lines(workdir):
  if not (workdir / 'metrics.jsonl').exists():
    return []
  return [line for line in writer.read_metrics(workdir) if line['split'] == 'train']


def wait_for(condition, processes):
  """Waits until the condition holds; the processes must live until then."""
  until = time.monotonic() + 120
  while not condition():
    assert time.monotonic() < until and all(process.poll() is None for process in processes)
    time.sleep(0.02)


@pytest.mark.long  # .ci/run kills two processes with benchmarks/faults.py
def test_run_of_two_processes_survives_a_kill_and_a_preemption(tmp_path):
  reference = trainer.train(small_config(**SETTINGS), tmp_path / 'alone')  # two devices
  workdir = tmp_path / 'together'

  processes = start_both(workdir)
  wait_for(lambda: len(lines(workdir)) > 12 and stored.latest_step(workdir), processes)
  processes[1].send_signal(signal.SIGKILL)
  assert processes[0].wait(60) not in (0, 2, TRY_AGAIN)  # JAX or Gloo aborts it
  said = (tmp_path / '0.log').read_text()  # JAX does not always name the dead process
  assert 'another process died, start all processes again with the same commands' in said
  saved = stored.latest_step(workdir)
  assert saved in (10, 20, 30, 40, 50)
  processes[1].wait()

  processes = start_both(workdir)
  wait_for(lambda: 'Resuming from' in (tmp_path / '0.log').read_text(), processes)
  processes[1].send_signal(signal.SIGTERM)  # both stop after the same step
  assert [process.wait(60) for process in processes] == [TRY_AGAIN] * 2
  assert stored.latest_step(workdir) == lines(workdir)[-1]['step'] < STEPS

  processes = start_both(workdir)
  assert [process.wait(120) for process in processes] == [0, 0]
  losses = [[line['loss'] for line in lines(tmp_path / name)] for name in ('alone', 'together')]
  assert len(losses[0]) == STEPS
  np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
  result = json.loads((workdir / 'result.json').read_text())
  assert result['examples'] == reference['examples'] == 256
  assert result['test_accuracy'] == reference['test_accuracy']


@pytest.mark.long
def test_two_processes_evaluate_each_example_once_and_fit_the_same_temperature(tmp_path):
  split = {'data.train_split': 'train[:256]', 'data.val_split': 'train[256:448]'}
  flags = [f'--config.{key}={value}' for key, value in split.items()]
  processes = start_both(tmp_path / 'run', (flags, flags))
  assert [process.wait(120) for process in processes] == [0, 0]
  fitted = json.loads((tmp_path / 'run' / 'calibration.json').read_text())
  flags += ['--mode=eval', '--config.eval_batch_size=37']  # is no multiple of the 4 devices
  processes = start_both(tmp_path / 'run', (flags, flags))
  assert [process.wait(120) for process in processes] == [0, 0]
  together = json.loads((tmp_path / 'run' / 'eval.json').read_text())
  (tmp_path / 'run' / 'calibration.json').unlink()
  alone = evaluation.evaluate(tmp_path / 'run', {'eval_batch_size': '256'})
  assert together['examples'] == alone['examples'] == 256
  assert together['confusion'] == alone['confusion']
  temperature = fitted[str(alone['step'])]['temperature']
  assert temperature == pytest.approx(alone['temperature'], rel=1e-4)
  assert together['temperature'] == temperature


@pytest.mark.slow
def test_two_processes_evaluate_images_of_several_labels_like_one(tmp_path):
  write_pairs(open_source('digits', '', (8, 8)), tmp_path / 'pairs', {'train': 200, 'test': 90}, 8)
  settings = {
    'data.source': f'labels:{tmp_path}/pairs/labels.csv', 'data.image_size': '8,16',
    'data.train_split': 'train[:70%]', 'data.val_split': 'train[70%:]',
    'augment.flip.probability': '0',
  }  # fmt: skip
  workdir = tmp_path / 'run'
  trainer.train(small_config(**SETTINGS | settings), workdir)
  fitted = {}
  for name in ('alone', 'together'):
    (workdir / 'calibration.json').unlink()  # so that the thresholds are fitted again
    if name == 'alone':
      fitted[name] = evaluation.evaluate(workdir)
    else:
      flags = [f'--config.{key}={value}' for key, value in settings.items()]
      flags += ['--mode=eval', '--config.eval_batch_size=37']  # is no multiple of the 4 devices
      assert [process.wait(120) for process in start_both(workdir, (flags, flags))] == [0, 0]
      fitted[name] = json.loads((workdir / 'eval.json').read_text())
  alone, together = (numbers_in(found) for found in fitted.values())
  assert together == pytest.approx(alone, rel=1e-4)
  assert alone['examples'] == 90 and alone['threshold_examples'] > 0
  assert len({value for name, value in alone.items() if name.endswith('threshold')}) > 2


def numbers_in(found, start=''):
  """Returns the numbers in nested dicts as one dict."""
  numbers = {}
  for name, value in found.items():
    if isinstance(value, dict):
      numbers |= numbers_in(value, f'{start}{name} ')
    elif isinstance(value, int | float):
      numbers[start + name] = value
  return numbers


@pytest.mark.slow
def test_single_process_saves_before_it_stops_on_sigterm(tmp_path):
  workdir = tmp_path / 'run'
  command = [sys.executable, 'main.py', '--config=tests/small.py', f'--workdir={workdir}']
  settings = SETTINGS | {'epochs': '1000', 'checkpoint_every': '0'}
  command += [f'--config.{key}={value}' for key, value in settings.items()]
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
  wait_for(lambda: len(lines(workdir)) > 2, [process])
  process.send_signal(signal.SIGTERM)
  assert process.wait(60) == TRY_AGAIN
  assert stored.latest_step(workdir) == lines(workdir)[-1]['step']


def test_sigterm_is_handled_only_during_a_run():
  heard = []
  before = signal.signal(signal.SIGTERM, lambda *_: heard.append('after'))
  try:
    with cluster.Preemption() as preemption:
      assert not preemption.is_due()
      signal.raise_signal(signal.SIGTERM)
      assert preemption.is_due() and not heard
    signal.raise_signal(signal.SIGTERM)
    assert heard == ['after']
  finally:
    signal.signal(signal.SIGTERM, before)


def test_a_signal_between_two_runs_of_a_sweep_is_not_forgotten():
  with cluster.Preemption():
    with cluster.Preemption() as first:
      assert not first.is_due()
    os.kill(os.getpid(), signal.SIGTERM)
    with cluster.Preemption() as second:
      assert second.is_due()
  with cluster.Preemption() as later:
    assert not later.is_due()


def test_a_notice_of_the_service_stays_with_the_context_around_a_run(monkeypatch):
  answers = iter([False, True, False, False])  # the service tells it once
  monkeypatch.setattr(cluster.jax.distributed, 'is_initialized', lambda: True)
  monkeypatch.setattr(cluster, 'asked_to_stop', lambda: next(answers))
  with cluster.Preemption() as around:
    with cluster.Preemption() as run:
      assert not run.is_due() and run.is_due()
    assert around.is_due()
  with cluster.Preemption() as later:
    assert not later.is_due()


def test_process_out_of_memory_exits_without_a_traceback(capsys, monkeypatch):
  codes = []
  monkeypatch.setattr(joining.os, '_exit', codes.append)
  monkeypatch.setattr(joining, 'PARTING', 0)
  joining.leave(limits.OutOfMemory('Training ran out of memory.'))
  assert codes == [2]
  assert capsys.readouterr().err == 'error: process 0 of 1: Training ran out of memory.\n'


def test_an_interrupted_process_exits_with_130(capsys, monkeypatch):
  codes = []
  monkeypatch.setattr(joining.os, '_exit', codes.append)
  monkeypatch.setattr(joining, 'PARTING', 0)
  joining.leave(KeyboardInterrupt())
  assert codes == [130] and capsys.readouterr().err == 'process 0 of 1: interrupted.\n'


PEER_LOST = jax.errors.JaxRuntimeError('UNAVAILABLE: the coordination service has no task 1')
FULL = jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: no 1 GiB left')


@pytest.mark.parametrize('error, cause, code', [
  (PEER_LOST, None, 1), (storage.Unwritten('Cannot write the checkpoint'), PEER_LOST, 1),
  (KeyError(), None, 1), (ValueError('Gloo all-reduce failed: Connection closed by peer'), None, 1),
  (storage.Unwritten('Cannot write the checkpoint'), TimeoutError('no answer of a process'), 1),
  (ValueError('bad config'), None, 2), (limits.OutOfMemory('Training ran out of memory'), FULL, 2),
])  # fmt: skip
def test_only_a_mistake_of_the_user_ends_a_process_with_code_2(monkeypatch, error, cause, code):
  codes, error.__cause__ = [], cause
  monkeypatch.setattr(joining.os, '_exit', codes.append)
  monkeypatch.setattr(joining.time, 'sleep', lambda _: None)
  joining.leave(error)
  assert codes == [code]
  assert storage.exit_code(storage.told('the same in another process', code)) == code


@pytest.mark.parametrize('first', [True, False])
def test_process_0_exits_last(monkeypatch, first):
  """When its service ends, JAX aborts the others, which may still have an error to print."""
  done = []
  monkeypatch.setattr(cluster, 'is_first', lambda: first)
  monkeypatch.setattr(joining.time, 'sleep', done.append)
  monkeypatch.setattr(joining.os, '_exit', lambda code: done.append(f'exit {code}'))
  joining.leave(ValueError('all processes have it'))
  assert done == [joining.PARTING] * first + ['exit 2']


@pytest.mark.parametrize('first', [True, False])
def test_any_error_of_process_0_reaches_the_others(monkeypatch, first):
  said = {'error': "Process 0 failed: KeyError: 'x'", 'code': 1}
  sent = [json.dumps(said).encode()]
  monkeypatch.setattr(cluster.jax, 'process_count', lambda: 2)
  monkeypatch.setattr(cluster.jax.distributed, 'is_initialized', lambda: True)
  monkeypatch.setattr(cluster, 'is_first', lambda: first)
  monkeypatch.setattr(cluster, 'broadcast', lambda data: sent.append(data) or data or sent[0])
  with pytest.raises(KeyError if first else ValueError, match='x'):
    cluster.from_first(lambda: {}['x'])
  assert sent[1] == (sent[0] if first else None)


@pytest.mark.parametrize('first', [True, False])
def test_all_processes_try_again_if_a_bucket_did_not_answer_one(monkeypatch, first):
  def ask():
    raise storage.unwritten('gs://bucket/a', 'silent') from bucket.NoAnswer('silent')

  sent = [json.dumps({'error': 'silent', 'code': TRY_AGAIN}).encode()]
  monkeypatch.setattr(cluster.jax, 'process_count', lambda: 2)
  monkeypatch.setattr(cluster.jax.distributed, 'is_initialized', lambda: True)
  monkeypatch.setattr(cluster, 'is_first', lambda: first)
  monkeypatch.setattr(cluster, 'broadcast', lambda data: data or sent[0])
  with pytest.raises(ValueError, match='silent') as caught:
    cluster.from_first(ask)
  assert storage.exit_code(caught.value) == TRY_AGAIN
  assert storage.exit_code(ValueError('bad config')) == 2


def two_processes(monkeypatch):
  """Makes this process act as process 0 of two processes."""
  monkeypatch.setattr(cluster.jax, 'process_count', lambda: 2)
  monkeypatch.setattr(cluster.jax.distributed, 'is_initialized', lambda: True)
  monkeypatch.setattr(cluster, 'is_first', lambda: True)


def test_every_process_fails_if_one_of_them_fails(monkeypatch):
  sent = []
  monkeypatch.setattr(
    cluster, 'from_all', lambda value: sent.append(value) or [value, ['silent', TRY_AGAIN]]
  )
  with pytest.raises(ValueError, match='^Process 1 failed: silent$') as caught:
    cluster.together(lambda: 'done')
  assert storage.exit_code(caught.value) == TRY_AGAIN

  def fail():
    raise OSError('my disk is full')

  with pytest.raises(OSError, match='my disk is full'):  # its own error
    cluster.together(fail)
  assert sent == [None, ['my disk is full', 2]]
  monkeypatch.setattr(cluster, 'from_all', lambda value: [value, None])
  assert cluster.together(lambda: 'done') == 'done'


def test_values_of_any_length_are_gathered(monkeypatch):
  two_processes(monkeypatch)
  other = json.dumps('a much longer value').encode()

  def gather(x):
    theirs = np.uint32(len(other)) if x.ndim == 0 else np.frombuffer(other, np.uint8)
    return np.stack([x, theirs])

  monkeypatch.setattr(cluster.multihost_utils, 'process_allgather', gather)
  assert cluster.from_all('short') == ['short', 'a much longer value']


@pytest.mark.parametrize('other', [True, False])
def test_a_folder_is_shared_only_if_every_process_sees_its_files(monkeypatch, tmp_path, other):
  two_processes(monkeypatch)
  monkeypatch.setattr(cluster, 'from_first', lambda function: function())
  monkeypatch.setattr(cluster, 'from_all', lambda seen: [seen, other])
  assert cluster.is_shared(tmp_path / 'run') == other
  assert not list((tmp_path / 'run').iterdir())


def test_large_data_is_broadcast_in_pieces(monkeypatch):
  data, sent = bytes(range(10)), []
  monkeypatch.setattr(cluster, 'PIECE', 4)

  def send(flat):
    sent.append(flat)
    return flat

  monkeypatch.setattr(cluster.multihost_utils, 'broadcast_one_to_all', send)
  assert cluster.broadcast(data) == data
  assert [flat.nbytes for flat in sent] == [8, 4, 4, 2]  # the size comes first

  received = iter(sent)

  def receive(flat):
    piece = next(received)
    assert (flat.shape, flat.dtype) == (piece.shape, piece.dtype)  # in all processes
    return piece

  monkeypatch.setattr(cluster, 'is_first', lambda: False)
  monkeypatch.setattr(cluster.multihost_utils, 'broadcast_one_to_all', receive)
  assert cluster.broadcast(None) == data


def test_single_kubernetes_pod_runs_alone(monkeypatch):
  for name in joining.LAUNCHERS:
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(joining.importlib.util, 'find_spec', lambda _: None)
  monkeypatch.setenv('KUBERNETES_SERVICE_HOST', '10.0.0.1')
  assert not joining.in_cluster()
  monkeypatch.setenv('JOB_COMPLETION_INDEX', '0')  # set in an indexed job
  assert joining.in_cluster()


def test_inconsistent_flags_are_refused():
  with pytest.raises(ValueError, match='--process_id=<0 to n-1> must be given together'):
    joining.join('localhost:1234', 2, None)
  with pytest.raises(ValueError, match='0 to n-1'):
    joining.join('localhost:1234', 2, 5)
  for process_id in (-1, 2):
    with pytest.raises(ValueError, match=f'together, got localhost:1234, 2, {process_id}'):
      joining.check_arguments('localhost:1234', 2, process_id)
  joining.check_arguments('localhost:1234', 2, 1)
  with pytest.raises(ValueError, match='must be given together, got None, 1, 7'):
    joining.join(None, 1, 7)
  for coordinator in ('foo', 'foo:0', '127.0.0.1:99999'):
    with pytest.raises(ValueError, match=f'--coordinator={coordinator}: expected <host>:<port>'):
      joining.join(coordinator, 2, 0)


@pytest.mark.parametrize('coordinator', [None, 'localhost:1234'])
@pytest.mark.parametrize('process_id', [None, 0])
def test_a_single_process_runs_alone(coordinator, process_id):
  joining.join(coordinator, 1, process_id)
  assert not cluster.jax.distributed.is_initialized()


def test_kubernetes_is_asked_again_for_the_address_of_process_0(monkeypatch):
  errors = iter([socket.gaierror('unknown name'), socket.gaierror('unknown name')])

  @k8s_cluster.retry(wait=(), exceptions=socket.gaierror)  # gives up after one call
  def initialize(*_, **__):
    for error in errors:
      raise error

  monkeypatch.setattr(joining.jax.distributed, 'initialize', initialize)
  joining.initialize(None, None, None)
  assert not list(errors)


def test_processes_that_cannot_connect_end_with_code_1(monkeypatch):
  def initialize(*_, **__):
    raise RuntimeError('DEADLINE_EXCEEDED')

  monkeypatch.setattr(joining.jax.distributed, 'initialize', initialize)
  with pytest.raises(ValueError, match='could not connect: DEADLINE_EXCEEDED') as caught:
    joining.join('localhost:1234', 2, 1)
  assert storage.exit_code(caught.value) == 1


@pytest.mark.parametrize('chosen', ['', '/shared'])
def test_processes_share_only_compiled_programs_in_a_folder_of_the_user(monkeypatch, chosen):
  monkeypatch.setattr(joining.jax.distributed, 'initialize', lambda *_, **__: None)
  monkeypatch.setattr(cluster, 'asked_to_stop', lambda: False)
  before, folder = jax.config.jax_compilation_cache_dir, chosen or storage.compiled_folder()
  jax.config.update('jax_compilation_cache_dir', folder)
  try:
    joining.join('localhost:1234', 2, 1)
    assert (jax.config.jax_compilation_cache_dir or '') == chosen
  finally:
    jax.config.update('jax_compilation_cache_dir', before)


@pytest.fixture
def undetected(monkeypatch):
  """Sets no variable of a launcher, and lets JAX detect no cluster."""

  def initialize(*_, **__):
    raise ValueError('coordinator_address should be defined.')

  monkeypatch.setattr(joining.jax.distributed, 'initialize', initialize)
  for name in joining.LAUNCHERS:
    monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize('name, value', [
  ('OMPI_COMM_WORLD_SIZE', '4'), ('JAX_COORDINATOR_ADDRESS', '10.0.0.1:8476')
])  # fmt: skip
def test_processes_of_a_launcher_do_not_each_train_alone(undetected, monkeypatch, name, value):
  monkeypatch.setenv(name, value)
  with pytest.raises(ValueError, match=f'{name}={value} in the .*--num_processes=1'):
    joining.join(None, None, None)
  joining.join(None, 1, None)


def test_a_pod_without_the_package_kubernetes_warns(undetected, monkeypatch, caplog):
  monkeypatch.setenv('OMPI_COMM_WORLD_SIZE', '1')
  joining.join(None, None, None)
  assert not caplog.text
  monkeypatch.setenv('JOB_COMPLETION_INDEX', '0')
  joining.join(None, None, None)
  assert 'the package `kubernetes` to find other pods' in caplog.text


def test_occupied_port_is_reported_before_jax_starts():
  with socket.create_server(('127.0.0.1', 0)) as server:
    port = server.getsockname()[1]
    with pytest.raises(ValueError, match=rf'port {port} of this machine \(Address already in use'):
      joining.join(f'127.0.0.1:{port}', 2, 0)


def test_a_process_that_has_connected_is_not_ended(capsys, monkeypatch):
  codes = []
  monkeypatch.setattr(joining.os, '_exit', codes.append)
  monkeypatch.setattr(joining, 'SOON', 0.05)
  monkeypatch.setattr(joining, 'JOIN', 0.1)
  with joining.waiting('the other processes'):
    pass
  time.sleep(0.3)
  assert not codes and not capsys.readouterr().err


@pytest.mark.slow
def test_process_reports_its_wait_and_exits_if_the_others_do_not_start():
  script = (
    'from vit_jax.distributed import joining\n'
    'joining.SOON, joining.JOIN = 0.5, 2\n'
    f'joining.join("127.0.0.1:{free_port()}", 2, 1)'
  )
  ended = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True)
  waits, fails = ended.stderr.splitlines()[-2:]
  assert ended.returncode == 1  # so that the launch scripts try again
  assert re.fullmatch(r'Waiting for 2 processes at 127\.0\.0\.1:\d+ \(2 s at most\) \.\.\.', waits)
  assert 'did not connect within 2 s' in fails and '--num_processes=1' in fails


@pytest.mark.slow
def test_all_processes_report_a_config_difference(tmp_path):
  processes = start_both(tmp_path / 'run', [['--config.seed=3'], []])
  assert [process.wait(60) for process in processes] == [2, 2]
  for i in range(2):
    said = (tmp_path / f'{i}.log').read_text().splitlines()
    assert 'config of process 1 differs from process 0: seed=0 instead of 3' in said[-1]


@pytest.mark.slow
def test_all_processes_report_test_images_that_differ(tmp_path):
  for place, removed in (('a', ''), ('b', 'test/dog/2.png')):
    for k, folder in enumerate(('train/cat', 'train/dog', 'test/cat', 'test/dog')):
      (tmp_path / place / 'photos' / folder).mkdir(parents=True)
      for i in range(8):
        if (name := f'{folder}/{i}.png') != removed:
          Image.new('RGB', (8, 8), (9 * i, 40 * k, 0)).save(tmp_path / place / 'photos' / name)
  own = [['--config.data.source=folder:photos', f'--config.data.dir={tmp_path / p}'] for p in 'ab']
  processes = start_both(tmp_path / 'run', own)
  assert [process.wait(60) for process in processes] == [2, 2]
  for i in range(2):
    said = (tmp_path / f'{i}.log').read_text().splitlines()
    differ = r'The data of process 1 differs from process 0: test=15 instead of 16; files of test='
    assert re.search(differ, said[-1])


def test_only_errors_without_a_device_become_a_remark_about_devices(monkeypatch):
  with pytest.raises(RuntimeError, match='^a bug$'), backend.needed():
    raise RuntimeError('a bug')

  def devices():
    raise RuntimeError('no cuda')

  monkeypatch.setattr(backend.jax, 'devices', devices)
  monkeypatch.setenv('JAX_PLATFORMS', 'cuda')
  message = r'^JAX_PLATFORMS=cuda: JAX finds no such device here \(no cuda\)'
  with pytest.raises(ValueError, match=message), backend.needed():
    raise RuntimeError('cannot start')


def test_signals_are_blocked_only_while_workers_start():
  blocked = lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ())
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
  try:
    with children.unsignalled():
      assert blocked() >= {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
    assert blocked() == before | {signal.SIGUSR1}
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Service:
  """Stands in for JAX's coordination service; each question takes half a second of its clock."""

  def __init__(self):
    self.values, self.now = {}, 0.0

  def key_value_set(self, key, value, allow_overwrite=False):
    assert allow_overwrite or key not in self.values
    self.values[key] = value

  def blocking_key_value_get(self, key, milliseconds):
    if key in self.values:
      return self.values[key]
    self.now += milliseconds / 1000
    raise jax.errors.JaxRuntimeError('DEADLINE_EXCEEDED: no such key')

  def key_value_dir_get(self, folder):
    return [pair for pair in self.values.items() if pair[0].startswith(f'{folder}/')]


@pytest.fixture
def service(monkeypatch):
  found = Service()
  monkeypatch.setattr(agreement.jax, 'process_count', lambda: 2)
  monkeypatch.setattr(agreement.multihost, 'get_jax_distributed_client', lambda: found)
  monkeypatch.setattr(agreement, 'time', types.SimpleNamespace(monotonic=lambda: found.now))
  return found


def test_a_process_waits_at_each_barrier_until_its_time_limit(service):
  process_0 = agreement.Agreement()
  place = f'{process_0.name}/save'
  service.values[f'{place}/1/1'] = ''  # process 1 has reached the barrier once
  process_0.barrier(key='save', timeout_ms=3000)
  assert f'{place}/1/all' in service.values and service.now == 0
  with pytest.raises(TimeoutError, match='in time'):  # the second time is another barrier
    process_0.barrier(key='save', timeout_ms=3000)
  assert 3 <= service.now <= 4


@pytest.mark.parametrize('failure, code', [
    (OSError('disk full'), 2), (bucket.NoAnswer('silent'), TRY_AGAIN), (KeyError('x'), 1),
])  # fmt: skip
def test_a_process_at_a_barrier_learns_that_another_one_failed(service, failure, code):
  waiting = agreement.Agreement()

  def fail():
    raise failure

  with pytest.raises(type(failure)):  # with one name, this stands for another process
    waiting.reporting(fail)()
  with pytest.raises(ValueError, match=f'process 0: {type(failure).__name__}: ') as caught:
    waiting.barrier(key='save', timeout_ms=60_000)
  assert storage.exit_code(caught.value) == code and service.now < 1


def test_a_process_that_waits_for_its_own_thread_learns_that_another_one_failed(service):
  finished, endless = concurrent.futures.Future(), concurrent.futures.Future()
  finished.set_result(7)
  waiting = agreement.Agreement()
  service.values[f'{waiting.name}/failed/0'] = json.dumps(['process 0: disk full', 2])
  assert waiting.result(finished) == 7
  timer = threading.Timer(1, lambda: endless.set_exception(OSError('disk full')))
  timer.start()
  with pytest.raises(OSError):  # the own error, not the report of it
    waiting.result(endless)
  service.values[f'{waiting.name}/failed/1'] = json.dumps(['process 1: disk full', 2])
  with pytest.raises(ValueError, match='process 1: disk full'):
    waiting.result(concurrent.futures.Future())


def test_check_same_names_the_process_and_the_difference(monkeypatch):
  value = {'lr': 0.1, 'sizes': (1, 2), 'nan': float('nan')}
  cluster.check_same('config', value)
  value = json.loads(json.dumps(value))
  everyone = [value, value, value | {'lr': 0.3}]
  monkeypatch.setattr(cluster, 'from_all', lambda _: everyone)
  with pytest.raises(ValueError, match='config of process 2 differs .*: lr=0.3 instead of 0.1'):
    cluster.check_same('config', value)
