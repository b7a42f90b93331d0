"""Checks checkpoints that several processes write together, and that any devices can read them."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.distributed.test_cluster import free_port
from tests.fake_gcs import FakeGcs
from vit_jax import bucket
from vit_jax.workdir import stored

PLAIN = """
import sys, jax, numpy as np
jax.config.update('jax_num_cpu_devices', int(sys.argv[2]))
import orbax.checkpoint as ocp

checkpointer = ocp.StandardCheckpointer()
found = {item: checkpointer.restore(f'{sys.argv[1]}/{item}') for item in ('params', 'state')}
leaves = jax.tree_util.tree_leaves_with_path(found)
assert 'vit_jax' not in sys.modules and jax.device_count() == int(sys.argv[2])
np.savez(sys.argv[3], **{
  jax.tree_util.keystr(path, simple=True, separator='/'): np.frombuffer(
    np.asarray(leaf).tobytes(), np.uint8) for path, leaf in leaves
})
"""


def run(action, folder, fsdp, devices, processes=1):
  """Runs sharded.py in some processes; returns what each of them printed."""
  port, environment = free_port(), os.environ | {'PYTHONPATH': str(ROOT)}
  command = [sys.executable, '-m', 'tests.workdir.sharded', action, folder, fsdp, devices, port]
  commands = [[str(word) for word in (*command, processes, i)] for i in range(processes)]
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
  started = [subprocess.Popen(words, cwd=ROOT, **pipes) for words in commands]
  ended = [process.communicate(timeout=240) for process in started]
  assert [process.returncode for process in started] == [0] * processes, ended[0][1][-3000:]
  return [out.splitlines()[-1] for out, _ in ended]


def bits():
  """Returns the bytes of all arrays that sharded.py saves, by their names."""
  import jax

  from tests.workdir.sharded import arrays

  state = arrays()
  whole = {'params': state.params, 'state': {
    'step': state.step, 'opt_state': state.opt_state, 'ema': state.ema,
  }}  # fmt: skip
  leaves = jax.tree_util.tree_leaves_with_path(whole)
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator='/')
  return {name(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


@pytest.fixture
def in_bucket(monkeypatch):
  """A folder in a bucket on loopback."""
  pytest.importorskip('gcsfs')
  with FakeGcs() as server:
    for name, value in server.env.items():
      monkeypatch.setenv(name, value)
    yield 'gs://bucket'


@pytest.mark.slow
@pytest.mark.slow_after_first
@pytest.mark.parametrize('place', ['tmp_path', 'in_bucket'])
@pytest.mark.parametrize('processes, devices', [(2, 2), (4, 1)])
def test_shards_of_several_processes_are_restored_anywhere(
  request, tmp_path, processes, devices, place
):
  workdir = f'{request.getfixturevalue(place)}/run'
  assert run('save', workdir, 4, devices, processes) == ['saved'] * processes
  checkpoint = stored.directory(bucket.to_path(workdir)) / '7'
  folders = [path.name for path in (checkpoint / 'params').iterdir()]
  assert sum(name.startswith('ocdbt.process_') for name in folders) == processes  # each its part
  for fsdp, count in ((1, 1), (1, 2), (2, 4), (8, 8)):
    assert run('restore', workdir, fsdp, count) == ['same']
  assert run('restore', workdir, 2, 2, 2) == ['same'] * 2
  for count in (1, 8):
    out = tmp_path / 'plain.npz'
    subprocess.run([sys.executable, '-c', PLAIN, str(checkpoint), str(count), out], check=True)
    with np.load(out) as found:
      assert {name: found[name].tobytes() for name in found} == bits()


@pytest.mark.slow
def test_processes_without_a_shared_folder_gather_to_the_first(tmp_path):
  assert run('save', tmp_path / '%', 4, 2, 2) == ['saved'] * 2
  assert not (tmp_path / '1').exists() and stored.saved_steps(tmp_path / '0') == [7]
  assert run('restore', tmp_path / '%', 2, 2, 2) == ['same'] * 2
  assert run('restore', tmp_path / '0', 1, 1) == ['same']


@pytest.mark.slow
def test_all_processes_report_that_one_cannot_write(tmp_path):
  said = run('full', tmp_path / 'run', 4, 2, 2)
  for text in said:
    assert text.startswith('Unwritten: Cannot write') and 'File too large' in text, said
  assert stored.saved_steps(tmp_path / 'run') == []


@pytest.mark.slow
def test_a_process_does_not_wait_for_one_that_failed_before_writing(tmp_path):
  began = time.monotonic()
  said = run('refused', tmp_path / 'run', 4, 2, 2)
  assert time.monotonic() - began < 60  # orbax would wait for 5 minutes
  for text in said:
    assert text.startswith('Unwritten: Cannot write') and 'No space left' in text, said
  assert stored.saved_steps(tmp_path / 'run') == []
