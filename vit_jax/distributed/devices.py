"""The devices: how many, and in which mesh.

Decisions:
  * Mesh axes are `data`, `fsdp` and `tensor`. A batch is split over the first two; parameters and
    all that is shaped like them over the last two.
  * They are Auto: under `jax.make_mesh`'s default, Explicit, a linen module fails on a
    sharded batch.
  * A CPU is one device a core for batches large enough (`microbatch.py` has the reason).
"""

from collections.abc import Mapping
import contextlib
import math

import jax
from jax.sharding import AxisType, Mesh

from vit_jax.distributed import cluster

AXES = ('data', 'fsdp', 'tensor')
BATCH = ('data', 'fsdp')  # what a batch is split over
ALL_DATA = {'data': -1, 'fsdp': 1, 'tensor': 1}

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
      jax.config.update('jax_num_cpu_devices', cluster.num_cores())
      _one_per_core = True


def few_devices(batch_size: int, micro_batches: int = 1, group: int = 1) -> str | None:
  """Why a batch is divided over fewer CPU devices than it could be; None where it is not.

  Args: see `make_mesh`.
  """
  count = jax.device_count()
  user_set_count = jax.config.jax_num_cpu_devices > 0 and not _one_per_core
  if user_set_count or jax.default_backend() != 'cpu' or jax.process_count() > 1:
    return None
  rows, most = batch_size // micro_batches // group, worth(cluster.num_cores(), batch_size)
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
  sizes = [axis_sizes(shape, count) for count in counts]
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


def axis_sizes(shape: Mapping[str, int], count: int) -> tuple[int, ...] | None:
  """The axes' sizes of a mesh of so many devices; None where there is none."""
  if -1 in (shape['fsdp'], shape['tensor']) and shape['data'] == -1:
    shape = {**shape, 'data': 1}
  fixed = math.prod(size for size in shape.values() if size != -1)
  remaining, rest = divmod(count, fixed)
  sizes = tuple(remaining if shape[axis] == -1 else shape[axis] for axis in AXES)
  return sizes if not rest and math.prod(sizes) == count else None


def shares(mesh: Mesh) -> int:
  """How many parts a batch is split in."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def splits(mesh: Mesh) -> bool:
  """Whether parameters are split over devices."""
  return mesh.size > mesh.shape['data']
