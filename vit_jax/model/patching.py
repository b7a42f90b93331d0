"""Patches: cutting images, resizing the patch embedding, and padding images of different shapes.

Decisions:
  * The patch embedding is resized by the pseudo-inverse of FlexiViT (Beyer et al. 2022, 2212.08013,
    Section 3.4), never by interpolating its weights. Interpolated weights would change the scale of
    the tokens.
  * The resized embedding assumes that patches are resized linearly with antialiasing, as
    `RESIZES['bilinear']` resizes positions.
  * If a batch has images of different shapes, the functions in `POSITIONS` compute the positions of
    each image on the host. So every position embedding can be used.
"""

from collections.abc import Sequence
import functools
import threading

from flax import linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.model.layers import Dense
from vit_jax.model.pooling import POOLS
from vit_jax.names import check_positive

Size = tuple[int, int]
Array = np.ndarray | jax.Array

MOST_PATCHES = 2**16  # largest `max_patches`; more patches would need too much time and memory


def cut(image_BHWC: Array, patch_size: Size) -> Array:
  """Cuts images into h x w patches of p x q pixels: returns `[B, h, w, p, q, C]`.

  Raises:
    ValueError: the patch size does not divide the image size.
  """
  check_divides(patch_size, image_BHWC)
  batch, height, width, channels = image_BHWC.shape
  p, q = patch_size
  x = image_BHWC.reshape(batch, height // p, p, width // q, q, channels)
  return x.transpose(0, 1, 3, 2, 4, 5)


def check_divides(patch_size: Size, image_BHWC: Array) -> None:
  """Raises ValueError if the patch size does not divide the size of the images."""
  size = image_BHWC.shape[1:3]
  if any(n % p for n, p in zip(size, patch_size)):
    raise ValueError(
      f'An image of {as_size(size)} pixels does not divide into patches of {as_size(patch_size)}. '
      'Set data.image_size to multiples of model.patch_size.'
    )


def as_size(size: Size) -> str:
  """Returns a size as text, e.g. 16x16."""
  return 'x'.join(map(str, size))


@functools.cache
def resize_matrix(size: int, new: int) -> np.ndarray:
  """Returns the matrix `[new, size]` that resizes a line of `size` pixels to `new` pixels.

  The interpolation is linear with antialiasing and half-pixel centres. If the line becomes shorter,
  the triangle of linear interpolation is widened to cover all pixels. The weights of each new
  pixel are scaled to sum to 1.
  """
  ratio = size / new
  centre_N1 = (np.arange(new)[:, None] + 0.5) * ratio - 0.5
  apart_NM = np.abs(centre_N1 - np.arange(size)) / max(ratio, 1)
  weight_NM = np.maximum(1 - apart_NM, 0)
  return weight_NM / weight_NM.sum(axis=1, keepdims=True)


def resize_embedding(kernel_pqCD: Array, size: Size) -> Array:
  """Resizes the kernel of a patch embedding to another patch size (FlexiViT's PI-resize).

  Let `B x` be the patch x, resized by `resize_matrix` along both axes. The new weights
  are `w' = (B^T)^+ w`. They minimise the mean square of `<x, w> - <B x, w'>` over standard normal
  patches x (FlexiViT, Section 3.4 and Appendix A). If the patches become larger, this difference is
  zero for every x, so an enlarged patch gives the same token as before. B acts on rows and columns
  separately, and so does the pseudo-inverse of B.

  Args:
    kernel_pqCD: weights for patches of p x q pixels.
    size: (height, width) of the new patches.

  Returns:
    The new weights `[p', q', C, D]`, as a NumPy or JAX array like the input. For the same size, the
    input is returned unchanged.
  """
  if tuple(kernel_pqCD.shape[:2]) == tuple(size):
    return kernel_pqCD
  row_pP, column_qQ = (
    np.linalg.pinv(resize_matrix(old, new).T).astype(np.float32)
    for old, new in zip(kernel_pqCD.shape[:2], size)
  )
  if isinstance(kernel_pqCD, np.ndarray):
    return np.einsum('yp,xq,pqcd->yxcd', row_pP, column_qQ, kernel_pqCD, optimize=True)
  exact = jax.lax.Precision.HIGHEST
  return jnp.einsum('yp,xq,pqcd->yxcd', row_pP, column_qQ, kernel_pqCD, precision=exact)


class PatchEmbedding(Dense):
  """A linear layer from patches `[..., p, q, C]` to tokens `[..., D]` (paper, equation 1).

  A patch has p x q pixels.

  Attributes:
    size: patch size that the parameters are for; None for the size of the input patches. For
      patches of another size, the kernel is resized.
  """

  axes: int = 3
  size: Size | None = None
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

  def weights(self, inputs: tuple[int, ...]) -> jax.Array:
    """Returns the kernel `[p, q, C, D]` for patches whose shape `[p, q, C]` is `inputs`."""
    *size, channels = inputs
    kernel = super().weights((*(self.size or size), channels))
    return resize_embedding(kernel, tuple(size))


@flax.struct.dataclass
class Padded:
  """Images of different shapes: the patches of each image, padded to the same number N.

  Attributes:
    patch_BNpqC: patches (p x q pixels) of each image, row by row, then padding.
    count_B: number of patches of each image, int32.
    positions: `(table, angles)` of the position embedding, as `Position` describes them, for the
      grid of each image. Each array has the batch as its first axis, and is padded to N patches.
      None stands for a missing table or missing angles.
  """

  patch_BNpqC: Array
  count_B: Array
  positions: tuple


def check_padded(model: nn.Module) -> None:
  """Raises ValueError if the model cannot read images of different shapes in one batch."""
  if model.resnet is not None:
    raise ValueError(
      f'Images of different shapes need a model without a stem, got model.resnet={model.resnet}: '
      "the stem's convolutions would mix an image with its padding. Use weights without a stem."
    )
  if not POOLS[model.pool].padded:
    able = ', '.join(name for name, pool in POOLS.items() if pool.padded)
    raise ValueError(
      f'model.pool={model.pool} is not defined for images of different shapes. Set model.pool '
      f'to one of: {able}.'
    )


def native_grid(size: Size, patch_size: Size, most: int) -> Size:
  """Returns the grid of patches (down, across) for an image that keeps its aspect ratio.

  The image is scaled by the largest factor for which `most` patches are enough to cover it. Then
  each side is stretched to a multiple of the patch size, by less than a patch. SigLIP 2 resizes
  images in the same way (Tschannen et al. 2025, 2502.14786, Section 2.5).

  Args:
    size: (height, width) of the image.
    patch_size: (height, width) of a patch.
    most: maximum number of patches.
  """
  # In units of patches, height and width of the image are in the ratio down : across. At the
  # largest factor, one of the sides measures exactly k patches, for some integer k. So the search
  # tries each k for each side. `down` and `across` are integers, so the rounding up is exact.
  down, across = size[0] * patch_size[1], size[1] * patch_size[0]
  number_K = range(1, most + 1)
  grids = [(k, -(-k * across // down), k / down) for k in number_K]
  grids += [(-(-k * down // across), k, k / across) for k in number_K]
  h, w, _ = max((grid for grid in grids if grid[0] * grid[1] <= most), key=lambda grid: grid[2])
  return h, w


class Packer:
  """Pads images of different shapes to the same number of patches; threads can share a packer."""

  def __init__(self, model: nn.Module, params: dict, most: int):
    """Creates a packer.

    Args:
      model: the model. `model.position_grid` must be the grid that its positions are for.
      params: parameters of the model.
      most: N, maximum number of patches of an image.

    Raises:
      ValueError: the model cannot read images of different shapes.
    """
    check_padded(model)
    check_positive('max_patches', most)
    if most > MOST_PATCHES:
      raise ValueError(
        f'max_patches={most}: expected at most {MOST_PATCHES:,}, e.g. 256x256 patches.'
      )
    self.most, self.patch_size = most, model.patch_size
    self._model, self._lock, self._positions = model.bind({'params': params}), threading.Lock(), {}

  def __call__(self, images: Sequence[np.ndarray]) -> Padded:
    """Returns a batch of images `[H, W, C]` as `Padded`; H, W are multiples of the patch size."""
    rows = [self.row(image_HWC) for image_HWC in images]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)

  def row(self, image_HWC: np.ndarray) -> Padded:
    """Returns one image `[H, W, C]` as `Padded`, without a batch axis."""
    patch_hwpqC = cut(image_HWC[None], self.patch_size)[0]
    h, w, *patch = patch_hwpqC.shape
    missing = self.most - h * w
    if missing < 0:
      raise ValueError(f'An image has {h * w} patches, more than max_patches={self.most} allows.')
    patch_NpqC = np.pad(patch_hwpqC.reshape(h * w, *patch), [(0, missing), *[(0, 0)] * len(patch)])
    return Padded(patch_NpqC, np.int32(h * w), self.positions((h, w)))

  def positions(self, grid: Size) -> tuple:
    """Returns `Padded.positions` for one image with this grid of patches, without a batch axis."""
    with self._lock:
      if grid not in self._positions:
        missing = self.most - grid[0] * grid[1]
        pad = lambda x: np.pad(np.asarray(x), [(0, missing), (0, 0)])
        table, angles = self._model.positions(grid)
        table = None if table is None else pad(table[0])
        self._positions[grid] = table, angles and tuple(map(pad, angles))
      return self._positions[grid]
