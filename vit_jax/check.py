"""Checks a config: valid names, valid ranges, and keys that contradict each other.

`keys.py` gives the valid range or the valid names of each key. Instead of a list of names, a key
can give the name of a registry in `REGISTRIES`. The valid names are then the names in the registry.
"""

from collections.abc import Callable, Collection

from ml_collections import ConfigDict

from vit_jax import config as config_lib
from vit_jax.augment import MAX_MAGNITUDES, PAD_MODES, SPACES, mixes
from vit_jax.data import INTERPOLATIONS, Source, overlap
from vit_jax.keys import KEYS
from vit_jax.model import (
  ACTIVATIONS,
  ADAPTERS,
  ATTENTION,
  MLPS,
  POOLS,
  POSITION_PREFIXES,
  POSITIONS,
  REMAT,
  RESIZES,
)
from vit_jax.names import choose, pair
from vit_jax.optim import (
  CLASSIFIERS,
  DISTILLATIONS,
  FREEZE,
  LOSSES,
  MOMENT_DTYPES,
  OBJECTIVES,
  OPTIMIZERS,
  SCHEDULES,
  objective_of,
  parse_weights,
)

REGISTRIES: dict[str, Collection[str] | Callable[[], Collection[str]]] = {
  'ACTIVATIONS': ACTIVATIONS,
  'ADAPTERS': lambda: ('', *ADAPTERS),
  'CLASSIFIERS': lambda: ('', *CLASSIFIERS),
  'DISTILLATIONS': DISTILLATIONS,
  'FREEZE': FREEZE,
  'INTERPOLATIONS': INTERPOLATIONS,
  'LOSSES': LOSSES,
  'MLPS': MLPS,
  'MOMENT_DTYPES': MOMENT_DTYPES,
  'OBJECTIVES': OBJECTIVES,
  'OPTIMIZERS': OPTIMIZERS,
  'PAD_MODES': PAD_MODES,
  # A classifier needs a pool that returns one vector.
  'POOLS': lambda: [name for name, pool in POOLS.items() if not pool.tokens],
  'POSITIONS': POSITIONS,
  'POSITION_PREFIXES': POSITION_PREFIXES,
  'ATTENTION': ATTENTION,
  'REMAT': REMAT,
  'RESIZES': RESIZES,
  'SCHEDULES': SCHEDULES,
  'SPACES': SPACES,
}


def choices(key: str) -> tuple[str, ...]:
  """Returns the names that a config key accepts; empty for other keys, such as numbers.

  The names are in the order of the list or the registry that defines them.
  """
  names = KEYS[key].choices
  if isinstance(names, str):
    names = REGISTRIES[names] if names else ()
  return tuple(names() if callable(names) else names)


def check(config: ConfigDict, trains: bool = True) -> None:
  """Raises ValueError for missing keys, invalid numbers, unknown names and contradictions.

  Args:
    config: config to check.
    trains: whether the config is used for training. If False, rules that matter only in training
      are not checked. For example, only training with mixup or cutmix needs an even batch size.
  """
  if not isinstance(config, ConfigDict):
    raise ValueError(
      'config: expected a config from configs/ or vit_jax.default_config(), got a value of type '
      f'{type(config).__name__}.'
    )
  values = config_lib.flatten(config)
  if missing := [name for name in KEYS if name not in values]:
    raise ValueError(
      f'config: the key {missing[0]} is missing. Start from vit_jax.default_config().'
    )
  for name, key in KEYS.items():
    value = values[name]
    if any(item != item for item in (value if isinstance(value, list) else [value])):
      raise ValueError(f'{name} must be a number, got {value}.')
    if value is None:
      if trains and key.default is not None and not key.open:
        raise ValueError(f'{name} must not be None. Its default is {key.default!r}.')
      continue
    if key.choices:
      choose(name, value, choices(name))
    if key.range and not key.range[0] <= value <= key.range[1]:
      low, high = key.range
      raise ValueError(f'{name} must be from {low:.15g} to {high:.15g}, got {value}.')
  parse_weights(config.loss.class_weights)
  check_augment(config)
  if trains and config.batch_size:
    check_partners(config)
  check_frozen(config, trains)
  if config.data.image_size is not None:
    pair(config.data.image_size, 'data.image_size')
    check_progressive(config)
  check_objective(config, trains)
  check_distill(config)
  axes = dict(config.mesh)
  if axes['fsdp'] == axes['tensor'] == -1 or not all(n == -1 or n > 0 for n in axes.values()):
    raise ValueError(
      'mesh: each axis must be a positive number of devices or -1, and only one of fsdp and '
      f'tensor may be -1, got {axes}.'
    )
  rates = config.sweep
  if rates and not (config.freeze and config.data.val_split != ''):
    raise ValueError(
      'sweep needs freeze=backbone and a data.val_split to select the learning rate, e.g. '
      "train_split='train[:98%]', val_split='train[98%:]'."
    )
  if len(set(rates)) < len(rates) or not all(rate > 0 for rate in rates):
    raise ValueError(f'sweep must list distinct learning rates above 0, got {tuple(rates)}.')


