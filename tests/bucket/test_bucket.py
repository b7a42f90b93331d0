"""Paths, locks and records in a bucket: one process, and a server on loopback."""

import asyncio
import io
import json
import os
import pathlib
import pickle
import subprocess
import sys
import threading
import time

from PIL import Image
import pytest

from tests.conftest import ROOT, call, error
from tests.fake_gcs import FakeGcs
from vit_jax import bucket, storage
from vit_jax.bucket import client, errors, lease, listing, objects, records
from vit_jax.data import sources
from vit_jax.data.image import BadImage
from vit_jax.data.source import as_bytes, fetched
from vit_jax.weights import reader
from vit_jax.workdir import digests, held, stored


@pytest.fixture
def server(monkeypatch):
  """A server that this process uses; its buckets are `bucket` and `forbidden`."""
  with FakeGcs() as found:
    for name, value in found.env.items():
      monkeypatch.setenv(name, value)
    forget()
    yield found
  forget()


def forget():
  """Makes the next access connect again."""
  import gcsfs

  gcsfs.GCSFileSystem.clear_instance_cache()
  for cached in (client.filesystem, client.check_access):
    cached.cache_clear()
  from etils.epath import backend

  backend._FileSystemSpecBackend._get_filesystem.cache_clear()


@pytest.mark.parametrize('name, message', [
  ('gs://absent/run', 'gs://absent: there is no such bucket'),
  ('gs://forbidden/run', 'gs://forbidden: access is forbidden. Give this account'),
  ('gs://', 'the name of the bucket is missing'),
  ('s3://bucket/run', 'URLs of this kind are not supported'),
])  # fmt: skip
def test_a_bucket_that_cannot_be_used_is_an_error_that_says_why(server, capsys, name, message):
  assert message in error(capsys, '--mode=eval', f'--workdir={name}')


def test_a_server_that_does_not_answer_is_an_error_within_seconds(server, capsys, monkeypatch):
  monkeypatch.setattr(client, 'FIRST', 0.5)
  server.delay = 2.0
  code, _, said = call(capsys, '--mode=eval', '--workdir=gs://bucket/run')
  assert code == 75 and 'no answer within' in said  # try again


def test_missing_credentials_are_an_error_with_the_command():
  assert 'gcloud auth' in bucket.why_refused(client_error(401, 'Invalid Credentials'))


def client_error(code, message):
  from gcsfs.retry import HttpError

  return HttpError({'code': code, 'message': message})


def test_files_are_written_whole_and_read_back(server, tmp_path):
  path = bucket.to_path('gs://bucket/run/')
  assert str(path) == 'gs://bucket/run'
  storage.replace(path / 'a.json', '{"a": "ä"}')
  assert (path / 'a.json').read_text(encoding='utf-8') == '{"a": "ä"}'
  (tmp_path / 'b').write_bytes(b'b')
  storage.upload([tmp_path / 'b'], path / 'deep')
  assert bucket.list_below(path) == {'a.json': 11, 'deep/b': 1}
  assert bucket.contents([path / 'deep/b', path / 'a.json'])[0] == b'b'
  bucket.move(path / 'deep', path / 'aside')
  assert bucket.list_below(path) == {'a.json': 11, 'aside/b': 1}
  with bucket.downloaded(path) as copy:
    assert (copy / 'aside' / 'b').read_bytes() == b'b'
  bucket.delete_all(path)
  bucket.delete_all(path)
  assert server.names() == []


def test_checksums_cover_all_files_although_requests_fail(server, monkeypatch):
  checkpoint = bucket.to_path('gs://bucket/run/checkpoints/5')
  for name in ('params/d/0', 'params/manifest.ocdbt', 'config/metadata', '_CHECKPOINT_METADATA'):
    (checkpoint / name).write_bytes(name.encode())
  monkeypatch.setattr(type(checkpoint), 'is_dir', lambda _: False)  # as after a failed request
  digests.write_digests(checkpoint)
  assert [*digests.read_digests(checkpoint)] == [
    'config/metadata', 'params/d/0', 'params/manifest.ocdbt'
  ]  # fmt: skip
  assert digests.compare_files(checkpoint)


