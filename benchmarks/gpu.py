"""Makes all measurements that need a GPU, the most valuable first, each in at most 9 minutes.

    make gpu MINUTES=30                    # installs missing packages, then runs this module
    python -m benchmarks.gpu --minutes=30
    python -m benchmarks.gpu --toy --results=/tmp/gpu     # every slice in seconds, on a CPU

Each measurement, called a slice, runs in its own process and writes `results/gpu/<slice>.json`. The
file says whether the slice is finished and, if not, the reason. Repeating the command skips
finished slices. An interrupted training run resumes from its workdir below `runs/gpu/`; other
slices start again. A failed slice is tried again only if the command is repeated. At the end, the
command prints the tables of all results.
"""

import argparse
from collections.abc import Callable, Mapping
import contextlib
import functools
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from typing import NamedTuple

from benchmarks import (
  arguments,
  collect,
  contestants,
  gpu_pack,
  gpu_slices,
  gpu_tables,
  speed,
)
from vit_jax import cli
from vit_jax.storage import TRY_AGAIN
from vit_jax.workdir import writer

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIMIT = 9 * 60  # seconds that a slice may run, including `GRACE`
GRACE = 30  # seconds to save a checkpoint after SIGTERM, before SIGKILL


class Slice(NamedTuple):
  """A measurement that one process makes.

  Attributes:
    minutes: the slice starts only if this many minutes are left. A slice that trains can start with
      less time than it needs, because it resumes later. The values are estimates, because no slice
      has run on a GPU.
    run: `(folder, toy) -> result`, see `benchmarks.gpu_slices`.
  """

  minutes: float
  run: Callable[[pathlib.Path, bool], dict]


SLICES = {  # in the order in which they run
  'attention': Slice(2, gpu_slices.attention),
  'b16_train': Slice(4, functools.partial(gpu_slices.speed_of, 'B/16 train')),
  'l16_train': Slice(5, functools.partial(gpu_slices.speed_of, 'L/16 train')),
  'b16_inference': Slice(3, functools.partial(gpu_slices.speed_of, 'B/16 inference')),
  'l16_inference': Slice(3, functools.partial(gpu_slices.speed_of, 'L/16 inference')),
  'exact_bfloat16': Slice(5, functools.partial(gpu_slices.exact, 'bfloat16')),
  'small': Slice(2, functools.partial(gpu_slices.accuracy, 'cifar10_small')),
  'images': Slice(4, gpu_slices.images),
  'wide': Slice(2, functools.partial(gpu_slices.accuracy, 'cifar10_wide')),
  'deep': Slice(2, functools.partial(gpu_slices.accuracy, 'cifar10_deep')),
  'exact_float32': Slice(5, functools.partial(gpu_slices.exact, 'float32')),
}


def run_all(
  slices: Mapping[str, Slice], args: argparse.Namespace, clock: Callable[[], float] = time.monotonic
) -> None:
  """Runs the slices that are not finished, as long as the time suffices.

  A training slice that was stopped at its limit resumes at once if enough time is left. A slice for
  which too little time is left is skipped, so that a shorter slice can run.
  """
  end = clock() + 60 * args.minutes
  for name, one in slices.items():
    state = state_of(name, args.results)
    while state != 'finished' and end - clock() >= 60 * one.minutes:
      print(f'{name} ...', end=' ', flush=True)
      state = run_one(name, args, min(LIMIT, end - clock()))
      print(state, flush=True)
      if state != 'resumes':
        break


def state_of(name: str, results: pathlib.Path) -> str:
  """Returns the state of a slice.

  The state is `finished`, `resumes`, `stopped`, `failed` or `skipped`, or `open` if there is no
  record.
  """
  return (writer.read_json(results / f'{name}.json') or {}).get('state', 'open')


