"""Checkpoints that lie in a workdir: found, verified and read."""

import contextlib
import logging
import pathlib
import time

import orbax.checkpoint as ocp

from vit_jax.distributed import from_first
from vit_jax.workdir import items, writer

log = logging.getLogger(__name__)


SAVED = {'config', 'task', 'seconds'}  # keys of the item `config`

ITEMS = ('config', 'params', 'state', 'names')


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
      with contextlib.suppress(items.Damaged):
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
  checkpoint = directory(workdir) / str(step)
  about = items.restored(checkpoint, 'config')
  if not isinstance(about, dict) or not about.keys() >= SAVED:
    raise items.damaged(checkpoint, f'its config has not {", ".join(sorted(SAVED))}')
  digests = about.pop('digests', {})  # an older version wrote none
  if item == 'names' and item not in digests:
    return None
  found = about if item == 'config' else items.restored(checkpoint, item)
  now = items.digest(found)
  if digests.get(item, now) != now:
    raise items.damaged(checkpoint, f'its {item} is not what was saved')
  return found


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
    except items.Damaged as error:
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
    with contextlib.suppress(items.Damaged):
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
    except items.Damaged as error:
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
