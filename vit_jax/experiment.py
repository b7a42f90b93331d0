"""Builds what a run needs from its config. The only reader of a ConfigDict.

experiment = from_config(config)             # to train
experiment, params = from_workdir(workdir)   # to evaluate, predict, draw
"""

from collections.abc import Callable
import dataclasses
import functools
import logging
import pathlib

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax

from vit_jax import augment, checkpoint, losses, optim, sharding, sources, splits, vit
from vit_jax import config as config_lib
from vit_jax.names import choose

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Task:
  """What the training data decided; travels in the checkpoint.

  Attributes:
    class_names: name of each label.
    stored_size: (height, width) that images are fitted to on the host.
    channels: 1 (grey) or 3 (RGB).
  """

  class_names: tuple[str, ...]
  stored_size: tuple[int, int]
  channels: int


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A config made concrete. `loss` and `augment` have their arguments bound."""

  config: ConfigDict
  task: Task
  model: vit.ViT
  loss: Callable[[jax.Array, jax.Array], jax.Array]
  augment: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
  normalize: Callable[[jax.Array], jax.Array]

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, C) of the model's input."""
    return (*pair(self.config.data.image_size), self.task.channels)

  def saved(self) -> dict:
    """The item `config` of a checkpoint."""
    return {'config': config_lib.to_dict(self.config), 'task': dataclasses.asdict(self.task)}


@dataclasses.dataclass(frozen=True)
class Training:
  """What training needs beside the experiment: data, steps, optimizer."""

  train: sources.Examples
  val: sources.Examples | None
  test: sources.Examples
  steps: int
  schedule: optim.Schedule
  optimizer: optax.GradientTransformation


def assemble(config: ConfigDict, task: Task) -> Experiment:
  """The model and its functions, checked on an abstract image.

  Raises:
    ValueError: a model that can't be, or does not fit the images.
  """
  fields = dict(config.model)
  if fields['patch_size'] is not None:
    fields['patch_size'] = pair(fields['patch_size'])
  fields['dtype'] = choose('model.dtype', fields['dtype'], ('float32', 'bfloat16'))
  choose('model.pool', fields['pool'], set(vit.POOLS) - {'none'})  # classes need one vector
  model = vit.make(fields.pop('variant'), len(task.class_names), **fields)
  loss = dict(config.loss)
  experiment = Experiment(
    config,
    task,
    model,
    functools.partial(choose('loss.name', loss.pop('name'), losses.LOSSES), **loss),
    functools.partial(augment.augment, arguments=config.augment.to_dict()),
    functools.partial(
      augment.normalize,
      size=pair(config.data.image_size),
      mean=config.data.mean,
      std=config.data.std,
    ),
  )
  jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *experiment.image_shape)))
  return experiment


def from_config(config: ConfigDict) -> tuple[Experiment, Training]:
  """Opens the data, then builds the rest.

  Raises:
    ValueError: whatever the person can mend; the message says how.
  """
  check(config)
  data = config.data
  source = sources.open_source(data.source, data.dir, pair(data.image_size))
  sizes = source.sizes
  if data.val_split:
    for name in ('train_split', 'eval_split'):
      if splits.overlap(data.val_split, data[name], sizes):
        raise ValueError(
          f'data.val_split={data.val_split!r} shares examples with data.{name}={data[name]!r}: '
          "hold a part of train out, e.g. train_split='train[:98%]', val_split='train[98%:]'."
        )
  blank = Task(source.class_names, pair(data.image_size), source.channels)
  assemble(config, blank)  # a mistake shows before the images are read
  read = functools.partial(sources.load, source, skip_bad_images=data.skip_bad_images)
  train = read(data.train_split, size=blank.stored_size, keep_smaller=True)
  task = dataclasses.replace(blank, stored_size=train.image_NHWC.shape[1:3])
  val = read(data.val_split, size=task.stored_size) if data.val_split else None
  test = read(data.eval_split, size=task.stored_size)
  for name, examples in (('train', train), ('val', val), ('test', test)):
    report(name, examples)

  steps_per_epoch = len(train) / config.batch_size
  steps = round(config.epochs * steps_per_epoch)
  schedule = optim.make_schedule(
    config.schedule.name,
    config.optimizer.lr,
    steps,
    warmup=min(round(config.schedule.warmup * steps_per_epoch), steps // 5),
  )
  arguments = dict(config.optimizer)
  del arguments['lr']
  optimizer = optim.make_optimizer(schedule=schedule, **arguments)
  return assemble(config, task), Training(train, val, test, steps, schedule, optimizer)


def from_workdir(
  workdir: pathlib.Path, overrides: dict[str, str] | None = None
) -> tuple[Experiment, dict, int]:
  """The experiment of a workdir's newest checkpoint, its weights and its step.

  Raises:
    ValueError: no checkpoint, or overrides that contradict it.
  """
  step, params, saved = checkpoint.load(workdir)
  config = config_lib.from_dict(saved['config'])
  for key, text in (overrides or {}).items():
    config_lib.override(config, key, text)
  task = Task(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved['task'].items()})
  experiment = assemble(config, task)
  check_params(experiment, params, workdir)
  return experiment, params, step


