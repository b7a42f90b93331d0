"""Compiles the training step of a run in advance."""

import dataclasses
import logging
import time

from clu import platform
import jax

from vit_jax import progress
from vit_jax.distributed import target
from vit_jax.experiment import Experiment
from vit_jax.optim import Training
from vit_jax.training.fitting import fit_step
from vit_jax.training.state import TrainState
from vit_jax.training.step import TrainStep, make_train_step
from vit_jax.training.tracing import model_flops
from vit_jax.training.trial import uses_flash

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A compiled training step.

  Attributes:
    step: the training step.
    flops: FLOPs of a step on all devices together; 0 if batches have features instead of images.
    fused: whether the step computes attention with a kernel of cuDNN.
    exp: the experiment, with the micro-batches and `remat` that fit into memory.
  """

  step: TrainStep
  flops: int
  fused: bool
  exp: Experiment


def compile_step(
  exp: Experiment, training: Training, mesh: jax.sharding.Mesh, state: TrainState, batch: dict
) -> Compiled:
  """Compiles a step that fits into memory.

  It is compiled before training, so that the measured speed excludes the time to compile.

  Raises:
    limits.OutOfMemory: no step fits.
  """
  began = time.perf_counter()
  with progress.announced('Compiling the training step ...'):
    lower = lambda exp: make_train_step(exp, training, mesh).lower(state, batch)
    exp, step = fit_step(exp, lower, mesh, state)
  flops = exp.config.batch_size * model_flops(exp, state.params) if exp.sees_images else 0
  devices = f'{mesh.size} {target(mesh).platform} device(s)'
  height, width, _ = exp.image_shape
  log.info(
      'Compiled in %.1f s for images of %dx%d; training %d steps on %s.',
      time.perf_counter() - began, height, width, training.steps, devices,
  )  # fmt: skip
  platform.work_unit().set_notes(f'{exp.config.model.variant} on {devices}')
  return Compiled(step, flops, exp.sees_images and uses_flash(exp, mesh), exp)
