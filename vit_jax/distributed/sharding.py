"""Places arrays on a mesh: parameters by their names and shapes, batches by their rows.

A global array is a `jax.Array` on the devices of all processes.
"""

from collections.abc import Mapping
import math

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from vit_jax.distributed import devices

# {last two parts of a parameter's name: dimension that the mesh axis `tensor` splits}. These
# dimensions are the attention heads and the hidden units of the MLP (Shoeybi et al. 2019,
# 1909.08053, Section 3).
TENSOR_AXIS = {
  ('query', 'kernel'): 1,
  ('query', 'bias'): 0,
  ('key', 'kernel'): 1,
  ('key', 'bias'): 0,
  ('value', 'kernel'): 1,
  ('value', 'bias'): 0,
  ('out', 'kernel'): 0,
  ('out_norm', 'scale'): 0,
  ('out_norm', 'bias'): 0,
  ('gate', 'kernel'): 1,
  ('gate', 'bias'): 0,
  ('up', 'kernel'): 1,
  ('up', 'bias'): 0,
  ('hidden_norm', 'scale'): 0,
  ('hidden_norm', 'bias'): 0,
  ('down', 'kernel'): 0,
  # LoRA adds a product of two factors to a kernel: `W + A B`. If `W` is split along its outputs, so
  # is `B`. If `W` is split along its inputs, so is `A`.
  ('query', 'b'): 1,
  ('key', 'b'): 1,
  ('value', 'b'): 1,
  ('out', 'a'): 0,
  ('gate', 'b'): 1,
  ('up', 'b'): 1,
  ('down', 'a'): 0,
}
# Minimum number of elements of an array that `fsdp` splits. Gathering many small arrays is slow.
SPLIT_FROM = 4096


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays whose first axis is the batch: split over `data` and `fsdp`."""
  return NamedSharding(mesh, PartitionSpec(devices.BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def layout(mesh: Mesh, tree):
  """Returns a tree with the sharding of each array in `tree`, as `partition` defines it.

  The arrays are parameters, or have the names and shapes of parameters, such as optimizer states.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, x: NamedSharding(mesh, partition(mesh, path, x.shape)), tree
  )


def size_on_device(mesh: Mesh, tree) -> int:
  """Returns how many bytes each device holds if the arrays of `tree` are sharded by `layout`."""
  leaves, placed = jax.tree.leaves(tree), jax.tree.leaves(layout(mesh, tree))
  return sum(
    math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf, sharding in zip(leaves, placed, strict=True)
  )


def partition(mesh: Mesh, path: tuple, shape: tuple[int, ...]) -> PartitionSpec:
  """Returns which mesh axis splits each dimension of an array; None for dimensions that stay whole.

  A mesh axis can split a dimension if the dimension's length is a multiple of the axis's size. If
  possible, the mesh axis `tensor` splits the dimension that `TENSOR_AXIS` names for the array. The
  mesh axis `fsdp` splits the longest other dimension that it can split, as in the third stage of
  ZeRO (Rajbhandari et al. 2019, 1910.02054). However, `fsdp` does not split arrays with fewer than
  `SPLIT_FROM` elements.

  Args:
    mesh: the devices.
    path: path of the array in its tree, as `jax.tree_util` gives it.
    shape: shape of the array.
  """
  names = tuple(jax.tree_util.keystr((key,), simple=True) for key in path[-2:])
  axes = [None] * len(shape)
  split, tensor, fsdp = TENSOR_AXIS.get(names), mesh.shape['tensor'], mesh.shape['fsdp']
  # The state of an optimizer can have fewer dimensions than its parameter, e.g. with Adafactor.
  if tensor > 1 and split is not None and split < len(shape) and shape[split] % tensor == 0:
    axes[split] = 'tensor'
  if fsdp > 1 and math.prod(shape) >= SPLIT_FROM:
    free = [i for i, size in enumerate(shape) if axes[i] is None and size % fsdp == 0]
    if free:
      axes[max(free, key=lambda i: shape[i])] = 'fsdp'
  return PartitionSpec(*axes)


def place(tree, like):
  """Returns the arrays of `tree` as global arrays, sharded like the arrays of the tree `like`.

  Every process must pass the complete arrays.
  """
  return jax.tree.map(lambda x, old: spread(x, old.sharding), tree, like)


def place_params(mesh: Mesh, tree):
  """Returns a tree of parameters as global arrays, sharded by `layout`.

  Every process must pass the complete arrays.
  """
  return jax.tree.map(spread, tree, layout(mesh, tree))


def replicate(mesh: Mesh, tree):
  """Returns the arrays of `tree` as global arrays, replicated on all devices of a mesh.

  Every process must pass the complete arrays.
  """
  return jax.tree.map(lambda x: spread(x, replicated(mesh)), tree)


def spread(x: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
  """Returns a global array with this sharding; every process must pass the complete array."""
  x = np.asarray(x)
  return jax.make_array_from_callback(x.shape, sharding, lambda where: x[where])


def gather(array: np.ndarray, index_B: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
  """Returns `array[index_B]` as a global array; a process reads only rows for its own devices."""
  shape = (len(index_B), *array.shape[1:])
  return jax.make_array_from_callback(shape, sharding, lambda where: array[index_B[where[0]]])


def local_rows(over_batch: jax.sharding.Sharding, rows: int) -> np.ndarray:
  """Returns the sorted indices of the batch rows that the devices of this process hold.

  `over_batch` is the sharding of the batch, and `rows` its number of rows.
  """
  places = over_batch.addressable_devices_indices_map((rows,)).values()
  return np.unique(np.concatenate([np.arange(rows)[where] for where in places]))


def place_rows(
  row_N: np.ndarray,
  count: int,
  over_batch: jax.sharding.Sharding,
  local: Mapping[str, object],
) -> dict[str, object]:
  """Makes global arrays of `count` rows from the rows that each process holds.

  Args:
    row_N: indices of the rows that this process holds, from `local_rows`.
    count: number of rows in the global arrays.
    over_batch: sharding of the global arrays.
    local: `{name: NumPy array or tree of NumPy arrays}`; the arrays contain only the rows `row_N`.

  Returns:
    `{name: global array or tree of global arrays}`.
  """

  def put(array):
    def part(where):
      start, stop, _ = where[0].indices(count)
      first = np.searchsorted(row_N, start)
      return array[first : first + stop - start]

    return jax.make_array_from_callback((count, *array.shape[1:]), over_batch, part)

  return {name: jax.tree.map(put, arrays) for name, arrays in local.items()}


def keep_layout(mesh: Mesh, tree):
  """Constrains the arrays of a tree to the sharding that `layout` defines, and returns the tree.

  If the mesh does not split parameters, the tree is returned unchanged. This function must be
  called in a jitted function.
  """
  return (
    jax.lax.with_sharding_constraint(tree, layout(mesh, tree)) if devices.splits(mesh) else tree
  )
