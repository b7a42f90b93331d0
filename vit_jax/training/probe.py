"""Trains only the head; without augmentation, the features of the images are computed once.

Decisions:
  * Without augmentation, a frozen backbone gives the same features in every epoch. So the features
    are computed once and kept in `<workdir>/features/`, and the usual loop trains the head on the
    features. Checkpoints also contain the parameters of the backbone.
  * A sweep trains one head for each learning rate on `data.train_split`, in
    `<workdir>/sweep/<rate>/`, and evaluates each head on `data.val_split`. The final run trains at
    the best rate on both splits together, in the workdir itself. The test split has no influence on
    the choice of the rate.
"""

import dataclasses
import hashlib
import logging
import pathlib

import jax
import numpy as np

from vit_jax import config as config_lib
from vit_jax.distributed import Preempted, Preemption, from_first, replicate
from vit_jax.evaluation import cached_features, make_feature_step
from vit_jax.experiment import Experiment
from vit_jax.model import Dense
from vit_jax.optim import Training, plan_training, split_frozen
from vit_jax.training.resume import begin, finished_result, record
from vit_jax.training.session import fit
from vit_jax.training.state import init_params
from vit_jax.workdir import (
  discard,
  held,
  latest_step,
  newest_config,
  read_json,
  restore_item,
  set_aside_damaged,
  write_json,
)

log = logging.getLogger(__name__)

# A sweep on fewer validation images logs a warning, because a single image can change which
# learning rate is best.
FEW = 50


class OnFeatures(Experiment):
  """An experiment whose batches contain features (`feature`, `[B, D]`) instead of images."""

  @property
  def sees_images(self) -> bool:
    return False

  def logits(self, params: dict, batch: dict, key: jax.Array | None = None) -> jax.Array:
    """Returns the head's logits `[B, L]` for the features in `batch['feature']`.

    `key` is ignored, because a head has no dropout.
    """
    head = Dense((len(self.task.class_names),))
    return head.apply({'params': params['head']}, batch['feature'])

  def micro_batches(self, mesh: jax.sharding.Mesh, batch_size: int, backward: bool = False) -> int:
    """Returns 1: training only a head needs so little memory that no batch is split."""
    return 1


def train_head(
  exp: Experiment,
  training: Training,
  mesh: jax.sharding.Mesh,
  workdir: pathlib.Path,
) -> dict:
  """Trains the head in a locked workdir, and returns the content of `result.json`.

  If the key `sweep` lists learning rates, a sweep first finds the best of them.
  """
  config, notes = exp.config, {}
  training = dataclasses.replace(training, params=initial_params(exp, training, workdir))
  images = training.test
  if not exp.augments:
    # `on_features` runs before the `record` below checks the data. It still never reads features of
    # other data, because the name of a feature file depends on the images and the weights.
    if latest_step(workdir) is None:  # saves the config before an unreadable image can end the run
      record(exp, workdir)
    exp, training = on_features(exp, training, mesh, workdir / 'features')
  record(of_all(exp, training) if config.sweep else exp, workdir, images)
  if config.sweep:
    points = sweep(exp, training, mesh, workdir)
    measure = measure_of(exp)
    best = max((p for p in points if p[measure] is not None), key=lambda p: p[measure])
    log.info('Training the final head at the best learning rate, %s.', short(best['lr']))
    exp, training = on_all(exp, training, best['lr'])
    notes = {'sweep': points, 'lr': best['lr']}
  return fit(exp, training, mesh, workdir, **notes)


