"""Parses splits in TFDS notation (`train[:98%]`, `train[10%:]+test`), and hashes names of files.

The hash of a file's name gives the file a position. A percentage of files is a range of positions.
Parsing does not need the package tensorflow-datasets (TFDS). The unit `shard` of TFDS, as in
`train[:4shard]`, is not supported.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
import hashlib
import os
import re
import unicodedata

import numpy as np

from vit_jax.names import choose

# Names of folders with test images, in the order of preference.
TEST_NAMES = ('test', 'val', 'valid', 'validation')
# Folders with these names are probably splits, not classes.
SPLIT_LIKE = {'train', 'training', 'testing', 'eval', 'evaluation', 'dev', *TEST_NAMES}

Piece = tuple[str, int, int]  # name of a split, index of its first example, index after its last

# As in TFDS, a percent sign after one of two numbers applies to both: [10:20%] is [10%:20%].
NOTATION = re.compile(r'[\w-]+(\[((?P<first>-?[\d_.]+)%?)?:((?P<last>-?[\d_.]+)%?)?\])?')

WHOLE = 10**9  # for files, percentages are hash positions, rounded to multiples of 1 / WHOLE


def resolve(
  spec: str, sizes: Mapping[str, int], positions: Mapping[str, np.ndarray] | None = None
) -> list[Piece]:
  """Returns the pieces `(split, start, stop)` that make up a split.

  Args:
    spec: the split in TFDS notation.
    sizes: number of examples in each whole split.
    positions: for each split that consists of files, the positions of its files in increasing
      order: float `[N]` in [0, 1), computed from a hash of the name. In such a split, a percentage
      is a range of positions. In other splits, it is a fraction of the number of examples.

  Raises:
    ValueError: invalid notation, an unknown split name, no examples, or repeated examples.
  """
  positions, pieces = positions or {}, []
  for part in spec.split('+'):
    name = choose('split', part.split('[')[0].strip(), tuple(sizes))
    if name in positions and '%' in part:
      share = np.array(boundaries(part, name, WHOLE)) / WHOLE
      start, stop = np.searchsorted(positions[name], share).tolist()
    else:
      start, stop = boundaries(part, name, sizes[name])
    if start >= stop:
      continue
    if overlap(pieces, [(name, start, stop)]):
      raise ValueError(
        f'Split {spec!r} contains some examples twice. Use parts that do not overlap.'
      )
    pieces.append((name, start, stop))
  if not pieces:
    there = ', '.join(f'{name} ({size:,} examples)' for name, size in sizes.items())
    raise ValueError(
      f'Split {spec!r} contains no examples. Available: {there}. Use a larger part, e.g. '
      'train[:80%] to train and train[80%:] to validate.'
    )
  return pieces


def boundaries(part: str, name: str, size: int) -> tuple[int, int]:
  """Returns the indices (start, stop) of the examples in a part of a split, such as `train[5:]`.

  `name` is the name of the split, and `size` is the number of examples in the whole split.

  Raises:
    ValueError: invalid notation, or a boundary beyond the end of the split.
  """
  found = NOTATION.fullmatch(part.strip())
  numbers = (found['first'], found['last']) if found else ()
  if not found or ('[' in part and numbers == (None, None)):
    raise ValueError(
      f'Split {part!r}: expected the name of a split, or a part of it, such as {name}[:98%] or '
      f'{name}[-500:].'
    )
  try:
    places = [
      default if text is None else place(text, '%' in part, size)
      for text, default in zip(numbers, (0, size))
    ]
  except ValueError as error:
    raise ValueError(f'Split {part!r}: {error}.') from error
  if max(map(abs, places)) > size:
    raise ValueError(f'Split {part!r}: the split {name} has only {size:,} examples.')
  start, stop = (size + n if n < 0 else n for n in places)
  return start, stop


def place(text: str, percent: bool, size: int) -> int:
  """Converts a boundary of a slice, such as the text `5` in `train[5:]`, to an index.

  As in Python, a negative index counts from the end. If `percent` is True, the text is a percentage
  of `size`, and the result is rounded to the nearest index.

  Raises:
    ValueError: the text is not a number, or is a percentage outside of -100 to 100.
  """
  if percent and abs(float(text)) > 100:
    raise ValueError(f'{text}% is outside of the range from -100% to 100%')
  return round(float(text) * size / 100) if percent else int(text)


def overlap(ones: Sequence[Piece], others: Sequence[Piece]) -> bool:
  """Returns whether two splits, given by their pieces, have an example in common."""
  return any(
    name == other and max(start, first) < min(stop, last)
    for name, start, stop in ones
    for other, first, last in others
  )


def num_examples(pieces: Sequence[Piece]) -> int:
  """Returns the number of examples in the pieces."""
  return sum(stop - start for _, start, stop in pieces)


def remove(pieces: Sequence[Piece], unwanted: Mapping[str, np.ndarray]) -> list[Piece]:
  """Removes unwanted examples from pieces, and returns the remaining pieces.

  Args:
    pieces: ranges of examples, (split, start, stop).
    unwanted: {split: bool `[N]`, True for each unwanted example}. If a split is not in the dict,
      all its examples are kept.
  """

  def runs() -> Iterator[Piece]:
    for name, start, stop in pieces:
      if name not in unwanted:
        yield name, start, stop
        continue
      kept = ~unwanted[name][start:stop]
      # Starts and stops of the runs of consecutive examples that are kept.
      edges = np.flatnonzero(np.diff(kept, prepend=False, append=False))
      yield from ((name, start + a, start + b) for a, b in edges.reshape(-1, 2).tolist())

  return list(runs())


def hash_name(name: str) -> int:
  """Returns a 64-bit hash of a path. Upper or lower case and the Unicode form do not matter."""
  text = os.fsencode(name).decode('utf-8', 'surrogateescape')  # the same in any locale
  text = unicodedata.normalize('NFC', text).casefold()
  digest = hashlib.sha256(text.encode('utf-8', 'surrogateescape')).digest()
  return int.from_bytes(digest[:8], 'big')


def position(hash_N: np.ndarray) -> np.ndarray:
  """Converts hashes of files to positions in [0, 1), which decide the split and order of files."""
  return (hash_N >> np.uint64(11)) * 2.0**-53


def repeated_names(hash_N: np.ndarray) -> str:
  """Returns the reason and the remedy if more than a tenth of the files share a hash, else ''.

  The text ends without a period.
  """
  count = len(np.unique(hash_N))
  if count >= 0.9 * len(hash_N):
    return ''
  return (
    f'The {len(hash_N):,} images have only {count:,} different names, and images with the same '
    'name are in the same split. Give images in different folders different names, such as '
    'cat_001.jpg'
  )


def test_splits(names: Sequence[str]) -> dict[str, str]:
  """Returns {split: its name in `names`} for names of test splits, in the order of `TEST_NAMES`.

  The first name becomes the split `test`; the others stay.
  """
  return dict(zip(('test', *names[1:]), names))


def split_like(names: Sequence[str]) -> list[str]:
  """Returns the names of classes that are probably names of splits.

  These are the names in `SPLIT_LIKE`, in any case, and names that differ only in such a word, e.g.
  `seg_train` and `seg_test`. The classes `train_station` and `test_tube` differ in another word.
  """
  words = {name: re.findall(r'[^\W\d_]+', name.casefold()) for name in names}
  others = {
    name: tuple(word for word in found if word not in SPLIT_LIKE)
    for name, found in words.items()
    if not SPLIT_LIKE.isdisjoint(found)
  }
  shared = collections.Counter(others.values())
  return [n for n, rest in others.items() if n.casefold() in SPLIT_LIKE or shared[rest] > 1]