def check_held_out(config: ConfigDict, source: Source) -> None:
  """Raises ValueError if the validation split shares examples with the train or test split."""
  data = config.data
  if not data.val_split:
    return
  for name in ('train_split', 'eval_split'):
    if overlap(source.pieces(data.val_split), source.pieces(data[name])):
      raise ValueError(
        f'data.val_split={data.val_split!r} shares examples with data.{name}={data[name]!r}. '
        "Hold out a part of train, e.g. train_split='train[:98%]', val_split='train[98%:]'."
      )


def check_frozen(config: ConfigDict, trains: bool) -> None:
  """Raises ValueError for keys that contradict each other about which parameters are trained.

  The key `classifier` is checked only if `trains` is True.
  """
  if config.classifier and trains:
    set_too = {'epochs': 0, 'freeze': '', 'adapt': '', 'sweep': (), 'ema': 0}
    wrong = [f'{key}={config[key]}' for key, value in set_too.items() if config[key] != value]
    if (weights := config.loss.class_weights) != 'none':
      wrong.append(f'loss.class_weights={weights}')
    if config.distill.teacher:
      wrong.append(f'distill.teacher={config.distill.teacher}')
    if wrong:
      further = (
        'To train the computed head further, start a second run with --config.init=<this workdir>.'
      )
      raise ValueError(
        f'classifier={config.classifier} computes the head without training, so it cannot be '
        f'combined with {", ".join(wrong)}. Set epochs=0, and keep the defaults of freeze, '
        'adapt, sweep, ema, loss.class_weights and distill.teacher. '
        + (further if config.classifier == 'ridge' else 'This head cannot be trained further.')
      )
  if config.adapt and config.freeze:
    raise ValueError(
      f'adapt={config.adapt} cannot be combined with freeze={config.freeze}. adapt already '
      'leaves the weights of init unchanged, and trains the head. Remove one of these keys.'
    )


def check_progressive(config: ConfigDict) -> None:
  """Raises ValueError for invalid or contradictory keys of the section `progressive`."""
  sizes, until = config.progressive.sizes, config.progressive.until
  height = pair(config.data.image_size)[0]
  if not all(type(size) is int and 0 < size <= height for size in sizes):
    raise ValueError(
      f'progressive.sizes must be heights in pixels, at most {height} (the height of '
      f'data.image_size), got {tuple(sizes)}.'
    )
  rising = all(a < b for a, b in zip((0, *until), (*until, 1)))
  if len(until) != len(sizes) or (until and not rising):
    raise ValueError(
      f'progressive.until={tuple(until)} must list increasing fractions of the run, '
      f'between 0 and 1, one for each of progressive.sizes={tuple(sizes)}.'
    )
  if sizes and config.freeze:
    raise ValueError('progressive.sizes cannot be combined with freeze. Remove one of the two.')


