"""Writes files atomically, and checks before a long run whether files can be written.

A path can be in a bucket of cloud storage. A bucket always writes an object atomically. If a bucket
does not answer, the program ends with the exit code `TRY_AGAIN`.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import errno
import logging
import os
import pathlib
import tempfile
import uuid

from vit_jax import bucket

log = logging.getLogger(__name__)

TRY_AGAIN = 75  # exit code: the same command can succeed later; EX_TEMPFAIL of sysexits.h
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.EFBIG, errno.EIO)


_guards: dict[str, Callable[[], None]] = {}  # {folder: check}; see `guarded`


class Unwritten(OSError):
  """Error for a file that cannot be written; the message gives file, reason and remedy."""


class Passing(ValueError):
  """Raised in every process if a bucket does not answer one process; trying again can succeed."""


class NoMistake(ValueError):
  """Error that the user did not cause, such as a lost connection to another process."""


def compiled_folder() -> str | None:
  """Returns the default folder for compiled programs; None if this user has no home folder."""
  cache = os.path.expanduser(os.environ.get('XDG_CACHE_HOME') or '~/.cache')
  return None if cache.startswith('~') else os.path.join(cache, 'vit_jax', 'compiled')


def exit_code(error: BaseException | None) -> int:
  """Returns the exit code of a program that ends with this error.

  The code is `TRY_AGAIN` if a bucket did not answer, 1 for `NoMistake`, and 2 for other errors.
  """
  while error is not None:
    if isinstance(error, bucket.NoAnswer | Passing):
      return TRY_AGAIN
    if isinstance(error, NoMistake):
      return 1
    error = error.__cause__
  return 2


def told(text: str, code: int) -> ValueError:
  """Returns the error to raise in this process after another process failed.

  Args:
    text: message of the error.
    code: exit code of the other process, from `exit_code`.
  """
  return {TRY_AGAIN: Passing, 1: NoMistake}.get(code, ValueError)(text)


def check_folder(folder: pathlib.Path) -> None:
  """Raises ValueError if a folder cannot be created, or files cannot be written into it."""
  if bucket.is_remote(folder):
    check_remote(folder)
    return
  whole = folder.absolute()
  there = next(place for place in (whole, *whole.parents) if os.path.lexists(place))
  if not there.is_dir():
    raise ValueError(f'Cannot write to {folder}: {there} is a file, not a folder.')
  if not os.access(there, os.W_OK | os.X_OK):
    raise ValueError(f'Cannot write to {folder}: {there} is read-only for this user.')


def check_remote(folder: pathlib.Path) -> None:
  """Raises ValueError if no object can be written into a folder of a bucket."""
  probe = folder / f'.{uuid.uuid4().hex}'
  try:
    probe.write_bytes(b'')
    bucket.delete_all(probe)
  except Exception as error:  # each library raises its own error types
    raise ValueError(f'Cannot write to {folder}: {bucket.why_refused(error)}') from error


@contextlib.contextmanager
def guarded(folder: pathlib.Path, check: Callable[[], None]) -> Iterator[None]:
  """Context manager in which `check` is called before each file in a folder is written.

  `check` raises an error to prevent writing, e.g. because the lock of the folder was lost.
  """
  _guards[str(folder)] = check
  try:
    yield
  finally:
    del _guards[str(folder)]


def check_allowed(path: pathlib.Path) -> None:
  """Calls the checks of all guarded folders that contain `path`; a check can raise an error."""
  for place in (path, *path.parents) if _guards else ():
    if check := _guards.get(str(place)):
      check()


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
  """Context manager that turns errors of disks and buckets into `Unwritten`, naming the file."""
  try:
    yield
  except Unwritten:
    raise
  except Exception as error:  # each library raises its own error types
    if why := reason(error):
      raise unwritten(path, why) from error
    raise


@contextlib.contextmanager
def tolerated() -> Iterator[None]:
  """Context manager that turns `Unwritten` into a warning, for results that are also printed."""
  try:
    yield
  except Unwritten as error:
    log.warning('%s The result is only printed.', error)


def unwritten(path: pathlib.Path, why: str) -> Unwritten:
  """Returns the error for a file that cannot be written."""
  remedy = 'Fix the cause' if bucket.is_remote(path) else 'Free disk space, or fix the cause,'
  return Unwritten(f'Cannot write {path} ({why.rstrip(".")}). {remedy} and retry.')


def upload(files: Sequence[pathlib.Path], folder: pathlib.Path) -> None:
  """Writes local files into a folder of a bucket."""
  for file in files:
    check_allowed(folder)
    with uploading(folder / file.name):
      bucket.put(file, folder / file.name)


@contextlib.contextmanager
def uploading(path: pathlib.Path) -> Iterator[None]:
  """Context manager for writing to a bucket: turns every error into `Unwritten`."""
  try:
    yield
  except Exception as error:  # each library raises its own error types
    raise unwritten(path, bucket.why_refused(error)) from error


def reason(error: Exception) -> str | None:
  """Returns the reason of a disk error as text; None for any other error."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  return next((text for text in map(os.strerror, DISK) if text in str(error)), None)


def replace(path: pathlib.Path, text: str) -> None:
  """Replaces a file atomically: even after a crash, the file has either the old or the new text."""
  with replacing(path) as partial:
    # The text may contain file names that are not valid UTF-8.
    partial.write_text(text, encoding='utf-8', errors='backslashreplace')


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Context manager that yields a temporary file, which replaces `path` if no error occurs."""
  if bucket.is_remote(path):
    with writing(path), tempfile.TemporaryDirectory(prefix='vit_jax_') as scratch:
      partial = pathlib.Path(scratch) / path.name
      yield partial
      upload([partial], path.parent)
    return
  # Two commands may write the same file at once, e.g. if both evaluate a workdir.
  partial = path.with_name(f'{path.name}.{os.getpid()}.partial')
  with writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      yield partial
      partial.replace(path)
    except BaseException:
      partial.unlink(missing_ok=True)
      raise
