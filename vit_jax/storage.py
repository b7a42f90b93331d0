"""Writes files atomically, and checks before long work whether they can be written."""

from collections.abc import Iterator
import contextlib
import errno
import logging
import os
import pathlib

log = logging.getLogger(__name__)

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.EFBIG, errno.EIO)


class Unwritten(OSError):
  """Error for a file that cannot be written; the message gives the file, reason and remedy."""


def check_folder(folder: pathlib.Path) -> None:
  """Raises ValueError if a folder cannot be created or written to."""
  whole = folder.absolute()
  there = next(place for place in (whole, *whole.parents) if os.path.lexists(place))
  if not there.is_dir():
    raise ValueError(f'Cannot write to {folder}: {there} is a file, not a folder.')
  if not os.access(there, os.W_OK | os.X_OK):
    raise ValueError(f'Cannot write to {folder}: {there} is read-only for this user.')


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
  """Turns disk errors into `Unwritten`, because few of them name the file."""
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
  """Logs a warning instead of raising `Unwritten`, for results that are also printed."""
  try:
    yield
  except Unwritten as error:
    log.warning('%s The result is only printed.', error)


def unwritten(path: pathlib.Path, why: str) -> Unwritten:
  """Returns the error for a file that cannot be written."""
  return Unwritten(f'Cannot write {path} ({why}). Free disk space, or fix the cause, and retry.')


def reason(error: Exception) -> str | None:
  """Returns the reason of a disk error; None for any other error."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  return next((text for text in map(os.strerror, DISK) if text in str(error)), None)


def replace(path: pathlib.Path, text: str) -> None:
  """Replaces a file atomically: even after a crash, it has either the old or the new text."""
  with replacing(path) as partial:
    # The text may hold file names that are not UTF-8.
    partial.write_text(text, encoding='utf-8', errors='backslashreplace')


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary file that replaces `path` once it has been written completely."""
  partial = path.with_name(path.name + '.partial')
  with writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      yield partial
      partial.replace(path)
    except BaseException:
      partial.unlink(missing_ok=True)
      raise
