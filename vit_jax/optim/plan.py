"""Plans the training of a run: its steps, cycles, image sizes, schedule and optimizer."""

import dataclasses
import itertools
import logging
import math

from ml_collections import ConfigDict
import optax

from vit_jax.data import Split
from vit_jax.model import ViT
from vit_jax.names import pair
from vit_jax.optim import optimizers, schedules
from vit_jax.optim.schedules import make_schedule

log = logging.getLogger(__name__)

FEW_STEPS = 100  # number of training steps below which a warning is logged

# For each stage of a run: its last step, and the (height, width) of its images.
Stages = tuple[tuple[int, tuple[int, int]], ...]

LATER_PEAK = 0.5  # peak learning rate of an added cycle, as a fraction of optimizer.lr


@dataclasses.dataclass(frozen=True)
class Training:
  """Everything that training needs in addition to the experiment: data, steps and optimizer.

  Attributes:
    train: split to train on.
    val: validation split, or None.
    test: test split.
    steps: number of steps of the whole run.
    cycles: last step of each earlier learning-rate cycle. If a finished run gets more epochs, a new
      cycle begins, with a new warm-up.
    early_steps: number of steps with mixing and strong augmentations (`Augmentation.strong`). Both
      are off in the last part of the first cycle (the fraction `augment.off_for_last`), and in all
      later cycles.
    stages: pairs (last step, (height, width)), one for each image size of the run. The first stages
      can have smaller images.
    schedule: learning rate of each step.
    optimizer: optimizer of the trained parameters.
    params: weights of `init` to start from; None for random weights.
    teacher: the teacher's parameters on the devices; None if no step needs them.
  """

  train: Split
  val: Split | None
  test: Split
  steps: int
  cycles: tuple[int, ...]
  early_steps: int
  stages: Stages
  schedule: schedules.Schedule
  optimizer: optax.GradientTransformation
  params: dict | None
  teacher: dict | None = None


def plan_training(
  config: ConfigDict,
  train: Split,
  val: Split | None,
  test: Split,
  params: dict | None,
  cycles: tuple[int, ...] = (),
) -> Training:
  """Returns the plan for training with this config on these splits, starting from `params`.

  `Training` documents all arguments except the config.

  Raises:
    ValueError: the epochs are too few for a single step.
  """
  return Training(train, val, test, params=params, **training_recipe(config, len(train), cycles))


