"""Finds, verifies and reads the checkpoints in a workdir.

Orbax calls the parts of a checkpoint items. `checkpoint.py` describes the four items `config`,
`params`, `state` and `names`.
"""

import contextlib
import logging
import pathlib
import time

import orbax.checkpoint as ocp

from vit_jax import bucket, storage
from vit_jax.distributed import from_first
from vit_jax.model import merged
from vit_jax.optim import without_objective
from vit_jax.workdir import digests, items, writer
from vit_jax.workdir.calibration import find_calibration

log = logging.getLogger(__name__)


SAVED = {'config', 'task', 'seconds'}  # keys that the item `config` of every checkpoint has

ITEMS = ('config', *items.ARRAYS)  # parts of a checkpoint (`checkpoint.py`)


def directory(workdir: pathlib.Path) -> pathlib.Path:
  """Returns the folder of a workdir's checkpoints, as an absolute path, which orbax requires."""
  return bucket.absolute(workdir) / 'checkpoints'


def saved_steps(workdir: pathlib.Path) -> list[int]:
  """Returns the steps of all complete checkpoints, newest first. Writes nothing."""
  folder = directory(workdir)
  return [step for step in all_steps(workdir) if digests.counts(folder / str(step))]


def all_steps(workdir: pathlib.Path) -> list[int]:
  """Returns the steps of all checkpoints that orbax counts as complete, newest first.

  Unlike `saved_steps`, the list includes checkpoints that `digests.counts` rejects, because their
  `digests.json` is missing.
  """
  folder = directory(workdir)
  if not folder.exists():
    return []
  names = {path.name for path in folder.iterdir()}  # orbax also counts folders such as `best_100`
  return sorted((s for s in ocp.utils.checkpoint_steps(folder) if str(s) in names), reverse=True)


def latest_step(workdir: pathlib.Path) -> int | None:
  """Returns the step of the newest checkpoint; None without a checkpoint. Writes nothing."""
  return from_first(lambda: next(iter(saved_steps(workdir)), None))


def newest_config(workdir: pathlib.Path) -> dict | None:
  """Returns the item `config` of the newest undamaged checkpoint, with an additional key `step`.

  Returns None if there is no such checkpoint.
  """

  def find():
    for step in saved_steps(workdir):
      with contextlib.suppress(items.Damaged):
        return read_item(workdir, step, 'config') | {'step': step}
    return None

  return from_first(find)


def restore_item(workdir: pathlib.Path, step: int, item: str):
  """Returns one item (part) of a checkpoint: `config`, `params`, `state` or `names`.

  `config` is a dict, and each other item is a tree of NumPy arrays. For checkpoints of version
  0.1.0, the item `names` is None.

  Raises:
    Damaged: the item is invalid, or has changed since it was saved.
  """
  return from_first(lambda: read_item(workdir, step, item))


def restore_weights(workdir: pathlib.Path, step: int) -> dict | None:
  """Returns a checkpoint's weights for inference (NumPy), or None if the checkpoint is damaged.

  If the checkpoint is damaged, the log names the damage.
  """

  def read():
    try:
      return read_weights_of(workdir, step)
    except items.Damaged as error:  # caught here: other processes get only its text, not its type
      log.warning('%s', error)
      return None

  return from_first(read)


def read_weights_of(workdir: pathlib.Path, step: int) -> dict:
  """Returns a checkpoint's EMA weights, or its parameters if the run has no EMA.

  Only the calling process reads the files.

  Raises:
    Damaged: an item is invalid, or has changed since it was saved.
  """
  if read_item(workdir, step, 'config')['config']['ema']:
    return read_item(workdir, step, 'state')['ema']
  return read_item(workdir, step, 'params')


def read_item(workdir: pathlib.Path, step: int, item: str):
  """Returns one item of a checkpoint like `restore_item`, but reads it only in this process."""
  checkpoint = directory(workdir) / str(step)
  has_digests = digests.compare_files(checkpoint, 'config')
  about = items.restored(checkpoint, 'config')
  if not isinstance(about, dict) or not about.keys() >= SAVED:
    raise items.damaged(
      checkpoint, f'its JSON in config/ must have the keys {", ".join(sorted(SAVED))}'
    )
  if has_digests:
    if item == 'config':
      return about
    digests.compare_files(checkpoint, item)
    return items.restored(checkpoint, item)
  # A checkpoint of an older version has checksums of its arrays, or none.
  wanted = about.pop('digests', {})
  if item == 'names' and item not in wanted:
    return None
  found = about if item == 'config' else items.restored(checkpoint, item)
  now = items.digest(found)
  if wanted.get(item, now) != now:
    raise items.damaged(
      checkpoint, f'the content of its folder {item}/ does not match the checksum'
    )
  return found


def set_aside_damaged(workdir: pathlib.Path) -> None:
  """Moves damaged checkpoints to `<workdir>/damaged/`, until the newest remaining one is undamaged.

  Incomplete checkpoints are moved too.

  Raises:
    ValueError: the workdir has complete checkpoints, but all of them are damaged.
  """
  from_first(lambda: _set_aside_damaged(workdir))


def _set_aside_damaged(workdir: pathlib.Path) -> None:
  found = saved_steps(workdir)
  for step in all_steps(workdir):
    try:
      check_files(workdir, step)
      return
    except items.Damaged as error:
      aside = workdir / 'damaged' / f'{step}-{time.time_ns()}'
      with storage.writing(aside):
        bucket.move(directory(workdir) / str(step), aside)
      log.warning('%s The checkpoint was moved to %s.', error, aside)
  if found:
    raise ValueError(
      f'{workdir}: all checkpoints are damaged, and were moved to {workdir}/damaged. Repeat the '
      'command to start from the beginning.'
    )


