"""Trains every combination of a grid with one or more seeds, and ranks the combinations.

    python -m benchmarks.sweep --config=configs/cifar10.py:tiny --out=runs/rates --seeds=3 \\
        --grid='{"optimizer.lr": [1e-3, 3e-3], "optimizer.weight_decay": [0.05, 0.2]}' \\
        --config.epochs=20 --config.data.source=folder:cifar10

A grid can also be a list of JSON objects, e.g. to compare settings that belong together. With
`--pflops`, the sweep sets the number of epochs of each combination, so that each run costs the
given number of PFLOPs:

    python -m benchmarks.sweep --config=configs/cifar10.py:coffee --out=runs/sizes \\
        --grid='[{"model.width": [48], "model.depth": [4, 6]}, {"model.width": [64]}]' \\
        --pflops=0.02 --config.data.source=folder:cifar10

A grid can also be a file. For example, `knobs.json` changes one part of the recipe at a time, such
as an augmentation, dropout or the weight averaging. Its first entry is the unchanged recipe.
`--pflops` gives all entries the same compute:

    python -m benchmarks.sweep --config=configs/cifar10.py:coffee --out=runs/knobs --seeds=3 \\
        --grid=benchmarks/knobs.json --pflops=0.057 --config.data.source=folder:cifar10

By default, a sweep trains on the first 90% of the training split and reports the accuracy on the
last 10%. It does not use the test images, because they must not influence the choice of settings.
To use other splits, set `--config.data.train_split` and `--config.data.eval_split`.

Repeating the command resumes an interrupted sweep. With a larger grid or more seeds, the command
adds runs to the sweep. Each run is a workdir, `<out>/<key>=<value>,.../seed<n>/`. The table of all
runs is `<out>/sweep.json`.
"""

import argparse
import itertools
import json
import pathlib
import statistics
import sys

from benchmarks import arguments, collect
from vit_jax import cli, storage
from vit_jax import config as config_lib
from vit_jax.check import check
from vit_jax.inference.summary import summary_of
from vit_jax.opening import Request
from vit_jax.optim import objective_of
from vit_jax.workdir import writer

HELD_OUT = {
  'data.train_split': 'train[:90%]',
  'data.val_split': '',  # the ranking uses the last checkpoint, not the best one
  'data.eval_split': 'train[90%:]',
}


def parse(argv: list[str]) -> argparse.Namespace:
  """Parses the flags; `overrides` is `HELD_OUT`, updated with every `--config.<key>=<text>`."""
  parser = arguments.Parser(__spec__, __doc__)
  parser.add_argument('--config', required=True, help='configs/<experiment>.py[:<variant>]')
  parser.add_argument(
    '--grid', required=True, type=grid, help='JSON: {"key": [value, ...], ...}, or a list'
  )
  parser.add_argument('--pflops', type=float, help='PFLOPs of each run; sets epochs')
  parser.add_argument('--seeds', type=int, default=1, help='seeds per combination: 0, 1, ...')
  parser.add_argument('--out', required=True, type=pathlib.Path, help='folder for the workdirs')
  args, rest = parser.parse_known_args(argv)
  args.overrides = HELD_OUT | arguments.overrides(parser, rest)
  try:
    check_runs(args)
  except (ValueError, OSError) as error:
    parser.error(str(error).rstrip('.'))
  return args


def check_runs(args: argparse.Namespace) -> None:
  """Raises ValueError or OSError for problems that would stop a run at its start."""
  if args.pflops is not None and args.pflops <= 0:
    raise ValueError(f'--pflops={args.pflops:g}: expected a number above 0')
  if args.pflops is not None and 'epochs' in args.overrides:
    raise ValueError('--pflops sets the number of epochs, so remove --config.epochs')
  if args.seeds < 1:
    raise ValueError(f'--seeds={args.seeds}: expected 1 or more')
  if any('seed' in settings for settings in (args.overrides, *args.grid)):
    raise ValueError('seed cannot be set in a sweep; --seeds=<n> trains with the seeds 0 to n-1')
  storage.check_folder(args.out)
  for settings in args.grid:
    config = cli.load_file(args.config)
    config = config_lib.override_all(config, {**args.overrides, **settings})
    check(config)
    if not objective_of(config).labels:
      raise ValueError(
        f'objective={config.objective} has no accuracy, but a sweep ranks by accuracy; expected an '
        'objective with labels'
      )


