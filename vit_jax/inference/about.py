"""Describes a served model for visitors: what it was trained on, and how good its answers are."""

from collections.abc import Mapping
import pathlib
import re

from vit_jax.experiment import Experiment
from vit_jax.inference.card import source_text
from vit_jax.names import one_line
from vit_jax.workdir import read_json

SHOWN = 30  # maximum number of class names


def about(exp: Experiment, step: int | None, workdir: pathlib.Path | None) -> dict[str, str]:
  """Returns what visitors of the page must know about a model, as `{title: Markdown text}`.

  Args:
    exp: the experiment of the weights.
    step: step of the checkpoint; None for weights without a run.
    workdir: folder of the run. Its `eval.json`, if there is one, contains the accuracy. None for
      weights without a run.
  """
  measured = (read_json(workdir / 'eval.json') if workdir else None) or {}
  # Use only an accuracy that was measured on the same step, data and image size as the page.
  own = measured.get('step') == step and not measured.keys() & {'max_patches', 'overrides'}
  own = own and measured.get('source') == exp.config.data.source
  height, width = exp.task.stored_size
  trained = source_text(exp.config.data, exp.task.train_examples)
  return {
    'Classes': classes_text(exp),
    'Images': f'The model sees an image at {height} x {width} pixels. Smaller details are lost.',
    'Accuracy': accuracy_sentence(measured if own else {}, exp.task.multi_label),
    'Probabilities': probabilities_text(exp),
    'Training data': f'{trained}.' if exp.task.train_examples else 'Unknown.',
  }


def escaped(text: str) -> str:
  """Returns a text in which Markdown's special characters and line breaks are escaped."""
  return re.sub(r'([!-/:-@\[-`{-~])', r'\\\1', one_line(text))


def classes_text(exp: Experiment) -> str:
  """Returns sentences that list the classes and describe the answer for any other image."""
  names = exp.task.class_names
  more = f' and {len(names) - SHOWN:,} more' if len(names) > SHOWN else ''
  listed = (
    f'The model knows {len(names):,} classes: {", ".join(map(escaped, names[:SHOWN]))}{more}.'
  )
  if exp.task.multi_label:
    return f'{listed} An image of anything else can still get some of these labels.'
  return f'{listed} An image of anything else still gets one of these classes.'


def accuracy_sentence(measured: Mapping[str, object], multi_label: bool) -> str:
  """Returns a sentence with the measured accuracy, or one that explains how to measure it.

  Args:
    measured: contents of `eval.json`; empty if the accuracy was not measured.
    multi_label: whether images can have several labels. The measure is then the mean average
      precision.
  """
  try:
    on = f'on the {measured["examples"]:,} images of `{one_line(measured["split"])}`'
    if multi_label:
      return f'{measured["mean_average_precision"]:.2%} mean average precision {on}.'
    low, high = measured['accuracy_interval']
    return f'{measured["accuracy"]:.2%} {on}. The 95% interval is {low:.2%} to {high:.2%}.'
  except (KeyError, TypeError, ValueError):  # the file is missing or damaged
    return 'Not measured for this checkpoint. Run `--mode=eval` to measure it.'


def probabilities_text(exp: Experiment) -> str:
  """Returns a sentence on how probabilities are calibrated, or on how thresholds give labels."""
  found = exp.calibration
  on = f'{found.examples:,} validation images'
  if exp.task.multi_label:
    chosen = f'The thresholds were chosen on {on}' if found.thresholds else 'The threshold is 0.5'
    return f'An image gets each label whose probability reaches a threshold. {chosen}.'
  if found.examples:
    return f'They are calibrated on {on}, with the temperature {found.temperature:.4g}.'
  return 'They are not calibrated: 90% does not mean that 9 of 10 such answers are right.'
