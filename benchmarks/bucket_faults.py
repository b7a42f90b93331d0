"""Kills runs whose workdir is in a bucket, damages checkpoints, and checks that all runs recover.

    python -m benchmarks.bucket_faults                  # 30 minutes; writes bucket_faults.json
    python -m benchmarks.bucket_faults 2 8 short.json   # kills 2 runs, damages 8 checkpoints
    python -m benchmarks.bucket_faults 20 8 results/bucket_faults_tiny.json --cifar10=<folder>

The bucket is on this machine: `tests/fake_gcs.py` is a server that imitates Google Cloud Storage.
The runs train a small model on scikit-learn's digits, or `cifar10.py:tiny` on the images of
CIFAR-10 for 2 epochs. The data are an image folder. Each run is killed with SIGKILL at a random
time after a random step. The command is then repeated: it must resume the run, and take over the
lock of the killed process. The final parameters, optimizer state and averaged parameters must be
identical to the ones of an undisturbed run with a local workdir and local data. Finally, `main.py`
evaluates the finished run, predicts with it and exports it. No process may leave a file in its
working folder or home folder. Only the killed process may leave temporary files.

After the kills, checkpoints of the last run are damaged in the ways that `benchmarks.faults` lists.
"""

import argparse
import dataclasses
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image
from sklearn import datasets

from benchmarks import arguments, collect, faults
from tests.fake_gcs import FakeGcs
from vit_jax import bucket
from vit_jax.workdir import write_json

ROOT = pathlib.Path(__file__).resolve().parents[1]
DATA, RUN = 'gs://bucket/data', 'gs://bucket/run'
OTHERS = {  # modes that read the finished run, with their flags
  'eval': [],
  'predict': ['--images={image}'],
  'export': ['--format=stablehlo', '--out=gs://bucket/program'],
}


@dataclasses.dataclass(frozen=True)
class Task:
  """What the runs train.

  Attributes:
    recipe: file and variant in `configs/`.
    flags: more flags of `main.py`.
    steps: number of steps of a run.
    every: number of steps between two checkpoints.
    early: a run that is killed at its start is killed after at most this number of seconds.
  """

  recipe: str
  flags: tuple[str, ...]
  steps: int
  every: int
  early: float

  def command(self, images: pathlib.Path, data_dir: str) -> list[str]:
    """Returns the flags that train on the copy of the folder `images` in `data_dir`."""
    return [
      *self.flags, f'--config={ROOT}/configs/{self.recipe}', f'--config.data.dir={data_dir}',
      f'--config.data.source=folder:{images.name}', f'--config.checkpoint_every={self.every}',
    ]  # fmt: skip


DIGITS = Task('digits.py', tuple(faults.FLAGS), steps=46, every=4, early=12.0)
TINY = Task('cifar10.py:tiny', ('--config.epochs=2',), steps=391, every=40, early=60.0)


def write_digits(folder: pathlib.Path) -> None:
  """Writes the digits as PNG files `<split>/<class>/*.png` into `folder`."""
  found = datasets.load_digits()
  for i, (image, label) in enumerate(zip(found.images, found.target)):
    file = folder / ('train' if i % 5 else 'test') / str(label) / f'{i}.png'
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8)).save(file)


def start(workdir: str, flags: list[str], folder: pathlib.Path) -> subprocess.Popen:
  """Starts `main.py` in `folder/cwd/`; temporary files go to `folder/scratch/`."""
  own = {'TMPDIR': str(folder / 'scratch'), 'HOME': str(folder / 'home')}
  own |= {'PYTHONPATH': str(ROOT)}
  command = [sys.executable, str(ROOT / 'main.py'), f'--workdir={workdir}', *flags]
  log = (folder / 'log').open('ab')
  env = os.environ | own
  return subprocess.Popen(command, cwd=folder / 'cwd', env=env, stdout=log, stderr=log)


def finish(workdir: str, flags: list[str], folder: pathlib.Path) -> None:
  """Runs `main.py`, and raises SystemExit if it fails."""
  if code := start(workdir, flags, folder).wait(600):
    log = (folder / 'log').read_text(encoding='utf-8', errors='replace')
    raise SystemExit(f'{workdir}: exit code {code}\n{log[-3000:]}')


def steps_in(server: FakeGcs) -> list[int]:
  """Returns the steps of all committed checkpoints in the bucket."""
  pattern = re.compile(r'run/checkpoints/(\d+)/commit_success.txt')
  found = (pattern.fullmatch(name) for name in server.names('run/'))
  return sorted(int(match[1]) for match in found if match)


def local_files(folder: pathlib.Path) -> set[str]:
  """Returns the files, except the log, that a process has left in its folders."""
  found = (file.relative_to(folder) for file in folder.rglob('*') if file.is_file())
  return {str(file) for file in found if file.name != 'log'}


def kill(
  number: int, folder: pathlib.Path, server: FakeGcs, images: pathlib.Path, task: Task
) -> dict:
  """Kills a run in the bucket, resumes it and runs the modes in `OTHERS`; returns what happened."""
  draw = random.Random(number)
  for name in server.names('run/') + server.names('program/'):
    del server.objects['bucket', name]
  for name in ('cwd', 'home', 'scratch'):
    (folder / name).mkdir(parents=True)
  flags, image = task.command(images, DATA), next(images.rglob('*.*g'))
  began, process = time.monotonic(), start(RUN, flags, folder)
  step = draw.randrange(0, task.steps, task.every)  # step 0: kill at the start
  pause = draw.uniform(0, 1.5)
  while process.poll() is None and max(steps_in(server), default=0) < step:
    time.sleep(0.05)
  time.sleep(pause if step else draw.uniform(0, task.early))
  process.kill()
  code, reached = process.wait(), steps_in(server)
  found = {
    'after_step': step, 'exit_code': code, 'checkpoint': max(reached, default=None),
    'lock_left': 'run/lock.json' in server.names(), 'seconds': round(time.monotonic() - began, 1),
  }  # fmt: skip
  shutil.rmtree(folder / 'scratch')  # temporary files of the killed process
  (folder / 'scratch').mkdir()
  finish(RUN, flags, folder)
  found['fingerprint'] = faults.fingerprint(bucket.to_path(RUN))
  for mode, more in OTHERS.items():
    finish(RUN, [f'--mode={mode}', *(word.format(image=image) for word in more)], folder)
  found['written_locally'] = sorted(local_files(folder))
  found['objects'] = len(server.names('run/'))
  shutil.rmtree(folder)
  return found


