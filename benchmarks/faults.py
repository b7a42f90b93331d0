"""Kills training at random moments and damages checkpoints, and checks that runs recover exactly.

    python -m benchmarks.faults                    # about 25 minutes; writes results/faults.json
    python -m benchmarks.faults 2 1 8 short.json   # fewer faults, another file

The first command kills 40 runs of one process and 12 of two processes, and loads 230 checkpoints,
of which 130 are damaged. The second command sets the numbers 40, 12 and 230 to 2, 1 and 8.

A run is killed with SIGKILL at a random time after a random step. Because the runs spend most of
their time saving checkpoints, a signal often interrupts a save. With two processes, the signal goes
to one process or to both. The command of the run is then repeated. It must resume the run, and end
with exactly the parameters, optimizer state and averaged parameters of an undisturbed run.

Damage hits a random file of the newest checkpoint: one bit is flipped, or the file is truncated,
emptied or removed. The damage must either have no effect, or be detected. If it is detected, the
previous checkpoint must be used. `DAMAGES` contains two more cases:
  * `torn`: as after a power failure, the files that were written last are missing, and one file is
    incomplete. Such a checkpoint must not be used.
  * `none`: nothing is damaged. The newest checkpoint must be used.
"""

import argparse
from collections.abc import Sequence
import hashlib
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import socket
import sys
import tempfile
import time

from benchmarks import arguments, collect
from vit_jax import cli as program
from vit_jax.workdir import digests, items, stored, writer

FLAGS = [
  '--config=configs/digits.py', '--config.epochs=2', '--config.batch_size=64',
  '--config.model.width=16', '--config.model.num_heads=2', '--config.model.depth=1',
  '--config.augment.mix.probability=0', '--config.optimizer.name=muon', '--config.eval_every=0',
  '--config.checkpoint_every=2', '--config.log_every=1',
]  # fmt: skip
STEPS = 45
MOMENT = 0.5  # maximum seconds from a step's line in the metrics to the kill
LIMIT = 90  # seconds within which surviving processes must stop
# In every third run of two processes, only one process gets the signal. The number of these runs is
# small, because the other process takes long to stop.
ONE_OF_TWO = 3
# How a checkpoint is damaged, and how often in 230 tries.
DAMAGES = {'flip': 60, 'cut': 20, 'empty': 10, 'remove': 20, 'torn': 20, 'none': 100}


def train(flags: list[str], log: pathlib.Path) -> None:
  """Runs `main.py` in this process, and appends the output to the file `log`."""
  out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  os.dup2(out, 1)
  os.dup2(out, 2)
  code = program.main(flags)
  import jax

  if jax.distributed.is_initialized():
    jax.distributed.shutdown()
  sys.exit(code)


def start(workdir: pathlib.Path, processes: int, flags: Sequence[str] = FLAGS) -> list:
  """Starts the processes of a run and returns them."""
  together = [[]]
  if processes > 1:
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      port = free.getsockname()[1]
    count = [f'--coordinator=127.0.0.1:{port}', f'--num_processes={processes}']
    together = [[*count, f'--process_id={i}'] for i in range(processes)]
  context = multiprocessing.get_context('forkserver')  # imports JAX once for all processes
  started = []
  for i, rank in enumerate(together):
    log = workdir.with_suffix(f'.{i}.log')
    words = [f'--workdir={workdir}', *flags, *rank]
    started.append(context.Process(target=train, args=(words, log)))
    started[-1].start()
  return started


def finish(workdir: pathlib.Path, processes: int, flags: Sequence[str] = FLAGS) -> None:
  """Runs training to its end.

  Raises:
    SystemExit: a process failed.
  """
  for process in start(workdir, processes, flags):
    process.join(600)
    if process.exitcode != 0:
      raise SystemExit(
        f'{workdir}: training failed with exit code {process.exitcode}. See the log next to this '
        'folder.'
      )


def wait_for(step: int, workdir: pathlib.Path, started: list) -> None:
  """Waits until the metrics contain this step or a process has ended."""
  metrics = workdir / 'metrics.jsonl'
  while all(process.is_alive() for process in started):
    if metrics.exists() and any(line['step'] >= step for line in writer.read_metrics(workdir)):
      return
    time.sleep(0.01)


