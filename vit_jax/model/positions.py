"""Where a patch is: `POSITIONS`, and how learned ones are brought to another grid.

An entry can be added from outside of the package:

    POSITIONS['mine'] = Position(lambda model, grid, whole: my_table(*whole, model.width))
"""

from collections.abc import Callable, Mapping
import dataclasses
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.names import choose

Grid = tuple[int, int]
Array = np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True)
class Position:
  """A position embedding: everything that the project must know about it.

  `table` and `angles` take the bound model, the grid of the image, patches (down, across), and the
  grid `whole`, for which the positions were made and over which they are stretched. The two grids
  differ at another image size only. A learned parameter is `model.learned(name, init, shape)`.

  Attributes:
    table: `(model, grid, whole) -> [1, P + h w, D]`, added to the patches, and to the first P of
      the tokens before them; None to add nothing.
    angles: `(model, grid, whole) -> cosine, sine`, both `[N, E/2]`, for the rotation of queries and
      keys; None for no rotation.
    params: names of the top-level parameters that it adds, each with the function that brings it
      to another grid when weights are loaded: `(leaves, model, own grid, grid, method) -> leaves`,
      method one of `RESIZES`; None where it does not depend on the grid.
    check: raises ValueError where it does not fit the model's sizes.
    caption: name of a row of the table under the picture of them.
  """

  table: Callable[[nn.Module, Grid, Grid], Array] | None = None
  angles: Callable[[nn.Module, Grid, Grid], tuple[Array, Array]] | None = None
  params: Mapping[str, Callable | None] = dataclasses.field(default_factory=dict)
  check: Callable[[nn.Module], None] = lambda model: None
  caption: str = 'position embedding'


