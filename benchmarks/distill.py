"""Measures how much a small student gains from a teacher, for the same number of steps.

    python main.py --config=configs/cifar10.py:tiny --config.data.source=folder:cifar10 \\
        --config.epochs=20 --config.augment.rand_augment.num_layers=0 --workdir=runs/teacher
    python -m benchmarks.distill runs/teacher folder:cifar10 runs/distill

The first command trains the teacher. The second trains students with and without this teacher, and
writes `results/distill.json`. A student is the model `tiny` with half the width. The gain is the
accuracy of a student with the teacher minus the accuracy of a student without it. Both students
have the same seed, so they see the same images in the same order. Gains are averaged over seeds.
The students `token_...` have a distillation token and are compared with `token_alone`. Repeating
the command resumes an interrupted comparison.
"""

import argparse
import pathlib
import statistics
import sys

from benchmarks import arguments, collect
from vit_jax.workdir import writer

CONFIG = 'configs/cifar10.py:tiny'
STUDENT = {
  'augment.rand_augment.num_layers': 0,
  'model.width': 24,
  'model.num_heads': 2,
  'model.mlp_dim': 96,
}
TOKEN = {
  'model.pool': 'distilled',
  'model.num_registers': 1,
  'model.position_prefix': 'all',
}
HARD = {'distill.kind': 'hard'}
RUNS = {  # name: (name of the run without a teacher that it is compared with, overrides)
  'alone': ('', {}),
  'soft': ('alone', {'distill.temperature': 1}),
  'soft_3': ('alone', {'distill.temperature': 3}),
  'soft_only': ('alone', {'distill.temperature': 1, 'distill.weight': 1}),
  'hard': ('alone', HARD),
  'token_alone': ('', TOKEN),
  'token_hard': ('token_alone', TOKEN | HARD),
}


def gain(runs: dict, without: dict) -> dict:
  """Returns the mean and the standard deviation of the gains in test accuracy, over the seeds.

  Args:
    runs: summary of the runs with a teacher.
    without: summary of the runs without a teacher, with the same seeds.
  """
  pairs = zip(runs['runs'], without['runs'], strict=True)
  gains = [one['test_accuracy'] - other['test_accuracy'] for one, other in pairs]
  std = statistics.stdev(gains) if len(gains) > 1 else None
  return {'gain_mean': statistics.mean(gains), 'gain_std': std}


def parse(argv: list[str]) -> argparse.Namespace:
  parser = arguments.Parser(__spec__, __doc__)
  parser.add_argument('teacher', type=pathlib.Path, help='workdir of a finished run')
  parser.add_argument('source', help='data.source of CIFAR-10, such as folder:cifar10')
  parser.add_argument('folder', type=pathlib.Path, help='folder for the workdirs')
  parser.add_argument('--epochs', type=float, default=20.0, help='epochs of each student')
  parser.add_argument('--seeds', type=arguments.count, default=3, help='number of seeds: 0, 1, ...')
  args = parser.parse_args(argv)
  if not (args.teacher / 'result.json').exists():
    parser.error(f'{args.teacher}: no result.json, so the run is not finished')
  if not args.seeds:
    parser.error('--seeds=0: expected 1 or more')
  return args


def main(argv: list[str]) -> None:
  args = parse(argv)
  teacher, result = args.teacher.resolve(), {}
  result['teacher'] = collect.summary('the teacher', [teacher])
  shared = {'epochs': args.epochs} | STUDENT
  # The outer loop is over seeds, so that each student is trained once before any trains again.
  for seed in range(args.seeds):
    for name, (baseline, overrides) in RUNS.items():
      given = shared | overrides | {'seed': seed, 'data.source': args.source}
      given |= {'distill.teacher': teacher} if baseline else {}
      workdir = args.folder / f'{name}_{seed}'
      if not collect.train(CONFIG, given, workdir):
        raise SystemExit(f'{workdir}: the run failed. Fix the cause, then repeat the command.')
      workdirs = [args.folder / f'{name}_{i}' for i in range(seed + 1)]
      recipe = shared | overrides | ({'distill.teacher': '<teacher>'} if baseline else {})
      result[name] = collect.summary(collect.command(CONFIG, recipe), workdirs)
      result[name] |= gain(result[name], result[baseline]) if baseline else {}
      writer.write_json(collect.RESULTS / 'distill.json', result)
  for name, summary in result.items():
    more = f', gain {summary["gain_mean"]:+.2%}' if 'gain_mean' in summary else ''
    print(f'{name}: {summary["test_accuracy_mean"]:.2%}{more}, seeds {summary["seeds"]}')


if __name__ == '__main__':
  main(sys.argv[1:])