def fingerprint(workdir: pathlib.Path, step: int | None = None) -> str:
  """Returns a checksum of all arrays of a checkpoint, by default the newest."""
  step = stored.latest_step(workdir) if step is None else step
  found = [items.digest(stored.read_item(workdir, step, name)) for name in ('params', 'state')]
  return hashlib.sha256(json.dumps([step, found]).encode()).hexdigest()


def kill(
  folder: pathlib.Path, number: int, processes: int, want: str, flags: Sequence[str] = FLAGS
) -> dict:
  """Starts a run, kills it, resumes it and compares its final state with `want`."""
  draw = random.Random(1000 * processes + number)
  workdir = folder / f'killed{processes}_{number}'
  started = start(workdir, processes, flags)
  step = draw.randrange(STEPS)  # step 0 kills the run while it starts
  if step:
    wait_for(step, workdir, started)
  time.sleep(draw.uniform(0, MOMENT))
  alone = processes > 1 and number % ONE_OF_TWO == 0
  victims = draw.sample(started, 1) if alone else started
  for victim in victims:
    if victim.is_alive():
      os.kill(victim.pid, signal.SIGKILL)
  died = time.monotonic()
  for process in started:
    process.join(LIMIT)
    if process.is_alive():
      raise SystemExit(f'{workdir}: a process is still running {LIMIT} s after the kill.')
  outlived, codes = time.monotonic() - died, [process.exitcode for process in started]
  reached = stored.latest_step(workdir)
  partial = [p.name for p in stored.directory(workdir).glob('*tmp*')]
  finish(workdir, processes, flags)
  same = fingerprint(workdir) == want
  found = {
    'processes': processes,
    'after_step': step,
    'killed': 'one' if alone else 'all',
    'exit_codes': codes,
    'outlived_seconds': round(outlived, 1),
    'checkpoint': reached,
    'while_saving': bool(partial),
    'identical': same,
  }
  shutil.rmtree(workdir)
  return found


def averages(workdir: pathlib.Path, step: int) -> str:
  """Returns a checksum of the weights that inference uses: averaged ones, if the run has them."""
  averaged = stored.read_item(workdir, step, 'state').get('ema')
  return items.digest(averaged or stored.read_item(workdir, step, 'params'))


def sequence() -> list[str]:
  """Returns a kind of damage for each try, in order; the first tries are one of each kind."""
  others = [how for how, count in DAMAGES.items() for _ in range(count - 1)]
  return [*DAMAGES, *random.Random(0).sample(others, len(others))]


def damaged(files: dict[str, bytes], number: int) -> tuple[str, str, dict[str, bytes]]:
  """Damages a checkpoint.

  Args:
    files: {name: content} of the checkpoint, in the order in which they were written.
    number: number of the try, which selects the kind of damage and the file.

  Returns:
    The kind of damage, the name of the damaged file (empty for `none`), and the remaining files.
  """
  draw, how = random.Random(number), sequence()[number % sum(DAMAGES.values())]
  if how == 'none':
    return how, '', files
  if how == 'torn':
    return how, *torn(files, draw)
  name = draw.choice(sorted(files))
  data = bytearray(files[name])
  if how == 'remove':
    return how, name, {other: files[other] for other in files if other != name}
  if how == 'flip' and data:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
  elif how == 'cut':
    data = data[: draw.randrange(len(data) or 1)]
  elif how == 'empty':
    data = b''
  return how, name, files | {name: bytes(data)}


def torn(files: dict[str, bytes], draw: random.Random) -> tuple[str, dict[str, bytes]]:
  """Removes the files that were written last, and truncates the last remaining file.

  At the top level of the checkpoint, only the file with the checksums can be removed or truncated.
  Orbax writes the other files of this level later. They are kept, so that the checkpoint looks
  complete.
  """
  order = [*(name for name in files if '/' in name), digests.FILE]
  last = draw.randrange(len(order))
  content = files[order[last]]
  left = {name: files[name] for name in files if name not in order[last:]}
  return order[last], left | {order[last]: content[: draw.randrange(len(content) or 1)]}


