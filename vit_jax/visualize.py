"""Pictures of a run, in `<workdir>/figures/`."""

import pathlib

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt

from vit_jax import writer


def curves(lines: list[dict]) -> plt.Figure:
  """Loss and accuracy of every split over the steps."""
  figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout='constrained')
  for axis, name in zip(axes, ('loss', 'accuracy')):
    for split in ('train', 'val', 'test'):
      points = [(line['step'], line[name]) for line in lines if line['split'] == split]
      if points:
        axis.plot(*zip(*points), label=split, marker='.' if len(points) < 30 else None)
    axis.set(xlabel='step', ylabel=name)
    axis.grid(alpha=0.3)
    axis.spines[['top', 'right']].set_visible(False)
  axes[0].legend(frameon=False)
  axes[1].yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
  return figure


def run(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Draws what the run recorded; returns the files.

  Raises:
    ValueError: the workdir holds no metrics.
  """
  if not (workdir / 'metrics.jsonl').exists() or not (lines := writer.read_metrics(workdir)):
    raise ValueError(f'{workdir}: no metrics.jsonl to draw; give the --workdir of a training run.')
  folder = workdir / 'figures'
  folder.mkdir(exist_ok=True)
  figure = curves(lines)
  path = folder / 'curves.png'
  figure.savefig(path, dpi=150)
  plt.close(figure)
  return [path]