def initial_params(exp: Experiment, training: Training, workdir: pathlib.Path) -> dict:
  """Returns the initial parameters of a run that trains only a head, as NumPy arrays.

  The parameters come from the newest checkpoint if there is one, because a resumed run must keep
  its backbone. Otherwise they are the weights of `init`, or random if `init` is not set.
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
  """Returns copies of `exp` and `training` whose batches contain features instead of images.

  The frozen backbone computes the features of all splits, unless `folder` already contains them.
  """
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
  """Trains a head at each learning rate of `config.sweep`; returns the validation accuracies.

  Finished heads are not trained again. If the final run already has a checkpoint, no head is
  trained, and the accuracies in `sweep.json` are returned.

  Returns:
    `[{'lr': ..., 'val_accuracy': ...}, ...]` in the order of `config.sweep`, with the name of the
    score from `measure_of`. The score is None if training diverged.

  Raises:
    FloatingPointError: training diverged at all rates.
    Preempted: the sweep was asked to stop.
  """
  file = workdir / 'sweep.json'
  chosen = from_first(lambda: (read_json(file) or {}).get('sweep'))
  if chosen and latest_step(workdir) is not None:
    return chosen
  if len(training.val) < FEW:
    log.warning(
      'Learning rates are compared on only %d validation images: choose a larger data.val_split.',
      len(training.val),
    )
  points, origin, measure = [], measured_on(exp, training), measure_of(exp)
  with Preemption() as preemption:
    for rate in exp.config.sweep:
      log.info('Training a head at learning rate %s.', short(rate))
      try:
        score = score_rate(exp, training, mesh, workdir / 'sweep' / short(rate), rate, origin)
      except FloatingPointError as error:
        log.warning('Learning rate %g: %s', rate, error)
        score = None
      points.append({'lr': rate, measure: score})
      if preemption.is_due():  # the signal came after this head's last step
        raise Preempted(f'A signal stopped the sweep after it tried learning rate {rate:g}.')
  if all(point[measure] is None for point in points):
    raise FloatingPointError(
      f'Training diverged at every learning rate of sweep={exp.config.sweep}: try smaller rates.'
    )

  def finish():
    write_json(file, {'sweep': points})
    for rate in exp.config.sweep:  # only runs that diverged still have checkpoints
      discard(workdir / 'sweep' / short(rate) / 'checkpoints')

  from_first(finish)
  return points


def measure_of(exp: Experiment) -> str:
  """Returns the name of the score by which a sweep compares learning rates."""
  return f'val_{"mean_average_precision" if exp.task.multi_label else "accuracy"}'


def short(rate: float) -> str:
  """Returns a short text for a learning rate; different rates have different texts."""
  return f'{rate:g}' if float(f'{rate:g}') == rate else repr(rate)


def score_rate(
  exp: Experiment,
  training: Training,
  mesh: jax.sharding.Mesh,
  folder: pathlib.Path,
  rate: float,
  origin: dict[str, str],
) -> float:
  """Trains a head at one learning rate, and returns its validation score.

  If the folder holds a finished head for the same backbone, no head is trained, and the saved score
  of that head is returned.

  Args:
    exp: experiment of the sweep.
    training: data and initial parameters of the sweep.
    mesh: mesh of the devices.
    folder: workdir of the run that trains this head.
    rate: the learning rate.
    origin: result of `measured_on`, the hashes of data and backbone.

  Raises:
    ValueError: the folder holds a head that was trained with another config or on other data.
  """
  config = config_lib.from_dict(config_lib.to_dict(exp.config))
  config.optimizer.lr, config.sweep, config.keep_checkpoints = rate, (), 1
  exp = dataclasses.replace(exp, config=config)
  result = from_first(lambda: finished_result(config, folder))
  if earlier := result or newest_config(folder):
    config_lib.check_same_run(config_lib.from_dict(earlier['config']), config, folder)
  if result and result.get('data', origin['data']) != origin['data']:
    raise ValueError(
      f'{folder}: the data of {config.data.source} changed after '
      f'learning rate {rate:g} was tried. Restore the data, or use another --workdir.'
    )
  if latest_step(folder) is not None:
    with held(folder):
      set_aside_damaged(folder)  # before `has_other_backbone` reads a checkpoint
  other = result and result.get('backbone', origin['backbone']) != origin['backbone']
  if other or has_other_backbone(folder, training.params):
    log.info('%s: the head is trained again, because the backbone has changed.', folder)
    from_first(lambda: discard(folder))
    result = None
  if not result:
    splits = training.train, training.val, training.test
    plan = plan_training(config, *splits, training.params)
    with held(folder):
      begin(config, folder)
      record(exp, folder)
      result = fit(exp, plan, mesh, folder, **origin)
  # Only the score is needed later. Keeping checkpoints with the backbone would fill the disk.
  from_first(lambda: discard(folder / 'checkpoints'))
  return result[measure_of(exp)]


def measured_on(exp: Experiment, training: Training) -> dict[str, str]:
  """Returns the hashes `data` (of the training data) and `backbone` (of the frozen parameters)."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(split_frozen(training.params, 'backbone')[1]):
    digest.update(np.ascontiguousarray(leaf))
  return {'data': exp.task.fingerprint, 'backbone': digest.hexdigest()}


def has_other_backbone(folder: pathlib.Path, params: dict) -> bool:
  """Returns whether the newest checkpoint in `folder` has a different backbone than `params`.

  Without a checkpoint, the result is False.
  """
  if (step := latest_step(folder)) is None:
    return False
  theirs = split_frozen(restore_item(folder, step, 'params'), 'backbone')[1]
  ours = split_frozen(params, 'backbone')[1]
  same = jax.tree.structure(theirs) == jax.tree.structure(ours)
  return not (same and jax.tree.all(jax.tree.map(np.array_equal, theirs, ours)))


def on_all(exp: Experiment, training: Training, rate: float) -> tuple[Experiment, Training]:
  """Returns the experiment and the `Training` of the final run of a sweep.

  The final run trains at the learning rate `rate`, on the training and the validation split
  together.
  """
  train, val = training.train, training.val
  both = train.joined(val)
  config = config_lib.from_dict(config_lib.to_dict(exp.config))
  config.optimizer.lr = rate
  plan = plan_training(config, both, None, training.test, training.params, training.cycles)
  return of_all(exp, training), plan


def of_all(exp: Experiment, training: Training) -> Experiment:
  """Returns a copy of the experiment whose `train_examples` also counts the validation images."""
  count = len(training.train) + len(training.val)
  return dataclasses.replace(exp, task=dataclasses.replace(exp.task, train_examples=count))
