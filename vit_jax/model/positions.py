"""`POSITIONS`: the position embeddings, and how learned embeddings are resized to a different grid.

Other packages can add an entry:

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
  """A position embedding, an entry of `POSITIONS`, and its properties.

  `table` and `angles` receive the model with its parameters (Flax's `bind`) and two grids, each as
  numbers of patches (down, across). `grid` is the grid of the image, (h, w). `whole` is the grid
  that the positions were made for. If the image has a different size, the two grids differ, and the
  positions are stretched to the image. `model.learned(name, init, shape)` returns a learned
  parameter.

  Attributes:
    table: `(model, grid, whole) -> [1, P + h w, D]`, an array to add to tokens: rows for the first
      P tokens, which come before the patches, then rows for the patches. None adds nothing.
    angles: `(model, grid, whole) -> cosine, sine`, both `[N, E/2]`. These arrays rotate queries and
      keys, whose heads have the size E. None for no rotation.
    params: names of the top-level parameters that the embedding adds. Each name maps to a function
      that resizes the parameter from its own grid to another grid when weights are loaded:
      `(array, model, own_grid, grid, method) -> array`. The method is one of `RESIZES`. None
      instead of a function means that the parameter does not depend on the grid.
    check: `(model)` raises ValueError if the embedding does not fit the model's sizes.
    caption: name of this embedding in the caption of the figure `positions.png`.
  """

  table: Callable[[nn.Module, Grid, Grid], Array] | None = None
  angles: Callable[[nn.Module, Grid, Grid], tuple[Array, Array]] | None = None
  params: Mapping[str, Callable | None] = dataclasses.field(default_factory=dict)
  check: Callable[[nn.Module], None] = lambda model: None
  caption: str = 'position embedding'


def coordinates(grid: tuple[int, int], whole: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
  """Returns two arrays `[h, w]`: the row and the column of each patch of `grid`.

  The grids `grid` and `whole` divide the same image. Row and column give the centre of a patch. The
  unit is a patch of `whole`, and the origin is the centre of the first patch of `whole`. If the
  grids are equal, rows and columns are 0, 1, 2, ...
  """
  rows, columns = ((np.arange(n) + 0.5) * (size / n) - 0.5 for n, size in zip(grid, whole))
  y, x = np.meshgrid(rows, columns, indexing='ij')
  return y, x


def sincos(h: int, w: int, width: int, whole: tuple[int, int] | None = None) -> np.ndarray:
  """Returns fixed 2-D sine-cosine positions `[1, h w, D]` (Beyer et al. 2022, 2205.01580).

  The four quarters of the width are: sine of the column, cosine of the column, sine of the row,
  cosine of the row.

  Args:
    h: number of rows of patches.
    w: number of columns of patches.
    width: D, a multiple of 4.
    whole: rows and columns are counted in patches of this grid, as in `coordinates`; None: (h, w).
  """
  omega = 1.0 / 10_000 ** (np.arange(width // 4) / max(width // 4 - 1, 1))
  y, x = coordinates((h, w), whole or (h, w))
  x, y = np.outer(x, omega), np.outer(y, omega)
  table = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
  return table[None].astype(np.float32)


def rope_angles(model: nn.Module, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns cosine and sine `[N, E/2]` of axial rotary positions (Heo et al. 2024, 2403.13298).

  The first half of the angles depends on the row y of a patch, the second half on the column x. The
  tokens before the patches have angle 0, so they are not rotated.

  Args:
    model: the model, which defines the base of the frequencies, and E, the size of a head.
    y: row coordinate of each patch, `[h, w]`.
    x: column coordinate of each patch, `[h, w]`.
  """
  quarter = model.head_size // 4
  frequency = model.rope_theta ** (-np.arange(quarter) / quarter)
  angle = np.concatenate([np.outer(y, frequency), np.outer(x, frequency)], axis=1)
  angle = np.concatenate([np.zeros((model.num_prefix, angle.shape[1])), angle])
  return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def patch_angles(model: nn.Module, grid: Grid, whole: Grid) -> tuple[np.ndarray, np.ndarray]:
  """Returns `rope_angles` with coordinates in patches of the grid `whole`."""
  return rope_angles(model, *coordinates(grid, whole))


def unit_angles(model: nn.Module, grid: Grid, whole: Grid) -> tuple[np.ndarray, np.ndarray]:
  """Returns `rope_angles` as in DINOv3 (Simeoni et al. 2025, 2508.10104, Section 3.2).

  For every grid, coordinates run from -1 to 1 over the image, and are multiplied by 2 pi.
  """
  y, x = coordinates(grid, (1, 1))  # from -0.5 to 0.5
  return rope_angles(model, 4 * math.pi * y, 4 * math.pi * x)


def corner_angles(model: nn.Module, grid: Grid, whole: Grid) -> tuple[np.ndarray, np.ndarray]:
  """Returns `rope_angles` as in EVA-02 (Fang et al. 2023, 2303.11331, Section 2.1).

  The position of a patch is its top left corner. It is measured in patches of the grid
  `model.rope_grid`, or of `whole` if `model.rope_grid` is None.
  """
  sizes = model.rope_grid or whole
  rows, columns = (np.arange(n) * (size / n) for n, size in zip(grid, sizes))
  return rope_angles(model, *np.meshgrid(rows, columns, indexing='ij'))


def rotate(x_BNKE: jax.Array, cos_NE: jax.Array, sin_NE: jax.Array) -> jax.Array:
  """Rotates each pair of features (i, i + E/2) of a head of size E by angle i of the token.

  `cos_NE` and `sin_NE` are `[N, E/2]`, or `[B, N, E/2]` if examples have different angles.
  """
  cos, sin = cos_NE[..., None, :], sin_NE[..., None, :]
  a, b = jnp.split(x_BNKE.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x_BNKE.dtype)


def resize_positions(
  position_1ND: np.ndarray | jax.Array,
  source_grid: tuple[int, int],
  grid: tuple[int, int],
  prefix: int,
  method: str = 'bilinear',
) -> np.ndarray | jax.Array:
  """Resizes learned positions to another grid (paper, Section 3.2).

  Args:
    position_1ND: learned positions, `[1, prefix + h w, D]`.
    source_grid: (h, w) of the grid for which the positions were learned.
    grid: (h', w') of the new grid.
    prefix: number of positions for tokens before the patches; these positions stay unchanged.
    method: one of `RESIZES`.

  Returns:
    The resized positions, `[1, prefix + h' w', D]`, as a NumPy or JAX array like the input. If the
    two grids are equal, the input is returned unchanged.
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
  """Resizes a table linearly and keeps its corner values, like `scipy.ndimage.zoom(order=1)`."""
  for axis, wanted in enumerate(grid):
    size = table_hwD.shape[axis]
    where = np.linspace(0, size - 1, wanted)
    low = np.minimum(where.astype(int), max(size - 2, 0))
    high = np.minimum(low + 1, size - 1)
    part = (where - low).reshape([-1 if i == axis else 1 for i in range(3)])
    table_hwD = table_hwD.take(low, axis) * (1 - part) + table_hwD.take(high, axis) * part
  return table_hwD


def antialiased(method: str):
  """Returns a function `(table_hwD, grid) -> table` that resizes with antialiasing, like PyTorch.

  `method` is a method of `jax.image.resize`, which uses half-pixel centres.
  """

  def function(table_hwD, grid):
    return jax.image.resize(table_hwD, (*grid, table_hwD.shape[-1]), method, antialias=True)

  return function


def cubic(table_hwD, grid):
  """Resizes a table to `grid` like `interpolate_pos_encoding` of Hugging Face's CLIP and SigLIP.

  This is PyTorch's bicubic method without antialiasing: a cubic convolution with a = -0.75.
  Equation 15 of Keys 1981 is the same method with a = -0.5.
  """
  for axis, wanted in enumerate(grid):
    size = table_hwD.shape[axis]
    where = (np.arange(wanted) + 0.5) * (size / wanted) - 0.5
    weight = np.zeros((wanted, size), np.float32)
    for offset in (-1, 0, 1, 2):
      index = np.floor(where) + offset
      t = np.abs(where - index)
      near = (1.25 * t - 2.25) * t * t + 1
      far = -0.75 * (((t - 5) * t + 8) * t - 4)
      inside = np.clip(index, 0, size - 1).astype(int)
      np.add.at(weight, (np.arange(wanted), inside), np.where(t <= 1, near, far))
    table_hwD = jnp.moveaxis(
      jnp.tensordot(weight, table_hwD, (1, axis), precision=jax.lax.Precision.HIGHEST), 0, axis
    )
  return table_hwD


RESIZES = {
  'bilinear': antialiased('linear'),
  'bicubic': antialiased('cubic'),
  'hf': cubic,
  'paper': between_corners,  # the method of the paper's code
}


def learned(model: nn.Module, grid: Grid, whole: Grid) -> Array:
  """Returns the learned positions (paper, equation 1), resized to `grid`: `[1, P + h w, D]`.

  The parameter `pos_embedding` holds the positions for the grid `whole`. `Position.table` describes
  the shape.

  Raises:
    ValueError: the given parameters belong to another grid.
  """
  prefix = model.num_positions
  shape = (1, prefix + math.prod(whole), model.width)
  given = model.get_variable('params', 'pos_embedding')
  own = model.learned_grid or whole
  mixed_up = math.prod(own) == math.prod(whole) and tuple(own) != tuple(whole)
  if given is not None and (given.shape != shape or mixed_up):
    found, wanted = math.prod(whole), given.shape[1] - prefix
    if mixed_up:
      found, wanted = ('x'.join(map(str, grid)) for grid in (whole, own))
    raise ValueError(
      f'The image has {found} patches, but the position embeddings are for {wanted}. Resize the '
      'image, or load the weights with grid=(h, w) for images of h patches down and w across.'
    )
  init = nn.initializers.normal(stddev=0.02)
  return resize_positions(model.learned('pos_embedding', init, shape), whole, grid, prefix)


def resize_learned(
  position_1ND: Array, model: nn.Module, own_grid: Grid, grid: Grid, method: str
) -> Array:
  """Resizes the `pos_embedding` of loaded weights from `own_grid` to `grid`."""
  return resize_positions(position_1ND, own_grid, grid, model.num_positions, method)


def check_width(model: nn.Module) -> None:
  """Raises ValueError if the width is not divisible by 4, which `sincos` needs."""
  if model.width % 4:
    raise ValueError(f'model.position=sincos needs a width divisible by 4, got {model.width}.')


def check_rotation(model: nn.Module) -> None:
  """Raises ValueError if the head size or `rope_theta` does not fit rotary positions."""
  if model.head_size % 4:
    raise ValueError(
      f'model.position={model.position} needs a head size divisible by 4, got {model.head_size}. '
      'Set model.head_dim to a multiple of 4.'
    )
  if model.rope_theta is None or not 0 < model.rope_theta < math.inf:
    raise ValueError(f'model.rope_theta must be positive, got {model.rope_theta}.')


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
  'rope': Position(angles=patch_angles, check=check_rotation),
  'rope_unit': Position(angles=unit_angles, check=check_rotation),  # DINOv3
  'learned_rope': Position(  # EVA-02
    table=learned,
    angles=corner_angles,
    params={'pos_embedding': resize_learned},
    check=check_rotation,
    caption='learned position embedding',
  ),
  'none': Position(),
}

# Functions `(model) -> number of learned positions for tokens before the patches`.
POSITION_PREFIXES = {
  'cls': lambda model: int(model.has_class),
  'none': lambda model: 0,
  'all': lambda model: model.num_prefix,
}
