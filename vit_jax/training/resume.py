"""Whether and how the run of a workdir goes on, and the first files that a run writes."""

import dataclasses
import pathlib
import re
import sys

from ml_collections import ConfigDict

from vit_jax import config as config_lib
from vit_jax import storage
from vit_jax.check import check
from vit_jax.data import Split, save_png
from vit_jax.distributed import check_same, from_first, is_first
from vit_jax.experiment import Experiment, Task
from vit_jax.optim import num_steps
from vit_jax.workdir import (
  latest_step,
  newest_config,
  read_json,
  restore_item,
  set_aside_damaged,
  write_json,
)

OWN = ('data.dir', 'data.workers', 'data.threads')  # keys that each process may have its own of


def check_processes(config: ConfigDict) -> None:
  """Raises ValueError where this process was given another config than the first."""
  mine = config_lib.flatten(config)
  check_same('config', {key: mine[key] for key in mine if key not in OWN})


def begin(
  config: ConfigDict, workdir: pathlib.Path
) -> tuple[dict | None, ConfigDict | None, tuple[int, ...]]:
  """Checks a config against the run in a workdir, which must be held.

  Returns:
    The result of a run that is finished, else None; the config of one that has begun, else None;
    and the last steps of its earlier cycles.

  Raises:
    ValueError: the workdir holds another run, or can't be written into.
  """
  set_aside_damaged(workdir)
  start, finished, saved, cycles = latest_step(workdir), None, None, ()
  if start is not None:
    item = restore_item(workdir, start, 'config')
    with config_lib.naming_imports(item):
      saved = config_lib.from_dict(item['config'])
    config_lib.check_same_run(saved, config, workdir)
    cycles = add_cycle(config, item, start, workdir)
    finished = from_first(lambda: finished_result(config, workdir))
    if finished and finished.get('steps') != start:  # its last checkpoint is gone
      finished = None
  if not finished:
    from_first(lambda: storage.check_folder(workdir))
    if start is not None:
      check_rules(item, workdir)
  return finished, saved, cycles


def check_rules(item: dict, workdir: pathlib.Path) -> None:
  """Raises ValueError for a run of 0.1.0 that depends on a rule that has changed since.

  `opening.from_config` refuses those on folders, of which other files are held out now.

  Args:
    item: the item `config` of the newest checkpoint. 0.1.0 wrote no version into it.
    workdir: of the run.
  """
  optimizer, data = item['config']['optimizer'], item['config']['data']
  changed = {
    'Muon decayed neither the embedding nor the head': optimizer['name'] == 'muon',
    'data.crop left some images whole': data['cache'] == 'memory' and data['crop'] < 1,
  }
  reasons = [reason for reason, depends in changed.items() if depends]
  if 'version' not in item and reasons:
    raise ValueError(
      f'{workdir} holds a run of version 0.1.0, in which {" and ".join(reasons)}. It can be '
      'evaluated and used, but not resumed. Start a new run in another --workdir, from these '
      f'weights if you like: --config.init={workdir}'
    )


def add_cycle(config: ConfigDict, item: dict, start: int, workdir: pathlib.Path) -> tuple[int, ...]:
  """The last steps of a run's earlier cycles; more epochs on a finished run add one.

  Args:
    config: the one given.
    item: the item `config` of the newest checkpoint.
    start: the step of this checkpoint.
    workdir: of the run.

  Raises:
    ValueError: other epochs for a run that is not finished, or fewer for one that is.
  """
  saved, examples = config_lib.from_dict(item['config']), item['task']['train_examples']
  then, now = num_steps(saved, examples), num_steps(config, examples)
  cycles = tuple(item.get('cycles', ()))
  if now == then:
    return cycles
  if start < then:
    raise ValueError(
      f'{workdir} is at step {start} of {then}: epochs={saved.epochs:g} can not become '
      f'{config.epochs:g} before the run is finished, because the learning rate of each step '
      f'depends on it. Resume with --config.epochs={saved.epochs:g}; more epochs are possible '
      'once the run is finished.'
    )
  if now < start:
    raise ValueError(
      f'{workdir} is at step {start} already, and epochs={config.epochs:g} ends at step {now}: '
      f'give more than epochs={saved.epochs:g}, or another --workdir.'
    )
  return (*cycles, then) if then else ()