def check_files(workdir: pathlib.Path, step: int) -> None:
  """Raises `Damaged` if a file of a checkpoint has changed since it was saved, or is missing."""
  if digests.compare_files(directory(workdir) / str(step)):
    read_item(workdir, step, 'config')
    return
  for item in ITEMS:  # a checkpoint of an older version
    read_item(workdir, step, item)


def accuracies(workdir: pathlib.Path) -> dict[int, float]:
  """Returns {step: validation accuracy} for the checkpoints that have an accuracy.

  If images can have several labels, the mean average precision replaces the accuracy. In a run
  without labels, the negative loss replaces the accuracy. The values come from `metrics.jsonl`, or
  from checkpoints of older versions.
  """
  recorded = {}
  for line in writer.read_metrics(workdir):
    if line['split'] == 'val':
      found = [line[key] for key in ('mean_average_precision', 'accuracy') if key in line]
      found += [-line['loss']] if 'loss' in line else []
      recorded[line['step']] = next(iter(found), None)
  found = {}
  for step in saved_steps(workdir):
    with contextlib.suppress(items.Damaged):
      found[step] = read_item(workdir, step, 'config').get('accuracy', recorded.get(step))
  return {step: accuracy for step, accuracy in found.items() if accuracy is not None}


def ranked(accuracies: dict[int, float]) -> list[tuple[int, float]]:
  """Returns pairs `(step, accuracy)`, the best first; of equal accuracies, the newest first."""
  return sorted(accuracies.items(), key=lambda pair: pair[::-1], reverse=True)


def load_checkpoint(
  workdir: pathlib.Path, step: str = 'last', *, whole: bool = False
) -> tuple[int, dict, dict]:
  """Returns a checkpoint for inference: the step, the weights (NumPy) and facts about the run.

  The facts are the content of the item `config`, with two more keys. `names` has the content of the
  item `names`. `calibration` has the fields of the checkpoint's `Calibration`, or None. If the run
  averages its weights, the averaged weights are returned. An adapter is merged into the weights.
  Damaged checkpoints are skipped.

  Args:
    workdir: folder of a training run.
    step: which checkpoint to load: `best`, `last`, a number or empty, as in `preferred`.
    whole: whether to include parameters that inference does not need, e.g. the decoder of MAE.

  Raises:
    ValueError: the workdir has no such checkpoint, or only damaged ones.
  """
  found, params, saved = from_first(lambda: _load(workdir, step))
  return found, params if whole else without_objective(params), saved


def _load(workdir: pathlib.Path, wanted: str) -> tuple[int, dict, dict]:
  known, found = saved_steps(workdir), preferred(workdir, wanted)
  for (step, why), following in zip(found, [*found[1:], None]):
    try:
      config = read_item(workdir, step, 'config') | {'names': read_item(workdir, step, 'names')}
      params = read_weights_of(workdir, step)
      if why:
        log.info('%s: step %d, %s.', workdir, step, why)
      classes = len(config['task'].get('class_names', ()))
      config |= {'calibration': find_calibration(workdir, step, classes)}
      return step, merged(params, config['config']), config
    except items.Damaged as error:
      if saved_steps(workdir) != known:  # training has replaced checkpoints in the meantime
        return _load(workdir, wanted)
      if following is None:
        raise
      log.warning('%s The checkpoint of step %d is used instead.', error, following[0])


def preferred(workdir: pathlib.Path, step: str) -> list[tuple[int, str]]:
  """Returns the checkpoints to try as pairs `(step, reason)`, the preferred one first.

  The reason is a text for the log, e.g. `the last checkpoint`. It is empty, and nothing is logged,
  if no step was asked for and the checkpoint has no validation accuracy.

  Args:
    workdir: folder of a training run.
    step: `best` (by validation accuracy), `last`, a number, or empty. An empty text stands for the
      best checkpoint if any checkpoint has a validation accuracy, otherwise for the last one.

  Raises:
    ValueError: the workdir has no such checkpoint.
  """
  found = saved_steps(workdir)
  if not found:
    problem = f'no checkpoint in {directory(workdir)}'
    if not workdir.exists():
      problem = 'no checkpoint, because there is no such folder'
    raise ValueError(
      f'{workdir}: {problem}. Use the --workdir of a run that has saved a checkpoint. A run saves '
      'one every checkpoint_every steps and at the end.'
    )
  if step == 'last':
    return [(n, 'the last checkpoint') for n in found]
  if step in ('best', ''):
    scores = ranked(accuracies(workdir))
    task = read_item(workdir, scores[0][0], 'config')['task'] if scores else {}
    measure = 'mean average precision' if task.get('multi_label') else 'accuracy'
    labels = bool(task.get('class_names'))
    shown = lambda score: f'{measure} {score:.2%}' if labels else f'loss {-score:.4f}'
    best = [
      (n, f'validation {shown(score)}, the best of the {len(scores)} checkpoint(s) kept')
      for n, score in scores
    ]
    if step == 'best' and not best:
      raise ValueError(
        f'--step=best: no checkpoint of {workdir} has a validation accuracy. Use --step=last, or '
        'train with a data.val_split.'
      )
    return best if step == 'best' else best + [(n, '') for n in found if n not in dict(best)]
  if not step.isdecimal() or int(step) not in found:
    there = ', '.join(str(n) for n in sorted(found))
    raise ValueError(
      f'--step={step}: {workdir} has the checkpoints {there}. Use --step=best, '
      '--step=last, or --step with one of these numbers.'
    )
  return [(int(step), 'as requested')]
