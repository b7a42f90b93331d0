"""Compares ways to adapt pre-trained weights to datasets, from 310 photos to all of CIFAR-10.

    python main.py --config=configs/folder.py:tiny --config.data.source=folder:tinyimagenet32 \\
        --config.epochs=15 --config.batch_size=256 --workdir=runs/tin
    python -m benchmarks.adaptation runs/tin cifar10 runs/adaptation

The first command pre-trains a model. The second runs the comparison and writes the results to
`results/adaptation.json`. `cifar10` is an image folder with `train/` and `test/`.

For each dataset in `DATASETS` and each seed, training images are chosen at random. Every method
uses only the chosen images for training and validation, and is tested on all test images of their
classes. A run sees at most 100,000 images in total, and each image at most 60 times. There are two
exceptions: the linear probe and the methods in `FEWSHOT` compute the features of each image once.
The probe then trains on the features for 50 epochs. `distilled` is trained like `scratch`, but with
a teacher: the `finetune` run that has the same dataset and seed. `--mode=eval` measures the
accuracies. Repeating the command resumes an interrupted comparison.
"""

import argparse
import csv
import pathlib
import random
import statistics
import subprocess
import sys

from benchmarks import arguments, collect
from vit_jax.workdir import writer

PASSES = 100_000  # maximum number of images that a run sees, counting repetitions
REPEATS = 60  # maximum number of times that a run sees an image
THREE = {'cat': 200, 'dog': 80, 'horse': 30}  # training images of the dataset `three`
DATASETS = {  # name: training images of each class
  'three': THREE,
  '1%': 50,
  '10%': 500,
  '100%': 5000,
}
FEWSHOT = {'ridge': 'ridge', 'knn': 'knn'}  # method: --classifier
METHODS = {  # name: (config, config key for weights of an earlier run, which earlier run)
  'scratch': ('configs/folder.py:tiny', '', ''),
  'finetune': ('configs/finetune.py:tiny,folder,adamw', 'init', 'pretrained'),
  'probe': ('configs/linear_probe.py:tiny,folder', 'init', 'pretrained'),
  'lora': ('configs/finetune.py:tiny,folder,lora', 'init', 'pretrained'),
  'distilled': ('configs/folder.py:tiny', 'distill.teacher', 'finetune'),
}


def chosen(folder: pathlib.Path, classes: list[str], wanted: dict | int, seed: int) -> list[tuple]:
  """Returns a dataset as rows (path, label, split), with a random choice of training images."""
  rows = []
  for name in classes:
    files = sorted((folder / 'train' / name).iterdir())
    count = wanted[name] if isinstance(wanted, dict) else wanted
    drawn = random.Random(f'{seed} {name}').sample(files, count)
    rows += [(path, name, 'train') for path in drawn]
    rows += [(path, name, 'test') for path in sorted((folder / 'test' / name).iterdir())]
  return rows


def write_labels(folder: pathlib.Path, name: str, seed: int, file: pathlib.Path) -> int:
  """Writes the labels of a dataset, and returns its number of training images."""
  wanted = DATASETS[name]
  every = sorted(path.name for path in (folder / 'train').iterdir())
  rows = chosen(folder, [*wanted] if isinstance(wanted, dict) else every, wanted, seed)
  file.parent.mkdir(parents=True, exist_ok=True)
  with file.open('w', newline='', encoding='utf-8') as lines:
    csv.writer(lines).writerows([('path', 'label', 'split'), *rows])
  return sum(row[2] == 'train' for row in rows)


def run(*flags: str) -> None:
  """Runs main.py in a separate process."""
  if subprocess.run([sys.executable, 'main.py', *flags]).returncode:
    raise SystemExit(f'A run failed. Fix the cause, then repeat the command.\n{" ".join(flags)}')


def adapt(method: str, init: pathlib.Path, labels: pathlib.Path, count: int, seed: int) -> dict:
  """Adapts the weights `init` to the dataset of the file `labels`, and tests the result.

  The workdir is in the folder of `labels`.

  Returns:
    The seed, the seconds of the run, and overall scores from `eval.json`.
  """
  workdir = labels.with_name(method)
  flags = [f'--config.data.source=labels:{labels}', f'--config.seed={seed}']
  if method in FEWSHOT:
    if not (workdir / 'result.json').exists():
      run('--mode=fewshot', f'--init={init}', f'--classifier={FEWSHOT[method]}', *flags,
          f'--out={workdir}')  # fmt: skip
  else:
    config, key, where = METHODS[method]
    weights = labels.with_name(where) if where == 'finetune' else init
    if method != 'probe':  # the probe's backbone sees every image only once
      flags.append(f'--config.epochs={min(PASSES / count, REPEATS)}')
    if key:
      flags.append(f'--config.{key}={weights}')
    run(f'--config={config}', f'--workdir={workdir}', *flags)
  if not (workdir / 'eval.json').exists():
    run('--mode=eval', f'--workdir={workdir}')
  found = writer.read_json(workdir / 'eval.json')
  kept = ('accuracy', 'accuracy_interval', 'balanced_accuracy', 'ece', 'examples', 'step')
  seconds = writer.read_json(workdir / 'result.json')['seconds']
  return {'seed': seed, 'seconds': seconds} | {key: found[key] for key in kept}


def parse(argv: list[str]) -> argparse.Namespace:
  parser = arguments.Parser(__spec__, __doc__)
  parser.add_argument('pretrained', type=pathlib.Path, help='workdir of a finished run')
  parser.add_argument('cifar10', type=pathlib.Path, help='CIFAR-10 as an image folder')
  parser.add_argument('folder', type=pathlib.Path, help='folder for the workdirs')
  parser.add_argument('--seeds', type=arguments.count, default=3, help='number of seeds: 0, 1, ...')
  args = parser.parse_args(argv)
  if not (args.pretrained / 'result.json').exists():
    parser.error(f'{args.pretrained}: no result.json, so the run is not finished')
  if not (args.cifar10 / 'train').is_dir() or not (args.cifar10 / 'test').is_dir():
    parser.error(f'{args.cifar10}: expected the folders train/ and test/')
  return args


def main(argv: list[str]) -> None:
  args = parse(argv)
  init, results = args.pretrained.resolve(), collect.RESULTS / 'adaptation.json'
  table = {}
  for seed in range(args.seeds):
    for name in DATASETS:
      place = args.folder.resolve() / f'{name.rstrip("%")}_{seed}'
      count = write_labels(args.cifar10.resolve(), name, seed, place / 'labels.csv')
      for method in (*METHODS, *FEWSHOT):
        rows = table.setdefault(name, {}).setdefault(method, [])
        rows.append(adapt(method, init, place / 'labels.csv', count, seed))
        pretraining = collect.summary('configs/folder.py:tiny --config.epochs=15', [init])
        writer.write_json(results, {'pretraining': pretraining, 'datasets': table})
  for name, methods in table.items():
    for method, rows in methods.items():
      accuracies = [row['accuracy'] for row in rows]
      spread = f' ± {statistics.stdev(accuracies):.2%}' if len(rows) > 1 else ''
      print(f'{name:5} {method:9} {statistics.mean(accuracies):.2%}{spread}')


if __name__ == '__main__':
  main(sys.argv[1:])
