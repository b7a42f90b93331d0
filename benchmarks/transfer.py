"""Compares fine-tuning, a linear probe and training from scratch on CIFAR-10, for equal epochs.

    python main.py --config=configs/folder.py:tiny --config.data.source=folder:tinyimagenet32 \\
        --config.epochs=30 --workdir=runs/tin
    python -m benchmarks.transfer runs/tin folder:cifar10 runs/transfer

The first command pre-trains a model. The second runs the comparison and writes the results to
`results/transfer.json`. Every run uses the same images in batches of 512 for the same number of
epochs. Repeating the command resumes an interrupted comparison. `scratch` and `finetuned` both use
the recipe for training from scratch, so they differ only in `init`.
"""

import argparse
import json
import pathlib
import sys

from benchmarks import arguments, collect
from vit_jax.workdir import writer

SEEDS = (0, 1)
ALL = {'epochs': 10, 'batch_size': 512}
RUNS = {  # name: (config, whether it starts from the pre-trained weights, seeds)
  'probe': ('configs/linear_probe.py:tiny,folder', True, SEEDS),
  'scratch': ('configs/folder.py:tiny', False, SEEDS),
  'finetuned_adamw': ('configs/finetune.py:tiny,folder,adamw', True, SEEDS[:1]),
  'finetuned_sgd': ('configs/finetune.py:tiny,folder', True, SEEDS[:1]),
  'finetuned': ('configs/folder.py:tiny', True, SEEDS[:1]),
}


def parse(argv: list[str]) -> argparse.Namespace:
  parser = arguments.Parser(__spec__, __doc__)
  parser.add_argument('pretrained', type=pathlib.Path, help='workdir of a finished run')
  parser.add_argument('source', help='data.source of CIFAR-10, such as folder:cifar10')
  parser.add_argument('folder', type=pathlib.Path, help='folder for the workdirs')
  args = parser.parse_args(argv)
  if not (args.pretrained / 'result.json').exists():
    parser.error(f'{args.pretrained}: no result.json, so the run is not finished')
  return args


def main(argv: list[str]) -> None:
  args = parse(argv)
  init, source, folder = args.pretrained.resolve(), args.source, args.folder
  result = {'pretraining': collect.summary('configs/folder.py:tiny --config.epochs=30', [init])}
  for name, (config, starts, seeds) in RUNS.items():
    workdirs = [folder / f'{name}_{seed}' for seed in seeds]
    for seed, workdir in zip(seeds, workdirs):
      overrides = ALL | {'seed': seed, 'data.source': source} | ({'init': init} if starts else {})
      if not collect.train(config, overrides, workdir):
        raise SystemExit(f'{workdir}: the run failed. Fix the cause, then repeat the command.')
    recipe = ALL | ({'init': '<pretraining>'} if starts else {})
    result[name] = collect.summary(collect.command(config, recipe), workdirs)
    writer.write_json(collect.RESULTS / 'transfer.json', result)
  for name, summary in result.items():
    print(name, f'{summary["test_accuracy_mean"]:.2%}', json.dumps(summary['seeds']))


if __name__ == '__main__':
  main(sys.argv[1:])
