"""Checks the launch scripts: with stand-ins for gcloud and Slurm, and with processes that die."""

import os
import pathlib
import signal
import socket
import stat
import subprocess
import sys
import threading
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


def run(*command, cwd=ROOT, **variables):
  """Runs a command with `variables` in its environment, without pauses between two tries."""
  env = os.environ | {'PAUSE': '0'} | {key: str(value) for key, value in variables.items()}
  if 'PYTHON' not in variables:
    env.pop('PYTHON', None)  # `make PYTHON=... test` sets this variable, which the scripts read
  return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=300)


def codes(tmp_path, *wanted):
  """Returns a command, and its log. The n-th call of the command ends with the n-th wanted code."""
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
  'code, failed, again',
  [(0, 0, False), (2, 0, False), (75, 99, True), (134, 19, True), (134, 20, False)],
)
def test_slurm_starts_a_preempted_job_again(code, failed, again, tmp_path):
  (tmp_path / 'slurm-7.failures').write_text('exit code 134\n' * failed)
  log = tmp_path / 'log'
  put(tmp_path / 'bin', 'srun', f'echo srun $SRUN_CPUS_PER_TASK "$@" >> {log}; exit {code}')
  put(tmp_path / 'bin', 'scontrol', f'echo scontrol "$@" >> {log}')
  path = f'{tmp_path / "bin"}:{os.environ["PATH"]}'
  settings = dict(cwd=tmp_path, PATH=path, SLURM_JOB_ID=7, SLURM_CPUS_PER_TASK=12)
  found = run(LAUNCH / 'slurm.sh', '--workdir=/shared/my run', **settings)
  assert found.returncode == code
  first, *rest = log.read_text().splitlines()
  assert first == 'srun 12 --kill-on-bad-exit=0 .venv/bin/python main.py --workdir=/shared/my run'
  assert rest == (['scontrol requeue 7'] if again else [])


# Imitates gcloud and a slice with one worker. A new slice waits for resources at first. The first
# training is lost; the commands of later trainings are executed. If the connection was lost, the
# next `describe` fails.
GCLOUD = """
echo "$@" >> log
for last; do :; done
case "$*" in
  *describe*)
    if [ -e no_route ]; then rm no_route; echo 'ERROR: no route' >&2; exit 1; fi
    cat state 2> /dev/null || {{ echo 'ERROR: NOT_FOUND: b16' >&2; exit 1; }}
    [ "$(cat state)" = WAITING_FOR_RESOURCES ] && echo ACTIVE > state; exit 0 ;;
  *'queued-resources create'*) echo WAITING_FOR_RESOURCES > state ;;
  *'queued-resources delete'*) rm state ;;
  *'tar -xzf'*) {install} ;;
  *main.py*) echo run >> runs
    if [ $(wc -l < runs) = 1 ]; then {lose}; exit 255; fi
    cd worker && bash -c "${{last#--command=}}" ;;
  *'cat vit_jax/exit_code'*)
    [ "$(cat state)" = ACTIVE ] || exit 255
    cd worker && bash -c "${{last#--command=}}" ;;
esac
"""
SLICE, CONNECTION = 'echo SUSPENDED > state', 'touch no_route'
EXECUTE = 'cd worker && bash -c "${last#--command=}"'


def start_slice(folder, lose=':', install=':', **more):
  """Runs tpu.sh, whose slices are stand-ins in `folder`, and returns the result.

  Args:
    folder: folder of the stand-ins.
    lose: bash command of the first training.
    install: bash command of an installation.
    **more: environment variables.
  """
  put(folder / 'bin', 'gcloud', f'cd {folder}\n{GCLOUD.format(lose=lose, install=install)}')
  settings = dict(NAME='b16', ZONE='zone-b', TYPE='v5litepod-16', RUNTIME='v2-alpha-tpuv5-lite')
  settings |= dict(PATH=f'{folder / "bin"}:{os.environ["PATH"]}', TMPDIR=folder) | more
  flags = ['--config=configs/imagenet.py:b16', '--workdir=gs://bucket/my run']
  return run(LAUNCH / 'tpu.sh', *flags, **settings)


