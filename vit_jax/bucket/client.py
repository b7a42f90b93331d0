"""Connects to Google Cloud Storage with gcsfs.

Decisions:
  * The first access to a bucket has a short time limit of its own. So if the bucket's name is
    wrong, or credentials or the network are missing, the program soon ends with an error.
  * The cache of gcsfs for lists of objects is disabled. A cached list would lack the objects that
    tensorstore and other hosts write, because gcsfs notices only its own writes.
"""

import functools
import logging
import os
import threading

from vit_jax.bucket.errors import NoAnswer, NoBucket, why_refused

# Time limit of the first access to a bucket, in seconds. It is above 33, because gcsfs retries a
# request with expired credentials for 33 seconds.
FIRST = 45.0
TIMEOUT = 60.0  # time limit of one request, in seconds


@functools.cache
def prepare_clients() -> None:
  """Configures fsspec and gcsfs; must be called before etils or fsspec opens a path in a bucket.

  Raises:
    NoBucket: the packages of requirements-gcs.txt are not installed.
  """
  # With the default `true`, gcsfs would first request the type of each bucket.
  os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
  os.environ.setdefault('GRPC_VERBOSITY', 'NONE')
  try:
    import fsspec

    from vit_jax.bucket import patient
  except ImportError as error:
    raise NoBucket(
      'Paths in buckets (gs://) need more packages. Run: pip install -r requirements-gcs.txt.'
    ) from error
  options = {'use_listings_cache': False, 'requests_timeout': TIMEOUT}
  fsspec.config.conf['gcs'] = options | fsspec.config.conf.get('gcs', {})
  for protocol in ('gcs', 'gs'):
    fsspec.register_implementation(protocol, patient.PatientFileSystem, clobber=True)
  for name in ('gcsfs', 'google', 'asyncio'):  # these libraries log the errors that they raise
    logger = logging.getLogger(name)
    logger.addHandler(logging.NullHandler())
    logger.propagate = False


@functools.cache
def filesystem():
  """Returns the gcsfs file system of this process, with the options that etils also uses."""
  prepare_clients()
  import fsspec

  return fsspec.filesystem('gcs', finalize_on_close=True)


def bucket_and_key(path: str | os.PathLike) -> tuple[str, str]:
  """Splits a path: `gs://bucket/a/b` gives the bucket `bucket` and the object name `a/b`."""
  bucket, _, key = os.fspath(path).removeprefix('gs://').partition('/')
  return bucket, key


@functools.cache
def check_access(bucket: str) -> None:
  """Checks that a bucket can be used, by requesting a list of at most one of its objects.

  After one successful check, further calls for the same bucket do nothing.

  Raises:
    NoAnswer: the bucket did not answer within `FIRST` seconds.
    NoBucket: the request failed; the message gives the reason.
  """
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
    raise NoAnswer(
      f'gs://{bucket}: no answer within {FIRST:.0f} seconds. Check the network, and the state of '
      'Google Cloud Storage.'
    )
  if outcome[0] is not None:
    raise NoBucket(f'gs://{bucket}: {why_refused(outcome[0])}') from outcome[0]


def put_if(path: os.PathLike, data: bytes, generation: int) -> int:
  """Writes an object, but only if its current generation is `generation`.

  The generation is a version number of the object, which the bucket changes at each write. An
  object that does not exist yet has the generation 0.

  Returns:
    The new generation of the object.

  Raises:
    FileExistsError: the object has a different generation, so the data was not written.
  """
  bucket, key = bucket_and_key(path)
  fs = filesystem()
  where = f'{fs._location}/upload/storage/v1/b/{bucket}/o'
  headers = {'Content-Type': 'application/json'}
  words = dict(uploadType='media', name=key, ifGenerationMatch=generation)
  found = fs.call('POST', where, headers=headers, data=data, json_out=True, **words)
  return int(found['generation'])


def get_with_generation(path: os.PathLike) -> tuple[bytes, int]:
  """Returns the content and the generation (version number) of an object.

  Raises:
    FileNotFoundError: the object does not exist.
  """
  bucket, key = bucket_and_key(path)
  headers, content = filesystem().call('GET', 'b/{}/o/{}', bucket, key, alt='media')
  return content, int(headers['x-goog-generation'])


def delete_if(path: os.PathLike, generation: int) -> None:
  """Deletes an object, but only if its current generation (version number) is `generation`.

  Raises:
    FileExistsError: the object has a different generation, and was therefore not deleted.
  """
  bucket, key = bucket_and_key(path)
  filesystem().call('DELETE', 'b/{}/o/{}', bucket, key, ifGenerationMatch=generation)
