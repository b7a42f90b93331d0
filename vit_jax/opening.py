"""Opens the data and weights that a run or a `--mode` needs, and builds the experiment from them.

experiment, training = opening.from_config(config)         # to train
experiment, params, step = opening.from_workdir(workdir)   # to use a trained model
experiment, params = opening.from_init(weights)            # to use published weights
"""

from collections.abc import Mapping
import dataclasses
import logging
import os
import pathlib

from ml_collections import ConfigDict

from vit_jax import config as config_lib
from vit_jax import inherit
from vit_jax.check import check, check_held_out
from vit_jax.data import Source, first_size, open_source
from vit_jax.experiment import Experiment, assemble, mesh_for
from vit_jax.optim import (
  Training,
  announce,
  plan_training,
  training_weights,
  without_objective,
)
from vit_jax.sizing import check_cropping, choose_open, image_size, warn_of_few
from vit_jax.splitting import (
  decided,
  named_splits,
  native,
  numbered,
  open_splits,
  open_training,
  with_data_classes,
)
from vit_jax.weights import adapt, check_params, read_weights, with_pooling
from vit_jax.workdir import (
  Calibration,
  Task,
  TrainingFiles,
  find_training_files,
  load_checkpoint,
  report_mistakes,
)

log = logging.getLogger(__name__)

# Config keys that only training reads, or prefixes of these keys.
TRAINING_KEYS = (
  'seed', 'epochs', 'batch_size', 'micro_batches', 'log_every', 'eval_every', 'checkpoint_every',
  'keep_checkpoints', 'deterministic', 'freeze', 'adapt', 'lora.', 'classifier',
  'sweep', 'ema', 'progressive.', 'patch_sizes', 'mesh.', 'augment.', 'optimizer.', 'schedule.',
  'recipe.', 'distill.', 'loss.class_weights',
)  # fmt: skip

# Splits for published weights. (A new run instead chooses its splits from its data.)
OPEN_SPLITS = {'data.train_split': 'train', 'data.val_split': ''}


@dataclasses.dataclass(frozen=True)
class Request:
  """The trained model that a `--mode` works with.

  Attributes:
    workdir: folder of a training run; None if `init` is given.
    init: published weights instead of a workdir; anything that `vit_jax.load` reads.
    step: checkpoint of the workdir: `best`, `last` or a step number. Empty: the checkpoint with the
      best validation accuracy, or the last checkpoint if no accuracy was measured.
    overrides: dotted keys and their values as text; they override the config of the weights.
    config: config of `--config`, to which the overrides are already applied. An error is raised if
      the run in the workdir has a different config. None: any config is accepted.
    zero_shot: npz file with text embeddings of the classes, for `init` weights of CLIP or SigLIP.
      None if the weights have a head, or only features are needed.
    max_patches: maximum number of patches of an image; images then keep their aspect ratio. None:
      all images are resized to `data.image_size`.
  """

  workdir: pathlib.Path | None = None
  init: str = ''
  step: str = ''
  overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)
  config: ConfigDict | None = None
  zero_shot: pathlib.Path | None = None
  max_patches: int | None = None

  @property
  def name(self) -> str:
    """Name of the model in reports."""
    return self.init or os.path.basename(os.path.realpath(self.workdir))


