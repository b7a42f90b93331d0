"""The page of --mode=serve, without a model and without a browser."""

import asyncio
import functools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import types

import numpy as np
from PIL import Image
import pytest

from tests.conftest import ROOT
from vit_jax import opening
from vit_jax.data.image import fit_image
from vit_jax.figures.canvas import short
from vit_jax.inference import server
from vit_jax.workdir import Calibration

gr = pytest.importorskip('gradio', reason='pip install -r requirements-demo.txt')
state_holder = pytest.importorskip('gradio.state_holder')
gate = pytest.importorskip('vit_jax.inference.gate')
page_lib = pytest.importorskip('vit_jax.inference.page')

MEAN = page_lib.MEAN


class Stub(page_lib.Viewer):
  """A viewer with two blocks of two heads, which gives every image its own attention."""

  def __init__(self, names=('a', 'b'), crop=1.0):
    task = types.SimpleNamespace(
      class_names=names, multi_label=True, stored_size=(8, 8), channels=3
    )
    model, fit = types.SimpleNamespace(depth=2), functools.partial(fit_image, crop=crop)
    self.exp = types.SimpleNamespace(task=task, model=model, calibration=Calibration(), fit=fit)
    self.rows = self.heads = 2

  def see(self, image_HWC):
    draws = np.random.default_rng(int(image_HWC.sum()))
    return page_lib.Seen(
      image_HWC, np.ones(2) / 2, draws.random((2, 2)), draws.random((2, 2, 2, 2))
    )


@pytest.fixture
def examples(tmp_path, monkeypatch):
  """Two image files; Gradio's files are in the same folder."""
  monkeypatch.setenv('GRADIO_TEMP_DIR', str(tmp_path))
  for i in (0, 1):
    pixels_HWC = np.random.default_rng(i).integers(0, 255, (8, 8, 3), np.uint8)
    Image.fromarray(pixels_HWC).save(tmp_path / f'{i}.png')
  return [tmp_path / '0.png', tmp_path / '1.png']


def triggered(page, event):
  """Returns the functions that an event of a component or of the page starts."""
  return [fn for fn in page.fns.values() if event in dict(fn.targets).values()]


def named(page, name):
  """Returns the function with this name."""
  (found,) = (fn for fn in page.fns.values() if fn.name == name)
  return found


def run(page, fn, session, *menus):
  """Runs a function in a session with values of the menus; returns `{HTML id: output}`."""
  data = [None, *menus] if fn.inputs else []
  found = asyncio.run(page.process_api(fn, data, state=session))['data']
  return {part.elem_id: value for part, value in zip(fn.outputs, found)}


def path_of(output):
  """Returns the path of an image that a function returned; the path has a hash of the content."""
  return output['attention']['path']


def test_an_image_that_has_expired_is_not_replaced_by_another_one(examples):
  page = page_lib.build(Stub(), examples, 'title', {})
  sessions = state_holder.StateHolder()
  sessions.set_blocks(page)
  for fn in triggered(page, 'load'):
    run(page, fn, sessions['a'])
  changes = triggered(page, 'change')
  for fn in changes:
    assert path_of(run(page, fn, sessions['a'], 'block 2', MEAN))
    assert fn.queue  # otherwise the browser does not show the text of an error
  sessions.delete_state('a')  # as Gradio does after an hour
  for fn in changes:
    for session in (sessions['a'], sessions['b']):
      with pytest.raises(gr.Error, match='Choose the image again'):
        run(page, fn, session, 'block 2', MEAN)


def test_menus_do_nothing_on_a_page_without_an_image(examples):
  page = page_lib.build(Stub(), [], 'title', {})
  session = state_holder.SessionState(page)
  for fn in triggered(page, 'load'):
    run(page, fn, session)
  for fn in triggered(page, 'change'):
    assert set(run(page, fn, session, 'block 2', MEAN).values()) == {None}


@pytest.mark.parametrize('name', ['classify', 'take_example'])
def test_a_picture_is_drawn_with_the_menus_at_the_end_of_the_wait(examples, name):
  page = page_lib.build(Stub(), examples, 'title', {})
  session = state_holder.SessionState(page)
  for fn in triggered(page, 'load'):
    run(page, fn, session)
  change = triggered(page, 'change')[0]
  (last,) = (fn for fn in page.fns.values() if fn.trigger_after == named(page, name)._id)
  wanted = [path_of(run(page, change, session, layer, MEAN)) for layer in ('block 1', 'block 2')]
  found = [path_of(run(page, last, session, layer, MEAN)) for layer in ('block 1', 'block 2')]
  assert found == wanted and found[0] != found[1]


