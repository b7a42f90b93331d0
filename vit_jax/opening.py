"""Opens what a run or a mode works on: data, weights, and the experiment made of both.

experiment, training = opening.from_config(config)         # to train
experiment, params, step = opening.from_workdir(workdir)   # to use
experiment, params = opening.from_init(weights)            # published ones, as they are
"""

from collections.abc import Mapping
import dataclasses
import logging
import pathlib

from ml_collections import ConfigDict

from vit_jax import config as config_lib
from vit_jax import inherit
from vit_jax.check import check
from vit_jax.data import (
  Source,
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
from vit_jax.workdir import (
  TrainingFiles,
  check_untrained,
  find_training_files,
  leave_out_trained,
  load_checkpoint,
)

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Request:
  """Which trained model a mode works with.

  Attributes:
    workdir: folder of a training run; None with `init`.
    init: published weights instead of a workdir, anything that `vit_jax.load` reads.
    step: which checkpoint of the workdir, as in `stored.preferred`: by default the best.
    overrides: dotted keys and their values as text, put over the config of the weights.
    config: what the run must have been trained with, overrides included; None to trust it.
  """

  workdir: pathlib.Path | None = None
  init: str = ''
  step: str = ''
  overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)
  config: ConfigDict | None = None

  @property
  def name(self) -> str:
    """What reports call the model."""
    return self.init or self.workdir.resolve().name


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
  check_untrained(source, data.eval_split, seen)
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
  return config, params, find_training_files(source, config, earlier)


def from_init(
  init: str, overrides: Mapping[str, str], classes: str = 'weights'
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
  loaded = adapt(found, grid, None, count, config.init_resize, new_head=new_head)
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
  overrides: Mapping[str, str] | None = None,
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
  with config_lib.naming_imports(saved):
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


def open_model(request: Request, classes: str = 'weights') -> tuple[Experiment, dict, int | None]:
  """The experiment, the parameters and the step that a request asks for; no step for `init`.

  Args:
    request: which model.
    classes: of `init`, as in `from_init`.

  Raises:
    ValueError: no such weights, or a config or overrides that contradict them.
  """
  if request.init:
    return *from_init(request.init, request.overrides, classes), None
  return from_workdir(request.workdir, request.overrides, request.config, request.step)
