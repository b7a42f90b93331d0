"""Computes a head without training steps, in one pass over the training images.

Decisions:
  * After computing the head, the run evaluates the model, and saves a checkpoint of step 0 and
    `result.json`. So every `--mode` can use the workdir, as after a training run.
"""

import dataclasses
import logging
import pathlib

import jax
from ml_collections import ConfigDict
import numpy as np

from vit_jax import config as config_lib
from vit_jax import opening
from vit_jax.distributed import from_first, replicate
from vit_jax.evaluation import check_data_given, compute_features, make_feature_step
from vit_jax.experiment import Experiment
from vit_jax.opening import Request
from vit_jax.optim import CLASSIFIERS, Training
from vit_jax.training.probe import train_head
from vit_jax.training.resume import record
from vit_jax.training.session import fit
from vit_jax.workdir import latest_step

log = logging.getLogger(__name__)

# Keys of the layers after the pooling. `classifier_config` does not copy these keys. The model
# keeps the layers only if the weights were trained on the classes of the data. `inherit.open_init`
# decides this, and sets the keys if the model keeps the layers.
AFTER_POOL = ('model.representation_size', 'model.projection', 'model.cosine')


def classifier_config(request: Request, classifier: str) -> ConfigDict:
  """Returns the config of a run that computes a head for the features of the requested model.

  Args:
    request: names the model, by its workdir or by `init`. The request can also override config
      keys, e.g. `data.source`, to use data that the run in the workdir did not use.
    classifier: one of `CLASSIFIERS`.

  Raises:
    ValueError: the weights cannot be read, or do not fit the data.
  """
  check_data_given(request)
  exp, _, step = opening.open_model(request, 'data')
  config, own = config_lib.default_config(), config_lib.flatten(exp.config)
  kept = {k: v for k, v in own.items() if k.startswith(('data.', 'model.')) and k not in AFTER_POOL}
  for key, value in kept.items():
    section, _, name = key.partition('.')
    config[section][name] = tuple(value) if isinstance(value, list) else value
  config.init = request.init or f'{request.workdir}/checkpoints/{step}'
  for name in ('init_resize', 'eval_batch_size', 'device_memory'):
    config[name] = exp.config[name]
  config.batch_size = None  # `choose_open` chooses a number that fits the devices
  config.classifier, config.epochs = classifier, 0.0
  return config


def make_head(
  exp: Experiment, training: Training, mesh: jax.sharding.Mesh, workdir: pathlib.Path
) -> dict:
  """Computes or trains the head of a model, and returns the content of `result.json`.

  If the config sets `classifier`, the head is computed. If not, the head is trained (`train_head`).
  The caller must hold the lock of the workdir.
  """
  if not exp.config.classifier:
    return train_head(exp, training, mesh, workdir)
  # Saves the config first, because an unreadable image can end `with_head` with an error.
  record(exp, workdir, training.test)
  exp, training = with_head(exp, training, mesh, latest_step(workdir) is not None)
  return fit(exp, training, mesh, workdir)


def with_head(
  exp: Experiment, training: Training, mesh: jax.sharding.Mesh, restored: bool
) -> tuple[Experiment, Training]:
  """Computes the head that `config.classifier` names, and adds it to the initial weights of a run.

  Args:
    exp: experiment with the backbone.
    training: data of the run; `training.params` holds the weights of the backbone.
    mesh: mesh of the devices.
    restored: whether a checkpoint already holds the head. If so, the head is not computed again.

  Returns:
    The experiment, whose model can hold the head.
    A copy of `training` whose `params` include the head. If `restored`, `training` itself.
  """
  classifier, count = CLASSIFIERS[exp.config.classifier], len(training.train)
  if not restored:
    log.info('Computing the features of %d training images ...', count)
    step, params = make_feature_step(exp, mesh), replicate(mesh, training.params)
    size = exp.config.eval_batch_size
    found = compute_features(step, params, training.train, size, mesh)
    classes = len(exp.task.class_names)  # hosts round differently, so process 0 computes the head
    head = from_first(lambda: classifier.fit(found.feature_ND, found.label_N, classes))
    if classifier.stores:  # unreadable images were skipped; padding rows replace them
      missing = count - len(found)
      pad = lambda x: np.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)], constant_values=-1)
      head = {name: pad(x) for name, x in head.items()}
    head = {name: x.astype(np.float32) for name, x in head.items()}
    training = dataclasses.replace(training, params=training.params | {'head': head})
  if classifier.stores:
    exp = dataclasses.replace(exp, model=exp.model.clone(examples=count))
  return exp, training
