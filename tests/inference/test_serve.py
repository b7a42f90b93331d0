"""Tests the page in a real browser, and its API under load and with forbidden uploads."""

import concurrent.futures
import dataclasses
import io
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request

import numpy as np
from PIL import Image
import pytest

from tests.conftest import ROOT
from vit_jax import cli, evaluation, opening
from vit_jax.inference import prediction
from vit_jax.opening import Request
from vit_jax.workdir import Calibration

pytest.importorskip('gradio', reason='pip install -r requirements-demo.txt')
gradio_client = pytest.importorskip('gradio_client')
browser = pytest.importorskip('playwright.sync_api', reason='pip install -r requirements-demo.txt')
gate = pytest.importorskip('vit_jax.inference.gate')
page_lib = pytest.importorskip('vit_jax.inference.page')
server = pytest.importorskip('vit_jax.inference.server')
about_lib = pytest.importorskip('vit_jax.inference.about')

CHROMIUM = next(
  filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), ''
)


@pytest.fixture(scope='module')
def log(tmp_path_factory):
  """The file with everything that the server writes to stderr."""
  return tmp_path_factory.mktemp('serve') / 'stderr'


@pytest.fixture(scope='module')
def page(trained, log):
  """Starts a server in a new process; yields its address."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  command = [sys.executable, 'main.py', '--mode=serve', f'--workdir={trained[0]}', f'--port={port}']
  temporary = log.parent / 'tmp'
  temporary.mkdir()
  env = os.environ | {'TMPDIR': str(temporary)}
  with log.open('w') as stderr:
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=stderr)
  while 'Serving on' not in log.read_text():
    assert process.poll() is None, log.read_text()
    time.sleep(0.1)
  yield f'http://127.0.0.1:{port}/'
  written = [path.name for path in temporary.iterdir()]
  assert len(written) == 1 and written[0].startswith('vit_jax_uploads_'), written
  process.terminate()
  assert process.wait(30) == 0
  assert not list(temporary.iterdir())


@pytest.fixture(autouse=True)
def no_traceback(request):
  """Asserts that a test makes the server log no traceback."""
  yield
  if 'page' in request.fixturenames:
    said = request.getfixturevalue('log').read_text()
    assert 'Traceback' not in said and 'Exception' not in said, said


@pytest.fixture
def client(page):
  # Its default of 5 s is short for 50 requests at once on a slow machine.
  return gradio_client.Client(page, verbose=False, httpx_kwargs={'timeout': 120})


def send(address, data=None):
  """Sends a request; returns the status and the text of the answer. With data, it is a POST."""
  head = {'Content-Type': 'application/json'}
  body = None if data is None else json.dumps(data).encode()
  asked = urllib.request.Request(address, body, head)
  try:
    with urllib.request.urlopen(asked, timeout=30) as answer:
      return answer.status, answer.read().decode()
  except urllib.error.HTTPError as error:
    return error.code, error.read().decode()


def ask(client, path, layer=page_lib.ROLLOUT, head=page_lib.MEAN):
  """Sends an image; returns `{class: probability}` and the picture's file."""
  label, picture = client.predict(gradio_client.handle_file(path), layer, head, api_name='/predict')
  return {found['label']: found['confidence'] for found in label['confidences']}, picture


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason='no Chromium on this machine')
def test_the_page_works_in_a_browser_and_fetches_nothing_else(page, trained, tmp_path):
  files = sorted((trained[0] / 'examples').iterdir())[:2]
  answers = prediction.predict(trained[0], [str(file) for file in files])
  best, second = [answer['predictions'][0] for answer in answers]
  (tmp_path / 'fake.png').write_bytes(b'no image')
  with browser.sync_playwright() as playwright:
    chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
    tab, elsewhere, refused = chromium.new_page(), [], []
    tab.on('request', lambda request: elsewhere.append(request.url))
    tab.on('response', lambda got: refused.append(got.url) if got.status >= 400 else None)
    for width in (1200, 390):  # a phone
      tab.set_viewport_size({'width': width, 'height': 800})
      tab.goto(page)
      last = tab.locator('#examples button').last
      browser.expect(last.locator('img')).to_be_visible()
      gallery, box = tab.locator('#examples').bounding_box(), last.bounding_box()
      assert box['x'] + box['width'] <= gallery['x'] + gallery['width']
      assert 0 <= gallery['y'] + gallery['height'] - box['y'] - box['height'] < 30  # not blank
      assert tab.evaluate('document.documentElement.scrollWidth') <= width
      # The page opens with the first example, and states the limits of the model.
      browser.expect(tab.locator('#attention img')).to_be_visible()
      browser.expect(tab.locator('#given img')).to_be_visible()
      browser.expect(tab.locator('#classes')).to_contain_text(f'{best["probability"]:.0%}')
      browser.expect(tab.locator('#limits')).to_contain_text('still gets one of these classes')
    before = tab.locator('#attention img').get_attribute('src')
    tab.locator('#layer input').click()
    tab.get_by_role('option', name='block 1').click()
    browser.expect(tab.locator('#attention img')).not_to_have_attribute('src', before)
    tab.goto(page)
    tab.set_viewport_size({'width': 1200, 'height': 800})
    upload = tab.locator('#file input[type=file]')
    picture, given = tab.locator('#attention img'), tab.locator('#given img')

    classes, before = tab.locator('#classes'), given.get_attribute('src')
    upload.set_input_files(files[1])
    browser.expect(given).not_to_have_attribute('src', before)  # changes last
    browser.expect(classes).to_contain_text(second['class'])
    assert f'{second["probability"]:.0%}' in classes.inner_text()
    assert len(re.findall('%', classes.inner_text())) == page_lib.TOPK
    browser.expect(picture).to_be_visible()
    browser.expect(given).to_be_visible()

    before = picture.get_attribute('src')
    tab.locator('#layer input').click()
    tab.get_by_role('option', name='block 2').click()
    browser.expect(picture).not_to_have_attribute('src', before)
    before = picture.get_attribute('src')
    tab.locator('#head input').click()
    tab.get_by_role('option', name='head 1').click()
    browser.expect(picture).not_to_have_attribute('src', before)

    tab.locator('#file button[aria-label="Clear"]').first.click()
    browser.expect(picture).to_have_count(0)
    browser.expect(given).to_have_count(0)
    tab.locator('#examples button').nth(3).click()
    browser.expect(picture).to_be_visible()
    browser.expect(given).to_be_visible()

    upload.set_input_files(tmp_path / 'fake.png')
    browser.expect(tab.get_by_text('not a readable image')).to_be_visible()
    browser.expect(picture).to_have_count(0)  # the previous image disappears too
    browser.expect(given).to_have_count(0)
    chromium.close()
  asked = [url for url in elsewhere if not url.startswith((page, 'data:', 'blob:'))]
  assert not asked, f'the page requests {asked}'
  assert not refused, f'the server refuses {refused}'