def test_an_example_is_not_cropped_again_but_an_upload_is(examples):
  viewer, seen = Stub(crop=0.875), []
  viewer.see = lambda image_HWC: seen.append(image_HWC) or Stub.see(viewer, image_HWC)
  page = page_lib.build(viewer, examples, 'title', {})
  named(page, 'take_example').fn(types.SimpleNamespace(index=1))
  for image_HWC, file in zip(seen, examples, strict=True):
    assert np.array_equal(image_HWC, np.asarray(Image.open(file)))
  Image.new('RGB', (16, 8)).save(examples[1])  # a file of another size that a user added
  named(page, 'take_example').fn(types.SimpleNamespace(index=1))
  assert seen.pop().shape == (8, 8, 3)
  named(page, 'classify').fn(examples[0].read_bytes(), 'block 1', MEAN)
  assert not np.array_equal(seen[-1], np.asarray(Image.open(examples[0])))


def test_names_that_are_not_utf_8_can_be_sent_to_the_browser(examples):
  viewer = Stub(names=('caf\udce9', 'caf\udce8'))
  page = page_lib.build(viewer, examples, 'run \udce9', {'Classes': 'caf\udce9'})
  json.dumps(page.get_config_file(), ensure_ascii=False, default=str).encode()
  assert viewer.guesses(viewer.see(np.zeros((8, 8, 3), np.uint8))) == {'caf?': 0.5, 'caf? (1)': 0.5}
  assert short('caf\udce9') == 'caf?'


@pytest.mark.parametrize('name, proxy', [
    ('http_proxy', 'http://127.0.0.1:9'), ('ALL_PROXY', 'socks5://127.0.0.1:9'),
])  # fmt: skip
def test_the_server_starts_behind_a_proxy_that_cannot_reach_it(examples, monkeypatch, name, proxy):
  monkeypatch.setenv(name, proxy)
  monkeypatch.setenv('no_proxy', '')
  page = page_lib.build(Stub(), examples, 'title', {})
  gate.launch(page, '127.0.0.1', server.find_port('127.0.0.1', 0))
  page.close()


def test_a_server_that_cannot_start_is_an_error_with_a_remedy(monkeypatch, examples):
  monkeypatch.setenv('no_proxy', '')  # `launch` changes it; the old value returns after the test
  page = page_lib.build(Stub(), examples, 'title', {})
  with socket.create_server(('127.0.0.1', 0)) as taken:
    port = taken.getsockname()[1]
    with pytest.raises(ValueError, match=f'--port={port} .* choose another address or port'):
      gate.launch(page, '127.0.0.1', port)


def test_an_upload_that_gradio_does_not_know_is_deleted_and_an_example_is_not(monkeypatch):
  def wait():
    folder, until = pathlib.Path(os.environ['GRADIO_TEMP_DIR']), time.monotonic() + 20
    (folder / 'tmp0').write_bytes(b'interrupted')
    while (folder / 'tmp0').exists():
      assert time.monotonic() < until
      time.sleep(0.05)
    waited.append((folder / '0.png').exists())

  def find_examples(exp, workdir, folder):
    (folder / '0.png').write_bytes(b'image')

  waited, nothing = [], lambda *_: None
  monkeypatch.setenv('GRADIO_TEMP_DIR', '')  # `serve` changes it
  monkeypatch.setattr(signal, 'signal', nothing)
  monkeypatch.setattr(opening, 'open_model', lambda request: (None,) * 3)
  monkeypatch.setattr(server, 'find_examples', find_examples)
  monkeypatch.setattr(server, 'about', nothing)
  monkeypatch.setattr(page_lib, 'Viewer', nothing)
  closed = []  # whether the folder of the uploads exists while the server is closed
  close = lambda verbose: closed.append(pathlib.Path(os.environ['GRADIO_TEMP_DIR']).is_dir())
  blocks = types.SimpleNamespace(local_url='', block_thread=wait, close=close)
  monkeypatch.setattr(page_lib, 'build', lambda *_: blocks)
  monkeypatch.setattr(page_lib, 'KEEP', 0.2)
  monkeypatch.setattr(page_lib, 'CLEAN', 0.1)
  monkeypatch.setattr(gate, 'launch', nothing)
  request = types.SimpleNamespace(workdir=None, name='a', overrides={})
  server.serve(request, '127.0.0.1', 0)
  assert waited == closed == [True]


# A server that waits for its model for ever.
WAITING = """
import sys, time, types
from vit_jax.inference import server
sys.modules['vit_jax.inference.gate'] = sys.modules['vit_jax.inference.page'] = types
server.opening.open_model = lambda request: (print('ready', flush=True), time.sleep(100))
server.serve(None, '127.0.0.1', 0)
"""


@pytest.mark.parametrize('ignored', [False, True])
def test_a_closed_terminal_stops_the_server_unless_nohup_started_it(tmp_path, ignored):
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
  env = os.environ | {'TMPDIR': str(tmp_path)}
  command = [sys.executable, '-c', WAITING]
  process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
  signal.signal(signal.SIGHUP, before)
  assert process.stdout.readline() == 'ready\n'
  assert [path.name[:16] for path in tmp_path.iterdir()] == ['vit_jax_uploads_']
  process.send_signal(signal.SIGHUP)
  if ignored:
    with pytest.raises(subprocess.TimeoutExpired):
      process.wait(0.5)
    process.terminate()
  process.communicate(timeout=60)
  assert process.returncode == 0 and not list(tmp_path.iterdir())
