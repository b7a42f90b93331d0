"""The devices: how many, in which mesh, and where arrays lie on them.

Mesh axes are Auto: under `jax.make_mesh`'s default, Explicit, a linen module fails on a
sharded batch.
"""

import contextlib
import os

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MIN_EXAMPLES = 32  # of a batch for each CPU device; with fewer, keeping in step costs more


def start_up(batch_size: int, micro_batches: int = 1) -> None:
  """On a CPU, makes one device of each core, as far as they divide a micro-batch.

  Does nothing where JAX is running already, or was told how many to make.
  """
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  rows, most = batch_size // micro_batches, min(cores, batch_size // MIN_EXAMPLES)
  count = max([n for n in range(1, most + 1) if rows % n == 0], default=1)
  if jax.config.jax_num_cpu_devices < 1:
    with contextlib.suppress(RuntimeError):  # the backend runs, with the devices that it has
      jax.config.update('jax_num_cpu_devices', count)


def make_mesh(batch_size: int, micro_batches: int = 1) -> Mesh:
  """A mesh of all devices along `data`; on a CPU, of as many as divide the batch.

  Raises:
    ValueError: accelerators that the batch does not divide over.
  """
  devices = jax.devices()
  if batch_size < 1 or micro_batches < 1 or batch_size % micro_batches:
    raise ValueError(
      f'batch_size={batch_size} must be a positive multiple of micro_batches={micro_batches}.'
    )
  rows = batch_size // micro_batches
  if devices[0].platform == 'cpu' and jax.process_count() == 1:
    devices = devices[: max(n for n in range(1, len(devices) + 1) if rows % n == 0)]
  if rows % len(devices):
    raise ValueError(
      f'batch_size={batch_size} in micro_batches={micro_batches} does not divide over '
      f'{len(devices)} devices: make batch_size a multiple of {micro_batches * len(devices)}.'
    )
  return jax.make_mesh((len(devices),), ('data',), axis_types=(AxisType.Auto,), devices=devices)


def over_batch(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """For arrays whose axis `axis` is the batch."""
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, 'data'))


def replicated(mesh: Mesh) -> NamedSharding:
  """For arrays that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())
