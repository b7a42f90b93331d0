"""Starts the web server of the demo page, which accepts only requests that the page needs.

Besides the routes that the page needs, Gradio has many others. Some of these run programs on
uploaded files, write files or fetch URLs. The server therefore accepts only the routes that the
page and the clients of its API use.
"""

import contextlib
import logging
import os
import pathlib
import re

import gradio as gr
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse

from vit_jax.names import one_line

log = logging.getLogger(__name__)

MAX_BYTES = 20 * 2**20  # maximum size of an uploaded file

MAX_REST = 2**20  # maximum number of bytes in a request, apart from the uploaded file

MAX_SESSIONS = 256  # maximum number of sessions whose results are kept in memory

LONGEST = 300  # maximum number of characters of a reason in an error message

# Paths to read: the files of the page, its description for clients, and results. The path after
# `file=` must be local, because Gradio would fetch a URL.
READ = re.compile(
  r'/|/(assets|static)/.+|/favicon\.ico|/manifest\.json|/theme\.css|/config|/gradio_api/('
  r'startup-events|app_id|info|upload_progress|file=/.+|heartbeat/[^/]+|queue/data|'
  r'call(/v2)?/predict/[^/]+)'
)
# Paths that accept data. `run/predict` cannot call the model, because `page.build` sets
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
  """ASGI middleware that answers a request with 404, unless `ALLOWED` has its method and path.

  A request that is larger than the page needs is stopped while it arrives, and answered with 413.
  If Gradio cannot answer a request, for example because the request names an unknown function, the
  log gets one line instead of a traceback.
  """

  def __init__(self, app):
    """Wraps `app`, the ASGI application that answers the allowed requests."""
    self.app = app

  async def __call__(self, scope, receive, send) -> None:
    """Passes an allowed request on to the application, and refuses all other requests."""
    if scope['type'] != 'http':
      return await self.app(scope, receive, send)
    method, path, began = scope['method'], scope['path'], False
    allowed = ALLOWED.get(method)
    if allowed is None or not allowed.fullmatch(path):
      return await PlainTextResponse('Not found.', status_code=404)(scope, receive, send)

    left = MAX_REST + (MAX_BYTES if path.endswith('/upload') else 0)

    async def take() -> dict:
      nonlocal left
      message = await receive()
      left -= len(message.get('body', b''))
      if left < 0:
        raise HTTPException(413, f'Too large: files can have at most {MAX_BYTES >> 20} MiB.')
      return message

    async def answer(message) -> None:
      nonlocal began
      began = True
      await send(message)

    try:
      return await self.app(scope, take, answer)
    except ClientDisconnect:
      log.info('A client disconnected during %s.', one_line(path))
      failed = ''  # nobody reads this answer
    except Exception as error:
      reason = reason_of(error.__cause__ or error)
      log.warning('Cannot answer %s %s (%s).', method, one_line(path), reason)
      failed = f'Cannot answer this request ({reason}). Check its path and its inputs.'
    if not began:
      await PlainTextResponse(failed, status_code=500)(scope, receive, send)
    else:
      with contextlib.suppress(RuntimeError):  # raised e.g. if the header promised a longer body
        await send({'type': 'http.response.body', 'body': b''})


class Page(gr.Blocks):
  """A page that explains to a client why its inputs are wrong, without a traceback in the log."""

  async def preprocess_data(self, *args, **kwargs):
    """Checks and converts the inputs of a function, as Gradio does."""
    try:
      return await super().preprocess_data(*args, **kwargs)
    except gr.Error as error:
      error.print_exception = False
      raise
    except Exception as error:
      raise gr.Error(
        f'Cannot use these inputs ({reason_of(error)}). Upload an image file, and send '
        'a layer and a head with it, as the demo page does.',
        print_exception=False,
      ) from error


class Choice(gr.EventData):
  """Event data that tells which element of a gallery a visitor chose.

  Unlike `gr.SelectData`, it accepts all data that a client sends, even invalid data.

  Attributes:
    index: number of the element; None if the client sent none.
  """

  def __init__(self, target, data):
    """Reads the index from `data`, which the client sent; `target` is the gallery."""
    super().__init__(target, data)
    self.index = data.get('index') if isinstance(data, dict) else None


def reason_of(error: BaseException) -> str:
  """Returns the message of an error, on one line and shortened to `LONGEST` characters."""
  text = f'{type(error).__name__}: {error}'
  if isinstance(error, HTTPException):
    text = f'{error.status_code} {error.detail}'
  elif isinstance(error, ValidationError):
    first = error.errors()[0]
    text = f'{first["msg"].removeprefix("Value error, ")} Given: {first["input"]!r:.50}'
  return one_line(text)[:LONGEST]


def refuse_addresses(part: gr.components.Component) -> None:
  """Makes a component refuse URLs that clients send, because a download would have no size limit.

  Otherwise, Gradio downloads a URL that a client sends as the value of any component, even of a
  menu.
  """
  keep = part.async_move_resource_to_block_cache

  async def keep_uploads(path):
    if path and not pathlib.Path(path).is_file():
      raise gr.Error('URLs are not accepted. Upload the file itself.')
    return await keep(path)

  part.async_move_resource_to_block_cache = keep_uploads


def launch(page: gr.Blocks, host: str, port: int) -> None:
  """Starts to serve a page at an address, in a new thread.

  Raises:
    ValueError: Gradio cannot serve the page, or cannot connect to it.
  """
  # Gradio connects to the page to test it. Only `*` makes its client ignore every proxy, including
  # proxies that the client does not support.
  os.environ['no_proxy'] = '*'
  try:
    page.launch(
      server_name=host,
      server_port=port,
      share=False,
      quiet=True,
      prevent_thread_lock=True,
      max_file_size=MAX_BYTES,
      state_session_capacity=MAX_SESSIONS,
      enable_monitoring=False,
      run_history=False,  # its routes use the Hugging Face token of the user who runs the server
      ssr_mode=False,
      theme=gr.themes.Default(font=FONT, font_mono=('ui-monospace', 'monospace')),
      css=CSS,
      footer_links=['api'],
      app_kwargs={'middleware': [Middleware(Gate)]},
    )
  except Exception as error:  # Gradio raises errors of many types
    raise ValueError(
      f'Cannot serve the page on --host={host} --port={port} ({reason_of(error)}). Check that this '
      'machine can connect to this address, or choose another address or port.'
    ) from error
