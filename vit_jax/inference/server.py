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
import pathlib
import signal
import socket
import sys
import tempfile

import gradio as gr
from ml_collections import ConfigDict

from vit_jax import opening, progress
from vit_jax.inference.page import Viewer, build

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


def serve(
  workdir: pathlib.Path | None,
  host: str,
  port: int,
  overrides: dict[str, str] | None = None,
  config: ConfigDict | None = None,
  init: str = '',
  step: str = '',
) -> None:
  """Serves the model of a workdir, or of published weights, until it is interrupted.

  Args:
    workdir: of a run; its `examples/` are offered on the page. None with `init`.
    host: that is listened on.
    port: of it.
    overrides: dotted keys and values put over the model's config.
    config: what the run must have been trained with; None to trust it.
    init: published weights with a head.
    step: which checkpoint of the workdir, as in `stored.preferred`.

  Raises:
    ValueError: an address that is taken, no checkpoint, or overrides that contradict it.
  """
  check_address(host, port)
  exp, params, _ = opening.open_model(workdir, init, overrides or {}, config, step=step)
  with progress.announced('Compiling ...'):
    viewer = Viewer(exp, params)
  examples = sorted((workdir / 'examples').glob('*.png')) if workdir else []
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder goes
  with tempfile.TemporaryDirectory(prefix='vit_jax_uploads_') as uploads:
    os.environ['GRADIO_TEMP_DIR'] = uploads
    page = build(viewer, examples, f'vit_jax: {init or workdir.resolve().name}')
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
