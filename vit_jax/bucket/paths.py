"""Converts text from the user to local paths or to paths in a bucket."""

import os
import pathlib
import re

from vit_jax.bucket import client

SCHEME = 'gs://'


def to_path(path: str | os.PathLike) -> pathlib.Path:
  """Converts text with the prefix `gs://` to an `etils.epath.Path`, other text to a local path.

  In a local path, `~` is expanded. The first call for each bucket sends a request to the bucket, so
  that a wrong name or missing credentials are reported early.

  Raises:
    ValueError: `path` is a URL other than `gs://...`, or the bucket cannot be used; the message
      gives the reason.
    OSError: the bucket does not answer.
  """
  text = os.fspath(path)
  # One slash is enough: `pathlib.Path` turns `gs://` into `gs:/`.
  found = re.match(r'([A-Za-z][A-Za-z0-9+.-]+):/+', text)
  if not found:
    return expand(text)
  if found[1] != 'gs':
    raise ValueError(
      f'{text}: URLs of this kind are not supported. Give a path on this machine, or a bucket of '
      'Google Cloud Storage: gs://<bucket>/<folder>.'
    )
  bucket, _, key = text[found.end() :].partition('/')
  if not bucket:
    raise ValueError(f'{text}: the name of the bucket is missing. Write gs://<bucket>/<folder>.')
  client.prepare_clients()
  client.check_access(bucket)
  from etils import epath  # here: after `prepare_clients`, only for buckets

  return epath.Path(f'{SCHEME}{bucket}/{key}'.rstrip('/'))


def expand(path: str | os.PathLike) -> pathlib.Path:
  """Returns a local path with `~` expanded.

  If there is no user `x`, the path `~x` stays unchanged, because it can be the name of a file.
  `Path.expanduser` would raise an error.
  """
  return pathlib.Path(os.path.expanduser(path))


def is_remote(path: str | os.PathLike) -> bool:
  """Returns whether a path is in a bucket: its text starts with `gs://`."""
  return os.fspath(path).startswith(SCHEME)


def join_paths(base: pathlib.Path, path: pathlib.Path) -> pathlib.Path:
  """Returns `base / path`, or `path` unchanged if it is absolute or in a bucket."""
  return path if is_remote(path) or path.is_absolute() else base / path


def absolute(path: pathlib.Path) -> pathlib.Path:
  """Returns the absolute path, with symbolic links resolved. Paths in buckets stay unchanged."""
  return path if is_remote(path) else expand(path).resolve()


def local_only(what: str, path: str | os.PathLike) -> pathlib.Path:
  """Returns a local path with `~` expanded.

  Args:
    what: name of the flag or config key, for the error message.
    path: a path on this machine.

  Raises:
    ValueError: the path is a URL.
  """
  if re.match(r'[A-Za-z][A-Za-z0-9+.-]+:/', os.fspath(path)):
    raise ValueError(f'{what}: {path} is a URL, but must be a path on this machine.')
  return expand(path)
