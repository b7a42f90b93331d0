"""Checks whether a config reaches a test accuracy in less time than before, and logs the record.

    python -m benchmarks.speedrun --target=0.80 --config=configs/cifar10.py:tiny \\
        --out=runs/speed80/baseline --by=yourname --note='AdamW, 40 epochs' \\
        --config.data.source=folder:cifar10 --config.epochs=40

Rules:
  * An attempt is a config with a fixed number of epochs, trained with the seeds 0 to 4. An attempt
    counts if the mean test accuracy of the last checkpoints reaches the target.
  * The time of a run is the time of its training steps, including reading and augmenting the
    images, but without evaluation and checkpoints. The compile time is listed separately.
  * Times are comparable only on one machine, so each machine has its own record. No other program
    may run on the machine.
  * Choose settings on held-out training images (`benchmarks.sweep`), because attempts use the test
    images.

Repeating the command resumes an interrupted attempt, even days later. A record is added to
`results/speedrun.json` and to the table `results/speedrun.md`.
"""

import argparse
import os
import pathlib
import re
import statistics
import sys

from benchmarks import arguments, collect
from vit_jax import cli, storage
from vit_jax import config as config_lib
from vit_jax.check import check
from vit_jax.workdir import writer

LOG = collect.RESULTS / 'speedrun.json'
SEEDS = 5
FIXED = {'eval_every': '0', 'data.val_split': ''}  # no evaluation during training