def check_same_data(experiment: Experiment, workdir: pathlib.Path) -> None:
  """Raises ValueError where a run can't go on because its data changed."""
  step = latest_step(workdir)
  if step is None:
    return
  saved = Task.load(restore_item(workdir, step, 'config')['task'])
  for field in dataclasses.fields(Task):
    before, now = getattr(saved, field.name), getattr(experiment.task, field.name)
    if before != now and '' not in (before, now):
      change = f'{field.name} was {before}, is {now}'
      if field.name == 'fingerprint':
        change = 'training files were renamed, or some added and as many removed'
      raise ValueError(
        f'{workdir}: the data of {experiment.config.data.source} changed since this run began '
        f'({change}). Bring it back, or give another --workdir.'
      )


def saved_config(workdir: pathlib.Path, overrides: dict[str, str]) -> ConfigDict:
  """The config of the run in a workdir, with overrides.

  It is that of the newest checkpoint, and `config.json` only where there is no checkpoint. The
  epochs of a cycle that has saved no checkpoint yet are also those of `config.json`.

  Raises:
    ValueError: there is no run.
  """
  item = newest_config(workdir)
  written = from_first(lambda: read_json(workdir / 'config.json'))
  saved = item['config'] if item else written
  if item and written:
    steps = num_steps(config_lib.from_dict(saved), item['task']['train_examples'])
    if item['step'] == steps:  # finished, so nothing but more epochs can have been begun
      saved = saved | {'epochs': max(saved['epochs'], written.get('epochs', 0))}
  if saved is None:
    raise ValueError(
      f'{workdir} holds no run to go on with: give --config, e.g. configs/digits.py.'
    )
  with config_lib.naming_imports(item or {}):
    config = config_lib.override_all(config_lib.from_dict(saved), overrides)
    check(config)
  return config


def finished_result(config: ConfigDict, workdir: pathlib.Path) -> dict | None:
  """`result.json` of a run that has done `config.epochs` and no more; None of any other."""
  result = read_json(workdir / 'result.json')
  try:
    then = config_lib.from_dict(result['config'])
  except (TypeError, KeyError, ValueError):  # none, damaged, or another version's
    return None
  same = then.epochs == config.epochs and then.data.eval_split == config.data.eval_split
  return result if same else None


def record(exp: Experiment, workdir: pathlib.Path, test: Split | None = None) -> None:
  """Writes `config.json`, and `examples/` of the test images, once the data has been checked.

  The workdir must be held: these are the first files that a run writes.

  Raises:
    ValueError: the run can't be resumed with this data.
  """
  check_same('data', dataclasses.asdict(exp.task))
  check_same_data(exp, workdir)
  if is_first():
    write_json(workdir / 'config.json', config_lib.to_dict(exp.config))
    if test is not None:
      save_examples(exp, test, workdir)


def save_examples(exp: Experiment, test: Split, workdir: pathlib.Path) -> None:
  """A few images of the test split as PNG files, to try `predict` on."""
  folder = workdir / 'examples'
  folder.mkdir(parents=True, exist_ok=True)
  first = test.some(range(min(8, len(test))))
  for i, (image_HWC, label) in enumerate(zip(first.image_NHWC, first.label_N)):
    known = sys.getfilesystemencoding()  # which may lack some letters
    name = exp.task.class_names[label].encode(known, 'replace').decode(known)
    name = re.sub(r'\W+', '-', name)
    save_png(image_HWC, folder / f'{i}_{name}.png')
