"""Chooses values for config keys that are None, from the number and the size of the images.

Decisions:
  * A run has at least `MIN_STEPS` steps, unless the config sets `epochs`. To reach this number, the
    batch first becomes smaller, down to `MIN_BATCH`. If that gives too few steps, the run also gets
    more epochs.
  * The batch size is a power of two, times the smallest batch size that the devices can divide.
  * A batch has at most as many images as the training split, but never fewer than the smallest size
    that the devices can divide.
  * The learning rate of SGD is proportional to the batch size (Goyal et al. 2017, 1706.02677,
    Section 2.1). The updates of the other optimizers do not grow with the gradient. So their
    learning rate is proportional to the square root of the batch size (Malladi et al. 2022,
    2205.10287).
  * The chosen values are saved with the run, and a resumed run uses them again.
"""

from collections.abc import Iterable
import logging
import math

from ml_collections import ConfigDict
import numpy as np

from vit_jax import config as config_lib
from vit_jax.data import BadImage, Source, count_labels, num_examples, own_size
from vit_jax.distributed import from_first, smallest_batch
from vit_jax.experiment import DEFAULTS, Experiment, group
from vit_jax.model import variant_fields
from vit_jax.names import abridged, pair

log = logging.getLogger(__name__)

MIN_STEPS = 300  # smallest number of training steps that a run gets
MIN_BATCH = 16  # smallest batch size that is chosen to get more steps
LINEAR = ('sgd',)  # optimizers whose learning rate is proportional to the batch size
SAVES = 10  # number of checkpoints that a run saves
PARTS = 'train[:90%]', 'train[90%:]'  # splits for training and for validation
VALIDATION = ('val', 'valid', 'validation')  # names of validation splits
PATCHES = {32: 4, 64: 8, 128: 16, 224: 16}  # {image size: patch size}, both in pixels
MADE = (32, 32)  # size of synthetic images if the config sets no size
SAMPLE = 100  # number of training images whose sizes are read
FEW = 3  # a warning names classes with fewer images in a held-out split


def image_size(config: ConfigDict) -> tuple[int, int]:
  """Returns the (height, width) of the model's input; 32 x 32 (`MADE`) if the config sets none."""
  return pair(config.data.image_size or MADE)


def check_cropping(overrides: Iterable[str], exp: Experiment, from_run: bool) -> None:
  """Raises ValueError if overrides set a crop or an image size that the model does not use.

  Args:
    overrides: config keys that the user overrides.
    exp: experiment of the trained model, with these overrides.
    from_run: whether the model comes from a workdir. For other weights, `data.image_size` has an
      effect with `exp.pack` too: the position embeddings are first resized to this size.
  """
  sized = ('data.image_size',) if exp.pack and from_run else ()
  keys = [key for key in ('data.crop', 'data.stretch', *sized) if key in overrides]
  if not keys:
    return
  if exp.pack:
    reason = 'with --max_patches, each image has its own size and aspect ratio and is not cropped'
  elif 'crop' not in exp.fit.keywords:
    height, width = exp.task.stored_size
    reason = (
      f'this model was trained on whole images of {height}x{width} pixels. Each image is scaled to '
      f'{height}x{width} pixels without cropping, and then enlarged to the input size of the model'
    )
  else:
    return
  raise ValueError(f'{" and ".join(keys)} would have no effect: {reason}. Remove the override.')


def choose_open(config: ConfigDict, source: Source | None) -> ConfigDict:
  """Returns the config, in which keys that were None now have values that suit the data.

  The new values are logged. With `init`, `data.image_size` stays None, because the image size is
  later taken from the weights.

  Args:
    config: checked config of a new run.
    source: dataset of the run. If the data is not available (None, or a source without splits), the
      values come from the section `recipe` of the config.
  """
  source = source if source and source.sizes else None
  found = from_first(lambda: chosen_values(config, source))
  values = config_lib.flatten(config)
  chosen = {
    key: tuple(value) if isinstance(value, list) else value
    for key, value in found.items()
    if values[key] is None
  }
  if chosen and source:
    show = lambda value: f'{value:.4g}' if isinstance(value, float) else config_lib.as_text(value)
    text = ', '.join(f'{key}={show(value)}' for key, value in chosen.items())
    log.info('Chosen for these images: %s', text)
  return config_lib.fill(config, chosen)


def chosen_values(config: ConfigDict, source: Source | None) -> dict[str, object]:
  """Chooses values that suit the data, for all keys that a config can leave unset.

  Returns `{key: value}`. The caller ignores the values of keys that the config sets itself.
  """
  recipe = config.recipe
  train, val = choose_splits(config, source) if source else ('train', '')
  count = num_examples(source.pieces(train)) if source else None
  batch_size = config.batch_size or choose_batch(config, count)
  epochs = recipe.epochs if config.epochs is None else config.epochs
  if config.epochs is None and count:
    epochs = max(epochs, math.ceil(10 * MIN_STEPS * batch_size / count) / 10)
  power = 1.0 if config.optimizer.name in LINEAR else 0.5
  steps = epochs * count / batch_size if count else None
  found = {
    'data.train_split': train,
    'data.val_split': val,
    'batch_size': batch_size,
    'epochs': epochs,
    'schedule.warmup': epochs * recipe.warmup / max(recipe.epochs, 1e-9),
    'optimizer.lr': recipe.lr * (batch_size / recipe.batch_size) ** power,
    'checkpoint_every': 1000 if steps is None else math.ceil(steps / SAVES),
  }
  if config.data.image_size is None and not config.init:
    found |= choose_size(config, source, train)
  return found


