"""Opens the splits of a run, and decides how images are cached and resized."""

from collections.abc import Callable
import copy
import dataclasses
import functools
import logging
import pathlib

from ml_collections import ConfigDict

from vit_jax.data import (
  Reading,
  Source,
  Split,
  check_memory,
  common_size,
  decide_cache,
  differs,
  fit_image,
  identity,
  open_source,
  open_split,
  report_split,
  unlabelled,
)
from vit_jax.distributed import check_same
from vit_jax.experiment import Experiment, assemble
from vit_jax.model import Packer, native_grid, stretched
from vit_jax.optim import objective_of
from vit_jax.sizing import image_size
from vit_jax.workdir import Task, TrainingFiles, check_untrained, leave_out_trained, open_validation

log = logging.getLogger(__name__)


def open_training(config: ConfigDict) -> Source:
  """Opens the dataset of a run, and logs warnings about the dataset.

  If the objective needs no labels, the returned dataset has no labels.

  Raises:
    ValueError: the source cannot be read, or lacks the labels that the objective needs.
  """
  data = config.data
  source = open_source(data.source, data.dir, image_size(config))
  for warning in source.warnings:
    log.warning('%s', warning)
  if not objective_of(config).labels:
    return unlabelled(source)
  if not source.class_names:
    raise ValueError(
      f'data.source={data.source} has no labels, but this run learns classes. To learn from images '
      'alone, use --config=configs/mae.py. To learn classes, use folder:<path> with one folder per '
      'class, or labels:<file>.'
    )
  return source


def open_splits(
  experiment: Experiment, source: Source, seen: TrainingFiles
) -> tuple[Split, Split | None, Split]:
  """Opens the training, validation and test splits; None instead of a missing validation split.

  `seen` lists the files on which the weights were trained. These files are removed from the
  validation and test splits. The validation split has two exceptions:
    * With `sweep`, only the files on which `init` or the teacher was trained are removed. The run
      itself also trains on the validation split, after it has compared the learning rates.
    * If no file would remain, only the files on which the run itself trains are removed
      (`workdir.open_validation`).

  Raises:
    ValueError: the weights were trained on the whole test split, or the run trains on the whole
      validation split. Or the examples of the data are not single files (e.g. `tfds:`), and the
      weights were trained on a part of the test split. Or the processes have different examples.
  """
  data, size = experiment.config.data, experiment.task.stored_size
  read = functools.partial(open_split, experiment.reading, size=size)
  train, val = read(source, data.train_split, to_train=True), None
  if data.val_split:
    known = seen.before() if experiment.config.sweep else seen
    val = read(open_validation(source, data.val_split, known), data.val_split)
  check_untrained(source, data.eval_split, seen)
  test = read(leave_out_trained(source, data.eval_split, seen)[0], data.eval_split)
  found = {'train': train, 'val': val, 'test': test}
  check_same('data', identity(source, found))
  for name, examples in found.items():
    report_split(name, examples)
  return train, val, test


def named_splits(config: ConfigDict) -> list[str]:
  """Returns the splits that a run uses, the training split first."""
  data = config.data
  return [split for split in (data.train_split, data.val_split, data.eval_split) if split]


def small_size(config: ConfigDict, source: Source) -> tuple[int, int] | None:
  """Returns the (height, width) of all training images if they are smaller than the model's input.

  The images can then be stored at their own size, because the device enlarges them with a bicubic
  filter. The result is None if the images have different sizes, are not smaller, or must change
  their aspect ratio. The result is also None if the config sets a crop or another filter.
  """
  data, size = config.data, image_size(config)
  if data.crop != 1 or data.interpolation != 'bicubic':
    return None
  own = common_size(source, data.train_split, size)
  return own if own and own[0] * size[1] == own[1] * size[0] else None


