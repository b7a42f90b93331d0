"""A run's records: `metrics.jsonl`, TensorBoard events, `log.txt` and JSON files.

clu's own writers import TensorFlow; tensorboardX does not.
"""

from collections.abc import Callable
import contextlib
import fcntl
import json
import logging
import pathlib
import sys
import time
from typing import IO

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from vit_jax import output

LOG = logging.getLogger('vit_jax')
DETAILS = logging.getLogger('vit_jax.details')  # what is for log.txt alone
DETAILS.propagate = False
FLUSH = 30  # seconds that events may wait in memory


class Writer:
  """Appends to the records of a workdir; a context manager."""

  def __init__(self, workdir: pathlib.Path, start: int):
    """Drops what an interrupted run wrote after step `start`, from which it goes on.

    Raises:
      ValueError: another run writes there.
    """
    self.workdir = workdir
    self._file = workdir / 'metrics.jsonl'
    with contextlib.ExitStack() as opened:
      self._log = opened.enter_context(contextlib.closing(LogFile(workdir / 'log.txt')))
      lock(self._log.stream)
      self.keep(lambda line: line['step'] <= start)
      events = Events(workdir / 'tensorboard', start + 1)
      self._events = opened.enter_context(contextlib.closing(events))
      self._opened = opened.pop_all()
    self._log.setFormatter(logging.Formatter('%(asctime)s %(levelname)s %(message)s'))
    for logger in (LOG, DETAILS):
      logger.addHandler(self._log)
      logger.setLevel(logging.INFO)

  def __enter__(self):
    return self

  def __exit__(self, kind, error, _):
    if error is not None:
      DETAILS.info('Stopped by %s', kind.__name__, exc_info=error)
    for logger in (LOG, DETAILS):
      logger.removeHandler(self._log)
    try:
      self._opened.close()
    except output.Unwritten:
      if error is None:  # else that one tells more
        raise

  def keep(self, wanted: Callable[[dict], bool]) -> None:
    """Drops the other lines from `metrics.jsonl`."""
    if self._file.exists():
      kept = [line for line in read_metrics(self.workdir) if wanted(line)]
      output.replace(self._file, ''.join(json.dumps(line) + '\n' for line in kept))

  def has(self, step: int, split: str) -> bool:
    """Whether there is a line of metrics of a split after `step` updates."""
    lines = read_metrics(self.workdir) if self._file.exists() else []
    return any((line['step'], line['split']) == (step, split) for line in lines)

  def write(self, step: int, split: str, **values: float) -> None:
    """One line of metrics of a split after `step` updates."""
    self._log.check()
    with output.writing(self._file), self._file.open('a', encoding='utf-8') as file:
      file.write(json.dumps({'step': step, 'split': split, **values}) + '\n')
    self._events.write(step, {f'{split}/{name}': value for name, value in values.items()})

  def result(self, values: dict) -> None:
    """`result.json`, the last record of a run."""
    write_json(self.workdir / 'result.json', values)


class LogFile(logging.FileHandler):
  """`log.txt`. Logging prints what it can't write with a traceback; here `check` raises it."""

  def __init__(self, path: pathlib.Path):
    self._path, self._failure = path, None
    with output.writing(path):
      # The name of a bad image need not be UTF-8.
      super().__init__(path, encoding='utf-8', errors='backslashreplace')

  def handleError(self, record):
    self._failure = sys.exception()

  def check(self) -> None:
    """Raises `output.Unwritten` where a line could not be written."""
    with output.writing(self._path):
      if self._failure is not None:
        raise self._failure

  def close(self) -> None:
    """Raises `output.Unwritten` where a line could not be written."""
    with output.writing(self._path):
      super().close()
    self.check()


class Events:
  """TensorBoard's events, written by the thread that asks for it.

  tensorboardX's own `SummaryWriter` has another thread, which a full disk ends: whoever writes then
  waits for it forever.
  """

  def __init__(self, folder: pathlib.Path, start: int):
    """What TensorBoard knows of steps from `start` on is void."""
    self._folder, self._flushed = folder, time.monotonic()
    with output.writing(folder):
      folder.mkdir(exist_ok=True)
      self._writer = EventsWriter(str(folder / 'events'))
    self._add(Event(step=start, file_version='brain.Event:2'))
    self._add(Event(step=start, session_log=SessionLog(status=SessionLog.START)))

  def _add(self, event: Event) -> None:
    event.wall_time = time.time()
    with output.writing(self._folder):
      self._writer.write_event(event)

  def write(self, step: int, values: dict[str, float]) -> None:
    """The values by their names after `step` updates."""
    for name, value in values.items():
      self._add(Event(step=step, summary=scalar(name, value)))
    if time.monotonic() > self._flushed + FLUSH:
      with output.writing(self._folder):
        self._writer.flush()
      self._flushed = time.monotonic()

  def close(self) -> None:
    """Writes what waits."""
    with output.writing(self._folder):
      self._writer.close()


def lock(file: IO) -> None:
  """Holds an open file until it is closed, or this process ends.

  Raises:
    ValueError: another holds it.
  """
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    raise ValueError(
      f'{pathlib.Path(file.name).parent}: another run is writing here. Wait for its end, or give '
      'another --workdir.'
    ) from error
  except OSError as error:  # some network file systems have no locks
    LOG.info(
      '%s can not be locked (%s): see to it that one run at a time writes.', file.name, error
    )


class Silent:
  """In the place of a `Writer`, in processes that write nothing."""

  def __init__(self, workdir: pathlib.Path, start: int):
    pass

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass

  def keep(self, wanted: Callable[[dict], bool]) -> None:
    pass

  def write(self, step: int, split: str, **values: float) -> None:
    pass

  def result(self, values: dict) -> None:
    pass


def read_metrics(workdir: pathlib.Path) -> list[dict]:
  """The lines of `metrics.jsonl`; one that a crash cut short, or of another kind, is left out."""
  lines = []
  for line in (workdir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines():
    with contextlib.suppress(json.JSONDecodeError):
      lines.append(json.loads(line))
  lines = [line for line in lines if isinstance(line, dict) and 'split' in line]
  return [line for line in lines if isinstance(line.get('step'), int)]


def read_json(path: pathlib.Path) -> dict | None:
  """The object that a JSON file holds; None where there is no file, or a damaged one."""
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except (FileNotFoundError, ValueError):
    return None
  return value if isinstance(value, dict) else None


def write_json(path: pathlib.Path, value: dict) -> None:
  """Writes the whole file or nothing."""
  output.replace(path, json.dumps(value, indent=2) + '\n')
