"""Splits in TFDS notation (`train[:98%]`, `train[10%:]+test`) for every source."""

from vit_jax.names import choose


def resolve(spec: str, sizes: dict[str, int]) -> list[tuple[str, int, int]]:
  """The `(name, start, stop)` pieces that a split names.

  Args:
    spec: the split, as TFDS writes it.
    sizes: the number of examples in each whole split.

  Raises:
    ValueError: bad notation, an unknown name, or no examples.
  """
  from tensorflow_datasets import core  # here, so that predicting needs no datasets

  try:
    instruction = core.ReadInstruction.from_spec(spec)
  except (ValueError, AssertionError) as error:
    raise ValueError(f'Split {spec!r}: {str(error).splitlines()[0]}') from error
  for part in spec.split('+'):
    choose('split', part.split('[')[0].strip(), sizes)
  infos = {
    name: core.SplitInfo(name=name, shard_lengths=[size], num_bytes=0)
    for name, size in sizes.items()
  }
  try:
    absolute = instruction.to_absolute(infos)
  except (ValueError, AssertionError) as error:
    raise ValueError(f'Split {spec!r} of {sizes}: {error}') from error
  pieces = [
    (part.splitname, part.from_ or 0, sizes[part.splitname] if part.to is None else part.to)
    for part in absolute
  ]
  pieces = [piece for piece in pieces if piece[1] < piece[2]]
  for i, (name, start, stop) in enumerate(pieces):
    if any(name == n and max(start, a) < min(stop, b) for n, a, b in pieces[:i]):
      raise ValueError(f'Split {spec!r} holds some examples twice.')
  if not pieces:
    raise ValueError(f'Split {spec!r} holds no examples; the sizes are {sizes}.')
  return pieces


def count(pieces: list[tuple[str, int, int]]) -> int:
  """The number of examples in pieces of `resolve`."""
  return sum(stop - start for _, start, stop in pieces)


def overlap(a: str, b: str, sizes: dict[str, int]) -> bool:
  """Whether two splits share an example."""
  return any(
    name == other and max(start, first) < min(stop, last)
    for name, start, stop in resolve(a, sizes)
    for other, first, last in resolve(b, sizes)
  )
