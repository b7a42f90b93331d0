"""A run's records: `metrics.jsonl`, TensorBoard events, `log.txt` and JSON files.

Decisions:
  * A run holds a lock on its workdir's `log.txt` while it checks and writes. It writes nothing
    before that, so a command that is refused leaves another run as it is.
  * clu's own writers import TensorFlow; tensorboardX does not.
"""

from collections.abc import Callable
import contextlib
import json
import logging
import pathlib
import sys

from vit_jax import storage

log = logging.getLogger(__name__)

LOG = logging.getLogger('vit_jax')
DETAILS = logging.getLogger('vit_jax.details')  # what is for log.txt alone
DETAILS.propagate = False


class Writer:
  """Appends to the records of a workdir; a context manager."""

  def __init__(self, workdir: pathlib.Path, start: int):
    """Drops what an interrupted run wrote after step `start`, from which it resumes.

    The workdir must be `held`.
    """
    self.workdir = workdir
    self._file = workdir / 'metrics.jsonl'
    from vit_jax.workdir.events import Events  # those who only read records need no tensorboardX

    with contextlib.ExitStack() as opened:
      self._log = opened.enter_context(contextlib.closing(LogFile(workdir / 'log.txt')))
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
    except storage.Unwritten:
      if error is None:  # else that one tells more
        raise

  def keep(self, wanted: Callable[[dict], bool]) -> None:
    """Drops the other lines from `metrics.jsonl`."""
    if self._file.exists():
      kept = [line for line in read_metrics(self.workdir) if wanted(line)]
      storage.replace(self._file, ''.join(json.dumps(line) + '\n' for line in kept))

  def find(self, step: int, split: str) -> dict:
    """The metrics of a split after `step` updates; empty where there are none."""
    lines = [line for line in read_metrics(self.workdir) if line['split'] == split]
    return next((line for line in lines if line['step'] == step), {})

  def write(self, step: int, split: str, **values: float) -> None:
    """One line of metrics of a split after `step` updates."""
    self._log.check()
    with storage.writing(self._file), self._file.open('a', encoding='utf-8') as file:
      file.write(json.dumps({'step': step, 'split': split, **values}) + '\n')
    self._events.write(step, {f'{split}/{name}': value for name, value in values.items()})

  def result(self, values: dict) -> None:
    """`result.json`, the last record of a run."""
    write_json(self.workdir / 'result.json', values)


class LogFile(logging.FileHandler):
  """`log.txt`. Logging prints what it can't write with a traceback; here `check` raises it."""

  def __init__(self, path: pathlib.Path):
    self._path, self._failure = path, None
    with storage.writing(path):
      # The name of a bad image need not be UTF-8.
      super().__init__(path, encoding='utf-8', errors='backslashreplace')

  def handleError(self, record):
    self._failure = sys.exception()

  def check(self) -> None:
    """Raises `storage.Unwritten` where a line could not be written."""
    with storage.writing(self._path):
      if self._failure is not None:
        raise self._failure

  def close(self) -> None:
    """Raises `storage.Unwritten` where a line could not be written."""
    with storage.writing(self._path):
      super().close()
    self.check()


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
  """The lines of `metrics.jsonl`; one that a crash cut short, or of another kind, is skipped.

  So are values that are not numbers. There are no lines where there is no file.
  """
  file, lines = workdir / 'metrics.jsonl', []
  text = file.read_text(encoding='utf-8', errors='replace') if file.exists() else ''
  for line in text.splitlines():
    with contextlib.suppress(json.JSONDecodeError):
      lines.append(json.loads(line))
  lines = [line for line in lines if isinstance(line, dict) and type(line.get('split')) is str]
  lines = [line for line in lines if isinstance(line.get('step'), int)]
  good = lambda key, value: key == 'split' or isinstance(value, int | float)
  return [{key: value for key, value in line.items() if good(key, value)} for line in lines]


def read_json(path: pathlib.Path) -> dict | None:
  """The object that a JSON file holds; None where there is no file, or a damaged one."""
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except (FileNotFoundError, ValueError):
    return None
  return value if isinstance(value, dict) else None


def write_json(path: pathlib.Path, value: dict) -> None:
  """Writes the whole file or nothing."""
  storage.replace(path, json.dumps(value, indent=2) + '\n')
