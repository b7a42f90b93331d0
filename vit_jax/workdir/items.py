"""The items of a checkpoint, read with orbax, and what its errors mean.

Decisions:
  * Only files that could be read, or are gone, condemn a checkpoint. Whoever resumes a run moves
    damaged ones away, so an error of this process must not count as damage.
"""

from collections.abc import Iterator
import contextlib
import errno
import hashlib
import json
import logging
import os
import pathlib
import sys
import tempfile

import jax
import numpy as np
import orbax.checkpoint as ocp


class Damaged(ValueError):
  """A checkpoint that can't be read, or not as it was written."""


# What orbax raises for files that hold something else than they should, or are gone.
CONTENT = (
  ValueError, LookupError, TypeError, AttributeError,
  FileNotFoundError, IsADirectoryError, NotADirectoryError,
)  # fmt: skip
# What tensorstore says in a ValueError of all else than files: codes of its status.
LIMITS = (
  'RESOURCE_EXHAUSTED', 'UNAVAILABLE', 'PERMISSION_DENIED', 'CANCELLED', 'ABORTED',
  'DEADLINE_EXCEEDED', os.strerror(errno.EMFILE), os.strerror(errno.ENFILE),
  os.strerror(errno.ENOMEM),
)  # fmt: skip

ALONE = ocp.options.MultiprocessingOptions(active_processes={0})  # the first process


def restored(checkpoint: pathlib.Path, item: str):
  """One item as orbax reads it, whether or not it is what was saved."""
  handlers = {'config': ocp.JsonCheckpointHandler}
  handler = handlers.get(item, ocp.StandardCheckpointHandler)(multiprocessing_options=ALONE)
  opened = ocp.Checkpointer(handler, multiprocessing_options=ALONE)
  with condemning(checkpoint), opened as checkpointer:
    return checkpointer.restore(checkpoint / item)


@contextlib.contextmanager
def condemning(checkpoint: pathlib.Path) -> Iterator[None]:
  """Turns an error that the content of a checkpoint's files causes into `Damaged`.

  Other errors are not the checkpoint's: no such device, a limit of memory, threads or open files,
  an orbax that does not fit JAX. They are raised as they are.

  Raises:
    Damaged: what was read is no checkpoint.
    OSError: a file can't be read now.
  """
  try:
    yield
  except CONTENT as error:
    be_silent()
    check_readable(checkpoint)
    if any(sign in str(error) for sign in LIMITS):
      raise
    check_process()
    raise damaged(checkpoint, error) from error


def check_process() -> None:
  """Raises what keeps this process from reading a small checkpoint that is surely whole."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder).resolve() / 'probe'
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=ALONE)
    with ocp.Checkpointer(handler, multiprocessing_options=ALONE) as checkpointer:
      checkpointer.save(path, args=ocp.args.StandardSave({'probe': np.zeros(1)}))
      checkpointer.restore(path)


def digest(item) -> str:
  """SHA-256 of an item: of the names, types, shapes and bytes of its arrays, or of its JSON."""
  leaves = jax.tree_util.tree_leaves_with_path(item)
  if not all(isinstance(leaf, np.ndarray | np.generic) for _, leaf in leaves):
    return hashlib.sha256(json.dumps(item, sort_keys=True).encode()).hexdigest()
  found = hashlib.sha256()
  # By name: what was a tuple with names when it was saved is a dict when it is read.
  named = {jax.tree_util.keystr(p, simple=True, separator='/'): leaf for p, leaf in leaves}
  for name, leaf in sorted(named.items()):
    found.update(f'{name} {leaf.dtype} {leaf.shape}'.encode())
    found.update(np.ascontiguousarray(leaf).tobytes())
  return found.hexdigest()


def be_silent() -> None:
  """Has nothing printed of what orbax and tensorstore meet in their threads: they raise it too.

  A full disk would else fill a terminal with tracebacks.
  """
  sys.unraisablehook = unraisable
  for name in ('absl', 'asyncio'):
    logging.getLogger(name).addFilter(is_news)


def is_news(record: logging.LogRecord) -> bool:
  """Whether a log record is not of an error that orbax raises as well."""
  error = record.exc_info and record.exc_info[1]
  return not error or (record.name != 'absl' and 'orbax-checkpoint-tmp' not in str(error))


def unraisable(found) -> None:
  """Python's own, but for what was under way when orbax gave a checkpoint up."""
  if str(found.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(found)


def check_readable(folder: pathlib.Path) -> None:
  """Raises OSError where a file can't be read now: what it holds may yet be whole."""

  def fail(error):
    raise error

  try:
    for inside, _, names in os.walk(folder, onerror=fail):
      for name in names:
        with open(os.path.join(inside, name), 'rb') as file:
          while file.read(2**24):
            pass
  except FileNotFoundError:  # nor will it be
    pass
  except OSError as error:
    raise OSError(
      f'The checkpoint {folder} can not be read ({error.strerror}: {error.filename}). It was left '
      'as it is; the same command goes on once it can.'
    ) from error


def damaged(checkpoint: pathlib.Path, reason: object) -> Damaged:
  """The error for a checkpoint that is of no use."""
  reason = (str(reason).splitlines() or [''])[0][:200]
  return Damaged(f'The checkpoint {checkpoint} is damaged: {reason.rstrip(".")}.')
