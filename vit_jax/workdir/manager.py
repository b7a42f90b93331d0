"""Opens orbax's checkpoint manager, with rules for saving and keeping checkpoints."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import glob
import logging
import os
import pathlib

from etils import epath
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint import type_handlers

from vit_jax.distributed import Agreement
from vit_jax.workdir import items, stored

# If several devices hold copies of an array, each of them writes a part of it. A part has at least
# this number of bytes.
SLICE_BYTES = 2**20


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

  The training loop calls this service with a number (`distributed.asked_to_stop`), and the service
  compares the numbers of all processes. Orbax would call the service with different numbers, so the
  loop could miss a stop signal.
  """

  def reached_preemption(self, step):
    del step
    return False


def open_manager(
  workdir: pathlib.Path,
  keep: int,
  scored: dict[int, float],
  finished: Sequence[int],
  before_commit: Callable[[], None],
  agreement: Agreement | None = None,
) -> ocp.CheckpointManager:
  """Returns an open orbax manager for the checkpoints of a workdir.

  Args:
    workdir: folder of the run.
    keep: number of newest checkpoints to keep.
    scored: {step: accuracy}. The checkpoint with the best accuracy is kept in addition. The caller
      can add steps later.
    finished: the last steps of the run before it was extended to more epochs. Their checkpoints are
      kept in addition.
    before_commit: called in process 0 when all files of a checkpoint are written, before orbax
      gives the checkpoint its final name.
    agreement: the processes that save together; None if this process saves alone.
  """
  kept = [policies.LatestN(max(keep, 1)), Best(scored), policies.CustomSteps(finished)]
  set_array_handler()  # before the handlers are created
  take_folders_literally()
  who = {'multiprocessing_options': everyone(agreement) if agreement else items.ALONE}
  handlers = {
    **{name: ocp.StandardCheckpointHandler(**who) for name in items.ARRAYS},
    'config': ocp.JsonCheckpointHandler(**who),
  }
  if agreement:
    handlers = {name: agreement.watch(handler) for name, handler in handlers.items()}
  options = ocp.CheckpointManagerOptions(
    preservation_policy=policies.AnyPreservationPolicy(kept),
    cleanup_tmp_directories=True,
    create=False,  # orbax requires this, because `who` lists processes
    async_options=ocp.options.AsyncOptions(
      create_directories_asynchronously=False,  # its threads would wait for minutes after an error
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


def everyone(agreement: Agreement) -> ocp.options.MultiprocessingOptions:
  """Returns the options for all processes.

  If the options name the processes, orbax uses JAX's coordination service to wait for them. If not,
  it would use collective operations, which a thread must not use while the run trains. The prefix
  keeps the barriers of two managers apart.
  """
  return ocp.options.MultiprocessingOptions(
    active_processes=set(range(jax.process_count())), barrier_sync_key_prefix=agreement.name
  )


@functools.cache
def set_array_handler() -> None:
  """Sets how orbax saves arrays, for all managers in this process.

  With these settings, orbax does not record the devices that held an array. If several devices
  hold copies of a large array, each of them writes a part. A small array is written from one
  device, because dividing it takes longer than writing it: JAX must be called for each device.
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


@functools.cache
def take_folders_literally() -> None:
  """Corrects `glob` of `etils.epath`, which reads `[`, `*` and `?` in a folder's path as a pattern.

  To complete a checkpoint, orbax calls `glob` for the folder of the checkpoint. Without this
  correction, a checkpoint below a folder such as `runs/lr=[0.1]` would not contain its arrays.
  """
  kind = type(epath.Path())
  find = kind.glob
  kind.glob = lambda self, pattern: find(kind(glob.escape(os.fspath(self))), pattern)
