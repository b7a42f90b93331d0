"""Reads the parts (items) of a checkpoint with orbax, and decides which errors mean damage.

Decisions:
  * A checkpoint is damaged if a file is missing or has invalid content. When a run resumes, damaged
    checkpoints are moved away, so errors with other causes must not count as damage. Examples are a
    file that cannot be read at the moment, and a process that has too little memory.
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

from vit_jax import bucket


class Damaged(ValueError):
  """Raised for a checkpoint whose files are invalid or have changed since it was saved."""


# Errors that orbax raises for files with invalid content, or for missing files.
CONTENT = (
  ValueError, LookupError, TypeError, AttributeError, RecursionError,
  FileNotFoundError, IsADirectoryError, NotADirectoryError,
)  # fmt: skip
# A ValueError of tensorstore with one of these texts is not caused by the content of the files.
LIMITS = (
  'RESOURCE_EXHAUSTED', 'UNAVAILABLE', 'PERMISSION_DENIED', 'CANCELLED', 'ABORTED',
  'DEADLINE_EXCEEDED', os.strerror(errno.EMFILE), os.strerror(errno.ENFILE),
  os.strerror(errno.ENOMEM),
)  # fmt: skip

ARRAYS = 'params', 'state', 'names'  # the items with arrays; the fourth item, `config`, is JSON

# Options for orbax: only process 0 takes part.
ALONE = ocp.options.MultiprocessingOptions(active_processes={0})


def restored(checkpoint: pathlib.Path, item: str):
  """Returns one item (part) of a checkpoint as orbax reads it, without comparing checksums.

  Args:
    checkpoint: folder of the checkpoint.
    item: name of the item. `config` gives a dict; other items give a tree of NumPy arrays.

  Raises:
    Damaged: the item is missing, or its files are not valid.
  """
  handlers = {'config': ocp.JsonCheckpointHandler}
  handler = handlers.get(item, ocp.StandardCheckpointHandler)(multiprocessing_options=ALONE)
  opened = ocp.Checkpointer(handler, multiprocessing_options=ALONE)
  with condemning(checkpoint), opened as checkpointer:
    return checkpointer.restore(checkpoint / item)


@contextlib.contextmanager
def condemning(checkpoint: pathlib.Path) -> Iterator[None]:
  """Turns errors caused by the content of a checkpoint's files into `Damaged`.

  Errors with other causes are not changed. Examples are a missing device, too little memory, too
  many threads or open files, and a version of orbax that does not fit JAX.

  Raises:
    Damaged: the files are not a valid checkpoint.
    OSError: a file cannot be read at the moment.
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
  """Raises an error if this process cannot save and read a small checkpoint of its own.

  Such a process cannot decide whether the files of another checkpoint are damaged.
  """
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder).resolve() / 'probe'
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=ALONE)
    with ocp.Checkpointer(handler, multiprocessing_options=ALONE) as checkpointer:
      checkpointer.save(path, args=ocp.args.StandardSave({'probe': np.zeros(1)}))
      checkpointer.restore(path)


def digest(item) -> str:
  """Returns the SHA-256 of a checkpoint's item, which is JSON or a tree of NumPy arrays.

  The hash of a tree covers the names, types, shapes and bytes of the arrays.
  """
  leaves = jax.tree_util.tree_leaves_with_path(item)
  if not all(isinstance(leaf, np.ndarray | np.generic) for _, leaf in leaves):
    return hashlib.sha256(json.dumps(item, sort_keys=True).encode()).hexdigest()
  found = hashlib.sha256()
  # Sorted by name, because orbax reads a named tuple back as a dict, whose leaves are sorted.
  named = {jax.tree_util.keystr(p, simple=True, separator='/'): leaf for p, leaf in leaves}
  for name, leaf in sorted(named.items()):
    found.update(f'{name} {leaf.dtype} {leaf.shape}'.encode())
    found.update(np.ascontiguousarray(leaf).tobytes())
  return found.hexdigest()


def be_silent() -> None:
  """Stops orbax and tensorstore from printing errors that are also raised as exceptions.

  Without this function, a full disk would fill the terminal with tracebacks.
  """
  sys.unraisablehook = unraisable
  for name in ('absl', 'asyncio'):
    logging.getLogger(name).addFilter(is_news)


def is_news(record: logging.LogRecord) -> bool:
  """Returns whether to print a log record: False if orbax also raises it as an error."""
  error = record.exc_info and record.exc_info[1]
  return not error or (record.name != 'absl' and 'orbax-checkpoint-tmp' not in str(error))


def is_error(record: logging.LogRecord) -> bool:
  """Returns whether a log record is an error, not a warning."""
  return record.levelno >= logging.ERROR


def unraisable(found) -> None:
  """Replaces `sys.unraisablehook`, to print all errors except `Event loop is closed`.

  orbax causes `Event loop is closed` if saving a checkpoint fails.
  """
  if str(found.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(found)


def check_readable(folder: pathlib.Path) -> None:
  """Raises OSError if a file in a folder cannot be read at the moment.

  The error is not `Damaged`, because the content of such a file can still be valid. Files in a
  bucket are not checked, because their read errors have a type that is not in `CONTENT`.
  """
  if bucket.is_remote(folder):
    return

  def fail(error):
    raise error

  try:
    for inside, _, names in os.walk(folder, onerror=fail):
      for name in names:
        with open(os.path.join(inside, name), 'rb') as file:
          while file.read(2**24):
            pass
  except FileNotFoundError:  # a missing file cannot be read later either
    pass
  except OSError as error:
    raise OSError(
      f'The checkpoint {folder} cannot be read ({error.strerror}: {error.filename}). Make the file '
      'readable and repeat the command. The checkpoint was not changed.'
    ) from error


def damaged(checkpoint: pathlib.Path, reason: object) -> Damaged:
  """Returns the error for a damaged checkpoint; `reason` is a text or an exception."""
  reason = (str(reason).splitlines() or [''])[0][:200]
  return Damaged(f'The checkpoint {checkpoint} is damaged: {reason.rstrip(".")}.')
