"""Opens the weights of `init` and `distill.teacher`, and the text embeddings of `--classes`."""

import dataclasses
import functools
import logging
import pathlib

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from vit_jax import config as config_lib
from vit_jax.augment import active, normalize
from vit_jax.bucket import to_path
from vit_jax.data import Source
from vit_jax.model import ATTRIBUTES, ViT, variant_fields, variant_of
from vit_jax.names import abridged, accepted, assumed, difference, pair, same_classes
from vit_jax.optim import DISTILLATIONS, Teacher, TextClasses, objective_of
from vit_jax.weights import (
  Adaptation,
  Pretrained,
  Weights,
  adapt,
  headless,
  image_channels,
  read_arrays,
  read_weights,
  with_pooling,
)
from vit_jax.workdir import TrainingFiles, digest

log = logging.getLogger(__name__)


def open_init(config: ConfigDict, source: Source) -> tuple[ConfigDict, dict, TrainingFiles]:
  """Opens the weights that `init` names, and adapts them to the data's classes and image size.

  If the config sets `model.patch_size`, the patch embedding is resized to this patch size.

  If the weights have the same classes as the data and no k-NN head, the head of the weights is
  kept. Otherwise, a head of zeros replaces the head, the pre-logits layer and the projection of the
  weights. If the objective needs no labels, the model has no head.

  Returns:
    The config, completed with values from the weights.
    The parameters, and the training files of the weights (empty if unknown).

  Raises:
    ValueError: the weights do not exist, or the config contradicts the weights.
  """
  found = read_weights(config.init)
  if np.any(found.preprocessing.size):  # the npz files of the ViT paper do not store a size
    config = config_lib.fill(config, {'data.image_size': found.preprocessing.size})
  if found.channels != source.channels:
    raise ValueError(
      f'init={config.init} expects images with {found.channels} channel(s), but the images of '
      f'data.source={config.data.source} have {source.channels}. Use images with '
      f'{found.channels} channel(s).'
    )
  classes = source.class_names if objective_of(config).labels else ()
  log.info('Starting from the weights in %s', config.init)
  if not classes:
    loaded = headless(adapt(found, adaptation(config, found, None, False)))
    return follow(config, loaded), loaded.params, names_of(loaded)
  new_head = needs_new_head(found, classes)
  loaded = adapt(found, adaptation(config, found, len(classes), new_head))
  if new_head:
    log.info(
      'The run starts with a classification head of zeros, because the weights have no linear '
      'head for these classes.'
    )
  elif found.class_names != classes:
    log.warning('%s', assumed(found.class_names, classes))
  return follow(config, loaded), loaded.params, names_of(loaded)


def check_no_init(config: ConfigDict) -> None:
  """Raises ValueError or logs a warning if a config without `init` keeps the backbone fixed."""
  keys = [f'{key}={config[key]}' for key in ('adapt', 'classifier', 'freeze') if config[key]]
  if not keys:
    return
  message = (
    f'{keys[0]} does not train the backbone, but init is empty, so the backbone %s random weights. '
    'Set --config.init, e.g. to a file, a folder or a workdir.'
  )
  if config.adapt or config.classifier:
    raise ValueError(message % 'would have')
  log.warning(message, 'has')  # a head on random weights is a baseline, so it is not refused


def needs_new_head(found: Weights, classes: tuple[str, ...]) -> bool:
  """Returns whether a new head for these classes must replace the head of the weights.

  The old head is kept only if it is not a k-NN head, and `same_classes` holds for its classes.
  """
  return not same_classes(found.class_names, classes) or found.fields.get('examples') is not None


def open_classes(path: str | pathlib.Path) -> TextClasses:
  """Reads an npz file with the text embeddings of classes (`optim/zero_shot.py`).

  Raises:
    ValueError: the file cannot be read, or its contents are wrong.
  """
  return TextClasses.read(read_arrays(to_path(path)), str(path))


def with_classes(loaded: Pretrained, classes: TextClasses) -> Pretrained:
  """Adds a zero-shot head, made of text embeddings of classes, to weights of CLIP or SigLIP.

  Raises:
    ValueError: the weights already have a head, or do not fit the embeddings.
  """
  loaded = with_pooling(loaded)
  image_shape = (*loaded.preprocessing.size, image_channels(loaded.params))
  model, params = classes.attach(loaded.model, loaded.params, image_shape)
  return dataclasses.replace(
    loaded,
    model=model,
    params=params,
    class_names=classes.names,
    sigmoid=classes.bias is not None,
  )


def names_of(loaded: Pretrained) -> TrainingFiles:
  """Returns the files and splits that weights were trained on; empty if they are unknown."""
  names = TrainingFiles() if loaded.run is None else TrainingFiles.load(loaded.run)
  if names is None:
    log.warning(
      'The loaded weights were trained with vit_jax 0.1.0, which did not record the training '
      'files. Some of the test images may have been used for training.'
    )
  return names or TrainingFiles()


