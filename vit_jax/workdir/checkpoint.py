"""Saves and restores checkpoints with orbax.

A workdir keeps each checkpoint in `checkpoints/<step>/`. A checkpoint has four parts, which orbax
calls items:
  * `params`: the parameters.
  * `state`: step, optimizer state and averaged parameters.
  * `names`: hashes that identify the training files (`trained.py`).
  * `config`: JSON with the version, the config, and facts about the data (class names, channels,
    stored size). The key `cycles` lists the steps at which the run was finished before it was
    extended to more epochs.
A checkpoint also has a file `digests.json` with the checksums of the items' files (`digests.py`).

Decisions:
  * If all processes can access the workdir, each process writes the parts of arrays that its
    devices hold, while training continues. If some processes cannot access the workdir, all arrays
    are gathered, and process 0 writes them.
  * On a CPU, orbax writes a copy of the train state, made by `copy_state`. So the next training
    step can overwrite the state while orbax writes.
  * On a CPU, orbax is called in a thread, because this call takes longer than the copy. So training
    waits only until the copy is made and, if arrays are gathered, until they are gathered.
  * Checkpoints do not record the devices that held an array. With such a record, orbax would need a
    description of the new layout to restore the array on other devices.
  * The checksums are written before orbax gives a checkpoint its final name. So a checkpoint with a
    final name is complete. In a bucket, orbax writes `commit_success.txt` instead of changing the
    name. Orbax deletes older checkpoints only after this, so a run never loses its last complete
    checkpoint.
"""

from collections.abc import Iterator, Sequence
import concurrent.futures
import contextlib
import functools
import pathlib

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from vit_jax import storage
from vit_jax.distributed import Agreement, from_first, is_first, is_shared, to_host, together
from vit_jax.workdir import digests, items, stored
from vit_jax.workdir.manager import open_manager
from vit_jax.workdir.restoring import rest, restore_state


