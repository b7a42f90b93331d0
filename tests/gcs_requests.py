"""Answers the requests of the JSON API of Google Cloud Storage, for `fake_gcs.py`."""

import base64
import dataclasses
import email
import http.server
import json
import re
import struct
import time
import urllib.parse

OBJECT = re.compile(
  r'/(?:download/)?storage/v1/b/(?P<bucket>[^/]+)'
  r'(?:/o(?:/(?P<name>[^/]+)(?:/(?P<verb>rewriteTo|copyTo|moveTo)'
  r'(?:/b/(?P<to_bucket>[^/]+))?/o/(?P<to_name>[^/]+))?)?)?'
)
UPLOAD = re.compile(r'/(?:resumable/)?upload/storage/v1/b/([^/]+)/o')


@dataclasses.dataclass
class Stored:
  """One object; `changed` is the time of its last write."""

  bucket: str
  name: str
  data: bytes
  generation: int
  changed: str

  @property
  def crc32c(self) -> str:
    import google_crc32c  # here, because `make test` works without requirements-gcs.txt

    return base64.b64encode(struct.pack('>I', google_crc32c.value(self.data))).decode()

  def about(self) -> dict:
    """Returns the JSON that describes the object."""
    return {
      'kind': 'storage#object', 'id': f'{self.bucket}/{self.name}/{self.generation}',
      'name': self.name, 'bucket': self.bucket, 'generation': str(self.generation),
      'metageneration': '1', 'contentType': 'application/octet-stream',
      'timeCreated': self.changed, 'updated': self.changed, 'storageClass': 'STANDARD',
      'size': str(len(self.data)), 'crc32c': self.crc32c, 'etag': str(self.generation),
    }  # fmt: skip


class Refused(Exception):
  """Raised to answer a request with an HTTP error."""

  def __init__(self, code: int):
    self.code = code