def coordinates(grid: tuple[int, int], whole: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
  """Row and column `[h, w]` of each patch of a grid, in those of another over the same image.

  Of the grid itself they are whole numbers; else patches lie where their middles are.
  """
  rows, columns = ((np.arange(n) + 0.5) * (size / n) - 0.5 for n, size in zip(grid, whole))
  y, x = np.meshgrid(rows, columns, indexing='ij')
  return y, x


def sincos(h: int, w: int, width: int, whole: tuple[int, int] | None = None) -> np.ndarray:
  """Fixed 2-D sine-cosine positions `[1, h w, D]` (Beyer et al. 2022, 2205.01580).

  A quarter of the width each: sine and cosine of the column, sine and cosine of the row; in the
  coordinates of another grid, `whole`, if there is one.
  """
  omega = 1.0 / 10_000 ** (np.arange(width // 4) / max(width // 4 - 1, 1))
  y, x = coordinates((h, w), whole or (h, w))
  x, y = np.outer(x, omega), np.outer(y, omega)
  table = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
  return table[None].astype(np.float32)


def rope_angles(
  h: int, w: int, head_size: int, prefix: int, whole: tuple[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Cosine and sine `[N, E/2]` of the axial rotary positions (Heo et al. 2024, 2403.13298).

  The first half of the angles follows the row, the second the column, in the coordinates of
  another grid, `whole`, if there is one; the `prefix` tokens have angle 0, hence no position.
  """
  theta = 100.0 ** (-np.arange(head_size // 4) / (head_size // 4))
  y, x = coordinates((h, w), whole or (h, w))
  angle = np.concatenate([np.outer(y, theta), np.outer(x, theta)], axis=1)
  angle = np.concatenate([np.zeros((prefix, angle.shape[1])), angle])
  return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotate(x_BNKE: jax.Array, cos_NE: jax.Array, sin_NE: jax.Array) -> jax.Array:
  """Rotates each pair (first half, second half) of a head's features by its angle."""
  cos, sin = cos_NE[:, None], sin_NE[:, None]
  a, b = jnp.split(x_BNKE.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x_BNKE.dtype)


def resize_positions(
  position_1ND: np.ndarray | jax.Array,
  source_grid: tuple[int, int],
  grid: tuple[int, int],
  prefix: int,
  method: str = 'bilinear',
) -> np.ndarray | jax.Array:
  """Learned positions for another grid (paper, Section 3.2).

  Args:
    position_1ND: `[1, prefix + h w, D]`.
    source_grid: the (h, w) that it was learned for.
    grid: the (h, w) wanted.
    prefix: how many belong to tokens before the patches; they stay as they are.
    method: one of `RESIZES`.

  Returns:
    `[1, prefix + h' w', D]`, of NumPy or JAX as given; what was given, to the bit, where the
    grids are the same.
  """
  function = choose('resize', method, RESIZES)
  if tuple(source_grid) == tuple(grid):
    return position_1ND
  table_hwD = position_1ND[0, prefix:].reshape(*source_grid, -1)
  xp = np if isinstance(position_1ND, np.ndarray) else jnp
  table = xp.asarray(function(table_hwD, grid), position_1ND.dtype)
  table_1ND = table.reshape(1, -1, table.shape[-1])
  return xp.concatenate([position_1ND[:, :prefix], table_1ND], axis=1)


def between_corners(table_hwD: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
  """Linear interpolation that maps corners to corners, as `scipy.ndimage.zoom(order=1)`."""
  for axis, wanted in enumerate(grid):
    size = table_hwD.shape[axis]
    where = np.linspace(0, size - 1, wanted)
    low = np.minimum(where.astype(int), max(size - 2, 0))
    high = np.minimum(low + 1, size - 1)
    part = (where - low).reshape([-1 if i == axis else 1 for i in range(3)])
    table_hwD = table_hwD.take(low, axis) * (1 - part) + table_hwD.take(high, axis) * part
  return table_hwD


def antialiased(method: str):
  """Half-pixel interpolation that averages where it makes smaller, as PyTorch's `antialias`."""

  def function(table_hwD, grid):
    return jax.image.resize(table_hwD, (*grid, table_hwD.shape[-1]), method, antialias=True)

  return function


RESIZES = {
  'bilinear': antialiased('linear'),
  'bicubic': antialiased('cubic'),
  'paper': between_corners,  # as the paper's code did
}


def learned(model: nn.Module, grid: Grid, whole: Grid) -> Array:
  """The parameter `pos_embedding` (paper, equation 1), for this grid: `[1, P + h w, D]`.

  Raises:
    ValueError: the parameters given are of another grid.
  """
  prefix = model.num_positions
  shape = (1, prefix + math.prod(whole), model.width)
  given = model.get_variable('params', 'pos_embedding')
  if given is not None and given.shape != shape:
    raise ValueError(
      f'The image has {math.prod(whole)} patches, the position embeddings are for '
      f'{given.shape[1] - prefix}: resize the image, or load the weights with grid=(h, w), the '
      'number of patches down and across.'
    )
  init = nn.initializers.normal(stddev=0.02)
  return resize_positions(model.learned('pos_embedding', init, shape), whole, grid, prefix)


def resize_learned(
  position_1ND: Array, model: nn.Module, own_grid: Grid, grid: Grid, method: str
) -> Array:
  """`pos_embedding` of loaded weights for another grid."""
  return resize_positions(position_1ND, own_grid, grid, model.num_positions, method)


def check_width(model: nn.Module) -> None:
  """Raises ValueError where `sincos` can not divide the width."""
  if model.width % 4:
    raise ValueError(f'model.position=sincos needs a width divisible by 4, got {model.width}.')


def check_head_size(model: nn.Module) -> None:
  """Raises ValueError where `rope` can not divide a head."""
  if model.head_size % 4:
    raise ValueError(
      f'model.position=rope needs a head size divisible by 4, got {model.head_size}: set '
      'model.head_dim.'
    )


POSITIONS = {
  'learned': Position(
    table=learned,
    params={'pos_embedding': resize_learned},
    caption='learned position embedding',
  ),
  'sincos': Position(
    table=lambda model, grid, whole: sincos(*grid, model.width, whole),
    check=check_width,
    caption='fixed sine-cosine position embedding',
  ),
  'rope': Position(
    angles=lambda model, grid, whole: rope_angles(*grid, model.head_size, model.num_prefix, whole),
    check=check_head_size,
  ),
  'none': Position(),
}

# How many of the tokens before the patches have a learned position.
POSITION_PREFIXES = {
  'cls': lambda model: int(model.has_class),
  'none': lambda model: 0,
  'all': lambda model: model.num_prefix,
}
