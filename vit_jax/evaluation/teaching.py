"""Prepares the teacher of a run: places its parameters on the devices, or computes its logits once.

Decisions:
  * Without random changes of the images, the teacher gives the same logits in every epoch. The
    logits are then computed once for each example, from cached features (`features.py`).
  * Otherwise each training step runs the teacher. The teacher's parameters are placed like those of
    the student, so `mesh.fsdp` and `mesh.tensor` split them too. No checkpoint contains them.
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
  """A split whose batches also contain the logits of a teacher: `teacher`, `[B, L]`.

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
    """Yields the batches of a `Plan`; the caller must close this iterator."""
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
  """Returns the experiment and the plan of a run, with the teacher ready for training.

  Without a teacher, both are returned unchanged.

  Args:
    exp: experiment to train. The teacher uses the attention kernel of the experiment's model.
    training: plan of the run.
    mesh: devices of the run.
    folder: folder of cached features.
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
  """Returns the teacher's logits for all examples, `[N, L]`.

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
  parts = (features.image_NHWC[i : i + ROWS] for i in range(0, len(features), ROWS))
  return np.concatenate([np.asarray(head(part_BD)) for part_BD in parts])