def decided(
  config: ConfigDict, task: Task, source: Source, before: str | None = None
) -> Experiment:
  """Returns the experiment of a run, with the chosen `data.cache` and size of images in memory.

  Args:
    config: config of the run.
    task: properties of the data. Its `stored_size` must be the size of the model's input. In the
      result, it is the chosen size.
    source: dataset of the run.
    before: `data.cache` in the last session of the run to resume; None for a new run.

  Raises:
    ValueError: the keys do not describe a valid model, or the splits do not fit into memory. Or
      the run cannot be resumed with the given `data.cache`.
  """
  size, names = task.stored_size, named_splits(config)
  reading = assemble(config, task).reading  # reports mistakes in the model before any image is read
  kept = functools.cache(functools.partial(small_size, config, source))
  if before:
    reading = dataclasses.replace(reading, cache=cache_to_resume(reading, before, size, kept))
  cache = decide_cache(reading, source, names, size, kept)
  if cache == 'memory':
    size = kept() or size
    check_memory(source, names, size)
  if before and cache != before:
    log.info('data.cache was %s and is now %s; the batches are the same.', before, cache)
  task = dataclasses.replace(task, stored_size=size)
  config = copy.deepcopy(config)
  config.data.cache = cache
  return assemble(config, task)


def cache_to_resume(
  reading: Reading, before: str, size: tuple[int, int], kept: Callable[[], tuple[int, int] | None]
) -> str:
  """Returns `data.cache` for a run that is resumed, perhaps on a machine with less memory.

  A run may change between memory and streaming if this does not change its training batches. The
  result is then `stream` if this value is given, else `auto`. It is `auto` even if `memory` is
  given, because this machine may have less memory. If the batches would change, the given value
  must equal `before`, and is returned.

  Args:
    reading: settings for reading the splits, with the given `data.cache`.
    before: `data.cache` in the last session of the run.
    size: (height, width) that images are scaled to.
    kept: function that returns the (height, width) of the images in memory if they are smaller than
      `size`, else None.

  Raises:
    ValueError: the given value differs from `before`, and training batches would change.
  """
  given = reading.cache
  if given == before == 'stream':
    return before
  why = differs(reading, size, kept)
  if why and given != before:
    raise ValueError(
      f'data.cache={given}: this run began with data.cache={before}, and the change would give '
      f'other training batches, because {why}. Resume with --config.data.cache={before}, or start '
      'a new run in another --workdir.'
    )
  return given if why or given == 'stream' else 'auto'


def native(exp: Experiment, params: dict, max_patches: int) -> Experiment:
  """Returns the experiment for images that keep their aspect ratio (`model/patching.py`).

  Images are neither cropped nor resized to one size. Each image is resized to a grid of at most
  `max_patches` patches. The position embeddings are stretched to this grid.

  Raises:
    ValueError: the model cannot read images of different shapes in one batch.
  """
  patch = exp.model.patch_size
  model = stretched(exp.model, exp.image_shape[:2], patch)
  pack = Packer(model, params, max_patches)

  def fit(image, size):
    grid = native_grid((image.height, image.width), patch, max_patches)
    size = tuple(n * p for n, p in zip(grid, patch))
    return fit_image(image, size, exp.config.data.interpolation, stretch=True)

  task = dataclasses.replace(exp.task, stored_size=None)
  return dataclasses.replace(exp, model=model, fit=fit, pack=pack, task=task)


def numbered(count: int) -> tuple[str, ...]:
  """Returns names for classes whose real names are unknown: `class 0`, `class 1`, ..."""
  return tuple(f'class {i}' for i in range(count))


def with_data_classes(exp: Experiment, workdir: pathlib.Path, classes: str) -> Experiment:
  """Adds the classes of the config's dataset to the experiment of a run without labels.

  Raises:
    ValueError: the flag `--classes` is not 'data', so the user did not choose the classes of the
      dataset. Or the dataset has no labels.
  """
  data = exp.config.data
  if classes != 'data':
    raise ValueError(
      f'{workdir} was trained without labels, so it has no classes yet. Train a classifier: '
      f'--config=configs/finetune.py --config.init={workdir}, with labelled images and a new '
      '--workdir. Without labelled images, use --mode=predict --features=pooled, or '
      '--mode=visualize.'
    )
  source = open_source(data.source, data.dir, image_size(exp.config))
  if not source.class_names:
    raise ValueError(
      f'data.source={data.source} has no labels. Set the source to images with labels, '
      'e.g. --config.data.source=folder:photos.'
    )
  names = dict(class_names=source.class_names, multi_label=source.multi_label)
  return dataclasses.replace(exp, task=dataclasses.replace(exp.task, **names))
