"""Sets up the process of a command: its terminal, log messages and cache of compiled programs."""

import codecs
import contextlib
import io
import logging
import os
import signal
import sys
import threading
import warnings

from vit_jax.storage import compiled_folder

log = logging.getLogger('vit_jax')


class Console(logging.Handler):
  """Log handler that prints above the progress bar; only process 0 prints INFO messages."""

  def emit(self, record):
    from tqdm import tqdm

    from vit_jax.distributed import is_first

    if is_first() or record.levelno >= logging.WARNING:
      with contextlib.suppress(OSError):  # training goes on after its terminal was closed
        tqdm.write(self.format(record), file=sys.stderr)


def show_log() -> None:
  """Makes this package print log messages of the level INFO and higher levels to stderr."""
  log.setLevel(logging.INFO)
  log.propagate = False
  log.handlers = [Console(logging.INFO)]


def keep_compiled() -> None:
  """Enables JAX's persistent compilation cache. Must be called before JAX is imported."""
  if folder := compiled_folder():
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', folder)


def set_up() -> None:
  """Prepares for Ctrl-C, closed standard streams, and characters that the terminal cannot show."""
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # background jobs ignore Ctrl-C
    signal.signal(signal.SIGINT, interrupt)
  open_streams()
  hush_event_loops()
  codecs.register_error('as_bytes', as_bytes)
  buffered = {name: getattr(sys.stdout, name) for name in ('line_buffering', 'write_through')}
  encoding = sys.stdout.encoding
  sys.stdout = Output(sys.stdout.detach(), encoding, 'as_bytes', **buffered)


def open_streams() -> None:
  """Replaces each closed standard stream, e.g. after `>&-` in the shell, with the null device.

  If stdout is closed, `sys.stdout` is None, and the next file that the program opens gets the file
  descriptor of stdout. The output of libraries would then be written to this file.
  """
  for number, name, mode in ((0, 'stdin', 'r'), (1, 'stdout', 'w'), (2, 'stderr', 'w')):
    try:
      os.fstat(number)
    except OSError:
      os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets `number`, the lowest free one
    if getattr(sys, name) is None:
      setattr(sys, name, os.fdopen(number, mode, encoding='utf-8', closefd=False))


def hush_event_loops() -> None:
  """Hides Python's messages about event loops that orbax could not open.

  The user does not need the messages, because the program reports the error that orbax raises.
  """
  before = sys.unraisablehook

  def report(unraisable):
    if getattr(unraisable.object, '__qualname__', '') != 'BaseEventLoop.__del__':
      before(unraisable)

  sys.unraisablehook = report
  warnings.filterwarnings('ignore', "coroutine '.*' was never awaited", RuntimeWarning)


class Output(io.TextIOWrapper):
  """Text stream for standard output. If it cannot write, the error says what to do."""

  def write(self, text):
    with self.named():
      return super().write(text)

  def flush(self):
    with self.named():
      super().flush()

  @contextlib.contextmanager
  def named(self):
    try:
      yield
    except BrokenPipeError:
      raise
    except OSError as error:
      close_pipe()  # otherwise Python writes again at exit
      raise OSError(
        f'Cannot write to standard output ({error.strerror}). Free disk space, or redirect the '
        'output.'
      ) from error


def interrupt(_, frame) -> None:
  """Handles Ctrl-C: the first Ctrl-C ends the program cleanly, the second one immediately.

  During an import, the first Ctrl-C also ends the program immediately, because the imported code
  could catch KeyboardInterrupt. During garbage collection, Python ignores exceptions, so the signal
  is sent again a little later.
  """
  while frame:
    if frame.f_code.co_filename.startswith('<frozen importlib'):
      end_at_once('Interrupted.')
    if frame.f_code.co_name in ('__del__', '_xla_gc_callback'):
      later = threading.Timer(0.1, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
      later.daemon = True
      return later.start()
    frame = frame.f_back
  signal.signal(signal.SIGINT, lambda *_: end_at_once('Interrupted again: exiting immediately.'))
  raise KeyboardInterrupt


def end_at_once(message: str) -> None:
  """Prints a message, and ends this process at once with exit code 130.

  If a checkpoint is being saved, it is lost. Earlier checkpoints are kept.
  """
  os.write(sys.stderr.fileno(), f'{message}\n'.encode())
  os._exit(130)


def as_bytes(error: UnicodeError) -> tuple:
  """Codec error handler that replaces each unprintable character with an escape like `\\u20ac`.

  A character is unprintable if the encoding of the terminal does not have it. A byte of a file name
  that could not be decoded is written unchanged.
  """
  try:
    return codecs.lookup_error('surrogateescape')(error)
  except UnicodeEncodeError:
    return codecs.backslashreplace_errors(error)


def close_pipe() -> None:
  """Discards further output to stdout. Called after a failed write, e.g. because `head` ended."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
