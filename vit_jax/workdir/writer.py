"""Writes the records of a run: `metrics.jsonl`, TensorBoard events, `log.txt` and JSON files.

Decisions:
  * A run locks `log.txt` in its workdir before it writes any file. So a second command in the same
    workdir is refused before it can change the files of the run.
  * For a workdir in a bucket, a local scratch folder (`bucket.Mirror`) holds metrics, events and
    log. The whole files are uploaded when metrics are written (at most every `UPLOAD` seconds),
    before each checkpoint and at the end.
  * Events are written with tensorboardX, because clu's writers import TensorFlow.
"""

from collections.abc import Callable
import contextlib
import json
import logging
import pathlib
import sys
import time

from vit_jax import bucket, storage

log = logging.getLogger(__name__)

LOG = logging.getLogger('vit_jax')
DETAILS = logging.getLogger('vit_jax.details')  # messages for log.txt only
DETAILS.propagate = False
UPLOAD = 30  # minimum seconds between two uploads of metrics, except at checkpoints and at the end


class Writer:
  """Context manager that writes `metrics.jsonl`, TensorBoard events and `log.txt` of a run."""

  def __init__(self, workdir: pathlib.Path, start: int):
    """Opens the files of a run that starts or resumes at step `start`.

    Metrics of later steps, which an interrupted run wrote, are removed. The caller must hold the
    workdir's lock (`lock.held`).
    """
    self.workdir = workdir
    self._uploaded = time.monotonic()
    from vit_jax.workdir.events import Events  # here, because readers need no tensorboardX

    with contextlib.ExitStack() as opened:
      self._mirror, self._folder = None, workdir
      if bucket.is_remote(workdir):
        mirror = bucket.Mirror(workdir, ('metrics.jsonl', 'log.txt'))
        self._mirror = opened.enter_context(mirror)
        self._folder = mirror.folder
        opened.callback(self._upload)  # runs after the files are closed
      self._file = self._folder / 'metrics.jsonl'
      self._log = opened.enter_context(contextlib.closing(LogFile(self._folder / 'log.txt')))
      self.keep(lambda line: line['step'] <= start)
      events = Events(self._folder / 'tensorboard', start + 1)
      self._events = opened.enter_context(contextlib.closing(events))
      self.flush()
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
    except (storage.Unwritten, bucket.Lost):
      if error is None:  # otherwise, `error` is the cause and is raised
        raise

  def keep(self, wanted: Callable[[dict], bool]) -> None:
    """Removes the lines of `metrics.jsonl` for which `wanted` returns False."""
    if self._file.exists():
      kept = [line for line in read_metrics(self._folder) if wanted(line)]
      storage.replace(self._file, ''.join(json.dumps(line) + '\n' for line in kept))

  def find(self, step: int, split: str) -> dict:
    """Returns the metrics of a split after `step` updates; an empty dict if none were written."""
    lines = [line for line in read_metrics(self._folder) if line['split'] == split]
    return next((line for line in lines if line['step'] == step), {})

  def write(self, step: int, split: str, **values: float) -> None:
    """Writes the metrics of a split after `step` updates to `metrics.jsonl` and TensorBoard."""
    storage.check_allowed(self.workdir)
    self._log.check()
    with storage.writing(self._file), self._file.open('a', encoding='utf-8') as file:
      file.write(json.dumps({'step': step, 'split': split, **values}) + '\n')
    self._events.write(step, {f'{split}/{name}': value for name, value in values.items()})
    if time.monotonic() > self._uploaded + UPLOAD:
      self.flush()

  def flush(self) -> None:
    """Uploads `metrics.jsonl`, `log.txt` and the events, if the workdir is in a bucket."""
    if self._mirror is not None:
      self._events.flush()
      self._upload()

  def _upload(self):
    storage.check_allowed(self.workdir)
    with storage.uploading(self.workdir):
      self._mirror.upload()
    self._uploaded = time.monotonic()


class LogFile(logging.FileHandler):
  """Handler for `log.txt`. If a write fails, `check` raises the error, and no traceback appears."""

  def __init__(self, path: pathlib.Path):
    self._path, self._failure = path, None
    with storage.writing(path):
      # The name of a bad image is not always UTF-8.
      super().__init__(path, encoding='utf-8', errors='backslashreplace')

  def handleError(self, record):
    self._failure = sys.exception()

  def check(self) -> None:
    """Raises `storage.Unwritten` if a line could not be written."""
    with storage.writing(self._path):
      if self._failure is not None:
        raise self._failure

  def close(self) -> None:
    """Closes the file; raises `storage.Unwritten` if a line could not be written."""
    with storage.writing(self._path):
      super().close()
    self.check()


class Silent:
  """Replacement for `Writer` in processes that write nothing."""

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

  def flush(self) -> None:
    pass


def read_metrics(workdir: pathlib.Path) -> list[dict]:
  """Returns the lines of `metrics.jsonl` as dicts; an empty list if the file does not exist.

  Incomplete lines, lines without a step or split, and values that are not numbers are skipped.
  """
  file, lines = workdir / 'metrics.jsonl', []
  text = file.read_bytes().decode('utf-8', 'replace') if file.exists() else ''
  for line in text.splitlines():
    with contextlib.suppress(ValueError, RecursionError):
      lines.append(json.loads(line))
  lines = [line for line in lines if isinstance(line, dict) and type(line.get('split')) is str]
  lines = [line for line in lines if isinstance(line.get('step'), int)]
  good = lambda key, value: key == 'split' or isinstance(value, int | float)
  return [{key: value for key, value in line.items() if good(key, value)} for line in lines]


def read_json(path: pathlib.Path) -> dict | None:
  """Returns the object in a JSON file; None if the file is missing or damaged."""
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except (FileNotFoundError, ValueError, RecursionError):  # brackets can be nested too deeply
    return None
  return value if isinstance(value, dict) else None


def write_json(path: pathlib.Path, value: dict) -> None:
  """Writes a JSON file, either completely or not at all."""
  storage.replace(path, json.dumps(value, indent=2) + '\n')
