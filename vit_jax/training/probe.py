"""Training the head alone: on features computed once where that is the same thing.

Decisions:
  * Where no augmentation touches the image, a frozen backbone gives the same features in every
    epoch. They are computed once, kept in `<workdir>/features/`, and the same loop trains the
    head on them. Its checkpoints hold all parameters, like those of any run.
  * A sweep trains one head for each learning rate on `data.train_split`, in
    `<workdir>/sweep/<rate>/`, and scores it on `data.val_split`. The best rate then trains on both
    splits together, in the workdir itself. The test split chooses nothing.
"""

import dataclasses
import logging
import pathlib
import shutil

import jax
import numpy as np

from vit_jax import config as config_lib
from vit_jax.distributed import from_first, is_first, replicate
from vit_jax.evaluation import cached_features, make_feature_step
from vit_jax.experiment import Experiment
from vit_jax.model import Dense
from vit_jax.optim import Training, plan_training, split_frozen
from vit_jax.training.loop import fit
from vit_jax.training.resume import begin, finished_result, record
from vit_jax.training.state import init_params
from vit_jax.workdir import held, latest_step, read_json, restore_item, write_json

log = logging.getLogger(__name__)

FEW = 50  # held-out images: with fewer, one of them decides between rates


class OnFeatures(Experiment):
  """An experiment whose batches hold features `[B, D]` in the place of images."""

  def logits(self, params: dict, batch: dict, key: jax.Array | None = None) -> jax.Array:
    """Logits `[B, L]`; nothing is random about a head."""
    head = Dense((len(self.task.class_names),))
    return head.apply({'params': params['head']}, batch['image'])

  def micro_batches(self, mesh: jax.sharding.Mesh, batch_size: int) -> int:
    """One part a device: a head is small."""
    return 1


def train_head(
  exp: Experiment,
  training: Training,
  mesh: jax.sharding.Mesh,
  workdir: pathlib.Path,
) -> dict:
  """Trains the head in a workdir that is held, at the best rate of the sweep where there is one."""
  config, notes = exp.config, {}
  training = dataclasses.replace(training, params=initial_params(exp, training, workdir))
  images = training.test
  if not exp.augments:  # what this caches is found by its content, so it may precede the checks
    exp, training = on_features(exp, training, mesh, workdir / 'features')
  record(of_all(exp, training) if config.sweep else exp, workdir, images)
  if config.sweep:
    points = sweep(exp, training, mesh, workdir)
    best = max(points, key=lambda point: point['val_accuracy'] or 0.0)
    exp, training = on_all(exp, training, best['lr'])
    notes = {'sweep': points, 'lr': best['lr']}
  return fit(exp, training, mesh, workdir, **notes)


def initial_params(exp: Experiment, training: Training, workdir: pathlib.Path) -> dict:
  """The checkpoint's, else those that `init` names, else random ones.

  The checkpoint comes first, because a backbone that has begun to be probed stays that one.
  """
  if (step := latest_step(workdir)) is not None:
    return restore_item(workdir, step, 'params')
  if training.params is not None:
    return training.params
  seed = exp.config.seed
  return jax.device_get(jax.jit(lambda: init_params(exp.model, exp.image_shape, seed))())


def on_features(
  exp: Experiment,
  training: Training,
  mesh: jax.sharding.Mesh,
  folder: pathlib.Path,
) -> tuple[OnFeatures, Training]:
  """The same experiment and training, on features that are kept in `folder`."""
  params = replicate(mesh, training.params)
  step = make_feature_step(exp, mesh)
  splits = {
    name: cached_features(exp, step, params, examples, mesh, folder)
    for name in ('train', 'val', 'test')
    if (examples := getattr(training, name)) is not None
  }
  fields = {field.name: getattr(exp, field.name) for field in dataclasses.fields(exp)}
  return OnFeatures(**fields), dataclasses.replace(training, **splits)


def sweep(
  exp: Experiment,
  training: Training,
  mesh: jax.sharding.Mesh,
  workdir: pathlib.Path,
) -> list[dict]:
  """`[{'lr': ..., 'val_accuracy': ...}, ...]` in the order of `config.sweep`.

  The accuracy of a rate that diverges is None. What is finished is not run again; once the last
  run has begun, the sweep that it began with stands.

  Raises:
    FloatingPointError: all rates diverged.
  """
  file = workdir / 'sweep.json'
  chosen = from_first(lambda: (read_json(file) or {}).get('sweep'))
  if chosen and latest_step(workdir) is not None:
    return chosen
  if len(training.val) < FEW:
    log.warning('The rates are compared on %d images only: hold out more.', len(training.val))
  points = []
  for rate in exp.config.sweep:
    try:
      accuracy = score_rate(exp, training, mesh, workdir / 'sweep' / f'{rate:g}', rate)
    except FloatingPointError as error:
      log.warning('Learning rate %g: %s', rate, error)
      accuracy = None
    points.append({'lr': rate, 'val_accuracy': accuracy})
  if all(point['val_accuracy'] is None for point in points):
    raise FloatingPointError(f'No learning rate of sweep={exp.config.sweep} trained: try smaller.')
  if is_first():
    write_json(file, {'sweep': points})
  return points


def score_rate(
  exp: Experiment,
  training: Training,
  mesh: jax.sharding.Mesh,
  folder: pathlib.Path,
  rate: float,
) -> float:
  """The held-out accuracy of one learning rate, trained in a folder of its own."""
  config = config_lib.from_dict(config_lib.to_dict(exp.config))
  config.optimizer.lr, config.sweep, config.keep_checkpoints = rate, (), 1
  exp = dataclasses.replace(exp, config=config)
  if began_with_others(folder, training.params):
    from_first(lambda: shutil.rmtree(folder))
  if result := from_first(lambda: finished_result(config, folder)):
    config_lib.check_same_run(config_lib.from_dict(result['config']), config, folder)
  else:
    splits = training.train, training.val, training.test
    plan = plan_training(config, *splits, training.params)
    with held(folder):
      begin(config, folder)
      record(exp, folder)
      result = fit(exp, plan, mesh, folder)
  # A backbone for each rate would fill the disk, and a score is all that is wanted of them.
  from_first(lambda: shutil.rmtree(folder / 'checkpoints', ignore_errors=True))
  return result['val_accuracy']


def began_with_others(folder: pathlib.Path, params: dict) -> bool:
  """Whether the run in a folder has another backbone than these weights, changed since."""
  if (step := latest_step(folder)) is None:
    return False
  theirs = split_frozen(restore_item(folder, step, 'params'), 'backbone')[1]
  ours = split_frozen(params, 'backbone')[1]
  same = jax.tree.structure(theirs) == jax.tree.structure(ours)
  return not (same and jax.tree.all(jax.tree.map(np.array_equal, theirs, ours)))


def on_all(exp: Experiment, training: Training, rate: float) -> tuple[Experiment, Training]:
  """The last run: the training and the held-out split together, at the rate chosen."""
  train, val = training.train, training.val
  both = train.joined(val)
  config = config_lib.from_dict(config_lib.to_dict(exp.config))
  config.optimizer.lr = rate
  plan = plan_training(config, both, None, training.test, training.params, training.cycles)
  return of_all(exp, training), plan


def of_all(exp: Experiment, training: Training) -> Experiment:
  """The experiment of the last run, whose checkpoints name the number of its examples."""
  count = len(training.train) + len(training.val)
  return dataclasses.replace(exp, task=dataclasses.replace(exp.task, train_examples=count))
