"""Checks the launch scripts: with stand-ins for gcloud and Slurm, and with processes that die."""

import os
import pathlib
import signal
import socket
import stat
import subprocess
import sys
import time

import pytest
import yaml

from tests.conftest import ROOT

LAUNCH = ROOT / 'launch'
UNTIL_DONE = str(LAUNCH / 'until_done.sh')


def put(folder, name, script):
  """Writes an executable bash script, and returns its path."""
  folder.mkdir(exist_ok=True)
  path = folder / name
  path.write_text(f'#!/bin/bash\n{script}\n')
  path.chmod(path.stat().st_mode | stat.S_IXUSR)
  return path


def run(*command, **variables):
  """Runs a command with `variables` in its environment, without pauses between two tries."""
  env = os.environ | {'PAUSE': '0'} | {key: str(value) for key, value in variables.items()}
  return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)


def codes(tmp_path, *wanted):
  """Returns a command that ends with the wanted exit codes, one after another, and its log."""
  log = tmp_path / 'calls'
  script = f'echo "$@" >> {log}\ncodes=({" ".join(map(str, wanted))})\n'
  return put(tmp_path, 'step', script + f'exit ${{codes[$(wc -l < {log}) - 1]}}'), log


@pytest.mark.parametrize('wanted, tries, code', [
    ([75, 1, 75, 0], 1, 0), ([1, 137, 0], 1, 137), ([75, 2], 5, 2), ([0], 0, 0), ([3], 0, 3),
])  # fmt: skip
def test_a_command_is_repeated_until_it_is_done_or_wrong(wanted, tries, code, tmp_path):
  command, log = codes(tmp_path, *wanted)
  assert run(UNTIL_DONE, command, 'a b', TRIES=tries).returncode == code
  made = len(log.read_text().splitlines())
  assert made == (2 if code == 137 else len(wanted))


def test_a_signal_to_the_script_stops_the_command_and_is_not_repeated(tmp_path):
  command = put(tmp_path, 'step', f"trap 'exit 75' TERM; touch {tmp_path}/on; sleep 60 & wait")
  process = subprocess.Popen([UNTIL_DONE, command])
  while not (tmp_path / 'on').exists():
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  assert process.wait(20) == 75


def test_the_script_without_a_command_says_how_it_is_used():
  found = run(UNTIL_DONE)
  assert found.returncode == 2 and 'usage: launch/until_done.sh <command>' in found.stderr


@pytest.mark.parametrize(
  'code, restarts, again',
  [(0, 0, False), (2, 0, False), (75, 99, True), (134, 19, True), (134, 20, False)],
)
def test_slurm_starts_a_preempted_job_again(code, restarts, again, tmp_path):
  log = tmp_path / 'log'
  put(tmp_path / 'bin', 'srun', f'echo srun "$@" >> {log}; exit {code}')
  put(tmp_path / 'bin', 'scontrol', f'echo scontrol "$@" >> {log}')
  path = f'{tmp_path / "bin"}:{os.environ["PATH"]}'
  settings = dict(PATH=path, SLURM_JOB_ID=7, SLURM_RESTART_COUNT=restarts)
  found = run(LAUNCH / 'slurm.sh', '--workdir=/shared/my run', **settings)
  assert found.returncode == code
  first, *rest = log.read_text().splitlines()
  assert first == 'srun --kill-on-bad-exit=1 .venv/bin/python main.py --workdir=/shared/my run'
  assert rest == (['scontrol requeue 7'] if again else [])


# Plays a slice: it waits once, is lost in its first training, and does its second to the end.
GCLOUD = """
echo "$@" >> {log}
case "$*" in
  *describe*) cat {folder}/state 2> /dev/null || exit 1
    [ "$(cat {folder}/state)" = WAITING_FOR_RESOURCES ] && echo ACTIVE > {folder}/state; exit 0 ;;
  *'queued-resources create'*) echo WAITING_FOR_RESOURCES > {folder}/state ;;
  *'queued-resources delete'*) rm {folder}/state ;;
  *main.py*) echo run >> {folder}/runs
    if [ $(wc -l < {folder}/runs) = 1 ]; then echo SUSPENDED > {folder}/state; exit 255; fi ;;
  *'cat vit_jax/exit_code'*) [ "$(cat {folder}/state)" = ACTIVE ] && echo {code} || exit 255 ;;
esac
"""


