"""Trains a config in a workdir, from its beginning or from where it stopped."""

import pathlib

from ml_collections import ConfigDict

from vit_jax import experiment, limits, names, opening
from vit_jax.check import check
from vit_jax.distributed import start_up
from vit_jax.training.loop import fit
from vit_jax.training.probe import train_head
from vit_jax.training.resume import begin, check_processes, record
from vit_jax.workdir import held, training_files_of


@limits.memory_for('Training')
def train(config: ConfigDict, workdir: str | pathlib.Path) -> dict:
  """Trains, or resumes, until `config.epochs` are done; returns what `result.json` holds.

  With `freeze=backbone` only the head is trained (`probe.py`); with `sweep`, at several rates.

  Args:
    config: from `configs/`, or `config.default_config()` changed.
    workdir: folder of checkpoints and records; a run in it is resumed.

  Raises:
    ValueError: a config, data or workdir that does not work; the message says why.
    FloatingPointError: training diverged, at every rate of a sweep; the last good checkpoint stays.
    limits.OutOfMemory: the message says which keys to change.
    cluster.Preempted: it was asked to stop, and has saved.
  """
  workdir = names.local(workdir)
  start_up()
  check(config)
  check_processes(config)
  with held(workdir):
    finished, saved, cycles = begin(config, workdir)
    if finished:
      return finished
    mesh = experiment.mesh_for(config)
    exp, training = opening.from_config(config, saved, cycles, training_files_of(workdir))
    if config.freeze:
      return train_head(exp, training, mesh, workdir)
    record(exp, workdir, training.test)
    return fit(exp, training, mesh, workdir)