HEADER = """# Speed runs

This page lists the fastest runs that reach a target accuracy on all test images. Accuracies are
means over {seeds} seeds, for the last checkpoint. Minutes are the time of the training steps. The
column `before` has the minutes of the previous record, and the change in percent.
`python -m benchmarks.speedrun` writes this page.

| target | machine | date | by | change | minutes | compilation | accuracy | PFLOPs | before |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def parse(argv: list[str]) -> argparse.Namespace:
  """Parses the flags; `overrides` is `FIXED`, updated with every `--config.<key>=<text>`."""
  parser = arguments.Parser(__spec__, __doc__)
  parser.add_argument('--target', required=True, type=share, help='accuracy to reach, e.g. 0.80')
  parser.add_argument('--config', required=True, help='configs/<experiment>.py[:<variant>]')
  parser.add_argument('--out', required=True, type=pathlib.Path, help='folder of this attempt')
  parser.add_argument('--by', required=True, help='name for the log')
  parser.add_argument('--note', required=True, help='change that this attempt tries, for the log')
  args, rest = parser.parse_known_args(argv)
  args.overrides = FIXED | arguments.overrides(parser, rest)
  try:
    check_attempt(args)
  except (ValueError, OSError) as error:
    parser.error(str(error).rstrip('.'))
  return args


def share(text: str) -> float:
  """Parses an accuracy between 0 and 1.

  Raises:
    argparse.ArgumentTypeError: the text is not such a number.
  """
  try:
    value = float(text)
  except ValueError:
    value = 0.0
  if not 0 < value < 1:
    raise argparse.ArgumentTypeError(f'expected an accuracy between 0 and 1, got {text!r}')
  return value


def check_attempt(args: argparse.Namespace) -> None:
  """Raises ValueError or OSError for problems that would stop an attempt or make its time wrong."""
  if 'seed' in args.overrides:
    raise ValueError(f'seed cannot be set: an attempt trains with the seeds 0 to {SEEDS - 1}')
  storage.check_folder(args.out)
  config = config_lib.override_all(cli.load_file(args.config), args.overrides)
  check(config)
  every, logged = config.checkpoint_every, config.log_every
  if config.epochs is None:
    raise ValueError('epochs is not set, but a speed run has a fixed length: set --config.epochs')
  if every is None or not logged or every % logged:
    raise ValueError(
      f'checkpoint_every={every} must be a multiple of log_every={logged}; otherwise a resumed run '
      'does not know the time between the last log line and the checkpoint'
    )


def training_seconds(workdir: pathlib.Path) -> float:
  """Returns the time of all training steps of a finished run.

  Raises:
    ValueError: the log does not cover every training step.
  """
  result = writer.read_json(workdir / 'result.json')
  lines = [line for line in writer.read_metrics(workdir) if line['split'] == 'train']
  images = result['steps'] * result['config']['batch_size']
  logged = sum(line['examples'] for line in lines)
  if logged != images:
    raise ValueError(f'{workdir}: metrics.jsonl counts {logged:,} of {images:,} trained images.')
  return sum(line['examples'] / line['images_per_second'] for line in lines)


def compile_seconds(workdir: pathlib.Path) -> float:
  """Returns the longest compile time of a training step in `log.txt`, in seconds."""
  text = (workdir / 'log.txt').read_text(encoding='utf-8')
  return max(map(float, re.findall(r'Compiled in ([\d.]+) s', text)), default=0.0)


def attempt(args: argparse.Namespace, workdirs: list[pathlib.Path]) -> dict:
  """Returns the result of finished runs, as an entry of the log."""
  results = [writer.read_json(workdir / 'result.json') for workdir in workdirs]
  seconds = [training_seconds(workdir) for workdir in workdirs]
  accuracies = [result['test_accuracy'] for result in results]
  return {
    'target': args.target,
    **collect.circumstances(),
    'by': args.by,
    'note': args.note,
    'command': collect.command(args.config, public(args.overrides)),
    'seconds': statistics.mean(seconds),
    'seconds_std': statistics.stdev(seconds),
    'compile_seconds': statistics.mean(map(compile_seconds, workdirs)),
    'accuracy': statistics.mean(accuracies),
    'accuracy_std': statistics.stdev(accuracies),
    'accuracies': accuracies,
    'steps': results[0]['steps'],
    'params': results[0]['params'],
    'flops': training_flops(workdirs[0]),
  }


def public(overrides: dict[str, str]) -> dict[str, str]:
  """Returns the overrides without paths: `data.dir` is removed, and sources keep only a name."""
  kept = {k: v for k, v in overrides.items() if k != 'data.dir' and k not in FIXED}
  source = kept.get('data.source', '')
  kind, _, path = source.partition(':')
  return kept | ({'data.source': f'{kind}:{pathlib.Path(path).name}'} if path else {})


def training_flops(workdir: pathlib.Path) -> int:
  """Returns the FLOPs of all training steps of a run."""
  from vit_jax.inference.summary import summary_of
  from vit_jax.opening import Request

  return summary_of(Request(workdir)).run_flops


def record_before(log: list[dict], entry: dict) -> dict | None:
  """Returns the fastest earlier entry for the target and machine of `entry`; None without one."""
  same = [old for old in log if all(old[key] == entry[key] for key in ('target', 'machine'))]
  return min(same, key=lambda old: old['seconds'], default=None)


def row(entry: dict) -> str:
  """Returns the line of the table for an entry of the log."""
  minutes, before = entry['seconds'] / 60, entry['before_seconds']
  saved = 'first' if before is None else f'{before / 60:.2f} ({entry["seconds"] / before - 1:+.1%})'
  cells = [
    f'{100 * entry["target"]:g}%', entry['machine'], entry['date'], entry['by'],
    f'{entry["note"]}: `{entry["command"]}`',
    f'**{minutes:.2f}** ± {entry["seconds_std"] / 60:.2f}', f'{entry["compile_seconds"]:.1f} s',
    f'{entry["accuracy"]:.2%} ± {entry["accuracy_std"]:.2%}', f'{entry["flops"] / 1e15:.3g}', saved,
  ]  # fmt: skip
  return f'| {" | ".join(cells)} |'


def verdict(entry: dict, before: dict | None) -> str:
  """Returns the reason why an attempt is not a record; empty if it is one."""
  if entry['accuracy'] < entry['target']:
    return f'the target of {entry["target"]:.2%} is not reached'
  if before and before['seconds'] <= entry['seconds']:
    return f'the record is {before["seconds"] / 60:.2f} minutes'
  return ''


def main(argv: list[str]) -> int:
  """Runs an attempt and logs it if it is a record; returns the exit code."""
  args = parse(argv)
  os.environ['JAX_ENABLE_COMPILATION_CACHE'] = 'false'  # so that each run compiles
  workdirs = [args.out / f'seed{seed}' for seed in range(SEEDS)]
  for seed, workdir in enumerate(workdirs):
    if not collect.train(args.config, args.overrides | {'seed': str(seed)}, workdir):
      print(f'{workdir}: the run failed. Fix the cause, then repeat the command to resume.')
      return 1
  entry, log = attempt(args, workdirs), (writer.read_json(LOG) or {}).get('records', [])
  before = record_before(log, entry)
  entry['before_seconds'] = before and before['seconds']
  print(row(entry))
  if why := verdict(entry, before):
    print(f'No record: {why}.')
    return 1
  writer.write_json(LOG, {'records': [*log, entry]})
  table = HEADER.format(seeds=SEEDS) + '\n'.join(map(row, [*log, entry])) + '\n'
  storage.replace(LOG.with_suffix('.md'), table)
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
