"""`make gpu` keeps its order and its time limits, resumes stopped slices, and packs its needs."""

import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu, gpu_pack, gpu_slices, gpu_tables, recipes, works
from vit_jax.model import plain
from vit_jax.training import trial


@pytest.fixture
def args(tmp_path, monkeypatch):
  """Arguments with folders of their own; a slice gets 0.3 s to end after SIGTERM."""
  monkeypatch.setattr(gpu, 'GRACE', 0.3)
  args = gpu.parse([f'--results={tmp_path / "results"}'])
  args.work = tmp_path / 'work'
  args.results.mkdir()
  return args


def stand_in(monkeypatch, script):
  """Replaces the program of each slice by a Python script; `path` in it is the record's path."""

  def command(name, args):
    path = args.results / f'{name}.json'
    start = f'import json, pathlib, sys\nname, path = {name!r}, pathlib.Path({str(path)!r})\n'
    return [sys.executable, '-c', start + script]

  monkeypatch.setattr(gpu, 'command', command)


FINISH = "path.write_text(json.dumps({'slice': name, 'state': 'finished', 'result': {}}))\n"


def slices(**minutes):
  return {name: gpu.Slice(n, None) for name, n in minutes.items()}


def test_the_most_valuable_slices_come_first():
  names = list(gpu.SLICES)
  order = ('attention', 'b16_train', 'l16_train', 'exact_bfloat16', 'small', 'wide', 'deep')
  assert [name for name in names if name in order] == list(order) and names[0] == 'attention'
  before = itertools.takewhile(lambda name: name != 'small', names)
  assert sum(gpu.SLICES[name].minutes for name in before) < 30 - gpu.SLICES['small'].minutes
  assert all(60 * one.minutes < gpu.LIMIT for one in gpu.SLICES.values())


def test_slices_name_workloads_and_recipes_that_exist():
  named = [one.run.args[0] for one in gpu.SLICES.values() if hasattr(one.run, 'args')]
  known = {work.name for work in works.WORKS['gpu']} | recipes.RECIPES.keys()
  assert set(named) <= known | {'bfloat16', 'float32'}
  assert {'cifar10_small', 'cifar10_wide', 'cifar10_deep'} <= set(named)


def run_recorded(monkeypatch, args, table, took, state='finished'):
  """Runs a table with slices that take `took` seconds of a fake clock; returns their limits."""
  now, limits = [0.0], []

  def run_one(name, args, seconds):
    limits.append((name, seconds))
    now[0] += min(took, seconds)
    return state

  monkeypatch.setattr(gpu, 'run_one', run_one)
  gpu.run_all(table, args, lambda: now[0])
  return limits


def test_slices_run_in_order_and_finished_ones_are_skipped(monkeypatch, args):
  (args.results / 'b.json').write_text('{"state": "finished"}')
  (args.results / 'c.json').write_text('{"state": "failed"}')
  found = run_recorded(monkeypatch, args, slices(a=1, b=1, c=1, d=1), took=10)
  assert [name for name, _ in found] == ['a', 'c', 'd']


def test_no_slice_starts_without_enough_time_and_none_exceeds_it(monkeypatch, args):
  args.minutes = 10
  found = run_recorded(monkeypatch, args, slices(a=5, b=5, c=2, d=1), took=400)
  assert found == [('a', 540), ('c', 200)]  # 200 s left: too few for b; 0 s: too few for d


def test_a_slice_that_resumes_continues_while_time_is_left(monkeypatch, args):
  args.minutes = 30
  found = run_recorded(monkeypatch, args, slices(a=2, b=2), took=1e9, state='resumes')
  assert found == [('a', 540)] * 3 + [('a', 180)]
  found = run_recorded(monkeypatch, args, slices(a=2, b=2), took=700, state='failed')
  assert [name for name, _ in found] == ['a', 'b']


def test_a_slice_is_stopped_at_its_limit_and_resumes_in_the_next_call(monkeypatch, args, capsys):
  stand_in(
    monkeypatch,
    'import signal, time\n'
    "mark = path.with_suffix('.mark')\n"
    f'if mark.exists():\n  {FINISH}  sys.exit()\n'
    'signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n'
    'mark.touch()\ntime.sleep(60)\n',
  )
  began = time.monotonic()
  assert gpu.run_one('a', args, gpu.GRACE + 0.7) == 'resumes'
  assert time.monotonic() - began < 5
  assert 'the next call resumes' in json.loads((args.results / 'a.json').read_text())['reason']
  gpu.run_all(slices(a=0), args)
  assert gpu.state_of('a', args.results) == 'finished'
  assert capsys.readouterr().out == 'a ... finished\n'


