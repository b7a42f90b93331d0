"""Controls how child processes of this process start and end."""

from collections.abc import Iterator
import contextlib
import multiprocessing
import multiprocessing.resource_tracker
import multiprocessing.spawn
import os
import signal
import threading


def check_can_start() -> None:
  """Raises ValueError if the start of a worker would run the main script again."""
  try:
    multiprocessing.spawn.get_preparation_data('worker')
  except RuntimeError as error:
    raise ValueError(
      'data.workers starts processes that import the main script. Each of them would run the '
      "script again. Put its code under `if __name__ == '__main__':`, or use data.workers=0."
    ) from error


@contextlib.contextmanager
def unsignalled() -> Iterator[None]:
  """Blocks SIGINT and SIGTERM in the threads that this block starts, and in the workers.

  All processes of a job get these signals at the same time. Workers must keep running until
  training has saved. A worker that is still starting cannot ignore the signals yet.
  """
  multiprocessing.resource_tracker.ensure_running()  # starting it later would undo the mask
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(index: int, count: int) -> None:
  """Makes a worker process exit when its parent process exits."""
  del index, count

  def watch():
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()
