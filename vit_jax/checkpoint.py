"""Checkpoints with orbax, and orbax only here.

A workdir keeps them in `checkpoints/<step>/`, each with four items: `params`, `state`
(step, optimizer state, averages), `names` (what the training files are known by, `trained.py`) and
`config` (JSON: version, config, what the data told: class names, channels, stored size, the last
steps of the run's earlier cycles, and digests of all items).

Decisions:
  * Arrays are saved whole and as NumPy arrays, by the first process. Saved as JAX arrays they carry
    their devices, and orbax then refuses to restore them, without a target, on a machine with
    fewer. So the same files come of a laptop and of a pod, and open on either.
  * A checkpoint appears under its name only when it is whole (orbax renames it). What happens to
    it afterwards its digests tell, which are compared whenever it is read.
"""

import contextlib
import dataclasses
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
from orbax.checkpoint import checkpoint_managers as policies

from vit_jax import cluster, output, writer
from vit_jax.state import TrainState

log = logging.getLogger(__name__)

ITEMS = ('config', 'params', 'state', 'names')
SAVED = {'config', 'task', 'seconds'}  # keys of the item `config`
ALONE = ocp.options.MultiprocessingOptions(active_processes={0})  # the first process


class Damaged(ValueError):
  """A checkpoint that can't be read, or not as it was written."""


class Checkpoints:
  """The checkpoints of one workdir, open for writing; a context manager.

  In several processes all call its methods, in the same order.
  """

  def __init__(self, workdir: pathlib.Path, keep: int = 2):
    """Keeps the newest `keep`, and the best by the accuracy given to `save`, if any is."""
    self._workdir = workdir
    self._accuracies, self._manager = {}, None
    if cluster.is_first():
      self._accuracies = accuracies(workdir)
      self._manager = manager(workdir, keep, self._accuracies)

  def __enter__(self):
    be_silent()
    return self

  def __exit__(self, kind, *_):
    if self._manager is None:
      return
    try:
      self._manager.close()  # waits until the last one is written
    except Exception as error:  # orbax and tensorstore raise many kinds
      if kind is None:
        raise unwritten(self._workdir, error) from error

  def latest(self) -> int | None:
    """The newest step; None where there is none."""
    return latest_step(self._workdir)

  def rate(self, step: int, accuracy: float | None) -> None:
    """Adds the accuracy of a checkpoint that was saved before its evaluation."""
    if accuracy is not None:
      self._accuracies[step] = accuracy

  def best(self) -> int:
    """The step of the best checkpoint, of those that have an accuracy."""
    return ranked(self._accuracies)[0][0]

  def save(self, state: TrainState, config: dict, accuracy: float | None = None) -> None:
    """Copies the state to the host, then writes it while training goes on.

    Args:
      state: of the run.
      config: the item `config`, and in it the item `names`.
      accuracy: that the best checkpoint is chosen by; None for none.

    Raises:
      FloatingPointError: a parameter is not finite; nothing is written.
      output.Unwritten: this one, or the one before it, can't be written.
    """
    host = cluster.to_host(state)
    step = int(host.step)
    for path, leaf in jax.tree_util.tree_leaves_with_path(host.params):
      if not np.isfinite(leaf).all():
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        raise FloatingPointError(f'Parameter {name} is not finite after step {step}.')
    if self._manager is None:
      return
    names = config['names']
    config = {key: value for key, value in config.items() if key != 'names'}
    items = {'params': host.params, 'state': rest(host), 'names': names}
    if accuracy is not None:
      config = config | {'accuracy': accuracy}
      self._accuracies[step] = accuracy
    config = json.loads(json.dumps(config))  # tuples are lists, as they will be read
    digests = {name: digest(item) for name, item in (items | {'config': config}).items()}
    try:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          params=ocp.args.StandardSave(items['params']),
          state=ocp.args.StandardSave(items['state']),
          names=ocp.args.StandardSave(names),
          config=ocp.args.JsonSave(config | {'digests': digests}),
        ),
      )
    except Exception as error:  # orbax and tensorstore raise many kinds
      raise unwritten(self._workdir, error) from error

  def wait(self) -> None:
    """Until the last checkpoint is on disk; all processes wait for it.

    Raises:
      output.Unwritten: it can't be written; in several processes a ValueError.
    """
    cluster.from_first(self._wait)

  def _wait(self):
    try:
      self._manager.wait_until_finished()
    except Exception as error:  # orbax and tensorstore raise many kinds
      raise unwritten(self._workdir, error) from error

  def restore(self, like: TrainState) -> tuple[list[np.ndarray], dict]:
    """The newest state, and its `config` item.

    Args:
      like: a state of the same shapes, which may be abstract.

    Returns:
      The state's arrays on the host, in the order of `like`'s leaves.
    """
    return cluster.from_first(lambda: self._restore(like))

  def _restore(self, like):
    blank = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), (like.params, rest(like)))
    args = ocp.args.Composite(
      params=ocp.args.StandardRestore(blank[0]),
      state=ocp.args.StandardRestore(blank[1]),
      config=ocp.args.JsonRestore(),
    )
    step = self._manager.latest_step()
    try:
      items = self._manager.restore(step, args=args)
    except Exception as error:  # orbax and tensorstore raise many kinds
      raise damaged(self._workdir, step, error) from error
    return jax.tree.leaves(like.replace(params=items.params, **items.state)), items.config


