"""Connects to Google Cloud Storage with gcsfs, and explains its errors.

Decisions:
  * gcsfs repeats a failed request for about half a minute. `patient` repeats for up to `PATIENCE`
    seconds, because a bucket can answer with 503 for a minute.
  * The first access has its own short limit: a wrong name, missing credentials or no network must
    not look like a hanging program.
  * gcsfs caches no listings: tensorstore and other hosts write objects that it does not know of.
"""

from collections.abc import Callable
import functools
import logging
import os
import threading
import time

FIRST = 20.0  # seconds that the first access to a bucket may take
PATIENCE = 180.0  # seconds for which a failed request is repeated
TIMEOUT = 60.0  # seconds that one request may take

log = logging.getLogger(__name__)


class NoBucket(ValueError):
  """Raised if a bucket cannot be used; the message gives the reason and the remedy."""


@functools.cache
def prepare_clients() -> None:
  """Prepares etils, fsspec and gcsfs; must be called before they are used for a bucket.

  Raises:
    NoBucket: the packages of requirements-gcs.txt are not installed.
  """
  os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')  # would ask for each bucket
  os.environ.setdefault('GRPC_VERBOSITY', 'NONE')
  try:
    import fsspec
    import gcsfs  # noqa: F401
  except ImportError as error:
    raise NoBucket(
      'Paths of buckets (gs://) need more packages. Run: pip install -r requirements-gcs.txt.'
    ) from error
  options = {'use_listings_cache': False, 'requests_timeout': TIMEOUT}
  fsspec.config.conf['gcs'] = options | fsspec.config.conf.get('gcs', {})
  for name in ('gcsfs', 'google', 'asyncio'):  # they print the errors that they also raise
    logger = logging.getLogger(name)
    logger.addHandler(logging.NullHandler())
    logger.propagate = False


@functools.cache
def filesystem():
  """Returns the file system of gcsfs that etils also uses; one per process."""
  prepare_clients()
  import fsspec

  return fsspec.filesystem('gcs', finalize_on_close=True)


def bucket_and_key(path: str | os.PathLike) -> tuple[str, str]:
  """Returns the bucket and the name of the object of a path such as `gs://bucket/a/b`."""
  bucket, _, key = os.fspath(path).removeprefix('gs://').partition('/')
  return bucket, key


@functools.cache
def check_access(bucket: str) -> None:
  """Raises NoBucket if the objects of a bucket cannot be listed within `FIRST` seconds."""
  outcome = []

  def ask():
    try:
      filesystem().call('GET', 'b/{}/o', bucket, maxResults=1)
      outcome.append(None)
    except Exception as error:  # gcsfs, aiohttp and google.auth raise many kinds of errors
      outcome.append(error)

  asking = threading.Thread(target=ask, daemon=True)
  asking.start()
  asking.join(FIRST)
  if not outcome:
    raise NoBucket(
      f'gs://{bucket}: no answer within {FIRST:.0f} seconds. Check the network, and the state of '
      'Google Cloud Storage.'
    )
  if outcome[0] is not None:
    raise NoBucket(f'gs://{bucket}: {why_refused(outcome[0])}') from outcome[0]


def why_refused(error: Exception) -> str:
  """Returns why a request to a bucket failed, and the remedy if it is known."""
  code, text = getattr(error, 'code', None), ' '.join(str(error).split())[:200]
  if code == 401 or 'Anonymous caller' in text or 'DefaultCredentialsError' in repr(error):
    return (
      'no valid credentials. Run `gcloud auth application-default login`, or set '
      'GOOGLE_APPLICATION_CREDENTIALS to the file of a service account.'
    )
  if text.startswith('Forbidden') or code == 403:
    return (
      'access is forbidden. Give this account the role Storage Object User (objects are read, '
      'written, listed and deleted).'
    )
  if isinstance(error, FileNotFoundError) or code == 404:
    return 'there is no such bucket. Check its name.'
  return f'{type(error).__name__}: {text.rstrip(".")}.'


def is_passing(error: Exception) -> bool:
  """Returns whether the same request may succeed later."""
  if isinstance(error, FileNotFoundError | FileExistsError | ValueError | NoBucket):
    return False
  code = getattr(error, 'code', None)
  if isinstance(code, int) and code < 500:
    return code in (408, 429)
  return not str(error).startswith('Forbidden')


def patient(request: Callable, *args, **kwargs):
  """Returns the result of a request, which is repeated after errors that may pass.

  Raises:
    OSError: the request failed for `PATIENCE` seconds, or cannot succeed.
  """
  end, pause = time.monotonic() + PATIENCE, 1.0
  while True:
    try:
      return request(*args, **kwargs)
    except Exception as error:  # gcsfs, aiohttp and requests raise many kinds of errors
      if not is_passing(error):
        raise
      if time.monotonic() + pause > end:
        raise OSError(0, why_refused(error)) from error
      log.warning('The bucket does not answer (%s); trying again.', why_refused(error))
    time.sleep(pause)
    pause = min(2 * pause, 15.0)


def put_if(path: os.PathLike, data: bytes, generation: int) -> int:
  """Writes a whole object if its generation is still this one; 0: if it does not exist yet.

  Returns:
    The new generation.

  Raises:
    FileExistsError: the object has a different generation.
  """
  bucket, key = bucket_and_key(path)
  fs = filesystem()
  where = f'{fs._location}/upload/storage/v1/b/{bucket}/o'
  headers = {'Content-Type': 'application/json'}
  words = dict(uploadType='media', name=key, ifGenerationMatch=generation)
  found = fs.call('POST', where, headers=headers, data=data, json_out=True, **words)
  return int(found['generation'])


def get_with_generation(path: os.PathLike) -> tuple[bytes, int]:
  """Returns the content and the generation of an object; raises FileNotFoundError without one."""
  bucket, key = bucket_and_key(path)
  headers, content = filesystem().call('GET', 'b/{}/o/{}', bucket, key, alt='media')
  return content, int(headers['x-goog-generation'])


def delete_if(path: os.PathLike, generation: int) -> None:
  """Deletes an object if its generation is still this one; otherwise raises FileExistsError."""
  bucket, key = bucket_and_key(path)
  filesystem().call('DELETE', 'b/{}/o/{}', bucket, key, ifGenerationMatch=generation)