@pytest.mark.parametrize('code', [0, 2])
def test_a_lost_slice_is_replaced_until_the_run_is_done(code, tmp_path):
  log = tmp_path / 'log'
  put(tmp_path / 'bin', 'gcloud', GCLOUD.format(log=log, folder=tmp_path, code=code))
  wanted = dict(NAME='b16', ZONE='zone-b', TYPE='v5litepod-16', RUNTIME='v2-alpha-tpuv5-lite')
  path = f'{tmp_path / "bin"}:{os.environ["PATH"]}'
  flags = ['--config=configs/imagenet.py:b16', '--workdir=gs://bucket/my run']
  found = run(LAUNCH / 'tpu.sh', *flags, PATH=path, TMPDIR=tmp_path, **wanted)
  assert found.returncode == code, found.stderr
  calls = log.read_text()
  assert calls.count('queued-resources create b16 --node-id=b16') == 2
  assert calls.count('queued-resources delete b16 --force') == 2
  assert calls.count('main.py --config=configs/imagenet.py:b16 --workdir=gs://bucket/my\\ run') == 2
  assert 'b16 is SUSPENDED' in found.stderr and not (tmp_path / 'state').exists()


def test_a_slice_needs_a_bucket_and_its_settings():
  found = run(LAUNCH / 'tpu.sh', '--workdir=runs/b16', NAME='a', ZONE='b', TYPE='c', RUNTIME='d')
  assert found.returncode == 2 and 'expected --workdir=gs://<bucket>/<folder>' in found.stderr
  found = run(LAUNCH / 'tpu.sh', '--workdir=gs://a/b', NAME='a', ZONE='b', TYPE='c')
  assert found.returncode and 'RUNTIME: the TPU software version' in found.stderr


def test_the_jobset_restarts_all_pods_together_except_after_a_mistake():
  jobset, *others = yaml.safe_load_all((LAUNCH / 'jobset.yaml').read_text(encoding='utf-8'))
  assert (jobset['apiVersion'], jobset['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
  assert jobset['spec']['failurePolicy']['rules'] == [
    {'action': 'FailJobSet', 'onJobFailureReasons': ['PodFailurePolicy']}
  ]
  [train] = jobset['spec']['replicatedJobs']
  job = train['template']['spec']
  pod, [rule] = job['template']['spec'], job['podFailurePolicy']['rules']
  assert job['completionMode'] == 'Indexed' and job['completions'] == job['parallelism']
  assert job['backoffLimit'] == 0 and pod['restartPolicy'] == 'Never'
  assert rule['action'] == 'FailJob' and rule['onExitCodes']['values'] == [2]
  assert rule['onExitCodes']['containerName'] == pod['containers'][0]['name']
  names = {other['metadata']['name'] for other in others}
  assert names == {pod['serviceAccountName']} and len(others) == 3


def test_the_scripts_pass_shellcheck():
  program = pathlib.Path(sys.executable).with_name('shellcheck')
  scripts = [*LAUNCH.glob('*.sh'), ROOT / '.ci/run']
  found = run(program, *scripts)
  assert not found.returncode, found.stdout


@pytest.mark.slow
def test_two_supervised_processes_finish_although_one_is_preempted(tmp_path):
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  command = [
    UNTIL_DONE, sys.executable, 'main.py', '--config=tests/small.py',
    f'--workdir={tmp_path / "run"}',
    f'--coordinator=127.0.0.1:{port}', '--num_processes=2', '--config.epochs=6',
    '--config.log_every=1', '--config.checkpoint_every=10', '--config.eval_every=0',
  ]  # fmt: skip
  env = os.environ | {'PAUSE': '1', 'JAX_NUM_CPU_DEVICES': '2'}
  logs = [tmp_path / f'{i}.log' for i in range(2)]
  pair = [
    subprocess.Popen([*command, f'--process_id={i}'], cwd=ROOT, env=env, stderr=log.open('w'))
    for i, log in enumerate(logs)
  ]
  metrics = tmp_path / 'run' / 'metrics.jsonl'
  while not metrics.exists() or len(metrics.read_bytes().splitlines()) < 20:
    assert pair[0].poll() is None, logs[0].read_text()
    time.sleep(0.05)
  children = run('pgrep', '-P', str(pair[1].pid)).stdout.split()
  os.kill(int(children[0]), signal.SIGTERM)
  assert [process.wait(280) for process in pair] == [0, 0]
  assert all('exit code 75' in log.read_text() for log in logs)
  assert (tmp_path / 'run' / 'result.json').exists()
