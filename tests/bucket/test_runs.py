"""Runs whose workdir and data are in a bucket: real processes, and a server on loopback."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
from PIL import Image
import pytest
from sklearn import datasets

from tests.conftest import DATA, ROOT
from tests.fake_gcs import FakeGcs

pytestmark = pytest.mark.slow

FLAGS = [
  '--config=configs/digits.py', '--config.epochs=8', '--config.batch_size=64',
  '--config.model.width=16', '--config.model.num_heads=2', '--config.model.depth=1',
  '--config.augment.mix.probability=0', '--config.eval_every=0', '--config.log_every=2',
  '--config.checkpoint_every=4', '--config.data.source=folder:digits',
]  # fmt: skip
STEPS = 48


def images():
  """Yields (path, content) of 480 digits, in `digits/train/<class>/` and `digits/test/<class>/`."""
  found = datasets.load_digits()
  for i, (image, label) in enumerate(zip(found.images[:480], found.target)):
    file = io.BytesIO()
    Image.fromarray(np.round(image * 15.9).astype(np.uint8)).save(file, format='PNG')
    yield f'digits/{"train" if i % 5 else "test"}/{label}/{i}.png', file.getvalue()


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """A local folder with the images."""
  folder = tmp_path_factory.mktemp('data')
  for name, content in images():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
  return folder


@pytest.fixture
def server():
  with FakeGcs() as found:
    for name, content in images():
      found.put('bucket', f'data/{name}', content)
    found.written.clear()
    yield found


def start(server, workdir, *flags, data='gs://bucket/data', **env):
  """Starts `main.py`; `data` is the folder that contains `digits/`."""
  command = [sys.executable, 'main.py', f'--workdir={workdir}', *flags]
  command += [f'--config.data.dir={data}'] if '--config=configs/digits.py' in flags else []
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  return subprocess.Popen(command, cwd=ROOT, env=os.environ | server.env | env, **pipes)


def start_pair(envs, *flags):
  """Starts `main.py` as two processes that train together; each has its own server variables."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  command = [sys.executable, 'main.py', '--workdir=gs://bucket/run', *FLAGS, *flags]
  command += ['--config.data.dir=gs://bucket/data', f'--coordinator=127.0.0.1:{port}']
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  return [
    subprocess.Popen(
      [*command, '--num_processes=2', f'--process_id={i}'], cwd=ROOT, env=os.environ | env, **pipes
    )
    for i, env in enumerate(envs)
  ]


def finish(process, code=0):
  """Waits for a process that must end with this exit code, and returns what it printed."""
  out, _ = process.communicate(timeout=300)
  assert process.returncode == code, out
  assert 'Traceback' not in out, out
  return out


def wait_for(process, condition):
  while not condition():
    assert process.poll() is None, process.communicate()
    time.sleep(0.02)


def losses(text):
  """Returns the loss of each line of `metrics.jsonl`, which shows any difference of weights."""
  lines = [json.loads(line) for line in text.splitlines()]
  return {(line['split'], line['step']): line['loss'] for line in lines}


def steps_of(server, run='run'):
  """Returns the steps of the checkpoints that are complete."""
  names = server.names(f'{run}/checkpoints/')
  return {int(name.split('/')[2]) for name in names if name.endswith('/commit_success.txt')
          and name.count('/') == 3}  # fmt: skip


@pytest.mark.long  # .ci/run kills runs in a bucket with benchmarks/bucket_faults.py
def test_a_killed_run_in_a_bucket_ends_like_a_local_run(server, data, tmp_path):
  finish(start(server, tmp_path / 'local', *FLAGS, data=data))
  here, scratch = set(os.listdir(ROOT)), tmp_path / 'scratch'
  scratch.mkdir()
  process = start(server, 'gs://bucket/run', *FLAGS, TMPDIR=str(scratch))
  wait_for(process, lambda: any(step >= 12 for step in steps_of(server)))
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  assert 'run/lock.json' in server.names()  # nobody has removed it
  left = {path.name for path in scratch.iterdir()}  # of the killed run
  out = finish(start(server, 'gs://bucket/run', *FLAGS, TMPDIR=str(scratch)))
  assert 'Resuming from step' in out
  finish(start(server, 'gs://bucket/run', '--mode=eval'))
  local = (tmp_path / 'local' / 'metrics.jsonl').read_text(encoding='utf-8')
  found = server.objects['bucket', 'run/metrics.jsonl'].data.decode()
  assert losses(found) == losses(local)
  assert 'run/lock.json' not in server.names()
  assert {'run/log.txt', 'run/result.json', 'run/config.json', 'run/eval.json'} <= {*server.names()}
  assert any(name.startswith('run/tensorboard/') for name in server.names())
  assert len([name for name in server.names() if name.startswith('run/lists/')]) == 1
  assert set(os.listdir(ROOT)) == here
  assert {path.name for path in scratch.iterdir()} == left
  picture = next(data.rglob('*.png'))
  out = finish(start(server, 'gs://bucket/run', '--mode=predict', f'--images={picture}'))
  assert picture.name in out
  export = ['--mode=export', '--format=stablehlo', '--out=gs://bucket/program']
  finish(start(server, 'gs://bucket/run', *export))
  assert 'program/model.stablehlo' in server.names()


@pytest.mark.parametrize('seconds', [8, pytest.param(60, marks=pytest.mark.long)])
def test_a_bucket_that_is_unavailable_for_a_while_only_delays_a_run(server, seconds):
  process = start(server, 'gs://bucket/run', *FLAGS)
  wait_for(process, lambda: steps_of(server))
  server.unavailable(seconds)
  finish(process)
  assert max(steps_of(server)) == STEPS


