"""Checks that training with several processes gives equal results, and measures its speed.

    python -m benchmarks.scaling      # 10 minutes; results/scaling.json

The file has two parts; docs/benchmarks.md explains them:
  * `alike`: `main.py` trains six times over loopback, with the mesh axis `data` or `fsdp` and in
    three layouts: 1 process with 4 devices, 2 processes with 2 devices each, and 4 processes with 1
    device each. The 50 losses of each run are compared with the losses of the first run. The number
    of tested images is recorded.
  * `measured`: the speed of 1, 2 and 4 processes. Each process has one device and contributes the
    same number of images to a step.

`python -m benchmarks.on_paper` calculates what TPU pods need.
"""

import argparse
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile

from benchmarks import arguments, collect
from vit_jax.workdir import writer

FLAGS = [
  '--config=configs/cifar10.py:tiny', '--config.data.source=synthetic',
  '--config.augment.rand_augment.num_layers=0', '--config.eval_every=0',
]  # fmt: skip
ALIKE = [*FLAGS, '--config.batch_size=64', '--config.epochs=3.125', '--config.log_every=1']
LAYOUTS = ((1, 4), (2, 2), (4, 1))  # (processes, devices per process)
MESHES = ('data', 'fsdp')  # mesh axes that are tested; all devices lie along one axis
EACH = 64  # images per step and process
MEASURED = [*FLAGS, '--config.epochs=16', '--config.log_every=8']
PROCESSES = (1, 2, 4)


def launch(processes: int, devices: int, workdir: pathlib.Path, flags: list[str]) -> None:
  """Runs `main.py` to its end in one or several processes.

  Raises:
    SystemExit: a process failed.
  """
  together = []
  if processes > 1:
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      port = free.getsockname()[1]
    together = [f'--coordinator=127.0.0.1:{port}', f'--num_processes={processes}']
  started = []
  for i in range(processes):
    command = [sys.executable, 'main.py', f'--workdir={workdir}', *flags, *together]
    command += [f'--process_id={i}'] if together else []
    environment = os.environ | {'JAX_NUM_CPU_DEVICES': str(devices), 'JAX_PLATFORMS': 'cpu'}
    with workdir.with_suffix(f'.{i}.log').open('w', encoding='utf-8') as log:
      started.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
  if any([process.wait() for process in started]):
    log = workdir.with_suffix('.0.log').read_text(encoding='utf-8')
    raise SystemExit(f'{" ".join(command)} failed:\n{log[-2000:]}')


def train_lines(workdir: pathlib.Path) -> list[dict]:
  return [line for line in writer.read_metrics(workdir) if line['split'] == 'train']


def alike(folder: pathlib.Path) -> list[dict]:
  """Trains with each mesh axis and layout; compares the losses with the losses of the first run."""
  rows, first = [], None
  for mesh in MESHES:
    for processes, devices in LAYOUTS:
      workdir = folder / f'{mesh}{processes}x{devices}'
      along = [f'--config.mesh.{axis}={-1 if axis == mesh else 1}' for axis in MESHES]
      launch(processes, devices, workdir, ALIKE + along)
      losses = [line['loss'] for line in train_lines(workdir)]
      first = first or losses
      result = writer.read_json(workdir / 'result.json')
      row = {
        'processes': processes,
        'devices_of_each': devices,
        'mesh': mesh,
        'steps': len(losses),
        'largest_relative_difference': max(abs(a / b - 1) for a, b in zip(losses, first)),
        'test_images': result['examples'],
        'test_accuracy': result['test_accuracy'],
      }
      print(row, flush=True)
      rows.append(row)
  return rows


def measure(processes: int, folder: pathlib.Path) -> dict:
  """Measures images per second and seconds per step with one device per process."""
  workdir = folder / f'measured{processes}'
  launch(processes, 1, workdir, [*MEASURED, f'--config.batch_size={EACH * processes}'])
  speeds = [line['images_per_second'] for line in train_lines(workdir)[1:]]
  speed = statistics.median(speeds)
  row = {
    'processes': processes,
    'images_per_second': round(speed, 1),
    'seconds_per_step': round(EACH * processes / speed, 4),
    'lines': len(speeds),
  }
  print(row, flush=True)
  return row


def parse(argv: list[str]) -> argparse.Namespace:
  """Parses `--help` and refuses other arguments."""
  return arguments.Parser(__spec__, __doc__).parse_args(argv)


def main(argv: list[str]) -> None:
  parse(argv)
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    same = alike(folder)
    measured = [measure(n, folder) for n in PROCESSES]
  found = collect.circumstances() | {'alike': same, 'measured': measured}
  writer.write_json(collect.RESULTS / 'scaling.json', found)


if __name__ == '__main__':
  main(sys.argv[1:])
