"""Opens splits for a trained model, with images resized as in the training of this model."""

from collections.abc import Mapping
import dataclasses
import logging
import pathlib

from vit_jax import config as config_lib
from vit_jax.bucket import to_path
from vit_jax.data import (
  Source,
  Split,
  check_memory,
  decide_cache,
  multi_hot,
  open_source,
  open_split,
  report_split,
  unlabelled,
)
from vit_jax.experiment import Experiment
from vit_jax.names import abridged, assumed, difference, pair, same_classes
from vit_jax.opening import Request
from vit_jax.splitting import numbered
from vit_jax.workdir import (
  TrainingFiles,
  check_untrained,
  leave_out_trained,
  open_validation,
  restore_item,
)

log = logging.getLogger(__name__)


def request_for(
  workdir: str | pathlib.Path | None,
  init: str | pathlib.Path,
  step: str | int,
  overrides: Mapping[str, object] | None,
  classes: str | pathlib.Path | None,
  max_patches: int | None,
) -> Request:
  """Returns the request for a model that is named by the arguments of a public function.

  `vit_jax.evaluate` and `vit_jax.predict` describe the arguments.

  Raises:
    ValueError: both `workdir` and `init` are given, or neither is.
  """
  if (workdir is None) == (not init):
    raise ValueError(
      f'got workdir={workdir!r} and init={str(init)!r}: set exactly one of them, and the other to '
      'None. workdir is the folder of a run; init is a file, a folder or a Hugging Face Hub name.'
    )
  return Request(
    None if workdir is None else to_path(workdir),
    str(init),
    str(step),
    overrides or {},
    zero_shot=None if classes is None else to_path(classes),
    max_patches=max_patches,
  )


def check_data_given(request: Request) -> None:
  """Raises ValueError if a request names weights with `init`, but does not name a dataset."""
  if request.init and 'data.source' not in request.overrides:
    raise ValueError(
      f'init={request.init} needs a dataset here: set data.source, for example with '
      '--config.data.source=folder:photos. Or give a workdir instead of init, to use the weights '
      'and the data of a run.'
    )


def open_data(experiment: Experiment) -> Source:
  """Opens the dataset `data.source` of an experiment, and checks whether it fits the model.

  If the model has no classes, the returned dataset has no labels. If the model can give an image
  several labels, the labels of the returned dataset are multi-hot. If the names of the model's
  classes are unknown, its classes are those of the dataset, in the same order. A warning says so. A
  warning also says if different class names count as the same classes (`same_classes`).

  Raises:
    ValueError: the dataset and the model differ in their classes or in their number of channels. Or
      the dataset has several labels per image, but the model was trained with one label per image.
  """
  data, task = experiment.config.data, experiment.task
  source = open_source(data.source, data.dir, pair(data.image_size))
  source = source if task.class_names else unlabelled(source)
  count = len(source.class_names)
  if count and task.class_names == numbered(count) != source.class_names:
    log.warning(
      'The weights do not store the names of their classes. So the classes of %s are assumed to be '
      'in the order of the logits: %s.',
      data.source,
      abridged(source.class_names),
    )
  elif not same_classes(task.class_names, source.class_names):
    own, given = abridged(source.class_names), abridged(task.class_names)
    raise ValueError(
      f'{data.source} has {count} classes ({own}), but the model has '
      f'{len(task.class_names)} classes ({given}). '
      f'{difference(source.class_names, task.class_names)}. '
      'Use a dataset with the classes of the model, in the same order. To measure how well the '
      'features separate other classes, use --mode=fewshot with --config.data.source, and '
      'name the weights or the workdir in --init.'
    )
  elif source.class_names != task.class_names:
    log.warning('%s', assumed(task.class_names, source.class_names))
  if source.channels != task.channels:
    raise ValueError(
      f'The model takes images with {task.channels} channels, but the images in {data.source} have '
      f'{source.channels}. Use a dataset whose images have {task.channels} channel(s).'
    )
  if source.multi_label and not task.multi_label:
    raise ValueError(
      f'{data.source} has several labels per image, but the model was trained on images with one '
      'label. Train a model on images with several labels.'
    )
  return multi_hot(source) if task.multi_label else source


def open_test(experiment: Experiment, source: Source | None = None) -> tuple[Source, int]:
  """Opens the dataset for a test, and leaves out the files that the weights were trained on.

  Args:
    experiment: the experiment of the weights. `data.eval_split` of its config is the test split.
    source: the dataset, if it is already open. None to open the dataset of the experiment.

  Returns:
    The dataset, and the number of files in the test split that were left out.

  Raises:
    ValueError: `open_data` finds that the dataset does not fit the model. Or the weights were
      trained on all files of the test split. Or the dataset has no list of image files (e.g.
      TFDS), and the weights were trained on at least one example of the test split.
  """
  source, names = source or open_data(experiment), experiment.names
  for warning in source.warnings:
    log.warning('%s', warning)
  if names is None:
    names = TrainingFiles()
    if source.files:
      log.warning(
        'These weights were trained with vit_jax 0.1.0, which did not store the names of the '
        'training files. Some of the test images may have been used for training.'
      )
  split = experiment.config.data.eval_split
  check_untrained(source, split, names)
  return leave_out_trained(source, split, names)


def load_splits(experiment: Experiment, *parts: tuple[Source, str]) -> list[Split]:
  """Opens splits whose images are resized as in the model's training.

  Args:
    experiment: the model's experiment.
    *parts: one pair for each split to open: the dataset, and the name of the split in TFDS
      notation. All pairs have the same dataset, but different files can be left out of it in each
      pair.

  Returns:
    The splits, in the order of `parts`.

  Raises:
    ValueError: `data.cache` asks for all images in memory, but they do not fit.
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
  """Opens one split whose images are resized as in the model's training.

  Args:
    experiment: the model's experiment.
    name: the split in TFDS notation, e.g. `test[:50%]`.
    source: the dataset, if it is already open. None to open the dataset of the experiment.
  """
  return load_splits(experiment, (source or open_data(experiment), name))[0]


def load_validation(experiment: Experiment, workdir: pathlib.Path, step: int) -> Split | None:
  """Opens the validation split of a run, without the files that the weights were trained on.

  Args:
    experiment: the experiment of the weights, with the user's overrides.
    workdir: folder of the run.
    step: step number of the checkpoint with the weights.

  Returns:
    The split, or None in these cases:
    - The run has no validation split, or did not store the names of its training files.
    - The overrides name a different dataset or validation split than the run used.
    - The training split has other files or labels than in the run.
    - The run used `sweep` to search for a learning rate. After the search, such a run also trains
      on the validation split, so these images are not held out.
  """
  data, names = experiment.config.data, experiment.names
  saved = config_lib.from_dict(restore_item(workdir, step, 'config')['config'])
  same = (saved.data.source, saved.data.val_split) == (data.source, data.val_split)
  if not (same and data.val_split) or saved.sweep or names is None:
    return None
  source = open_data(experiment)
  if source.fingerprint != experiment.task.fingerprint:
    log.warning(
      'No calibration is fitted, because the list of training files or their labels differ from '
      'those of the run.'
    )
    return None
  return load_split(experiment, data.val_split, open_validation(source, data.val_split, names))
