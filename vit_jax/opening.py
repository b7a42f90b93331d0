"""Opens what a run or a mode works on: data, weights, and the experiment made of both.

experiment, training = opening.from_config(config)         # to train
experiment, params, step = opening.from_workdir(workdir)   # to use
experiment, params = opening.from_init(weights)            # published ones, as they are
"""

import dataclasses
import logging
import pathlib

from ml_collections import ConfigDict

from vit_jax import config as config_lib
from vit_jax import inherit
from vit_jax.check import check
from vit_jax.data import (
  Source,
  Split,
  check_memory,
  common_size,
  decide_cache,
  first_size,
  open_source,
  open_split,
  overlap,
  report_split,
)
from vit_jax.experiment import Experiment, Task, assemble
from vit_jax.model import pooled
from vit_jax.names import pair
from vit_jax.optim import Training, announce, plan_training
from vit_jax.weights import adapt, check_params, read_weights
from vit_jax.workdir import TrainingFiles, hash_training_files, leave_out_trained, load_checkpoint

log = logging.getLogger(__name__)


def from_config(
  config: ConfigDict,
  saved: ConfigDict | None = None,
  cycles: tuple[int, ...] = (),
  seen: TrainingFiles | None = None,
) -> tuple[Experiment, Training]:
  """Opens the data and the weights of `init`, then builds the rest.

  Args:
    config: of the run, checked.
    saved: that of the run that goes on, which decides what `init` decided; None for a new one.
    cycles: as in `Training`.
    seen: names of the files that the run that goes on was trained on.

  Raises:
    ValueError: whatever the person can mend; the message says how.
  """
  data = config.data
  source = open_source(data.source, data.dir, pair(data.image_size))
  for warning in source.warnings:
    log.warning('%s', warning)
  check_held_out(config, source)
  params = None
  if saved is not None:
    config = config_lib.fill(config, config_lib.flatten(saved))
  else:
    config, params, seen = begin_from(config, source)
  if seen is None:
    raise ValueError(
      f'data.source={data.source}: this run began under version 0.1.0, which held other files out '
      'and read files in another order: it can not be resumed. Its weights still load: train from '
      'them with --config.init=<its workdir> and another --workdir.'
    )
  size = pair(data.image_size)
  task = Task(source.class_names, size, source.channels, fingerprint=source.fingerprint)
  experiment = decided(config, task, source)
  config, size = experiment.config, experiment.task.stored_size

  def read(split, seen):
    unseen, _ = leave_out_trained(source, split, seen)
    return open_split(experiment.reading, unseen, split, size)

  train = open_split(experiment.reading, source, data.train_split, size, to_train=True)
  val = None
  if data.val_split:
    val = read(data.val_split, seen.before() if config.sweep else seen)
  test = read(data.eval_split, seen)
  for name, examples in (('train', train), ('val', val), ('test', test)):
    report_split(name, examples)
  announce(config, len(train), first_size(source, data.train_split))
  task = dataclasses.replace(experiment.task, train_examples=len(train))
  experiment = dataclasses.replace(experiment, task=task, names=seen)
  return experiment, plan_training(config, train, val, test, params, cycles)


def check_held_out(config: ConfigDict, source: Source) -> None:
  """Raises ValueError where the validation split shares examples with another one."""
  data = config.data
  if not data.val_split:
    return
  for name in ('train_split', 'eval_split'):
    if overlap(source.pieces(data.val_split), source.pieces(data[name])):
      raise ValueError(
        f'data.val_split={data.val_split!r} shares examples with data.{name}={data[name]!r}: '
        "hold a part of train out, e.g. train_split='train[:98%]', val_split='train[98%:]'."
      )


def decided(config: ConfigDict, task: Task, source: Source) -> Experiment:
  """The experiment of a run, with where its splits are kept, and at which size.

  Raises:
    ValueError: a model that can't be, or splits that do not fit into memory.
  """
  data, size = config.data, task.stored_size
  names = [split for split in (data.train_split, data.val_split, data.eval_split) if split]
  reading = assemble(config, task).reading  # a mistake in the model shows before an image is read
  cache = decide_cache(reading, source, names, size, trains=True)
  if cache == 'memory':
    size = common_size(source, data.train_split, size) or size
    check_memory(source, names, size)
  task = dataclasses.replace(task, stored_size=size)
  return assemble(config_lib.fill(config, {'data.cache': cache}), task)


