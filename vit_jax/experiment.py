"""Builds what a run needs from its config. The only reader of a ConfigDict.

experiment, training = from_config(config)         # to train
experiment, params, step = from_workdir(workdir)   # to evaluate, predict, draw
experiment, params = from_init(weights)            # published ones, as they are
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

from vit_jax import (
  augment,
  checkpoint,
  image,
  losses,
  optim,
  positions,
  pretrained,
  randaugment,
  sharding,
  sources,
  splits,
  vit,
  weights,
)
from vit_jax import config as config_lib
from vit_jax.names import choose
from vit_jax.weights import pair

log = logging.getLogger(__name__)


RANGES = {  # what a number may be, both ends included
  'seed': (0, 2**32 - 1),
  'epochs': (0, 1e6),
  'batch_size': (1, 1e6),
  'micro_batches': (1, 1e6),
  'eval_batch_size': (1, 1e6),
  'log_every': (0, 1e9),
  'eval_every': (0, 1e9),
  'checkpoint_every': (0, 1e9),
  'keep_checkpoints': (1, 1e6),
  'ema': (0, 0.9999999),
  'augment.pad_crop.padding': (0, 1e3),
  'augment.flip.probability': (0, 1),
  'augment.resized_crop.min_area': (0.001, 1),
  'augment.resized_crop.max_aspect': (1, 100),
  'augment.rand_augment.num_layers': (0, 100),
  'augment.rand_augment.magnitude': (0, randaugment.MAX_MAGNITUDE),
  'augment.rand_augment.mstd': (0, 100),
  'augment.rand_augment.probability': (0, 1),
  'augment.trivial_augment.probability': (0, 1),
  'augment.erasing.probability': (0, 1),
  'augment.erasing.min_area': (0, 1),
  'augment.erasing.max_area': (0, 1),
  'augment.erasing.max_aspect': (1, 100),
  'augment.mix.probability': (0, 1),
  'augment.mix.mixup_alpha': (0, 1e3),
  'augment.mix.cutmix_alpha': (0, 1e3),
  'augment.mix.switch': (0, 1),
  'augment.off_for_last': (0, 1),
  'data.crop': (0.01, 1),
  'model.norm_epsilon': (0, 1),
  'optimizer.lr': (0, 1e38),
  'optimizer.weight_decay': (0, 1e6),
  'optimizer.b1': (0, 0.9999999),
  'optimizer.b2': (0, 0.9999999),
  'optimizer.momentum': (0, 0.9999999),
  'optimizer.layer_decay': (1e-6, 1),
  'optimizer.clip': (0, 1e38),
  'schedule.warmup': (0, 1e6),
  'loss.label_smoothing': (0, 1),
}


# What the keys that `init` may decide are without it.
DEFAULTS = {'model.variant': 'B/16', 'data.mean': (0.5,), 'data.std': (0.5,)}


@dataclasses.dataclass(frozen=True)
class Task:
  """What the training data decided; travels in the checkpoint.

  Attributes:
    class_names: name of each label.
    stored_size: (height, width) that images are fitted to on the host.
    channels: 1 (grey) or 3 (RGB).
    train_examples: size of the training split, which the order of examples hangs on.
  """

  class_names: tuple[str, ...]
  stored_size: tuple[int, int]
  channels: int
  train_examples: int = 0

  @classmethod
  def load(cls, saved: dict) -> 'Task':
    """From the JSON of a checkpoint."""
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A config made concrete. `loss`, `augment` and `augment_and_mix` have their arguments bound."""

  config: ConfigDict
  task: Task
  model: vit.ViT
  loss: Callable[[jax.Array, jax.Array], jax.Array]
  augment: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
  augment_and_mix: Callable[..., tuple[jax.Array, jax.Array]]
  normalize: Callable[[jax.Array], jax.Array]
  fit: sources.Fit

  @property
  def augments(self) -> bool:
    """Whether training may change an image."""
    return bool(augment.active(self.config.augment))

  @property
  def mixes(self) -> bool:
    """Whether training mixes images, and with them the losses of their labels."""
    return augment.mixes(self.config.augment)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, C) of the model's input."""
    return (*pair(self.config.data.image_size), self.task.channels)

  def logits(self, params: dict, batch: dict, key: jax.Array | None = None) -> jax.Array:
    """Logits `[B, L]` of a batch of uint8 images.

    Args:
      params: of the model.
      batch: `image` `[B, H, W, C]`; with a key also `example` `[B]`, the positions that draws
        derive from.
      key: of what drops out in a step of training; None at inference.
    """
    if key is None:
      return self.model.apply({'params': params}, self.normalize(batch['image']))
    return self.model.apply(
      {'params': params},
      self.normalize(batch['image']),
      train=not self.config.freeze,  # what is frozen is a function that is only evaluated
      example_B=batch['example'],
      rngs={'dropout': key},
    )

  def training_loss(
    self, params: dict, batch: dict, key: jax.Array, early: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """The loss `[B]` and the logits `[B, L]` of a micro-batch, augmented and mixed.

    Args:
      params: of the model.
      batch: `image`, `label` and `example`.
      key: of the step.
      early: whether the run is yet to come to `augment.off_for_last`.
    """
    image_key, dropout_key = jax.random.split(key)
    example_B, label_B = batch['example'], batch['label']
    image_BHWC, own_B = self.augment_and_mix(image_key, example_B, batch['image'], early=early)
    logits_BL = self.logits(params, batch | {'image': image_BHWC}, dropout_key)
    loss_B = self.loss(logits_BL, label_B)
    if self.mixes:
      loss_B = own_B * loss_B + (1 - own_B) * self.loss(logits_BL, augment.partner(label_B))
    return loss_B, logits_BL

  def micro_batches(self, mesh: jax.sharding.Mesh, batch_size: int) -> int:
    """How many parts each device best takes its share of a batch in.

    Where images mix, neighbours stay together, as far as the share is of an even number.
    """
    height, width, _ = self.image_shape
    patches = (height // self.model.patch_size[0]) * (width // self.model.patch_size[1])
    together = group(self.config) if batch_size // mesh.size % 2 == 0 else 1
    return sharding.micro_batches(mesh, batch_size, patches, self.model.width, together)

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
  early_steps: int  # until `augment.off_for_last`
  schedule: optim.Schedule
  optimizer: optax.GradientTransformation
  params: dict | None  # to start from: those of `init`; None for random ones


def assemble(config: ConfigDict, task: Task) -> Experiment:
  """The model and its functions, checked on an abstract image.

  Raises:
    ValueError: a model that can't be, or does not fit the images.
  """
  config = config_lib.fill(config, DEFAULTS)
  fields = dict(config.model)
  if fields['patch_size'] is not None:
    fields['patch_size'] = pair(fields['patch_size'])
  fields['dtype'] = choose('model.dtype', fields['dtype'], ('float32', 'bfloat16'))
  if fields['pool'] is not None:
    choose('model.pool', fields['pool'], set(vit.POOLS) - {'none'})  # classes need one vector
  model = vit.make(fields.pop('variant'), len(task.class_names), **fields)
  for name in ('mean', 'std'):
    values = config.data[name]
    if len(values) not in (1, task.channels) or (name == 'std' and min(values) <= 0):
      raise ValueError(
        f'data.{name}={values}: the images have {task.channels} channel(s), so it needs 1 or '
        f'{task.channels} values{", all positive" if name == "std" else ""}.'
      )
  loss, geometry = dict(config.loss), {}
  if task.stored_size == pair(config.data.image_size):  # else images are kept small, and whole
    geometry = dict(crop=config.data.crop, stretch=config.data.stretch)
  experiment = Experiment(
    config,
    task,
    model,
    functools.partial(choose('loss.name', loss.pop('name'), losses.LOSSES), **loss),
    functools.partial(augment.augment, arguments=config.augment.to_dict()),
    functools.partial(augment.augment_and_mix, arguments=config.augment.to_dict()),
    functools.partial(
      augment.normalize,
      size=pair(config.data.image_size),
      mean=config.data.mean,
      std=config.data.std,
    ),
    functools.partial(image.fit, interpolation=config.data.interpolation, **geometry),
  )
  jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *experiment.image_shape)))
  return experiment


