"""Trains the recipes of `results/README.md` and writes their results to `results/`.

    python -m benchmarks.recipes cpu folder:cifar10
    python -m benchmarks.recipes gpu folder:cifar10     # make results-gpu DATA=folder:cifar10
    python -m benchmarks.recipes cpu folder:cifar10 digits cifar10_tiny_20    # two recipes only

Each run is a workdir, `runs/results/<recipe>/seed<n>/`. Repeating the command resumes an
interrupted run and skips finished runs. The files in `results/` keep the date and the machine of a
run that they already list. For each recipe, these files are written:
  * `results/<recipe>.json`: results of all seeds;
  * `results/<recipe>/`: `metrics.jsonl` of each run and a figure of the curves;
  * `results/README.md`: a row of the table;
  * `results/minutes.png`: the test accuracy of the CPU recipes on CIFAR-10, by training minutes.
"""

import argparse
import pathlib
import shutil
import sys
from typing import NamedTuple

from benchmarks import arguments, collect
from vit_jax import storage
from vit_jax.workdir import writer

RUNS = pathlib.Path('runs/results')


class Recipe(NamedTuple):
  """A recipe with its goals; a row of the table in `results/README.md`.

  Attributes:
    config: `configs/<experiment>.py:<variant>`.
    overrides: changed config keys with their values.
    seeds: number of runs, with seeds 0, 1, ...
    where: `cpu` for two CPU cores, or `gpu` for one GPU.
    minutes: maximum minutes of a run on the machine `where`.
    at_least: minimum test accuracy that we expect.
    aim: test accuracy that we hope for.
    reference: accuracy that others reported for a similar plain ViT; empty if unknown.
  """

  config: str
  overrides: dict[str, object]
  seeds: int
  where: str
  minutes: float
  at_least: float
  aim: float
  reference: str


GITHUB = 'https://github.com'
GPU = {'model.dtype': 'bfloat16'}
SMALL_20 = {  # the model `small` with Muon
  'model.variant': 'small',
  'model.position': 'sincos',
  'epochs': 20,
  'optimizer.lr': 0.006,
  'optimizer.weight_decay': 0.25,
  'schedule.name': 'linear',
  'schedule.warmup': 1.0,
  'augment.mix.probability': 0.2,
  'progressive.sizes': (16, 24),
  'progressive.until': (0.4, 0.85),
}
RECIPES = {
  'digits': Recipe('configs/digits.py', {}, 5, 'cpu', 1, 0.985, 0.99, ''),
  'cifar10_coffee': Recipe('configs/cifar10.py:coffee', {}, 3, 'cpu', 15, 0.81, 0.84, ''),
  'cifar10_laptop': Recipe('configs/cifar10.py:laptop', {}, 3, 'cpu', 45, 0.85, 0.88, ''),
  'cifar10_tiny_20': Recipe(
    'configs/cifar10.py:tiny', {'epochs': 20, 'augment.rand_augment.num_layers': 0}, 3,
    'cpu', 20, 0.75, 0.77, '',
  ),
  'cifar10_tiny': Recipe(
    'configs/cifar10.py:tiny', {}, 1, 'cpu', 100, 0.795, 0.82,
    f'[75.5% after 100 epochs]({GITHUB}/tintn/vision-transformer-from-scratch)',
  ),
  'cifar10_small_20': Recipe('configs/cifar10.py:tiny', SMALL_20, 1, 'cpu', 100, 0.84, 0.88, ''),
  'cifar10_small': Recipe(
    'configs/cifar10.py:small', GPU, 3, 'gpu', 10, 0.94, 0.955,
    f'[93.6% after 300 epochs]({GITHUB}/aanna0701/SPT_LSA_ViT)',
  ),
  'cifar10_wide': Recipe('configs/cifar10.py:wide', GPU, 3, 'gpu', 10, 0.93, 0.95, ''),
  'cifar10_deep': Recipe(
    'configs/cifar10.py:deep', GPU, 1, 'gpu', 30, 0.96, 0.97,
    f'[96.4% after a self-supervised start]({GITHUB}/hananshafi/vits-for-small-scale-datasets)',
  ),
}  # fmt: skip

