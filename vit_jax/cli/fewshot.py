"""Defines `--mode=fewshot`."""

from vit_jax.cli.flags import WEIGHTS, Mode, request_of


def run_fewshot(args) -> None:
  from vit_jax.evaluation import fewshot

  for shots, score in fewshot(request_of(args))['shots'].items():
    seeds = len(score['accuracy'])
    print(f'{shots:>2} shots: {score["mean"]:.2%} ± {score["std"]:.2%} over {seeds} seeds')


MODE = Mode(
  'measures the few-shot accuracy of the features',
  '--init=ViT-B_16.npz --config.data.source=folder:photos',
  WEIGHTS,
  run_fewshot,
)
