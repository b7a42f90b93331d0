"""Connects to Google Cloud Storage with gcsfs.

Decisions:
  * The first access has its own short time limit. So a program with a wrong bucket name, missing
    credentials or no network fails soon, instead of seeming to hang.
  * gcsfs caches no listings, because tensorstore and other hosts write objects that gcsfs does not
    know of.
"""

import functools
import logging
import os
import threading

from vit_jax.bucket.errors import NoAnswer, NoBucket, why_refused

FIRST = 45.0  # seconds that the first access may take; gcsfs retries expired credentials for 33 s
TIMEOUT = 60.0  # seconds that one request may take


@functools.cache
def prepare_clients() -> None:
  """Configures fsspec and gcsfs; must be called before etils or fsspec opens a path in a bucket.

  Raises:
    NoBucket: the packages of requirements-gcs.txt are not installed.
  """
  os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')  # would ask for each bucket
  os.environ.setdefault('GRPC_VERBOSITY', 'NONE')
  try:
    import fsspec

    from vit_jax.bucket import patient
  except ImportError as error:
    raise NoBucket(
      'Paths of buckets (gs://) need more packages. Run: pip install -r requirements-gcs.txt.'
    ) from error
  options = {'use_listings_cache': False, 'requests_timeout': TIMEOUT}
  fsspec.config.conf['gcs'] = options | fsspec.config.conf.get('gcs', {})
  for protocol in ('gcs', 'gs'):
    fsspec.register_implementation(protocol, patient.PatientFileSystem, clobber=True)
  for name in ('gcsfs', 'google', 'asyncio'):  # they print the errors that they also raise
    logger = logging.getLogger(name)
    logger.addHandler(logging.NullHandler())
    logger.propagate = False


@functools.cache
def filesystem():
  """Returns the gcsfs file system of this process, which etils uses, too."""
  prepare_clients()
  import fsspec

  return fsspec.filesystem('gcs', finalize_on_close=True)


def bucket_and_key(path: str | os.PathLike) -> tuple[str, str]:
  """Splits a path: `gs://bucket/a/b` gives the bucket `bucket` and the object name `a/b`."""
  bucket, _, key = os.fspath(path).removeprefix('gs://').partition('/')
  return bucket, key


@functools.cache
def check_access(bucket: str) -> None:
  """Checks that a bucket can be used, by listing one of its objects; once per process and bucket.

  Raises:
    NoAnswer: there was no answer within `FIRST` seconds.
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
  """Writes an object, only if its current generation is `generation`.

  A generation is the version number that the bucket gives an object with each write. Generation 0
  stands for an object that does not exist yet.

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
  """Returns the content and the generation of an object.

  Raises:
    FileNotFoundError: the object does not exist.
  """
  bucket, key = bucket_and_key(path)
  headers, content = filesystem().call('GET', 'b/{}/o/{}', bucket, key, alt='media')
  return content, int(headers['x-goog-generation'])


def delete_if(path: os.PathLike, generation: int) -> None:
  """Deletes an object, only if its current generation is `generation`.

  Raises:
    FileExistsError: the object has a different generation.
  """
  bucket, key = bucket_and_key(path)
  filesystem().call('DELETE', 'b/{}/o/{}', bucket, key, ifGenerationMatch=generation)