def run_slice(folder, lose, code):
  """Runs tpu.sh until its training is done; returns the result, and all gcloud calls.

  Args:
    folder: an empty folder.
    lose: bash command of the first training.
    code: exit code of the second training.
  """
  worker = folder / 'worker' / 'vit_jax'
  worker.mkdir(parents=True)
  put(worker / 'launch', 'until_done.sh', f'echo "$@" > {folder}/flags; exit {code}')
  old = subprocess.Popen(['sleep', '60'])  # a run left by a lost connection
  threading.Thread(target=old.wait, daemon=True).start()  # otherwise it would stay as a zombie
  (worker / 'pid').write_text(f'{old.pid}\n')
  found = start_slice(folder, lose)
  assert found.returncode == code, found.stderr
  assert old.wait() == -signal.SIGTERM
  started = '.venv/bin/python main.py --config=configs/imagenet.py:b16 --workdir=gs://bucket/my run'
  assert (folder / 'flags').read_text() == f'{started}\n'
  assert not (folder / 'state').exists()
  return found, (folder / 'log').read_text()


@pytest.mark.parametrize('code', [0, 2])
def test_a_lost_slice_is_replaced_until_the_run_is_done(code, tmp_path):
  found, calls = run_slice(tmp_path, SLICE, code)
  assert calls.count('queued-resources create b16 --node-id=b16') == 2
  assert calls.count('queued-resources delete b16 --force') == 2
  assert calls.count('main.py --config=configs/imagenet.py:b16 --workdir=gs://bucket/my\\ run') == 2
  assert 'b16 is SUSPENDED' in found.stderr


def test_a_slice_is_kept_while_gcloud_has_no_connection(tmp_path):
  found, calls = run_slice(tmp_path, CONNECTION, 0)
  assert calls.count('queued-resources create') == calls.count('queued-resources delete') == 1
  assert 'ERROR: no route' in found.stderr and 'b16 is unknown' in found.stderr


def test_a_slice_whose_installation_fails_is_deleted(tmp_path):
  found = start_slice(tmp_path, install='exit 1', TRIES=3)
  assert found.returncode == 1 and 'the installation failed (try 3 of 3)' in found.stderr
  calls = (tmp_path / 'log').read_text()
  assert calls.count('tar -xzf') == 3 and not (tmp_path / 'state').exists()


@pytest.mark.parametrize('old', [True, False])
def test_a_slice_with_an_old_python_gets_a_newer_one(tmp_path, old):
  pip = 'mkdir -p .venv/bin; touch .venv/bin/pip; chmod +x .venv/bin/pip'
  python = f"""echo "$*" >> {tmp_path}/python
    case "$*" in -c*) exit {int(old)} ;; *'venv .venv' | *'--python 3.12 .venv') {pip} ;; esac"""
  put(tmp_path / 'bin', 'python3', python)
  put(tmp_path / 'bin', 'tar', ':')
  (tmp_path / 'worker').mkdir()
  start_slice(tmp_path, install=f'({EXECUTE}) && exit 1', TRIES=2)
  made = (tmp_path / 'python').read_text().splitlines()[1:]  # the second try reuses .venv
  uv = ['-m pip install -q --user uv', '-m uv venv -q --clear --seed --python 3.12 .venv']
  assert made == (uv if old else ['-m venv .venv'])


def test_a_slice_is_not_requested_if_gcloud_fails_at_the_start(tmp_path):
  put(tmp_path / 'bin', 'gcloud', f'echo "$@" >> {tmp_path}/log; echo ERROR: no login >&2; exit 1')
  settings = dict(NAME='a', ZONE='b', TYPE='c', RUNTIME='d')
  settings |= dict(PATH=f'{tmp_path / "bin"}:{os.environ["PATH"]}', TMPDIR=tmp_path)
  found = run(LAUNCH / 'tpu.sh', '--workdir=gs://bucket/run', **settings)
  assert found.returncode == 1 and 'ERROR: no login' in found.stderr
  assert (tmp_path / 'log').read_text().count('\n') == 1


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
  [mount], [volume] = pod['containers'][0]['volumeMounts'], pod['volumes']
  assert mount == {'name': volume['name'], 'mountPath': '/dev/shm'}
  assert volume['emptyDir'] == {'medium': 'Memory'}
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


@pytest.mark.long
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
