"""Applies functions to a batch that is split over devices and into micro-batches.

Decisions:
  * If every device holds all parameters, each device works on its part of the batch independently
    (`shard_map`). Sums over devices are computed once per step. If parameters are split over
    devices, XLA partitions one program over all devices. Sharding constraints then keep the
    activations between blocks split along the batch axis.
  * On a CPU, each core is a device if the batch is large enough. Each device works through its part
    of the batch in micro-batches that fit into its cache, and waits for other devices only at the
    end. For small models, this division is far faster than a single program that runs the whole
    batch on all cores (`plain_linen` in results/speed_cpu.json). For wide models, the division
    makes no difference.
  * In a training step on a CPU, the temporary memory of a micro-batch should be below 32 MiB. The C
    library of Linux returns larger blocks of memory to the operating system after each step. The
    next step then waits until the operating system has cleared new memory
    (results/micro_batches.json).
"""

from collections.abc import Callable
import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vit_jax.distributed import devices
from vit_jax.distributed.backend import compiled_for, target
from vit_jax.distributed.sharding import keep_layout

# Number of tokens in a micro-batch on a CPU: large enough for efficient matrix products, and small
# enough for the cache. The weights of a wide model do not fit into the cache. Wide models therefore
# use larger micro-batches, so that reading the weights is only a small part of the work.
TOKENS = 1024
TOKENS_PER_WIDTH = 4
# Bytes of activations in a micro-batch of a training step on a CPU. XLA stores about 85 % of them,
# so 32 MiB also hold the gradients of small models.
ACTIVATION_BYTES = 31 * 2**20


def micro_batches(
  mesh: Mesh, batch_size: int, tokens: int, width: int, group: int = 1, kept: int = 0
) -> int:
  """Returns the best number of micro-batches into which each device divides its part of a batch.

  Args:
    mesh: mesh of the devices.
    batch_size: number of examples over all devices.
    tokens: number of tokens per example.
    width: width of the model.
    group: number of neighbouring examples that stay together in a micro-batch: 2 if images are
      mixed in pairs, else 1.
    kept: bytes of activations per token that a backward pass needs; 0 without a backward pass.

  Returns:
    1 on accelerators. On a CPU, the number for which a micro-batch has about `TOKENS` tokens, or
    about `TOKENS_PER_WIDTH * width` tokens if this is more. With a backward pass, only those
    numbers count with which a micro-batch has at most `ACTIVATION_BYTES` of activations, and at
    least `width` and `TOKENS / 4` tokens. If there is no such number, all numbers count.
  """
  if target(mesh).platform != 'cpu':
    return 1
  rows = batch_size // devices.shares(mesh)
  best = max(max(TOKENS, TOKENS_PER_WIDTH * width) / tokens, 1)
  divisors = [n for n in range(group, rows + 1, group) if rows % n == 0]
  least, most = max(TOKENS // 4, width), ACTIVATION_BYTES // kept if kept else 0
  small = [n for n in divisors if least <= n * tokens <= most]
  return rows // min(small or divisors, key=lambda n: abs(math.log(n / best)))


def add_up(function: Callable, mesh: Mesh, parts: int) -> Callable:
  """Returns a function `(batch, *shared) -> sums` that sums `function` over all micro-batches.

  Args:
    function: maps `(micro-batch, *shared)` to a tree of sums over the examples. Every micro-batch
      gets the same `shared` arguments, such as parameters.
    mesh: mesh of the devices. Each device holds a part of the batch. The arrays in `shared` are
      placed as `sharding.layout` defines.
    parts: number of micro-batches per device; must divide the number of examples per device.
  """

  @jax.jit  # jitted, so that it is traced only once, although it is called twice
  def sums_of(part, *shared):
    with compiled_for(target(mesh)):
      return keep_layout(mesh, function(part, *shared))

  def added(batch, *shared):
    if parts == 1:
      return sums_of(batch, *shared)

    def add(sums, part):
      return jax.tree.map(jnp.add, sums, sums_of(part, *shared)), None

    batch = micro(batch, mesh, parts)
    first = jax.tree.map(lambda x: x[0], batch)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(sums_of, first, *shared))
    return jax.lax.scan(add, zeros, batch)[0]

  def over_devices(*args):
    sums = added(*args)
    # If one device has the whole batch, there is nothing to add, but XLA would still copy all sums.
    return jax.lax.psum(sums, devices.BATCH) if devices.shares(mesh) > 1 else sums

  if devices.splits(mesh):
    return over_blocks(added, mesh)
  return on_devices(over_devices, mesh, PartitionSpec())


