"""Checks and formats names, sizes and arguments that users give."""

from collections.abc import Callable, Collection, Mapping, Sequence
import difflib
import inspect
import numbers
import re

WORDNET_ID = re.compile(r'n\d{8}')  # class name in ImageNet's data
SHOWN = 5  # maximum number of names or errors that a message lists


def choose(what: str, name: str, table: Collection[str]):
  """Looks up a name: returns `table[name]`, or `name` if the table is not a dict.

  Raises:
    ValueError: the name is unknown. The message begins with `what`, gives similar names, and lists
      all valid names if there are at most 40.
  """
  if name not in table:
    near = difflib.get_close_matches(str(name), [str(key) for key in table], n=3)
    hint = f' Did you mean {" or ".join(near)}?' if near else ''
    names = [str(key) or "'' (empty)" for key in sorted(table)]
    valid = f' Valid: {", ".join(names)}.' if len(names) <= 40 else ''
    raise ValueError(f'{what}: unknown {name!r}.{hint}{valid}')
  return table[name] if isinstance(table, dict) else name


def accepted(function: Callable, arguments: Mapping[str, object]) -> dict[str, object]:
  """Returns the `arguments` that a function accepts; all `arguments` if it has `**kwargs`."""
  parameters = inspect.signature(function).parameters.values()
  if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
    return dict(arguments)
  by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
  names = {parameter.name for parameter in parameters if parameter.kind in by_name}
  return {name: value for name, value in arguments.items() if name in names}


def difference(ones: Sequence[str], others: Sequence[str]) -> str:
  """Describes how two lists of class names differ; the text has no full stop at its end."""
  only = sorted({*ones} ^ {*others})
  return f'Classes in only one of the two lists: {abridged(only)}' if only else 'The order differs'


def same_classes(own: Sequence[str] | None, given: Sequence[str]) -> bool:
  """Returns whether weights have the classes of the data in the same order.

  Published ImageNet classifiers name their classes with words, and the first class is the tench.
  ImageNet's data uses WordNet IDs, and the first is n01440764. Sorted IDs have the order of these
  classifiers, so such names count as the same; `assumed` warns of this.

  Args:
    own: names of the classes of the weights; None if unknown.
    given: names of the classes of the data.
  """
  if own is None or own == given:
    return own == given
  if len(own) != len(given) or not own:
    return False
  tench = own[0].casefold().startswith('tench') and given[0] == 'n01440764'
  return tench and all(map(WORDNET_ID.fullmatch, given)) and list(given) == sorted(given)


def assumed(own: Sequence[str], given: Sequence[str]) -> str:
  """Returns a warning that the names of weights and data count as the same classes."""
  return (
    f'The weights have the classes {abridged(own)}, and the data has the classes '
    f'{abridged(given)}. They are assumed to be the same classes in the same order.'
  )


def abridged(names: Sequence[str]) -> str:
  """Returns the first `SHOWN` names as text, with the number of names that are left out."""
  more = len(names) - SHOWN
  between = '; ' if any(',' in name for name in names[:SHOWN]) else ', '
  return between.join(names[:SHOWN]) + (f' and {more:,} more' if more > 0 else '')


def pair(size: int | Sequence[int], what: str = 'A size') -> tuple[int, int]:
  """Converts one or two numbers to (height, width).

  Raises:
    ValueError: the size is not one or two positive integers; the message begins with `what`.
  """
  both = tuple(size) if isinstance(size, (tuple, list)) else (size,)
  if len(both) not in (1, 2) or not all(type(n) is int and n > 0 for n in both):
    raise ValueError(f'{what}: expected one or two positive integers, got {size!r}.')
  return both * 2 if len(both) == 1 else both


def check_positive(what: str, value: object) -> None:
  """Raises ValueError if a value is not a positive integer; the message begins with `what`."""
  if not isinstance(value, numbers.Integral) or value < 1:
    raise ValueError(f'{what} must be a positive integer, got {value!r}.')


def encodable(text: str) -> str:
  """Replaces each lone surrogate, which stands for a byte of a name that is not UTF-8, by `?`."""
  return text.encode(errors='replace').decode()


def one_line(text: str) -> str:
  """Escapes line breaks and other control characters, so that the text stays on one line."""
  escaped = lambda found: found.group().encode('unicode_escape').decode()
  return re.sub(r'[\x00-\x1f\x7f-\x9f\u2028\u2029]', escaped, text)
