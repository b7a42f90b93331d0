"""Compares training from scratch with masked pretraining on CIFAR-10, at equal total compute.

    python -m benchmarks.masked folder:cifar10 folder:tinyimagenet32 runs/masked

All runs train the model `tiny`. `scratch` spends all compute on images with labels. The other
rows spend half of it on a masked autoencoder (`configs/mae.py`), which sees all training images of
CIFAR-10 or Tiny-ImageNet without labels, and the other half on fine-tuning with labels. Training
with labels uses 1%, 10% or all of the training images of CIFAR-10, and always the recipe of
`cifar10.py:tiny`. So rows with the same labelled images differ only in `init` and in the number of
epochs. This number follows from the compute. In addition, a linear classifier is trained on each
pretrained model, and on a model with random weights.

The results are written to `results/masked.json`. Repeating the command resumes an interrupted
comparison. Flags `--config.<key>=<value>` apply to all runs.
"""

import argparse
import pathlib
import sys

from benchmarks import arguments, collect
from benchmarks.sweep import epochs_for, pflops_of
from vit_jax.workdir import writer

TINY, MASKED = 'configs/cifar10.py:tiny', 'configs/mae.py:tiny,cifar10'
PROBE = 'configs/linear_probe.py:tiny,cifar10'
LABELLED = {'1%': 'train[:1%]', '10%': 'train[:10%]', '100%': 'train'}
COMMON = {'model.position': 'sincos', 'log_every': '500'}


def parse(argv: list[str]) -> argparse.Namespace:
  """Parses the flags; `overrides` is `COMMON`, updated with every `--config.<key>=<text>`."""
  parser = arguments.Parser(__spec__, __doc__)
  parser.add_argument('cifar10', help='data.source of CIFAR-10, such as folder:cifar10')
  parser.add_argument('tinyimagenet', help='data.source of Tiny-ImageNet at 32 pixels')
  parser.add_argument('folder', type=pathlib.Path, help='folder for the workdirs')
  parser.add_argument(
    '--epochs', type=arguments.count, default=20,
    help='total compute, in epochs of `tiny` on all images with labels (default: 20)',
  )  # fmt: skip
  args, rest = parser.parse_known_args(argv)
  args.overrides = COMMON | arguments.overrides(parser, rest)
  return args


def main(argv: list[str]) -> None:
  """Trains all runs and writes the results after each run."""
  args = parse(argv)
  cifar10 = args.overrides | {'data.source': args.cifar10}
  total = pflops_of(TINY, cifar10 | {'epochs': str(args.epochs)})
  result = collect.circumstances() | {'total_pflops': total, 'rows': {}}

  def run(name: str, config: str, overrides: dict[str, str], share: float | None = None) -> str:
    """Trains one run with a share of the compute, and returns its workdir.

    If `share` is None, the run has the number of epochs in its config.
    """
    if share:
      overrides = overrides | {'epochs': epochs_for(config, overrides, share * total)}
    workdir = args.folder.resolve() / name
    if not collect.train(config, overrides, workdir):
      raise SystemExit(f'{workdir}: the run failed. Fix the cause, then repeat the command.')
    found = writer.read_json(workdir / 'result.json')
    shown = overrides | {'data.source': collect.without_folders(overrides['data.source'])}
    shown |= {'init': pathlib.Path(overrides['init']).name} if 'init' in overrides else {}
    shown.pop('data.dir', None)
    keys = ('test_accuracy', 'test_loss', 'examples', 'steps', 'seconds')
    result['rows'][name] = {
      'recipe': collect.command(config, shown),
      'pflops': pflops_of(config, overrides) if share else None,
      **{key: found[key] for key in keys if key in found},
    }
    writer.write_json(collect.RESULTS / 'masked.json', result)
    return str(workdir)

  pretrained = {
    'mae_cifar10': run('mae_cifar10', MASKED, cifar10, 0.5),
    'mae_tinyimagenet': run(
      'mae_tinyimagenet', MASKED, cifar10 | {'data.source': args.tinyimagenet}, 0.5
    ),
  }
  for label, split in LABELLED.items():
    part = cifar10 | {'data.train_split': split}
    run(f'scratch_{label}', TINY, part, 1.0)
    for name, init in pretrained.items():
      run(f'{name}_{label}', TINY, part | {'init': init}, 0.5)
  for name, init in pretrained.items():
    run(f'{name}_probe', PROBE, cifar10 | {'init': init})
  run('random_probe', PROBE, cifar10)
  for name, row in result['rows'].items():
    if row['test_accuracy'] is not None:
      print(name, f'{row["test_accuracy"]:.2%}', row['recipe'])


if __name__ == '__main__':
  main(sys.argv[1:])
