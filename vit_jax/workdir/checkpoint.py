"""Checkpoints with orbax, and orbax only here.

A workdir keeps them in `checkpoints/<step>/`, each with four items: `params`, `state`
(step, optimizer state, averages), `names` (what the training files are known by, `trained.py`) and
`config` (JSON: version, config, what the data told: class names, channels, stored size, the last
steps of the run's earlier cycles, and digests of all items).

Decisions:
  * Arrays are saved whole and as NumPy arrays, by the first process. Saved as JAX arrays they carry
    their devices, and orbax then refuses to restore them, without a target, on a machine with
    fewer. So the same files come of a laptop and of a pod, and open on either.
  * A checkpoint appears under its name only when it is whole (orbax renames it). What happens to
    it afterwards its digests tell, which are compared whenever it is read.
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
  """The checkpoints of one workdir, open for writing; a context manager.

  In several processes all call its methods, in the same order.
  """

  def __init__(self, workdir: pathlib.Path, keep: int = 2):
    """Keeps the newest `keep`, and the best by the accuracy given to `save`, if any is."""
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
      self._manager.close()  # waits until the last one is written
    except Exception as error:  # orbax and tensorstore raise many kinds
      if kind is None:
        raise not_saved(self._workdir, error) from error

  def latest(self) -> int | None:
    """The newest step; None where there is none."""
    return stored.latest_step(self._workdir)

  def rate(self, step: int, accuracy: float | None) -> None:
    """Adds the accuracy of a checkpoint that was saved before its evaluation."""
    if accuracy is not None:
      self._accuracies[step] = accuracy

  def best(self) -> int:
    """The step of the best checkpoint, of those that have an accuracy."""
    return stored.ranked(self._accuracies)[0][0]

  def save(self, state, config: dict, accuracy: float | None = None) -> None:
    """Copies the state to the host, then writes it while training goes on.

    Args:
      state: of the run.
      config: the item `config`, and in it the item `names`.
      accuracy: that the best checkpoint is chosen by; None for none.

    Raises:
      FloatingPointError: a parameter is not finite; nothing is written.
      output.Unwritten: this one, or the one before it, can't be written.
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
    config = json.loads(json.dumps(config))  # tuples are lists, as they will be read
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
    except Exception as error:  # orbax and tensorstore raise many kinds
      raise not_saved(self._workdir, error) from error

  def wait(self) -> None:
    """Until the last checkpoint is on disk; all processes wait for it.

    Raises:
      output.Unwritten: it can't be written; in several processes a ValueError.
    """
    from_first(self._wait)

  def _wait(self):
    try:
      self._manager.wait_until_finished()
    except Exception as error:  # orbax and tensorstore raise many kinds
      raise not_saved(self._workdir, error) from error

  def restore(self, like) -> tuple[list[np.ndarray], dict]:
    """The newest state, and its `config` item.

    Args:
      like: a state of the same shapes, which may be abstract.

    Returns:
      The state's arrays on the host, in the order of `like`'s leaves.
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
  """Keeps the first checkpoint of those `ranked`; `accuracies` by step.

  orbax's own policy knows only what was saved since it was opened.
  """

  accuracies: dict[int, float]

  def should_preserve(self, checkpoints, *, context):
    del context
    there = {c.step for c in checkpoints}
    best = next((step for step, _ in stored.ranked(self.accuracies) if step in there), None)
    return [c.step == best for c in checkpoints]


def manager(workdir: pathlib.Path, keep: int, scored: dict[int, float]) -> ocp.CheckpointManager:
  """orbax's, of the first process alone; `scored` are `accuracies`, to which more may come."""
  policy = policies.AnyPreservationPolicy([policies.LatestN(max(keep, 1)), Best(scored)])
  options = ocp.CheckpointManagerOptions(
    preservation_policy=policy,
    cleanup_tmp_directories=True,
    create=False,  # which orbax wants of a manager for some of the processes
    multiprocessing_options=items.ALONE,
  )
  stored.directory(workdir).mkdir(parents=True, exist_ok=True)
  try:
    return ocp.CheckpointManager(stored.directory(workdir), options=options)
  except items.CONTENT as error:
    raise ValueError(
      f'orbax can not open {stored.directory(workdir)}: {error}. If one of the checkpoints there '
      'is damaged, move it away; the same command goes on from the others.'
    ) from error


def rest(state) -> dict:
  """The item `state`: all but the parameters."""
  return {'step': state.step, 'opt_state': state.opt_state, 'ema': state.ema}


def not_saved(workdir: pathlib.Path, error: Exception) -> storage.Unwritten:
  """The error for a checkpoint that can't be written."""
  first = f'{type(error).__name__}: {(str(error).splitlines() or [""])[0][:200]}'
  return storage.unwritten(stored.directory(workdir), storage.reason(error) or first)


@contextlib.contextmanager
def intact(workdir: pathlib.Path) -> Iterator[None]:
  """Adds to a `storage.Unwritten` what is left of the run in a workdir."""
  try:
    yield
  except storage.Unwritten as error:
    whole = next(iter(stored.saved_steps(workdir)), None)
    left = 'No checkpoint had been saved: the same command starts again.'
    if whole is not None:
      left = f'The checkpoint of step {whole} is whole: the same command resumes from it.'
    raise storage.Unwritten(f'{error} {left}') from error