def begin_from(config: ConfigDict, source: Source) -> tuple[ConfigDict, dict | None, TrainingFiles]:
  """What a new run begins with.

  Returns:
    The config with what the weights of `init` decide, these weights if there are any, and the
    names of the files that the run and those before it are trained on.
  """
  params, earlier = None, TrainingFiles()
  if config.init:
    config, params, earlier = inherit.open_init(config, source)
  # The last run of a sweep trains on the held-out split, too.
  trained_on = [config.data.train_split, *[config.data.val_split] * bool(config.sweep)]
  return config, params, hash_training_files(source, trained_on, earlier)


def from_init(
  init: str, overrides: dict[str, str], classes: str = 'weights'
) -> tuple[Experiment, dict]:
  """The experiment of published weights as they are, with their preprocessing.

  Args:
    init: all that `pretrained.load` reads.
    overrides: dotted keys and values.
    classes: of the `weights`; or a head of zeros for those of the `data`; or of `any` weights,
      which may have no head: there are no classes then, and the model gives features.

  Raises:
    ValueError: weights that can't be read or have no head, or overrides that contradict them.
  """
  config = config_lib.default_config()
  config.init = init
  config_lib.override_all(config, overrides)
  check(config)
  found, names = read_weights(init), None
  if classes == 'data':
    data = config.data
    names = open_source(data.source, data.dir, pair(data.image_size)).class_names
  elif found.fields['num_classes'] is None and classes != 'any':
    raise ValueError(
      f'{init} has no head, so it names no classes. Train one: '
      f'--config=configs/linear_probe.py --config.init={init}'
    )
  if 'data.image_size' not in overrides:
    config.data.image_size = found.preprocessing.size
  grid = inherit.grid_for(config, found) if any(config.data.image_size) else None
  count = names and len(names)
  new_head = names not in (None, found.class_names)
  loaded = adapt(found, grid, None, count, config.init_resize, tokens=False, new_head=new_head)
  loaded = dataclasses.replace(loaded, model=pooled(loaded.model))  # weights may leave it open
  expected = loaded.preprocessing
  config.data.image_size = expected.size
  for name in ('interpolation', 'crop', 'stretch'):
    if f'data.{name}' not in overrides:
      config.data[name] = getattr(expected, name)
  count = loaded.model.num_classes or 0
  names = names or loaded.class_names or [f'class {i}' for i in range(count)]
  task = Task(tuple(names), expected.size, found.channels)
  experiment = assemble(inherit.follow(config, loaded), task)
  return dataclasses.replace(experiment, names=inherit.names_of(loaded)), loaded.params


def from_workdir(
  workdir: pathlib.Path,
  overrides: dict[str, str] | None = None,
  config: ConfigDict | None = None,
  step: str = '',
) -> tuple[Experiment, dict, int]:
  """The experiment of a workdir's checkpoint, its weights and its step.

  Args:
    workdir: of a training run.
    overrides: dotted keys and values put over the workdir's own config.
    config: what the run must have been trained with, overrides included; None to trust it.
    step: which checkpoint, as in `stored.preferred`: by default the best.

  Raises:
    ValueError: no checkpoint, or a config or overrides that contradict it.
  """
  loaded, params, saved = load_checkpoint(workdir, step)
  own = config_lib.from_dict(saved['config'])
  trained_size = own.data.image_size
  if config is None:
    config = config_lib.override_all(own, overrides or {})
  else:
    config_lib.check_same_run(own, config, workdir)
  size, config.data.image_size = pair(config.data.image_size), trained_size
  check(config)
  experiment = assemble(config, Task.load(saved['task'])).at(size)
  experiment = dataclasses.replace(experiment, names=TrainingFiles.load(saved))
  check_params(experiment.model, params, experiment.image_shape[:2], workdir)
  return experiment, params, loaded


def open_model(
  workdir: pathlib.Path | None,
  init: str,
  overrides: dict[str, str],
  config: ConfigDict | None,
  classes: str = 'weights',
  step: str = '',
) -> tuple[Experiment, dict, int | None]:
  """The model of a workdir's checkpoint and its step, or that of published weights, `init`."""
  if init:
    return *from_init(init, overrides, classes), None
  return from_workdir(workdir, overrides, config, step)


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
  return leave_out_trained(source, experiment.config.data.eval_split, names)


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