def from_config(
  config: ConfigDict,
  saved: ConfigDict | None = None,
  cycles: tuple[int, ...] = (),
  seen: TrainingFiles | None = None,
) -> tuple[Experiment, Training]:
  """Opens the data and the `init` weights, and builds the `Experiment` and the `Training`.

  Args:
    config: checked config of the run.
    saved: saved config of the run to resume, which has a value for each key; None for a new run.
    cycles: last step of each earlier learning-rate cycle, as in `Training`.
    seen: training files of the run to resume; None if not recorded. Ignored for a new run.

  Raises:
    ValueError: the config, the data or the weights cannot be used; the message gives the remedy.
  """
  source = open_training(config)
  teacher, taught_on = inherit.open_teacher(config, source)
  params = None
  if saved is not None:
    config = config_lib.fill(config, config_lib.flatten(saved))
    check_held_out(config, source)
  else:
    config, params, seen = begin_from(config, source, taught_on)
  mesh_for(config)  # reports a batch size that does not fit the devices, before images are read
  data = config.data
  if seen is None:
    raise ValueError(
      f'data.source={data.source}: this run of version 0.1.0 cannot be resumed, because version '
      '0.1.0 held out different files and read the files in a different order. To use its weights, '
      'start a new run with --config.init=<workdir of this run> and a new --workdir.'
    )
  size = image_size(config)
  task = Task(source.class_names, size, source.channels, 0, source.fingerprint, source.multi_label)
  experiment = decided(config, task, source, saved and saved.data.cache)
  config = experiment.config
  if saved is None:
    report_mistakes(source, named_splits(config), config.data)
  train, val, test = open_splits(experiment, source, seen)
  if not cycles:  # the training loop announces later cycles
    announce(config, len(train), first_size(source, data.train_split))
  task = dataclasses.replace(experiment.task, train_examples=len(train))
  weight_L = training_weights(config.loss.class_weights, train, task.class_names)
  facts = dict(names=seen, teacher=teacher, weight_L=weight_L)
  experiment = dataclasses.replace(experiment, task=task, **facts)
  return experiment, plan_training(config, train, val, test, params, cycles)


def begin_from(
  config: ConfigDict, source: Source, taught_on: TrainingFiles
) -> tuple[ConfigDict, dict | None, TrainingFiles]:
  """Prepares a new run; `taught_on` are the files that the run's teacher, if any, was trained on.

  Returns:
    The completed config, the `init` weights (None without `init`), and the training files of the
    run. These include the files that the `init` weights and the teacher were trained on.
  """
  params, earlier = None, TrainingFiles()
  config = choose_open(config, source)
  check_held_out(config, source)
  if config.init:
    config, params, earlier = inherit.open_init(config, source)
  else:
    inherit.check_no_init(config)
  check(config)  # again, because values were added
  warn_of_few(config, source)
  return config, params, find_training_files(source, config, earlier.with_inherited(taught_on))


def from_init(
  init: str,
  overrides: Mapping[str, str],
  classes: str = 'weights',
  zero_shot: pathlib.Path | None = None,
) -> tuple[Experiment, dict]:
  """Builds an experiment from published weights and their preprocessing instead of from a run.

  Args:
    init: anything that `pretrained.load` reads.
    overrides: dotted config keys and their values as text.
    classes: `weights` keeps the classes of the weights. `data` uses the classes of the data; if the
      weights have different classes, a head of zeros is used. `any` is like `weights`, but accepts
      weights without a head: the model then has no classes and returns features.
    zero_shot: as in `Request`. If `classes` is `data`, the file must list each class of the data.

  Raises:
    ValueError: the weights cannot be read or have no head, or overrides contradict the weights. Or
      the file `zero_shot` does not fit the weights or the data.
  """
  config = config_lib.default_config()
  config.init = init
  config = config_lib.fill(config_lib.override_all(config, overrides), OPEN_SPLITS)
  check(config, trains=False)
  found, names = read_weights(init), None
  text = inherit.open_classes(zero_shot) if zero_shot else None
  several = found.multi_label
  if classes == 'data':
    data = config.data
    source = open_source(data.source, data.dir, image_size(config))
    names, several = source.class_names, source.multi_label
    text = text and text.matching(names, data.source, several)
  elif found.fields['num_classes'] is None and classes != 'any' and text is None:
    raise ValueError(
      f'{init} has no head and therefore no classes. Train a head: '
      f'--config=configs/linear_probe.py --config.init={init}. For weights of CLIP or SigLIP, you '
      'can instead give the text embeddings of classes with --classes.'
    )
  if 'data.image_size' not in overrides or config.data.image_size is None:
    config.data.image_size = found.preprocessing.size
  count = len(names) if names and text is None else None
  new_head = count is not None and inherit.needs_new_head(found, names)
  loaded = adapt(found, inherit.adaptation(config, found, count, new_head))
  loaded = inherit.with_classes(loaded, text) if text else with_pooling(loaded)
  if loaded.sigmoid and config.loss.name is None:
    config.loss.name = 'sigmoid'
  expected = loaded.preprocessing
  config.data.image_size = expected.size
  for name in ('interpolation', 'crop', 'stretch'):
    if f'data.{name}' not in overrides:
      config.data[name] = getattr(expected, name)
  names = names or loaded.class_names or numbered(loaded.model.num_classes or 0)
  stored = expected.stored_size or expected.size
  task = Task(tuple(names), stored, found.channels, multi_label=several)
  experiment = assemble(inherit.follow(config, loaded), task)
  facts = {'model': experiment.model.clone(examples=loaded.model.examples)}  # for a k-NN head
  facts |= {} if new_head else {'calibration': loaded.calibration}
  return dataclasses.replace(experiment, names=inherit.names_of(loaded), **facts), loaded.params


