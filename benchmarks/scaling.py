"""More processes, each with the same work: what is measured here, and what pods would take.

    python -m benchmarks.scaling      # 3 minutes; results/scaling.json

Measured: `main.py` as 1, 2 and 4 real processes over loopback, a CPU device each. Modelled: the
bytes that a chip sends in a step for data parallelism, FSDP and tensor parallelism at 8 to 512
chips, from the collectives that the TPU's compiler put into the step (`results/pods.json`), against
the time of its products, each chip with as many images as it has there.
"""

import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile

from benchmarks import collect
from vit_jax import writer

PROCESSES = (1, 2, 4)
EACH = 64  # images a step of each process
FLAGS = [
  '--config=configs/cifar10.py:tiny', '--config.data.source=synthetic',
  '--config.optimizer.name=adamw',
  '--config.epochs=16', '--config.log_every=8', '--config.eval_every=0',
  '--config.augment.rand_augment.num_layers=0',
]  # fmt: skip
CHIPS = (8, 16, 32, 64, 128, 256, 512)
# Of one chip, by the makers' pages: bfloat16 products a second, and bytes a second sent over all
# its links in one direction.
POD = {'v5e': (197e12, 200e9), 'v6e': (918e12, 400e9), 'v5p': (459e12, 600e9)}
USED = 0.5  # of the products' peak that a step reaches


def measure(processes: int, folder: pathlib.Path) -> dict:
  """Images and seconds a step of a run of so many processes."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  workdir = folder / str(processes)
  command = [sys.executable, 'main.py', f'--workdir={workdir}', *FLAGS]
  command += [f'--config.batch_size={EACH * processes}', f'--num_processes={processes}']
  command += [f'--coordinator=127.0.0.1:{port}'] if processes > 1 else []
  environment = os.environ | {'JAX_NUM_CPU_DEVICES': '1'}
  quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
  started = [subprocess.Popen([*command, f'--process_id={i}'], **quiet) for i in range(processes)]
  assert not any(process.wait() for process in started), 'a process failed'
  speeds = [
    line['images_per_second'] for line in writer.read_metrics(workdir) if line['split'] == 'train'
  ][1:]
  speed = statistics.median(speeds)
  return {
    'processes': processes,
    'images_per_second': round(speed, 1),
    'seconds_per_step': round(EACH * processes / speed, 4),
    'lines': len(speeds),
  }


def sent(collectives: dict, chips: int) -> float:
  """Bytes that a chip sends for these collectives, in rings of so many chips."""
  part = (chips - 1) / chips
  # What HLO names is the result: all of it for a gather or a sum, one chip's share for a scatter.
  factors = {
    'all-reduce': 2 * part,
    'all-gather': part,
    'reduce-scatter': chips * part,
    'all-to-all': part,
    'collective-permute': 1,
  }
  return sum(factors[kind] * found['bytes'] for kind, found in collectives.items())


def model(row: dict) -> list[dict]:
  """A row of `results/pods.json` at other numbers of chips, each with as many images."""
  compute, link = POD[row['pod'].split(':')[0]]
  sizes, products = row['mesh'], row['flops'] / (USED * compute)
  across = sizes['tensor'] if sizes['tensor'] > 1 else sizes['data'] * sizes['fsdp']
  found = []
  for chips in CHIPS:
    ring = across if sizes['tensor'] > 1 else chips
    collectives = dict(row['collectives'])
    if 'reduce-scatter' in collectives:  # of a share that shrinks with their number
      scatter = collectives['reduce-scatter']
      collectives['reduce-scatter'] = scatter | {'bytes': scatter['bytes'] * across / ring}
    amount = sent(collectives, ring)
    found.append({
      'chips': chips,
      'bytes_sent': round(amount),
      'seconds_sending': amount / link,
      'seconds_of_products': products,
    })  # fmt: skip
  return found


def main() -> None:
  with tempfile.TemporaryDirectory() as folder:
    measured = [measure(n, pathlib.Path(folder)) for n in PROCESSES]
  rows = writer.read_json(collect.RESULTS / 'pods.json')['rows']
  names = ('model', 'pod', 'mesh', 'collectives', 'flops')
  modelled = [{name: row[name] for name in names} | {'at': model(row)} for row in rows]
  found = {'machine': collect.machine(), 'measured': measured, 'modelled': modelled}
  writer.write_json(collect.RESULTS / 'scaling.json', found)
  for row in measured:
    print(row)


if __name__ == '__main__':
  main()
