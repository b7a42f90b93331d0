"""Paths as people write them."""

import pathlib
import re


def local(path: str | pathlib.Path) -> pathlib.Path:
  """The path, `~` expanded.

  Raises:
    ValueError: a URL, as gs://bucket/run.
  """
  if re.match(r'[A-Za-z][A-Za-z0-9+.-]+:/', str(path)):  # a `Path` has one slash left of two
    raise ValueError(
      f'{path}: URLs are not supported; give a path on this machine, e.g. of a mounted bucket.'
    )
  return pathlib.Path(path).expanduser()