@pytest.mark.long
def test_two_processes_ask_to_try_again_if_the_bucket_stays_silent(server, tmp_path):
  impatient = 'from vit_jax.bucket import patient\npatient.PATIENCE = 0\n'
  (tmp_path / 'impatient.py').write_text(impatient)
  envs = [server.env | {'PYTHONPATH': str(tmp_path)}] * 2
  pair = start_pair(envs, '--import=impatient', '--config.epochs=200', '--config.log_every=1')
  wait_for(pair[0], lambda: steps_of(server))
  server.unavailable(200)
  outs = [process.communicate(timeout=300)[0] for process in pair]
  codes = [process.returncode for process in pair]
  assert codes[0] == 75 and codes[1] in (75, -signal.SIGABRT), outs  # JAX aborts the other one
  assert 'no answer for 0 seconds' in outs[0] + outs[1]


def test_a_second_run_is_refused_and_a_run_without_its_lock_stops(server):
  first = start(server, 'gs://bucket/run', *FLAGS, '--config.epochs=200', '--config.log_every=1')
  wait_for(first, lambda: steps_of(server))
  out = finish(start(server, 'gs://bucket/run', *FLAGS, '--config.epochs=200'), code=2)
  assert 'another run is writing here' in out
  server.put('bucket', 'run/lock.json', b'{}')
  out = finish(first, code=2)  # at the next heartbeat
  assert 'another run has taken over the lock of this workdir' in out
  assert server.objects['bucket', 'run/lock.json'].data == b'{}'


def test_missing_images_and_folders_are_errors(server):
  out = finish(start(server, 'gs://bucket/run', *FLAGS, '--config.data.source=folder:no'), code=2)
  assert "no folder at 'gs://bucket/data/no'" in out
  del server.objects['bucket', next(name for name in server.names('data/digits/train'))]
  out = finish(start(server, 'gs://absent/run', *FLAGS), code=2)
  assert 'gs://absent: there is no such bucket' in out
  out = finish(start(server, 'gs://bucket/nothing', '--mode=eval'), code=2)
  assert 'gs://bucket/nothing: no checkpoint' in out


def test_each_process_reads_only_the_images_of_its_devices():
  with FakeGcs(addresses=2) as server:
    for name, content in images():
      server.put('bucket', f'data/{name}', content)
    stream = ['--config.data.cache=stream', '--config.epochs=0.34']  # batches are read ahead
    for process in start_pair([server.env_of(0), server.env_of(1)], *stream):
      finish(process)
    of = lambda read: {name for name in read if name.startswith('data/digits/train/')}
    one, other = map(of, server.read)
    assert 64 <= len(one) <= 194 and 64 <= len(other) <= 194, (len(one), len(other))
    assert len(one & other) <= 2  # the first image tells the size


def is_saving(server):
  """Returns whether a checkpoint after the first has files, but is not complete."""
  names = server.names('run/checkpoints/')
  started = {int(name.split('/')[2]) for name in names if name.split('/')[2].isdecimal()}
  return steps_of(server) and started - steps_of(server)


def stop_one_while_saving(server, how):
  """Starts both processes, stops one of them in the middle of a save; returns both exit codes."""
  before = max(steps_of(server), default=0)
  pair = start_pair([server.env] * 2, '--config.log_every=1')
  wait_for(pair[0], lambda: max(steps_of(server), default=0) > before)
  server.delay = 0.05  # saving takes long, so that the signal comes while both processes save
  wait_for(pair[0], lambda: is_saving(server))
  pair[1].send_signal(how)
  outs = [process.communicate(timeout=300)[0] for process in pair]  # neither of them hangs
  server.delay = 0.0
  return [process.returncode for process in pair], outs


@pytest.mark.long
def test_two_processes_recover_if_one_is_stopped_while_both_save(server):
  for process in start_pair([server.env] * 2, '--config.log_every=1'):
    finish(process)
  want = losses(server.objects['bucket', 'run/metrics.jsonl'].data.decode())
  for name in server.names('run/'):
    del server.objects['bucket', name]

  codes, outs = stop_one_while_saving(server, signal.SIGKILL)
  assert codes[1] == -signal.SIGKILL and codes[0] not in (0, 75), outs
  killed_at = max(steps_of(server))
  codes, outs = stop_one_while_saving(server, signal.SIGTERM)
  assert codes == [75, 75] and f'Resuming from step {killed_at}.' in outs[0], outs
  stopped_at = max(steps_of(server))
  assert killed_at < stopped_at < STEPS

  outs = [finish(process) for process in start_pair([server.env] * 2, '--config.log_every=1')]
  assert f'Resuming from step {stopped_at}.' in outs[0]
  assert losses(server.objects['bucket', 'run/metrics.jsonl'].data.decode()) == want


READ = """
import sys
from vit_jax.data import sources
source = sources.open_source('tfds:mini', sys.argv[1], (8, 8))
for split, size in source.sizes.items():
  for name, encoded, label in source.read(split, range(size)):
    print(name, label, hash(bytes(encoded)))
assert 'tensorflow' not in sys.modules
"""


def test_tfds_data_in_a_bucket_are_those_on_disk(server):
  for file in (DATA / 'tfds').glob('*/*/*'):
    server.put('bucket', f'tfds/{file.relative_to(DATA / "tfds")}', file.read_bytes())
  env = os.environ | server.env | {'PYTHONHASHSEED': '0'}
  read = lambda place: subprocess.run(
    [sys.executable, '-c', READ, place], cwd=ROOT, env=env, capture_output=True, text=True
  )
  local, remote, absent = map(read, (str(DATA / 'tfds'), 'gs://bucket/tfds', 'gs://bucket/no'))
  assert remote.stdout == local.stdout and len(local.stdout.splitlines()) > 4, remote.stderr
  assert absent.returncode, absent.stdout
