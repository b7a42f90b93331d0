"""Chooses the number of devices and arranges them in a mesh.

Decisions:
  * The mesh axes are `data` (data parallelism), `fsdp` (fully sharded data parallelism) and
    `tensor` (tensor parallelism). A batch is split over `data` and `fsdp`. Parameters, and arrays
    with the shapes of parameters, are split over `fsdp` and `tensor`.
  * The axes have the type Auto, because modules of Flax linen fail on a batch that is sharded over
    Explicit axes.
  * On a CPU, each core is a device if the batch is large enough (`microbatch.py` explains why).
"""

from collections.abc import Mapping, Sequence
import contextlib
import logging
import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
import numpy as np

from vit_jax.distributed import cluster

log = logging.getLogger(__name__)

AXES = ('data', 'fsdp', 'tensor')
BATCH = ('data', 'fsdp')  # the axes that a batch is split over
ALL_DATA = {'data': -1, 'fsdp': 1, 'tensor': 1}

MIN_EXAMPLES = 32  # per CPU device; with fewer examples per device, a step gets slower

PAIRS = '2, because images are mixed in pairs'  # explains the factor `group` in messages

_one_per_core = False  # True if `start_up`, not the user, set the number of CPU devices


def start_up() -> None:
  """Sets the number of JAX's CPU devices to the number of CPU cores.

  Call this function before the first query for devices. The first query starts JAX, which then uses
  a single CPU device, unless the number of CPU devices is set. The function does nothing if the
  user has set the number of CPU devices, or if JAX is already running. A mesh for small batches
  uses only some of these devices (see `worth`).
  """
  global _one_per_core
  if jax.config.jax_num_cpu_devices < 1:
    with contextlib.suppress(RuntimeError):  # JAX already runs; `few_devices` warns about this
      jax.config.update('jax_num_cpu_devices', cluster.num_cores())
      _one_per_core = True


def few_devices(batch_size: int, micro_batches: int = 1, group: int = 1) -> str | None:
  """Returns a warning if JAX has fewer CPU devices than the batch could use, else None.

  The result is also None if the user has set the number of CPU devices, or if there are several
  processes. `make_mesh` describes the arguments.
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
    f'JAX was started with {count} CPU device(s), but batch_size={batch_size} would use {wanted}. '
    'With fewer devices, results are rounded differently. Call vit_jax.train before '
    f'other JAX code, or set JAX_NUM_CPU_DEVICES={wanted}.'
  )


def worth(count: int, batch_size: int) -> int:
  """Returns how many of `count` CPU devices to use for a batch.

  Each of these devices gets at least `MIN_EXAMPLES` examples. If the batch has fewer examples, the
  result is 1.
  """
  return max(1, min(count, batch_size // MIN_EXAMPLES))


def make_mesh(
  batch_size: int | None = None,
  micro_batches: int = 1,
  group: int = 1,
  shape: Mapping[str, int] = ALL_DATA,
) -> Mesh:
  """Returns the mesh of devices over which batches of this size are split.

  On accelerators, or with several processes, the mesh has all devices. In a single process on a
  CPU, the mesh has the largest number of devices over which the batch can be split evenly. If the
  user has not set the number of CPU devices, `worth` limits the size of the mesh, unless `shape`
  needs more devices.

  Args:
    batch_size: number of examples in a batch, summed over all devices. None: use all devices.
    micro_batches: number of micro-batches into which each device divides its part of a batch.
    group: number of neighbouring examples that stay together on a device and in a micro-batch: 2
      if images are mixed in pairs, else 1.
    shape: number of devices along each of `AXES`. The value -1 stands for all remaining devices. If
      `data` and another axis are -1, `data` becomes 1.

  Raises:
    ValueError: the devices cannot form a mesh of this shape, or the batch cannot be split evenly.
  """
  devices, given = jax.devices(), batch_size is not None
  batch_size = batch_size if given else len(devices)
  if batch_size < 1 or micro_batches < 1 or batch_size % (micro_batches * group):
    raise ValueError(
      f'batch_size={batch_size} must be a positive multiple of {micro_batches * group} '
      f'({micro_batches} micro-batches' + (f' x {PAIRS}).' if group > 1 else ').')
    )
  rows = batch_size // micro_batches // group
  most = worth(len(devices), batch_size) if _one_per_core and given else len(devices)
  sizes = possible_sizes(shape, most)
  if not sizes:
    raise ValueError(
      f'A mesh of {dict(shape)} cannot be made of {len(devices)} device(s). The product of its '
      'axis sizes must be the number of devices (on a CPU: at most this number). Set one axis to '
      '-1 for all remaining devices. On a CPU, JAX_NUM_CPU_DEVICES=8 makes eight devices.'
    )
  fitting = [found for found in sizes if rows % (found[0] * found[1]) == 0]
  if not fitting:
    data, fsdp, _ = sizes[0]
    factors = [f'{data * fsdp} devices'] + [f'{micro_batches} micro-batches'] * (micro_batches > 1)
    raise ValueError(
      f'batch_size={batch_size} with micro_batches={micro_batches} does not divide over '
      f'{data * fsdp} devices. Make batch_size a multiple of '
      f'{micro_batches * data * fsdp * group}'
      + (f' ({" x ".join([*factors, PAIRS])}).' if group > 1 else '.')
    )
  if fitting[0] != sizes[0] and dict(shape) != ALL_DATA:
    counts = math.prod(fitting[0]), math.prod(sizes[0])
    log.warning(
      'The mesh has only %d of %d devices, because batch_size=%d does not divide over more.',
      *counts,
      batch_size,
    )
  return mesh_of(fitting[0])


def possible_sizes(shape: Mapping[str, int], most: int) -> list[tuple[int, ...]]:
  """Returns the (data, fsdp, tensor) sizes of all possible meshes, in order of preference.

  Args:
    shape: number of devices along each of `AXES`, as in `make_mesh`.
    most: number of CPU devices that are worth using. Larger meshes come last.
  """
  devices = jax.devices()
  counts = [len(devices)]
  if devices[0].platform == 'cpu' and jax.process_count() == 1:
    # The first count that fits is used, so counts above `most` are used only if `shape` needs them.
    counts = [*range(most, 0, -1), *range(most + 1, len(devices) + 1)]
  sizes = [axis_sizes(shape, count) for count in counts]
  return [found for found in sizes if found]


def smallest_batch(
  micro_batches: int = 1, group: int = 1, shape: Mapping[str, int] = ALL_DATA
) -> int:
  """Returns the smallest batch size that `make_mesh` accepts with these arguments."""
  sizes = possible_sizes(shape, jax.device_count())
  return min((data * fsdp for data, fsdp, _ in sizes), default=1) * micro_batches * group


def inference_mesh(batch_size: int) -> Mesh:
  """Returns a mesh that splits a batch over all devices, or over fewer CPU devices.

  On a CPU, `worth` limits the number of devices, unless the user has set this number. With several
  processes, there is no limit, because the mesh must contain devices of every process. The batch
  size need not be a multiple of the number of devices, because batches are padded.
  """
  count = jax.device_count()
  limited = _one_per_core and jax.default_backend() == 'cpu' and jax.process_count() == 1
  return mesh_of((worth(count, batch_size) if limited else count, 1, 1))


def mesh_of(sizes: tuple[int, ...], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns a mesh with these sizes along `AXES`, made of the first of `devices`.

  By default, `devices` are JAX's devices.

  Raises:
    ValueError: the devices belong to several TPU slices, which cannot form such a mesh.
  """
  devices = (jax.devices() if devices is None else devices)[: math.prod(sizes)]
  return Mesh(arranged(sizes, devices), AXES, axis_types=(AxisType.Auto,) * 3)