def test_a_refused_write_is_reported_as_unwritten(server):
  path = bucket.to_path('gs://bucket/run')
  with pytest.raises(storage.Unwritten, match='Cannot write gs://forbidden/x.*forbidden'):
    storage.replace(type(path)('gs://forbidden/x'), 'x')
  with pytest.raises(ValueError, match='Cannot write to gs://forbidden/out: access is forbidden'):
    storage.check_folder(type(path)('gs://forbidden/out'))


def test_records_are_uploaded_whole_and_downloaded_again(server):
  path = bucket.to_path('gs://bucket/run')
  for text in ('one\n', 'two\n'):
    with records.Mirror(path, ('log.txt', 'absent.txt')) as mirror:
      with (mirror.folder / 'log.txt').open('a', encoding='utf-8') as file:
        file.write(text)
      mirror.upload()
      server.written.clear()
      mirror.upload()
      assert not server.written  # nothing has changed
      (mirror.folder / 'best.txt').write_text(text[::-1])  # another text of equal length
      mirror.upload()
      assert (path / 'best.txt').read_text() == text[::-1]
      (mirror.folder / 'best.txt').write_text(text)
      os.utime(mirror.folder / 'best.txt', (1, 1))  # a clock may be too coarse
      mirror.upload()
      assert (path / 'best.txt').read_text() == text
  assert (path / 'log.txt').read_text(encoding='utf-8') == 'one\ntwo\n'
  assert server.names() == ['run/best.txt', 'run/log.txt']


def test_a_workdir_has_one_owner_and_its_lock_is_removed(server):
  path = bucket.to_path('gs://bucket/run')
  with held(path):
    assert server.names() == ['run/lock.json']
    with pytest.raises(ValueError, match='another run is writing here'), held(path):
      pass
  assert server.names() == []
  with held(path):
    pass


def other(server, host='elsewhere', **changes):
  """Writes the lock of another process."""
  about = {'host': host, 'pid': 1, 'started': 'x', 'nonce': 'n'} | changes
  return server.put('bucket', 'run/lock.json', json.dumps(about).encode())


@pytest.fixture
def short(monkeypatch):
  """Makes locks expire within a second."""
  for name, value in (('HEARTBEAT', 0.1), ('EXPIRES', 0.5), ('POLL', 0.02)):
    monkeypatch.setattr(lease, name, value)


def test_a_lost_lock_forbids_writing_only_to_its_own_folder():
  def lost():
    raise bucket.Lost('the lock is lost')

  run = pathlib.PurePosixPath('gs:/bucket/run')
  with storage.guarded(run, lost):
    for path in (run, run / 'checkpoints' / '5'):
      with pytest.raises(bucket.Lost):
        storage.check_allowed(path)
    storage.check_allowed(run.with_name('run2'))
  storage.check_allowed(run)  # the run has ended


def test_the_lock_of_a_dead_process_of_this_host_is_taken_over_at_once(server):
  other(server, lease.this_host(), started='another time')
  began = time.monotonic()
  with bucket.Lease(bucket.to_path('gs://bucket/run')):
    assert time.monotonic() < began + 5