def from_workdir(
  workdir: pathlib.Path,
  overrides: Mapping[str, str] | None = None,
  config: ConfigDict | None = None,
  step: str = '',
) -> tuple[Experiment, dict, int]:
  """Opens a checkpoint of a workdir, and returns its experiment, weights and step.

  Args:
    workdir: folder of a training run.
    overrides: dotted keys and their values as text; they override the config of the workdir.
    config: a config to which the overrides are already applied. An error is raised if the run has
      a different config. None: any config is accepted.
    step: checkpoint of the workdir, as in `Request`.

  Raises:
    ValueError: no such checkpoint exists, or the config or overrides contradict the checkpoint.
  """
  loaded, params, saved = load_checkpoint(workdir, step, whole=True)
  with config_lib.naming_imports(saved):
    own = config_lib.from_dict(saved['config'])
    trained, values = (own.data.image_size, own.model.patch_size), config_lib.flatten(own)
    if config is None:
      config = config_lib.override_all(own, overrides or {})
    else:
      config_lib.check_same_run(own, config, workdir)
    config = config_lib.fill(config, values)
    asked = image_size(config), config.model.patch_size
    config.data.image_size, config.model.patch_size = trained
    check(config, trains=False)
    experiment = assemble(config, Task.load(saved['task'])).at(*asked)
    if config.model.attention == 'auto':  # use the kernel that training chose
      model = experiment.model.clone(attention=saved.get('attention', 'auto'))
      experiment = dataclasses.replace(experiment, model=model)
  facts = dict(names=TrainingFiles.load(saved), calibration=Calibration.load(saved))
  experiment = dataclasses.replace(experiment, **facts)
  own = without_objective(params)
  check_params(experiment.model, own, experiment.image_shape[:2], workdir)
  return experiment, params, loaded


def open_model(request: Request, classes: str = 'weights') -> tuple[Experiment, dict, int | None]:
  """Opens the requested model, and returns its experiment, parameters and step (None for `init`).

  A warning lists overrides that have no effect, because only training reads the overridden keys.

  Args:
    request: the model to open.
    classes: where the classes of the model come from: `weights`, `data` or `any`, as in
      `from_init`. Must be `data` or `any` for a model that was trained without labels.

  Raises:
    ValueError: the weights do not exist, or the config or overrides contradict the weights.
  """
  unread = [key for key in request.overrides if key.startswith(TRAINING_KEYS)]
  if unread and not request.config:
    log.warning('%s: no effect here, because only training reads these keys.', ', '.join(unread))
  workdir, step = request.workdir, None
  if request.init:
    exp, params = from_init(request.init, request.overrides, classes, request.zero_shot)
  elif request.zero_shot:
    raise ValueError(
      f'--classes={request.zero_shot} needs weights of CLIP or SigLIP in --init. The model of a '
      'workdir has no text encoder.'
    )
  else:
    if (init := request.overrides.get('init')) and not request.config:
      why = f'has no effect on the run in --workdir={workdir}: use --init to open other weights.'
      raise ValueError(f'--config.init={init} {why}')
    exp, params, step = from_workdir(workdir, request.overrides, request.config, request.step)
    if not exp.task.class_names and classes != 'any':
      exp = with_data_classes(exp, workdir, classes)
  if request.max_patches is not None:
    exp = native(exp, params, request.max_patches)
  own = {} if request.config else request.overrides  # --config is the run's config
  check_cropping(own, exp, from_run=not request.init)
  return exp, params, step
