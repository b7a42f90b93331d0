"""What long work says while it lasts."""

from collections.abc import Iterable, Iterator
import contextlib
import logging
import threading

from tqdm import tqdm

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


def bar(items: Iterable, message: str, unit: str, total: int) -> Iterator:
  """The items, under a bar if they take longer than `SOON`; it vanishes with the last one.

  If the first one alone takes longer, as where a program is compiled for it, the message is logged.
  """
  with contextlib.ExitStack() as first:
    first.enter_context(announced(f'{message} ...'))
    for item in tqdm(items, message, total, leave=False, unit=unit, delay=SOON):
      yield item
      first.close()