def from_config(config: ConfigDict, saved: ConfigDict | None = None) -> tuple[Experiment, Training]:
  """Opens the data and the weights of `init`, then builds the rest.

  Args:
    config: of the run.
    saved: the config of the run that goes on, which decides what `init` decided; None for
      a run that begins.

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
  params = None
  if saved is not None:
    config = config_lib.fill(config, config_lib.flatten(saved))
  elif config.init:
    config, params = open_init(config, source)
  blank = Task(source.class_names, pair(data.image_size), source.channels)
  read = functools.partial(sources.load, source, skip_bad_images=data.skip_bad_images)
  fit = assemble(config, blank).fit  # and a mistake shows before the images are read
  train = read(data.train_split, size=blank.stored_size, keep_smaller=True, fit=fit)
  stored_size = train.image_NHWC.shape[1:3]
  task = dataclasses.replace(blank, stored_size=stored_size, train_examples=len(train))
  experiment = assemble(config, task)
  read = functools.partial(read, size=task.stored_size, fit=experiment.fit)
  val = read(data.val_split) if data.val_split else None
  test = read(data.eval_split)
  for name, examples in (('train', train), ('val', val), ('test', test)):
    report(name, examples)
  return experiment, plan(config, train, val, test, params)


def plan(
  config: ConfigDict,
  train: sources.Examples,
  val: sources.Examples | None,
  test: sources.Examples,
  params: dict | None,
) -> Training:
  """How the config trains on these examples, from these weights.

  Raises:
    ValueError: too few epochs for a step.
  """
  steps_per_epoch = len(train) / config.batch_size
  steps = round(config.epochs * steps_per_epoch)
  if config.epochs and not steps:
    raise ValueError(
      f'epochs={config.epochs} of {len(train)} examples in batches of {config.batch_size} is no '
      'step at all: train longer or make batch_size smaller.'
    )
  schedule = optim.make_schedule(
    config.schedule.name,
    config.optimizer.lr,
    steps,
    warmup=min(round(config.schedule.warmup * steps_per_epoch), steps // 5),
  )
  arguments = dict(config.optimizer)
  del arguments['lr']
  optimizer = optim.make_optimizer(schedule=schedule, **arguments)
  early_steps = round((1 - config.augment.off_for_last) * steps)
  return Training(train, val, test, steps, early_steps, schedule, optimizer, params)


def open_init(config: ConfigDict, source: sources.Source) -> tuple[ConfigDict, dict]:
  """The weights that `init` names, for the data's classes and size, and what they decide.

  Raises:
    ValueError: no such weights, or a config that contradicts them.
  """
  found = pretrained.read(config.init)
  grid = grid_of(config, found)
  if found.channels != source.channels:
    raise ValueError(
      f'init={config.init} takes images of {found.channels} channels, those of '
      f'{config.data.source} have {source.channels}.'
    )
  classes = source.class_names
  loaded = pretrained.adapt(found, grid, None, len(classes), config.init_resize)
  log.info('Starting from the weights in %s', config.init)
  if loaded.class_names != classes:  # others, or who knows which
    log.info('The head is new: the classes are not those of the weights.')
    loaded.params['head'] = jax.tree.map(np.zeros_like, loaded.params['head'])
  return follow(config, loaded), loaded.params


def grid_of(config: ConfigDict, found: weights.Weights) -> tuple[int, int]:
  """The patches (down, across) of the config's images under the model of some weights.

  Raises:
    ValueError: images that don't divide into patches.
  """
  size, patch = pair(config.data.image_size), vit.ViT(**found.fields).patch_size
  if any(n % p for n, p in zip(size, patch)):
    raise ValueError(
      f'data.image_size={size} does not divide into the patches of init={config.init}, '
      f'{patch[0]}x{patch[1]} pixels.'
    )
  return size[0] // patch[0], size[1] // patch[1]


def follow(config: ConfigDict, loaded: pretrained.Pretrained) -> ConfigDict:
  """The config with what the weights decide.

  Raises:
    ValueError: it asks for another model; the message lists the differences.
  """
  own = {name: getattr(loaded.model, name) for name in vit.ATTRIBUTES if name in config.model}
  asked = vit.variant_fields(config.model.variant) if config.model.variant else {}
  asked |= {name: value for name, value in config.model.items() if value is not None}
  differences = [
    f'  model.{name}: {asked[name]!r} in the config, {value!r} in the weights'
    for name, value in own.items()
    if name in asked and name not in FREE and not same(name, asked[name], value, loaded.model)
  ]
  about = {'data.mean': loaded.preprocessing.mean, 'data.std': loaded.preprocessing.std}
  values = config_lib.flatten(config)
  differences += [
    f'  {key}: {tuple(values[key])} in the config, {value} in the weights'
    for key, value in about.items()
    if values[key] is not None and repeat(values[key]) != repeat(value)
  ]
  if differences:
    raise ValueError(
      f'init={config.init} is of another model than the config asks for:\n'
      + '\n'.join(differences)
      + '\nSet these keys to None, which takes those of the weights, or choose their variant.'
    )
  given = {f'model.{name}': value for name, value in own.items() if value is not None}
  return config_lib.fill(config, given | about)


def repeat(values: tuple[float, ...]) -> tuple[float, ...]:
  """One value, where all channels have the same."""
  return tuple(values[:1]) if len(set(values)) == 1 else tuple(values)


FREE = {'dropout', 'attention_dropout', 'stochastic_depth', 'dtype', 'remat'}  # of training


def same(name: str, asked: object, own: object, model: vit.ViT) -> bool:
  """Whether the config's value of an attribute is that of the weights."""
  if name == 'patch_size':
    return pair(asked) == own
  if name == 'head_dim':
    return asked == model.head_size
  if name == 'layer_scale':  # the config's is where training from scratch begins
    return own is not None
  return asked == own