@pytest.mark.slow
def test_fifty_requests_at_once_get_correct_answers(client, trained):
  files = sorted((trained[0] / 'examples').iterdir())
  wanted = [
    row['predictions'] for row in prediction.predict(trained[0], [str(f) for f in files], 10)
  ]
  with concurrent.futures.ThreadPoolExecutor(50) as pool:
    answers = list(pool.map(lambda i: ask(client, files[i % 8])[0], range(50)))
  for i, answer in enumerate(answers):
    for guess in wanted[i % 8][: page_lib.TOPK]:
      assert answer[guess['class']] == pytest.approx(guess['probability'], abs=1e-4)


def test_bad_uploads_are_refused_and_images_are_accepted(client, tmp_path):
  def refused(name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Exception, match=message):
      ask(client, tmp_path / name)

  bomb = io.BytesIO()
  Image.new('1', (10_000, 6_000)).save(bomb, 'png')  # 8 kB of file
  refused('bomb.png', bomb.getvalue(), '10000x6000 pixels, at most 50,000,000')
  refused('page.html', b'<script>alert(1)</script>', 'not a readable image')
  refused('drawing.svg', b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'not a readable image')
  refused('empty.png', b'', 'empty file')
  Image.new('RGB', (9, 9)).save(tmp_path / 'drawing.eps')
  refused('eps.png', (tmp_path / 'drawing.eps').read_bytes(), 'unknown image format')
  refused('large.png', bytes(gate.MAX_BYTES + 1), 'exceed|413|large')
  Image.new('L', (50, 30), 90).save(tmp_path / 'grey.png')
  assert sum(ask(client, tmp_path / 'grey.png')[0].values()) <= 1.001  # the server still answers


