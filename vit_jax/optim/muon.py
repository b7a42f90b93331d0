"""The update of Muon: the momentum of each kernel in a block, made nearly orthogonal.

Decisions:
  * Optax keeps the momentum, and updates all parameters that are not kernels in a block.
  * Optax could also orthogonalize. However, every device would then orthogonalize all kernels, in
    float32. The file results/notes.md compares the step times with optax and with this module, for
    the variant `small` on two CPU cores.
  * Each device orthogonalizes its share of the kernels, and sends the result to the other devices.
  * The matrix products use the compute type of the model. Jordan et al. use bfloat16 even for
    models in float32, because errors in the singular values of an update hardly matter.
"""

import collections
from collections.abc import Callable
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
import optax

from vit_jax.distributed import replicated, splits, target
from vit_jax.model import ADAPTED, stored_transpose, wants_stored

# Newton-Schulz iteration of Jordan et al. 2024: `x <- a x + b (x x^T) x + c (x x^T)^2 x`. These
# coefficients move small singular values towards 1 quickly, but not to exactly 1: the results are
# between 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.775, 2.0315)
ITERATIONS = 5

# Root mean square of an update's elements; it is similar for AdamW's updates (Liu et al. 2025,
# 2502.16982, Section 2.2).
RMS = 0.2


def block_matrices(params: dict) -> dict:
  """Returns the input and output axes of each kernel in a block, as a tree like `params`.

  The tree contains None for all other parameters.
  """

  def axes(path, x):
    if not any(x.key.startswith('block_') for x in path) or path[-1].key != 'kernel':
      return None
    inputs = ADAPTED[path[-2].key]
    return optax.contrib.MuonDimensionNumbers(tuple(range(inputs)), tuple(range(inputs, x.ndim)))

  return jax.tree_util.tree_map_with_path(axes, params)


def orthogonalized(
  optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Returns an optimizer that orthogonalizes the updates of another optimizer.

  Only the updates of kernels in encoder blocks (`block_<n>/`) are changed.

  The `update` of the new optimizer has two more arguments: `mesh` and `dtype`, as described in
  `orthogonalize`. The states of both optimizers are the same.

  Args:
    optimizer: the other optimizer. The scale of its updates for block kernels has no effect.
  """

  def update(updates, state, params=None, *, mesh, dtype):
    updates, state = optimizer.update(updates, state, params)
    return orthogonalize(updates, mesh, dtype), state

  return optax.GradientTransformationExtraArgs(optimizer.init, update)


def orthogonalize(updates: dict, mesh: Mesh, dtype: jnp.dtype) -> dict:
  """Returns a copy of the tree `updates`, in which updates of block kernels are nearly orthogonal.

  If the singular value decomposition of a kernel's update is `U S V^T`, its new update is about
  `0.2 sqrt(n) U V^T`. The update is treated as a matrix of inputs by outputs, and n is the larger
  of its two sizes.

  Args:
    updates: tree of updates, with the names and shapes of the parameters.
    mesh: devices that share the work.
    dtype: type of the matrix products.
  """
  leaves, tree = jax.tree.flatten(updates)
  groups = collections.defaultdict(list)  # {shape of a wide matrix: [(index of a leaf, axes)]}
  for i, axes in enumerate(tree.flatten_up_to(block_matrices(updates))):
    if axes is not None:
      groups[as_wide(leaves[i], axes).shape].append((i, axes))
  for shape, members in groups.items():
    stack_KMN = jnp.stack([as_wide(leaves[i], axes) for i, axes in members])
    new_KMN = RMS * max(shape) ** 0.5 * over_devices(stack_KMN, mesh, dtype)
    for k, (i, axes) in enumerate(members):
      leaves[i] = from_wide(new_KMN[k], leaves[i].shape, axes)
  return tree.unflatten(leaves)


def as_wide(x: jax.Array, axes: optax.contrib.MuonDimensionNumbers) -> jax.Array:
  """Returns a kernel as a matrix of inputs by outputs, transposed if inputs outnumber outputs."""
  inputs = math.prod(x.shape[: len(axes.reduction_axis)])
  matrix = x.reshape(inputs, -1)
  return matrix.T if inputs > matrix.shape[1] else matrix


def from_wide(
  x_MN: jax.Array, shape: tuple[int, ...], axes: optax.contrib.MuonDimensionNumbers
) -> jax.Array:
  """Inverse of `as_wide`: returns the matrix `x_MN` as a kernel of the given shape."""
  inputs = math.prod(shape[: len(axes.reduction_axis)])
  return (x_MN if inputs == x_MN.shape[0] else x_MN.T).reshape(shape)


def over_devices(x_KMN: jax.Array, mesh: Mesh, dtype: jnp.dtype) -> jax.Array:
  """Applies `newton_schulz` to K matrices, which are divided among the devices of the mesh."""
  count = len(x_KMN)
  x_KMN = jnp.pad(x_KMN, ((0, -count % mesh.size), (0, 0), (0, 0)))  # a zero matrix stays zero
  if not splits(mesh):  # every device has all momenta, but XLA would exchange them one by one
    x_KMN = jax.lax.with_sharding_constraint(x_KMN, replicated(mesh))
  stored = target(mesh).platform == 'cpu' and wants_stored(dtype)
  iterate = functools.partial(
    newton_schulz, dtype=dtype, swap=stored_transpose if stored else jnp.transpose
  )
  spec = PartitionSpec(mesh.axis_names)
  # One matrix at a time, because XLA's CPU backend is slow for products of stacked matrices.
  shares = jax.shard_map(
    lambda x: jax.lax.map(iterate, x), mesh=mesh, in_specs=spec, out_specs=spec
  )
  return jax.lax.with_sharding_constraint(shares(x_KMN), replicated(mesh))[:count]


def newton_schulz(x_MN: jax.Array, dtype: jnp.dtype, swap: Callable) -> jax.Array:
  """Returns a nearly orthogonal matrix with the singular vectors of `x_MN`.

  Args:
    x_MN: a matrix with M <= N.
    dtype: type of the matrix products.
    swap: function that transposes a matrix.
  """
  a, b, c = COEFFICIENTS
  y_MN = (x_MN / (jnp.linalg.norm(x_MN) + 1e-8)).astype(dtype)  # all singular values at most 1
  for _ in range(ITERATIONS):
    gram_MM = y_MN @ swap(y_MN)
    y_MN = a * y_MN + (b * gram_MM + c * gram_MM @ gram_MM) @ y_MN
  return y_MN.astype(x_MN.dtype)
