"""A gcsfs file system that retries failed requests for minutes, and never treats names as patterns.

gcsfs itself retries a failed request for about half a minute, but a bucket can answer with the
error 503 for longer. All requests of this process use this file system, including the requests of
etils and orbax. Only tensorstore has its own client.

A request is retried for `PATIENCE` seconds. If all requests have failed for this time, each later
request is sent only once. So if a bucket is unreachable, the program ends soon, although it still
tries to write its log and to remove its lock.
"""

import asyncio
from collections.abc import Awaitable, Callable
import logging
import time

import gcsfs

from vit_jax.bucket.errors import NoAnswer, is_passing, why_refused

PATIENCE = 180.0  # seconds for which a failed request is retried

log = logging.getLogger(__name__)


class PatientFileSystem(gcsfs.GCSFileSystem):
  """A gcsfs file system that retries requests after temporary errors (`is_passing`)."""

  _silent_since = None  # time of the first failure since the last success

  async def _expand_path(self, path, recursive=False, maxdepth=None, assume_literal=True):
    """Expands a path, but treats `photo[1].jpg` as the name of an object, not as a pattern."""
    del assume_literal
    return await super()._expand_path(path, recursive, maxdepth, assume_literal=True)

  async def _request(self, *args, **kwargs):
    return await self._repeated(super()._request, *args, **kwargs)

  async def _get_file_request(self, *args, **kwargs):
    return await self._repeated(super()._get_file_request, *args, **kwargs)

  async def _repeated(self, request: Callable[..., Awaitable], *args, **kwargs):
    """Sends a request, repeats it after temporary errors, and returns its result.

    Raises:
      NoAnswer: requests have failed with temporary errors for `PATIENCE` seconds.
      Exception: the request failed with an error that is not temporary.
    """
    began, pause = time.monotonic(), 1.0
    while True:
      try:
        result = await request(*args, **kwargs)
        self._silent_since = None
        return result
      except Exception as error:  # gcsfs, aiohttp and google.auth raise many kinds of errors
        if not is_passing(error):
          self._silent_since = None
          raise
        self._silent_since = self._silent_since or time.monotonic()
        if time.monotonic() + pause > min(began, self._silent_since) + PATIENCE:
          why = f'no answer for {PATIENCE:.0f} seconds: {why_refused(error)}'
          raise NoAnswer(why) from error
        reason = why_refused(error).rstrip('.')
        log.warning('The bucket does not answer (%s); trying again.', reason)
      await asyncio.sleep(pause)
      pause = min(2 * pause, 15.0)
