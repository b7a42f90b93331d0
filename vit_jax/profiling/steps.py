"""Performs training steps of a run, without writing checkpoints or logs.

Decisions:
  * The steps use the config, the data, the attention kernel and the memory plan of the run. Only
    the weights are random, because the time of a step does not depend on them.
"""

import contextlib
import pathlib
import time

import jax
from ml_collections import ConfigDict

from vit_jax import config as config_lib
from vit_jax import experiment, opening
from vit_jax.data import train_batches
from vit_jax.distributed import batch_sharding
from vit_jax.evaluation import with_teacher
from vit_jax.profiling.timeline import STEPS, WAIT
from vit_jax.training import compile_step, init_state, prepared
from vit_jax.workdir import newest_config, training_files_of


class Steps:
  """The training steps of a run, on the mesh of its config."""

  def __init__(self, config: ConfigDict, workdir: pathlib.Path, stack: contextlib.ExitStack):
    """Opens the data and compiles the step.

    Args:
      config: config of the run.
      workdir: folder of the run, or a new folder.
      stack: exit stack that closes the data readers when its context ends.
    """
    earlier = newest_config(workdir) or {}
    saved = config_lib.from_dict(earlier['config']) if earlier else None
    if saved and config.data.cache != 'auto':  # a profile can use another `data.cache` than the run
      saved.data.cache = config.data.cache
    exp, training = opening.from_config(config, saved, seen=training_files_of(workdir))
    config, self.mesh = exp.config, experiment.mesh_for(exp.config)
    exp = prepared(exp, training, self.mesh, earlier)
    exp, training = with_teacher(exp, training, self.mesh, workdir / 'features')
    over_batch = batch_sharding(self.mesh)
    self._batches = train_batches(training.train, config.batch_size, config.seed, 0, over_batch)
    stack.enter_context(contextlib.closing(self._batches))
    self._state = init_state(exp, training, self.mesh)
    compiled = compile_step(exp, training, self.mesh, self._state, next(self._batches))
    self._step, self._teacher = compiled.step, training.teacher

  @property
  def text(self) -> str:
    """The compiled step as HLO text."""
    return self._step.as_text()

  def take(self, count: int) -> float:
    """Performs `count` training steps, and returns their total time in seconds.

    The time includes waiting for batches, and ends when the devices have finished the last step.
    """
    began = time.perf_counter()
    with jax.profiler.TraceAnnotation(STEPS):
      for number in range(count):
        with jax.profiler.StepTraceAnnotation('train', step_num=number):
          with jax.profiler.TraceAnnotation(WAIT):
            batch = next(self._batches)
          self._state, metrics = self._step(self._state, batch, self._teacher)
      jax.block_until_ready((self._state, metrics))
    return time.perf_counter() - began
