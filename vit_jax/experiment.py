"""Builds the model, the data, the optimizer and the mesh of a run from its config.

experiment, training = from_config(config)         # to train
experiment, params, step = from_workdir(workdir)   # to evaluate, predict, draw
experiment, params = from_init(weights)            # published ones, as they are
"""

from collections.abc import Callable, Sequence
import copy
import dataclasses
import functools
import itertools
import logging
import math
import pathlib

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax

import vit_jax
from vit_jax import (
  augment,
  checkpoint,
  cluster,
  image,
  inherit,
  losses,
  memory,
  optim,
  pretrained,
  real,
  sharding,
  sources,
  splits,
  stream,
  trained,
  vit,
)
from vit_jax import config as config_lib
from vit_jax.check import check
from vit_jax.names import choose
from vit_jax.paths import local
from vit_jax.weights import pair

log = logging.getLogger(__name__)

FEW_STEPS = 100  # of training; with fewer, a person is warned

Split = memory.Examples | stream.Stream
# The last step of each part of a run, and the (height, width) of its images.
Stages = tuple[tuple[int, tuple[int, int]], ...]

LATER_PEAK = 0.5  # of `optimizer.lr`, to which a cycle that more epochs add warms up

# What the keys that `init` may decide are without it.
DEFAULTS = {'model.variant': 'B/16', 'data.mean': (0.5,), 'data.std': (0.5,)}


@dataclasses.dataclass(frozen=True)
class Task:
  """What the training data decided; travels in the checkpoint.

  Attributes:
    class_names: name of each label; none where weights without a head are looked at.
    stored_size: (height, width) that images are fitted to on the host.
    channels: 1 (grey) or 3 (RGB).
    train_examples: size of the training split, which the order of examples hangs on.
    fingerprint: of the names and labels in the source's `train`; empty where unknown.
  """

  class_names: tuple[str, ...]
  stored_size: tuple[int, int]
  channels: int
  train_examples: int = 0
  fingerprint: str = ''

  @classmethod
  def load(cls, saved: dict) -> 'Task':
    """From the JSON of a checkpoint."""
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A config made concrete. `loss`, `augment` and `augment_and_mix` have their arguments bound.

  `names` is of the files that the weights were trained on; None where a run kept none.
  """

  config: ConfigDict
  task: Task
  model: vit.ViT
  loss: Callable[[jax.Array, jax.Array], jax.Array]
  augment: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
  augment_and_mix: Callable[..., tuple[jax.Array, jax.Array]]
  normalize: Callable[[jax.Array], jax.Array]
  fit: image.Fit
  names: trained.Names | None = dataclasses.field(default_factory=trained.Names)

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

  def at(self, size: tuple[int, int]) -> 'Experiment':
    """The same, of the same parameters, seeing all images at another size (height, width).

    Positions stay those of the old size, stretched over the new one's patches. Files are fitted to
    the new size, where they were to the old.
    """
    own = pair(self.config.data.image_size)
    if size == own:
      return self
    config = copy.deepcopy(self.config)
    config.data.image_size = size
    config.progressive.sizes = config.progressive.until = ()
    grid = tuple(n // patch for n, patch in zip(own, self.model.patch_size))
    stored_size = size if self.task.stored_size == own else self.task.stored_size
    return dataclasses.replace(
      self,
      config=config,
      task=dataclasses.replace(self.task, stored_size=stored_size),
      model=self.model.clone(position_grid=self.model.position_grid or grid),
      normalize=functools.partial(self.normalize, size=size),
    )

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
    self, params: dict, batch: dict, key: jax.Array, early: jax.Array | None
  ) -> tuple[jax.Array, jax.Array]:
    """The loss `[B]` and the logits `[B, L]` of a micro-batch, augmented and mixed.

    Args:
      params: of the model.
      batch: `image`, `label` and `example`.
      key: of the step.
      early: whether the step has strong augmentations; None: all steps have them.
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
    together = group(self.config) if batch_size // sharding.shares(mesh) % 2 == 0 else 1
    return sharding.micro_batches(mesh, batch_size, patches, self.model.width, together)

  def saved(self) -> dict:
    """What a checkpoint holds of it; see `Checkpoints.save`."""
    return {
      'version': vit_jax.__version__,
      'config': config_lib.to_dict(self.config),
      'task': dataclasses.asdict(self.task),
      'names': self.names.item(),
    }


