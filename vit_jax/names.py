"""Looks a name up in a table, and says what was meant when it isn't there."""

from collections.abc import Collection
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
