"""Runs the training loop in a workdir, and repeats it once if memory runs out."""

import logging
import pathlib

import jax

from vit_jax.distributed import Preemption, is_first
from vit_jax.evaluation import calibrate_run, with_teacher
from vit_jax.experiment import Experiment
from vit_jax.limits import is_full
from vit_jax.optim import Training
from vit_jax.training.compiling import halved, plan_of
from vit_jax.training.loop import Run
from vit_jax.workdir import (
  Checkpoints,
  Silent,
  Writer,
  forget_calibrations,
  intact,
  latest_step,
  newest_config,
  write_json,
)

log = logging.getLogger(__name__)


def fit(
  exp: Experiment,
  training: Training,
  mesh: jax.sharding.Mesh,
  workdir: pathlib.Path,
  **notes: object,
) -> dict:
  """Trains in a workdir, writes `result.json`, and returns the content of this file.

  Training starts from the newest checkpoint if there is one. If memory runs out in a run with one
  process, the run is resumed once from its newest checkpoint. The resumed run uses a plan that
  needs less memory (`halved`). If the run has a validation split and labels, the probabilities are
  calibrated at the end (`Calibration`), for the last and for the best checkpoint.

  Args:
    exp: experiment to train.
    training: data, steps, optimizer and initial weights.
    mesh: mesh of the devices.
    workdir: folder that this process has locked with `held`.
    **notes: additional fields for `result.json`.
  """
  exp, training = with_teacher(exp, training, mesh, workdir / 'features')
  with Preemption():  # so that the second attempt knows of a signal during the first one
    result = attempt(exp, training, mesh, workdir, notes)
    if isinstance(result, Experiment):
      log.warning('Out of memory: trying again with %s.', plan_of(result, mesh))
      result = attempt(result, training, mesh, workdir, notes, retries=False)
  if training.val is not None and exp.objective.labels:
    steps = {result[name]['step'] for name in ('last', 'best')}
    calibrate_run(exp, training.val, mesh, workdir, sorted(steps))
  if is_first():
    with intact(workdir):
      write_json(workdir / 'result.json', result)  # last: a run with this file is finished
  return result


def attempt(
  exp: Experiment,
  training: Training,
  mesh: jax.sharding.Mesh,
  workdir: pathlib.Path,
  notes: dict[str, object],
  *,
  retries: bool = True,
) -> dict | Experiment:
  """Trains until the run is finished, and returns the content of `result.json`.

  If memory runs out, the function returns an experiment that needs less memory, or raises the
  error of JAX. The error is raised if `retries` is False, if the run has several processes, or if
  `halved` finds no setting that needs less memory. After the function returns, nothing refers to
  the arrays of the failed run, so their memory is free. All arguments except `retries` are as in
  `fit`.
  """
  config, start, saved = exp.config, latest_step(workdir), newest_config(workdir)
  with (
    intact(workdir),
    Preemption() as preemption,  # also active while records and checkpoints close
    (Writer if is_first() else Silent)(workdir, start or 0) as records,
    Checkpoints(workdir, config.keep_checkpoints, training.cycles) as checkpoints,
  ):
    forget_calibrations(workdir, start or 0)
    if saved and saved['config']['data']['eval_split'] != config.data.eval_split:
      records.keep(lambda line: line['split'] != 'test')  # scores of another test split
    run = Run(exp, training, mesh, records, checkpoints, preemption, notes)
    try:
      return run.run()
    # `OutOfMemory`, e.g. of an evaluation, is not caught: a smaller plan cannot prevent it.
    except RuntimeError as error:
      # Of several processes, only some can be out of memory, so they cannot retry together.
      retries = retries and is_full(error) and jax.process_count() == 1
      smaller = halved(run.exp, mesh) if retries else None
      if smaller is None:
        raise
      return smaller
