"""A server for tests that imitates Google Cloud Storage; it can also fail on request.

    with FakeGcs() as server:
      subprocess.run([...], env=os.environ | server.env)
      server.unavailable(seconds=5)

The server listens on loopback and keeps all objects in memory. It answers the requests of gcsfs,
tensorstore, array_record and orbax: objects with generations and preconditions, listings, ranges,
three kinds of uploads, copies and batches of deletions. It answers one request at a time.
"""

import http.server
import itertools
import threading
import time

from tests.gcs_requests import Handler, Stored


class Server(http.server.ThreadingHTTPServer):
  """An HTTP server that prints no error if a killed process leaves a broken connection."""

  daemon_threads, request_queue_size = True, 256

  def handle_error(self, *_):
    pass


class FakeGcs:
  """Context manager of a server with the buckets `bucket` and `forbidden`; no others exist.

  Attributes:
    objects: {(bucket, name): Stored}.
    delay: seconds before each answer.
    read: for each address of the server, {name: number of bytes that were read}. A test with
      several processes gives each process its own address, to see what this process reads.
    written: names of the objects that were written, in order.
  """

  def __init__(self, addresses: int = 1):
    self.objects, self.delay, self.until = {}, 0.0, 0.0
    self.busy, self.generations = threading.RLock(), itertools.count(1)
    self.sessions, self.written = {}, []
    self.read = [{} for _ in range(addresses)]
    self._servers = [self._listen(i) for i in range(addresses)]

  def _listen(self, number: int) -> http.server.ThreadingHTTPServer:
    handler = type('Bound', (Handler,), {'store': self, 'number': number})
    return Server(('127.0.0.1', 0), handler)

  def __enter__(self):
    for server in self._servers:
      threading.Thread(target=server.serve_forever, daemon=True).start()
    return self

  def __exit__(self, *_):
    for server in self._servers:
      server.shutdown()
      server.server_close()

  def env_of(self, number: int) -> dict[str, str]:
    """Returns the environment variables of a client that uses the address `number`."""
    return client_env(self._servers[number].server_address[1])

  @property
  def env(self) -> dict[str, str]:
    return self.env_of(0)

  def unavailable(self, seconds: float) -> None:
    """Answers every request with 503 for some seconds."""
    self.until = time.monotonic() + seconds

  def put(self, bucket: str, name: str, data: bytes) -> Stored:
    """Writes an object."""
    now = time.strftime('%Y-%m-%dT%H:%M:%S.000Z', time.gmtime())
    with self.busy:
      self.objects[bucket, name] = Stored(bucket, name, bytes(data), next(self.generations), now)
      self.written.append(name)
      return self.objects[bucket, name]

  def names(self, prefix: str = '') -> list[str]:
    """Returns the names of the objects that begin with a text, sorted."""
    with self.busy:
      return sorted(name for _, name in self.objects if name.startswith(prefix))


def client_env(port: int) -> dict[str, str]:
  """Returns the variables that make all clients use a server, and no credentials."""
  url, nowhere = f'http://127.0.0.1:{port}', '127.0.0.1:1'
  return {
    'STORAGE_EMULATOR_HOST': url, 'TENSORSTORE_GCS_HTTP_URL': url,
    'CLOUD_STORAGE_EMULATOR_ENDPOINT': url, 'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none',
    'GCE_METADATA_HOST': nowhere, 'GCE_METADATA_ROOT': nowhere, 'NO_GCE_CHECK': 'true',
    'GOOGLE_CLOUD_PROJECT': 'test',
  }  # fmt: skip
