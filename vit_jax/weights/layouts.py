"""How arrays of another code base lie beside ours: a table of names, read in both directions.

A row of a table says which of our parameters are which of theirs, and by which `Layout`:

  ('block_{i}/attention/out/kernel', 'blocks.{i}.attn.proj.weight', linear(axes=2))
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

Arrays = list[np.ndarray]


class Layout(NamedTuple):
  """How arrays of ours lie in theirs.

  Attributes:
    read: `(theirs, shapes of ours) -> ours`.
    write: `ours -> theirs`, its inverse.
  """

  read: Callable[[Arrays, list[tuple[int, ...]]], Arrays]
  write: Callable[[Arrays], Arrays]


class Row(NamedTuple):
  """Our names, theirs, and the layout between them."""

  ours: tuple[str, ...]
  theirs: tuple[str, ...]
  layout: Layout


SAME = Layout(lambda theirs, shapes: theirs, lambda ours: ours)

VECTOR = Layout(  # a bias `[K, E]`, flat
  lambda theirs, shapes: [theirs[0].reshape(shapes[0])],
  lambda ours: [ours[0].reshape(-1)],
)

CONV = Layout(  # `[h, w, C, D]`; PyTorch's is `[D, C, h, w]`
  lambda theirs, shapes: [theirs[0].transpose(2, 3, 1, 0)],
  lambda ours: [ours[0].transpose(3, 2, 0, 1)],
)


def linear(axes: int = 1) -> Layout:
  """PyTorch's `[outputs, inputs]`; our first `axes` axes are inputs, the others outputs."""

  def write(ours):
    inputs = int(np.prod(ours[0].shape[:axes]))
    return [ours[0].reshape(inputs, -1).T]

  return Layout(lambda theirs, shapes: [theirs[0].T.reshape(shapes[0])], write)


def fused(inner: Layout) -> Layout:
  """Several of ours one after the other along their first axis, as PyTorch fuses q, k and v."""

  def read(theirs, shapes):
    parts = np.split(theirs[0], len(shapes))
    return [inner.read([part], [shape])[0] for part, shape in zip(parts, shapes)]

  return Layout(read, lambda ours: [np.concatenate([inner.write([x])[0] for x in ours])])


STACKED = Layout(  # one of ours a block, along a leading axis, as scanned layers keep them
  lambda theirs, shapes: list(theirs[0]),
  lambda ours: [np.stack(ours)],
)


def torch_linear(ours: str, theirs: str, axes: int = 1) -> list[tuple]:
  """The rows of a PyTorch `Linear`; our first `axes` axes are inputs."""
  return [
    (f'{ours}/kernel', f'{theirs}.weight', linear(axes)),
    (f'{ours}/bias', f'{theirs}.bias', VECTOR),
  ]


def torch_norm(ours: str, theirs: str) -> list[tuple]:
  """The rows of a PyTorch `LayerNorm`."""
  return [(f'{ours}/scale', f'{theirs}.weight', SAME), (f'{ours}/bias', f'{theirs}.bias', SAME)]


def rows(table: Iterable[tuple], depth: int) -> list[Row]:
  """The rows of a table; one with `{i}` in its names once for each block."""
  found = []
  for ours, theirs, layout in table:
    ours, theirs = ((x,) if isinstance(x, str) else x for x in (ours, theirs))
    for i in range(depth) if '{i}' in ours[0] else (0,):
      row = ([name.replace('{i}', str(i)) for name in names] for names in (ours, theirs))
      found.append(Row(*map(tuple, row), layout))
  return found
