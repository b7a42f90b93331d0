"""The devices: how many, in which mesh, where arrays lie, and how a batch is worked through.

Decisions:
  * Mesh axes are `data`, `fsdp` and `tensor`. A batch is split over the first two; parameters and
    all that is shaped like them over the last two, by their names and shapes.
  * They are Auto: under `jax.make_mesh`'s default, Explicit, a linen module fails on a
    sharded batch.
  * Where every device holds all parameters, it works on its share of the batch by itself and
    sums are taken once a step (`shard_map`). Where parameters are split, XLA partitions one
    program for all, kept by constraints from splitting anything but the batch between blocks.
  * A CPU is one device a core for batches large enough, and each works through its share in
    micro-batches that stay in its cache, on its own until all are done. For small models that
    is far faster than one program over all cores and the whole batch, which is what
    `plain_linen` in results/speed_cpu.json is; for wide ones it makes no difference.
"""

from collections.abc import Callable, Mapping
import contextlib
import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from vit_jax import cluster

AXES = ('data', 'fsdp', 'tensor')
BATCH = ('data', 'fsdp')  # what a batch is split over
ALL_DATA = {'data': -1, 'fsdp': 1, 'tensor': 1}

# Which axis of an array `tensor` splits, by the last two parts of its name: attention's heads and
# the MLP's hidden units (Shoeybi et al. 2019, 1909.08053, Section 3).
TENSOR_AXIS = {
  ('query', 'kernel'): 1,
  ('query', 'bias'): 0,
  ('key', 'kernel'): 1,
  ('key', 'bias'): 0,
  ('value', 'kernel'): 1,
  ('value', 'bias'): 0,
  ('out', 'kernel'): 0,
  ('up', 'kernel'): 1,
  ('up', 'bias'): 0,
  ('down', 'kernel'): 0,
}
SPLIT_FROM = 4096  # elements; `fsdp` leaves smaller arrays whole, which cost more to gather

# Of a micro-batch on a CPU: rows enough for a product, and few enough for the cache. A wide
# model's weights don't fit there; it takes more rows, so that reading them is little of the work.
TOKENS = 1024
TOKENS_PER_WIDTH = 4
MIN_EXAMPLES = 32  # of a batch for each CPU device; with fewer, keeping in step costs more

_one_per_core = False  # whether `start_up` set the number of CPU devices, not the user


def start_up() -> None:
  """Makes one CPU device per core, of which a mesh takes as many as its batch is worth.

  The first question about devices starts JAX, with a single CPU device unless it was told
  otherwise. So this is called before all else. It does nothing where the user has set the number
  of CPU devices, and nothing where JAX runs already.
  """
  global _one_per_core
  if jax.config.jax_num_cpu_devices < 1:
    with contextlib.suppress(RuntimeError):  # JAX runs already: see `few_devices`
      jax.config.update('jax_num_cpu_devices', cluster.cores())
      _one_per_core = True


def few_devices(batch_size: int, micro_batches: int = 1, group: int = 1) -> str | None:
  """Why a batch is divided over fewer CPU devices than it could be; None where it is not.

  Args: see `make_mesh`.
  """
  count = jax.device_count()
  user_set_count = jax.config.jax_num_cpu_devices > 0 and not _one_per_core
  if user_set_count or jax.default_backend() != 'cpu' or jax.process_count() > 1:
    return None
  rows, most = batch_size // micro_batches // group, worth(cluster.cores(), batch_size)
  wanted = max(n for n in range(1, most + 1) if rows % n == 0)
  if wanted <= count:
    return None
  return (
    f'JAX was started with {count} CPU device(s), and batch_size={batch_size} is worth {wanted}: '
    'results differ in rounding from those of a run with all devices. Call vit_jax.train before '
    f'other JAX code, or set JAX_NUM_CPU_DEVICES={wanted}.'
  )


