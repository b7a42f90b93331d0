"""The backend: whether it starts, and which a model's kernels are chosen for."""

from collections.abc import Iterator
import contextlib
import contextvars
import os

import jax

_portable = contextvars.ContextVar('portable', default=False)


def target_backend() -> str | None:
  """`cpu`, `gpu` or `tpu`; None where the program is to run on all of them."""
  return None if _portable.get() else jax.default_backend()


def is_ampere() -> bool:
  """Whether it is an NVIDIA GPU of Ampere's generation or a later one."""
  device = jax.devices()[0]
  return 'cuda' in device.client.platform_version and float(device.compute_capability) >= 8


@contextlib.contextmanager
def needed() -> Iterator[None]:
  """Turns what JAX raises where it has no devices into a ValueError that says so.

  It is asked again after a failure, because asking before would start it too early.
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
        'Install what it needs for the device, e.g. jax[cuda13], or unset JAX_PLATFORMS.'
      ) from error
    raise


@contextlib.contextmanager
def portable() -> Iterator[None]:
  """What is traced within is the same program wherever that happens, and runs everywhere."""
  token = _portable.set(True)
  try:
    yield
  finally:
    _portable.reset(token)
