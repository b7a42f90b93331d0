"""Writes TensorBoard event files."""

from collections.abc import Iterator
import contextlib
import pathlib
import sys
import time

from vit_jax import storage

FLUSH = 30  # maximum seconds for which events wait in memory


@contextlib.contextmanager
def without_torch() -> Iterator[None]:
  """Makes the statement `import torch` fail, unless PyTorch is already imported.

  tensorboardX imports PyTorch if it is installed. Events do not need PyTorch, and importing it
  takes seconds and hundreds of MB of memory.
  """
  if 'torch' in sys.modules:
    yield
    return
  sys.modules['torch'] = None
  try:
    yield
  finally:
    del sys.modules['torch']


with without_torch():
  from tensorboardX.event_file_writer import EventsWriter
  from tensorboardX.proto.event_pb2 import Event, SessionLog
  from tensorboardX.summary import scalar


class Events:
  """Writes TensorBoard events in the calling thread.

  tensorboardX's own `SummaryWriter` writes in a second thread. A full disk ends this thread, and
  the next call then waits for the thread forever.
  """

  def __init__(self, folder: pathlib.Path, start: int):
    """Opens a new event file.

    The file makes TensorBoard ignore step `start` and all later steps in older event files.
    """
    self._folder, self._flushed = folder, time.monotonic()
    with storage.writing(folder):
      folder.mkdir(exist_ok=True)
      self._writer = EventsWriter(str(folder / 'events'))
    self._add(Event(step=start, file_version='brain.Event:2'))
    self._add(Event(step=start, session_log=SessionLog(status=SessionLog.START)))

  def _add(self, event: Event) -> None:
    event.wall_time = time.time()
    with storage.writing(self._folder):
      self._writer.write_event(event)

  def write(self, step: int, values: dict[str, float]) -> None:
    """Adds an event for each named value, measured after `step` updates."""
    for name, value in values.items():
      self._add(Event(step=step, summary=scalar(name, value)))
    if time.monotonic() > self._flushed + FLUSH:
      self.flush()

  def flush(self) -> None:
    """Writes the events that are buffered in memory to the file."""
    with storage.writing(self._folder):
      self._writer.flush()
    self._flushed = time.monotonic()

  def close(self) -> None:
    """Writes the remaining events and closes the file."""
    with storage.writing(self._folder):
      self._writer.close()
