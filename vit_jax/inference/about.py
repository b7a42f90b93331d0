"""Describes a model for visitors of the demo page: its classes, training data and accuracy."""

from collections.abc import Mapping
import pathlib
import re

from vit_jax.evaluation import INPUT
from vit_jax.experiment import Experiment
from vit_jax.inference.card import source_text
from vit_jax.names import one_line
from vit_jax.workdir import read_json

SHOWN = 30  # maximum number of class names in the description


def about(
  exp: Experiment,
  step: int | None,
  workdir: pathlib.Path | None,
  overrides: Mapping[str, object] | None = None,
) -> dict[str, str]:
  """Returns what visitors of the demo page must know about the model, as `{title: Markdown text}`.

  Args:
    exp: the experiment of the weights.
    step: step number of the checkpoint; None for published weights.
    workdir: folder of the run; None for published weights. The accuracy is read from `eval.json` in
      this folder, if the file exists.
    overrides: config overrides of the page, as dotted keys and their values.
  """
  changed = {key: str(value) for key, value in (overrides or {}).items() if key.startswith(INPUT)}
  measured = (read_json(workdir / 'eval.json') if workdir else None) or {}
  # Use `eval.json` only if it was written for the page's step, dataset and config.
  own = measured.get('step') == step and 'max_patches' not in measured
  own = own and measured.get('source') == exp.config.data.source
  others = measured.get('overrides') or {}
  own = own and {key: str(value) for key, value in others.items()} == changed
  height, width = exp.task.stored_size
  trained = source_text(exp.config, exp.task.train_examples)
  return {
    'Classes': classes_text(exp),
    'Images': f'The model sees an image at {height} x {width} pixels. Finer details are lost.',
    'Accuracy': accuracy_sentence(measured if own else {}, exp.task.multi_label),
    'Probabilities': probabilities_text(exp, bool(changed)),
    'Training data': f'{trained}.' if exp.task.train_examples else 'Unknown.',
  }


def escaped(text: str) -> str:
  """Escapes line breaks and the special characters of Markdown in a text."""
  return re.sub(r'([!-/:-@\[-`{-~])', r'\\\1', one_line(text))


def classes_text(exp: Experiment) -> str:
  """Returns sentences that list the classes, and say what the model predicts for other objects."""
  names = exp.task.class_names
  more = f' and {len(names) - SHOWN:,} more' if len(names) > SHOWN else ''
  listed = (
    f'The model knows {len(names):,} classes: {", ".join(map(escaped, names[:SHOWN]))}{more}.'
  )
  if exp.task.multi_label:
    return f'{listed} An image of anything else can still get some of these labels.'
  return f'{listed} An image of anything else still gets one of these classes.'


def accuracy_sentence(measured: Mapping[str, object], multi_label: bool) -> str:
  """Returns a sentence with the measured accuracy.

  If images can have several labels, the sentence gives the mean average precision instead. If
  nothing was measured, the sentence explains how to measure the accuracy.

  Args:
    measured: contents of `eval.json`; empty if the accuracy was not measured.
    multi_label: whether images can have several labels.
  """
  try:
    on = f'on the {measured["examples"]:,} images of `{one_line(measured["split"])}`'
    if multi_label:
      return f'{measured["mean_average_precision"]:.2%} mean average precision {on}.'
    low, high = measured['accuracy_interval']
    return f'{measured["accuracy"]:.2%} {on}. The 95% interval is {low:.2%} to {high:.2%}.'
  except (KeyError, TypeError, ValueError):  # the file is missing or damaged
    return 'Not measured for this checkpoint. Run `--mode=eval` to measure it.'


def probabilities_text(exp: Experiment, changed: bool) -> str:
  """Returns a text that says how the model's probabilities were calibrated.

  If images can have several labels, the text instead says how the thresholds were chosen. The model
  predicts each label whose probability reaches its threshold.

  Args:
    exp: the experiment of the weights.
    changed: whether the page overrides config keys that change the model's output. The calibration
      was fitted without these overrides.
  """
  found = exp.calibration
  on = f'{found.examples:,} validation images'
  on += ', but without the config overrides of this page' if changed else ''
  if exp.task.multi_label:
    chosen = f'The thresholds were chosen on {on}' if found.examples else 'The threshold is 0.5'
    return f'An image gets each label whose probability reaches a threshold. {chosen}.'
  if found.examples and changed:
    return f'Not calibrated: the temperature {found.temperature:.4g} was fitted on {on}.'
  if found.examples:
    return f'Probabilities are calibrated on {on}, with the temperature {found.temperature:.4g}.'
  return 'Probabilities are not calibrated: 90% does not mean that 9 of 10 such answers are right.'
