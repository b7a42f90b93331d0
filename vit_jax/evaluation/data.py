"""The data that a trained model is tested on, as its training saw it."""

import dataclasses
import logging

from vit_jax.data import (
  Source,
  Split,
  check_memory,
  decide_cache,
  open_source,
  open_split,
  report_split,
)
from vit_jax.experiment import Experiment
from vit_jax.names import pair
from vit_jax.workdir import TrainingFiles, check_untrained, leave_out_trained

log = logging.getLogger(__name__)


def open_data(experiment: Experiment) -> Source:
  """The source of the experiment's data.

  Raises:
    ValueError: data of other classes or channels than the model's.
  """
  data, task = experiment.config.data, experiment.task
  source = open_source(data.source, data.dir, pair(data.image_size))
  if source.class_names != task.class_names:
    raise ValueError(
      f'{data.source} has the classes {", ".join(source.class_names[:5])}, ... '
      f'({len(source.class_names)}); the model was trained on '
      f'{", ".join(task.class_names[:5])}, ... ({len(task.class_names)}).'
    )
  if source.channels != task.channels:
    raise ValueError(
      f'The model takes images of {task.channels} channels, those of {data.source} have '
      f'{source.channels}.'
    )
  return source


def open_test(experiment: Experiment, source: Source | None = None) -> tuple[Source, int]:
  """The source without files that the weights were trained on, and their number in the test split.

  Args:
    experiment: of the weights.
    source: that `open_source` gave; None to open it.

  Raises:
    ValueError: data of other classes than the model's, or a test split trained on as a whole.
  """
  source, names = source or open_data(experiment), experiment.names
  for warning in source.warnings:
    log.warning('%s', warning)
  if names is None:
    names = TrainingFiles()
    if source.files:
      log.warning(
        'Version 0.1.0 trained these weights and kept no names of its training files: they may '
        'have been trained on some of the test images.'
      )
  split = experiment.config.data.eval_split
  check_untrained(source, split, names)
  return leave_out_trained(source, split, names)


def load_splits(experiment: Experiment, *parts: tuple[Source, str]) -> list[Split]:
  """Splits of the experiment's data, as its model was trained to see it.

  Args:
    experiment: of the model.
    parts: each split in TFDS notation, after what `open_source` or `open_test` gave.

  Raises:
    ValueError: more than the memory holds.
  """
  size, (source, _), names = experiment.task.stored_size, parts[0], [name for _, name in parts]
  reading = experiment.reading
  reading = dataclasses.replace(reading, cache=decide_cache(reading, source, names, size))
  if reading.cache == 'memory':
    check_memory(source, names, size)
  found = [open_split(reading, own, name, size) for own, name in parts]
  for name, examples in zip(names, found):
    report_split(name, examples)
  return found


def load_split(experiment: Experiment, name: str, source: Source | None = None) -> Split:
  """One split, of a source that is open or to be opened; see `load_splits`."""
  return load_splits(experiment, (source or open_data(experiment), name))[0]