@dataclasses.dataclass
class Best(policies.PreservationPolicy):
  """Keeps the first checkpoint of those `ranked`; `accuracies` by step.

  orbax's own policy knows only what was saved since it was opened.
  """

  accuracies: dict[int, float]

  def should_preserve(self, checkpoints, *, context):
    del context
    there = {c.step for c in checkpoints}
    best = next((step for step, _ in ranked(self.accuracies) if step in there), None)
    return [c.step == best for c in checkpoints]


def ranked(accuracies: dict[int, float]) -> list[tuple[int, float]]:
  """`(step, accuracy)`, the highest accuracy first, and of equal ones the newest."""
  return sorted(accuracies.items(), key=lambda pair: pair[::-1], reverse=True)


def accuracies(workdir: pathlib.Path) -> dict[int, float]:
  """The validation accuracy of each checkpoint that has one.

  A checkpoint that was saved before its evaluation has it in `metrics.jsonl` alone.
  """
  lines = writer.read_metrics(workdir)
  recorded = {line['step']: line.get('accuracy') for line in lines if line['split'] == 'val'}
  found = {}
  for step in steps(workdir):
    with contextlib.suppress(Damaged):
      found[step] = read(workdir, step, 'config').get('accuracy', recorded.get(step))
  return {step: accuracy for step, accuracy in found.items() if accuracy is not None}


def manager(workdir: pathlib.Path, keep: int, scored: dict[int, float]) -> ocp.CheckpointManager:
  """orbax's, of the first process alone; `scored` are `accuracies`, to which more may come."""
  policy = policies.AnyPreservationPolicy([policies.LatestN(max(keep, 1)), Best(scored)])
  options = ocp.CheckpointManagerOptions(
    preservation_policy=policy,
    cleanup_tmp_directories=True,
    create=False,  # which orbax wants of a manager for some of the processes
    multiprocessing_options=ALONE,
  )
  directory(workdir).mkdir(parents=True, exist_ok=True)
  try:
    return ocp.CheckpointManager(directory(workdir), options=options)
  except Exception as error:  # orbax raises many kinds
    raise ValueError(
      f'orbax can not open {directory(workdir)}: {error}. If one of the checkpoints there is '
      'damaged, move it away; the same command goes on from the others.'
    ) from error


def rest(state: TrainState) -> dict:
  """The item `state`: all but the parameters."""
  return {'step': state.step, 'opt_state': state.opt_state, 'ema': state.ema}


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


def directory(workdir: pathlib.Path) -> pathlib.Path:
  """Where a workdir keeps its checkpoints; orbax wants it absolute."""
  return pathlib.Path(workdir).expanduser().resolve() / 'checkpoints'


def steps(workdir: pathlib.Path) -> list[int]:
  """Those of its checkpoints, the newest first. Writes nothing."""
  if not directory(workdir).is_dir():
    return []
  return sorted(ocp.utils.checkpoint_steps(directory(workdir)), reverse=True)


def latest_step(workdir: pathlib.Path) -> int | None:
  """The newest checkpoint; None where there is none. Writes nothing."""
  return cluster.from_first(lambda: next(iter(steps(workdir)), None))


def newest_config(workdir: pathlib.Path) -> dict | None:
  """The newest item `config` that is whole, and its `step`; None where there is none."""

  def find():
    for step in steps(workdir):
      with contextlib.suppress(Damaged):
        return read(workdir, step, 'config') | {'step': step}
    return None

  return cluster.from_first(find)


def restore_item(workdir: pathlib.Path, step: int, item: str):
  """One item of a checkpoint as it was saved, arrays as NumPy; None for the `names` of 0.1.0.

  Raises:
    Damaged: it can't be read, or is not as it was saved.
  """
  return cluster.from_first(lambda: read(workdir, step, item))


def read(workdir: pathlib.Path, step: int, item: str):
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


def unwritten(workdir: pathlib.Path, error: Exception) -> output.Unwritten:
  """The error for a checkpoint that can't be written."""
  first = f'{type(error).__name__}: {(str(error).splitlines() or [""])[0][:200]}'
  return output.unwritten(directory(workdir), output.reason(error) or first)


def set_aside_damaged(workdir: pathlib.Path) -> None:
  """Moves checkpoints newer than the newest whole one into `<workdir>/damaged/`.

  Raises:
    ValueError: none is whole.
  """
  cluster.from_first(lambda: _set_aside_damaged(workdir))


def _set_aside_damaged(workdir: pathlib.Path) -> None:
  found = steps(workdir)
  for step in found:
    try:
      for item in ITEMS:
        read(workdir, step, item)
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


def load(workdir: pathlib.Path, step: str = 'last') -> tuple[int, dict, dict]:
  """A checkpoint for inference: step, weights (NumPy), `config` item and in it `names`.

  The weights are the averaged ones where the run keeps them. A damaged checkpoint is skipped.

  Args:
    workdir: of a training run.
    step: which checkpoint, as in `preferred`.

  Raises:
    ValueError: the workdir holds no such checkpoint.
  """
  found = cluster.from_first(lambda: _load(workdir, step))
  return tuple(found)


def _load(workdir: pathlib.Path, step: str) -> tuple[int, dict, dict]:
  found = preferred(workdir, step)
  for (step, why), following in zip(found, [*found[1:], None]):
    try:
      config = read(workdir, step, 'config') | {'names': read(workdir, step, 'names')}
      if config['config']['ema'] > 0:
        params = read(workdir, step, 'state')['ema']
      else:
        params = read(workdir, step, 'params')
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
  found = steps(workdir)
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
