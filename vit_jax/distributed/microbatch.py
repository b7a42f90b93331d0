"""How the devices work through a batch.

Decisions:
  * Where every device holds all parameters, it works on its share of the batch by itself and
    sums are taken once a step (`shard_map`). Where parameters are split, XLA partitions one
    program for all, kept by constraints from splitting anything but the batch between blocks.
  * A CPU is one device a core for batches large enough, and each works through its share in
    micro-batches that stay in its cache, on its own until all are done. For small models that
    is far faster than one program over all cores and the whole batch, which is what
    `plain_linen` in results/speed_cpu.json is; for wide ones it makes no difference.
"""

from collections.abc import Callable
import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vit_jax.distributed import devices
from vit_jax.distributed.sharding import keep_layout

# Of a micro-batch on a CPU: rows enough for a product, and few enough for the cache. A wide
# model's weights don't fit there; it takes more rows, so that reading them is little of the work.
TOKENS = 1024
TOKENS_PER_WIDTH = 4


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
  rows = batch_size // devices.shares(mesh)
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

  @jax.jit  # traced once, though called twice
  def sums_of(part, *shared):
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

  if devices.splits(mesh):
    return over_blocks(added, mesh)
  return on_devices(lambda *args: jax.lax.psum(added(*args), devices.BATCH), mesh, PartitionSpec())


def concatenate(function: Callable, mesh: Mesh, parts: int) -> Callable:
  """As `add_up`, for a function that gives an array with a row for each example."""

  def on_device(batch, *shared):
    if parts == 1:
      return function(batch, *shared)
    rows = jax.lax.map(lambda part: function(part, *shared), split(batch, parts))
    return rows.reshape(-1, *rows.shape[2:])

  return on_devices(on_device, mesh, PartitionSpec(devices.BATCH))


def split(batch, parts: int):
  """Every array `[B, ...]` as `[parts, B / parts, ...]`."""
  return jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)


def micro(batch, mesh: Mesh, parts: int):
  """The same; where it is the batch of all devices, each part is of a piece of every share."""
  if not devices.splits(mesh):
    return split(batch, parts)
  sharding = NamedSharding(mesh, PartitionSpec(None, devices.BATCH))

  def pieces(x):
    x = x.reshape(devices.shares(mesh), parts, -1, *x.shape[1:]).swapaxes(0, 1)
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
    spec = PartitionSpec(devices.BATCH, *[free] * (y.ndim - 1))
    return jax.lax.with_sharding_constraint(y, NamedSharding(mesh, spec))

  @functools.wraps(function)
  def run(*args):
    with nn.intercept_methods(constrain):
      return function(*args)

  return run


def on_devices(function: Callable, mesh: Mesh, out_specs: PartitionSpec) -> Callable:
  """`(batch, *shared)` run by every device on its share of the batch."""

  def run(batch, *shared):
    in_specs = (PartitionSpec(devices.BATCH), *[PartitionSpec()] * len(shared))
    # Without check_vma a gradient is that of the device's own share, summed when we say so;
    # with it, JAX would sum over the devices in every micro-batch.
    mapped = jax.shard_map(
      function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    return mapped(batch, *shared)

  return run
