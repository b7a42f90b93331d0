"""Locks a workdir, so that only one run at a time writes into it."""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import logging
import os
import pathlib
from typing import IO

from vit_jax import bucket, storage
from vit_jax.distributed import from_first
from vit_jax.workdir import writer

log = logging.getLogger(__name__)

# If opening `log.txt` fails with one of these errors, the workdir is not writable.
UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


@contextlib.contextmanager
def held(workdir: pathlib.Path) -> Iterator[None]:
  """Locks a workdir, so that only one run at a time writes into it. Creates missing folders.

  Process 0 holds the lock for all processes. If the run writes nothing, new folders and the new
  `log.txt` are removed again. A read-only workdir is not locked, because nothing can be written.
  In a bucket, the lock is a `bucket.Lease`. If this process is suspended for too long, another
  process can take over the lock. The next write of this process then raises `bucket.Lost`.

  Raises:
    ValueError: another run holds the lock, in this process or in a different one.
  """
  with contextlib.ExitStack() as stack:
    hold = held_remotely if bucket.is_remote(workdir) else held_locally
    from_first(lambda: stack.enter_context(hold(workdir)))
    yield


@contextlib.contextmanager
def held_remotely(workdir: pathlib.Path) -> Iterator[None]:
  """Locks a workdir in a bucket, like `held`. Only process 0 calls this function."""
  storage.check_folder(workdir)
  with bucket.Lease(workdir) as lease, storage.guarded(workdir, lease.check):
    yield


@contextlib.contextmanager
def held_locally(workdir: pathlib.Path) -> Iterator[None]:
  """Locks a local workdir, like `held`. Only process 0 calls this function."""
  made = [path for path in (workdir / 'log.txt', workdir, *workdir.parents) if not path.exists()]
  file = lock(workdir)
  try:
    yield
  finally:
    if file is not None:
      with contextlib.suppress(OSError):  # a folder that is not empty is kept
        for path in made:
          if path.is_dir():
            path.rmdir()
          elif not path.stat().st_size:
            path.unlink()
      file.close()


def discard(folder: pathlib.Path) -> None:
  """Deletes a workdir or a part of it, if it exists."""
  bucket.delete_all(folder)


def lock(workdir: pathlib.Path) -> IO | None:
  """Opens and locks `log.txt`, and returns the open file; closing it releases the lock.

  Returns None if the file is not writable. On file systems without locks, the file is not locked.

  Raises:
    ValueError: another run holds the lock.
  """
  while True:
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      file = (workdir / 'log.txt').open('a', encoding='utf-8')
    except OSError as error:
      if error.errno in UNWRITABLE:
        return None
      raise
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.close()
      raise ValueError(
        f'{workdir}: another run is writing here. Wait until it ends, or use a different --workdir.'
      ) from error
    except OSError as error:  # some network file systems have no locks
      writer.LOG.info(
        '%s cannot be locked (%s). This run continues, but do not start a second run in this '
        'workdir: vit_jax would not notice it.',
        file.name,
        error,
      )
      return file
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
        return file
    file.close()  # the run that held the lock has removed this file