def test_an_expired_lock_is_taken_over_by_one_of_several_processes(server, short):
  other(server)
  path, outcomes = bucket.to_path('gs://bucket/run'), []

  def take():
    try:
      with bucket.Lease(path):
        outcomes.append('held')
        time.sleep(1)
    except ValueError:
      outcomes.append('refused')

  threads = [threading.Thread(target=take) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(outcomes) == ['held', 'refused', 'refused', 'refused']


def test_a_lock_that_is_renewed_is_not_taken_over(server, short):
  end = threading.Event()

  def renew():
    while not end.wait(0.05):
      other(server)

  other(server)
  threading.Thread(target=renew, daemon=True).start()
  lock = bucket.Lease(bucket.to_path('gs://bucket/run'))
  with pytest.raises(ValueError, match=r'process 1 on elsewhere'), lock:
    pass
  end.set()


def test_a_process_that_lost_its_lock_stops_before_its_next_write(server, short):
  path = bucket.to_path('gs://bucket/run')
  with held(path):
    storage.replace(path / 'result.json', '{}')
    theirs = other(server)
    time.sleep(0.3)
    with pytest.raises(bucket.Lost, match='another run has taken over the lock'):
      storage.replace(path / 'result.json', '{"late": 1}')
  assert server.objects['bucket', 'run/result.json'].data == b'{}'
  assert server.objects['bucket', 'run/lock.json'].generation == theirs.generation  # not removed


def test_a_suspended_process_checks_its_lock_before_it_writes(server, short, monkeypatch):
  path = bucket.to_path('gs://bucket/run')
  monkeypatch.setattr(bucket.Lease, '_beat', lambda self: None)
  with held(path):
    other(server)
    time.sleep(0.3)
    with pytest.raises(bucket.Lost):
      storage.replace(path / 'result.json', '{}')


@pytest.mark.slow
def test_unavailability_of_some_seconds_is_waited_for(server):
  path = bucket.to_path('gs://bucket/run')
  server.unavailable(4)
  storage.replace(path / 'a', 'a')
  assert (path / 'a').read_bytes() == b'a'


def test_a_bucket_that_does_not_answer_for_long_is_an_error(server, capsys, monkeypatch):
  from vit_jax.bucket import patient

  bucket.to_path('gs://bucket/run')  # the first access is over
  monkeypatch.setattr(patient, 'PATIENCE', 0.0)
  monkeypatch.setattr('asyncio.sleep', lambda *_: no_pause())
  server.unavailable(60)
  code, _, said = call(capsys, '--mode=eval', '--workdir=gs://bucket/run')
  assert code == 75  # try again
  assert 'A request to a bucket failed: no answer for 0 seconds: HttpError: refused' in said


async def no_pause():
  pass


def test_an_answer_ends_the_silence_of_a_bucket(monkeypatch):
  from vit_jax.bucket import patient

  now, answers = [0.0], []
  monkeypatch.setattr(patient.time, 'monotonic', lambda: now[0])
  monkeypatch.setattr(patient.asyncio, 'sleep', lambda *_: no_pause())
  monkeypatch.setattr(patient, 'is_passing', lambda error: isinstance(error, TimeoutError))
  files = patient.PatientFileSystem.__new__(patient.PatientFileSystem)

  async def request():
    answer = answers.pop(0)
    if answer is None:
      raise TimeoutError('no answer')
    return answer

  for hour in range(3):  # each hour, one request fails once
    now[0], answers[:] = 3600.0 * hour, [None, hour]
    assert asyncio.run(files._repeated(request)) == hour


def test_a_request_after_a_long_silence_is_sent_only_once(monkeypatch):
  from vit_jax.bucket import patient

  now, sent = [1000.0], []
  monkeypatch.setattr(patient.time, 'monotonic', lambda: now[0])

  async def sleep(seconds):
    now[0] += seconds

  monkeypatch.setattr(patient.asyncio, 'sleep', sleep)
  files = patient.PatientFileSystem.__new__(patient.PatientFileSystem)

  async def request():
    sent.append(now[0] - 1000)
    raise TimeoutError('no answer')

  with pytest.raises(bucket.NoAnswer):
    asyncio.run(files._repeated(request))
  assert sent[:7] == [0, 1, 3, 7, 15, 30, 45] and 165 < sent[-1] <= 180
  sent.clear()
  with pytest.raises(bucket.NoAnswer):
    asyncio.run(files._repeated(request))
  assert len(sent) == 1


@pytest.mark.parametrize('code', [400, 401, 403, 404, 412, 408, 429, 500, 503])
def test_only_errors_that_can_pass_are_tried_again(code):
  assert errors.is_passing(client_error(code, 'refused')) == (code in (408, 429, 500, 503))


def test_the_start_of_a_process_is_counted_from_the_boot():
  """A process that ended has no start, even before its parent has asked for its exit code."""
  child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)
  ticks = int(lease.started(child.pid))
  now = time.clock_gettime(time.CLOCK_BOOTTIME)
  assert ticks / os.sysconf('SC_CLK_TCK') == pytest.approx(now, abs=1)
  child.stdin.close()
  os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
  assert lease.started(child.pid) == ''  # a zombie
  child.wait()
  assert lease.started(child.pid) == ''