def damage(number: int, server: FakeGcs) -> dict:
  """Damages the newest checkpoint in a copy of the run, and calls `faults.judge` on the copy."""
  run, copy = bucket.to_path(RUN), 'gs://bucket/damaged'
  checkpoint = f'checkpoints/{max(steps_in(server))}/'
  found = {name: server.objects['bucket', name] for name in server.names('run/')}
  found = {name.removeprefix('run/'): found[name] for name in found}
  order = sorted(found, key=lambda name: found[name].generation)
  files = {
    name.removeprefix(checkpoint): found[name].data for name in order if name.startswith(checkpoint)
  }
  how, file, left = faults.damaged(files, number)
  whole = {name: found[name].data for name in order if not name.startswith(checkpoint)}
  for name, data in (whole | {checkpoint + name: data for name, data in left.items()}).items():
    server.put('bucket', f'damaged/{name}', data)
  result = {'file': file, 'how': how, **faults.judge(bucket.to_path(copy), run, how)}
  for name in server.names('damaged/'):
    del server.objects['bucket', name]
  return result


def summary(task: Task, kills: list[dict], damages: list[dict]) -> dict:
  """Returns the content of the results file, for the kills and damages so far."""
  return {
    **collect.circumstances(),
    'recipe': task.recipe,
    # A run that ended before the signal does not count as a kill.
    'kills': sum(one['exit_code'] == -signal.SIGKILL for one in kills),
    'identical': sum(one['identical'] for one in kills),
    'written_locally': sum(bool(one['written_locally']) for one in kills),
    'locks_taken_over': sum(one['lock_left'] for one in kills),
    **faults.counted(damages),
    'all_kills': kills,
    'all_damages': damages,
  }


def parse(argv: list[str]) -> argparse.Namespace:
  parser = arguments.Parser(__spec__, __doc__)
  kills = 'runs to kill, at least 1 (default: %(default)s)'
  parser.add_argument('kills', nargs='?', type=arguments.count, default=20, help=kills)
  damages = 'checkpoints to damage or leave whole (default: %(default)s)'
  tries = sum(faults.DAMAGES.values())
  parser.add_argument('damages', nargs='?', type=arguments.count, default=tries, help=damages)
  out = collect.RESULTS / 'bucket_faults.json'
  parser.add_argument('out', nargs='?', type=pathlib.Path, default=out, help='file to write')
  parser.add_argument(
    '--cifar10', type=pathlib.Path, metavar='FOLDER',
    help='folder with the images of CIFAR-10 in train/<class>/ and test/<class>/; the runs train '
    '`cifar10.py:tiny` on them for 2 epochs',
  )  # fmt: skip
  args = parser.parse_args(argv)
  if not args.kills:
    parser.error(
      '`kills` must be at least 1, because the benchmark damages copies of the checkpoints of '
      'killed and resumed runs'
    )
  return args


def main(argv: list[str]) -> None:
  args, kills, damages = parse(argv), [], []
  if args.cifar10 and not (args.cifar10 / 'train').is_dir():
    raise SystemExit(f'error: --cifar10: there is no folder {args.cifar10 / "train"}.')
  with tempfile.TemporaryDirectory() as name, FakeGcs() as server:
    folder, compiled = pathlib.Path(name), pathlib.Path(name) / 'compiled'
    os.environ.update(server.env | {'JAX_COMPILATION_CACHE_DIR': str(compiled)})
    if args.cifar10:
      task, images = TINY, args.cifar10.resolve()
    else:
      task, images = DIGITS, folder / 'digits'
      write_digits(images)
    for file in images.rglob('*.*g'):  # PNG and JPEG files
      server.put('bucket', f'data/{file.relative_to(images.parent)}', file.read_bytes())
    for part in ('cwd', 'home', 'scratch'):
      (folder / 'alone' / part).mkdir(parents=True)
    finish(str(folder / 'local'), task.command(images, str(images.parent)), folder / 'alone')
    want = faults.fingerprint(folder / 'local')
    for number in range(args.kills):
      kills.append(kill(number, folder / 'one', server, images, task))
      kills[-1]['identical'] = kills[-1].pop('fingerprint') == want
      print(kills[-1], flush=True)
      write_json(args.out, summary(task, kills, damages))
    for number in range(args.damages):
      damages.append(damage(number, server))
      print(damages[-1], flush=True)
  write_json(args.out, result := summary(task, kills, damages))
  if result['identical'] < len(kills) or result['written_locally']:
    raise SystemExit(
      f'{args.out}: {result["identical"]} of {len(kills)} runs ended exactly like the local run; '
      f'expected all. {result["written_locally"]} wrote files on this machine; expected none.'
    )
  if result['good'] < len(damages):
    raise SystemExit(
      f'{args.out}: {result["good"]} of {len(damages)} damaged checkpoints were recovered exactly; '
      'expected all of them.'
    )


if __name__ == '__main__':
  main(sys.argv[1:])
