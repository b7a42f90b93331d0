"""Writes the checksums of a checkpoint's files to `digests.json`, and compares files with them.

Decisions:
  * Neither orbax nor tensorstore notices a flipped bit in array data. So `digests.json` stores the
    size and the CRC-32 of every file of a checkpoint's four items (parts, see `checkpoint.py`). A
    CRC detects damage, but not tampering.
  * Checksums are computed from files, not from arrays. Therefore, a process can check them without
    the devices that wrote the arrays, and never needs memory for a whole array.
  * `digests.json` is the last file that is written to a checkpoint. A checkpoint without this file
    is ignored, because it is incomplete. Only checkpoints of older versions are used without this
    file. Their item `config` has no key `format`. Some have checksums of arrays, some have none.
  * `_CHECKPOINT_METADATA` has no checksum, because orbax changes this file when it gives a
    checkpoint its final name.
"""

from collections.abc import Sequence
import json
import pathlib
import zlib

from vit_jax.bucket import is_remote, list_below
from vit_jax.workdir import items

FILE = 'digests.json'
FORMAT = 2  # value of the key `format` in the item `config`, if a checkpoint has `digests.json`
CHUNK = 2**24  # bytes that are read at once


def write_digests(checkpoint: pathlib.Path, needed: Sequence[str] = ()) -> None:
  """Writes `digests.json`: the checksums of all files in a checkpoint's items (subfolders).

  Raises:
    ValueError: one of the files `needed` is missing.
  """
  found = {name: checksum(checkpoint / name) for name in files_below(checkpoint)}
  if missing := [name for name in needed if name not in found]:
    raise ValueError(f'orbax did not write {", ".join(missing)}')
  (checkpoint / FILE).write_bytes(json.dumps({'crc32': found}, indent=1).encode())


def checksum(file: pathlib.Path) -> list[int]:
  """Returns [size in bytes, CRC-32] of a file."""
  size, crc = 0, 0
  with file.open('rb') as opened:
    while data := opened.read(CHUNK):
      size, crc = size + len(data), zlib.crc32(data, crc)
  return [size, crc]


def files_below(folder: pathlib.Path) -> list[str]:
  """Returns the names of all files in the subfolders of a folder, e.g. `params/manifest.ocdbt`."""
  if is_remote(folder):  # in a bucket, `is_dir` would return False after a failed request
    names = list_below(folder)
  else:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file())
  return sorted(name for name in names if '/' in name)


def counts(checkpoint: pathlib.Path) -> bool:
  """Returns whether a checkpoint was ever complete, even if it was damaged later."""
  if (checkpoint / FILE).exists():
    return True
  try:
    config = json.loads((checkpoint / 'config' / 'metadata').read_bytes())
  except (OSError, ValueError, RecursionError):
    return True  # readers report the error
  return not isinstance(config, dict) or 'format' not in config


def compare_files(
  checkpoint: pathlib.Path, item: str = '', share: tuple[int, int] = (0, 1)
) -> bool:
  """Compares files of a checkpoint with their checksums.

  Args:
    checkpoint: folder of the checkpoint.
    item: compares only the files of this item; empty for the files of all items.
    share: (i, n) compares only files i, i + n, i + 2n, ..., e.g. to divide the work over processes.

  Returns:
    True if the files match their checksums; False for a checkpoint of an older version, which has
    no checksums of files.

  Raises:
    Damaged: a file has changed, or is missing.
    OSError: a file cannot be read at the moment.
  """
  if not (checkpoint / FILE).exists():
    if not counts(checkpoint):
      raise items.damaged(checkpoint, f'its file {FILE} is missing')
    return False
  listed = read_digests(checkpoint)
  names = sorted(name for name in listed if name.startswith(f'{item}/' if item else ''))
  if not names:
    raise broken(checkpoint, f'{FILE} has no checksums of {item}/')
  for name in names[share[0] :: share[1]]:
    try:
      now = checksum(checkpoint / name)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
      raise broken(checkpoint, f'its file {name} is missing') from None
    except OSError:
      items.check_readable(checkpoint)
      raise
    if now != listed[name]:
      raise broken(checkpoint, f'its file {name} does not match the checksum')
  return True


def read_digests(checkpoint: pathlib.Path) -> dict[str, list[int]]:
  """Returns the content of `digests.json`: {name of a file: [size, CRC-32]}.

  Raises:
    Damaged: the content is not valid.
  """
  try:
    found = json.loads((checkpoint / FILE).read_bytes())['crc32']
    if isinstance(found, dict) and found:
      return found
  except FileNotFoundError:
    pass  # was deleted a moment ago
  except OSError:
    items.check_readable(checkpoint)
    raise
  except (ValueError, LookupError, TypeError, RecursionError):
    pass
  raise broken(checkpoint, f'its file {FILE} is not valid')


def broken(checkpoint: pathlib.Path, reason: str) -> items.Damaged:
  """Returns the error `Damaged`, but raises OSError if a file cannot be read at the moment."""
  items.check_readable(checkpoint)
  return items.damaged(checkpoint, reason)
