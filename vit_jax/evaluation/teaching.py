"""Prepares the teacher of a run with distillation: the model learns from the teacher's logits.

Decisions:
  * Without augmentation and without `data.skip_bad_images`, the teacher gives the same logits in
    every epoch. The logits are then computed before training, once for each example, from cached
    features (`features.py`).
  * With augmentation or `data.skip_bad_images`, each training step runs the teacher. The teacher's
    parameters are then divided among the devices like the parameters of the trained model (config
    keys `mesh.fsdp` and `mesh.tensor`).
  * Checkpoints do not contain the teacher's parameters.
"""

from collections.abc import Iterator
import copy
import dataclasses
import functools
import logging
import pathlib

import jax
import numpy as np

from vit_jax.data import Plan, Split
from vit_jax.distributed import gather, place_params, replicate
from vit_jax.evaluation.features import cached_features, make_feature_step
from vit_jax.experiment import Experiment
from vit_jax.model import head_logits
from vit_jax.optim import Training

log = logging.getLogger(__name__)

ROWS = 4096  # number of examples whose logits are computed at once


@dataclasses.dataclass(frozen=True)
class Taught:
  """A split whose batches also contain a teacher's logits, as the array `teacher` `[B, L]`.

  Attributes:
    examples: the split.
    logits_NL: the teacher's logits for each example of the split.
  """

  examples: Split
  logits_NL: np.ndarray

  def __len__(self) -> int:
    return len(self.examples)

  def batches(
    self, plan: Plan, over_batch: jax.sharding.Sharding
  ) -> Iterator[dict[str, jax.Array]]:
    """Yields the batches that a `Plan` defines; the caller must close this iterator."""
    batches = self.examples.batches(plan, over_batch)
    try:
      for step, batch in zip(plan.steps, batches):
        index_B = plan.examples(plan.positions(step))
        yield batch | {'teacher': gather(self.logits_NL, index_B, over_batch)}
    finally:
      batches.close()


def with_teacher(
  exp: Experiment, training: Training, mesh: jax.sharding.Mesh, folder: pathlib.Path
) -> tuple[Experiment, Training]:
  """Prepares the teacher of a run for training; a run without a teacher stays unchanged.

  Args:
    exp: experiment to train.
    training: data, steps and optimizer of the run.
    mesh: devices of the run.
    folder: folder of cached features.

  Returns:
    The experiment, whose teacher uses the same attention kernel as the trained model.
    The `Training`. If the teacher's logits are cached (`Teacher.cached`), the batches of
      `Training.train` also contain these logits. If not, `Training.teacher` contains the teacher's
      parameters, on the devices.
  """
  if exp.teacher is None:
    return exp, training
  model = exp.teacher.model.clone(attention=exp.model.attention)
  exp = dataclasses.replace(exp, teacher=dataclasses.replace(exp.teacher, model=model))
  if exp.teacher.cached:
    taught = Taught(training.train, compute_logits(exp, training.train, mesh, folder))
    return exp, dataclasses.replace(training, train=taught)
  placed = place_params(mesh, exp.teacher.params)
  return exp, dataclasses.replace(training, teacher=placed)


def compute_logits(
  exp: Experiment, examples: Split, mesh: jax.sharding.Mesh, folder: pathlib.Path
) -> np.ndarray:
  """Computes the logits of the experiment's teacher for all examples of a split: `[N, L]`.

  The logits are computed from the teacher's features, which are cached in `folder`.
  """
  log.info('Without augmentation, the teacher computes the logits of each image only once.')
  teacher, config = exp.teacher, copy.deepcopy(exp.config)
  config.data.image_size = teacher.normalize.keywords['size']
  of_teacher = dataclasses.replace(
    exp, config=config, model=teacher.model, normalize=teacher.normalize, teacher=None
  )
  step, params = make_feature_step(of_teacher, mesh), replicate(mesh, teacher.params)
  features = cached_features(of_teacher, step, params, examples, mesh, folder)
  head = jax.jit(functools.partial(head_logits, teacher.model, teacher.params['head']))
  parts = (features.feature_ND[i : i + ROWS] for i in range(0, len(features), ROWS))
  return np.concatenate([np.asarray(head(part_BD)) for part_BD in parts])
