"""What people write: names of a table, sizes and paths, and what is said of mistakes."""

from collections.abc import Collection, Sequence
import difflib
import pathlib
import re


def choose(what: str, name: str, table: Collection[str]):
  """`table[name]`, or `name` where the table is a plain collection.

  Raises:
    ValueError: unknown; the message names `what`, the nearest names and, where they are
      few, all valid ones.
  """
  if name not in table:
    near = difflib.get_close_matches(str(name), [str(key) for key in table], n=3)
    hint = f' Did you mean {" or ".join(near)}?' if near else ''
    names = [key or "'' (empty)" for key in sorted(table)]
    valid = f' Valid: {", ".join(names)}.' if len(names) <= 40 else ''
    raise ValueError(f'{what}: unknown {name!r}.{hint}{valid}')
  return table[name] if isinstance(table, dict) else name


def pair(size: int | Sequence[int], what: str = 'A size') -> tuple[int, int]:
  """(height, width) from one number or two.

  Raises:
    ValueError: not one or two positive integers; the message begins with `what`.
  """
  both = tuple(size) if isinstance(size, (tuple, list)) else (size,)
  if len(both) not in (1, 2) or not all(type(n) is int and n > 0 for n in both):
    raise ValueError(f'{what}: expected one or two positive integers, got {size!r}.')
  return both * 2 if len(both) == 1 else both


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