@dataclasses.dataclass(frozen=True)
class Training:
  """What training needs beside the experiment: data, steps, optimizer."""

  train: Split
  val: Split | None
  test: Split
  steps: int
  cycles: tuple[int, ...]  # the last steps of the earlier cycles, to which more epochs added one
  early_steps: int  # with strong augmentations: until `augment.off_for_last` of the first cycle
  stages: Stages
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
  model = vit.make(fields.pop('variant'), len(task.class_names) or None, **fields)
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
  arguments = config.augment.to_dict()
  if config.data.cache == 'stream':  # the file is cropped, while it is decoded
    arguments['resized_crop']['min_area'] = augment.AUGMENTATIONS['resized_crop'].off
  experiment = Experiment(
    config,
    task,
    model,
    functools.partial(choose('loss.name', loss.pop('name'), losses.LOSSES), **loss),
    functools.partial(augment.augment, arguments=arguments),
    functools.partial(augment.augment_and_mix, arguments=arguments),
    functools.partial(
      augment.normalize,
      size=pair(config.data.image_size),
      mean=config.data.mean,
      std=config.data.std,
    ),
    functools.partial(image.fit, interpolation=config.data.interpolation, **geometry),
  )
  jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *experiment.image_shape)))
  for _, size in stages(config, 0):
    if any(n % patch for n, patch in zip(size, model.patch_size)):
      raise ValueError(
        f'progressive.sizes: images of {size[0]}x{size[1]} pixels do not divide into patches of '
        f'{model.patch_size[0]}x{model.patch_size[1]}.'
      )
  return experiment


def from_config(
  config: ConfigDict,
  saved: ConfigDict | None = None,
  cycles: tuple[int, ...] = (),
  seen: trained.Names | None = None,
) -> tuple[Experiment, Training]:
  """Opens the data and the weights of `init`, then builds the rest.

  Args:
    config: of the run.
    saved: the config of the run that goes on, which decides what `init` decided; None for
      a run that begins.
    cycles: as in `Training`.
    seen: names of the files that the run that goes on was trained on.

  Raises:
    ValueError: whatever the person can mend; the message says how.
  """
  check(config)
  data = config.data
  source = sources.open_source(data.source, data.dir, pair(data.image_size))
  for warning in source.warnings:
    log.warning('%s', warning)
  if data.val_split:
    for name in ('train_split', 'eval_split'):
      if splits.overlap(source.pieces(data.val_split), source.pieces(data[name])):
        raise ValueError(
          f'data.val_split={data.val_split!r} shares examples with data.{name}={data[name]!r}: '
          "hold a part of train out, e.g. train_split='train[:98%]', val_split='train[98%:]'."
        )
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
  names = [split for split in (data.train_split, data.val_split, data.eval_split) if split]
  size = pair(data.image_size)
  task = Task(source.class_names, size, source.channels, fingerprint=source.fingerprint)
  assemble(config, task)  # a mistake in the model shows before an image is looked at
  config = decide_cache(config, source, names, size, trains=True)
  if config.data.cache == 'memory':
    size = memory.own_size(source, data.train_split, size) or size
    memory.check(source, names, size)
  task = dataclasses.replace(task, stored_size=size)
  experiment = dataclasses.replace(assemble(config, task), names=seen)

  def read(split, seen):
    unseen, _ = trained.leave_out(source, split, seen)
    return open_split(config, unseen, split, size, experiment.fit)

  train = open_split(config, source, data.train_split, size, experiment.fit, to_train=True)
  val = None
  if data.val_split:
    val = read(data.val_split, seen.before() if config.sweep else seen)
  test = read(data.eval_split, seen)
  for name, examples in (('train', train), ('val', val), ('test', test)):
    report(name, examples)
  announce(config, len(train), sources.first_size(source, data.train_split))
  task = dataclasses.replace(task, train_examples=len(train))
  experiment = dataclasses.replace(experiment, task=task)
  return experiment, plan(config, train, val, test, params, cycles)


def begin_from(
  config: ConfigDict, source: sources.Source
) -> tuple[ConfigDict, dict | None, trained.Names]:
  """What a new run begins with.

  Returns:
    The config with what the weights of `init` decide, these weights if there are any, and the
    names of the files that the run and those before it are trained on.
  """
  params, earlier = None, trained.Names()
  if config.init:
    config, params, earlier = inherit.open_init(config, source)
  # The last run of a sweep trains on the held-out split, too.
  trained_on = [config.data.train_split, *[config.data.val_split] * bool(config.sweep)]
  return config, params, trained.of_files(source, trained_on, earlier)