def test_the_lock_counts_from_the_request_that_renewed_it(monkeypatch):
  now, requests = [0.0], []
  monkeypatch.setattr(lease, 'uptime', lambda: now[0])

  def put(path, content, generation):
    requests.append(now[0])
    now[0] += seconds  # the process is suspended before it gets the answer
    return generation + 1

  monkeypatch.setattr(client, 'put_if', put)
  lock = lease.Lease(pathlib.Path('run'))
  seconds = 3 * lease.HEARTBEAT
  assert lock._write(0)
  seconds = 0
  lock.check()
  assert requests == [0.0, 3 * lease.HEARTBEAT]  # it is renewed before the next write


def test_a_listed_folder_has_no_files_of_a_folder_with_a_longer_name():
  tree = listing.Tree({'cat/a.png': 1, 'cat/deep/b.png': 1, 'cats/c.png': 1, 'd.png': 1})
  walk = lambda inside: {
    path: names for path, _, names in listing.Listed('gs://b', inside, tree).walk()
  }
  assert walk('cat') == {'gs://b/cat': ['a.png'], 'gs://b/cat/deep': ['b.png']}
  assert set(walk('')) == {'gs://b', 'gs://b/cat', 'gs://b/cat/deep', 'gs://b/cats'}


def test_a_walk_through_a_folder_does_not_look_at_all_folders_of_the_bucket():
  class Folders(dict):
    def items(self):
      raise AssertionError('for each class, this would take too long')

  tree = listing.Tree({f'{i}/a.png': 1 for i in range(9)})
  tree.inside = Folders(tree.inside)
  for folder in '', '3':
    walk = {path: names for path, _, names in listing.Listed('gs://b', folder, tree).walk()}
    assert walk['gs://b/3'] == ['a.png'] and len(walk) == (1 if folder else 10)


def test_a_failed_request_ends_the_program_without_a_traceback(server, capsys, monkeypatch):
  def fail(*_):
    raise client_error(503, 'busy')

  monkeypatch.setattr(stored, 'saved_steps', fail)
  said = error(capsys, '--mode=eval', '--workdir=gs://bucket/run')
  assert 'A request to a bucket failed: HttpError: busy, 503.' in said


def put_images(server):
  """Writes images of two classes into `data/` of the bucket, and returns the content of one."""
  for i in range(40):
    file = io.BytesIO()
    Image.new('RGB', (4, 4), (i, i, i)).save(file, format='PNG')
    folder = f'{"train" if i % 4 else "test"}/{"ab"[i % 2]}'
    server.put('bucket', f'data/pets/{folder}/deep/{i}.png', file.getvalue())
  server.put('bucket', 'data/pets/train/a/notes.txt', b'x')
  return file.getvalue()


def examples_of(source, split):
  found = source.read(split, range(source.sizes[split]))
  return {(name.partition('pets/')[2], as_bytes(encoded), label)
          for name, encoded, label in fetched(found)}  # fmt: skip


