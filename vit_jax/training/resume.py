"""Decides whether and how the run in a workdir resumes, and writes the first files of a run."""

import dataclasses
import logging
import os
import pathlib
import re
import sys

from ml_collections import ConfigDict
import numpy as np

from vit_jax import config as config_lib
from vit_jax import storage
from vit_jax.bucket import kept_lists
from vit_jax.check import check
from vit_jax.data import Split, check_apart, save_png
from vit_jax.distributed import check_same, from_first, is_first
from vit_jax.experiment import Experiment
from vit_jax.keys import KEYS
from vit_jax.optim import num_steps
from vit_jax.workdir import (
  Task,
  latest_step,
  newest_config,
  read_json,
  restore_item,
  set_aside_damaged,
  write_json,
)

log = logging.getLogger(__name__)

LISTS = 'lists'  # folder in the workdir for the lists of images in buckets
OWN = ('data.dir', 'data.workers', 'data.threads')  # keys that may differ between processes


def check_in_all_processes(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Checks the config and the workdir, and that all processes have the same config.

  The keys in `OWN` can have different values in different processes.

  Raises:
    ValueError: the config is invalid or differs between processes, or the workdir is inside the
      image folder, so that pictures in the workdir would become training data.
  """
  check(config)
  check_apart(config.data.source, config.data.dir, workdir)
  mine = config_lib.flatten(config)
  check_same('config', {key: mine[key] for key in mine if key not in OWN})


def begin(
  config: ConfigDict, workdir: pathlib.Path
) -> tuple[dict | None, ConfigDict | None, tuple[int, ...]]:
  """Checks that a config can start or resume a run in a workdir, and reads what the run has saved.

  The workdir must be locked. Damaged checkpoints are moved away.

  Returns:
    The content of `result.json`; None if the run is not finished.
    The saved config; None if the workdir has no checkpoint.
    The last step of each earlier learning-rate cycle (see `add_cycle`).

  Raises:
    ValueError: this config cannot resume the run in the workdir, or the workdir is not writable.
  """
  set_aside_damaged(workdir)
  start, finished, saved, cycles = latest_step(workdir), None, None, ()
  if start is not None:
    item = restore_item(workdir, start, 'config')
    with config_lib.naming_imports(item):
      saved = config_lib.from_dict(item['config'])
    # `splitting.decided` checks data.cache later, when the data is open.
    config_lib.check_same_run(saved, config, workdir, free=('data.cache',))
    config = with_saved(config, saved)
    cycles = add_cycle(config, item, start, workdir)
    finished = from_first(lambda: finished_result(config, workdir))
    if finished and finished.get('steps') != start:  # the last checkpoint is missing
      finished = None
  if not finished:
    from_first(lambda: storage.check_folder(workdir))
    if start is not None:
      check_rules(item, workdir)
  return finished, saved, cycles


def with_saved(config: ConfigDict, saved: ConfigDict) -> ConfigDict:
  """Returns the config, in which keys without a value have their saved value.

  For a resumed run, None does not mean that the run chooses the value again, because a repeated
  command must compute the same steps. The log says so for the keys that the user may change.
  """
  values = config_lib.flatten(saved)
  left = sorted(key for key in config_lib.unset(config) if KEYS[key].may_change)
  kept = [f'{key}={values[key]}' for key in left if values[key] is not None]
  if kept:
    log.info('Keys without a value keep the value of the run: %s.', ', '.join(kept))
  return config_lib.fill(config, values)


def check_rules(item: dict, workdir: pathlib.Path) -> None:
  """Raises ValueError for runs of version 0.1.0 that this version would train differently.

  This check does not look at the data. `opening.from_config` later rejects all runs of version
  0.1.0 on image folders, because version 0.1.0 divided image folders differently into training and
  held-out files. `check_same_data` rejects runs whose images would have another size in memory.

  Args:
    item: JSON of the newest checkpoint (its item `config`). It has no key `version` if version
      0.1.0 wrote it.
    workdir: folder of the run.
  """
  optimizer, data = item['config']['optimizer'], item['config']['data']
  changed = {
    'Muon applied no weight decay to the embedding and the head': optimizer['name'] == 'muon',
    'data.crop did not crop all images': data['cache'] == 'memory' and data['crop'] < 1,
  }
  reasons = [reason for reason, depends in changed.items() if depends]
  if 'version' not in item and reasons:
    raise of_old_rules(workdir, reasons)


def of_old_rules(workdir: pathlib.Path, reasons: list[str]) -> ValueError:
  """Returns the error for a run of version 0.1.0 that this version would train differently."""
  return ValueError(
    f'{workdir} holds a run of version 0.1.0, in which {" and ".join(reasons)}. The run can be '
    'evaluated and used, but not resumed. Start a new run in another --workdir. To start it from '
    f'the weights of the old run, add --config.init={workdir}'
  )


def add_cycle(config: ConfigDict, item: dict, start: int, workdir: pathlib.Path) -> tuple[int, ...]:
  """Returns the last step of each earlier cycle of the run.

  In a cycle, the learning rate rises and decays once. A run starts with one cycle. If a finished
  run gets more epochs, a new cycle begins. Example: a run was finished at step 100 and is now
  extended to step 150. The result is then `(100,)`.

  Args:
    config: the given config.
    item: JSON of the newest checkpoint (its item `config`).
    start: step of the newest checkpoint.
    workdir: folder of the run.

  Raises:
    ValueError: the config changes the epochs of an unfinished run, or reduces the epochs of a
      finished run.
  """
  saved, examples = config_lib.from_dict(item['config']), item['task']['train_examples']
  then, now = num_steps(saved, examples), num_steps(config, examples)
  cycles = tuple(item.get('cycles', ()))
  if now == then:
    return cycles
  if start < then:
    raise ValueError(
      f'{workdir} is at step {start} of {then}: epochs={saved.epochs:g} cannot become '
      f'{config.epochs:g} before the run is finished, because the learning rate of each step '
      f'depends on epochs. Resume with --config.epochs={saved.epochs:g}. You can raise epochs when '
      'the run is finished.'
    )
  if now < start:
    raise ValueError(
      f'{workdir} is already at step {start}, but a run with epochs={config.epochs:g} ends at step '
      f'{now}. '
      f'Set epochs to more than {saved.epochs:g}, or use another --workdir.'
    )
  return (*cycles, then) if then else ()


def check_same_data(experiment: Experiment, workdir: pathlib.Path) -> None:
  """Raises ValueError if the data changed since the run in the workdir began."""
  step = latest_step(workdir)
  if step is None:
    return
  item = restore_item(workdir, step, 'config')
  saved = Task.load(item['task'])
  names = [field.name for field in dataclasses.fields(Task)]
  values = {name: (getattr(saved, name), getattr(experiment.task, name)) for name in names}
  changed = {name: pair for name, pair in values.items() if pair[0] != pair[1] and '' not in pair}
  if changed.keys() == {'stored_size'} and 'version' not in item:
    raise of_old_rules(workdir, ['small images in memory were enlarged in another way'])
  for name, (before, now) in changed.items():
    change = f'{name} was {before}, is {now}'
    if name == 'fingerprint':
      change = 'the number of training files is the same, but their names or classes changed'
    raise ValueError(
      f'{workdir}: the data of {experiment.config.data.source} changed since this run began '
      f'({change}). Restore the data, or use another --workdir.'
    )


def check_same_teacher(experiment: Experiment, workdir: pathlib.Path) -> None:
  """Raises ValueError if the teacher changed since the run began, or differs between processes."""
  if experiment.teacher is None:
    return
  path, now = experiment.config.distill.teacher, experiment.teacher.digest
  check_same('teacher', {path: now})
  step = latest_step(workdir)
  before = now if step is None else restore_item(workdir, step, 'config')['teacher']
  if before != now:
    raise ValueError(
      f'{workdir}: the weights of distill.teacher={path} changed since this run began (SHA-256 was '
      f'{before[:12]}..., is {now[:12]}...). Restore the weights, or use another --workdir.'
    )


def saved_config(workdir: pathlib.Path, overrides: dict[str, str]) -> ConfigDict:
  """Returns the config of the run in a workdir, after applying overrides.

  The config comes from the newest checkpoint, or from `config.json` if there is no checkpoint yet.
  If a finished run was extended to more epochs and has not saved a checkpoint since then, the
  number of epochs comes from `config.json`.

  Args:
    workdir: folder of the run.
    overrides: dotted keys and their values as text.

  Raises:
    ValueError: the workdir holds no run, or the config with the overrides is not valid.
  """
  item = newest_config(workdir)
  written = from_first(lambda: read_json(workdir / 'config.json'))
  saved = item['config'] if item else written
  if saved is None:
    raise ValueError(
      f'{workdir} holds no run to resume: set --config to start one, e.g. configs/digits.py.'
    )
  with config_lib.naming_imports(item or {}):
    if item and written:
      steps = num_steps(config_lib.from_dict(saved), item['task']['train_examples'])
      if item['step'] == steps:  # the run is finished, so only a cycle of more epochs can follow
        saved = saved | {'epochs': max(saved['epochs'], written.get('epochs', 0))}
    config = config_lib.override_all(config_lib.from_dict(saved), overrides)
    check(config)
  return config


def finished_result(config: ConfigDict, workdir: pathlib.Path) -> dict | None:
  """Returns the content of `result.json`; None if the file is missing, damaged or out of date.

  The file is out of date if its run had a different value of `epochs` or a different test split
  than `config`.
  """
  result = read_json(workdir / 'result.json')
  try:
    then = config_lib.from_dict(result['config'])
  except (TypeError, KeyError, ValueError):  # missing, damaged, or from another version
    return None
  same = then.epochs == config.epochs and then.data.eval_split == config.data.eval_split
  return result if same else None


def record(exp: Experiment, workdir: pathlib.Path, test: Split | None = None) -> None:
  """Checks data and teacher, then writes the first files of a run; the workdir must be locked.

  The files are `config.json`, the lists of images in buckets, and some test images in `examples/`.

  Raises:
    ValueError: the data or the teacher changed since the run began.
  """
  check_same('data', dataclasses.asdict(exp.task))
  check_same_data(exp, workdir)
  check_same_teacher(exp, workdir)
  if is_first():
    write_json(workdir / 'config.json', config_lib.to_dict(exp.config))
    for name, content in kept_lists().items():
      with storage.replacing(workdir / LISTS / name) as partial:
        partial.write_bytes(content)
    if test is not None:
      save_examples(exp, test, workdir)


def save_examples(exp: Experiment, test: Split, workdir: pathlib.Path) -> None:
  """Saves the first test images as PNG files, so that users can try `--mode=predict` on them."""
  folder = workdir / 'examples'
  folder.mkdir(parents=True, exist_ok=True)
  first = test.some(range(min(8, len(test))))
  for earlier in folder.glob('[0-7]_*.png'):  # they can show another split
    earlier.unlink()
  for i, (image_HWC, label) in enumerate(zip(first.image_NHWC, first.label_N)):
    known = sys.getfilesystemencoding()  # this encoding can lack letters of a class name
    labels = np.flatnonzero(label) if exp.task.multi_label else [label][: len(exp.task.class_names)]
    name = ' '.join(exp.task.class_names[i] for i in labels) or 'no label'
    name = re.sub(r'\W+', '-', name.encode(known, 'replace').decode(known))
    name = os.fsencode(name)[:100].decode(known, 'ignore')  # file names have at most 255 bytes
    save_png(image_HWC, folder / f'{i}_{name}.png')