def from_init(
  init: str, overrides: dict[str, str], classes: str = 'weights'
) -> tuple[Experiment, dict]:
  """The experiment of published weights as they are, with their preprocessing.

  Args:
    init: all that `pretrained.load` reads.
    overrides: dotted keys and values.
    classes: of the `weights`, or a head of zeros for those of the `data`.

  Raises:
    ValueError: weights that can't be read or have no head, or overrides that contradict them.
  """
  config = config_lib.default_config()
  config.init = init
  for key, text in overrides.items():
    config_lib.override(config, key, text)
  check(config)
  found, names = pretrained.read(init), None
  if classes == 'data':
    data = config.data
    names = sources.open_source(data.source, data.dir, pair(data.image_size)).class_names
  elif found.fields['num_classes'] is None:
    raise ValueError(
      f'{init} has no head, so it names no classes. Train one: '
      f'--config=configs/linear_probe.py --config.init={init}'
    )
  if 'data.image_size' not in overrides:
    config.data.image_size = found.preprocessing.size
  grid = grid_of(config, found) if any(config.data.image_size) else None
  loaded = pretrained.adapt(found, grid, None, names and len(names), config.init_resize)
  expected = loaded.preprocessing
  config.data.image_size = expected.size
  for name in ('interpolation', 'crop', 'stretch'):
    if f'data.{name}' not in overrides:
      config.data[name] = getattr(expected, name)
  names = names or loaded.class_names or [f'class {i}' for i in range(loaded.model.num_classes)]
  task = Task(tuple(names), expected.size, found.channels)
  return assemble(follow(config, loaded), task), loaded.params


