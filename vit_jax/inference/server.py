"""Serves the demo page: a visitor uploads an image, and sees its classes and the model's attention.

Decisions:
  * Gradio does not decode uploads, but passes their bytes to `decode_image`. If a file is not an
    image, the visitor gets an error message with the reason. File size and number of pixels are
    limited.
  * The model processes one image at a time on one device. Other requests wait in Gradio's queue.
  * The page and the server fetch nothing from the network. The page uses system fonts, and has no
    analytics and no share link. If a client sends a URL instead of a file, the server refuses it.
  * Uploads are stored in a temporary folder, which is deleted when the server stops.
  * An invalid request causes a message to the client or one line in the log, never a traceback.
"""

import logging
import os
import pathlib
import signal
import socket
import sys
import tempfile

from fastapi.responses import PlainTextResponse
import gradio as gr
from starlette.requests import ClientDisconnect

from vit_jax import opening, progress
from vit_jax.bucket import is_remote
from vit_jax.data import save_png
from vit_jax.evaluation import load_split, open_test
from vit_jax.experiment import Experiment
from vit_jax.inference.about import about
from vit_jax.inference.page import Viewer, build
from vit_jax.opening import Request

log = logging.getLogger(__name__)

MAX_BYTES = 20 * 2**20  # maximum size of an uploaded file

MAX_SESSIONS = 256  # maximum number of sessions whose results are kept in memory

EXAMPLES = 8  # maximum number of example images from a split

FONT = ('system-ui', 'sans-serif')
CSS = """
#examples .grid-wrap { padding-top: 2.5rem; }  /* below the label */
#examples .grid-container {  /* as many in a row as fit */
  grid-template: none / repeat(auto-fill, minmax(4rem, 1fr)); grid-auto-rows: auto;
}
"""


def find_port(host: str, port: int) -> int:
  """Checks that the server can listen on an address, and returns its port.

  If `port` is 0, the result is a free port. `serve` calls this function before it loads the model,
  so that an error about the address is raised early.

  Raises:
    ValueError: the server cannot listen on this address.
  """
  try:
    with socket.create_server((host, port)) as server:
      return server.getsockname()[1]
  except (OSError, OverflowError) as error:
    raise ValueError(
      f'Cannot listen on --host={host} --port={port} ({error}). Choose another address or port.'
    ) from error


def find_examples(
  exp: Experiment, workdir: pathlib.Path | None, folder: pathlib.Path
) -> list[pathlib.Path]:
  """Returns the image files that the demo page offers as examples.

  The examples are the images in the folder `examples` of the workdir. If this folder is empty or
  missing, the first images of the evaluation split are used. Published weights have no examples.

  Args:
    exp: the experiment of the weights.
    workdir: folder of the run; None for published weights.
    folder: local folder for images of the split. If the workdir is in a bucket, the images in its
      folder `examples` are also copied to this local folder.
  """
  if workdir is None:
    return []
  if found := sorted((workdir / 'examples').glob('*.png')):
    return [copied(file, folder) for file in found] if is_remote(workdir) else found
  try:
    test = load_split(exp, exp.config.data.eval_split, open_test(exp)[0])
    for i, image_HWC in enumerate(test.some(range(min(EXAMPLES, len(test)))).image_NHWC):
      save_png(image_HWC, folder / f'{i}.png')
  except (ValueError, OSError) as error:
    log.warning('The page has no examples: %s', error)
  return sorted(folder.glob('*.png'))


def copied(file: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
  """Copies a file into a local folder, and returns the path of the copy."""
  copy = folder / file.name
  copy.write_bytes(file.read_bytes())
  return copy


async def note_disconnect(request, error: Exception) -> PlainTextResponse:
  """Logs that a client disconnected during a request.

  The returned response is never read, but FastAPI requires one.
  """
  log.info('A client disconnected during %s.', request.url.path)
  return PlainTextResponse('', status_code=400)


def serve(request: Request, host: str, port: int) -> None:
  """Serves the demo page of a model until the process ends.

  Args:
    request: names the model: a checkpoint of a workdir, or published weights with a head.
    host: address to listen on.
    port: port to listen on; 0: any free port.

  Raises:
    ValueError: the server cannot listen on the address, the weights do not exist, or the overrides
      do not fit the weights.
  """
  port = find_port(host, port)
  exp, params, step = opening.open_model(request)
  with progress.announced('Compiling ...'):
    viewer = Viewer(exp, params)
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # a normal exit deletes the uploads
  with tempfile.TemporaryDirectory(prefix='vit_jax_uploads_') as uploads:
    os.environ['GRADIO_TEMP_DIR'] = uploads
    examples = find_examples(exp, request.workdir, pathlib.Path(uploads))
    limits = about(exp, step, request.workdir)
    page = build(viewer, examples, f'vit_jax: {request.name}', limits)
    page.launch(
      server_name=host,
      server_port=port,
      share=False,
      quiet=True,
      prevent_thread_lock=True,
      max_file_size=MAX_BYTES,
      state_session_capacity=MAX_SESSIONS,
      enable_monitoring=False,
      run_history=False,  # its routes act with the Hugging Face token of the machine's user
      ssr_mode=False,
      theme=gr.themes.Default(font=FONT, font_mono=('ui-monospace', 'monospace')),
      css=CSS,
      footer_links=['api'],
      app_kwargs={'exception_handlers': {ClientDisconnect: note_disconnect}},
    )
    log.info('Serving on %s', page.local_url)
    page.block_thread()