HEADER = """# Recipes

A recipe is a config for which we have set a test accuracy to reach. We measure the accuracy of the
last checkpoint of a run on all test images, even if an earlier checkpoint was better. The recipes
on CIFAR-10 use an image folder whose publisher re-encoded the original images as JPEG. The columns
are:

- `reference`: accuracy on CIFAR-10 that others reported for a plain ViT of similar size;
- `at least`, `aim`: the lowest accuracy that we expect, and the accuracy that we hope for;
- `reached`: measured test accuracy, as mean and standard deviation over runs with different seeds;
  `open` if the recipe has not been trained;
- `minutes`: mean time of a run, from the compilation of the first step to the last evaluation on
  the test images. It does not include the decoding of the data before training;
- `limit`: maximum number of minutes that a run of the recipe should take.

`python -m benchmarks.recipes` writes this page. [notes.md](notes.md) describes the experiments by
which we chose the recipes.

| recipe | reference | at least | aim | reached | minutes | limit | machine, date | files |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def workdirs(name: str) -> list[pathlib.Path]:
  return [RUNS / name / f'seed{seed}' for seed in range(RECIPES[name].seeds)]


def train(name: str, seed: int, source: str) -> None:
  """Trains one run in its own process; a finished run is not repeated."""
  recipe, workdir = RECIPES[name], workdirs(name)[seed]
  overrides = recipe.overrides | {'seed': seed}
  if name != 'digits':
    overrides['data.source'] = source
  if not collect.train(recipe.config, overrides, workdir):
    raise SystemExit(
      f'{workdir}: the run failed. Fix the cause, then repeat the command to resume.'
    )


def is_listed(name: str, seed: int) -> bool:
  """Returns whether `results/<recipe>.json` already has the result of a finished run."""
  result = writer.read_json(workdirs(name)[seed] / 'result.json')
  listed = writer.read_json(collect.RESULTS / f'{name}.json') or {'runs': []}
  identity = lambda run: (run['config']['seed'], run['seconds'], run['test_loss'])
  return identity(result) in [identity(run) for run in listed['runs']]


def gather(name: str) -> None:
  """Writes the results of the recipe's finished runs."""
  from vit_jax.figures import canvas, draw  # imports matplotlib, which `make gpu` may lack

  finished = [path for path in workdirs(name) if (path / 'result.json').exists()]
  result = collect.summary(collect.command(RECIPES[name].config, RECIPES[name].overrides), finished)
  writer.write_json(collect.RESULTS / f'{name}.json', result)
  folder = collect.RESULTS / name
  folder.mkdir(exist_ok=True)
  for path in finished:
    shutil.copy(path / 'metrics.jsonl', folder / f'{path.name}.jsonl')
  canvas.save_figure(draw.draw_curves(writer.read_metrics(finished[0])), folder / 'curves.png')


def row(name: str) -> str:
  """Returns a line of the table, with `open` for a recipe that was not run yet.

  If the JSON file of the results has a `time_note`, written by hand, the line shows it.
  """
  recipe, result = RECIPES[name], writer.read_json(collect.RESULTS / f'{name}.json')
  percent = lambda share: f'{100 * share:g}%'
  cells = [
    f'`{collect.command(recipe.config, recipe.overrides)}`',
    recipe.reference,
    percent(recipe.at_least),
    percent(recipe.aim),
  ]
  if result is None:
    cells += ['open', '', f'{recipe.minutes:g}', f'`make results-{recipe.where}`', '']
  else:
    deviation, seeds = result['test_accuracy_std'], len(result['seeds'])
    spread = '' if deviation is None else f' ± {100 * deviation:.2f}'
    mean, minutes = result['test_accuracy_mean'], result['seconds_mean'] / 60
    accuracy = f'**{100 * mean:.2f}{spread} %** ({seeds} {"seed" if seeds == 1 else "seeds"})'
    cells += [accuracy + (', below `at least`' if mean < recipe.at_least else ''), f'{minutes:.1f}']
    if 'time_note' in result:
      cells[-1] += f' ({result["time_note"]})'
    elif minutes > recipe.minutes:
      cells[-1] += ' (above `limit`)'
    cells += [f'{recipe.minutes:g}', f'{result["machine"]}, {result["date"]}']
    cells += [f'[runs]({name}.json), [curves]({name}/curves.png)']
  return f'| {" | ".join(cells)} |'


def is_drawn(name: str) -> bool:
  """Returns whether the figure shows a recipe: a recipe for CIFAR-10 on a CPU that has results."""
  of_cifar = RECIPES[name].where == 'cpu' and name.startswith('cifar10')
  return of_cifar and (collect.RESULTS / f'{name}.json').exists()


def parse(argv: list[str]) -> argparse.Namespace:
  parser = arguments.Parser(__spec__, __doc__)
  parser.add_argument('where', choices=('cpu', 'gpu'), help='machine that the recipes are for')
  parser.add_argument('source', help='data.source of CIFAR-10, such as folder:cifar10')
  parser.add_argument('names', nargs='*', help='recipes (default: all for that machine)')
  args = parser.parse_args(argv)
  here = [name for name, recipe in RECIPES.items() if recipe.where == args.where]
  args.names = args.names or here
  for name in args.names:
    if name not in here:
      parser.error(f'no recipe {name} for a {args.where}; expected one of {", ".join(here)}')
  return args


def main(argv: list[str]) -> None:
  args = parse(argv)
  for name in args.names:
    for seed in range(RECIPES[name].seeds):
      train(name, seed, args.source)
      if is_listed(name, seed):  # a new summary would replace the run's date and machine
        continue
      gather(name)
      table = HEADER + '\n'.join(row(name) for name in RECIPES) + '\n'
      storage.replace(collect.RESULTS / 'README.md', table)
    if measured := [name for name in RECIPES if is_drawn(name)]:
      from benchmarks import minutes

      minutes.save(measured, collect.RESULTS / 'minutes.png')
    print(row(name), flush=True)


if __name__ == '__main__':
  main(sys.argv[1:])
