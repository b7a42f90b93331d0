"""Files on this machine, written whole. Whether they can be is asked before they are computed."""

from collections.abc import Iterator
import contextlib
import errno
import os
import pathlib

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.EFBIG, errno.EIO)


class Unwritten(OSError):
  """A file can't be written; the message says which, why, and what to do."""


def check_folder(folder: pathlib.Path) -> None:
  """Raises ValueError where files can't be written into a folder, or it can't be made."""
  whole = folder.absolute()
  there = next(place for place in (whole, *whole.parents) if os.path.lexists(place))
  if not there.is_dir():
    raise ValueError(f'{folder} can not be written into: {there} is a file; a folder is needed.')
  if not os.access(there, os.W_OK | os.X_OK):
    raise ValueError(f'{folder} can not be written into: {there} is read-only here.')


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
  """Turns errors of the disk, which rarely name the file, into `Unwritten`."""
  try:
    yield
  except Unwritten:
    raise
  except Exception as error:  # each library that writes raises kinds of its own
    if why := reason(error):
      raise unwritten(path, why) from error
    raise


def unwritten(path: pathlib.Path, why: str) -> Unwritten:
  """The error for a file that can't be written."""
  return Unwritten(f'{path} can not be written ({why}). Make room, or whatever it needs.')


def reason(error: Exception) -> str | None:
  """What the disk said; None for an error that is not the disk's."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  return next((text for text in map(os.strerror, DISK) if text in str(error)), None)


def replace(path: pathlib.Path, text: str) -> None:
  """Replaces a file in one step, so that a crash or a full disk leaves the old or the new."""
  with replacing(path) as partial:
    # The name of a file need not be UTF-8.
    partial.write_text(text, encoding='utf-8', errors='backslashreplace')


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A file to write into that takes the place of `path` once it is whole."""
  partial = path.with_name(path.name + '.partial')
  with writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      yield partial
      partial.replace(path)
    except BaseException:
      partial.unlink(missing_ok=True)
      raise
