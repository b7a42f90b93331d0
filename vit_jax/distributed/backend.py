"""Reports missing devices, and names the backend for which a model's kernels are chosen."""

from collections.abc import Iterator
import contextlib
import contextvars
import os

import jax

_portable = contextvars.ContextVar('portable', default=False)


def target_backend() -> str | None:
  """Returns `cpu`, `gpu` or `tpu`; None if the program must run on all of them."""
  return None if _portable.get() else jax.default_backend()


def is_ampere() -> bool:
  """Returns whether the first device is an NVIDIA GPU of the Ampere generation or later."""
  device = jax.devices()[0]
  return 'cuda' in device.client.platform_version and float(device.compute_capability) >= 8


@contextlib.contextmanager
def needed() -> Iterator[None]:
  """Turns the error that JAX raises when it finds no devices into a ValueError with a remedy.

  The devices are checked only after a failure, because an earlier check would start JAX too early.
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


@contextlib.contextmanager
def portable() -> Iterator[None]:
  """Makes programs that are traced in this block independent of the machine and its backend."""
  token = _portable.set(True)
  try:
    yield
  finally:
    _portable.reset(token)
