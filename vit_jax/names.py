"""Names looked up in tables, and sizes: what people write, and what is said of mistakes."""

from collections.abc import Collection, Sequence
import difflib


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
