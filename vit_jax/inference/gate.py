"""Starts the web server of the demo page, which accepts only requests that the page needs.

Gradio has many more routes. Some of them run programs on uploaded files, write files or fetch
addresses. The server therefore accepts only the routes that the page and the clients of its API
use.
"""

import logging
import re

import gradio as gr
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse

log = logging.getLogger(__name__)

MAX_BYTES = 20 * 2**20  # maximum size of an uploaded file

MAX_SESSIONS = 256  # maximum number of sessions whose results are kept in memory

# Paths to read: the files of the page, its description for clients, and results. The path after
# `file=` must be local, because Gradio would fetch a URL.
READ = re.compile(
  r'/|/(assets|static)/.+|/favicon\.ico|/manifest\.json|/theme\.css|/config|/gradio_api/('
  r'startup-events|app_id|info|upload_progress|file=/.+|heartbeat/[^/]+|queue/data|'
  r'call(/v2)?/predict/[^/]+)'
)
# Paths to send to. `run` reaches no function that uses the model, because the page is built with
# `api_open=False`.
SENT = re.compile(r'/gradio_api/(upload|queue/join|run/predict|cancel|reset|call(/v2)?/predict)')
ALLOWED = {'GET': READ, 'HEAD': READ, 'POST': SENT}  # {HTTP method: its paths}

FONT = ('system-ui', 'sans-serif')
CSS = """
#examples .grid-wrap { padding-top: 2.5rem; }  /* below the label */
#examples .grid-container {  /* as many in a row as fit */
  grid-template: none / repeat(auto-fill, minmax(4rem, 1fr)); grid-auto-rows: auto;
}
"""


class Gate:
  """ASGI middleware that answers all requests with 404, except those in `ALLOWED`."""

  def __init__(self, app):
    """Wraps `app`, the ASGI application that answers the allowed requests."""
    self.app = app

  async def __call__(self, scope, receive, send) -> None:
    """Passes an allowed request on, and refuses any other."""
    app = self.app
    if scope['type'] == 'http':
      allowed = ALLOWED.get(scope['method'])
      if allowed is None or not allowed.fullmatch(scope['path']):
        app = PlainTextResponse('Not found.', status_code=404)
    await app(scope, receive, send)


async def note_disconnect(request, error: Exception) -> PlainTextResponse:
  """Logs that a client disconnected during a request.

  The returned response is never read, but FastAPI requires one.
  """
  log.info('A client disconnected during %s.', request.url.path)
  return PlainTextResponse('', status_code=400)


def launch(page: gr.Blocks, host: str, port: int) -> None:
  """Starts to serve a page at an address, in a new thread."""
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
    app_kwargs={
      'middleware': [Middleware(Gate)],
      'exception_handlers': {ClientDisconnect: note_disconnect},
    },
  )