def test_a_slice_that_ignores_sigterm_is_killed_with_its_children(monkeypatch, args):
  stand_in(
    monkeypatch,
    'import signal, subprocess\n'
    'signal.signal(signal.SIGTERM, signal.SIG_IGN)\n'
    "child = subprocess.Popen(['sleep', '60'])\n"
    "path.with_suffix('.pid').write_text(str(child.pid))\n"
    'child.wait()\n',
  )
  assert gpu.run_one('a', args, gpu.GRACE + 0.7) == 'stopped'
  pid = int((args.results / 'a.pid').read_text())
  for _ in range(50):
    if not alive(pid):
      return
    time.sleep(0.1)
  pytest.fail('the child of the slice is still running')


def alive(pid):
  stat = pathlib.Path(f'/proc/{pid}/stat')
  try:
    return stat.read_text().rpartition(')')[2].split()[0] != 'Z'
  except (FileNotFoundError, ProcessLookupError):
    return False


def test_a_failed_slice_records_the_reason_and_is_tried_again(monkeypatch, args):
  stand_in(monkeypatch, "sys.exit('the device is on fire')\n")
  assert gpu.run_one('a', args, 60) == 'failed'
  reason = json.loads((args.results / 'a.json').read_text())['reason']
  assert reason.startswith('exit code 1: the device is on fire (') and 'a.log' in reason
  stand_in(monkeypatch, FINISH)
  gpu.run_all(slices(a=0), args)
  assert gpu.state_of('a', args.results) == 'finished'


@pytest.mark.slow
def test_a_slice_ends_when_the_program_that_started_it_is_killed(tmp_path):
  slice_ = (
    'import os, threading, time\nfrom benchmarks import gpu\n'
    'threading.Thread(target=gpu.end_with_parent, args=(os.getppid(),)).start()\n'
    'print(os.getpid(), flush=True)\ntime.sleep(60)\n'
  )
  driver = (
    'import subprocess, sys\n'
    f'subprocess.Popen([sys.executable, "-c", {slice_!r}], process_group=0).wait()\n'
  )
  with subprocess.Popen([sys.executable, '-c', driver], stdout=subprocess.PIPE) as process:
    pid = int(process.stdout.readline())
    assert alive(pid)
    os.kill(process.pid, signal.SIGKILL)
  for _ in range(100):
    if not alive(pid):
      return
    time.sleep(0.1)
  pytest.fail('the slice is still running')


def test_a_missing_requirement_skips_a_slice_with_its_reason(args, monkeypatch, tmp_path):
  monkeypatch.setattr(gpu_pack, 'IMAGES', tmp_path / 'none')
  for name, word in (('attention', 'cuDNN cannot'), ('small', 'make gpu-pack')):
    gpu.measure(name, args)
    found = json.loads((args.results / f'{name}.json').read_text())
    assert found['state'] == 'skipped' and word in found['reason']


def test_training_that_was_told_to_stop_exits_with_its_code(monkeypatch, tmp_path):
  monkeypatch.setattr(gpu_slices.cli, 'main', lambda flags: 75)
  with pytest.raises(SystemExit, match='75'):
    gpu_slices.accuracy('cifar10_small', tmp_path, toy=True)


SHAPE = (2, 5, 2, 16)  # `plain` is exact enough, because the square root of 16 is a power of two


@pytest.mark.slow_after_first
@pytest.mark.parametrize('inputs', trial.INPUTS)
def test_the_error_of_attention_is_relative_to_float64(inputs):
  """The reference is computed here with NumPy; the kernel is wrong by a known amount."""
  query, key, value, _ = (
    np.asarray(x, np.float64) for x in trial.draw(SHAPE, jnp.bfloat16, *trial.INPUTS[inputs])
  )
  logits = np.einsum('bqke,bnke->bkqn', query, key) / np.sqrt(SHAPE[-1])
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  y = np.einsum('bkqn,bnke->bqke', weights, value)
  found = gpu_slices.compare(lambda *x: 1.5 * plain(*x), SHAPE, inputs)
  got = found['fused']['errors']['output']
  assert got == pytest.approx(0.5 * abs(y).max() / max(abs(y).max(), 1), rel=0.05)
  assert found['error'] >= got > trial.TOLERANCE
  assert max(found['plain']['errors'].values()) < trial.TOLERANCE


def test_a_kernel_that_returns_nan_is_wrong():
  found = gpu_slices.compare(lambda *x: plain(*x) * jnp.nan, SHAPE, 'usual logits')
  assert not found['error'] <= trial.TOLERANCE
  assert gpu_tables.max_error(found['fused']['errors']) == 'nan'


