"""Checkpoints with orbax, and orbax only here.

A workdir keeps them in `checkpoints/<step>/`, each with three items: `params`, `state`
(step, optimizer state, averages) and `config` (JSON: the config, and what the data told:
class names, channels, stored size).

Decisions:
  * Arrays are saved as NumPy arrays. Saved as JAX arrays they carry their devices, and
    orbax then refuses to restore them, without a target, on a machine with fewer.
  * A checkpoint appears under its name only when it is whole (orbax renames it).
"""

import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from vit_jax.state import TrainState


class Checkpoints:
  """The checkpoints of one workdir, open for writing; a context manager."""

  def __init__(self, workdir: pathlib.Path, keep: int = 2):
    """Keeps the newest `keep`, and the best by the accuracy given to `save`, if any is."""
    newest = policies.LatestN(max(keep, 1))
    best = policies.BestN(
      get_metric_fn=lambda metrics: metrics['accuracy'],
      n=1,
      keep_checkpoints_without_metrics=False,
    )
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policies.AnyPreservationPolicy([newest, best]),
      cleanup_tmp_directories=True,
    )
    self._manager = ocp.CheckpointManager(directory(workdir), options=options)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._manager.close()  # waits until the last one is written

  def latest(self) -> int | None:
    """The newest step; None where there is none."""
    return self._manager.latest_step()

  def save(self, state: TrainState, config: dict, accuracy: float | None = None) -> None:
    """Copies the state to the host, then writes it while training goes on.

    Raises:
      FloatingPointError: a parameter is not finite; nothing is written.
    """
    host = jax.device_get(state)
    step = int(host.step)
    for path, leaf in jax.tree_util.tree_leaves_with_path(host.params):
      if not np.isfinite(leaf).all():
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        raise FloatingPointError(f'Parameter {name} is not finite after step {step}.')
    self._manager.save(
      step,
      metrics=None if accuracy is None else {'accuracy': accuracy},
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(host.params),
        state=ocp.args.StandardSave(rest(host)),
        config=ocp.args.JsonSave(config),
      ),
    )

  def wait(self) -> None:
    """Until the last checkpoint is on disk."""
    self._manager.wait_until_finished()

  def restore(self, like: TrainState) -> tuple[TrainState, dict]:
    """The newest state, on the devices of `like` and of its shapes, and its `config` item."""
    params, others = like.params, rest(like)
    blank = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), (params, others))
    args = ocp.args.Composite(
      params=ocp.args.StandardRestore(blank[0]),
      state=ocp.args.StandardRestore(blank[1]),
      config=ocp.args.JsonRestore(),
    )
    try:
      items = self._manager.restore(self.latest(), args=args)
    except Exception as error:  # orbax and tensorstore raise many kinds
      raise damaged(self._manager.directory / str(self.latest()), error) from error
    state = like.replace(params=items.params, **items.state)
    placed = jax.tree.map(lambda host, old: jax.device_put(host, old.sharding), state, like)
    return placed, items.config


def rest(state: TrainState) -> dict:
  """The item `state`: all but the parameters."""
  return {'step': state.step, 'opt_state': state.opt_state, 'ema': state.ema}


def directory(workdir: pathlib.Path) -> pathlib.Path:
  """Where a workdir keeps its checkpoints; orbax wants it absolute."""
  return pathlib.Path(workdir).expanduser().resolve() / 'checkpoints'


def latest_step(workdir: pathlib.Path) -> int | None:
  """The newest whole checkpoint; None where there is none. Writes nothing."""
  if not directory(workdir).is_dir():
    return None
  return max(ocp.utils.checkpoint_steps(directory(workdir)), default=None)


def restore_item(workdir: pathlib.Path, step: int, item: str):
  """One item of a checkpoint as it was saved, arrays as NumPy."""
  handler = ocp.JsonCheckpointHandler() if item == 'config' else ocp.StandardCheckpointHandler()
  try:
    with ocp.Checkpointer(handler) as checkpointer:
      return checkpointer.restore(directory(workdir) / str(step) / item)
  except Exception as error:  # orbax and tensorstore raise many kinds
    raise damaged(directory(workdir) / str(step), error) from error


def damaged(path: pathlib.Path, error: Exception) -> ValueError:
  """The error for a checkpoint that can't be read."""
  reason = (str(error).splitlines() or [''])[0][:200]
  return ValueError(
    f'The checkpoint {path} is damaged ({type(error).__name__}: {reason}). Move that folder away '
    'to use the checkpoint before it.'
  )


def load(workdir: pathlib.Path, step: int | None = None) -> tuple[int, dict, dict]:
  """A checkpoint, the newest by default, for inference: step, weights (NumPy), `config` item.

  The weights are the averaged ones where the run keeps them.

  Raises:
    ValueError: the workdir holds no checkpoint.
  """
  step = latest_step(workdir) if step is None else step
  if step is None:
    raise ValueError(
      f'{workdir}: no checkpoint in {directory(workdir)}. Give the --workdir of a training '
      'run that has saved one (every checkpoint_every steps, and at its end).'
    )
  config = restore_item(workdir, step, 'config')
  if config['config']['ema'] > 0:
    return step, restore_item(workdir, step, 'state')['ema'], config
  return step, restore_item(workdir, step, 'params'), config