def decide_cache(
  config: ConfigDict,
  source: sources.Source,
  names: Sequence[str],
  size: tuple[int, int],
  trains: bool = False,
) -> ConfigDict:
  """The config with `data.cache` decided, if it is left open.

  Memory is taken where the splits fill no more than half of it, and where training sees the same
  batches as of a stream (`differs`): a run must not depend on the memory of its machine.
  Evaluation always sees the same pixels.

  Args:
    config: of the run.
    source: of the splits.
    names: of all splits that are held at once.
    size: (height, width) that images are fitted to.
    trains: whether the first of them is trained on.
  """
  if config.data.cache != 'auto':
    return config

  def reason():
    too_much = memory.need(source, names, size)
    return too_much or (differs(config, source, names[0], size) if trains else '')

  # Hosts may have more or less memory: the first decides.
  why = cluster.from_first(reason) if jax.distributed.is_initialized() else reason()
  cache = 'stream' if why else 'memory'
  log.info(
    'data.cache: auto takes %s: %s.', cache, why or f'{", ".join(names)} fit into half of it'
  )
  return config_lib.fill(config, {'data.cache': cache})


def differs(config: ConfigDict, source: sources.Source, split: str, size: tuple[int, int]) -> str:
  """Why training on a split in memory sees other batches than of a stream; empty if it does not.

  All else is the same on both ways: their order, how they are decoded and fitted, and what the
  device does to them.
  """
  if augment.AUGMENTATIONS['resized_crop'].on(config.augment.resized_crop):
    return 'augment.resized_crop cuts parts from the files, not from what was made of them'
  if config.data.skip_bad_images:
    return 'data.skip_bad_images puts other images in the place of bad ones'
  if own := memory.own_size(source, split, size):
    return (
      f'memory would keep all images at their {own[0]}x{own[1]} pixels and augment them there, '
      f'before the device enlarges them to {size[0]}x{size[1]}'
    )
  return ''


def open_split(
  config: ConfigDict,
  source: sources.Source,
  split: str,
  size: tuple[int, int],
  fit: image.Fit,
  to_train: bool = False,
) -> Split:
  """A split in memory or as a stream, as `data.cache` says.

  Args:
    config: its cache decided.
    source: of the split.
    split: in TFDS notation.
    size: (height, width) of what comes out.
    fit: `Experiment.fit`.
    to_train: it may be cropped at random.
  """
  data, crop = config.data, config.augment.resized_crop
  if data.cache == 'memory':
    return memory.load(source, split, size, data.skip_bad_images, fit)
  cropped = to_train and augment.AUGMENTATIONS['resized_crop'].on(crop)
  return stream.open_stream(
    source,
    split,
    size=size,
    fit=fit,
    crop=crop.to_dict() if cropped else None,
    skip_bad_images=data.skip_bad_images,
    workers=data.workers,
    threads=data.threads or stream.best_threads(data.workers),
  )


def plan(
  config: ConfigDict,
  train: Split,
  val: Split | None,
  test: Split,
  params: dict | None,
  cycles: tuple[int, ...] = (),
) -> Training:
  """How the config trains on these examples, from these weights, after earlier cycles.

  Raises:
    ValueError: too few epochs for a step.
  """
  return Training(train, val, test, params=params, **recipe(config, len(train), cycles))


def recipe(config: ConfigDict, examples: int, cycles: tuple[int, ...] = ()) -> dict:
  """The fields of `Training` that depend on the config and the number of training examples.

  The first cycle is the run as it was begun. Each later one warms up to `LATER_PEAK` of the
  learning rate, then decays like the first; its images are of full size, cropped and flipped only.

  Args:
    config: of the run.
    examples: in the training split.
    cycles: as in `Training`.

  Raises:
    ValueError: too few epochs for a step.
  """
  steps = length(config, examples)
  if config.epochs and not steps:
    raise ValueError(
      f'epochs={config.epochs} of {examples} examples in batches of {config.batch_size} is no '
      'step at all: train longer or make batch_size smaller.'
    )
  arguments = dict(config.optimizer)
  peak, schedules = arguments.pop('lr'), []
  for begin, end in itertools.pairwise((0, *cycles, steps)):
    warmup = warmup_steps(config, examples, end - begin)
    schedules.append(optim.make_schedule(config.schedule.name, peak, end - begin, warmup))
    peak = LATER_PEAK * config.optimizer.lr
  schedule = optax.join_schedules(schedules, cycles) if cycles else schedules[0]
  first = (*cycles, steps)[0]
  return {
    'steps': steps,
    'cycles': cycles,
    'early_steps': round((1 - config.augment.off_for_last) * first),
    'stages': (*stages(config, first)[:-1], (steps, pair(config.data.image_size))),
    'schedule': schedule,
    'optimizer': optim.make_optimizer(schedule=schedule, **arguments),
  }


