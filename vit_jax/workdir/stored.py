"""Checkpoints that lie in a workdir: found, verified and read."""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from vit_jax.distributed import from_first
from vit_jax.workdir import writer

log = logging.getLogger(__name__)


class Damaged(ValueError):
  """A checkpoint that can't be read, or not as it was written."""


SAVED = {'config', 'task', 'seconds'}  # keys of the item `config`

ITEMS = ('config', 'params', 'state', 'names')

ALONE = ocp.options.MultiprocessingOptions(active_processes={0})  # the first process


def directory(workdir: pathlib.Path) -> pathlib.Path:
  """Where a workdir keeps its checkpoints; orbax wants it absolute."""
  return pathlib.Path(workdir).expanduser().resolve() / 'checkpoints'


def saved_steps(workdir: pathlib.Path) -> list[int]:
  """Those of its checkpoints, the newest first. Writes nothing."""
  if not directory(workdir).is_dir():
    return []
  return sorted(ocp.utils.checkpoint_steps(directory(workdir)), reverse=True)


def latest_step(workdir: pathlib.Path) -> int | None:
  """The newest checkpoint; None where there is none. Writes nothing."""
  return from_first(lambda: next(iter(saved_steps(workdir)), None))


def newest_config(workdir: pathlib.Path) -> dict | None:
  """The newest item `config` that is whole, and its `step`; None where there is none."""

  def find():
    for step in saved_steps(workdir):
      with contextlib.suppress(Damaged):
        return read_item(workdir, step, 'config') | {'step': step}
    return None

  return from_first(find)


def restore_item(workdir: pathlib.Path, step: int, item: str):
  """One item of a checkpoint as it was saved, arrays as NumPy; None for the `names` of 0.1.0.

  Raises:
    Damaged: it can't be read, or is not as it was saved.
  """
  return from_first(lambda: read_item(workdir, step, item))


def read_item(workdir: pathlib.Path, step: int, item: str):
  """The same, in this process."""
  about = restored(workdir, step, 'config')
  if not isinstance(about, dict) or not about.keys() >= SAVED:
    raise damaged(workdir, step, f'its config has not {", ".join(sorted(SAVED))}')
  digests = about.pop('digests', {})  # an older version wrote none
  if item == 'names' and item not in digests:
    return None
  found = about if item == 'config' else restored(workdir, step, item)
  now = digest(found)
  if digests.get(item, now) != now:
    raise damaged(workdir, step, f'its {item} is not what was saved')
  return found


def restored(workdir: pathlib.Path, step: int, item: str):
  """The same, whether or not it is what was saved."""
  handlers = {'config': ocp.JsonCheckpointHandler}
  handler = handlers.get(item, ocp.StandardCheckpointHandler)(multiprocessing_options=ALONE)
  try:
    with ocp.Checkpointer(handler, multiprocessing_options=ALONE) as checkpointer:
      return checkpointer.restore(directory(workdir) / str(step) / item)
  except MemoryError:
    raise
  except Exception as error:  # orbax and tensorstore raise many kinds
    be_silent()
    check_readable(directory(workdir) / str(step))
    raise damaged(workdir, step, error) from error


def digest(item) -> str:
  """SHA-256 of an item: of the names, types, shapes and bytes of its arrays, or of its JSON."""
  leaves = jax.tree_util.tree_leaves_with_path(item)
  if not all(isinstance(leaf, np.ndarray | np.generic) for _, leaf in leaves):
    return hashlib.sha256(json.dumps(item, sort_keys=True).encode()).hexdigest()
  found = hashlib.sha256()
  # By name: what was a tuple with names when it was saved is a dict when it is read.
  named = {jax.tree_util.keystr(p, simple=True, separator='/'): leaf for p, leaf in leaves}
  for name, leaf in sorted(named.items()):
    found.update(f'{name} {leaf.dtype} {leaf.shape}'.encode())
    found.update(np.ascontiguousarray(leaf).tobytes())
  return found.hexdigest()


def be_silent() -> None:
  """Has nothing printed of what orbax and tensorstore meet in their threads: they raise it too.

  A full disk would else fill a terminal with tracebacks.
  """
  sys.unraisablehook = unraisable
  for name in ('absl', 'asyncio'):
    logging.getLogger(name).addFilter(is_news)


def is_news(record: logging.LogRecord) -> bool:
  """Whether a log record is not of an error that orbax raises as well."""
  error = record.exc_info and record.exc_info[1]
  return not error or (record.name != 'absl' and 'orbax-checkpoint-tmp' not in str(error))


