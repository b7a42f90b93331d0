"""A file system of gcsfs that waits for a silent bucket, and takes all names literally.

gcsfs repeats a failed request for about half a minute, but a bucket can answer with 503 for longer.
All requests of this process use this file system, those of etils and orbax too. Only tensorstore
has a client of its own.

A request is repeated for `PATIENCE` seconds, but not if the bucket has been silent to all requests
for so long. So a program whose bucket is gone ends soon, although it still tries to write its log
and to remove its lock.
"""

import asyncio
from collections.abc import Awaitable, Callable
import logging
import time

import gcsfs

from vit_jax.bucket.errors import NoAnswer, is_passing, why_refused

PATIENCE = 180.0  # seconds

log = logging.getLogger(__name__)


class PatientFileSystem(gcsfs.GCSFileSystem):
  """Repeats requests after errors that may pass."""

  _silent_since = None  # time of the first failure after the last answer

  async def _expand_path(self, path, recursive=False, maxdepth=None, assume_literal=True):
    """Takes names literally: `photo[1].jpg` is the name of an object, not a pattern."""
    del assume_literal
    return await super()._expand_path(path, recursive, maxdepth, assume_literal=True)

  async def _request(self, *args, **kwargs):
    return await self._repeated(super()._request, *args, **kwargs)

  async def _get_file_request(self, *args, **kwargs):
    return await self._repeated(super()._get_file_request, *args, **kwargs)

  async def _repeated(self, request: Callable[..., Awaitable], *args, **kwargs):
    """Returns the result of a request.

    Raises:
      NoAnswer: the bucket has not answered for `PATIENCE` seconds.
      Exception: the request cannot succeed; any error of gcsfs.
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
