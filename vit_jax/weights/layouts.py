"""Converts arrays between this project and other code bases, with tables of parameter names.

A row of a table gives our parameter names, the other code base's names, and the `Layout` that
converts the arrays in both directions:

  ('block_{i}/attention/out/kernel', 'blocks.{i}.attn.proj.weight', linear(axes=2))
"""

from collections.abc import Callable, Collection, Iterable, Mapping
import functools
import itertools
import math
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.model import ViT

SMALL = 2**24  # `check_total` accepts every parameter with at most this many numbers

Arrays = list[np.ndarray]


class Layout(NamedTuple):
  """A conversion between our arrays and the arrays of another code base.

  Attributes:
    read: `(their arrays, shapes of our arrays) -> our arrays`.
    write: `our arrays -> their arrays`, the inverse of `read`.
  """

  read: Callable[[Arrays, list[tuple[int, ...]]], Arrays]
  write: Callable[[Arrays], Arrays]


class Row(NamedTuple):
  """A row of a name table: our names, the other code base's names, and the layout between them."""

  ours: tuple[str, ...]
  theirs: tuple[str, ...]
  layout: Layout


SAME = Layout(lambda theirs, shapes: theirs, lambda ours: ours)

VECTOR = Layout(  # our bias `[K, E]`, flattened in the file
  lambda theirs, shapes: [theirs[0].reshape(shapes[0])],
  lambda ours: [ours[0].reshape(-1)],
)

ROWS = Layout(  # our `[1, N, D]`, stored without the first axis
  lambda theirs, shapes: [theirs[0][None]],
  lambda ours: [ours[0][0]],
)

CONV = Layout(  # our kernel is `[h, w, C, D]`, PyTorch's is `[D, C, h, w]`
  lambda theirs, shapes: [theirs[0].transpose(2, 3, 1, 0)],
  lambda ours: [ours[0].transpose(3, 2, 0, 1)],
)

# The file has a classifier for each of two tokens, and their logits are averaged. Our model has one
# classifier for the concatenated tokens, with halved weights. Halving is exact in floating point.
TEACHER_KERNEL = Layout(
  lambda theirs, shapes: [np.concatenate([x.T for x in theirs]) / 2],
  lambda ours: [2 * half.T for half in np.split(ours[0], 2)],
)
TEACHER_BIAS = Layout(
  lambda theirs, shapes: [(theirs[0] + theirs[1]) / 2],
  lambda ours: [ours[0], ours[0]],
)


def linear(axes: int = 1) -> Layout:
  """Returns the layout of a PyTorch weight `[outputs, inputs]`, which is our kernel transposed.

  The first `axes` axes of our kernel belong to the inputs.
  """

  def write(ours):
    inputs = int(np.prod(ours[0].shape[:axes]))
    return [ours[0].reshape(inputs, -1).T]

  return Layout(lambda theirs, shapes: [theirs[0].T.reshape(shapes[0])], write)


def fused(*inner: Layout) -> Layout:
  """Returns the layout of an array whose first axis joins several of our arrays.

  For example, PyTorch joins the kernels of queries, keys and values. `inner` has one layout for
  each of our arrays, or a single layout for all of them.
  """

  def read(theirs, shapes):
    parts = np.split(theirs[0], len(shapes))
    return [one.read([x], [s])[0] for one, x, s in zip(itertools.cycle(inner), parts, shapes)]

  def write(ours):
    return [np.concatenate([one.write([x])[0] for one, x in zip(itertools.cycle(inner), ours)])]

  return Layout(read, write)


def interleaved(inner: Layout) -> Layout:
  """Returns the layout of queries or keys whose rotary positions pair features 2i and 2i + 1.

  Our models pair features i and i + E/2 of a head of size E. So the layout reorders the features.
  `inner` is the layout without this reordering.
  """

  def read(theirs, shapes):
    return [np.concatenate([x[..., ::2], x[..., 1::2]], -1) for x in inner.read(theirs, shapes)]

  def write(ours):
    return inner.write([np.stack(np.split(x, 2, -1), -1).reshape(x.shape) for x in ours])

  return Layout(read, write)


STACKED = Layout(  # the arrays of all blocks on a new leading axis, as scanned layers store them
  lambda theirs, shapes: list(theirs[0]),
  lambda ours: [np.stack(ours)],
)


def torch_linear(ours: str, theirs: str, axes: int = 1) -> list[tuple]:
  """Returns the rows of the name table for an `nn.Linear` of PyTorch; `axes` as in `linear`."""
  return [
    (f'{ours}/kernel', f'{theirs}.weight', linear(axes)),
    (f'{ours}/bias', f'{theirs}.bias', VECTOR),
  ]


