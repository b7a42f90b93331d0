"""The devices: how many, in which mesh, where arrays lie, and how a batch is worked through.

Decisions:
  * Mesh axes are Auto: under `jax.make_mesh`'s default, Explicit, a linen module fails on a
    sharded batch.
  * A CPU is one device a core for batches large enough, and each works through its share in
    micro-batches that stay in its cache, on its own until all are done. For small models that
    is far faster than one program over all cores and the whole batch, which is what
    `plain_linen` in results/speed_cpu.json is; for wide ones it makes no difference.
"""

from collections.abc import Callable
import contextlib
import math
import os

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Of a micro-batch on a CPU: rows enough for a product, and few enough for the cache. A wide
# model's weights don't fit there; it takes more rows, so that reading them is little of the work.
TOKENS = 1024
TOKENS_PER_WIDTH = 4
MIN_EXAMPLES = 32  # of a batch for each CPU device; with fewer, keeping in step costs more


def start_up(batch_size: int, micro_batches: int = 1, group: int = 1) -> None:
  """On a CPU, makes one device of each core, as far as they divide a micro-batch.

  A `group` of neighbours stays together.

  Does nothing where JAX is running already, or was told how many to make.
  """
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  rows, most = batch_size // micro_batches // group, min(cores, batch_size // MIN_EXAMPLES)
  count = max([n for n in range(1, most + 1) if rows % n == 0], default=1)
  if jax.config.jax_num_cpu_devices < 1:
    with contextlib.suppress(RuntimeError):  # the backend runs, with the devices that it has
      jax.config.update('jax_num_cpu_devices', count)


def make_mesh(batch_size: int | None = None, micro_batches: int = 1, group: int = 1) -> Mesh:
  """A mesh of all devices along `data`; given a batch, on a CPU, of as many as divide it.

  Args:
    batch_size: examples over all devices.
    micro_batches: that a device's share is to divide into.
    group: neighbours that stay together on a device and in a micro-batch.

  Raises:
    ValueError: accelerators that the batch does not divide over.
  """
  devices = jax.devices()
  if batch_size is None:
    batch_size = len(devices)
  if batch_size < 1 or micro_batches < 1 or batch_size % (micro_batches * group):
    raise ValueError(
      f'batch_size={batch_size} must be a positive multiple of micro_batches={micro_batches}'
      + (f', and of {micro_batches * group}.' if group > 1 else '.')
    )
  rows = batch_size // micro_batches // group
  if devices[0].platform == 'cpu' and jax.process_count() == 1:
    devices = devices[: max(n for n in range(1, len(devices) + 1) if rows % n == 0)]
  if rows % len(devices):
    raise ValueError(
      f'batch_size={batch_size} in micro_batches={micro_batches} does not divide over '
      f'{len(devices)} devices: make batch_size a multiple of '
      f'{micro_batches * len(devices) * group}.'
    )
  return jax.make_mesh((len(devices),), ('data',), axis_types=(AxisType.Auto,), devices=devices)


def over_batch(mesh: Mesh) -> NamedSharding:
  """For arrays whose first axis is the batch."""
  return NamedSharding(mesh, PartitionSpec('data'))


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
  rows = batch_size // mesh.size
  best = max(max(TOKENS, TOKENS_PER_WIDTH * width) / tokens, 1)
  divisors = [n for n in range(group, rows + 1, group) if rows % n == 0]
  return rows // min(divisors, key=lambda n: abs(math.log(n / best)))


def add_up(function: Callable, mesh: Mesh, parts: int) -> Callable:
  """`(batch, *shared) -> sums` of `function` over the batch, `parts` micro-batches a device.

  Args:
    function: `(micro-batch, *shared)` to a tree of sums over the micro-batch's examples.
    mesh: whose devices each hold a share of the batch, and all of `shared`.
    parts: micro-batches that a device takes its share in; they divide it.
  """

  function = jax.jit(function)  # traced once, though called twice

  def on_device(batch, *shared):
    if parts == 1:
      return jax.lax.psum(function(batch, *shared), 'data')
    batch = split(batch, parts)

    def add(sums, part):
      return jax.tree.map(jnp.add, sums, function(part, *shared)), None

    first = jax.tree.map(lambda x: x[0], batch)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, first, *shared))
    return jax.lax.psum(jax.lax.scan(add, zeros, batch)[0], 'data')

  return on_devices(on_device, mesh, PartitionSpec())


def concatenate(function: Callable, mesh: Mesh, parts: int) -> Callable:
  """As `add_up`, for a function that gives an array with a row for each example."""

  def on_device(batch, *shared):
    if parts == 1:
      return function(batch, *shared)
    rows = jax.lax.map(lambda part: function(part, *shared), split(batch, parts))
    return rows.reshape(-1, *rows.shape[2:])

  return on_devices(on_device, mesh, PartitionSpec('data'))


def split(batch, parts: int):
  """Every array `[B, ...]` as `[parts, B / parts, ...]`."""
  return jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)


def on_devices(function: Callable, mesh: Mesh, out_specs: PartitionSpec) -> Callable:
  """`(batch, *shared)` run by every device on its share of the batch."""

  def run(batch, *shared):
    in_specs = (PartitionSpec('data'), *[PartitionSpec()] * len(shared))
    # Without check_vma a gradient is that of the device's own share, summed when we say so;
    # with it, JAX would sum over the devices in every micro-batch.
    mapped = jax.shard_map(
      function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    return mapped(batch, *shared)

  return run
