"""Compares a model trained at random patch sizes with models that are trained at one patch size.

    python -m benchmarks.flexi folder:cifar10 runs/flexi

All runs train the model `tiny` for the same number of epochs, without RandAugment. The run
`flexible` draws a patch size of 2, 4 or 8 pixels for each step (FlexiViT, 2212.08013). Three other
runs train at one of these sizes. Every model is evaluated at all three sizes. A model stores the
patch embedding for one patch size (`flexible`: 4 pixels), and resizes it with the pseudo-inverse
for other sizes. The results are written to `results/flexi.json`. Repeating the command resumes an
interrupted comparison.
"""

import argparse
import pathlib
import sys

from benchmarks import arguments, collect
from vit_jax.evaluation import exact
from vit_jax.workdir import writer

CONFIG = 'configs/cifar10.py:tiny'
SIZES = (8, 4, 2)  # patch sizes in pixels; smaller patches make a step more expensive
SHARED = {'augment.rand_augment.num_layers': 0, 'eval_every': 0, 'checkpoint_every': 100}
RUNS = {'flexible': {'patch_sizes': '2,4,8'}}  # name: overrides
RUNS |= {f'fixed_{size}': {'model.patch_size': size} for size in SIZES}


def parse(argv: list[str]) -> argparse.Namespace:
  parser = arguments.Parser(__spec__, __doc__)
  parser.add_argument('source', help='data.source of CIFAR-10, such as folder:cifar10')
  parser.add_argument('folder', type=pathlib.Path, help='folder for the workdirs')
  parser.add_argument('--epochs', type=float, default=3.0, help='epochs of each run')
  return parser.parse_args(argv)


def at_each_size(workdir: pathlib.Path) -> dict[str, float]:
  """Returns the accuracy on all test images, by the patch size of the evaluation."""
  evaluate = lambda size: exact.evaluate(workdir, {'model.patch_size': str(size)})
  return {str(size): evaluate(size)['accuracy'] for size in SIZES}


def main(argv: list[str]) -> None:
  args = parse(argv)
  result = {}
  for name, overrides in RUNS.items():
    recipe, workdir = {'epochs': args.epochs} | SHARED | overrides, args.folder / name
    if not collect.train(CONFIG, recipe | {'data.source': args.source}, workdir):
      raise SystemExit(f'{workdir}: the run failed. Fix the cause, then repeat the command.')
    result[name] = collect.summary(collect.command(CONFIG, recipe), [workdir])
    result[name]['test_accuracy_by_patch_size'] = at_each_size(workdir)
    writer.write_json(collect.RESULTS / 'flexi.json', result)
  for name, summary in result.items():
    shares = summary['test_accuracy_by_patch_size'].items()
    print(name, ', '.join(f'{share:.2%} at {size}' for size, share in shares))


if __name__ == '__main__':
  main(sys.argv[1:])
