"""How a run trains: its steps, cycles, image sizes, schedule and optimizer."""

import dataclasses
import itertools
import logging
import math

from ml_collections import ConfigDict
import optax

from vit_jax.data import Split
from vit_jax.names import pair
from vit_jax.optim import optimizers, schedules
from vit_jax.optim.schedules import make_schedule

log = logging.getLogger(__name__)

FEW_STEPS = 100  # of training; with fewer, a person is warned

# The last step of each part of a run, and the (height, width) of its images.
Stages = tuple[tuple[int, tuple[int, int]], ...]

LATER_PEAK = 0.5  # of `optimizer.lr`, to which a cycle that more epochs add warms up


@dataclasses.dataclass(frozen=True)
class Training:
  """What training needs beside the experiment: data, steps, optimizer."""

  train: Split
  val: Split | None
  test: Split
  steps: int
  cycles: tuple[int, ...]  # the last steps of the earlier cycles, to which more epochs added one
  early_steps: int  # with strong augmentations: until `augment.off_for_last` of the first cycle
  stages: Stages
  schedule: schedules.Schedule
  optimizer: optax.GradientTransformation
  params: dict | None  # to start from: those of `init`; None for random ones


def plan_training(
  config: ConfigDict,
  train: Split,
  val: Split | None,
  test: Split,
  params: dict | None,
  cycles: tuple[int, ...] = (),
) -> Training:
  """How the config trains on these examples, from these weights, after earlier cycles.

  Raises:
    ValueError: too few epochs for a step.
  """
  return Training(train, val, test, params=params, **training_recipe(config, len(train), cycles))


def training_recipe(config: ConfigDict, examples: int, cycles: tuple[int, ...] = ()) -> dict:
  """The fields of `Training` that depend on the config and the number of training examples.

  The first cycle is the run as it was begun. Each later one warms up to `LATER_PEAK` of the
  learning rate, then decays like the first; its images are of full size, cropped and flipped only.

  Args:
    config: of the run.
    examples: in the training split.
    cycles: as in `Training`.

  Raises:
    ValueError: too few epochs for a step.
  """
  steps = num_steps(config, examples)
  if config.epochs and not steps:
    raise ValueError(
      f'epochs={config.epochs} of {examples} examples in batches of {config.batch_size} is no '
      'step at all: train longer or make batch_size smaller.'
    )
  arguments = dict(config.optimizer)
  peak, parts = arguments.pop('lr'), []
  for begin, end in itertools.pairwise((0, *cycles, steps)):
    warmup = warmup_steps(config, examples, end - begin)
    parts.append(make_schedule(config.schedule.name, peak, end - begin, warmup))
    peak = LATER_PEAK * config.optimizer.lr
  schedule = optax.join_schedules(parts, cycles) if cycles else parts[0]
  first = (*cycles, steps)[0]
  return {
    'steps': steps,
    'cycles': cycles,
    'early_steps': round((1 - config.augment.off_for_last) * first),
    'stages': (*image_stages(config, first)[:-1], (steps, pair(config.data.image_size))),
    'schedule': schedule,
    'optimizer': optimizers.make_optimizer(schedule=schedule, **arguments),
  }


def image_stages(config: ConfigDict, steps: int) -> Stages:
  """The parts of a run of so many steps, by the size of its images.

  Raises:
    ValueError: a size whose width, in proportion, is no whole number.
  """
  height, width = pair(config.data.image_size)
  found = []
  for share, size in zip(config.progressive.until, config.progressive.sizes):
    across, rest = divmod(size * width, height)
    if rest:
      raise ValueError(
        f'progressive.sizes: {size} of images of {height}x{width} pixels leaves a width of '
        f'{size * width / height:g}.'
      )
    found.append((round(share * steps), (size, across)))
  return (*found, (steps, (height, width)))


def num_steps(config: ConfigDict, examples: int) -> int:
  """Number of steps of a run on so many training examples."""
  return round(config.epochs * (examples / config.batch_size))


def warmup_steps(config: ConfigDict, examples: int, steps: int) -> int:
  """Number of warm-up steps in a cycle of so many steps."""
  return min(round(config.schedule.warmup * (examples / config.batch_size)), steps // 5)


def announce(config: ConfigDict, examples: int, found: tuple[int, int] | None) -> None:
  """Logs how long a run is, and warns where it is too short to learn much.

  Args:
    config: of the run.
    examples: that it trains on.
    found: (height, width) of the first of them as it was found; None where unknown.
  """
  steps = num_steps(config, examples)
  if not steps:
    return
  size, batch_size = pair(config.data.image_size), config.batch_size
  own = '' if found in (None, size) else ' (the first file has {}x{})'.format(*found)
  log.info(
    'Training on %s images of %dx%d pixels%s: %s steps in batches of %d, %d of them warm-up.',
    f'{examples:,}', *size, own, f'{steps:,}', batch_size,
    warmup_steps(config, examples, steps),
  )  # fmt: skip
  if steps < FEW_STEPS:
    smaller = int(config.epochs * examples / FEW_STEPS)
    ways = [f'a smaller batch_size (e.g. {smaller})'] * (smaller > 0)
    ways.append(f'more epochs (e.g. {math.ceil(FEW_STEPS * batch_size / examples)})')
    log.warning('%d steps are too few to learn much: set %s.', steps, ' or '.join(ways))