def test_the_server_does_not_fetch_addresses_for_a_client(client):
  address = {'path': 'http://127.0.0.1:1/a.png', 'meta': {'_type': 'gradio.FileData'}}
  with pytest.raises(Exception, match='Upload the file itself'):
    client.predict(address, page_lib.ROLLOUT, page_lib.MEAN, api_name='/predict')


def test_the_server_does_not_fetch_addresses_for_a_menu(page):
  address = {'path': 'http://example.com/a', 'meta': {'_type': 'gradio.FileData'}}
  (predict,) = functions(page, api_name='predict')
  for data in ([None, address, page_lib.MEAN], [None, page_lib.ROLLOUT, address]):
    assert 'Upload the file itself' in call(page, predict, data)


def test_a_request_that_is_too_large_is_stopped(page):
  for path, size in (('queue/join', 2**21), ('upload', 22 * 2**20)):
    kind = 'multipart/form-data; boundary=a' if path == 'upload' else 'application/json'
    start = b'--a\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body = start + bytes(size) + b'\r\n--a--\r\n' if path == 'upload' else b'"' + b'x' * size + b'"'
    request = urllib.request.Request(f'{page}gradio_api/{path}', body, {'Content-Type': kind})
    with pytest.raises((urllib.error.HTTPError, urllib.error.URLError)) as caught:
      urllib.request.urlopen(request)
    assert getattr(caught.value, 'code', 413) in (400, 413)


def call(page, fn_index, data, **more):
  """Sends inputs to one function of the page through the queue; returns all messages as text."""
  body = {'fn_index': fn_index, 'data': data, 'session_hash': 'wrong', **more}
  status, answer = send(f'{page}gradio_api/queue/join', body)
  assert status == 200, answer
  return send(f'{page}gradio_api/queue/data?session_hash=wrong')[1]


def functions(page, **wanted):
  """Returns the indices of the functions of the page with the given entries in the config."""
  listed = json.loads(send(f'{page}config')[1])['dependencies']
  return [fn['id'] for fn in listed if wanted.items() <= fn.items()]


@pytest.mark.parametrize(
  'file, reason',
  [
    ('cat.png', "Given: 'cat.png'"),
    ({'path': '/etc/passwd', 'meta': {'_type': 'gradio.FileData'}}, 'not uploaded by a user'),
    ({'path': '/etc/passwd'}, 'meta'),
    ([], 'Given: []'),
    (None, 'No file was given'),
  ],
)
def test_wrong_files_are_refused_with_a_reason(page, file, reason):
  (predict,) = functions(page, api_name='predict')
  found = call(page, predict, [file, page_lib.ROLLOUT, page_lib.MEAN])
  assert '"success":false' in found and reason in found


@pytest.mark.parametrize(
  'event',
  [None, {}, [], 'a', {'index': 99, 'value': 1}, {'index': -1, 'value': 1}, {'index': 'a'}],
)
def test_an_example_that_does_not_exist_is_refused(page, event):
  fn = next(
    fn for fn in functions(page, queue=True) if fn not in functions(page, api_name='predict')
  )
  found = call(page, fn, [], event_data=event)
  assert '"success":false' in found and 'has 8 examples' in found


def test_no_wrong_input_of_any_function_prints_a_traceback(page):
  for fn in functions(page, queue=True):
    for data in ([], [None] * 3, [1] * 9, [None, page_lib.ROLLOUT, 'head 9'], [None, None, None]):
      assert 'process_completed' in call(page, fn, data)
  for fn in functions(page, queue=False):
    send(f'{page}gradio_api/run/predict', {'fn_index': fn, 'data': [1] * 9, 'session_hash': 'a'})


@pytest.mark.parametrize('path, data', [
    ('queue/join', {'fn_index': 99, 'data': [], 'session_hash': 'a'}),
    ('queue/join', {'fn_index': 99, 'data': []}), ('queue/join', []), ('call/predict', {}),
    ('run/predict', {'fn_index': 99, 'data': []}), ('call/v2/predict', {'other': 1}),
    ('cancel', {'session_hash': 'a', 'fn_index': 1, 'event_id': 'b'}), ('upload', {}),
    ('queue/data?session_hash=unknown', None), ('call/predict/unknown', None),
])  # fmt: skip
def test_a_wrong_request_is_one_line_in_the_log_or_none(page, log, path, data):
  before = len(log.read_text().splitlines())
  status, answer = send(f'{page}gradio_api/{path}', data)
  assert status != 200 or 'unknown' in path or path == 'cancel', answer
  time.sleep(0.2)
  said = log.read_text().splitlines()[before:]
  assert len(said) <= 1 and all('gradio_api' in line for line in said), said