@pytest.fixture
def packed(tmp_path, monkeypatch):
  """Folders of the pack below `tmp_path`, a pip that does nothing, and images to pack."""
  names = {'PACK': 'gpu', 'DATA': 'gpu/cifar10.tar.xz', 'WHEELS': 'gpu/wheels'}
  names |= {'WORK': 'work', 'IMAGES': 'work/cifar10', 'SITE': 'work/site'}
  for name, path in names.items():
    monkeypatch.setattr(gpu_pack, name, tmp_path / path)
  monkeypatch.setattr(gpu_pack, 'run_pip', lambda *words: None)
  monkeypatch.setattr(gpu_pack, 'missing', lambda: [])
  for split, content in (('train', b'one'), ('test', b'two')):
    (tmp_path / 'images' / split / 'cat').mkdir(parents=True)
    (tmp_path / 'images' / split / 'cat' / '1.jpg').write_bytes(content)
  return tmp_path


def test_images_are_the_same_after_packing_and_unpacking(packed):
  gpu_pack.pack(packed / 'images', '3.12')
  once = gpu_pack.DATA.read_bytes()
  os.utime(packed / 'images/train/cat/1.jpg', (1, 1))
  gpu_pack.pack(packed / 'images', '3.12')
  assert gpu_pack.DATA.read_bytes() == once  # independent of the files' times
  (packed / 'work/cifar10.partial').mkdir(parents=True)  # left by a call that was killed
  (packed / 'work/cifar10.partial/half').touch()
  for _ in range(2):
    gpu_pack.unpack()
    found = {str(p.relative_to(gpu_pack.IMAGES)) for p in gpu_pack.IMAGES.rglob('*.*')}
    assert found == {'train/cat/1.jpg', 'test/cat/1.jpg'}
  assert (gpu_pack.IMAGES / 'test/cat/1.jpg').read_bytes() == b'two'


def test_a_pack_that_is_too_large_is_refused(packed, monkeypatch):
  monkeypatch.setattr(gpu_pack, 'LIMIT', 100)
  with pytest.raises(ValueError, match=r'the limit is 0 MiB. The largest file is cifar10\.tar\.xz'):
    gpu_pack.pack(packed / 'images', '3.12')


def test_a_folder_without_splits_is_refused_before_the_old_pack_is_deleted(packed, capsys):
  gpu_pack.pack(packed / 'images', '3.12')
  with pytest.raises(SystemExit, match='2'):
    gpu_pack.main([str(packed)])
  assert 'expected images in train/<class>/' in capsys.readouterr().err
  assert gpu_pack.DATA.exists()


def test_the_message_of_pip_is_shown(monkeypatch):
  script = "import sys; sys.exit('ERROR: No matching distribution found for clu')"
  run = subprocess.run
  monkeypatch.setattr(
    gpu_pack.subprocess, 'run', lambda _, **how: run([sys.executable, '-c', script], **how)
  )
  with pytest.raises(ValueError, match='pip install failed: No matching .* clu. Install'):
    gpu_pack.run_pip('install')


def test_tables_show_results_and_the_progress_of_training(tmp_path):
  (tmp_path / 'small/seed0').mkdir(parents=True)
  lines = [
    {'step': 100, 'split': 'train', 'loss': 1.0, 'images_per_second': 98765.4, 'mfu': 0.213},
    {'step': 100, 'split': 'test', 'accuracy': 0.5},
    {'step': 150, 'split': 'train', 'loss': 0.9, 'images_per_second': 98765.4, 'mfu': 0.213},
  ]
  text = '\n'.join(map(json.dumps, lines))
  (tmp_path / 'small/seed0/metrics.jsonl').write_text(text)
  gpu.record(tmp_path / 'small.json', 'small', 'resumes', 540, reason='stopped')
  exact = {'dtype': 'bfloat16', 'attention': 'cudnn', 'same': True}
  exact |= {'kills': [{}, {}, {}], 'resumed_exactly': 2}
  gpu.record(tmp_path / 'exact_bfloat16.json', 'exact_bfloat16', 'finished', 9, result=exact)
  found = gpu_tables.tables(gpu.SLICES, tmp_path, tmp_path)
  assert '| small | resumes | 540 | stopped |' in found
  assert '| small | resumes | 150 | 50.00% | 98,765 | 21.3% |  |' in found
  assert '| bfloat16 | cudnn | True | 2 of 3 |' in found
  assert found.count('| open |') == len(gpu.SLICES) - 2


def test_toy_results_do_not_replace_measured_ones(capsys):
  with pytest.raises(SystemExit, match='2'):
    gpu.parse(['--toy'])
  assert '--toy needs --results' in capsys.readouterr().err


def test_a_machine_without_a_gpu_is_refused_before_any_slice(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(gpu.speed, 'in_a_process', lambda function: {'backend': 'cpu'})
  with pytest.raises(SystemExit, match='2'):
    gpu.main([f'--results={tmp_path / "results"}'])
  assert 'JAX finds no GPU here; install' in capsys.readouterr().err
  assert not (tmp_path / 'results').exists()