def worth(count: int, batch_size: int) -> int:
  """How many of `count` CPU devices, at most, a batch is divided over."""
  return max(1, min(count, batch_size // MIN_EXAMPLES))


def make_mesh(
  batch_size: int | None = None,
  micro_batches: int = 1,
  group: int = 1,
  shape: Mapping[str, int] = ALL_DATA,
) -> Mesh:
  """A mesh of all devices; on a CPU of as many as divide the batch and are worth it.

  Where the user has set the number of CPU devices, all that divide the batch are used.

  Args:
    batch_size: examples over all devices; None: a mesh of all devices.
    micro_batches: that a device's share is to divide into.
    group: neighbours that stay together on a device and in a micro-batch.
    shape: devices along each of `AXES`; -1, of one of them, for all that remain. That of `data`
      gives way to another's.

  Raises:
    ValueError: devices that make no such mesh, or that the batch does not divide over.
  """
  devices, given = jax.devices(), batch_size is not None
  batch_size = batch_size if given else len(devices)
  if batch_size < 1 or micro_batches < 1 or batch_size % (micro_batches * group):
    raise ValueError(
      f'batch_size={batch_size} must be a positive multiple of micro_batches={micro_batches}'
      + (f', and of {micro_batches * group}.' if group > 1 else '.')
    )
  rows = batch_size // micro_batches // group
  counts = [len(devices)]
  if devices[0].platform == 'cpu' and jax.process_count() == 1:
    most = worth(len(devices), batch_size) if _one_per_core and given else len(devices)
    # The first that fits is taken: more than are worth it only where `shape` asks for them.
    counts = [*range(most, 0, -1), *range(most + 1, len(devices) + 1)]
  sizes = [fill(shape, count) for count in counts]
  sizes = [found for found in sizes if found]
  if not sizes:
    raise ValueError(
      f'A mesh of {dict(shape)} can not be made of {len(devices)} device(s): its axes must '
      'multiply to their number, and -1 of one axis stands for what remains. On a CPU '
      'JAX_NUM_CPU_DEVICES=8 makes eight.'
    )
  fitting = [found for found in sizes if rows % (found[0] * found[1]) == 0]
  if not fitting:
    data, fsdp, _ = sizes[0]
    raise ValueError(
      f'batch_size={batch_size} in micro_batches={micro_batches} does not divide over '
      f'{data * fsdp} devices: make batch_size a multiple of '
      f'{micro_batches * data * fsdp * group}.'
    )
  return mesh_of(fitting[0])


def inference_mesh(batch_size: int) -> Mesh:
  """A mesh of all devices, which share a padded batch; on a CPU of as many as it is worth."""
  count = jax.device_count()
  return mesh_of((worth(count, batch_size) if _one_per_core else count, 1, 1))


def mesh_of(sizes: tuple[int, ...]) -> Mesh:
  """A mesh of the first devices, so many along each of `AXES`."""
  devices = jax.devices()[: math.prod(sizes)]
  return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def fill(shape: Mapping[str, int], count: int) -> tuple[int, ...] | None:
  """The axes' sizes of a mesh of so many devices; None where there is none."""
  if -1 in (shape['fsdp'], shape['tensor']) and shape['data'] == -1:
    shape = {**shape, 'data': 1}
  fixed = math.prod(size for size in shape.values() if size != -1)
  remaining, rest = divmod(count, fixed)
  sizes = tuple(remaining if shape[axis] == -1 else shape[axis] for axis in AXES)
  return sizes if not rest and math.prod(sizes) == count else None


def over_batch(mesh: Mesh) -> NamedSharding:
  """For arrays whose first axis is the batch."""
  return NamedSharding(mesh, PartitionSpec(BATCH))


def shares(mesh: Mesh) -> int:
  """How many parts a batch is split in."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def splits(mesh: Mesh) -> bool:
  """Whether parameters are split over devices."""
  return mesh.size > mesh.shape['data']


def layout(mesh: Mesh, tree):
  """The sharding of each array of a tree: parameters, or what has their names and shapes."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: NamedSharding(mesh, partition(mesh, path, x.shape)), tree
  )


def partition(mesh: Mesh, path: tuple, shape: tuple[int, ...]) -> PartitionSpec:
  """Which mesh axis splits each axis of an array.

  `tensor` splits what `TENSOR_AXIS` says; `fsdp` the longest other axis that it divides
  (Rajbhandari et al. 2019, 1910.02054: ZeRO's third stage).
  """
  names = tuple(jax.tree_util.keystr((key,), simple=True) for key in path[-2:])
  axes = [None] * len(shape)
  tensor, fsdp = TENSOR_AXIS.get(names), mesh.shape['fsdp']
  if mesh.shape['tensor'] > 1 and tensor is not None and shape[tensor] % mesh.shape['tensor'] == 0:
    axes[tensor] = 'tensor'
  if fsdp > 1 and math.prod(shape) >= SPLIT_FROM:
    free = [i for i, size in enumerate(shape) if axes[i] is None and size % fsdp == 0]
    if free:
      axes[max(free, key=lambda i: shape[i])] = 'fsdp'
  return PartitionSpec(*axes)


def place(tree, like):
  """Arrays that every process holds whole, as global ones that lie where those of `like` do."""
  return jax.tree.map(lambda x, old: spread(x, old.sharding), tree, like)


def replicate(mesh: Mesh, tree):
  """Arrays that every process holds whole, as global ones that every device does."""
  return jax.tree.map(lambda x: spread(x, replicated(mesh)), tree)


def spread(x: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
  """An array that every process holds whole, as a global one."""
  x = np.asarray(x)
  return jax.make_array_from_callback(x.shape, sharding, lambda where: x[where])


def gather(array: np.ndarray, index_B: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
  """`array[index_B]` as a global array, of which each process gathers what its devices hold."""
  shape = (len(index_B), *array.shape[1:])
  return jax.make_array_from_callback(shape, sharding, lambda where: array[index_B[where[0]]])


def keep(mesh: Mesh, tree):
  """Inside a program that XLA partitions: arrays where `layout` has them."""
  return jax.lax.with_sharding_constraint(tree, layout(mesh, tree)) if splits(mesh) else tree


def replicated(mesh: Mesh) -> NamedSharding:
  """For arrays that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def micro_batches(mesh: Mesh, batch_size: int, tokens: int, width: int, group: int = 1) -> int:
  """How many parts each device best takes its share of a batch in.

  Args:
    mesh: of the devices.
    batch_size: over all of them.
    tokens: of an example.
    width: of the model.
    group: neighbours that stay together.

  Returns:
    1 on accelerators; on a CPU what makes parts of about `TOKENS` tokens or
    `TOKENS_PER_WIDTH` times the width.
  """
  if mesh.devices.flat[0].platform != 'cpu':
    return 1
  rows = batch_size // shares(mesh)
  best = max(max(TOKENS, TOKENS_PER_WIDTH * width) / tokens, 1)
  divisors = [n for n in range(group, rows + 1, group) if rows % n == 0]
  return rows // min(divisors, key=lambda n: abs(math.log(n / best)))


def add_up(function: Callable, mesh: Mesh, parts: int) -> Callable:
  """`(batch, *shared) -> sums` of `function` over the batch, `parts` micro-batches a device.

  Args:
    function: `(micro-batch, *shared)` to a tree of sums over the micro-batch's examples.
    mesh: whose devices each hold a share of the batch, and `shared` as `layout` has it.
    parts: micro-batches that a device takes its share in; they divide it.
  """
  function = jax.jit(function)  # traced once, though called twice

  def added(batch, *shared):
    if parts == 1:
      return function(batch, *shared)

    def add(sums, part):
      return jax.tree.map(jnp.add, sums, function(part, *shared)), None

    batch = micro(batch, mesh, parts)
    first = jax.tree.map(lambda x: x[0], batch)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, first, *shared))
    return jax.lax.scan(add, zeros, batch)[0]

  if splits(mesh):
    return over_blocks(added, mesh)
  return on_devices(lambda *args: jax.lax.psum(added(*args), BATCH), mesh, PartitionSpec())


def concatenate(function: Callable, mesh: Mesh, parts: int) -> Callable:
  """As `add_up`, for a function that gives an array with a row for each example."""

  def on_device(batch, *shared):
    if parts == 1:
      return function(batch, *shared)
    rows = jax.lax.map(lambda part: function(part, *shared), split(batch, parts))
    return rows.reshape(-1, *rows.shape[2:])

  return on_devices(on_device, mesh, PartitionSpec(BATCH))


def split(batch, parts: int):
  """Every array `[B, ...]` as `[parts, B / parts, ...]`."""
  return jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)


def micro(batch, mesh: Mesh, parts: int):
  """The same; where it is the batch of all devices, each part is of a piece of every share."""
  if not splits(mesh):
    return split(batch, parts)
  sharding = NamedSharding(mesh, PartitionSpec(None, BATCH))

  def pieces(x):
    x = x.reshape(shares(mesh), parts, -1, *x.shape[1:]).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(x.reshape(parts, -1, *x.shape[3:]), sharding)

  return jax.tree.map(pieces, batch)


def over_blocks(function: Callable, mesh: Mesh) -> Callable:
  """The function, what modules give in it split over the batch as the batch is.

  Left to itself, XLA may split a token's vector as it finds the next kernel split, and so send
  activations around in the place of parameters.
  """
  free = PartitionSpec.UNCONSTRAINED

  def constrain(call, args, kwargs, context):
    y = call(*args, **kwargs)
    if context.method_name != '__call__' or not isinstance(y, jax.Array):
      return y
    spec = PartitionSpec(BATCH, *[free] * (y.ndim - 1))
    return jax.lax.with_sharding_constraint(y, NamedSharding(mesh, spec))

  @functools.wraps(function)
  def run(*args):
    with nn.intercept_methods(constrain):
      return function(*args)

  return run


def on_devices(function: Callable, mesh: Mesh, out_specs: PartitionSpec) -> Callable:
  """`(batch, *shared)` run by every device on its share of the batch."""

  def run(batch, *shared):
    in_specs = (PartitionSpec(BATCH), *[PartitionSpec()] * len(shared))
    # Without check_vma a gradient is that of the device's own share, summed when we say so;
    # with it, JAX would sum over the devices in every micro-batch.
    mapped = jax.shard_map(
      function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    return mapped(batch, *shared)

  return run