def arranged(sizes: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
  """Returns an array of devices with the shape `sizes`, in which neighbours are close in hardware.

  `jax.make_mesh` does not accept GPUs of several hosts, several TPU slices, or many shapes of
  meshes on a three-dimensional TPU slice.

  Raises:
    ValueError: the number of TPU slices does not divide the size of the axis `data`.
  """
  tpu = devices[0].platform == 'tpu'
  slices = len({getattr(device, 'slice_index', 0) for device in devices}) if tpu else 1
  if slices == 1:
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  data, fsdp, tensor = sizes
  if data % slices:
    raise ValueError(
      f'A mesh with data={data}, fsdp={fsdp} and tensor={tensor} cannot be made of {slices} TPU '
      'slices, because fsdp and tensor use only connections inside a slice. Choose a mesh.data '
      f'that is a multiple of {slices}.'
    )
  within = data // slices, fsdp, tensor
  return mesh_utils.create_hybrid_device_mesh(
    within, (slices, 1, 1), devices, allow_split_physical_axes=True
  )


def axis_sizes(shape: Mapping[str, int], count: int) -> tuple[int, ...] | None:
  """Returns the sizes along `AXES` of a mesh of `count` devices; None if `shape` does not fit.

  `shape` is the same as in `make_mesh`.
  """
  if -1 in (shape['fsdp'], shape['tensor']) and shape['data'] == -1:
    shape = {**shape, 'data': 1}
  fixed = math.prod(size for size in shape.values() if size != -1)
  remaining, rest = divmod(count, fixed)
  sizes = tuple(remaining if shape[axis] == -1 else shape[axis] for axis in AXES)
  return sizes if not rest and math.prod(sizes) == count else None


def shares(mesh: Mesh) -> int:
  """Returns the number of parts into which a mesh splits a batch, along `data` and `fsdp`."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def splits(mesh: Mesh) -> bool:
  """Returns whether a mesh splits parameters, along `fsdp` or `tensor`."""
  return mesh.size > mesh.shape['data']
