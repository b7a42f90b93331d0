"""Defines `--mode=eval`."""

import signal

from vit_jax.cli.flags import (
  CLASSES,
  CLUSTER,
  CONFIG,
  INIT,
  MAX_PATCHES,
  STEP,
  WORKDIR,
  Mode,
  request_of,
)
from vit_jax.names import one_line

WORST = 5  # maximum number of classes in the printed table, if each image has one label

# {metric: title of its column} for the printed table. `ONE` is used if each image has one label,
# and `SEVERAL` if images can have several labels.
ONE = {'precision': 'precision', 'recall': 'recall', 'f1': 'F1', 'support': 'examples'}
SEVERAL = {'average_precision': 'average precision', 'threshold': 'threshold'} | ONE


def run_eval(args) -> None:
  from vit_jax.distributed import is_first, joined
  from vit_jax.evaluation import evaluate_checkpoint

  with joined(args.coordinator, args.num_processes, args.process_id):
    # JAX handles SIGTERM, so that training can save a checkpoint before it stops. Evaluation has
    # nothing to save, so SIGTERM ends it immediately.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    result = evaluate_checkpoint(request_of(args))
    if is_first():
      print(as_text(result))


def as_text(result: dict) -> str:
  """Formats the result of an evaluation as text: all numbers, a summary, and a table of classes.

  The table shows the five classes with the lowest F1 (`WORST`), or all classes if images can have
  several labels. For a model that was trained without labels (`objective=masked`), the summary is
  the loss, and there is no table.
  """
  numbers = {name: value for name, value in result.items() if type(value) in (int, float)}
  line = ', '.join(f'{name} {value:.9g}' for name, value in numbers.items())
  if 'per_class' not in result:  # a run without labels
    return f'{line}\nmean squared error of the hidden patches {result["loss"]:.4f}'
  several = 'mean_average_precision' in result
  summary = several_labels(result) if several else one_label(result)
  columns = SEVERAL if several else ONE
  return '\n'.join([line, summary, *class_lines(result['per_class'], columns)])


def several_labels(result: dict) -> str:
  """Returns the summary of an evaluation result for images that can have several labels."""
  examples = result['threshold_examples']
  fitted = f'fitted on {examples:,} validation images' if examples else 'not fitted: 0.5'
  return (
    f'mean average precision {result["mean_average_precision"]:.2%}, mean F1 '
    f'{result["macro_f1_at_thresholds"]:.2%} at the thresholds of the classes ({fitted}), '
    f'{result["macro_f1"]:.2%} at the threshold 0.5'
  )


def one_label(result: dict) -> str:
  """Returns the summary of an evaluation result for images that have one label each."""
  low, high = result['accuracy_interval']
  fitted, examples = f'temperature {result["temperature"]:.4g}', result['temperature_examples']
  before = f' ({result["ece_uncalibrated"]:.2%} before' if examples else ' (not fitted: '
  before += f' {fitted}, fitted on {examples:,} validation images)' if examples else f'{fitted})'
  return (
    f'accuracy {result["accuracy"]:.2%} (95% interval {low:.2%} to {high:.2%}), '
    f'balanced accuracy {result["balanced_accuracy"]:.2%}, ECE {result["ece"]:.2%}{before}'
  )


def class_lines(per_class: dict[str, dict], columns: dict[str, str]) -> list[str]:
  """Returns the lines of a table with one row for each class; classes with low F1 come first.

  Classes without examples are omitted.

  Args:
    per_class: `{name of the class: {metric: value}}`.
    columns: {metric: title of its column}, either `ONE` for images with one label each, or
      `SEVERAL`. With `ONE`, the table shows only the first five classes (`WORST`).
  """
  found = [(row['f1'], name, row) for name, row in per_class.items() if row['support']]
  found = sorted(found, key=lambda item: item[0])[: WORST if columns is ONE else None]
  share = lambda value: 'none' if value is None else f'{value:.2%}'
  show = lambda row, name: f'{row[name]:,}' if name == 'support' else share(row[name])
  last = 'class with the lowest F1' if columns is ONE else 'class'
  rows = [(*columns.values(), last)]
  rows += [(*(show(row, column) for column in columns), one_line(name)) for _, name, row in found]
  widths = [max(9, len(title)) for title in columns.values()]
  line = lambda cells, name: '  '.join([*(f'{x:>{n}}' for x, n in zip(cells, widths)), name])
  return [line(cells, name) for *cells, name in rows]


MODE = Mode(
  'measures the accuracy and the calibration of a checkpoint on the test split',
  '--workdir=runs/digits --step=last',
  (WORKDIR, INIT, STEP, CONFIG, CLASSES, MAX_PATCHES, *CLUSTER),
  run_eval,
)