def check_objective(config: ConfigDict, trains: bool) -> None:
  """Raises ValueError for keys that contradict `objective`. For `trains`, see `check`."""
  name, teacher = config.objective, config.distill.teacher
  if name and (name == 'distilled') != bool(teacher):
    remedy = f'remove distill.teacher={teacher}' if teacher else 'set distill.teacher'
    raise ValueError(
      f'objective={name} contradicts distill.teacher={teacher!r}: {remedy}, or set objective to '
      'None.'
    )
  if not objective_of(config).labels:
    keys = [key for key in ('freeze', 'adapt', 'classifier', 'sweep') if config[key]]
    wrong = [f'{key}={config[key]}' for key in keys]
    if trains and config.loss.class_weights != 'none':
      wrong.append(f'loss.class_weights={config.loss.class_weights}')
    if trains and config.loss.label_smoothing:
      wrong.append(f'loss.label_smoothing={config.loss.label_smoothing}')
    if config.optimizer.layer_decay != 1:
      wrong.append(f'optimizer.layer_decay={config.optimizer.layer_decay}')
    if wrong:
      raise ValueError(
        f'objective={name} trains no classification head, so it cannot be combined with '
        f'{", ".join(wrong)}. Pretrain first, without these keys. Then use them in '
        'a second run with --config.init=<this workdir>.'
      )
  width, heads = config.masked.decoder_width, config.masked.decoder_heads
  if name == 'masked' and (heads < 1 or width < 4 or width % heads or width % 4):
    raise ValueError(
      f'masked.decoder_width={width} must be divisible by masked.decoder_heads={heads}, and by 4 '
      'for the position embedding of the decoder.'
    )


def check_distill(config: ConfigDict) -> None:
  """Raises ValueError for keys that cannot be combined with `distill.teacher`."""
  if not config.distill.teacher:
    return
  if config.freeze:
    raise ValueError(
      'distill.teacher cannot be combined with freeze, because a student with a frozen backbone is '
      'not supported. Remove one of these keys.'
    )
  if config.loss.name == 'sigmoid':
    raise ValueError(
      'distill.teacher cannot be combined with loss.name=sigmoid, because teacher and student are '
      'compared after a softmax. Set loss.name=softmax.'
    )
  pool = POOLS.get(config.model.pool)
  joins = ('representation_size', 'projection', 'norm_after_pool')
  joins = [f'model.{key}' for key in joins if config.model[key]]
  if pool and pool.distills and joins:
    raise ValueError(
      f'distill.teacher with model.pool={config.model.pool} cannot be combined with {joins[0]}. '
      f'{joins[0]} adds a layer that uses the class token and the distillation token together, but '
      f'these tokens need separate heads. Set {joins[0]} to None.'
    )


def check_augment(config: ConfigDict) -> None:
  """Raises ValueError for invalid or contradictory keys of the section `augment`."""
  erasing, mix, drawn = config.augment.erasing, config.augment.mix, config.augment.rand_augment
  most = MAX_MAGNITUDES[drawn.space]
  if not 0 <= drawn.magnitude <= most:
    spaces = [f'{space} {most}' for space, most in MAX_MAGNITUDES.items()]
    raise ValueError(
      f'augment.rand_augment.magnitude must be from 0 to {most} for space={drawn.space}, got '
      f'{drawn.magnitude:g}. Maximum of each space: {", ".join(spaces)}.'
    )
  if erasing.min_area > erasing.max_area:
    raise ValueError(
      f'augment.erasing.min_area={erasing.min_area:g} must not exceed '
      f'max_area={erasing.max_area:g}.'
    )
  if mixes(config.augment) and not mix.mixup_alpha and not mix.cutmix_alpha:
    raise ValueError(
      f'augment.mix.probability={mix.probability:g} needs mixup_alpha or cutmix_alpha above 0.'
    )


def check_partners(config: ConfigDict) -> None:
  """Raises ValueError if images are mixed in pairs, but a micro-batch has an odd size."""
  parts = config.micro_batches or 1
  if mixes(config.augment) and config.batch_size % (2 * parts):
    raise ValueError(
      'augment.mix mixes pairs of images within each micro-batch, but '
      f'batch_size={config.batch_size} with micro_batches={parts} leaves an image without a '
      f'partner. Set batch_size to a multiple of {2 * parts}.'
    )


def check_channels(config: ConfigDict, channels: int) -> None:
  """Raises ValueError if `data.mean` or `data.std` does not fit the number of channels."""
  for name in ('mean', 'std'):
    values = config.data[name]
    if len(values) not in (1, channels) or (name == 'std' and min(values) <= 0):
      counts = '1 value' if channels == 1 else f'1 or {channels} values'
      raise ValueError(
        f'data.{name}={values}: expected {counts}{" above 0" if name == "std" else ""}, because '
        f'the images have {channels} channel(s).'
      )
