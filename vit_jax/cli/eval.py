"""Defines `--mode=eval`."""

import signal

from vit_jax.cli.flags import CLUSTER, CONFIG, STEP, WORKDIR, Mode, request_of
from vit_jax.names import one_line

WORST = 5  # number of classes in the printed table


def run_eval(args) -> None:
  from vit_jax.distributed import is_first, joined
  from vit_jax.evaluation import evaluate_checkpoint

  with joined(args.coordinator, args.num_processes, args.process_id):
    # JAX intercepts SIGTERM, so that training can save a checkpoint. Evaluation ends at once.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    result = evaluate_checkpoint(request_of(args))
    if is_first():
      print(as_text(result))


def as_text(result: dict) -> str:
  """Returns all numbers as `name value`, a summary, and a table of the worst classes."""
  numbers = {name: value for name, value in result.items() if type(value) in (int, float)}
  low, high = result['accuracy_interval']
  fitted, examples = f'temperature {result["temperature"]:.4g}', result['temperature_examples']
  before = f' ({result["ece_uncalibrated"]:.2%} before' if examples else ' (no validation split: '
  before += f' {fitted}, fitted on {examples:,} validation images)' if examples else f'{fitted})'
  summary = (
    f'accuracy {result["accuracy"]:.2%} (95% interval {low:.2%} to {high:.2%}), '
    f'balanced accuracy {result["balanced_accuracy"]:.2%}, ECE {result["ece"]:.2%}{before}'
  )
  line = ', '.join(f'{name} {value:.9g}' for name, value in numbers.items())
  return '\n'.join([line, summary, *worst_classes(result['per_class'])])


def worst_classes(per_class: dict[str, dict]) -> list[str]:
  """Returns the lines of a table of the classes with the lowest F1."""
  found = [(row['f1'], name, row) for name, row in per_class.items() if row['support']]
  found = sorted(found, key=lambda item: item[0])[:WORST]
  share = lambda value: 'none' if value is None else f'{value:.2%}'
  rows = [
    (*(share(row[name]) for name in ('precision', 'recall', 'f1')), f'{row["support"]:,}', name)
    for _, name, row in found
  ]
  rows = [('precision', 'recall', 'F1', 'examples', 'class with the lowest F1'), *rows]
  return ['  '.join([*(f'{cell:>9}' for cell in row[:4]), one_line(row[4])]) for row in rows]


MODE = Mode(
  'measures how good a checkpoint is on the test split, and how far to trust it',
  '--workdir=runs/digits --step=last',
  (WORKDIR, STEP, CONFIG, *CLUSTER),
  run_eval,
)