def torch_fused(ours: str, parts: tuple[str, ...], theirs: str, joint: str = '.') -> list[tuple]:
  """Returns the rows of the name table for several linear layers that PyTorch stores as one layer.

  Args:
    ours: name of the module that the layers belong to.
    parts: names of the layers.
    theirs: PyTorch's name of the joined layer.
    joint: text between the layer's name and `weight` or `bias`.
  """
  kernels, biases = ([f'{ours}/{part}/{leaf}' for part in parts] for leaf in ('kernel', 'bias'))
  return [
    (kernels, f'{theirs}{joint}weight', fused(linear())),
    (biases, f'{theirs}{joint}bias', fused(VECTOR)),
  ]


def torch_norm(ours: str, theirs: str) -> list[tuple]:
  """Returns the rows of the name table for an `nn.LayerNorm` of PyTorch."""
  return [(f'{ours}/scale', f'{theirs}.weight', SAME), (f'{ours}/bias', f'{theirs}.bias', SAME)]


def add_prefix(prefix: str, names: str | Iterable[str]) -> str | list[str]:
  """Adds a prefix to one name or to each name of a list."""
  return prefix + names if isinstance(names, str) else [prefix + name for name in names]


def rows(table: Iterable[tuple], depth: int) -> list[Row]:
  """Returns all rows of a table for a model with `depth` blocks.

  A row with `{i}` in its names is repeated for each block.
  """
  found = []
  for ours, theirs, layout in table:
    ours, theirs = ((x,) if isinstance(x, str) else x for x in (ours, theirs))
    for i in range(depth) if '{i}' in ours[0] else (0,):
      row = ([name.replace('{i}', str(i)) for name in names] for names in (ours, theirs))
      found.append(Row(*map(tuple, row), layout))
  return found


def check_depth(origin: str, depth: int, arrays: Collection[str]) -> None:
  """Raises ValueError if a config has more blocks than its file has arrays.

  Without this check, a table for a huge number of blocks would fill the memory.

  Args:
    origin: path of the config, for the message.
    depth: number of blocks in the config.
    arrays: names of the arrays in the file; empty if only the config is read.
  """
  if arrays and isinstance(depth, int) and depth > len(arrays):
    raise ValueError(
      f'{origin}: the model has {depth:,} blocks, but the file has only {len(arrays):,} arrays. '
      'Expected at least one array for each block. Use the config that belongs to the weights.'
    )


def check_total(
  origin: str, wanted: Mapping[str, tuple[int, ...]], arrays: Mapping[str, np.ndarray]
) -> None:
  """Raises ValueError if a parameter of a model is larger than all arrays of a file together.

  Without this check, reading the file would allocate arrays of the size of this parameter. Small
  parameters always pass, because `read_params` reports a wrong shape more precisely.

  Args:
    origin: name of the file, for the message.
    wanted: `{path: shape}` for the parameters of the model.
    arrays: the arrays of the file.
  """
  total = sum(array.size for array in arrays.values())
  for name, shape in wanted.items():
    if math.prod(shape) > max(total, SMALL):
      raise ValueError(
        f'{origin}: the parameter {name} of the model has shape {shape}, but all arrays of the '
        f'file together have only {total:,} numbers. Use the config that belongs to the weights.'
      )


@functools.lru_cache(maxsize=8)  # loading and saving ask for the same shapes
def param_shapes(model: ViT, image_shape: tuple[int, int, int]) -> Mapping[str, tuple[int, ...]]:
  """Returns the shapes of the model's parameters, e.g. `{'block_0/mlp/up/kernel': (48, 192)}`.

  Args:
    model: the model.
    image_shape: (H, W, C).
  """
  init = functools.partial(model.init, jax.random.key(0))
  image_BHWC = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  shapes = shapes_of(jax.eval_shape(init, image_BHWC)['params'])
  return types.MappingProxyType(shapes)


def shapes_of(tree: dict) -> dict[str, tuple[int, ...]]:
  """Returns `{path: shape}` for all arrays of a tree; a path is e.g. `block_0/mlp/up/kernel`."""
  return {name: tuple(leaf.shape) for name, leaf in flatten_params(tree).items()}


def image_channels(params: dict) -> int:
  """Returns the number of image channels that a model's parameters expect.

  Returns 3 if the parameters do not include the first layer.
  """
  kernel = params.get('stem', {}).get('conv_root', params.get('embedding', {})).get('kernel')
  return 3 if kernel is None else kernel.shape[2]


def flatten_params(tree: dict) -> dict[str, np.ndarray]:
  """Flattens a parameter tree to `{'block_0/mlp/up/kernel': array, ...}`."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}


def unflatten_params(flat: Mapping[str, np.ndarray]) -> dict:
  """Rebuilds a nested dict of parameters from the result of `flatten_params`."""
  tree = {}
  for name, leaf in flat.items():
    *parents, last = name.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree
