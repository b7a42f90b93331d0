"""Child processes of this one: whether they can start, and how they end."""

from collections.abc import Iterator
import contextlib
import multiprocessing
import multiprocessing.resource_tracker
import multiprocessing.spawn
import os
import signal
import threading


def check_can_start() -> None:
  """Raises ValueError where Python starts no process: in a worker that imports a bare script."""
  try:
    multiprocessing.spawn.get_preparation_data('worker')
  except RuntimeError as error:
    raise ValueError(
      'data.workers are processes that import the script which starts them, and would run it '
      "again: put what it does under `if __name__ == '__main__':`, or use data.workers=0."
    ) from error


@contextlib.contextmanager
def unsignalled() -> Iterator[None]:
  """Threads that start meanwhile, and processes that they start, get no SIGINT and no SIGTERM.

  A job's processes all get these at once. Workers must go on till training has saved; and a worker
  that is only just starting could not yet ignore them by itself.
  """
  multiprocessing.resource_tracker.ensure_running()  # to start it later would undo the mask
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(index: int, count: int) -> None:
  """What a worker process does first: it sees to it that it ends with the one that started it."""
  del index, count

  def watch():
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()