def judge(workdir: pathlib.Path, finished: pathlib.Path, how: str) -> dict:
  """Loads a damaged copy of a finished run; checks that the right arrays are loaded."""
  newest = stored.latest_step(finished)
  loaded, params, _ = stored.load_checkpoint(workdir)  # as `predict` does
  stored.set_aside_damaged(workdir)  # as training does
  step = stored.latest_step(workdir)
  same = items.digest(params) == averages(finished, loaded)
  same = same and fingerprint(workdir) == fingerprint(finished, step)
  expected = {'torn': step != newest, 'none': step == newest == loaded}.get(how, True)
  return {'used': 'newest' if step == newest else 'the one before', 'good': same and expected}


def damage(folder: pathlib.Path, finished: pathlib.Path, number: int) -> dict:
  """Damages the newest checkpoint in a copy of a finished run, and calls `judge` on the copy."""
  workdir, newest = folder / f'damaged{number}', stored.latest_step(finished)
  shutil.copytree(finished, workdir)
  checkpoint = stored.directory(workdir) / str(newest)
  paths = sorted(checkpoint.rglob('*'), key=lambda path: path.stat().st_mtime_ns)
  files = {str(p.relative_to(checkpoint)): p.read_bytes() for p in paths if p.is_file()}
  how, name, left = damaged(files, number)
  for path in files:
    (checkpoint / path).unlink()
  for path, content in left.items():
    (checkpoint / path).write_bytes(content)
  found = {'file': name, 'how': how, **judge(workdir, finished, how)}
  shutil.rmtree(workdir)
  return found


def counted(found: list[dict]) -> dict:
  """Counts the tested checkpoints: all, those treated correctly, and each kind of damage."""
  return {
    'damages': len(found),
    'good': sum(one['good'] for one in found),
    'kinds': {how: sum(one['how'] == how for one in found) for how in DAMAGES},
  }


def parse(argv: list[str]) -> argparse.Namespace:
  parser = arguments.Parser(__spec__, __doc__)
  alone = 'runs of one process to kill (default: %(default)s)'
  parser.add_argument('alone', nargs='?', type=arguments.count, default=40, help=alone)
  together = 'runs of two processes to kill (default: %(default)s)'
  parser.add_argument('together', nargs='?', type=arguments.count, default=12, help=together)
  damages = 'checkpoints to damage or leave whole (default: %(default)s)'
  tries = sum(DAMAGES.values())
  parser.add_argument('damages', nargs='?', type=arguments.count, default=tries, help=damages)
  out = collect.RESULTS / 'faults.json'
  parser.add_argument('out', nargs='?', type=pathlib.Path, default=out, help='file to write')
  args = parser.parse_args(argv)
  if args.damages and not args.alone:
    parser.error(
      '`alone` must be at least 1, because the benchmark damages copies of the checkpoints of runs '
      'with one process'
    )
  return args


def main(argv: list[str]) -> None:
  args = parse(argv)
  multiprocessing.get_context('forkserver').set_forkserver_preload(['vit_jax.training.probe'])
  kills, damages = [], []
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    # Two processes keep compiled programs only in a folder that is set (see `forget_compiled`).
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(folder / 'compiled'))
    for processes, count in ((1, args.alone), (2, args.together)):
      if not count:
        continue
      whole = folder / f'whole{processes}'
      finish(whole, processes)
      want = fingerprint(whole)
      for number in range(count):
        kills.append(kill(folder, number, processes, want))
        print(kills[-1], flush=True)
    for number in range(args.damages):
      damages.append(damage(folder, folder / 'whole1', number))
      print(damages[-1], flush=True)
  found = {
    **collect.circumstances(),
    # A run that ended before the signal does not count as a kill.
    'kills': sum(-signal.SIGKILL in k['exit_codes'] for k in kills),
    'identical': sum(k['identical'] for k in kills),
    'while_saving': sum(k['while_saving'] for k in kills),
    **counted(damages),
    'all_kills': kills,
    'all_damages': damages,
  }
  writer.write_json(args.out, found)
  if found['identical'] < len(kills) or found['good'] < len(damages):
    raise SystemExit(
      f'{args.out}: {found["identical"]} of {len(kills)} killed runs and {found["good"]} of '
      f'{len(damages)} damaged checkpoints were recovered exactly; expected all of them.'
    )


if __name__ == '__main__':
  main(sys.argv[1:])
