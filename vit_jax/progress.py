"""What long work says while it lasts."""

from collections.abc import Iterable, Iterator
import contextlib
import logging
import sys
import threading

from tqdm import tqdm

from vit_jax.distributed import is_first

log = logging.getLogger(__name__)

SOON = 5.0  # seconds that nothing is said


@contextlib.contextmanager
def announced(message: str) -> Iterator[None]:
  """Logs the message if what follows takes longer than `SOON`."""
  timer = threading.Timer(SOON, log.info, (message,))
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def counter(items: Iterable | None = None, **arguments) -> tqdm:
  """tqdm's bar, of the first process; seldom drawn where it stays, as in a log file."""
  interval = 0.1 if sys.stderr.isatty() else 10  # seconds
  silent = not is_first()
  return tqdm(items, dynamic_ncols=True, mininterval=interval, disable=silent, **arguments)


def bar(items: Iterable, message: str, unit: str, total: int) -> Iterator:
  """The items, under a bar if they take longer than `SOON`; it vanishes with the last one.

  If the first one alone takes longer, as where a program is compiled for it, the message is logged.
  """
  with contextlib.ExitStack() as first:
    first.enter_context(announced(f'{message} ...'))
    for item in counter(items, desc=message, total=total, leave=False, unit=unit, delay=SOON):
      yield item
      first.close()
