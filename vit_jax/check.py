"""What a config may say: names, ranges, and what excludes what.

`keys.py` has the range of each key, and its names or the name of their registry, here.
"""

from collections.abc import Callable, Collection

from ml_collections import ConfigDict

from vit_jax import config as config_lib
from vit_jax.augment import MAX_MAGNITUDES, PAD_MODES, SPACES, mixes
from vit_jax.data import INTERPOLATIONS
from vit_jax.keys import KEYS
from vit_jax.model import ACTIVATIONS, POOLS, POSITION_PREFIXES, POSITIONS, REMAT, RESIZES
from vit_jax.names import choose, pair
from vit_jax.optim import FREEZE, LOSSES, MOMENT_DTYPES, OPTIMIZERS, SCHEDULES

REGISTRIES: dict[str, Collection[str] | Callable[[], Collection[str]]] = {
  'ACTIVATIONS': ACTIVATIONS,
  'FREEZE': FREEZE,
  'INTERPOLATIONS': INTERPOLATIONS,
  'LOSSES': LOSSES,
  'MOMENT_DTYPES': MOMENT_DTYPES,
  'OPTIMIZERS': OPTIMIZERS,
  'PAD_MODES': PAD_MODES,
  'POOLS': lambda: [name for name, pool in POOLS.items() if not pool.tokens],  # one vector
  'POSITIONS': POSITIONS,
  'POSITION_PREFIXES': POSITION_PREFIXES,
  'REMAT': REMAT,
  'RESIZES': RESIZES,
  'SCHEDULES': SCHEDULES,
  'SPACES': SPACES,
}


def choices(key: str) -> tuple[str, ...]:
  """The valid names of a key, in the order of its registry; empty where any value is."""
  names = KEYS[key].choices
  if isinstance(names, str):
    names = REGISTRIES[names] if names else ()
  return tuple(names() if callable(names) else names)


def check(config: ConfigDict) -> None:
  """Raises ValueError for numbers that no run can have, and for unknown names."""
  values = config_lib.flatten(config)
  for name, key in KEYS.items():
    value = values[name]
    if any(item != item for item in (value if isinstance(value, list) else [value])):
      raise ValueError(f'{name} must be a number, got {value}.')
    if value is None:
      continue
    if key.choices:
      choose(name, value, choices(name))
    if key.range and not key.range[0] <= value <= key.range[1]:
      low, high = key.range
      raise ValueError(f'{name} must be from {low:.15g} to {high:.15g}, got {value}.')
  pair(config.data.image_size, 'data.image_size')
  check_augment(config)
  check_progressive(config)
  axes = dict(config.mesh)
  if axes['fsdp'] == axes['tensor'] == -1 or not all(n == -1 or n > 0 for n in axes.values()):
    raise ValueError(
      f'mesh needs numbers of devices, and -1 for one of fsdp and tensor at most, got {axes}.'
    )
  rates = config.sweep
  if rates and not (config.freeze and config.data.val_split):
    raise ValueError(
      'sweep needs freeze=backbone and a data.val_split to choose the learning rate by, e.g. '
      "train_split='train[:98%]', val_split='train[98%:]'."
    )
  if len(set(rates)) < len(rates) or not all(rate > 0 for rate in rates):
    raise ValueError(f'sweep must be different learning rates above 0, got {tuple(rates)}.')


def check_progressive(config: ConfigDict) -> None:
  """Raises ValueError for sizes and shares that don't fit each other."""
  sizes, until = config.progressive.sizes, config.progressive.until
  height = pair(config.data.image_size)[0]
  if not all(type(size) is int and 0 < size <= height for size in sizes):
    raise ValueError(
      f'progressive.sizes must be heights in pixels of at most {height}, that of data.image_size, '
      f'got {tuple(sizes)}.'
    )
  rising = all(a < b for a, b in zip((0, *until), (*until, 1)))
  if len(until) != len(sizes) or (until and not rising):
    raise ValueError(
      f'progressive.until={tuple(until)} must be rising shares of the run between 0 and 1, one for '
      f'each of progressive.sizes={tuple(sizes)}.'
    )
  if sizes and config.freeze:
    raise ValueError('progressive is for training the whole model: leave it out with freeze.')


def check_augment(config: ConfigDict) -> None:
  """Raises ValueError for arguments of augmentations that don't fit each other."""
  erasing, mix, drawn = config.augment.erasing, config.augment.mix, config.augment.rand_augment
  most = MAX_MAGNITUDES[drawn.space]
  if not 0 <= drawn.magnitude <= most:
    spaces = [f'{space} to {most}' for space, most in MAX_MAGNITUDES.items()]
    raise ValueError(
      f'augment.rand_augment.magnitude must be from 0 to {most} for space={drawn.space}, got '
      f'{drawn.magnitude:g}. The spaces go to: {", ".join(spaces)}.'
    )
  if erasing.min_area > erasing.max_area:
    raise ValueError(
      f'augment.erasing.min_area={erasing.min_area:g} is more than max_area={erasing.max_area:g}.'
    )
  if not mixes(config.augment):
    return
  if not mix.mixup_alpha and not mix.cutmix_alpha:
    raise ValueError(
      f'augment.mix.probability={mix.probability:g} needs a mixup_alpha or a cutmix_alpha above 0.'
    )
  parts = config.micro_batches or 1
  if config.batch_size % (2 * parts):
    raise ValueError(
      f'augment.mix mixes neighbours in a micro-batch, and batch_size={config.batch_size} in '
      f'micro_batches={parts} leaves one without: make batch_size a multiple of {2 * parts}.'
    )
