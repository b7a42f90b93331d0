"""TensorBoard's event files."""

import pathlib
import time

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from vit_jax import storage

FLUSH = 30  # seconds that events may wait in memory


class Events:
  """TensorBoard's events, written by the thread that asks for it.

  tensorboardX's own `SummaryWriter` has another thread, which a full disk ends: whoever writes then
  waits for it forever.
  """

  def __init__(self, folder: pathlib.Path, start: int):
    """What TensorBoard knows of steps from `start` on is void."""
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
    """The values by their names after `step` updates."""
    for name, value in values.items():
      self._add(Event(step=step, summary=scalar(name, value)))
    if time.monotonic() > self._flushed + FLUSH:
      with storage.writing(self._folder):
        self._writer.flush()
      self._flushed = time.monotonic()

  def close(self) -> None:
    """Writes what waits."""
    with storage.writing(self._folder):
      self._writer.close()
