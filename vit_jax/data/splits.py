"""Splits in TFDS notation (`train[:98%]`, `train[10%:]+test`) for every source."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from vit_jax.names import choose

Piece = tuple[str, int, int]  # the name of a split, its first example and the one after the last

WHOLE = 10**9  # parts that a percentage is rounded to, where positions decide


def resolve(
  spec: str, sizes: Mapping[str, int], positions: Mapping[str, np.ndarray] | None = None
) -> list[Piece]:
  """The pieces that a split names.

  Args:
    spec: the split, as TFDS writes it.
    sizes: the number of examples in each whole split.
    positions: for splits whose percentages are not of their size: the rising positions of their
      examples in [0, 1).

  Raises:
    ValueError: bad notation, an unknown name, or no examples.
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
      raise ValueError(f'Split {spec!r} holds some examples twice.')
    pieces.append((name, start, stop))
  if not pieces:
    raise ValueError(
      f'Split {spec!r} holds no examples; the sizes are {dict(sizes)}. Take a larger part.'
    )
  return pieces


def boundaries(part: str, name: str, size: int) -> tuple[int, int]:
  """Start and stop of a slice (`train[5:]`) of so many examples.

  Raises:
    ValueError: bad notation, or a boundary beyond the size.
  """
  from tensorflow_datasets import core  # here, so that predicting needs no datasets

  info = core.SplitInfo(name=name, shard_lengths=[size], num_bytes=0)
  try:
    (found,) = core.ReadInstruction.from_spec(part.strip()).to_absolute({name: info})
  except (ValueError, AssertionError) as error:
    raise ValueError(f'Split {part!r} of {size:,}: {str(error).splitlines()[0]}') from error
  return found.from_ or 0, size if found.to is None else found.to


def overlap(ones: Sequence[Piece], others: Sequence[Piece]) -> bool:
  """Whether two splits share an example."""
  return any(
    name == other and max(start, first) < min(stop, last)
    for name, start, stop in ones
    for other, first, last in others
  )


def num_examples(pieces: Sequence[Piece]) -> int:
  """The number of examples."""
  return sum(stop - start for _, start, stop in pieces)


def remove(pieces: Sequence[Piece], unwanted: Mapping[str, np.ndarray]) -> list[Piece]:
  """What remains of pieces without some examples.

  Args:
    pieces: of splits.
    unwanted: bool `[N]` for the examples of whole splits; a split may be missing.
  """

  def runs() -> Iterator[Piece]:
    for name, start, stop in pieces:
      if name not in unwanted:
        yield name, start, stop
        continue
      kept = ~unwanted[name][start:stop]
      edges = np.flatnonzero(np.diff(kept, prepend=False, append=False))  # where runs begin and end
      yield from ((name, start + a, start + b) for a, b in edges.reshape(-1, 2).tolist())

  return list(runs())