def unraisable(found) -> None:
  """Python's own, but for what was under way when orbax gave a checkpoint up."""
  if str(found.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(found)


def check_readable(folder: pathlib.Path) -> None:
  """Raises OSError where a file can't be read now: what it holds may yet be whole."""

  def fail(error):
    raise error

  try:
    for inside, _, names in os.walk(folder, onerror=fail):
      for name in names:
        with open(os.path.join(inside, name), 'rb') as file:
          while file.read(2**24):
            pass
  except FileNotFoundError:  # nor will it be
    pass
  except OSError as error:
    raise OSError(
      f'The checkpoint {folder} can not be read ({error.strerror}: {error.filename}). It was left '
      'as it is; the same command goes on once it can.'
    ) from error


def damaged(workdir: pathlib.Path, step: int, reason: object) -> Damaged:
  """The error for a checkpoint that is of no use."""
  path, reason = directory(workdir) / str(step), (str(reason).splitlines() or [''])[0][:200]
  return Damaged(f'The checkpoint {path} is damaged: {reason.rstrip(".")}.')


def set_aside_damaged(workdir: pathlib.Path) -> None:
  """Moves checkpoints newer than the newest whole one into `<workdir>/damaged/`.

  Raises:
    ValueError: none is whole.
  """
  from_first(lambda: _set_aside_damaged(workdir))


def _set_aside_damaged(workdir: pathlib.Path) -> None:
  found = saved_steps(workdir)
  for step in found:
    try:
      for item in ITEMS:
        read_item(workdir, step, item)
      return
    except Damaged as error:
      aside = pathlib.Path(workdir) / 'damaged' / f'{step}-{time.time_ns()}'
      aside.parent.mkdir(exist_ok=True)
      (directory(workdir) / str(step)).rename(aside)
      log.warning('%s It was moved to %s.', error, aside)
  if found:
    raise ValueError(
      f'{workdir}: all checkpoints are damaged, and were moved to {workdir}/damaged. The same '
      'command begins anew.'
    )


def accuracies(workdir: pathlib.Path) -> dict[int, float]:
  """The validation accuracy of each checkpoint that has one.

  A checkpoint that was saved before its evaluation has it in `metrics.jsonl` alone.
  """
  lines = writer.read_metrics(workdir)
  recorded = {line['step']: line.get('accuracy') for line in lines if line['split'] == 'val'}
  found = {}
  for step in saved_steps(workdir):
    with contextlib.suppress(Damaged):
      found[step] = read_item(workdir, step, 'config').get('accuracy', recorded.get(step))
  return {step: accuracy for step, accuracy in found.items() if accuracy is not None}


def ranked(accuracies: dict[int, float]) -> list[tuple[int, float]]:
  """`(step, accuracy)`, the highest accuracy first, and of equal ones the newest."""
  return sorted(accuracies.items(), key=lambda pair: pair[::-1], reverse=True)


def load_checkpoint(workdir: pathlib.Path, step: str = 'last') -> tuple[int, dict, dict]:
  """A checkpoint for inference: step, weights (NumPy), `config` item and in it `names`.

  The weights are the averaged ones where the run keeps them. A damaged checkpoint is skipped.

  Args:
    workdir: of a training run.
    step: which checkpoint, as in `preferred`.

  Raises:
    ValueError: the workdir holds no such checkpoint.
  """
  found = from_first(lambda: _load(workdir, step))
  return tuple(found)


def _load(workdir: pathlib.Path, step: str) -> tuple[int, dict, dict]:
  found = preferred(workdir, step)
  for (step, why), following in zip(found, [*found[1:], None]):
    try:
      config = read_item(workdir, step, 'config') | {'names': read_item(workdir, step, 'names')}
      if config['config']['ema'] > 0:
        params = read_item(workdir, step, 'state')['ema']
      else:
        params = read_item(workdir, step, 'params')
      if why:
        log.info('%s: step %d, %s.', workdir, step, why)
      return step, params, config
    except Damaged as error:
      if following is None:
        raise
      log.warning('%s That of step %d is used.', error, following[0])


def preferred(workdir: pathlib.Path, step: str) -> list[tuple[int, str]]:
  """The checkpoints to try, the preferred one first, each with the reason, if there was a choice.

  Args:
    workdir: of a training run.
    step: `best` by validation accuracy, `last`, or a number; empty: the best where there is a
      validation accuracy, else the last.

  Raises:
    ValueError: the workdir holds no such checkpoint.
  """
  found = saved_steps(workdir)
  if not found:
    raise ValueError(
      f'{workdir}: no checkpoint in {directory(workdir)}. Give the --workdir of a training '
      'run that has saved one (every checkpoint_every steps, and at its end).'
    )
  if step == 'last':
    return [(n, 'the last checkpoint') for n in found]
  if step in ('best', ''):
    scores = ranked(accuracies(workdir))
    best = [(n, f'best of {len(scores)} by validation accuracy {a:.2%}') for n, a in scores]
    if step == 'best' and not best:
      raise ValueError(
        f'--step=best: no checkpoint of {workdir} has a validation accuracy. Give --step=last, or '
        'train with a data.val_split.'
      )
    return best if step == 'best' else best + [(n, '') for n in found if n not in dict(best)]
  if not step.isdecimal() or int(step) not in found:
    there = ', '.join(str(n) for n in sorted(found))
    raise ValueError(
      f'--step={step}: {workdir} has the checkpoints {there}. Give one of these, best or last.'
    )
  return [(int(step), 'as asked')]