def concatenate(function: Callable, mesh: Mesh, parts: int) -> Callable:
  """Returns a function `(batch, *shared) -> rows` that joins the results of all micro-batches.

  The argument `function` computes the rows of one micro-batch: it maps `(micro-batch, *shared)` to
  an array, or a tree of arrays, with one row per example. The rows of the result are in the order
  of the batch. `add_up` describes the other arguments.
  """

  def rows_of(part, *shared):
    with compiled_for(target(mesh)):
      return function(part, *shared)

  def joined(batch, *shared):
    if parts == 1:
      return rows_of(batch, *shared)
    rows = jax.lax.map(lambda part: rows_of(part, *shared), micro(batch, mesh, parts))
    return jax.tree.map(lambda x: unsplit(x, mesh), rows)

  if devices.splits(mesh):
    return over_blocks(joined, mesh)
  return on_devices(joined, mesh, PartitionSpec(devices.BATCH))


def split(batch, parts: int):
  """Reshapes every array of a tree from `[B, ...]` to `[parts, B / parts, ...]`."""
  return jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)


def micro(batch, mesh: Mesh, parts: int):
  """Splits a batch into micro-batches: `[B, ...]` becomes `[parts, B / parts, ...]`.

  If parameters are split over devices, `batch` is the whole batch, and each micro-batch contains
  equally many examples of every device. If every device holds all parameters, each device
  calls this function with its own part of the batch.
  """
  if not devices.splits(mesh):
    return split(batch, parts)
  sharding = NamedSharding(mesh, PartitionSpec(None, devices.BATCH))

  def pieces(x):
    x = x.reshape(devices.shares(mesh), parts, -1, *x.shape[1:]).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(x.reshape(parts, -1, *x.shape[3:]), sharding)

  return jax.tree.map(pieces, batch)


def unsplit(x: jax.Array, mesh: Mesh) -> jax.Array:
  """Undoes `micro`: joins the parts `[parts, B / parts, ...]` to `[B, ...]`."""
  if devices.splits(mesh):
    parts, shares = len(x), devices.shares(mesh)
    x = x.reshape(parts, shares, -1, *x.shape[2:]).swapaxes(0, 1)
    return x.reshape(-1, *x.shape[3:])
  return x.reshape(-1, *x.shape[2:])


def over_blocks(function: Callable, mesh: Mesh) -> Callable:
  """Wraps `function` so that the outputs of Flax modules stay split along the batch axis.

  Without this constraint, XLA can split activations along the channel axis, because the kernel of
  the next layer is split along this axis. Devices would then exchange activations instead of
  parameters.
  """
  free = PartitionSpec.UNCONSTRAINED

  def constrain(call, args, kwargs, context):
    y = call(*args, **kwargs)
    if context.method_name != '__call__' or not isinstance(y, jax.Array):
      return y
    spec = PartitionSpec(devices.BATCH, *[free] * (y.ndim - 1))
    return jax.lax.with_sharding_constraint(y, NamedSharding(mesh, spec))

  @functools.wraps(function)
  def run(*args):
    with nn.intercept_methods(constrain):
      return function(*args)

  return run


def on_devices(function: Callable, mesh: Mesh, out_specs: PartitionSpec) -> Callable:
  """Returns a function `(batch, *shared)` that runs `function` on each device's part of the batch.

  `out_specs` defines how the results of the devices form global arrays, as in `jax.shard_map`.
  """

  def run(batch, *shared):
    in_specs = (PartitionSpec(devices.BATCH), *[PartitionSpec()] * len(shared))
    # Without check_vma, a gradient covers only the device's part of the batch, and `add_up` sums
    # over the devices once. With check_vma, JAX would sum over the devices in every micro-batch.
    mapped = jax.shard_map(
      function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    return mapped(batch, *shared)

  return run
