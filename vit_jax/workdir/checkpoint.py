"""Saves and restores checkpoints with orbax, which only this package uses.

A workdir keeps each checkpoint in `checkpoints/<step>/`. A checkpoint has four parts, which orbax
calls items:
  * `params`: the parameters.
  * `state`: step, optimizer state and averaged parameters.
  * `names`: hashes that identify the training files (`trained.py`).
  * `config`: JSON with the version, the config and facts about the data (class names, channels,
    stored size). The JSON also has the checksums of all items (`digests`), and the steps at which
    the run was finished earlier and got more epochs (`cycles`).

Decisions:
  * Process 0 saves each array as one whole NumPy array. So a laptop and a pod write the same files,
    and every machine can read them. With JAX arrays, orbax would also save the list of devices. A
    machine with fewer devices could then read them only if the caller describes every array.
  * orbax gives a checkpoint its final name only when all files are written. Checksums are compared
    before a checkpoint is used, so later damage is detected.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import json
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from vit_jax import storage
from vit_jax.distributed import from_first, is_first, to_host
from vit_jax.workdir import items, stored


class Checkpoints:
  """Context manager that keeps the checkpoints of one workdir open for writing.

  With several processes, all must call its methods in the same order.
  """

  def __init__(self, workdir: pathlib.Path, keep: int = 2):
    """Keeps the newest `keep` checkpoints, and the one with the best validation accuracy."""
    self._workdir = workdir
    self._accuracies, self._manager = {}, None
    if is_first():
      self._accuracies = stored.accuracies(workdir)
      self._manager = manager(workdir, keep, self._accuracies)

  def __enter__(self):
    items.be_silent()
    return self

  def __exit__(self, kind, *_):
    if self._manager is None:
      return
    try:
      self._manager.close()  # waits until the last checkpoint is written
    except Exception as error:  # orbax and tensorstore raise many kinds of errors
      if kind is None:
        raise not_saved(self._workdir, error) from error

  def latest(self) -> int | None:
    """Returns the step of the newest checkpoint; None without a checkpoint."""
    return stored.latest_step(self._workdir)

  def rate(self, step: int, accuracy: float | None) -> None:
    """Adds the accuracy of a checkpoint that was saved before its evaluation."""
    if accuracy is not None:
      self._accuracies[step] = accuracy

  def best(self) -> int:
    """Returns the step of the checkpoint with the best accuracy."""
    return stored.ranked(self._accuracies)[0][0]

  def save(self, state, config: dict, accuracy: float | None = None) -> None:
    """Copies the state to the host, then writes it while training continues.

    Args:
      state: training state of the run.
      config: facts about the run. The value of the key `names` becomes the item `names`; all other
        keys become the item `config`.
      accuracy: validation accuracy, by which the best checkpoint is chosen; None if unknown.

    Raises:
      FloatingPointError: a parameter is not finite; nothing is written.
      storage.Unwritten: this checkpoint, or the previous one, cannot be written.
    """
    host = to_host(state)
    step = int(host.step)
    for path, leaf in jax.tree_util.tree_leaves_with_path(host.params):
      if not np.isfinite(leaf).all():
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        raise FloatingPointError(f'Parameter {name} is not finite after step {step}.')
    if self._manager is None:
      return
    names = config['names']
    config = {key: value for key, value in config.items() if key != 'names'}
    parts = {'params': host.params, 'state': rest(host), 'names': names}
    if accuracy is not None:
      config = config | {'accuracy': accuracy}
      self._accuracies[step] = accuracy
    config = json.loads(json.dumps(config))  # tuples become lists, as when the file is read
    digests = {name: items.digest(item) for name, item in (parts | {'config': config}).items()}
    try:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          params=ocp.args.StandardSave(parts['params']),
          state=ocp.args.StandardSave(parts['state']),
          names=ocp.args.StandardSave(names),
          config=ocp.args.JsonSave(config | {'digests': digests}),
        ),
      )
    except Exception as error:  # orbax and tensorstore raise many kinds of errors
      raise not_saved(self._workdir, error) from error

  def wait(self) -> None:
    """Waits, in all processes, until the last checkpoint is on disk.

    Raises:
      storage.Unwritten: the checkpoint cannot be written (one process).
      ValueError: the same failure, if there are several processes.
    """
    from_first(self._wait)

  def _wait(self):
    try:
      self._manager.wait_until_finished()
    except Exception as error:  # orbax and tensorstore raise many kinds of errors
      raise not_saved(self._workdir, error) from error

  def restore(self, like) -> tuple[list[np.ndarray], dict]:
    """Restores the training state and the item `config` of the newest checkpoint.

    Args:
      like: a state with arrays of the same shapes and types. Their values are not used.

    Returns:
      The arrays of the state on the host, in the order of the leaves of `like`, and the `config`
      item.
    """
    return from_first(lambda: self._restore(like))

  def _restore(self, like):
    blank = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), (like.params, rest(like)))
    args = ocp.args.Composite(
      params=ocp.args.StandardRestore(blank[0]),
      state=ocp.args.StandardRestore(blank[1]),
      config=ocp.args.JsonRestore(),
    )
    step = self._manager.latest_step()
    with items.condemning(stored.directory(self._workdir) / str(step)):
      found = self._manager.restore(step, args=args)
    return jax.tree.leaves(like.replace(params=found.params, **found.state)), found.config


@dataclasses.dataclass
class Best(policies.PreservationPolicy):
  """Keeps the checkpoint with the best validation accuracy. `accuracies` is {step: accuracy}.

  After a run resumes, orbax's own policy would not know the accuracies of earlier checkpoints.
  """

  accuracies: dict[int, float]

  def should_preserve(self, checkpoints, *, context):
    del context
    there = {c.step for c in checkpoints}
    best = next((step for step, _ in stored.ranked(self.accuracies) if step in there), None)
    return [c.step == best for c in checkpoints]


def manager(workdir: pathlib.Path, keep: int, scored: dict[int, float]) -> ocp.CheckpointManager:
  """Opens the orbax manager of process 0. `scored` is {step: accuracy}; steps may be added."""
  policy = policies.AnyPreservationPolicy([policies.LatestN(max(keep, 1)), Best(scored)])
  options = ocp.CheckpointManagerOptions(
    preservation_policy=policy,
    cleanup_tmp_directories=True,
    create=False,  # orbax requires this if not all processes use the manager
    multiprocessing_options=items.ALONE,
  )
  stored.directory(workdir).mkdir(parents=True, exist_ok=True)
  try:
    return ocp.CheckpointManager(stored.directory(workdir), options=options)
  except items.CONTENT as error:
    raise ValueError(
      f'orbax cannot open {stored.directory(workdir)}: {error}. If a checkpoint in this folder is '
      'damaged, move it away. The same command then resumes from the newest remaining checkpoint.'
    ) from error


def rest(state) -> dict:
  """Returns the item `state`: everything but the parameters."""
  return {'step': state.step, 'opt_state': state.opt_state, 'ema': state.ema}


def not_saved(workdir: pathlib.Path, error: Exception) -> storage.Unwritten:
  """Returns the error for a checkpoint that cannot be written."""
  first = f'{type(error).__name__}: {(str(error).splitlines() or [""])[0][:200]}'
  return storage.unwritten(stored.directory(workdir), storage.reason(error) or first)


@contextlib.contextmanager
def intact(workdir: pathlib.Path) -> Iterator[None]:
  """Adds to the message of a `storage.Unwritten` from which step the same command resumes."""
  try:
    yield
  except storage.Unwritten as error:
    whole = next(iter(stored.saved_steps(workdir)), None)
    left = 'No checkpoint was saved yet: the same command starts from the beginning.'
    if whole is not None:
      left = f'The checkpoint of step {whole} is complete: the same command resumes from it.'
    raise storage.Unwritten(f'{error} {left}') from error