def choose_batch(config: ConfigDict, count: int | None) -> int:
  """Returns a batch size for `count` training images, or for an unknown number (None)."""
  recipe = config.recipe
  unit = smallest_batch(config.micro_batches or 1, group(config), dict(config.mesh))
  most = recipe.batch_size
  if count:
    epochs = recipe.epochs if config.epochs is None else config.epochs
    most = min(most, count, max(MIN_BATCH, epochs * count / MIN_STEPS))
  return unit * 2 ** max(int(math.log2(max(most / unit, 1))), 0)


def choose_splits(config: ConfigDict, source: Source) -> tuple[str, str]:
  """Returns the splits for training and for validation.

  A `data.val_split` that is set is kept. If it is None, the dataset's own validation split is used.
  If the dataset has none and `data.train_split` is None, training images are held out. In all other
  cases, and if there are too few images to hold some out, the validation split is empty.
  """
  train, val = config.data.train_split, config.data.val_split
  # A folder such as val/ can have no images.
  own = [name for name in VALIDATION if source.sizes.get(name) and name != config.data.eval_split]
  if val is None and own:
    return train or 'train', own[0]
  if train is not None or val is not None:
    if val is None:
      log.warning(
        'data.train_split=%s is set, but data.val_split is None, so no images are held out for '
        'validation. Set data.val_split, or set data.train_split=None to hold out some images.',
        train,
      )
    return train or 'train', val or ''
  try:
    counts = [class_counts(source, part) for part in PARTS]
  except ValueError:  # a part has no images
    counts = None
  if counts is None or (counts[0] is not None and not counts[0].all()):
    log.warning('There are too few images to hold out some of them for validation.')
    return 'train', ''
  return PARTS


def class_counts(source: Source, split: str) -> np.ndarray | None:
  """Returns the number of images of each class in a split, `[L]`.

  The result is None if the dataset has no labels, or does not consist of listed files.

  Raises:
    ValueError: the split has no images.
  """
  pieces = source.pieces(split)
  if not source.class_names or any(name not in source.files for name, _, _ in pieces):
    return None
  labels = [source.files[name].label_N[start:stop] for name, start, stop in pieces]
  return count_labels(np.concatenate(labels), len(source.class_names))


def warn_of_few(config: ConfigDict, source: Source) -> None:
  """Logs a warning about classes with fewer than `FEW` held-out images."""
  for split in filter(None, (config.data.val_split, config.data.eval_split)):
    count_L = class_counts(source, split)
    if count_L is not None and (count_L < FEW).any():
      few = np.flatnonzero(count_L < FEW)
      text = abridged([f'{source.class_names[label]} ({count_L[label]})' for label in few])
      log.warning('The split %s has fewer than %d images of the classes %s.', split, FEW, text)


def choose_size(config: ConfigDict, source: Source | None, split: str) -> dict[str, tuple]:
  """Returns values for `data.image_size` and, if no patch size is set, for `model.patch_size`.

  The image size is the largest image size in `PATCHES` that is at most the median of the images'
  shorter sides. If the median is smaller than all sizes, the smallest size is used. If the dataset
  is not available, the largest size is used. If the config or the variant sets a patch size, the
  image size is rounded down to a multiple of the patch size. It is at least one patch.

  Args:
    config: config of a new run.
    source: dataset of the run; None if it is not available.
    split: the training split.
  """
  shorter = [min(size) for size in sample_sizes(source, split)] if source else []
  median = np.median(shorter) if shorter else max(PATCHES)
  size = max([size for size in PATCHES if size <= median], default=min(PATCHES))
  patch = config.model.patch_size
  if patch is None and '/' in (config.model.variant or DEFAULTS['model.variant']):
    patch = variant_fields(config.model.variant or DEFAULTS['model.variant'])['patch_size']
  if patch is None:
    return {'data.image_size': (size, size), 'model.patch_size': (PATCHES[size],) * 2}
  return {'data.image_size': tuple(max(size // n, 1) * n for n in pair(patch))}


def sample_sizes(source: Source, split: str) -> list[tuple[int, int]]:
  """Returns (height, width) of up to `SAMPLE` readable images, spread evenly over a split."""
  pieces, begin, found = source.pieces(split), 0, []
  step = -(-num_examples(pieces) // SAMPLE)
  for name, start, stop in pieces:
    for i in range(start + -begin % step, stop, step):
      try:
        found += [own_size(example) for example in source.read(name, [i])]
      except BadImage:  # reported when the image is decoded
        continue
    begin += stop - start
  return found