def pflops_of(config: str, overrides: dict[str, str]) -> float:
  """Returns the cost of a training run in PFLOPs.

  Raises:
    SystemExit: the number of training images is unknown.
  """
  whole = config_lib.override_all(cli.load_file(config), overrides)
  flops = summary_of(Request(config=whole)).run_flops
  if flops is None:
    raise SystemExit(
      f'error: data.source={whole.data.source} was not found, so the number of images and the '
      'FLOPs are unknown.'
    )
  return flops / 1e15


def epochs_for(config: str, overrides: dict[str, str], pflops: float) -> str:
  """Returns the number of epochs with which training costs `pflops`.

  Raises:
    SystemExit: the number of training images is unknown.
  """
  many = 100  # many epochs, so that rounding the number of steps does not matter
  return f'{many * pflops / pflops_of(config, overrides | {"epochs": str(many)}):.3g}'


def grid(text: str) -> list[dict[str, str]]:
  """Returns all combinations of values of a JSON object `{key: [value, ...]}`, as `{key: text}`.

  For a list of objects, the result has the combinations within the first object, then those within
  the second one, and so on. The argument `text` is JSON, or the path of a `.json` file.

  Raises:
    argparse.ArgumentTypeError: the text is neither a JSON object of non-empty lists nor a list of
      such objects.
  """
  try:
    file = pathlib.Path(text) if text.endswith('.json') else None
    lists = json.loads(file.read_text(encoding='utf-8') if file else text)
  except (json.JSONDecodeError, OSError) as error:
    raise argparse.ArgumentTypeError(f'{text!r} is not JSON: {error}') from error
  found = []
  for part in lists if isinstance(lists, list) else [lists]:
    if not isinstance(part, dict) or not all(isinstance(v, list) and v for v in part.values()):
      raise argparse.ArgumentTypeError(
        f'expected {{"key": [value, ...], ...}}, or a list of such objects, got {text}'
      )
    as_text = lambda value: str(value) if isinstance(value, str | None) else json.dumps(value)
    columns = [[(key, as_text(value)) for value in values] for key, values in part.items()]
    found += [dict(pairs) for pairs in itertools.product(*columns)]
  return found


def row(settings: dict[str, str], results: list[dict | None]) -> dict:
  """Summarises the runs of one combination."""
  finished = [result for result in results if result]
  accuracies = [result['test_accuracy'] for result in finished]
  return {
    'settings': settings,
    'accuracies': accuracies,
    'mean': statistics.mean(accuracies) if finished else None,
    'std': statistics.stdev(accuracies) if len(finished) > 1 else None,
    'losses': [result['test_loss'] for result in finished],
    'seconds': [result['seconds'] for result in finished],
    'failed': len(results) - len(finished),
  }


def show(rows: list[dict]) -> str:
  """Returns the table as text, in the order of its rows."""
  lines = []
  for row in rows:
    spread = '' if row['std'] is None else f' ± {row["std"]:.2%}'
    failed = f', {row["failed"]} failed' if row['failed'] else ''
    settings = ' '.join(f'{key}={text}' for key, text in row['settings'].items())
    mean = 'no accuracy' if row['mean'] is None else f'{row["mean"]:.2%}'
    lines.append(f'{mean}{spread} ({len(row["accuracies"])} runs{failed})  {settings}')
  return '\n'.join(lines)


def main(argv: list[str]) -> int:
  """Trains all combinations and prints the table; returns the exit code."""
  args = parse(argv)
  if args.pflops:
    for settings in args.grid:
      settings['epochs'] = epochs_for(args.config, args.overrides | settings, args.pflops)
  results = {i: [] for i in range(len(args.grid))}
  # The outer loop is over seeds, so that each combination is trained once before any trains again.
  for seed in range(args.seeds):
    for i, settings in enumerate(args.grid):
      name = ','.join(f'{key}={text}' for key, text in settings.items())
      overrides = {**args.overrides, **settings, 'seed': str(seed)}
      workdir = args.out / name / f'seed{seed}'
      done = collect.train(args.config, overrides, workdir)
      results[i].append(writer.read_json(workdir / 'result.json') if done else None)
      rows = [row(args.grid[j], found) for j, found in results.items() if found]
      rows.sort(key=lambda row: -1 if row['mean'] is None else row['mean'], reverse=True)
      table = {'config': args.config, 'overrides': args.overrides, 'rows': rows}
      writer.write_json(args.out / 'sweep.json', table)
  print(show(rows))
  return 1 if any(row['failed'] for row in rows) else 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
