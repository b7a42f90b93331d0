"""Completes a config from the `init` weights, and checks that config and weights agree."""

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
  """Opens the weights that `init` names and adapts them to the data's classes and image size.

  If the weights have the classes of the data, the head is kept. Otherwise the head is new, and the
  pre-logits layer is dropped.

  Returns:
    The completed config, the parameters, and the names of the files that the weights were trained
    on. The names are empty if these files are unknown.

  Raises:
    ValueError: the weights do not exist, or the config contradicts them.
  """
  found = read_weights(config.init)
  config = config_lib.fill(config, {'data.image_size': found.preprocessing.size})
  grid = grid_for(config, found)
  if found.channels != source.channels:
    raise ValueError(
      f'init={config.init} expects images with {found.channels} channel(s), but the images of '
      f'data.source={config.data.source} have {source.channels}.'
    )
  classes = source.class_names
  new_head = found.class_names != classes  # the classes differ, or are unknown
  loaded = adapt(found, grid, None, len(classes), config.init_resize, new_head=new_head)
  log.info('Starting from the weights in %s', config.init)
  if new_head:
    log.info('The head is new, because the weights have different or unknown classes.')
  return follow(config, loaded), loaded.params, names_of(loaded)


def names_of(loaded: Pretrained) -> TrainingFiles:
  """Returns the names of the files that weights were trained on; empty if unknown."""
  names = TrainingFiles() if loaded.run is None else TrainingFiles.load(loaded.run)
  if names is None:
    log.warning(
      'The weights of init come from version 0.1.0, which did not record the training files. '
      'Perhaps these weights were trained on some of the test images.'
    )
  return names or TrainingFiles()


def grid_for(config: ConfigDict, found: Weights) -> tuple[int, int]:
  """Returns the patch grid (down, across) of the config's images, for the weights' patch size.

  Raises:
    ValueError: the images do not divide into patches.
  """
  size, patch = pair(config.data.image_size), ViT(**found.fields).patch_size
  if any(n % p for n, p in zip(size, patch)):
    raise ValueError(
      f'data.image_size={size} does not divide into the patches of init={config.init}. Use '
      f'multiples of the patch size, {patch[0]}x{patch[1]} pixels.'
    )
  return size[0] // patch[0], size[1] // patch[1]


def follow(config: ConfigDict, loaded: Pretrained) -> ConfigDict:
  """Completes the config from the weights, and checks that config and weights agree.

  Raises:
    ValueError: the config asks for a different model; the message lists the differences.
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
      f'init={config.init} holds a different model than the config asks for:\n'
      + '\n'.join(differences)
      + '\nSet these keys to None to take their values from the weights, or set model.variant '
      'to the variant of the weights.'
    )
  given = {
    f'model.{name}': value for name, value in own.items() if value is not None and name not in FREE
  }
  return config_lib.fill(config, given | about)


def repeat(values: tuple[float, ...]) -> tuple[float, ...]:
  """Shortens a tuple to one value if all channels have the same value."""
  return tuple(values[:1]) if len(set(values)) == 1 else tuple(values)


# Attributes that may differ from the weights.
FREE = {'dropout', 'attention_dropout', 'stochastic_depth', 'dtype', 'remat', 'attention'}


def same(name: str, asked: object, own: object, model: ViT) -> bool:
  """Returns whether the config and the weights agree on an attribute of the model."""
  if name == 'patch_size':
    return pair(asked) == own
  if name == 'head_dim':
    return asked == model.head_size
  if name == 'layer_scale':  # the config gives only the initial value
    return own is not None
  return asked == own
