"""Saves and restores checkpoints with orbax, which only this package uses.

A workdir keeps each checkpoint in `checkpoints/<step>/`. A checkpoint has four parts, which orbax
calls items:
  * `params`: the parameters.
  * `state`: step, optimizer state and averaged parameters.
  * `names`: hashes that identify the training files (`trained.py`).
  * `config`: JSON with the version, the config, and facts about the data (class names, channels,
    stored size). Its key `cycles` has the steps at which the run was finished earlier, before it
    was extended to more epochs.
The file `digests.json` of a checkpoint has the checksums of all these files (`digests.py`).

Decisions:
  * Each process writes the parts of arrays that its devices hold, while training continues. This
    needs a workdir that all processes can access. Otherwise all arrays are gathered, and process 0
    writes them.
  * The devices that held an array are not recorded. Otherwise, orbax could restore the array on
    other devices only if the caller describes its layout.
  * The checksums are written before orbax gives a checkpoint its final name (in a bucket, before
    it writes `commit_success.txt`). Orbax deletes an older checkpoint only afterwards. So a
    checkpoint with its final name is complete, and a run that has one never loses its last one.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import logging
import pathlib

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint import type_handlers

from vit_jax import storage
from vit_jax.distributed import Agreement, from_first, is_first, is_shared, to_host, together
from vit_jax.workdir import digests, items, stored
from vit_jax.workdir.restoring import rest, restore_state

# Devices that hold copies of an array divide its writing only into parts of at least this size.
SLICE_BYTES = 2**20


class Checkpoints:
  """Context manager that saves, restores and deletes the checkpoints of one workdir.

  With several processes, all processes must call its methods in the same order.
  """

  def __init__(self, workdir: pathlib.Path, keep: int = 2):
    """Opens a workdir. `save` will keep its `keep` newest checkpoints, and the best one."""
    self._workdir, self._manager, self._saving = workdir, None, None
    self._accuracies = dict(from_first(lambda: list(stored.accuracies(workdir).items())))
    self._shared = is_shared(workdir)
    from_first(lambda: stored.directory(workdir).mkdir(parents=True, exist_ok=True))
    if self._shared:
      agreement = Agreement()
      complete = agreement.reporting(self._add_digests)
      self._manager = manager(workdir, keep, self._accuracies, complete, agreement)
    elif is_first():
      self._manager = manager(workdir, keep, self._accuracies, self._add_digests)

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

  def rate(self, step: int, accuracy: float) -> None:
    """Sets the validation accuracy of a saved checkpoint; the best checkpoint is not deleted.

    A checkpoint is saved before its evaluation, so only `metrics.jsonl` stores its accuracy.
    """
    self._accuracies[step] = accuracy

  def best(self) -> int:
    """Returns the step of the checkpoint with the best validation accuracy."""
    return stored.ranked(self._accuracies)[0][0]

  def save(self, state, config: dict) -> None:
    """Saves a checkpoint: copies arrays to the host, then writes them while training continues.

    Args:
      state: training state of the run.
      config: facts about the run. The value of the key `names` becomes the item `names`; all other
        keys become the item `config`.

    Raises:
      FloatingPointError: a parameter is not finite; nothing is written.
      storage.Unwritten: this process cannot write this checkpoint, or the previous one.
      ValueError: another process cannot write it.
    """
    step = int(to_host(state.step))
    check_finite(state.params, step)
    self.wait()  # for the previous checkpoint
    if not self._shared:
      state = to_host(state)
    if self._manager is not None:
      self._saving = step
      facts = {key: value for key, value in config.items() if key != 'names'}
      self._save(step, state, config['names'], facts | {'format': digests.FORMAT})

  def _save(self, step, state, names, facts):
    try:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          params=ocp.args.StandardSave(state.params),
          state=ocp.args.StandardSave(rest(state)),
          names=ocp.args.StandardSave(names),
          config=ocp.args.JsonSave(facts),
        ),
      )
    except Exception as error:  # orbax and tensorstore raise many kinds of errors
      raise not_saved(self._workdir, error) from error

  def _add_digests(self):
    """Writes the checksums of a checkpoint; orbax calls this after all other files are written."""
    folder = stored.directory(self._workdir)
    start = f'{self._saving}.orbax-checkpoint'  # not in a bucket: there, the name is final already
    partial = (path for path in folder.iterdir() if path.name.startswith(start))
    digests.write_digests(next(partial, folder / str(self._saving)))

  def wait(self) -> None:
    """Waits, in all processes, until the last checkpoint is on disk.

    Raises:
      storage.Unwritten: this process cannot write the checkpoint.
      ValueError: another process cannot write it.
    """
    together(self._wait)

  def _wait(self):
    if self._manager is None:
      return
    try:
      self._manager.wait_until_finished()
    except Exception as error:  # orbax and tensorstore raise many kinds of errors
      raise not_saved(self._workdir, error) from error

  def restore(self, like) -> tuple[object, dict]:
    """Restores the training state and the item `config` of the newest checkpoint.

    If all processes can access the workdir, each reads only the shards of its own devices.

    Args:
      like: a state whose arrays have the wanted shapes, types and shardings. Their values are not
        used.

    Returns:
      The state, placed on devices like `like`, and the item `config`.
    """
    return restore_state(self._workdir, self.latest(), like, self._shared)


def check_finite(params: dict, step: int) -> None:
  """Raises FloatingPointError if a parameter is not finite, and names the parameter."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  finite = to_host(all_finite(params))
  for (path, _), good in zip(leaves, finite, strict=True):
    if not good:
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      raise FloatingPointError(f'Parameter {name} is not finite after step {step}.')