class Handler(http.server.BaseHTTPRequestHandler):
  """Answers the requests of one connection."""

  protocol_version, wbufsize, disable_nagle_algorithm = 'HTTP/1.1', -1, True
  store: object  # the `fake_gcs.FakeGcs`
  number: int

  def log_message(self, *_):
    pass

  def answer_any(self):
    """Reads a request, and answers it or refuses it."""
    url, data = urllib.parse.urlsplit(self.path), self.body()
    self.query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
    time.sleep(self.store.delay)
    try:
      with self.store.busy:
        if time.monotonic() < self.store.until:
          raise Refused(503)
        self.route(url.path, data)
    except Refused as error:
      content = {'error': {'code': error.code, 'message': f'refused: {self.path}'}}
      self.send(error.code, b'' if error.code == 304 else content)

  do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = answer_any

  def body(self) -> bytes:
    if self.headers.get('Transfer-Encoding') != 'chunked':
      return self.rfile.read(int(self.headers.get('Content-Length') or 0))
    content = b''
    while size := int(self.rfile.readline().split(b';')[0], 16):
      content += self.rfile.read(size)
      self.rfile.readline()
    self.rfile.readline()
    return content

  def send(self, code: int, body: bytes | dict = b'', **headers):
    if isinstance(body, dict):
      body = json.dumps(body).encode()
      headers['Content_Type'] = 'application/json'
    self.send_response(code)
    for name, value in headers.items():
      self.send_header(name.replace('_', '-'), str(value))
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def route(self, path: str, data: bytes):
    """Calls the method for a path."""
    if path.startswith('/batch/'):
      return self.delete_several(data)
    if found := UPLOAD.fullmatch(path):
      self.check_bucket(found[1])
      return self.upload(found[1], data)
    found = OBJECT.fullmatch(path)
    if not found:
      raise Refused(501)
    part = {k: v and urllib.parse.unquote(v) for k, v in found.groupdict().items()}
    self.check_bucket(part['bucket'])
    if part['verb']:
      return self.copy(part)
    if part['name']:
      return self.one_object(part['bucket'], part['name'])
    if path.endswith('/o'):
      return self.listing(part['bucket'])
    return self.send(200, {'kind': 'storage#bucket', 'name': part['bucket'], 'location': 'US'})

  def check_bucket(self, bucket: str):
    if bucket != 'bucket':
      raise Refused(403 if bucket == 'forbidden' else 404)

  def check_generation(self, bucket: str, name: str):
    """Refuses a request whose precondition does not hold."""
    found = self.store.objects.get((bucket, name))
    generation = found.generation if found else 0
    wanted, other = (self.query.get(f'ifGeneration{x}Match') for x in ('', 'Not'))
    if wanted is not None and int(wanted) != generation:
      raise Refused(412)
    if other is not None and int(other) == generation:
      raise Refused(304 if self.command == 'GET' else 412)

  def one_object(self, bucket: str, name: str):
    """Deletes, describes or reads an object."""
    self.check_generation(bucket, name)
    found = self.store.objects.get((bucket, name))
    if found is None:
      raise Refused(404)
    if self.command == 'DELETE':
      del self.store.objects[bucket, name]
      return self.send(204)
    if self.query.get('alt') != 'media':
      return self.send(200, found.about())
    return self.send_content(found)

  def send_content(self, found: Stored):
    """Sends an object, or the requested range of it."""
    data, size = found.data, len(found.data)
    headers = {
      'x_goog_generation': found.generation, 'x_goog_metageneration': 1, 'ETag': found.generation,
      'x_goog_hash': f'crc32c={found.crc32c}', 'x_goog_stored_content_length': size,
    }  # fmt: skip
    code = 200
    if part := re.fullmatch(r'bytes=(\d*)-(\d*)', self.headers.get('Range', '')):
      start, stop = int(part[1] or max(0, size - int(part[2] or 0))), size
      if part[1] and part[2]:
        stop = min(size, int(part[2]) + 1)
      if start >= size:
        return self.send(416, b'', Content_Range=f'bytes */{size}')
      code, data = 206, data[start:stop]
      headers['Content_Range'] = f'bytes {start}-{stop - 1}/{size}'
    read = self.store.read[self.number]
    read[found.name] = read.get(found.name, 0) + len(data)
    return self.send(code, data, **headers)

  def listing(self, bucket: str):
    """Lists objects in pages; with a delimiter, also lists folders."""
    query = self.query
    prefix, mark = query.get('prefix', ''), query.get('delimiter', '')
    first = max(query.get('startOffset', ''), query.get('pageToken', ''))
    last, most = query.get('endOffset'), int(query.get('maxResults', 1000))
    with_mark = query.get('includeTrailingDelimiter') == 'true'
    found = {'kind': 'storage#objects', 'items': [], 'prefixes': []}
    for owner, name in sorted(self.store.objects):
      if owner != bucket or not name.startswith(prefix) or name < first or (last and name >= last):
        continue
      cut = name.find(mark, len(prefix)) if mark else -1
      folder = name[: cut + len(mark)] if cut >= 0 else None
      known = folder in found['prefixes']
      if known and not (with_mark and folder == name):
        continue
      if len(found['items']) + len(found['prefixes']) >= most:
        found['nextPageToken'] = name
        break
      if folder and not known:
        found['prefixes'].append(folder)
      if not folder or (with_mark and folder == name):
        found['items'].append(self.store.objects[owner, name].about())
    self.send(200, {key: value for key, value in found.items() if value})

  def upload(self, bucket: str, data: bytes):
    """Writes an object that arrives in one request, in a multipart request, or in a session."""
    if 'upload_id' in self.query:
      return self.go_on(bucket, data)
    name, kind = self.query.get('name'), self.query.get('uploadType')
    if kind == 'resumable':
      number = str(next(self.store.generations))
      name = name or json.loads(data or b'{}').get('name')
      self.store.sessions[number] = {'query': self.query, 'name': name, 'data': b''}
      where = f'http://{self.headers["Host"]}/upload/storage/v1/b/{bucket}/o'
      return self.send(200, b'', Location=f'{where}?uploadType=resumable&upload_id={number}')
    if kind == 'multipart':
      name, data = parts_of(self.headers['Content-Type'], data, name)
    self.check_generation(bucket, name)
    return self.send(200, self.store.put(bucket, name, data).about())

  def go_on(self, bucket: str, data: bytes):
    """Adds a piece to an upload session; writes the object after the last piece."""
    session = self.store.sessions[self.query['upload_id']]
    session['data'] += data
    here = self.headers.get('Content-Range', '')
    end = here.rpartition('/')[2]
    if here and (end == '*' or len(session['data']) < int(end)):
      last = len(session['data']) - 1
      return self.send(308, b'', **({'Range': f'bytes=0-{last}'} if last >= 0 else {}))
    self.query = session['query']
    self.check_generation(bucket, session['name'])
    return self.send(200, self.store.put(bucket, session['name'], session['data']).about())

  def copy(self, part: dict[str, str | None]):
    """Copies an object, or moves it within its bucket."""
    source = self.store.objects.get((part['bucket'], part['name']))
    if source is None:
      raise Refused(404)
    bucket, name = part['to_bucket'] or part['bucket'], part['to_name']
    self.check_generation(bucket, name)
    about = self.store.put(bucket, name, source.data).about()
    if part['verb'] == 'moveTo':
      del self.store.objects[part['bucket'], part['name']]
    whole = {'kind': 'storage#rewriteResponse', 'done': True, 'resource': about}
    whole |= {'objectSize': about['size'], 'totalBytesRewritten': about['size']}
    self.send(200, whole if part['verb'] == 'rewriteTo' else about)

  def delete_several(self, data: bytes):
    """Deletes several objects: each part of the request deletes one of them."""
    head = f'Content-Type: {self.headers["Content-Type"]}\r\n\r\n'.encode()
    answers = []
    for i, part in enumerate(email.message_from_bytes(head + data).get_payload()):
      bucket, name = re.search(r'/b/([^/]+)/o/([^/?\s]+)', part.get_payload()).groups()
      gone = self.store.objects.pop((bucket, urllib.parse.unquote(name)), None)
      status = '204 No Content' if gone else '404 Not Found'
      number = (part['Content-ID'] or f'<{i + 1}>').strip('<>')
      answers.append(
        f'--end\r\nContent-Type: application/http\r\nContent-ID: <response-{number}>\r\n\r\n'
        f'HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n\r\n'
      )
    whole = ''.join(answers) + '--end--'
    self.send(200, whole.encode(), Content_Type='multipart/mixed; boundary=end')


def parts_of(content_type: str, data: bytes, name: str | None) -> tuple[str, bytes]:
  """Returns name and content of an object from a multipart request: JSON, then content."""
  mark = re.search(r'boundary="?([^";]+)', content_type.replace("'", '"'))[1].encode()
  parts = data.split(b'--' + mark)
  gap = lambda part: b'\r\n\r\n' if b'\r\n\r\n' in part else b'\n\n'
  about = json.loads(parts[1].split(gap(parts[1]), 1)[1])
  content = (b'--' + mark).join(parts[2:-1]).split(gap(parts[2]), 1)[1]
  return name or about['name'], content.removesuffix(b'\n').removesuffix(b'\r')
