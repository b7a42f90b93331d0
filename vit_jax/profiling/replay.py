"""Repeats training from one checkpoint to the next, and compares the result bit for bit.

A defective device can compute wrong numbers without raising an error. The repeated steps then give
a different train state than the saved one. Steps that are not deterministic also give a different
state. Nothing is written, except a teacher's features if `<workdir>/features/` does not contain
them.

Decisions:
  * Arrays are compared on the devices that hold them, so no process needs a whole array.
  * The order of sums depends on the number of devices. Therefore, if the run used other devices,
    relative differences up to `ROUNDING` are attributed to rounding.
"""

import collections
from collections.abc import Iterator, Mapping
import dataclasses
import logging
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from vit_jax import config as config_lib
from vit_jax import experiment, opening
from vit_jax.check import check
from vit_jax.distributed import Preempted, Preemption, from_first, to_host
from vit_jax.evaluation import with_teacher
from vit_jax.training import (
  Run,
  check_same_data,
  check_same_teacher,
  devices_of,
  prepared,
  state_shapes,
)
from vit_jax.workdir import Silent, restore_item, restore_state, saved_steps, training_files_of

log = logging.getLogger(__name__)

# Largest relative difference that rounding explains: the norm of the difference between repeated
# and saved values, divided by the norm of the saved values. Both norms are over a part of the train
# state, e.g. all parameters (`part_of`), because a single array can differ by more. For example,
# the exact gradient of the key bias is zero, so the computed gradient is only rounding errors.
ROUNDING = 0.02
MOST = 5  # maximum number of arrays that a message names


@dataclasses.dataclass(frozen=True)
class Verdict:
  """Result of `verify`.

  Attributes:
    steps: steps of the two checkpoints between which training was repeated, the older one first.
    same: whether the repeated train state equals the saved one. If the run used other devices, a
      difference by rounding is allowed.
    text: the result in words; one line for each finding.
  """

  steps: tuple[int, int]
  same: bool
  text: str


class Replay(Run):
  """A training run that does not evaluate, and writes neither checkpoints nor logs."""

  def due(self, step):
    return set()

  def save(self, train_state):
    """Raises `Preempted`; the loop calls this function only after a stop signal."""
    raise Preempted('--mode=verify was stopped. Repeat the command to start from the beginning.')


def verify(workdir: pathlib.Path, overrides: Mapping[str, str] = {}) -> Verdict:
  """Repeats the steps between a run's two newest checkpoints, and compares the train states.

  Args:
    workdir: folder of the run. The only files that are written are a teacher's features, if the
      workdir does not contain them yet.
    overrides: config keys to change, e.g. `data.dir`, and their values as text.

  Raises:
    ValueError: the workdir does not have two checkpoints, or the steps cannot be repeated.
    Preempted: the process was asked to stop.
  """
  first, last = two_checkpoints(workdir)
  item = restore_item(workdir, last, 'config')
  config, cycles = config_of(item, overrides), tuple(item.get('cycles', ()))
  check_repeatable(workdir, config, cycles, first, last)
  with config_lib.naming_imports(item):
    saved = config_lib.from_dict(item['config'])
  config_lib.check_same_run(saved, config, workdir, free=('data.cache',))
  if config.epochs != saved.epochs:  # `check_same_run` allows this for a finished run
    raise ValueError(
      f'epochs={config.epochs}: --mode=verify repeats steps of this run, which has '
      f'epochs={saved.epochs:g}. Remove --config.epochs.'
    )
  exp, training = opening.from_config(config, saved, cycles, training_files_of(workdir))
  check_same_data(exp, workdir)
  check_same_teacher(exp, workdir)
  mesh = experiment.mesh_for(exp.config)
  start = restore_item(workdir, first, 'config')
  exp = prepared(exp, training, mesh, start)
  exp, training = with_teacher(exp, training, mesh, workdir / 'features')
  like = state_shapes(exp, training, mesh)
  begin, _ = restore_state(workdir, first, like)
  with Preemption() as preemption:
    run = Replay(exp, training, mesh, Silent(workdir, first), None, preemption, {})
    log.info('Repeating steps %d to %d.', first + 1, last)
    ended, _ = run.loop(begin, first, last)
  wanted, _ = restore_state(workdir, last, like)
  now = devices_of(mesh)
  then = next((x for x in (item.get('devices'), start.get('devices')) if x != now), now)
  return judged((first, last), ended, wanted, then, now)


def two_checkpoints(workdir: pathlib.Path) -> tuple[int, int]:
  """Returns the steps of the two newest checkpoints, the older one first.

  Raises:
    ValueError: the workdir has fewer than two checkpoints.
  """
  found = from_first(lambda: saved_steps(workdir))
  if len(found) < 2:
    raise ValueError(
      f'--mode=verify repeats the steps between two checkpoints, but {workdir} has {len(found)}. '
      'Set keep_checkpoints to at least 2. Then train further, or save more often '
      '(checkpoint_every).'
    )
  return found[1], found[0]


def config_of(item: Mapping, overrides: Mapping[str, str]) -> ConfigDict:
  """Returns the checked config of a checkpoint, with overrides applied.

  Args:
    item: JSON of the checkpoint (its item `config`), from `restore_item`.
    overrides: config keys to change, and their values as text.

  Raises:
    ValueError: the config with the overrides is not valid.
  """
  with config_lib.naming_imports(item):
    config = config_lib.override_all(config_lib.from_dict(item['config']), dict(overrides))
    check(config)
  return config