def training_recipe(config: ConfigDict, examples: int, cycles: tuple[int, ...] = ()) -> dict:
  """Returns the fields of `Training` that depend on the config and the number of examples.

  A run has one learning-rate cycle. If a finished run gets more epochs, another cycle begins. In
  later cycles, the learning rate rises to `LATER_PEAK` times `optimizer.lr`, then decays as in the
  first cycle. The images of later cycles have full size, and are only cropped and flipped.

  Args:
    config: config of the run.
    examples: number of examples in the training split.
    cycles: last step of each earlier cycle.

  Raises:
    ValueError: the epochs are too few for a single step.
  """
  steps = num_steps(config, examples)
  if config.epochs and not steps:
    raise ValueError(
      f'epochs={config.epochs}, {examples} training examples and batch_size={config.batch_size} '
      'give zero training steps: set more epochs or a smaller batch_size.'
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
  """Returns the `Stages` of a run; images of the last stage have the full size.

  Args:
    config: config of the run. `progressive.sizes` has the heights of the smaller images.
    steps: number of steps of the first cycle.

  Raises:
    ValueError: a height in `progressive.sizes` would need a width that is not a whole number.
  """
  height, width = pair(config.data.image_size)
  found = []
  for share, size in zip(config.progressive.until, config.progressive.sizes):
    across, rest = divmod(size * width, height)
    if rest:
      raise ValueError(
        f'progressive.sizes: at a height of {size} pixels, images of {height}x{width} become '
        f'{size * width / height:g} pixels wide, but the width must be a whole number. Choose a '
        'different height.'
      )
    found.append((round(share * steps), (size, across)))
  return (*found, (steps, (height, width)))


def num_steps(config: ConfigDict, examples: int) -> int:
  """Returns the number of training steps of a run with this number of training examples."""
  return round(config.epochs * (examples / config.batch_size))


def warmup_steps(config: ConfigDict, examples: int, steps: int) -> int:
  """Returns the number of warm-up steps in a cycle of `steps` steps; at most a fifth of `steps`."""
  return min(round(config.schedule.warmup * (examples / config.batch_size)), steps // 5)


def warmup_epochs(config: ConfigDict) -> float:
  """Returns the warm-up in epochs, for a run with only one learning-rate cycle.

  The warm-up is at most a fifth of the run.
  """
  return min(config.schedule.warmup, config.epochs / 5)


def announce(config: ConfigDict, examples: int, found: tuple[int, int] | None) -> None:
  """Logs the length of a run, and warns if it is too short to learn much.

  Args:
    config: config of the run.
    examples: number of training examples.
    found: (height, width) of the first training image before resizing; None if unknown.
  """
  steps = num_steps(config, examples)
  if not steps:
    return
  size, batch_size = pair(config.data.image_size), config.batch_size
  warmup = warmup_steps(config, examples, steps)
  own = '' if found in (None, size) else ' (the first file has {}x{})'.format(*found)
  log.info(
    'Training on %s images of %dx%d pixels%s: %s steps with %d images each; %s.',
    f'{examples:,}', *size, own, f'{steps:,}', batch_size,
    f'the first {warmup} steps are warm-up' if warmup else 'no warm-up',
  )  # fmt: skip
  if steps < FEW_STEPS:
    smaller = int(config.epochs * examples / FEW_STEPS)
    ways = [f'a smaller batch_size (e.g. {smaller})'] * (smaller > 0)
    ways.append(f'more epochs (e.g. {math.ceil(FEW_STEPS * batch_size / examples)})')
    log.warning('%d steps are too few to learn much: set %s.', steps, ' or '.join(ways))


def check_stages(config: ConfigDict, model: ViT) -> None:
  """Raises ValueError if the images of a stage do not divide evenly into patches.

  This function also checks the config key `patch_sizes`.
  """
  (p, q), stages = model.patch_size, image_stages(config, 0)
  for _, (height, width) in stages:
    if height % p or width % q:
      raise ValueError(
        f'progressive.sizes: images of {height}x{width} pixels do not divide into patches of '
        f'{p}x{q}. Choose different sizes.'
      )
  check_patch_sizes(config, model)


def check_patch_sizes(config: ConfigDict, model: ViT) -> None:
  """Raises ValueError if `patch_sizes` does not fit the images or other settings of the run."""
  sizes = config.patch_sizes
  if not sizes:
    return
  name = f'patch_sizes={tuple(sizes)}'
  if len(set(sizes)) < len(sizes) or not all(type(size) is int and size > 0 for size in sizes):
    raise ValueError(f'{name}: expected positive integers (pixels), each only once.')
  for size, (_, image) in itertools.product(sizes, image_stages(config, 0)):
    if any(n % size for n in image):
      raise ValueError(
        f'{name}: images of {image[0]}x{image[1]} pixels do not divide into patches of '
        f'{size}x{size}. Remove this patch size, or change data.image_size or progressive.sizes.'
      )
  for key in ('freeze', 'classifier'):
    if config[key]:
      raise ValueError(
        f'{name} cannot be combined with {key}={config[key]}, because random patch sizes only '
        'make sense if the backbone is trained. Remove one of the two keys.'
      )
  if config.objective == 'masked':
    raise ValueError(
      f'{name} cannot be combined with objective=masked, because the decoder predicts patches of '
      'one size. Remove patch_sizes.'
    )
  if model.resnet is not None:
    raise ValueError(
      f'{name}: the patches of a hybrid model come from the feature map of its stem, '
      f'model.resnet={model.resnet}, so they have only one size. Choose a model without a stem.'
    )