def open_teacher(
  config: ConfigDict, source: Source
) -> tuple[Teacher, TrainingFiles] | tuple[None, TrainingFiles]:
  """Opens the teacher that `distill.teacher` names.

  Returns:
    The teacher; None if the config names no teacher.
    The files that the teacher was trained on; empty without a teacher. No test of the student may
      use these files, because the student learns from them indirectly.

  Raises:
    ValueError: the weights do not exist, have no head, or do not fit the data.
  """
  keys = dict(config.distill)
  path, kind, weight = keys.pop('teacher'), keys.pop('kind'), keys.pop('weight')
  if not path:
    return None, TrainingFiles()
  found = read_weights(path)
  check_teacher(config, found, source)
  loaded, kind = adapt(found), DISTILLATIONS[kind]
  about, model = loaded.preprocessing, loaded.model
  log.info(
    'Learning from the teacher %s: %.4g million parameters, images of %dx%d pixels.',
    path, sum(x.size for x in jax.tree.leaves(loaded.params)) / 1e6, *about.size,
  )  # fmt: skip
  teacher = Teacher(
    model.clone(dtype=jnp.dtype(config.model.dtype), remat='none'),
    loaded.params,
    functools.partial(normalize, size=about.size, mean=about.mean, std=about.std),
    functools.partial(kind, **accepted(kind, keys)),
    weight,
    cached=not active(config.augment) and not config.data.skip_bad_images,
    digest=digest(loaded.params),
  )
  return teacher, names_of(loaded)


def check_teacher(config: ConfigDict, found: Weights, source: Source) -> None:
  """Raises ValueError if the weights of a teacher do not fit the classes and images of the data."""
  data, name = config.data.source, f'distill.teacher={config.distill.teacher}'
  count, classes = found.fields['num_classes'], source.class_names
  if source.multi_label:
    raise ValueError(
      f'{name} cannot be used for images with several labels, because teacher and student are '
      f'compared after a softmax. Use data with one label per image instead of '
      f'data.source={data}, or train without a teacher.'
    )
  run = config_lib.flatten(found.run['config']) if found.run else {}
  if found.multi_label or run.get('loss.name') == 'sigmoid':
    raise ValueError(
      f'{name} was trained with the loss sigmoid, as for images with several labels. It cannot be '
      'used, because teacher and student are compared after a softmax. Use a teacher that was '
      'trained with one label per image and loss.name=softmax.'
    )
  if count is None:
    raise ValueError(
      f'{name} has no head, so it cannot teach classes. Use a classifier as teacher. Or train a '
      f'head with --config=configs/linear_probe.py --config.init={config.distill.teacher}, and '
      'use the workdir of that run as teacher.'
    )
  if found.channels != source.channels:
    raise ValueError(
      f'{name} expects images with {found.channels} channel(s), but the images of '
      f'data.source={data} have {source.channels}. Use a teacher for images with '
      f'{source.channels} channel(s).'
    )
  theirs = found.class_names
  if count != len(classes) or not (theirs is None or same_classes(theirs, classes)):
    given = f'{difference(classes, theirs)}. ' if theirs else ''
    raise ValueError(
      f'{name} has {count} classes{f" ({abridged(theirs)})" if theirs else ""}, but '
      f'data.source={data} has {len(classes)} ({abridged(classes)}). {given}Use a teacher with the '
      'same classes in the same order. To get one, fine-tune these weights on the data: '
      f'--config.init={config.distill.teacher}'
    )
  if theirs not in (None, classes):
    log.warning('%s', assumed(theirs, classes))


def adaptation(
  config: ConfigDict, found: Weights, num_classes: int | None, new_head: bool
) -> Adaptation:
  """Returns the `Adaptation` that fits weights to the config's image size and patch size.

  Args:
    config: the config.
    found: contents of the weights file.
    num_classes: number of classes of the head; None keeps the file's head.
    new_head: whether to replace the file's head even if its number of classes is the same.

  Raises:
    ValueError: the images do not divide into patches.
  """
  own, size, grid = ViT(**found.fields).patch_size, config.data.image_size, None
  patch = pair(config.model.patch_size or own, 'model.patch_size')
  if np.any(size):  # else the grid of the file is kept
    size = pair(size)
    if any(n % p for n, p in zip(size, patch)):
      raise ValueError(
        f'data.image_size={size} does not divide into the patches of init={config.init}. Use '
        f'multiples of the patch size, {patch[0]}x{patch[1]} pixels.'
      )
    grid = size[0] // patch[0], size[1] // patch[1]
  if patch != own:
    log.info('Resizing the patch embedding from %dx%d to %dx%d pixels.', *own, *patch)
  return Adaptation(grid, None, patch, num_classes, config.init_resize, new_head)


def follow(config: ConfigDict, loaded: Pretrained) -> ConfigDict:
  """Returns the config, with its missing values taken from the weights.

  Raises:
    ValueError: the config describes a different model; the message lists the differences.
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
      f'init={config.init} does not match the config:\n'
      + '\n'.join(differences)
      + '\nSet these keys to None to take their values from the weights. Instead of keys of the '
      f'model, set model.variant={variant_of(loaded.model)} and data.image_size=None.'
    )
  given = {'data.image_size': loaded.preprocessing.size} | {
    f'model.{name}': value for name, value in own.items() if value is not None and name not in FREE
  }
  return config_lib.fill(config, given | about)


def repeat(values: tuple[float, ...]) -> tuple[float, ...]:
  """Reduces one value per channel to a single value, if all channels have the same value."""
  return tuple(values[:1]) if len(set(values)) == 1 else tuple(values)


# Attributes of the model that may differ between config and weights.
FREE = {'dropout', 'attention_dropout', 'stochastic_depth', 'dtype', 'remat', 'attention'}


def same(name: str, asked: object, own: object, model: ViT) -> bool:
  """Returns whether the config's value `asked` of an attribute agrees with `own` of `model`."""
  if name == 'patch_size':
    return pair(asked) == own
  if name == 'head_dim':
    return asked == model.head_size
  if name == 'layer_scale':  # the config gives only the initial value
    return own is not None
  return asked == own