def check_repeatable(
  workdir: pathlib.Path, config: ConfigDict, cycles: tuple[int, ...], first: int, last: int
) -> None:
  """Raises ValueError if the steps between two checkpoints cannot be repeated.

  The steps cannot be repeated if the run trains or computes only a head, or if a new learning-rate
  cycle began between the two checkpoints.

  Args:
    workdir: folder of the run.
    config: config of the run.
    cycles: last step of each earlier learning-rate cycle.
    first: step of the older checkpoint.
    last: step of the newer checkpoint.
  """
  if config.freeze or config.classifier:
    raise ValueError(
      f'--mode=verify repeats training steps, but {workdir} holds a run that trains '
      'only a head (key freeze), or computes a head without training (key classifier). Repeat the '
      'run in another --workdir and compare the results.'
    )
  if cycles and first < cycles[-1]:
    raise ValueError(
      f'--mode=verify cannot repeat steps {first + 1} to {last} of {workdir}: a new '
      f'learning-rate cycle began after step {cycles[-1]}. Try again after the next checkpoint.'
    )


def judged(
  steps: tuple[int, int], ended, wanted, then: Mapping | None, now: Mapping[str, object]
) -> Verdict:
  """Compares the repeated train state with the saved one, and returns the `Verdict`.

  Args:
    steps: steps of the two checkpoints, the older one first.
    ended: the repeated train state.
    wanted: the saved train state, placed on the devices like `ended`.
    then: devices of one of the checkpoints, from `devices_of`; None if they were not recorded. If
      only one checkpoint was saved on other devices than `now`, these are its devices.
    now: devices on which the steps were repeated, from `devices_of`.
  """
  found = differences(ended, wanted)
  shown = lambda devices: ', '.join(f'{key}={value}' for key, value in devices.items())
  span = f'steps {steps[0] + 1} to {steps[1]}'
  changed = {name: each for name, each in found.items() if each.bits}
  if not changed:
    return Verdict(steps, True, f'Repeating {span} gave the same {len(found)} arrays, bit for bit.')
  worst = np.max([share for _, share in relative(found, ended.params)])  # NaN if one is NaN
  lines = [
    f'{name}: largest difference {each.largest:.3g}, norm of the saved array {each.norm:.3g}'
    for name, each in sorted(changed.items(), key=lambda pair: -pair[1].largest)
  ]
  more = [f'... and {len(lines) - MOST} more'] * (len(lines) > MOST)
  if then != now:
    why = f'The run used other devices ({shown(then)}; now {shown(now)})' if then else (
      'The run did not record its devices'
    )  # fmt: skip
    if worst <= ROUNDING:
      text = (
        f'{why}, so rounding can differ. Repeating {span} gave arrays whose relative difference '
        f'from the saved arrays is at most {worst:.2g}.'
      )
      return Verdict(steps, True, text)
    head = (
      f'{why}. Repeating {span} gave arrays that differ from the saved arrays by more than '
      f'rounding can explain (relative difference above {ROUNDING:g}):'
    )
  else:
    head = (
      f'Repeating {span} gave other numbers in {len(changed)} of {len(found)} arrays. Either '
      'training images have changed, or a device computes wrong numbers, or the steps are not '
      'deterministic (GPUs need --config.deterministic=True from the start). Largest differences:'
    )
  return Verdict(steps, False, '\n'.join([head, *lines[:MOST], *more]))


class Difference(NamedTuple):
  """Difference of two arrays.

  Attributes:
    bits: whether any bit differs.
    largest: largest absolute difference.
    apart: L2 norm of the difference.
    norm: L2 norm of the second array.
  """

  bits: jax.Array | bool
  largest: jax.Array | float
  apart: jax.Array | float
  norm: jax.Array | float


def differences(ended, wanted) -> dict[str, Difference]:
  """Returns {name: `Difference`} for all arrays of two train states.

  Args:
    ended: the repeated train state.
    wanted: the saved train state; `Difference.norm` is the norm of its arrays.
  """
  both = jax.tree.leaves(ended), jax.tree.leaves(wanted)
  compared = to_host(jax.jit(lambda a, b: list(map(compare_arrays, a, b)))(*both))
  paths = jax.tree_util.tree_flatten_with_path(ended)[0]
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): each
    for (path, _), each in zip(paths, compared, strict=True)
  }


def compare_arrays(a: jax.Array, b: jax.Array) -> Difference:
  """Returns the `Difference` of two arrays with the same shape and type."""
  bits = lambda x: x.view(f'uint{8 * x.dtype.itemsize}')
  wide = lambda x: x.astype(jnp.float32).ravel()
  apart = wide(a) - wide(b)
  norms = jnp.linalg.norm(apart), jnp.linalg.norm(wide(b))
  return Difference((bits(a) != bits(b)).any(), jnp.abs(apart).max(initial=0), *norms)


def relative(found: Mapping[str, Difference], params: Mapping) -> Iterator[tuple[str, float]]:
  """Yields `(part, relative difference)` for each part of the train state (see `part_of`).

  The relative difference is the norm of the difference between repeated and saved values of the
  part, divided by the norm of the saved values. If the saved values are all 0, the norm of the
  difference is not divided.

  Args:
    found: result of `differences`.
    params: parameters of the model; only the names at the top level are used.
  """
  parts = collections.defaultdict(list)
  for name, each in found.items():
    parts[part_of(name, params)].append(each)
  for name, arrays in parts.items():
    apart, norm = (np.linalg.norm([x[i] for x in arrays]) for i in (2, 3))
    yield name, float(apart / norm) if norm else float(apart)


def part_of(name: str, params: Mapping) -> str:
  """Returns the part of the train state to which an array belongs.

  For example, the array `opt_state/1/0/mu/block_0/mlp/up/kernel` belongs to the part
  `opt_state/1/0/mu`. The name of a part ends where the name of a parameter begins.
  """
  words = name.split('/')
  inner = (i for i, word in enumerate(words) if word in params)
  return '/'.join(words[: next(inner, len(words))])