def check_params(experiment: Experiment, params: dict, origin: object) -> None:
  """Raises ValueError where weights don't have the names and shapes of the model."""
  init = functools.partial(experiment.model.init, jax.random.key(0))
  wanted = jax.eval_shape(init, jnp.zeros((1, *experiment.image_shape)))['params']
  wanted, given = shapes(wanted), shapes(params)
  differences = [
    f'  {name}: {given.get(name, "missing")} there, {wanted.get(name, "none")} in the model'
    for name in sorted(wanted | given)
    if wanted.get(name) != given.get(name)
  ]
  if differences:
    shown = '\n'.join(differences[:10] + ['  ...'] * (len(differences) > 10))
    raise ValueError(f'{origin}: its weights are not those of the model asked for:\n{shown}')


def shapes(tree: dict) -> dict[str, tuple[int, ...]]:
  """`{'block_0/mlp/up/kernel': (48, 192), ...}`."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  keystr = functools.partial(jax.tree_util.keystr, simple=True, separator='/')
  return {keystr(path): tuple(leaf.shape) for path, leaf in leaves}


def load_split(experiment: Experiment, split: str) -> sources.Examples:
  """A split of the experiment's data, as its model was trained to see it.

  Raises:
    ValueError: data of other classes than the model's.
  """
  data, task = experiment.config.data, experiment.task
  source = sources.open_source(data.source, data.dir, pair(data.image_size))
  if source.class_names != task.class_names:
    raise ValueError(
      f'{data.source} has the classes {", ".join(source.class_names[:5])}, ... '
      f'({len(source.class_names)}); the model was trained on '
      f'{", ".join(task.class_names[:5])}, ... ({len(task.class_names)}).'
    )
  examples = sources.load(source, split, task.stored_size, skip_bad_images=data.skip_bad_images)
  report(split, examples)
  return examples


def report(name: str, examples: sources.Examples | None) -> None:
  """Logs the size of a split, and each image left out."""
  if examples is None:
    return
  log.info('%s: %s examples', name, f'{len(examples):,}')
  if examples.skipped:
    log.warning('%s: skipped %d bad images:', name, len(examples.skipped))
    for message in examples.skipped:
      log.warning('  %s', message)


def initial_params(experiment: Experiment) -> dict | None:
  """The weights that `init` names; None where it names none.

  Raises:
    ValueError: not a workdir, or weights of another model.
  """
  origin = experiment.config.init
  if not origin:
    return None
  _, params, _ = checkpoint.load(pathlib.Path(origin).expanduser())
  check_params(experiment, params, f'init={origin}')
  log.info('Starting from the weights in %s', origin)
  return params


def pair(size: tuple[int, ...]) -> tuple[int, int]:
  """(height, width) from one number or two.

  Raises:
    ValueError: not one or two positive integers.
  """
  size = tuple(size) * (3 - len(size)) if len(size) in (1, 2) else ()
  if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
    raise ValueError(f'Expected (height, width), positive integers, got {size}.')
  return size


def check(config: ConfigDict) -> None:
  """Raises ValueError for numbers that no run can have, and for unknown names."""
  choose('optimizer.name', config.optimizer.name, optim.OPTIMIZERS)
  choose('schedule.name', config.schedule.name, optim.SCHEDULES)
  choose('augment.pad_crop.mode', config.augment.pad_crop.mode, augment.PAD_MODES)
  for key in ('epochs', 'log_every', 'eval_every', 'checkpoint_every', 'ema'):
    if config[key] < 0:
      raise ValueError(f'{key} must not be negative, got {config[key]}.')
  for key in ('batch_size', 'eval_batch_size', 'micro_batches', 'keep_checkpoints'):
    if config[key] < 1:
      raise ValueError(f'{key} must be positive, got {config[key]}.')
  if config.ema >= 1 or not np.isfinite(config.epochs):
    raise ValueError(f'Expected ema below 1 and finite epochs, got {config.ema}, {config.epochs}.')


def make_mesh(config: ConfigDict) -> jax.sharding.Mesh:
  """The mesh that the training batch divides over."""
  return sharding.make_mesh(config.batch_size, config.micro_batches)
