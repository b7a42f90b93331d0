"""What pre-training is worth on CIFAR-10: fine-tuned, probed and from scratch, for the same steps.

    python main.py --config=configs/folder.py:tiny --config.data.source=folder:tinyimagenet32 \\
        --config.epochs=30 --workdir=runs/tin
    python -m benchmarks.transfer runs/tin folder:cifar10 runs/transfer

Every run takes the same images in batches of 512 for the same epochs, and a command that was cut
off goes on where it was. `scratch` and `finetuned` have the same recipe, the one for training from
scratch, and differ in `init` alone. Writes `results/transfer.json`.
"""

import json
import pathlib
import subprocess
import sys

from benchmarks import collect
from vit_jax import writer

EPOCHS = 10
SEEDS = (0, 1)
ALL = (f'--config.epochs={EPOCHS}', '--config.batch_size=512')
RUNS = {  # its config, whether it starts from the pre-trained weights, its seeds
  'probe': ('configs/linear_probe.py:tiny,folder', True, SEEDS),
  'scratch': ('configs/folder.py:tiny', False, SEEDS),
  'finetuned_adamw': ('configs/finetune.py:tiny,folder,adamw', True, SEEDS[:1]),
  'finetuned_sgd': ('configs/finetune.py:tiny,folder', True, SEEDS[:1]),
  'finetuned': ('configs/folder.py:tiny', True, SEEDS[:1]),
}


def train(
  config: str, seed: int, source: str, init: pathlib.Path | None, workdir: pathlib.Path
) -> None:
  """One run, in a process of its own; a finished one stays as it is."""
  flags = [f'--config={config}', *ALL, f'--config.seed={seed}', f'--config.data.source={source}']
  if init:
    flags.append(f'--config.init={init}')
  subprocess.run([sys.executable, 'main.py', *flags, f'--workdir={workdir}'], check=True)


def main(pretrained: str, source: str, folder: str) -> None:
  init, folder = pathlib.Path(pretrained).resolve(), pathlib.Path(folder)
  result = {'pretraining': collect.summary('configs/folder.py:tiny --config.epochs=30', [init])}
  for name, (config, starts, seeds) in RUNS.items():
    workdirs = [folder / f'{name}_{seed}' for seed in seeds]
    for seed, workdir in zip(seeds, workdirs):
      train(config, seed, source, init if starts else None, workdir)
    recipe = ' '.join((config, *ALL, *['--config.init=<pretraining>'] * starts))
    result[name] = collect.summary(recipe, workdirs)
    writer.write_json(collect.RESULTS / 'transfer.json', result)
  for name, summary in result.items():
    print(name, f'{summary["test_accuracy_mean"]:.2%}', json.dumps(summary['seeds']))


if __name__ == '__main__':
  main(*sys.argv[1:])
