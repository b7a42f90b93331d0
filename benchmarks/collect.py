"""Collects finished runs of one recipe into `results/<name>.json`.

    python -m benchmarks.collect digits 'configs/digits.py' runs/digits0 runs/digits1 runs/digits2

The file holds the result of each run, the mean and standard deviation of the test accuracy, the
machine and the date.
"""

import argparse
import datetime
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys

import jax

from benchmarks import arguments
from vit_jax.inference.measuring import processor
from vit_jax.workdir import writer

RESULTS = pathlib.Path(__file__).resolve().parents[1] / 'results'


def command(config: str, overrides: dict[str, object]) -> str:
  """Returns the config and overrides in command-line form."""
  return shlex.join((config, *(f'--config.{key}={value}' for key, value in overrides.items())))


def train(config: str, overrides: dict[str, object], workdir: pathlib.Path) -> bool:
  """Trains in a separate process, or resumes an interrupted run; returns whether it succeeded."""
  flags = [f'--config.{key}={value}' for key, value in overrides.items()]
  start = [sys.executable, 'main.py', f'--config={config}', f'--workdir={workdir}']
  return subprocess.run([*start, *flags]).returncode == 0


def machine() -> str:
  """Describes the accelerators of this machine, or its CPU."""
  device = jax.devices()[0]
  if device.platform != 'cpu':
    return f'{jax.device_count()} x {device.device_kind}'
  return processor()


def circumstances() -> dict[str, str]:
  """Returns the machine, the date and the versions of Python and JAX for a result file."""
  return {
    'machine': machine(),
    'date': datetime.date.today().isoformat(),
    'python': platform.python_version(),
    'jax': jax.__version__,
  }


def without_folders(source: str) -> str:
  """Returns a `data.source` without the folders of this machine, e.g. `folder:cifar10`."""
  kind, _, path = source.partition(':')
  return f'{kind}:{pathlib.Path(path).name}' if kind in ('folder', 'images', 'labels') else source


def summary(recipe: str, workdirs: list[pathlib.Path]) -> dict:
  """Returns the results of the finished runs of one recipe, with their mean.

  Raises:
    ValueError: a run is not finished.
  """
  runs = []
  for workdir in workdirs:
    result = writer.read_json(workdir / 'result.json')
    if result is None:
      raise ValueError(f'{workdir}: no result.json, so the run is not finished.')
    data = result['config']['data']  # the result keeps no folders of this machine
    data['source'], data['dir'] = without_folders(data['source']), ''
    if init := result['config']['init']:
      result['config']['init'] = pathlib.Path(init).name
    if teacher := result['config'].get('distill', {}).get('teacher'):
      result['config']['distill']['teacher'] = pathlib.Path(teacher).name
    runs.append(result)
  accuracies = [run['test_accuracy'] for run in runs]
  return {
    'recipe': recipe,
    **circumstances(),
    'seeds': [run['config']['seed'] for run in runs],
    'test_accuracy_mean': statistics.mean(accuracies),
    'test_accuracy_std': statistics.stdev(accuracies) if len(runs) > 1 else None,
    'seconds_mean': statistics.mean(run['seconds'] for run in runs),
    'runs': runs,
  }


def parse(argv: list[str]) -> argparse.Namespace:
  parser = arguments.Parser(__spec__, __doc__)
  parser.add_argument('name', help='name of the file in results/, without .json')
  parser.add_argument('recipe', help='config and overrides, as written on the command line')
  parser.add_argument('workdirs', nargs='+', type=pathlib.Path, help='finished runs of the recipe')
  args = parser.parse_args(argv)
  for workdir in args.workdirs:
    if not (workdir / 'result.json').exists():
      parser.error(f'{workdir}: no result.json, so the run is not finished')
  return args


def main(argv: list[str]) -> None:
  args = parse(argv)
  result = summary(args.recipe, args.workdirs)
  writer.write_json(RESULTS / f'{args.name}.json', result)
  print({key: value for key, value in result.items() if key != 'runs'})


if __name__ == '__main__':
  main(sys.argv[1:])
