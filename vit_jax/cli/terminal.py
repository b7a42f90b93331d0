"""What a person at a terminal expects: Ctrl-C, log lines above progress bars, any letters."""

import codecs
import contextlib
import io
import logging
import os
import signal
import sys
import warnings

log = logging.getLogger('vit_jax')


class Console(logging.Handler):
  """Prints above the progress bar, not through it."""

  def emit(self, record):
    from tqdm import tqdm

    from vit_jax.distributed import is_first

    if is_first() or record.levelno >= logging.WARNING:
      tqdm.write(self.format(record), file=sys.stderr)


def show_log() -> None:
  """Prints the log of this package, and of nothing else."""
  log.setLevel(logging.INFO)
  log.propagate = False
  log.handlers = [Console(logging.INFO)]


def set_up() -> None:
  """Handles Ctrl-C, closed streams, and letters that the terminal lacks."""
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else the shell ignores it
    signal.signal(signal.SIGINT, interrupt)
  open_streams()
  hush_event_loops()
  codecs.register_error('as_bytes', as_bytes)
  buffered = {name: getattr(sys.stdout, name) for name in ('line_buffering', 'write_through')}
  encoding = sys.stdout.encoding
  sys.stdout = Output(sys.stdout.detach(), encoding, 'as_bytes', **buffered)


def open_streams() -> None:
  """Opens the null device in place of standard streams that are closed, as by `>&-`.

  Python has None in their place. The next file that is opened would take their number, and get
  what libraries write to it.
  """
  for number, name, mode in ((0, 'stdin', 'r'), (1, 'stdout', 'w'), (2, 'stderr', 'w')):
    try:
      os.fstat(number)
    except OSError:
      os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number: this one
    if getattr(sys, name) is None:
      setattr(sys, name, os.fdopen(number, mode, encoding='utf-8', closefd=False))


def hush_event_loops() -> None:
  """Keeps silent about event loops that orbax could not open; the error itself says why."""
  before = sys.unraisablehook

  def report(unraisable):
    if getattr(unraisable.object, '__qualname__', '') != 'BaseEventLoop.__del__':
      before(unraisable)

  sys.unraisablehook = report
  warnings.filterwarnings('ignore', "coroutine '.*' was never awaited", RuntimeWarning)


class Output(io.TextIOWrapper):
  """Standard output, which an error names: the system's message does not."""

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
      close_pipe()  # else Python tries once more when it ends
      raise OSError(
        f'Standard output can not be written ({error.strerror}). Make room, or send it elsewhere.'
      ) from error


def interrupt(_, frame) -> None:
  """The first Ctrl-C ends what is being done in order; the second ends it at once.

  So does the first one during an import, which may swallow what is raised in it.
  """
  while frame:
    if frame.f_code.co_filename.startswith('<frozen importlib'):
      end_at_once('Interrupted.')
    frame = frame.f_back
  signal.signal(signal.SIGINT, lambda *_: end_at_once('Interrupted again: ending at once.'))
  raise KeyboardInterrupt


def end_at_once(message: str) -> None:
  """Ends this process: a checkpoint that is being written does not appear, those before stay."""
  os.write(sys.stderr.fileno(), f'{message}\n'.encode())
  os._exit(130)


def as_bytes(error: UnicodeError) -> tuple:
  """How to print letters that the terminal lacks: as a file's name has them, else escaped."""
  try:
    return codecs.lookup_error('surrogateescape')(error)
  except UnicodeEncodeError:
    return codecs.backslashreplace_errors(error)


def close_pipe() -> None:
  """Drops what is left to print where nobody reads it (`head`), or nothing can be written."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
