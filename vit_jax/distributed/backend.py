"""Describes the kind of device for which a program is compiled, and reports missing devices.

Decisions:
  * The kernels of a program are chosen for the devices of its mesh. This machine need not have
    these devices: the mesh can also be made from a topology description
    (`jax.experimental.topologies`).
  * `compiled_for` overrides the devices of the mesh. For example, a machine without a GPU can lower
    a training step for a GPU.
  * `model.apply` gets no mesh, so the model runs on JAX's default device. Therefore, a call of
    `target` without a mesh describes the default device.
"""

from collections.abc import Iterator
import contextlib
import contextvars
import dataclasses
import os

import jax
from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True)
class Target:
  """Kind of device for which a program is compiled.

  Attributes:
    platform: `cpu`, `cuda`, `rocm` or `tpu`; empty if the program must run on all of them.
    capability: compute capability of an NVIDIA GPU, such as 9.0 for Hopper, else 0.
  """

  platform: str
  capability: float = 0.0


ANY = Target('')

_target = contextvars.ContextVar('target', default=None)


def target(mesh: Mesh | None = None) -> Target:
  """Returns the kind of device for which a program is compiled.

  In a `compiled_for` block, the result is the argument of `compiled_for`. Outside such a block, the
  result is the kind of the mesh's devices. If `mesh` is None, it is the kind of JAX's default
  device.
  """
  if chosen := _target.get():
    return chosen
  return target_of(jax.devices()[0] if mesh is None else mesh.devices.flat[0])


def target_of(device: jax.Device) -> Target:
  """Returns the kind of a real device, or of a device from `jax.experimental.topologies`."""
  if device.platform != 'gpu':
    return Target(device.platform)
  generation = device.compute_capability  # e.g. 9.0 for NVIDIA's Hopper, or gfx942 for AMD
  amd = generation.startswith('gfx')
  return Target('rocm') if amd else Target('cuda', float(generation))


@contextlib.contextmanager
def compiled_for(target: Target) -> Iterator[None]:
  """Context manager in which traced programs choose kernels for the given kind of device."""
  token = _target.set(target)
  try:
    yield
  finally:
    _target.reset(token)


def portable() -> contextlib.AbstractContextManager[None]:
  """Returns a context manager in which traced programs use only kernels that every platform has."""
  return compiled_for(ANY)


@contextlib.contextmanager
def needed() -> Iterator[None]:
  """Context manager that turns JAX's error about missing devices into a ValueError with a remedy.

  It looks for devices only after an error. An earlier check would start JAX, but `joined` must
  connect the processes first.
  """
  try:
    yield
  except (AssertionError, RuntimeError) as error:
    try:
      jax.devices()
    except (AssertionError, RuntimeError) as failure:
      why = f' ({failure})' if str(failure) else ''
      raise ValueError(
        f'JAX_PLATFORMS={os.environ.get("JAX_PLATFORMS", "")}: JAX finds no such device here{why}. '
        'Install JAX for this device, e.g. jax[cuda13], or unset JAX_PLATFORMS.'
      ) from error
    raise
