"""Compares the speed of this project with the speed of other ViT implementations.

    python -m benchmarks.speed             # all workloads; writes results/speed_<backend>.json
    python -m benchmarks.speed --only=tiny # workloads with `tiny` in the name; writes no file
    python -m benchmarks.speed --bfloat16  # on a CPU with bfloat16 instructions such as AMX
    python -m benchmarks.speed --dry-run   # the GPU workloads at toy sizes, on any machine
    python -m benchmarks.speed --memory=16 # the largest batches that fit in 16 GiB

Each implementation, called a contestant, runs in its own process. In each round, every contestant
runs for at least half a second, while the others wait. Compilation and warm-up happen before the
rounds. Rates are medians over the rounds. The ratio of two rates is computed in each round; the
reported ratio is the median. Implementations that are not installed are skipped.
"""

import argparse
import concurrent.futures
import datetime
import json
import math
import multiprocessing
import os
import pathlib
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks import arguments, contestants, memory, works

ROOT = pathlib.Path(__file__).resolve().parents[1]
ROUNDS = 7
TURN = 0.5  # seconds
SPAWN = multiprocessing.get_context('spawn')
ENVIRONMENT = {  # for the contestants: one GPU, memory on demand, no compilation caches
  'CUDA_VISIBLE_DEVICES': os.environ.get('CUDA_VISIBLE_DEVICES', '0').split(',')[0],
  'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
  'JAX_ENABLE_COMPILATION_CACHE': 'false',
  'TORCHINDUCTOR_FORCE_DISABLE_CACHES': '1',
}


class Contestant:
  """A process that builds a program and runs it on request."""

  def __init__(self, name: str, work: works.Work, size: dict):
    self.name = name
    self.connection, there = SPAWN.Pipe()
    self.process = SPAWN.Process(target=serve, args=(there, name, work, size), daemon=True)
    self.process.start()
    there.close()
    self.about = self.answer()  # versions and first step's seconds, or why it is skipped

  def answer(self):
    """Returns the next message from the process."""
    try:
      return self.connection.recv()
    except EOFError:
      self.process.join()
      return {'skipped': f'its process ended with exit code {self.process.exitcode}'}

  def seconds(self, steps: int) -> float:
    """Runs a number of steps and returns how long they took.

    Raises:
      RuntimeError: the process died.
    """
    self.connection.send(steps)
    answer = self.answer()
    if isinstance(answer, dict):
      raise RuntimeError(f'{self.name} failed while running: {answer["skipped"]}.')
    return answer

  def stop(self) -> int:
    """Ends the process; returns its peak memory in bytes."""
    peak = self.seconds(0)
    self.process.join()
    return peak


def serve(connection, name: str, work: works.Work, size: dict) -> None:
  """Serves the requests of a `Contestant` in its process."""
  try:
    program = contestants.CONTESTANTS[name](work, size)
    first = contestants.seconds(lambda: program.run(1))
  except ImportError as error:
    connection.send({'skipped': f'not installed: {error.name}'})
    return
  except Exception as error:
    if name.startswith('vit_jax'):
      raise
    connection.send({'skipped': f'{type(error).__name__}: {error}'})
    return
  connection.send({'first_step_seconds': first, 'versions': program.versions})
  while steps := connection.recv():
    connection.send(contestants.seconds(lambda steps=steps: program.run(steps)))
  connection.send(program.peak_memory())


def measure(work: works.Work, rounds: int = ROUNDS, turn: float = TURN) -> dict:
  """Measures a workload: the rates of the contestants, and our rate divided by each rate."""
  names = ['vit_jax', *['vit_jax_input'] * (work.mode == 'train'), *work.peers]
  began = time.perf_counter()
  size = in_a_process(works.sizes, work)
  everyone = [Contestant(name, work, size) for name in names]
  skipped = {c.name: c.about['skipped'] for c in everyone if 'skipped' in c.about}
  for name, reason in skipped.items():
    print(f'  {work.name}: skipped {name} ({reason})', file=sys.stderr)
  running = [c for c in everyone if c.name not in skipped]
  if 'vit_jax' in skipped:
    raise RuntimeError(f'{work.name}: vit_jax itself failed; see its traceback above.')
  steps = {}
  for c in running:
    c.seconds(1)
    steps[c.name] = math.ceil(turn / c.seconds(1))
  rates = {c.name: [] for c in running}
  for i in range(rounds):
    for c in random.Random(i).sample(running, len(running)):  # a new order in each round
      n = steps[c.name]
      rates[c.name].append(n * work.batch_size / c.seconds(n))
  result = {
    'work': work.name,
    'batch_size': work.batch_size,
    'dtype': work.dtype,
    'flops_per_image': works.flops(**size)[work.mode],
    'contestants': {},
    'ratio_to': {},
    'ratio_range': {},
    'skipped': skipped,
  }
  for c in running:
    rate = statistics.median(rates[c.name])
    result['contestants'][c.name] = {
      'images_per_second': rate,
      'rounds': rates[c.name],
      'compile_seconds': c.about['first_step_seconds'] - work.batch_size / rate,
      'peak_memory_bytes': c.stop(),
      'versions': c.about['versions'],
    }
    ratios = [ours / theirs for ours, theirs in zip(rates['vit_jax'], rates[c.name])]
    result['ratio_to'][c.name] = statistics.median(ratios)
    result['ratio_range'][c.name] = [min(ratios), max(ratios)]
  result['seconds'] = time.perf_counter() - began
  return result


def start_up() -> dict[str, list[float]]:
  """Returns the seconds until the first step of `digits` is done, with a cold and a warm cache.

  The compilation cache is cold (empty) in the first run, and warm in three more runs.
  """
  with tempfile.TemporaryDirectory() as folder:
    times = [first_step(pathlib.Path(folder), f'run{i}') for i in range(4)]
  return {'cold': times[:1], 'warm': times[1:]}


