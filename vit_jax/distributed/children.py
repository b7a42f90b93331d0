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
  """Raises ValueError if starting a worker process would run the main script again."""
  try:
    multiprocessing.spawn.get_preparation_data('worker')
  except RuntimeError as error:
    raise ValueError(
      'Worker processes (data.workers) import the main script, so each of them would run the whole '
      "script again. Put the script's code under `if __name__ == '__main__':`, or use "
      'data.workers=0.'
    ) from error


@contextlib.contextmanager
def unsignalled() -> Iterator[None]:
  """Blocks SIGINT and SIGTERM in the threads and workers that start inside the `with` statement.

  All processes of a job get these signals at the same time, but workers must keep running until
  training has saved a checkpoint. A worker cannot block the signals itself before it has started,
  so they are blocked in this process, and the worker inherits this setting.
  """
  multiprocessing.resource_tracker.ensure_running()  # first, because its start unblocks the signals
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(index: int, count: int) -> None:
  """Makes this worker process exit when its parent process exits.

  Grain calls this function in each worker with two arguments, which are not used.
  """
  del index, count

  def watch():
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()
