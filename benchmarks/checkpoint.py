"""Measures how long the save of a checkpoint blocks training, and how much memory it needs.

    python -m benchmarks.checkpoint                    # 5 minutes; writes results/checkpoint.json
    python -m benchmarks.checkpoint tiny 1 short.json  # another model, fewer repeats, another file

The benchmark saves the training state of a model, first in a run with one process, then in a run
with two processes. The state of B/16 has 1.4 GB, including Adam's moments and the averaged weights.
Each process has two devices, and the state is sharded over all devices of the run (fsdp). Each run
is measured with two methods of saving:
  * `shards`: the present method, if all processes can write to the workdir. Each process copies its
    part of the arrays, and orbax saves the copies in a thread.
  * `gathered`: the method of version 0.1. All processes gather the whole arrays, and process 0
    computes their SHA-256. If some process cannot write to the workdir, the present version also
    gathers the arrays, but computes no SHA-256.

Seconds are medians without the first save of each process, which includes compilation.
`blocked_seconds` is the time of the call that saves. `overwritten_seconds` is the time from the
start of this call until the next training step has overwritten the state. The training step is a
dummy that only increments the step number. `peak_gib` is the largest memory of process 0, including
the state. Each method runs in new processes.
"""

import argparse
import json
import os
import pathlib
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks import arguments, collect
from vit_jax.workdir import writer

WAYS = ('gathered', 'shards')


def save(way: str, model: str, repeats: int, folder: pathlib.Path) -> dict:
  """Saves a state `repeats` + 1 times; returns the measurements of this process."""
  import jax

  from vit_jax import config as config_lib
  from vit_jax import experiment, opening
  from vit_jax.training import init_state
  from vit_jax.workdir import Checkpoints, checkpoint

  config = config_lib.default_config()
  settings = {
    'data.source': 'synthetic', 'data.image_size': '224', 'model.variant': model, 'ema': '0.999',
    'mesh.fsdp': str(jax.device_count()), 'mesh.data': '1', 'batch_size': '64', 'epochs': '1',
  }  # fmt: skip
  for key, text in settings.items():
    config_lib.override(config, key, text)
  exp, training = opening.from_config(config)
  state = init_state(exp, training, experiment.mesh_for(exp.config))
  jax.block_until_ready(state)
  size = sum(x.nbytes for x in jax.tree.leaves(state))
  before = peak()
  if way == 'gathered':
    checkpoint.is_shared = lambda _: False
    checkpoint.to_host = gathered
    checkpoint.copy_state = lambda _, state: state
  advance = jax.jit(lambda s: s.replace(step=s.step + 1), donate_argnums=0)
  state = jax.block_until_ready(advance(state))
  blocked, overwritten, committed = [], [], []
  with Checkpoints(folder) as checkpoints:
    for _ in range(repeats + 1):
      facts = exp.saved() | {'seconds': 0.0}
      began = time.perf_counter()
      checkpoints.save(state, facts)
      if way == 'gathered':
        checkpoints._end_handover()  # version 0.1 called orbax without a thread
      blocked.append(time.perf_counter() - began)
      state = jax.block_until_ready(advance(state))  # overwrites the state, like a training step
      overwritten.append(time.perf_counter() - began)
      checkpoints.wait()
      committed.append(time.perf_counter() - began)
  return {
    'state_gb': size / 1e9,
    'blocked_seconds': statistics.median(blocked[1:]),
    'overwritten_seconds': statistics.median(overwritten[1:]),
    'committed_seconds': statistics.median(committed[1:]),
    'peak_gib': peak(),
    'peak_before_saving_gib': before,
  }


def gathered(tree):
  """Gathers arrays to every process; process 0 computes the SHA-256 of a state."""
  from vit_jax.distributed import is_first, to_host
  from vit_jax.workdir import digest

  host = to_host(tree)
  if is_first() and hasattr(host, 'params'):
    digest(host.params)
    digest([host.opt_state, host.ema])
  return host


def peak() -> float:
  """Returns the largest memory (resident set) of this process so far, in GiB."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(way: str, processes: int, model: str, repeats: int) -> dict:
  """Starts processes that measure one method of saving; returns the results of process 0."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, '-m', 'benchmarks.checkpoint', '--child', way, model, str(repeats)]
    command += [folder, str(port), str(processes)]
    started = [
      subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True, env=os.environ)
      for i in range(processes)
    ]
    outs = [process.communicate()[0] for process in started]
  if any(process.returncode for process in started):
    raise SystemExit(f'{way}, {processes} process(es): a process failed; see its error above.')
  return json.loads(outs[0].splitlines()[-1])


def child(argv: list[str]) -> None:
  """Runs one process of a measurement and prints its measurements as JSON."""
  way, model, repeats, folder, port, processes, number = argv
  import jax

  jax.config.update('jax_num_cpu_devices', 2)
  if int(processes) > 1:
    jax.distributed.initialize(f'127.0.0.1:{port}', int(processes), int(number))
  print(json.dumps(save(way, model, int(repeats), pathlib.Path(folder) / 'run')), flush=True)


def parse(argv: list[str]) -> argparse.Namespace:
  parser = arguments.Parser(__spec__, __doc__)
  parser.add_argument('model', nargs='?', default='B/16', help='model (default: %(default)s)')
  repeats = 'measured saves per method and number of processes (default: %(default)s)'
  parser.add_argument('repeats', nargs='?', type=arguments.count, default=3, help=repeats)
  out = collect.RESULTS / 'checkpoint.json'
  parser.add_argument('out', nargs='?', type=pathlib.Path, default=out, help='file to write')
  return parser.parse_args(argv)


def main(argv: list[str]) -> None:
  if argv[:1] == ['--child']:
    child(argv[1:])
    return
  args, found = parse(argv), {}
  for processes in (1, 2):
    for way in WAYS:
      name = f'{processes}_{way}'
      found[name] = measure(way, processes, args.model, args.repeats)
      print(name, {key: round(value, 3) for key, value in found[name].items()}, flush=True)
  share = lambda n, key: found[f'{n}_shards'][key] / found[f'{n}_gathered'][key]
  writer.write_json(
    args.out,
    {
      **collect.circumstances(),
      'model': args.model,
      'repeats': args.repeats,
      'saves': found,
      'blocked_of_gathered': {n: share(n, 'blocked_seconds') for n in (1, 2)},
      'overwritten_of_gathered': {n: share(n, 'overwritten_seconds') for n in (1, 2)},
      'peak_of_gathered': {n: share(n, 'peak_gib') for n in (1, 2)},
    },
  )


if __name__ == '__main__':
  main(sys.argv[1:])
