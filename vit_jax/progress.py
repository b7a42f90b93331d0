"""Shows the progress of long work with log messages and progress bars."""

from collections.abc import Iterable, Iterator
import contextlib
import logging
import sys
import threading

from tqdm import tqdm

from vit_jax.distributed import is_first

log = logging.getLogger(__name__)

SOON = 5.0  # seconds before long work is announced


@contextlib.contextmanager
def announced(message: str) -> Iterator[None]:
  """Context manager that logs a message if the code inside takes longer than `SOON` seconds."""
  timer = threading.Timer(SOON, log.info, (message,))
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def counter(items: Iterable | None = None, **arguments) -> tqdm:
  """Returns a tqdm bar that only process 0 shows. Without a terminal, it changes every 10 s."""
  interval = 0.1 if sys.stderr.isatty() else 10  # seconds
  silent = not is_first()
  return tqdm(items, dynamic_ncols=True, mininterval=interval, disable=silent, **arguments)


def bar(items: Iterable, message: str, unit: str, total: int) -> Iterator:
  """Yields the items, and shows a progress bar if they take longer than `SOON` seconds.

  The bar disappears after the last item. If the first item takes longer than `SOON` seconds, e.g.
  because JAX compiles a program, the message is logged.

  Args:
    items: the items.
    message: text in front of the bar.
    unit: name of an item, such as `image`.
    total: number of items.
  """
  with contextlib.ExitStack() as first:
    first.enter_context(announced(f'{message} ...'))
    for item in counter(items, desc=message, total=total, leave=False, unit=unit, delay=SOON):
      yield item
      first.close()
