"""Trains a config in a workdir: starts a new run or resumes an existing one."""

import pathlib

from ml_collections import ConfigDict

from vit_jax import experiment, limits, opening
from vit_jax.bucket import keeping_lists, to_path
from vit_jax.distributed import from_first, start_up
from vit_jax.training.closed_form import make_head
from vit_jax.training.resume import LISTS, begin, check_in_all_processes, check_new, record
from vit_jax.training.session import fit
from vit_jax.training.trial import prepared
from vit_jax.workdir import held, newest_config, training_files_of


@limits.memory_for('Training')
def train(config: ConfigDict, workdir: str | pathlib.Path) -> dict:
  """Trains until `config.epochs` are done, and returns the content of `result.json`.

  If the config sets `classifier`, a head is computed without training steps (`closed_form.py`). If
  the config sets `freeze=backbone`, only the head is trained (`probe.py`). If the config also sets
  `sweep`, heads are trained at several learning rates.

  Args:
    config: config from `configs/`, or a changed `config.default_config()`.
    workdir: folder for checkpoints and logs; an existing run in it is resumed.

  Raises:
    ValueError: the config, the data or the workdir cannot be used; the message names the reason.
    FloatingPointError: training diverged (in a sweep, at every learning rate). The last good
      checkpoint is kept.
    OutOfMemory: the device ran out of memory; the message names the keys to change.
    Preempted: the run was asked to stop and has saved a checkpoint.
  """
  workdir = to_path(workdir)
  start_up()
  check_in_all_processes(config, workdir)
  with held(workdir):
    finished, saved, cycles = begin(config, workdir)
    if finished:
      return finished
    if saved is None:
      from_first(lambda: check_new(workdir, config.init))
    with keeping_lists(workdir / LISTS):
      exp, training = opening.from_config(config, saved, cycles, training_files_of(workdir))
    mesh = experiment.mesh_for(exp.config)
    exp = prepared(exp, training, mesh, newest_config(workdir) or {})
    if exp.config.freeze or exp.config.classifier:
      return make_head(exp, training, mesh, workdir)
    record(exp, workdir, training.test)
    return fit(exp, training, mesh, workdir)