@pytest.mark.parametrize('spec', ['folder:pets', 'images:pets', 'labels:pets/all.csv'])
def test_images_in_a_bucket_are_those_on_disk(server, tmp_path, spec):
  put_images(server)
  names = server.names('data/pets/t')
  rows = [f'{n.removeprefix("data/")},{n.split("/")[3]},{n.split("/")[2]}' for n in names]
  table = '\n'.join(['path,label,split', *(row for row in rows if '.png' in row)])
  server.put('bucket', 'data/pets/all.csv', table.encode())
  bucket.client.filesystem().get('bucket/data/', f'{tmp_path}/', recursive=True)
  remote, local = (
    sources.open_source(spec, d, (4, 4)) for d in ('gs://bucket/data', str(tmp_path))
  )
  assert remote.fingerprint == local.fingerprint and remote.class_names == local.class_names
  for split in local.sizes:
    assert examples_of(remote, split) == examples_of(local, split) != set()
  if spec == 'folder:pets':
    assert (
      [w.partition('pets')[2] for w in remote.warnings]
      == [w.partition('pets')[2] for w in local.warnings]
      != []
    )


def test_an_empty_object_that_stands_for_a_folder_is_not_a_file(server):
  for name in ('tree/', 'tree/cats/', 'tree/cats/1.png', 'tree2/1.png'):
    server.put('bucket', name, b'x' * name.endswith('.png'))
  assert bucket.list_below(bucket.to_path('gs://bucket/tree')) == {'cats/1.png': 1}
  found = bucket.listed_folder('gs://bucket/tree')
  assert [path.name for path in found.iterdir()] == ['cats'] and (found / 'cats').is_dir()


def test_names_are_never_patterns(server, tmp_path):
  contents = {}
  for name in ('a[1].jpg', 'a1.jpg', 'b?.jpg', 'bc.jpg', 'x*/y.jpg', 'xz/y.jpg'):
    contents[name] = name.encode()
    server.put('bucket', f'data/{name}', contents[name])
  top = bucket.to_path('gs://bucket/data')
  assert objects.contents([top / name for name in contents]) == list(contents.values())
  for name in ('a[1].jpg', 'b?.jpg', 'x*'):
    objects.delete_all(top / name)
  assert server.names('data/') == ['data/a1.jpg', 'data/bc.jpg', 'data/xz/y.jpg']


def test_a_file_of_weights_is_read_with_its_config(server):
  for file in (ROOT / 'tests/fixtures/hf_classifier').iterdir():
    server.put('bucket', f'vit/{file.name}', file.read_bytes())
  found = reader.read_weights('gs://bucket/vit/model.safetensors')
  wanted = reader.read_weights(ROOT / 'tests/fixtures/hf_classifier')
  assert found.fields == wanted.fields and found.preprocessing == wanted.preprocessing


def test_the_lock_uses_a_clock_that_runs_while_the_machine_is_suspended():
  assert lease.uptime() == pytest.approx(time.clock_gettime(time.CLOCK_BOOTTIME), abs=1)


def test_a_list_is_kept_and_read_again(server, tmp_path):
  put_images(server)
  with bucket.keeping_lists(tmp_path):
    first = sources.open_source('folder:pets', 'gs://bucket/data', (4, 4))
    for name, content in bucket.kept_lists().items():
      (tmp_path / name).write_bytes(content)
  server.put('bucket', 'data/pets/train/a/more.png', b'')
  with bucket.keeping_lists(tmp_path):
    again = sources.open_source('folder:pets', 'gs://bucket/data', (4, 4))
  with bucket.keeping_lists(tmp_path / 'none'):
    other = sources.open_source('folder:pets', 'gs://bucket/data', (4, 4))
  assert first.fingerprint == again.fingerprint != other.fingerprint


def test_an_image_that_was_removed_from_the_bucket_is_reported(server):
  put_images(server)
  source = sources.open_source('folder:pets', 'gs://bucket/data', (4, 4))
  for name in server.names('data/pets/train/a/deep'):
    del server.objects['bucket', name]
  with pytest.raises(BadImage, match='png: there is no such object'):
    examples_of(source, 'train')


def test_a_path_in_a_bucket_can_be_sent_to_another_process(server):
  content = put_images(server)
  path = bucket.listed_folder(bucket.to_path('gs://bucket/data/pets')) / 'train/b/deep/39.png'
  copy = pickle.loads(pickle.dumps(path))
  assert str(copy) == str(path) and copy.read_bytes() == content
