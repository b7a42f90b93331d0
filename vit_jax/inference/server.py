"""A page on which a model is tried: drop an image, see its classes and what it attends to.

Decisions:
  * Files are decoded by `decode_image` alone, which opens images only and says what is wrong with
    the others; Gradio hands over bytes. Their size and pixels are bounded.
  * One image at a time, on one device: requests wait in Gradio's queue.
  * Neither the page nor the server asks anything of the network: system fonts, no analytics, no
    share link, and addresses in the place of an upload are refused.
  * Uploads lie in a folder of this server's own, which goes when it stops.
"""

import logging
import os
import signal
import socket
import sys
import tempfile

import gradio as gr

from vit_jax import opening, progress
from vit_jax.inference.page import Viewer, build
from vit_jax.opening import Request

log = logging.getLogger(__name__)

MAX_BYTES = 20 * 2**20  # of an upload

MAX_SESSIONS = 256

FONT = ('system-ui', 'sans-serif')
CSS = """
#examples .grid-wrap { padding-top: 2.5rem; }  /* below its label */
#examples .grid-container {  /* as many in a row as there is place for */
  grid-template: none / repeat(auto-fill, minmax(4rem, 1fr)); grid-auto-rows: auto;
}
"""


def check_address(host: str, port: int) -> None:
  """Raises ValueError where nothing can listen, before a model is read for it."""
  try:
    socket.create_server((host, port)).close()
  except (OSError, OverflowError) as error:
    raise ValueError(
      f'--host={host} --port={port} can not be listened on ({error}): give another.'
    ) from error


def serve(request: Request, host: str, port: int) -> None:
  """Serves the model of a workdir, or of published weights with a head, until it is interrupted.

  The page offers the `examples/` of a workdir.

  Args:
    request: which model.
    host: address to listen on.
    port: port to listen on.

  Raises:
    ValueError: an address that is taken, no checkpoint, or overrides that contradict it.
  """
  check_address(host, port)
  exp, params, _ = opening.open_model(request)
  with progress.announced('Compiling ...'):
    viewer = Viewer(exp, params)
  folder = request.workdir
  examples = sorted((folder / 'examples').glob('*.png')) if folder else []
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder goes
  with tempfile.TemporaryDirectory(prefix='vit_jax_uploads_') as uploads:
    os.environ['GRADIO_TEMP_DIR'] = uploads
    page = build(viewer, examples, f'vit_jax: {request.name}')
    page.launch(
      server_name=host,
      server_port=port,
      share=False,
      quiet=True,
      prevent_thread_lock=True,
      max_file_size=MAX_BYTES,
      state_session_capacity=MAX_SESSIONS,
      enable_monitoring=False,
      ssr_mode=False,
      theme=gr.themes.Default(font=FONT, font_mono=('ui-monospace', 'monospace')),
      css=CSS,
      footer_links=['api'],
    )
    log.info('Serving on %s', page.local_url)
    page.block_thread()
