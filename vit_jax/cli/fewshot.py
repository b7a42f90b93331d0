"""Defines `--mode=fewshot`."""

import dataclasses

from vit_jax.cli.flags import OUT, WEIGHTS, Flag, Mode, request_of


def run_fewshot(args) -> None:
  from vit_jax.evaluation import fewshot

  if args.out:
    return leave_workdir(args)
  for shots, score in fewshot(request_of(args), args.classifier)['shots'].items():
    seeds = len(score['accuracy'])
    print(f'{shots:>2} shots: {score["mean"]:.2%} ± {score["std"]:.2%} over {seeds} seeds')


def leave_workdir(args) -> None:
  """Computes a classifier from all training images, and saves it in the new workdir `--out`."""
  from vit_jax.training import classifier_config, train

  result = train(classifier_config(request_of(args), args.classifier), args.out)
  print(
    f'Test accuracy {result["test_accuracy"]:.2%} on {result["examples"]} examples; the classifier '
    f'({args.classifier}), which was computed from all training images, is in {args.out}/. '
    'Modes such as predict and serve can use it.'
  )


MODE = Mode(
  'measures the few-shot accuracy of the features, or computes a classifier without training',
  '--init=ViT-B_16.npz --config.data.source=folder:photos',
  (
    *WEIGHTS,
    Flag(
      'classifier',
      'ridge: least squares in closed form; knn: votes of the 20 nearest training images',
      default='ridge',
    ),
    dataclasses.replace(
      OUT,
      help='new workdir, for a classifier that is computed from all training images; default: only '
      'measure the few-shot accuracy',
    ),
  ),
  run_fewshot,
)
