"""Synchronizes the processes that save one checkpoint, and stops all of them if one fails.

Decisions:
  * Orbax's own barriers do not notice that a process has failed, so the other processes would wait
    until their time limit of 5 or 20 minutes. A process that waits at the barrier of this module
    checks twice a second whether another process has failed. Before orbax writes, it uses its own
    barriers. If a thread waits there, `result` lets the main thread go on.
  * Orbax waits in a background thread while training uses the devices. A barrier that is made of
    collective operations would need the devices at the same time. So this barrier uses JAX's
    coordination service.
"""

import collections
from collections.abc import Callable
import concurrent.futures
import functools
import itertools
import json
import time

import jax
from orbax.checkpoint import multihost

from vit_jax.distributed.cluster import code_after
from vit_jax.storage import told

POLL = 500  # milliseconds between two checks for failures

# Each `Agreement` takes the next number as a part of its name. The numbers of all processes match,
# because all processes create their agreements in the same order.
NUMBERS = itertools.count()


class Agreement:
  """Barriers and error messages between processes that save a checkpoint together.

  With a single process, nothing is exchanged.
  """

  def __init__(self):
    self._calls = collections.Counter()
    self.name = f'vit_jax/saving/{next(NUMBERS)}'
    self._client = multihost.get_jax_distributed_client() if jax.process_count() > 1 else None

  def barrier(self, *, key: str, timeout_ms: int) -> None:
    """Waits until all processes have called this method with the same key.

    Raises:
      ValueError: another process has failed.
      TimeoutError: another process has not called this method within `timeout_ms` milliseconds.
    """
    if self._client is None:
      return
    self._calls[key] += 1  # orbax uses some keys more than once
    place = f'{self.name}/{key}/{self._calls[key]}'
    until = time.monotonic() + timeout_ms / 1000
    self._client.key_value_set(f'{place}/{jax.process_index()}', '')
    if jax.process_index():
      self._wait_for(f'{place}/all', until)
      return
    for i in range(jax.process_count()):
      self._wait_for(f'{place}/{i}', until)
    self._client.key_value_set(f'{place}/all', '')

  def _wait_for(self, key, until):
    while True:
      try:
        self._client.blocking_key_value_get(key, POLL)
        return
      except jax.errors.JaxRuntimeError as error:
        if 'DEADLINE_EXCEEDED' not in str(error):
          raise
      self._raise_failure()
      if time.monotonic() > until:
        raise TimeoutError('another process did not finish writing the checkpoint in time')

  def result(self, future: concurrent.futures.Future) -> object:
    """Waits for a future of this process, and returns its result or raises its error.

    Raises:
      ValueError: another process has failed. The thread of the future may then still wait for it.
    """
    own = self._failure_of(jax.process_index())
    while not concurrent.futures.wait([future], POLL / 1000).done:
      if self._client is not None:
        self._raise_failure(ignored=own)  # the future is about to raise the own error
    return future.result()

  def _failure_of(self, process):
    return f'{self.name}/failed/{process}'

  def _raise_failure(self, ignored=None):
    for place, failed in self._client.key_value_dir_get(f'{self.name}/failed'):
      if place != ignored:
        raise told(*json.loads(failed))

  def reporting(self, function: Callable) -> Callable:
    """Wraps `function` so that its errors are also sent to the other processes."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
      try:
        return function(*args, **kwargs)
      except Exception as error:
        if self._client is not None:
          text = f'process {jax.process_index()}: {type(error).__name__}: {error}'[:1000]
          failed = json.dumps([text, code_after(error)])
          place = self._failure_of(jax.process_index())
          self._client.key_value_set(place, failed, allow_overwrite=True)
        raise

    return wrapped

  def watch(self, handler):
    """Changes an orbax handler so that it also sends its errors to the other processes.

    Returns the handler.
    """
    save = handler.async_save

    async def watched(*args, **kwargs):
      return [Reported(future, self) for future in await save(*args, **kwargs) or []]

    handler.async_save = watched
    handler.finalize = self.reporting(handler.finalize)
    return handler


class Reported:
  """Wraps a future of orbax so that its error is also sent to the other processes."""

  def __init__(self, future, agreement: Agreement):
    self.result, self.cancel = agreement.reporting(future.result), future.cancel