@pytest.mark.parametrize(
  'layer, head', [('block 9', page_lib.MEAN), ('block 1', 'head 9'), (None, 1)]
)
def test_unknown_layers_and_heads_are_refused(client, trained, layer, head):
  file = next((trained[0] / 'examples').iterdir())
  with pytest.raises(Exception, match='block 2|choices'):
    ask(client, file, layer, head)


def test_a_browser_that_leaves_during_an_upload_is_one_line_in_the_log(page, log):
  port = int(re.search(r':(\d+)/', page)[1])
  head = (
    f'POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n'
    'Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 100000\r\n\r\n'
    '--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
  )
  with socket.create_connection(('127.0.0.1', port)) as leaving:
    leaving.sendall(head.encode() + bytes(1000))
  line, until = 'A client disconnected during /gradio_api/upload.', time.monotonic() + 20
  while line not in log.read_text():
    assert time.monotonic() < until, log.read_text()
    time.sleep(0.05)


def limits(workdir, **more):
  """Returns the text of `about`, and the experiment, of the last checkpoint of a run."""
  exp, _, step = opening.open_model(Request(workdir, step='last'))
  return about_lib.about(dataclasses.replace(exp, **more), step, workdir), exp


@pytest.mark.slow
def test_the_limits_state_what_is_known_about_the_model(trained, tmp_path):
  workdir = shutil.copytree(trained[0], tmp_path / 'run')
  (workdir / 'eval.json').unlink(missing_ok=True)
  found, _ = limits(workdir)
  assert found['Accuracy'].startswith('Not measured for this checkpoint')
  assert 'not calibrated' in found['Probabilities']
  assert (
    '10 classes: pattern 0, pattern 1' in found['Classes'] and '8 x 8 pixels' in found['Images']
  )
  assert found['Training data'] == '`synthetic`, split `train`: 1,024 images.'
  result = evaluation.evaluate(workdir, step='last')
  low, high = result['accuracy_interval']
  found, exp = limits(workdir, calibration=Calibration(2.0, examples=9))
  assert found['Accuracy'] == (
    f'{result["accuracy"]:.2%} on the 256 images of `test`. The 95% interval is {low:.2%} to '
    f'{high:.2%}.'
  )
  assert 'calibrated on 9 validation images, with the temperature 2' in found['Probabilities']
  assert about_lib.about(exp, 16, workdir)['Accuracy'].startswith('Not measured')
  file = workdir / 'eval.json'  # the page does not keep the aspect ratio of images
  file.write_text(json.dumps(json.loads(file.read_text()) | {'max_patches': 4}))
  assert limits(workdir)[0]['Accuracy'].startswith('Not measured')
  names = ('[a](b)', '<i>\n', *'cdefgh')
  exp = dataclasses.replace(exp, task=dataclasses.replace(exp.task, class_names=names))
  assert r'8 classes: \[a\]\(b\), \<i\>\\n, c' in about_lib.about(exp, 16, None)['Classes']


def test_the_limits_of_a_model_of_several_labels_state_its_thresholds(trained):
  exp = opening.open_model(Request(trained[0]))[0]
  exp = dataclasses.replace(exp, task=dataclasses.replace(exp.task, multi_label=True))
  assert about_lib.about(exp, 1, None)['Probabilities'].endswith('The threshold is 0.5.')
  fitted = Calibration(thresholds=(0.3,) * 10, examples=7)
  exp = dataclasses.replace(exp, calibration=fitted)
  assert 'chosen on 7 validation images' in about_lib.about(exp, 1, None)['Probabilities']
  viewer = object.__new__(page_lib.Viewer)
  viewer.exp = exp
  seen = page_lib.Seen(None, np.array([0.1, 0.31, 0.9, 0.29, *[0] * 6]), None, None)
  assert viewer.labels(seen) == '**Labels**: pattern 2, pattern 1'
  assert viewer.labels(seen._replace(probability_L=np.zeros(10))) == '**Labels**: none'


