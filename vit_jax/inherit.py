"""What a run takes over from the weights it starts from, and what may not contradict them."""

import logging

from ml_collections import ConfigDict

from vit_jax import config as config_lib
from vit_jax.data import Source
from vit_jax.model import ATTRIBUTES, ViT, variant_fields
from vit_jax.names import pair
from vit_jax.weights import Pretrained, Weights, adapt, read_weights
from vit_jax.workdir import TrainingFiles

log = logging.getLogger(__name__)


def open_init(config: ConfigDict, source: Source) -> tuple[ConfigDict, dict, TrainingFiles]:
  """The weights that `init` names, for the data's classes and size, and what they decide.

  The head is new, and its pre-logits layer is dropped, unless the weights are of the same classes.

  Returns:
    The config with what the weights decide, their parameters, and the names of the files that
    they were trained on, as far as they tell.

  Raises:
    ValueError: no such weights, or a config that contradicts them.
  """
  found = read_weights(config.init)
  grid = grid_for(config, found)
  if found.channels != source.channels:
    raise ValueError(
      f'init={config.init} takes images of {found.channels} channels, those of '
      f'{config.data.source} have {source.channels}.'
    )
  classes = source.class_names
  new_head = found.class_names != classes  # others, or who knows which
  loaded = adapt(found, grid, None, len(classes), config.init_resize, new_head=new_head)
  log.info('Starting from the weights in %s', config.init)
  if new_head:
    log.info('The head is new: the classes are not those of the weights.')
  return follow(config, loaded), loaded.params, names_of(loaded)


def names_of(loaded: Pretrained) -> TrainingFiles:
  """The names of the files that weights were trained on; none where they don't tell."""
  names = TrainingFiles() if loaded.run is None else TrainingFiles.load(loaded.run)
  if names is None:
    log.warning(
      'Version 0.1.0 trained the weights of init and kept no names of its training files: they may '
      'have been trained on some of the test images.'
    )
  return names or TrainingFiles()


def grid_for(config: ConfigDict, found: Weights) -> tuple[int, int]:
  """The patches (down, across) of the config's images under the model of some weights.

  Raises:
    ValueError: images that don't divide into patches.
  """
  size, patch = pair(config.data.image_size), ViT(**found.fields).patch_size
  if any(n % p for n, p in zip(size, patch)):
    raise ValueError(
      f'data.image_size={size} does not divide into the patches of init={config.init}, '
      f'{patch[0]}x{patch[1]} pixels.'
    )
  return size[0] // patch[0], size[1] // patch[1]


def follow(config: ConfigDict, loaded: Pretrained) -> ConfigDict:
  """The config with what the weights decide.

  Raises:
    ValueError: it asks for another model; the message lists the differences.
  """
  own = {name: getattr(loaded.model, name) for name in ATTRIBUTES if name in config.model}
  asked = variant_fields(config.model.variant) if config.model.variant else {}
  asked |= {name: value for name, value in config.model.items() if value is not None}
  differences = [
    f'  model.{name}: {asked[name]!r} in the config, {value!r} in the weights'
    for name, value in own.items()
    if name in asked and name not in FREE and not same(name, asked[name], value, loaded.model)
  ]
  about = {'data.mean': loaded.preprocessing.mean, 'data.std': loaded.preprocessing.std}
  values = config_lib.flatten(config)
  differences += [
    f'  {key}: {tuple(values[key])} in the config, {value} in the weights'
    for key, value in about.items()
    if values[key] is not None and repeat(values[key]) != repeat(value)
  ]
  if differences:
    raise ValueError(
      f'init={config.init} is of another model than the config asks for:\n'
      + '\n'.join(differences)
      + '\nSet these keys to None, which takes those of the weights, or choose their variant.'
    )
  given = {f'model.{name}': value for name, value in own.items() if value is not None}
  return config_lib.fill(config, given | about)


def repeat(values: tuple[float, ...]) -> tuple[float, ...]:
  """One value, where all channels have the same."""
  return tuple(values[:1]) if len(set(values)) == 1 else tuple(values)


FREE = {'dropout', 'attention_dropout', 'stochastic_depth', 'dtype', 'remat'}  # of training


def same(name: str, asked: object, own: object, model: ViT) -> bool:
  """Whether the config's value of an attribute is that of the weights."""
  if name == 'patch_size':
    return pair(asked) == own
  if name == 'head_dim':
    return asked == model.head_size
  if name == 'layer_scale':  # the config's is where training from scratch begins
    return own is not None
  return asked == own