class Checkpoints:
  """Context manager that saves, restores and deletes the checkpoints of one workdir.

  With several processes, all processes must call its methods in the same order.
  """

  def __init__(self, workdir: pathlib.Path, keep: int = 2, finished: Sequence[int] = ()):
    """Opens a workdir, and decides which of its checkpoints are kept.

    Args:
      workdir: folder of the run.
      keep: number of newest checkpoints to keep. The best one is kept in addition.
      finished: the last steps of the run before it was extended to more epochs. The checkpoints of
        these steps are kept too.
    """
    self._workdir, self._manager, self._saving = workdir, None, None
    self._accuracies = dict(from_first(lambda: list(stored.accuracies(workdir).items())))
    self._shared = is_shared(workdir)
    self._thread, self._handover = concurrent.futures.ThreadPoolExecutor(1), None
    self._agreement = Agreement()
    self._copy, kept = None, (keep, self._accuracies, finished)
    from_first(lambda: stored.directory(workdir).mkdir(parents=True, exist_ok=True))
    if self._shared:
      complete = self._agreement.reporting(self._add_digests)
      self._manager = open_manager(workdir, *kept, complete, self._agreement)
    elif is_first():
      self._manager = open_manager(workdir, *kept, self._add_digests)

  def __enter__(self):
    items.be_silent()
    return self

  def __exit__(self, kind, *_):
    if self._manager is None:
      return
    ignored = [storage.Unwritten] if kind else []  # the error that ended the block is the cause
    with contextlib.suppress(*ignored), saving(self._workdir):
      try:
        self._end_handover()
      finally:
        self._thread.shutdown(wait=False)  # after an error, it may still wait for another process
        self._manager.close()  # waits until the last checkpoint is written

  def latest(self) -> int | None:
    """Returns the step of the newest checkpoint; None without a checkpoint."""
    return stored.latest_step(self._workdir)

  def rate(self, step: int, accuracy: float) -> None:
    """Sets the validation accuracy of a saved checkpoint, so that the best one is not deleted.

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
      storage.Unwritten, ValueError: a process cannot write the previous checkpoint. On GPUs and
        TPUs, the error can also be about this checkpoint. On a CPU, the next call raises it.
    """
    step = int(to_host(state.step))
    check_finite(state.params, step)
    self.wait()  # for the previous checkpoint
    on_cpu = jax.default_backend() == 'cpu'
    if on_cpu:
      state = self._copy = copy_state(self._copy, state)
    if not self._shared:
      state = to_host(state)
    if self._manager is None:
      return
    self._saving = step
    facts = {key: value for key, value in config.items() if key != 'names'}
    save = functools.partial(
      self._manager.save,
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(state.params),
        state=ocp.args.StandardSave(rest(state)),
        names=ocp.args.StandardSave(config['names']),
        config=ocp.args.JsonSave(facts | {'format': digests.FORMAT}),
      ),
    )
    if on_cpu:
      self._handover = self._thread.submit(self._agreement.reporting(save))
      return
    with saving(self._workdir):
      save()

  def _add_digests(self):
    """Writes the checksums of a checkpoint; orbax calls this after all other files are written."""
    folder = stored.directory(self._workdir)
    start = f'{self._saving}.orbax-checkpoint'  # temporary name; a bucket has only final names
    partial = (path for path in folder.iterdir() if path.name.startswith(start))
    # Without one of these files, orbax only logs a warning, but the checkpoint cannot be read.
    needed = [f'{item}/manifest.ocdbt' for item in items.ARRAYS]
    digests.write_digests(next(partial, folder / str(self._saving)), needed)

  def wait(self) -> None:
    """Waits, in all processes, until the last checkpoint is on disk.

    Raises:
      storage.Unwritten, ValueError: a process cannot write the checkpoint.
    """
    together(self._wait)

  def _wait(self):
    if self._manager is None:
      return
    with saving(self._workdir):
      self._end_handover()
      self._manager.wait_until_finished()

  def _end_handover(self):
    """Waits until the thread has passed the last checkpoint's arrays to orbax."""
    handover, self._handover = self._handover, None
    if handover is not None:
      try:
        self._agreement.result(handover)
      except KeyboardInterrupt:
        self._handover = handover  # `__exit__` waits for it
        raise

  def restore(self, like) -> tuple[object, dict]:
    """Restores the training state and the item `config` of the newest checkpoint.

    If all processes can access the workdir, each process reads only the shards of its devices.

    Args:
      like: a state of arrays, or of `jax.ShapeDtypeStruct`, with the wanted shapes, types and
        shardings. Values are not used.

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


@functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
def copy_state(previous, state):
  """Returns a copy of `state` in the memory of `previous`; in new memory if `previous` is None.

  Reusing memory saves time. The operating system provides new memory page by page at first use,
  which takes longer than copying the state.
  """
  del previous
  return jax.tree.map(jnp.copy, state)


@jax.jit
def all_finite(params: dict) -> jax.Array:
  """Returns a bool array that tells for each leaf of `params` whether all numbers are finite.

  The result is one array, so that the host can read all entries with one copy. The function tests
  only the largest magnitude of each leaf. If a number is NaN or infinite, so is the largest
  magnitude. On a CPU, this is faster than `jnp.isfinite(x).all()`.
  """
  return jnp.stack([jnp.isfinite(jnp.abs(x).max()) for x in jax.tree.leaves(params)])


@contextlib.contextmanager
def saving(workdir: pathlib.Path) -> Iterator[None]:
  """Turns the errors of orbax and tensorstore, which have many types, into `storage.Unwritten`."""
  try:
    yield
  except Exception as error:
    first = f'{type(error).__name__}: {(str(error).splitlines() or [""])[0][:200]}'
    reason = storage.reason(error) or first
    raise storage.unwritten(stored.directory(workdir), reason) from error


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
