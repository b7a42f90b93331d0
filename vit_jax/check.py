"""What a config may say: names, ranges, and what excludes what."""

from ml_collections import ConfigDict

from vit_jax import config as config_lib
from vit_jax.augment import MAX_MAGNITUDES, PAD_MODES, SPACES, mixes
from vit_jax.data import INTERPOLATIONS
from vit_jax.model import RESIZES
from vit_jax.names import choose, pair
from vit_jax.optim import FREEZE, MOMENT_DTYPES, OPTIMIZERS, SCHEDULES

RANGES = {  # what a number may be, both ends included
  'seed': (0, 2**32 - 1),
  'epochs': (0, 1e6),
  'batch_size': (1, 1e6),
  'micro_batches': (1, 1e6),
  'eval_batch_size': (1, 1e6),
  'log_every': (0, 1e9),
  'eval_every': (0, 1e9),
  'checkpoint_every': (0, 1e9),
  'keep_checkpoints': (1, 1e6),
  'ema': (0, 0.9999999),
  'augment.pad_crop.padding': (0, 1e3),
  'augment.flip.probability': (0, 1),
  'augment.resized_crop.min_area': (0.001, 1),
  'augment.resized_crop.max_aspect': (1, 100),
  'augment.rand_augment.num_layers': (0, 100),
  'augment.rand_augment.mstd': (0, 100),
  'augment.rand_augment.probability': (0, 1),
  'augment.trivial_augment.probability': (0, 1),
  'augment.erasing.probability': (0, 1),
  'augment.erasing.min_area': (0, 1),
  'augment.erasing.max_area': (0, 1),
  'augment.erasing.max_aspect': (1, 100),
  'augment.mix.probability': (0, 1),
  'augment.mix.mixup_alpha': (0, 1e3),
  'augment.mix.cutmix_alpha': (0, 1e3),
  'augment.mix.switch': (0, 1),
  'augment.off_for_last': (0, 1),
  'data.crop': (0.01, 1),
  'data.workers': (0, 1e3),
  'data.threads': (1, 1e3),
  'model.norm_epsilon': (0, 1),
  'optimizer.lr': (0, 1e38),
  'optimizer.weight_decay': (0, 1e6),
  'optimizer.b1': (0, 0.9999999),
  'optimizer.b2': (0, 0.9999999),
  'optimizer.momentum': (0, 0.9999999),
  'optimizer.layer_decay': (1e-6, 1),
  'optimizer.clip': (0, 1e38),
  'schedule.warmup': (0, 1e6),
  'loss.label_smoothing': (0, 1),
}

CACHES = ('auto', 'memory', 'stream')


def check(config: ConfigDict) -> None:
  """Raises ValueError for numbers that no run can have, and for unknown names."""
  choose('optimizer.name', config.optimizer.name, OPTIMIZERS)
  choose('optimizer.moment_dtype', config.optimizer.moment_dtype, MOMENT_DTYPES)
  choose('freeze', config.freeze, FREEZE)
  choose('schedule.name', config.schedule.name, SCHEDULES)
  choose('init_resize', config.init_resize, RESIZES)
  choose('data.interpolation', config.data.interpolation, INTERPOLATIONS)
  choose('data.cache', config.data.cache, CACHES)
  choose('augment.pad_crop.mode', config.augment.pad_crop.mode, PAD_MODES)
  choose('augment.rand_augment.space', config.augment.rand_augment.space, SPACES)
  pair(config.data.image_size, 'data.image_size')
  values = config_lib.flatten(config)
  for key, value in values.items():
    if any(item != item for item in (value if isinstance(value, list) else [value])):
      raise ValueError(f'{key} must be a number, got {value}.')
  for key, (low, high) in RANGES.items():
    if values[key] is not None and not low <= values[key] <= high:
      raise ValueError(f'{key} must be from {low:.15g} to {high:.15g}, got {values[key]}.')
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