def from_workdir(
  workdir: pathlib.Path,
  overrides: dict[str, str] | None = None,
  config: ConfigDict | None = None,
) -> tuple[Experiment, dict, int]:
  """The experiment of a workdir's newest checkpoint, its weights and its step.

  Args:
    workdir: of a training run.
    overrides: dotted keys and values put over the workdir's own config.
    config: what the run must have been trained with, overrides included; None to trust it.

  Raises:
    ValueError: no checkpoint, or a config or overrides that contradict it.
  """
  step, params, saved = checkpoint.load(workdir)
  own = config_lib.from_dict(saved['config'])
  if config is None:
    config = own
    for key, text in (overrides or {}).items():
      config_lib.override(config, key, text)
  else:
    config_lib.check_same_run(own, config, workdir)
  check(config)
  experiment = assemble(config, Task.load(saved['task']))
  pretrained.check_params(experiment.model, params, experiment.image_shape[:2], workdir)
  return experiment, params, step


def open_model(
  workdir: pathlib.Path | None,
  init: str,
  overrides: dict[str, str],
  config: ConfigDict | None,
  classes: str = 'weights',
) -> tuple[Experiment, dict]:
  """The model of a workdir, or of published weights where `init` names some."""
  if init:
    return from_init(init, overrides, classes)
  return from_workdir(workdir, overrides, config)[:2]


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
  if source.channels != task.channels:
    raise ValueError(
      f'The model takes images of {task.channels} channels, those of {data.source} have '
      f'{source.channels}.'
    )
  examples = sources.load(
    source, split, task.stored_size, skip_bad_images=data.skip_bad_images, fit=experiment.fit
  )
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