def test_classes_of_the_same_name_keep_their_own_probability(trained):
  exp = opening.open_model(Request(trained[0]))[0]
  task = dataclasses.replace(exp.task, class_names=('crane', 'cat', 'crane'))
  viewer = object.__new__(page_lib.Viewer)
  viewer.exp = dataclasses.replace(exp, task=task)
  seen = page_lib.Seen(None, np.array([0.5, 0.25, 0.25]), None, None)
  assert viewer.guesses(seen) == {'crane': 0.5, 'cat': 0.25, 'crane (2)': 0.25}


def test_a_run_without_saved_examples_offers_images_of_its_test_split(trained, tmp_path):
  exp = opening.open_model(Request(trained[0]))[0]
  found = server.find_examples(exp, tmp_path, tmp_path)
  test = evaluation.load_split(exp, 'test')
  assert len(found) == 8
  assert np.array_equal(np.asarray(Image.open(found[3])), test.image_NHWC[3])
  assert server.find_examples(exp, None, tmp_path) == []


def test_an_example_that_is_no_image_is_left_out(trained, tmp_path, caplog):
  exp = opening.open_model(Request(trained[0]))[0]
  (tmp_path / 'examples').mkdir()
  good = sorted((trained[0] / 'examples').iterdir())[0]
  shutil.copy(good, tmp_path / 'examples' / 'b.png')
  (tmp_path / 'examples' / '._b.png').write_bytes(b'metadata of macOS')
  assert server.find_examples(exp, tmp_path, tmp_path) == [tmp_path / 'examples' / 'b.png']
  assert 'The page leaves out an example.' in caplog.text and '._b.png' in caplog.text


def test_the_server_does_not_serve_local_files(page):
  for path in ('/etc/passwd', str(ROOT / 'main.py'), '../../main.py'):
    with pytest.raises(urllib.error.HTTPError, match='403|404'):
      urllib.request.urlopen(f'{page}gradio_api/file={path}')


@pytest.mark.parametrize('path', ['runs', 'run-history/buckets', 'run-history/records'])
def test_the_server_keeps_no_history_of_runs(page, path):
  assert send(f'{page}gradio_api/{path}')[0] == 404
  assert json.loads(send(f'{page}config')[1])['run_history'] is False


@pytest.mark.parametrize('route', ['run', 'api'])
def test_no_request_to_the_model_bypasses_the_queue(page, route):
  status, answer = send(f'{page}gradio_api/{route}/predict', {'data': [None, 'a', 'b']})
  assert status == 404, answer


def test_uploads_and_examples_wait_in_the_same_queue(trained):
  viewer = object.__new__(page_lib.Viewer)
  viewer.exp, viewer.rows, viewer.heads = opening.open_model(Request(trained[0]))[0], 3, 2
  page = page_lib.build(viewer, [], 'title', {})
  found = [fn for fn in page.fns.values() if fn.name in ('classify', 'take_example')]
  assert len(found) == 2
  assert {(fn.concurrency_id, fn.concurrency_limit) for fn in found} == {('model', 1)}


@pytest.mark.parametrize('path, data', [
    ('gradio_api/process_recording', {}), ('gradio_api/deep_link?session_hash=a', None),
    ('gradio_api/vibe-edit', {}), ('gradio_api/vibe-code', None), ('gradio_api/token', None),
    ('gradio_api/component_server', {}), ('gradio_api/proxy=http://127.0.0.1:1/a', None),
    ('gradio_api/file=http://127.0.0.1:1/a.png', None), ('gradio_api/run/other', {}),
    ('gradio_api/dev/reload', None), ('monitoring/summary', None), ('login', {}), ('docs', None),
    ('', {}),
])  # fmt: skip
def test_routes_that_the_page_does_not_need_are_closed(page, path, data):
  assert send(f'{page}{path}', data) == (404, 'Not found.')


