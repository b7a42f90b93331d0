"""Collects the numbers and texts for the report of a run, from the data in a `Subject`."""

import pathlib

import jax

from vit_jax import config as config_lib
from vit_jax.figures.maps import Missing
from vit_jax.figures.pictures import Subject, grid
from vit_jax.workdir import read_json


def describe(subject: Subject) -> str:
  """Returns one line that describes the size of the model and of its images."""
  if isinstance(subject.exp, Missing):
    return 'Vision Transformer, no checkpoint yet'
  model, (height, width, _) = subject.exp.model, subject.exp.image_shape
  h, w = grid(subject.exp)
  return (
    f'Vision Transformer, {model.depth} blocks of width {model.width}, {model.num_heads} heads, '
    f'for images of {height} x {width} pixels in {h} x {w} patches'
  )


RESULT = {  # key in `result.json`: (name in the report, format)
  'test_mean_average_precision': ('test mean average precision', '{:.2%}'),
  'test_accuracy': ('test accuracy', '{:.2%}'),
  'test_loss': ('test loss', '{:.4f} nats'),
  'examples': ('test images', '{:,}'),
  'steps': ('training steps', '{:,}'),
  'seconds': ('seconds, including compilation', '{:,.0f}'),
}


def numbers(subject: Subject, workdir: pathlib.Path | None) -> dict[str, str]:
  """Returns the results of a run and facts about its model as `{name: text}`.

  If the run is not finished, the results are the number of steps and the latest test accuracy.

  Args:
    subject: the data of the run.
    workdir: folder of the run, which may contain `result.json`; None for published weights.
  """
  found = {}
  lines = [] if isinstance(subject.lines, Missing) else subject.lines
  last = lines[-1]['step'] if lines else 0
  tested = [line for line in lines if line['split'] == 'test' and 'accuracy' in line]
  result = (read_json(workdir / 'result.json') if workdir else None) or {}
  result = {key: value for key, value in result.items() if isinstance(value, (int, float))}
  if result.get('steps', -1) >= last:  # a smaller number is outdated: training was resumed
    known = [(result[key], *text) for key, text in RESULT.items() if key in result]
    found = {name: form.format(value) for value, name, form in known}
    # The loss of objective=masked is not in nats.
    if 'test_loss' in result and 'test_accuracy' not in result:
      found['test loss'] = f'{result["test_loss"]:.4f}'
  elif lines:
    found['training steps'] = f'{last:,}, not finished'
    if tested:
      found['test accuracy'] = f'{tested[-1]["accuracy"]:.2%} after step {tested[-1]["step"]:,}'
  if subject.step is not None:
    found['checkpoint shown'] = f'step {subject.step:,}'
  if not isinstance(subject.params, Missing):
    classes = len(subject.exp.task.class_names)
    found['parameters'] = f'{sum(leaf.size for leaf in jax.tree.leaves(subject.params)):,}'
    found['classes'] = f'{classes:,}' if classes else 'none: the model has no head'
  return found | trusted(subject)


def trusted(subject: Subject) -> dict[str, str]:
  """Returns the accuracy and the calibration of the checkpoint as `{name: text}`.

  The dict is empty if the predictions for the test split are missing.
  """
  if isinstance(subject.scores, Missing):
    return {}
  exp, scores, found = subject.exp, subject.scores, subject.trust
  low, high = found['accuracy_interval']
  fitted = 'not fitted, because there is no validation split or --mode=eval has not run'
  if exp.calibration.examples:
    fitted = f'fitted on {exp.calibration.examples:,} validation images'
  return {
    'accuracy of the checkpoint shown': f'{scores.correct_N.mean():.2%}, 95% interval '
    f'{low:.2%} to {high:.2%}',
    'balanced accuracy': f'{found["balanced_accuracy"]:.2%}',
    'expected calibration error': f'{found["ece"]:.2%}',
    'temperature': f'{found["temperature"]:.4g}, {fitted}',
  }


def class_rows(subject: Subject) -> list[tuple[str, ...]]:
  """Returns `(class, precision, recall, F1, images)` of each class as text, the lowest F1 first.

  `images` is the number of test images of the class. Classes whose F1 is undefined come last. The
  list is empty if the predictions for the test split are missing.
  """
  if isinstance(subject.scores, Missing):
    return []
  found = subject.trust
  order = lambda item: 2 if item[1]['f1'] is None else item[1]['f1']
  share = lambda value: 'not defined' if value is None else f'{value:.2%}'
  return [
    (name, share(row['precision']), share(row['recall']), share(row['f1']), f'{row["support"]:,}')
    for name, row in sorted(found['per_class'].items(), key=order)
  ]


def config_differences(
  subject: Subject, workdir: pathlib.Path | None
) -> tuple[list[tuple[str, object, object]], dict[str, object]]:
  """Returns the config keys that differ from their defaults, and the keys with default values.

  Args:
    subject: the data of the run.
    workdir: folder of the run. Its `config.json` is read if the run has no checkpoint.

  Returns:
    A list of `(key, value, default)` for the keys that differ, and a dict `{key: value}` for the
    keys that have their default value.
  """
  default = config_lib.flatten(config_lib.default_config())
  if not isinstance(subject.exp, Missing):
    config = config_lib.flatten(subject.exp.config)
  else:
    config = config_lib.flatten(read_json(workdir / 'config.json') or {})
  changed = [
    (key, value, default.get(key)) for key, value in config.items() if value != default.get(key)
  ]
  return changed, {key: value for key, value in config.items() if value == default.get(key)}
