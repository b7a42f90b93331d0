"""Whether there is a place for what is computed, asked before it is."""

import os
import pathlib


def check_folder(folder: pathlib.Path) -> None:
  """Raises ValueError where files can't be written into a folder, or it can't be made."""
  whole = folder.absolute()
  there = next(place for place in (whole, *whole.parents) if os.path.lexists(place))
  if not there.is_dir():
    raise ValueError(f'{folder} can not be written into: {there} is a file; a folder is needed.')
  if not os.access(there, os.W_OK | os.X_OK):
    raise ValueError(f'{folder} can not be written into: {there} is read-only here.')