def run_one(name: str, args: argparse.Namespace, seconds: float) -> str:
  """Runs a slice in a separate process for at most `seconds`, and returns the slice's state."""
  args.work.mkdir(parents=True, exist_ok=True)
  path, log = args.results / f'{name}.json', args.work / f'{name}.log'
  path.unlink(missing_ok=True)  # an earlier call has written it
  began = time.monotonic()
  with log.open('ab') as out:
    process = subprocess.Popen(
      command(name, args), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
      process_group=0,
    )  # fmt: skip
    code = attend(process, seconds - GRACE)
  took = time.monotonic() - began
  if state_of(name, args.results) == 'open':  # otherwise the process has written its record
    state, reason = 'failed', f'exit code {code}: {last_line(log)}'
    if code == TRY_AGAIN:
      state, reason = 'resumes', f'stopped after {took:.0f} s; the next call resumes'
    elif took >= seconds - GRACE:
      state, reason = 'stopped', f'stopped after {took:.0f} s; the next call starts it again'
    record(path, name, state, took, reason=f'{reason} ({log})')
  return state_of(name, args.results)


def command(name: str, args: argparse.Namespace) -> list[str]:
  """Returns the command line that runs one slice."""
  words = [f'--slice={name}', f'--results={args.results}', *['--toy'] * args.toy]
  return [sys.executable, '-m', 'benchmarks.gpu', *words]


def attend(process: subprocess.Popen, seconds: float) -> int:
  """Waits at most `seconds` for a process, then ends it and all its children.

  A process that still runs gets SIGTERM. It is killed `GRACE` seconds later, so that it can save a
  checkpoint first.

  Returns:
    The exit code.
  """
  try:
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(seconds)
  finally:  # also if this process is interrupted
    if process.poll() is None:
      process.terminate()
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)
  return process.wait()


def last_line(log: pathlib.Path) -> str:
  """Returns the last non-empty line of a log."""
  lines = log.read_text(encoding='utf-8', errors='replace').split('\n')
  return next((line.strip() for line in reversed(lines) if line.strip()), 'it printed nothing')


def record(path: pathlib.Path, name: str, state: str, seconds: float, **more: object) -> None:
  """Writes the record of a slice."""
  writer.write_json(path, {'slice': name, 'state': state, 'seconds': round(seconds, 1)} | more)


def measure(name: str, args: argparse.Namespace) -> None:
  """Measures a slice in this process, and writes its record."""
  threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
  folder, path = args.work / name, args.results / f'{name}.json'
  folder.mkdir(parents=True, exist_ok=True)
  began = time.monotonic()
  try:
    result = SLICES[name].run(folder, args.toy)
  except gpu_slices.Skipped as reason:
    record(path, name, 'skipped', time.monotonic() - began, reason=str(reason))
    return
  more = {'toy': args.toy, 'result': result} | collect.circumstances()
  record(path, name, 'finished', time.monotonic() - began, **more)


def end_with_parent(parent: int) -> None:
  """Kills this process and its children as soon as its parent has ended or was killed."""
  while os.getppid() == parent:
    time.sleep(0.5)
  os.killpg(0, signal.SIGKILL)


def parse(argv: list[str]) -> argparse.Namespace:
  parser = arguments.Parser(__spec__, __doc__)
  parser.add_argument('--minutes', type=arguments.count, default=30, help='time for all slices')
  parser.add_argument('--toy', action='store_true', help='run every slice in seconds, on a CPU')
  path = collect.RESULTS / 'gpu'
  parser.add_argument('--results', type=pathlib.Path, default=path, help='folder of the records')
  parser.add_argument('--slice', choices=SLICES, help='run only this slice, without a time limit')
  args = parser.parse_args(argv)
  args.results = args.results.absolute()
  if args.toy and args.results == path:
    parser.error('--toy needs --results, because toy results must not replace measured ones')
  args.work = args.results / 'work' if args.toy else gpu_pack.WORK
  return args


def main(argv: list[str]) -> int:
  args = parse(argv)
  if args.toy:
    os.environ['JAX_PLATFORMS'] = 'cpu'
    os.environ['XLA_FLAGS'] = '--xla_backend_optimization_level=0'  # compiles in half the time
  if args.slice:
    measure(args.slice, args)
    return 0
  backend = 'toy' if args.toy else speed.in_a_process(contestants.machine)['backend']
  if backend == 'cpu':
    arguments.Parser(__spec__, __doc__).error(
      'JAX finds no GPU here; install jax[cuda13] for this Python, or use --toy'
    )
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  cli.keep_compiled()  # so that a training slice resumes without compiling again
  run_all(SLICES, args)
  print(gpu_tables.tables(SLICES, args.results, args.work))
  return int(any(state_of(name, args.results) == 'failed' for name in SLICES))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