def stages(config: ConfigDict, steps: int) -> Stages:
  """The parts of a run of so many steps, by the size of its images.

  Raises:
    ValueError: a size whose width, in proportion, is no whole number.
  """
  height, width = pair(config.data.image_size)
  found = []
  for share, size in zip(config.progressive.until, config.progressive.sizes):
    across, rest = divmod(size * width, height)
    if rest:
      raise ValueError(
        f'progressive.sizes: {size} of images of {height}x{width} pixels leaves a width of '
        f'{size * width / height:g}.'
      )
    found.append((round(share * steps), (size, across)))
  return (*found, (steps, (height, width)))


def length(config: ConfigDict, examples: int) -> int:
  """Number of steps of a run on so many training examples."""
  return round(config.epochs * (examples / config.batch_size))


def warmup_steps(config: ConfigDict, examples: int, steps: int) -> int:
  """Number of warm-up steps in a cycle of so many steps."""
  return min(round(config.schedule.warmup * (examples / config.batch_size)), steps // 5)


def announce(config: ConfigDict, examples: int, found: tuple[int, int] | None) -> None:
  """Logs how long a run is, and warns where it is too short to learn much.

  Args:
    config: of the run.
    examples: that it trains on.
    found: (height, width) of the first of them as it was found; None where unknown.
  """
  steps = length(config, examples)
  if not steps:
    return
  size, batch_size = pair(config.data.image_size), config.batch_size
  own = '' if found in (None, size) else ' (the first file has {}x{})'.format(*found)
  log.info(
    'Training on %s images of %dx%d pixels%s: %s steps in batches of %d, %d of them warm-up.',
    f'{examples:,}', *size, own, f'{steps:,}', batch_size,
    warmup_steps(config, examples, steps),
  )  # fmt: skip
  if steps < FEW_STEPS:
    smaller = int(config.epochs * examples / FEW_STEPS)
    ways = [f'a smaller batch_size (e.g. {smaller})'] * (smaller > 0)
    ways.append(f'more epochs (e.g. {math.ceil(FEW_STEPS * batch_size / examples)})')
    log.warning('%d steps are too few to learn much: set %s.', steps, ' or '.join(ways))


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
  found, names = pretrained.read(init), None
  if classes == 'data':
    data = config.data
    names = sources.open_source(data.source, data.dir, pair(data.image_size)).class_names
  elif found.fields['num_classes'] is None and classes != 'any':
    raise ValueError(
      f'{init} has no head, so it names no classes. Train one: '
      f'--config=configs/linear_probe.py --config.init={init}'
    )
  if 'data.image_size' not in overrides:
    config.data.image_size = found.preprocessing.size
  grid = inherit.grid_of(config, found) if any(config.data.image_size) else None
  count = names and len(names)
  new_head = names not in (None, found.class_names)
  loaded = pretrained.adapt(
    found, grid, None, count, config.init_resize, tokens=False, new_head=new_head
  )
  if loaded.model.pool == 'none':  # the weights leave it open
    pool = 'cls' if loaded.model.has_class else 'gap'
    loaded = dataclasses.replace(loaded, model=loaded.model.clone(pool=pool))
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
    step: which checkpoint, as in `checkpoint.preferred`: by default the best.

  Raises:
    ValueError: no checkpoint, or a config or overrides that contradict it.
  """
  loaded, params, saved = checkpoint.load(workdir, step)
  own = config_lib.from_dict(saved['config'])
  trained_size = own.data.image_size
  if config is None:
    config = config_lib.override_all(own, overrides or {})
  else:
    config_lib.check_same_run(own, config, workdir)
  size, config.data.image_size = pair(config.data.image_size), trained_size
  check(config)
  experiment = assemble(config, Task.load(saved['task'])).at(size)
  experiment = dataclasses.replace(experiment, names=trained.Names.load(saved))
  pretrained.check_params(experiment.model, params, experiment.image_shape[:2], workdir)
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


def open_source(experiment: Experiment) -> sources.Source:
  """The source of the experiment's data.

  Raises:
    ValueError: data of other classes or channels than the model's.
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
  return source


def open_test(
  experiment: Experiment, source: sources.Source | None = None
) -> tuple[sources.Source, int]:
  """The source without files that the weights were trained on, and their number in the test split.

  Args:
    experiment: of the weights.
    source: that `open_source` gave; None to open it.

  Raises:
    ValueError: data of other classes than the model's, or a test split trained on as a whole.
  """
  source, names = source or open_source(experiment), experiment.names
  for warning in source.warnings:
    log.warning('%s', warning)
  if names is None:
    names = trained.Names()
    if source.files:
      log.warning(
        'Version 0.1.0 trained these weights and kept no names of its training files: they may '
        'have been trained on some of the test images.'
      )
  return trained.leave_out(source, experiment.config.data.eval_split, names)


def load_splits(experiment: Experiment, *parts: tuple[sources.Source, str]) -> list[Split]:
  """Splits of the experiment's data, as its model was trained to see it.

  Args:
    experiment: of the model.
    parts: each split in TFDS notation, after what `open_source` or `open_test` gave.

  Raises:
    ValueError: more than the memory holds.
  """
  size, (source, _), names = experiment.task.stored_size, parts[0], [name for _, name in parts]
  config = decide_cache(experiment.config, source, names, size)
  if config.data.cache == 'memory':
    memory.check(source, names, size)
  found = [open_split(config, own, name, size, experiment.fit) for own, name in parts]
  for name, examples in zip(names, found):
    report(name, examples)
  return found


def load_split(experiment: Experiment, name: str, source: sources.Source | None = None) -> Split:
  """One split, of a source that is open or to be opened; see `load_splits`."""
  return load_splits(experiment, (source or open_source(experiment), name))[0]


def load_real(experiment: Experiment, split: str, source: sources.Source) -> np.ndarray | None:
  """ReaL's labels of a split of a source, bool `[N, L]`, where the config has them.

  Raises:
    ValueError: they can't be read, or are of other data.
  """
  path = experiment.config.data.real_labels
  return real.load(local(path), source, split) if path else None


def report(name: str, examples: Split | None) -> None:
  """Logs the size of a split, and each image left out."""
  if examples is None:
    return
  log.info('%s: %s examples', name, f'{len(examples):,}')
  if isinstance(examples, memory.Examples) and examples.skipped:
    log.warning('%s: skipped %d bad images:', name, len(examples.skipped))
    for message in examples.skipped:
      log.warning('  %s', message)


def group(config: ConfigDict) -> int:
  """How many neighbours of a batch stay on one device and in one micro-batch: those that mix."""
  return 2 if augment.mixes(config.augment) else 1


def make_mesh(config: ConfigDict) -> jax.sharding.Mesh:
  """Of the devices that the config asks for, and that its batch divides over.

  Raises:
    ValueError: there is none such.
  """
  return sharding.make_mesh(**division(config), shape=dict(config.mesh))


def division(config: ConfigDict) -> dict[str, int]:
  """How a batch may be divided over devices, as `sharding.make_mesh` takes it."""
  return {
    'batch_size': config.batch_size,
    'micro_batches': config.micro_batches or 1,
    'group': group(config),
  }


def check_same_data(experiment: Experiment, workdir: pathlib.Path) -> None:
  """Raises ValueError where a run can't go on because its data changed."""
  step = checkpoint.latest_step(workdir)
  if step is None:
    return
  saved = Task.load(checkpoint.restore_item(workdir, step, 'config')['task'])
  for field in dataclasses.fields(Task):
    before, now = getattr(saved, field.name), getattr(experiment.task, field.name)
    if before != now and '' not in (before, now):
      change = f'{field.name} was {before}, is {now}'
      if field.name == 'fingerprint':
        change = 'training files were renamed, or some added and as many removed'
      raise ValueError(
        f'{workdir}: the data of {experiment.config.data.source} changed since this run began '
        f'({change}). Bring it back, or give another --workdir.'
      )