def first_step(folder: pathlib.Path, name: str) -> float:
  """Returns the seconds until the first step, with the compilation cache in `folder`."""
  command = [sys.executable, 'main.py', '--config=configs/digits.py', f'--workdir={folder / name}']
  environment = os.environ | {'XDG_CACHE_HOME': str(folder)}
  for variable in ('JAX_COMPILATION_CACHE_DIR', 'JAX_ENABLE_COMPILATION_CACHE'):
    environment.pop(variable, None)
  began = time.perf_counter()
  with subprocess.Popen(
    command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
  ) as process:
    for line in process.stderr:
      if 'First step done' in line:
        seconds = time.perf_counter() - began
        process.kill()
        return seconds
  raise RuntimeError(
    f'{" ".join(command)} ended with exit code {process.returncode} before its first step.'
  )


def in_a_process(function, *arguments):
  """Runs a function in a new process, so that this process stays free of the function's threads.

  Returns:
    The function's result, or None if it raises ImportError.
  """
  with concurrent.futures.ProcessPoolExecutor(1, SPAWN) as pool:
    try:
      return pool.submit(function, *arguments).result()
    except ImportError:
      return None


def peak(device: str, measured: float) -> tuple[float, str]:
  """Returns the peak rate and its source: a GPU's data sheet, or else the measured rate."""
  from vit_jax.distributed import peaks  # keeps JAX out of PyTorch's processes

  if name := peaks.listed_kind(device):
    return 1e12 * peaks.PEAK_TFLOPS[name], f'the {name} data sheet, dense bfloat16'
  return measured, 'measured rate of large square matrix products on this machine'


NAMES = {
  'torch_eager': 'PyTorch',
  'torch_compiled': 'PyTorch compiled',
  'huggingface_eager': 'Hugging Face',
  'huggingface_compiled': 'Hugging Face compiled',
  'timm_compiled': 'timm compiled',
  'plain_linen': 'plain linen',
}


def table(results: dict) -> str:
  """Returns a Markdown table with a row for each workload.

  `peak` is the share of the peak FLOP/s. `input` is the time to gather and augment a batch, as a
  share of the time of a step.
  """
  lines = [
    '| workload | batch | images/s | speed-up over | peak | input | memory | compile time |',
    '| --- | --- | --- | --- | --- | --- | --- | --- |',
  ]
  for row in results['works']:
    ours, ratio = row['contestants']['vit_jax'], row['ratio_to']
    flops = ours['images_per_second'] * row['flops_per_image']
    peers = [f'{name} {ratio[key]:.2f}' for key, name in NAMES.items() if key in ratio]
    share = f'{ratio["vit_jax_input"]:.1%}' if 'vit_jax_input' in ratio else ''
    lines.append(
      f'| {row["work"]} | {row["batch_size"]} | {ours["images_per_second"]:,.1f} '
      f'| {", ".join(peers)} | {flops / results["peak_flops_per_second"]:.0%} '
      f'| {share} | {ours["peak_memory_bytes"] / 2**30:.1f} GiB '
      f'| {ours["compile_seconds"]:.1f} s |'
    )
  return '\n'.join(lines)


def parse(argv: list[str]) -> argparse.Namespace:
  parser = arguments.Parser(__spec__, __doc__)
  parser.add_argument('--only', default='', help='run workloads whose name contains this text')
  parser.add_argument('--dry-run', action='store_true', help='run GPU workloads at toy sizes')
  parser.add_argument('--bfloat16', action='store_true', help='bfloat16 workloads for a CPU')
  parser.add_argument('--memory', type=float, metavar='GIB', help='print largest batches that fit')
  return parser.parse_args(argv)


def main(argv: list[str]) -> None:
  args, refuse = parse(argv), arguments.Parser(__spec__, __doc__).error
  os.environ.update(ENVIRONMENT)
  if args.memory is not None:
    return memory.show(args.memory)
  results = in_a_process(contestants.machine)
  backend = 'gpu' if args.dry_run else results['backend']
  if args.bfloat16:
    if backend != 'cpu' or not contestants.cpu_has_bfloat16():
      refuse('--bfloat16 needs a CPU with AMX or AVX512-BF16, and no GPU')
    backend = 'cpu_bfloat16'
  if backend not in works.WORKS:
    refuse(f'no workloads for {backend}; expected {" or ".join(works.WORKS)}')
  selected = [work for work in works.WORKS[backend] if args.only in work.name]
  if not selected:
    names = ', '.join(work.name for work in works.WORKS[backend])
    refuse(f'--only={args.only} matches no workload; expected a part of one of {names}')
  rates = {name: in_a_process(contestants.matmul_rate, name) for name in ('jax', 'torch')}
  results['peak_flops_per_second'], results['peak_is'] = peak(results['machine'], rates['jax'])
  results |= {
    'date': datetime.date.today().isoformat(),
    'python': platform.python_version(),
    'matmul_flops_per_second': rates,
    'start_up_seconds': None if args.only or args.dry_run else start_up(),
    'works': [],
  }
  for work in selected:
    results['works'].append(measure(works.dry(work) if args.dry_run else work))
    print(table(results | {'works': results['works'][-1:]}).splitlines()[-1], flush=True)
    if not (args.only or args.dry_run):  # saved now, in case a later workload fails
      path = ROOT / 'results' / f'speed_{backend}.json'
      path.write_text(json.dumps(results, indent=1) + '\n', encoding='utf-8')
  print(table(results))


if __name__ == '__main__':
  main(sys.argv[1:])
