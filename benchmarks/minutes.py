"""Draws test accuracy by minutes of training, for `benchmarks.recipes`."""

from collections.abc import Sequence
import json
import pathlib

from matplotlib import ticker
from matplotlib.figure import Figure

from benchmarks import collect
from vit_jax.figures import canvas
from vit_jax.workdir import writer


def save(names: Sequence[str], path: pathlib.Path) -> None:
  """Draws the named recipes, and writes the figure to `path`."""
  canvas.save_figure(draw_minutes(names), path)


@canvas.styled
def draw_minutes(names: Sequence[str]) -> Figure:
  """Draws test accuracy by minutes for the first run of each recipe; the legend names machines."""
  figure = Figure((canvas.WIDTH, 3.8), layout='constrained')
  axis = figure.subplots()
  for name in names:
    result = writer.read_json(collect.RESULTS / f'{name}.json')
    file = collect.RESULTS / name / f'seed{result["seeds"][0]}.jsonl'
    lines = file.read_text(encoding='utf-8').splitlines()
    minutes, accuracies = by_minutes(list(map(json.loads, lines)))
    epochs = result['runs'][0]['config']['epochs']
    machine = result['machine'].split(' of ')[-1]
    label = f'{name.split("_")[1]}, {epochs:g} epochs: {accuracies[-1]:.1%} ({machine})'
    axis.plot(minutes, accuracies, marker='.', label=label)
  axis.set(xscale='log', xlabel='minutes of training on 2 CPU cores', ylabel='test accuracy')
  axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
  axis.xaxis.set_major_formatter(ticker.StrMethodFormatter('{x:g}'))
  axis.yaxis.set_major_locator(ticker.MultipleLocator(0.05))
  axis.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, 0))
  axis.grid()
  figure.legend(loc='outside lower center', ncols=2)
  return figure


def by_minutes(lines: list[dict]) -> tuple[list[float], list[float]]:
  """Returns the minutes of training before each test, and the test accuracies.

  Minutes include neither compilation nor evaluation. `lines` are the lines of `metrics.jsonl`.
  """
  seconds, minutes, accuracies = 0.0, [], []
  for line in lines:
    if line['split'] == 'train':
      seconds += line['examples'] / line['images_per_second']
    elif line['split'] == 'test':
      minutes.append(seconds / 60)
      accuracies.append(line['accuracy'])
  return minutes, accuracies