@jax.jit
def all_finite(params: dict) -> jax.Array:
  """Returns a bool array with one entry per leaf of `params`: whether all its numbers are finite.

  A single array needs only one copy to the host.
  """
  return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(params)])


@dataclasses.dataclass
class Best(policies.PreservationPolicy):
  """Policy that keeps the checkpoint with the best accuracy; `accuracies` is {step: accuracy}.

  After a run resumes, orbax's own policy would not know the accuracies of earlier checkpoints.
  """

  accuracies: dict[int, float]

  def should_preserve(self, checkpoints, *, context):
    del context
    there = {c.step for c in checkpoints}
    best = next((step for step, _ in stored.ranked(self.accuracies) if step in there), None)
    return [c.step == best for c in checkpoints]


class Manager(ocp.CheckpointManager):
  """Orbax's manager, but without orbax's calls of JAX's preemption service.

  The service compares the numbers of calls in all processes. Orbax's calls have other numbers than
  the training loop's calls (`distributed.asked_to_stop`), so the loop could miss a stop signal.
  """

  def reached_preemption(self, step):
    del step
    return False


def manager(
  workdir: pathlib.Path,
  keep: int,
  scored: dict[int, float],
  before_commit: Callable[[], None],
  agreement: Agreement | None = None,
) -> ocp.CheckpointManager:
  """Returns an open orbax manager for the checkpoints of a workdir.

  Args:
    workdir: folder of the run.
    keep: number of newest checkpoints to keep.
    scored: {step: accuracy}; the caller may add steps later.
    before_commit: called in process 0 when all files of a checkpoint are written, before orbax
      gives the checkpoint its final name.
    agreement: the processes that save together; None: this process saves alone.
  """
  policy = policies.AnyPreservationPolicy([policies.LatestN(max(keep, 1)), Best(scored)])
  set_array_handler()  # before the handlers are created
  everyone = ocp.options.MultiprocessingOptions()
  who = {'multiprocessing_options': everyone if agreement else items.ALONE}
  handlers = {
    **{name: ocp.StandardCheckpointHandler(**who) for name in ('params', 'state', 'names')},
    'config': ocp.JsonCheckpointHandler(**who),
  }
  if agreement:
    handlers = {name: agreement.watch(handler) for name, handler in handlers.items()}
  options = ocp.CheckpointManagerOptions(
    preservation_policy=policy,
    cleanup_tmp_directories=True,
    create=False,  # orbax requires this if not all processes use the manager
    async_options=ocp.options.AsyncOptions(
      create_directories_asynchronously=False,  # after an error, its threads would wait for minutes
      post_finalization_callback=before_commit,
      barrier_sync_fn=agreement and agreement.barrier,
    ),
    **who,
  )
  try:
    return Manager(stored.directory(workdir), options=options, item_handlers=handlers)
  except items.CONTENT as error:
    raise ValueError(
      f'orbax cannot open {stored.directory(workdir)}: {error}. If a checkpoint in this folder is '
      'damaged, move it away. The same command then resumes from the newest remaining checkpoint.'
    ) from error


@functools.cache
def set_array_handler() -> None:
  """Sets how orbax saves arrays, in the whole process.

  Orbax does not record the devices that held an array. The devices that hold copies of an array
  divide the writing only if the array is large. Dividing needs a call to JAX for each array and
  device. For a small array, these calls take longer than one device needs to write it.
  """
  handler = type_handlers.ArrayHandler(
    enable_write_sharding_file=False, min_slice_bytes_for_replica_parallel=SLICE_BYTES
  )
  logger = logging.getLogger('absl')
  logger.addFilter(items.is_error)  # orbax warns that this replaces its own handler
  try:
    type_handlers.register_type_handler(jax.Array, handler, override=True)
  finally:
    logger.removeFilter(items.is_error)


def not_saved(workdir: pathlib.Path, error: Exception) -> storage.Unwritten:
  """Returns the error for a checkpoint that cannot be written."""
  first = f'{type(error).__name__}: {(str(error).splitlines() or [""])[0][:200]}'
  return storage.unwritten(stored.directory(workdir), storage.reason(error) or first)


@contextlib.contextmanager
def intact(workdir: pathlib.Path) -> Iterator[None]:
  """Context manager that adds the step of the last checkpoint to a `storage.Unwritten` error."""
  try:
    yield
  except storage.Unwritten as error:
    whole = next(iter(stored.saved_steps(workdir)), None)
    left = 'No checkpoint was saved yet: the same command starts from the beginning.'
    if whole is not None:
      left = f'The checkpoint of step {whole} is complete: the same command resumes from it.'
    raise storage.Unwritten(f'{error} {left}') from error
