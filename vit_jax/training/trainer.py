"""Trains a config in a workdir: starts a new run or resumes an existing one."""

import logging
import os
import pathlib

from ml_collections import ConfigDict

from vit_jax import experiment, limits, opening
from vit_jax.bucket import keeping_lists, to_path
from vit_jax.distributed import from_first, start_up
from vit_jax.training.closed_form import make_head
from vit_jax.training.resume import LISTS, begin, check_in_all_processes, record
from vit_jax.training.session import fit
from vit_jax.training.trial import prepared
from vit_jax.workdir import held, newest_config, read_json, read_metrics, training_files_of

log = logging.getLogger(__name__)


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


def check_new(workdir: pathlib.Path, init: str) -> None:
  """Raises ValueError if a new run would replace files, or if `init` is the workdir of this run."""
  own = os.path.realpath(os.path.expanduser(init)) == os.path.realpath(workdir)
  if init and own and [path.name for path in workdir.iterdir()] == ['log.txt']:  # no weights
    raise ValueError(
      f'--config.init={init} is the --workdir of this new run. Choose another --workdir or init.'
    )
  checkpoints = workdir / 'checkpoints'
  config, result = (read_json(workdir / name) for name in ('config.json', 'result.json'))
  if os.path.islink(checkpoints) and not checkpoints.exists():
    raise ValueError(
      f'{checkpoints} is a link to {os.readlink(checkpoints)}, which does not exist. Mount the '
      'disk or restore the folder. To start from the beginning, remove the link.'
    )
  if config is not None and not isinstance(config.get('optimizer'), dict):
    raise ValueError(
      f'{workdir / "config.json"} is not the config of a run. A new run would overwrite this file. '
      'Choose an empty folder as --workdir. To start from the weights of this folder, add '
      f'--config.init={workdir}'
    )
  # If the last checkpoint is in damaged/, `set_aside_damaged` has announced that training restarts.
  if result and not [*(workdir / 'damaged').glob(f'{result.get("steps")}-*')]:
    raise ValueError(
      f'{workdir} contains the result of a finished run, but {checkpoints} has no checkpoint. '
      'Restore the checkpoints, or choose another --workdir. To train this run again from the '
      f'beginning, remove {workdir / "result.json"}.'
    )
  check_none_lost(workdir, (config or {}).get('checkpoint_every'))


def check_none_lost(workdir: pathlib.Path, every: int | None) -> None:
  """Raises ValueError if the metrics of a workdir without checkpoints show that one is missing.

  Otherwise, the run may have ended before it saved a checkpoint. A warning then tells that training
  starts again.

  Args:
    workdir: folder of the run.
    every: `checkpoint_every` of the earlier run; None if its config is not known.
  """
  last = max((line['step'] for line in read_metrics(workdir)), default=0)
  names = (path.name.partition('-')[0] for path in (workdir / 'damaged').glob('*-*'))
  aside = max((int(name) for name in names if name.isdecimal()), default=0)
  # The first checkpoint after step `aside` can be incomplete until the second one is due: only then
  # does the run wait for the first one.
  if every and last > aside + 2 * every:
    raise ValueError(
      f'{workdir / "metrics.jsonl"} contains metrics up to step {last}, so the run has saved a '
      f'checkpoint (checkpoint_every={every}), but {workdir / "checkpoints"} has no checkpoint. '
      'Mount the disk or restore the checkpoints, or choose another --workdir. To train this run '
      f'again from the beginning, remove {workdir / "metrics.jsonl"}.'
    )
  if last:
    log.warning(
      '%s has metrics up to step %d, but no checkpoint. Training starts again at step 0, and '
      'replaces these metrics.', workdir, last,
    )  # fmt: skip