@pytest.mark.parametrize('route', ['call', 'call/v2'])
def test_the_api_works_with_plain_requests(page, trained, route):
  image = next((trained[0] / 'examples').iterdir())
  part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
  body = part + image.read_bytes() + b'\r\n--x--\r\n'
  head = {'Content-Type': 'multipart/form-data; boundary=x'}
  sent = urllib.request.Request(f'{page}gradio_api/upload', body, head)
  (path,) = json.loads(urllib.request.urlopen(sent).read())
  file = {'path': path, 'meta': {'_type': 'gradio.FileData'}}
  named = {'encoded': file, 'layer': 'block 1', 'head': 'head 1'}
  asked = named if route == 'call/v2' else {'data': list(named.values())}
  address = f'{page}gradio_api/{route}/predict'
  _, answer = send(address, asked)
  assert 'event: complete' in send(f'{address}/{json.loads(answer)["event_id"]}')[1]


def test_gradio_is_not_imported_before_its_folder_is_set():
  code = 'import sys, vit_jax.inference.server; assert "gradio" not in sys.modules'
  subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


def test_the_server_listens_only_on_the_loopback_address(page):
  port = int(re.search(r':(\d+)/', page)[1])
  listening = [line.split() for line in pathlib.Path('/proc/net/tcp').read_text().splitlines()[1:]]
  addresses = {row[1] for row in listening if row[1].endswith(f':{port:04X}') and row[3] == '0A'}
  assert addresses == {f'0100007F:{port:04X}'}


def test_a_picture_is_lit_where_attention_is():
  image_HWC = np.full((4, 8, 3), 200, np.uint8)
  lit_HWC = page_lib.light(image_HWC, np.array([[0.0, 0.5]]))
  assert lit_HWC.shape == (448, 896, 3) and lit_HWC.dtype == np.uint8
  assert np.all(lit_HWC[:, :200] == round(200 * page_lib.DARK)) and np.all(lit_HWC[:, -200:] == 200)
  assert page_lib.light(image_HWC[..., :1], np.ones((1, 2))).shape == (448, 896, 3)


@pytest.mark.parametrize('layer, head, index', [
    ('block 1', 'head 2', (0, 1)), ('block 2', 'head 1', (1, 0)), ('block 2', page_lib.MEAN, 1),
])  # fmt: skip
def test_a_picture_shows_the_block_and_the_head_of_the_menus(layer, head, index):
  heads_RKhw = np.random.default_rng(0).random((2, 2, 1, 2))
  image_HWC = np.full((4, 8, 3), 200, np.uint8)
  menus = types.SimpleNamespace(
    layers=[page_lib.ROLLOUT, 'block 1', 'block 2'], head_names=[page_lib.MEAN, 'head 1', 'head 2']
  )
  seen = types.SimpleNamespace(
    rollout_hw=np.ones((1, 2)), heads_RKhw=heads_RKhw, image_HWC=image_HWC
  )
  wanted = heads_RKhw[index] if head != page_lib.MEAN else heads_RKhw[index].mean(axis=0)
  found = page_lib.Viewer.picture(menus, seen, layer, head)
  np.testing.assert_array_equal(found, page_lib.light(image_HWC, wanted))


@pytest.mark.slow
def test_the_exit_codes_of_the_documentation_are_true_for_serve(trained):
  command = [sys.executable, 'main.py', '--mode=serve', f'--workdir={trained[0]}', '--port=0']
  process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
  assert any('Serving on' in line for line in process.stderr)
  time.sleep(1)
  process.send_signal(signal.SIGINT)
  process.communicate(timeout=60)
  assert process.returncode == 0
  rows = [line.split(' | ') for line in (ROOT / 'docs' / 'cli.md').read_text().splitlines()]
  codes = {row[0].strip('| '): row[1] for row in rows if len(row) == 2}
  assert 'Ctrl-C stopped `serve`' in codes['0'] and 'except' in codes['130']
  assert '`train` or `verify`' in codes['75'] and 'SIGTERM' in codes['143']


def test_port_0_is_any_free_port():
  port = server.find_port('127.0.0.1', 0)
  assert port > 0
  assert server.find_port('127.0.0.1', port) == port


def test_a_port_that_is_in_use_is_refused(trained, capsys):
  with socket.socket() as taken:
    taken.bind(('127.0.0.1', 0))
    taken.listen()
    port = taken.getsockname()[1]
    code = cli.main(['--mode=serve', f'--workdir={trained[0]}', f'--port={port}'])
  assert code == 2 and f'Cannot listen on --host=127.0.0.1 --port={port}' in capsys.readouterr().err
  assert cli.main(['--mode=serve', f'--workdir={trained[0]}', '--port=70000']) == 2