def group(config: ConfigDict) -> int:
  """How many neighbours of a batch stay on one device and in one micro-batch: those that mix."""
  return 2 if augment.mixes(config.augment) else 1


def check(config: ConfigDict) -> None:
  """Raises ValueError for numbers that no run can have, and for unknown names."""
  choose('optimizer.name', config.optimizer.name, optim.OPTIMIZERS)
  choose('optimizer.moment_dtype', config.optimizer.moment_dtype, optim.MOMENT_DTYPES)
  choose('freeze', config.freeze, optim.FREEZE)
  choose('schedule.name', config.schedule.name, optim.SCHEDULES)
  choose('init_resize', config.init_resize, positions.RESIZES)
  choose('data.interpolation', config.data.interpolation, image.INTERPOLATIONS)
  choose('augment.pad_crop.mode', config.augment.pad_crop.mode, augment.PAD_MODES)
  choose('augment.rand_augment.space', config.augment.rand_augment.space, randaugment.SPACES)
  values = config_lib.flatten(config)
  for key, (low, high) in RANGES.items():
    if values[key] is not None and not low <= values[key] <= high:  # which NaN is not either
      raise ValueError(f'{key} must be from {low:g} to {high:g}, got {values[key]}.')
  check_augment(config)
  rates = config.sweep
  if rates and not (config.freeze and config.data.val_split):
    raise ValueError(
      'sweep needs freeze=backbone and a data.val_split to choose the learning rate by, e.g. '
      "train_split='train[:98%]', val_split='train[98%:]'."
    )
  if len(set(rates)) < len(rates) or not all(rate > 0 for rate in rates):
    raise ValueError(f'sweep must be different learning rates above 0, got {tuple(rates)}.')


def check_augment(config: ConfigDict) -> None:
  """Raises ValueError for arguments of augmentations that don't fit each other."""
  erasing, mix = config.augment.erasing, config.augment.mix
  if erasing.min_area > erasing.max_area:
    raise ValueError(
      f'augment.erasing.min_area={erasing.min_area:g} is more than max_area={erasing.max_area:g}.'
    )
  if not augment.mixes(config.augment):
    return
  if not mix.mixup_alpha and not mix.cutmix_alpha:
    raise ValueError(
      f'augment.mix.probability={mix.probability:g} needs a mixup_alpha or a cutmix_alpha above 0.'
    )
  parts = config.micro_batches or 1
  if config.batch_size % (2 * parts):
    raise ValueError(
      f'augment.mix mixes neighbours in a micro-batch, and batch_size={config.batch_size} in '
      f'micro_batches={parts} leaves one without: make batch_size a multiple of {2 * parts}.'
    )


def check_same_data(experiment: Experiment, workdir: pathlib.Path) -> None:
  """Raises ValueError where a run can't go on because its data changed."""
  step = checkpoint.latest_step(workdir)
  if step is None:
    return
  saved = Task.load(checkpoint.restore_item(workdir, step, 'config')['task'])
  for field in dataclasses.fields(Task):
    before, now = getattr(saved, field.name), getattr(experiment.task, field.name)
    if before != now:
      raise ValueError(
        f'{workdir}: the data of {experiment.config.data.source} changed since this run began '
        f'({field.name} was {before}, is {now}). Bring it back, or give another --workdir.'
      )
