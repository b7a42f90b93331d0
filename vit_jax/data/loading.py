"""Opens the splits of a source, in memory or as a stream."""

from collections.abc import Sequence
import logging

import jax
from ml_collections import ConfigDict

from vit_jax import config as config_lib
from vit_jax.augment import AUGMENTATIONS
from vit_jax.data import image as image_lib
from vit_jax.data import memory, stream
from vit_jax.data.memory import Examples
from vit_jax.data.source import Source
from vit_jax.data.stream import Stream
from vit_jax.distributed import from_first

log = logging.getLogger(__name__)

Split = Examples | Stream


def decide_cache(
  config: ConfigDict,
  source: Source,
  names: Sequence[str],
  size: tuple[int, int],
  trains: bool = False,
) -> ConfigDict:
  """The config with `data.cache` decided, if it is left open.

  Memory is taken where the splits fill no more than half of it, and where training sees the same
  batches as of a stream (`differs`): a run must not depend on the memory of its machine.
  Evaluation always sees the same pixels.

  Args:
    config: of the run.
    source: of the splits.
    names: of all splits that are held at once.
    size: (height, width) that images are fitted to.
    trains: whether the first of them is trained on.
  """
  if config.data.cache != 'auto':
    return config

  def reason():
    too_much = memory.excess(source, names, size)
    return too_much or (differs(config, source, names[0], size) if trains else '')

  # Hosts may have more or less memory: the first decides.
  why = from_first(reason) if jax.distributed.is_initialized() else reason()
  cache = 'stream' if why else 'memory'
  log.info(
    'data.cache: auto takes %s: %s.', cache, why or f'{", ".join(names)} fit into half of it'
  )
  return config_lib.fill(config, {'data.cache': cache})


def differs(config: ConfigDict, source: Source, split: str, size: tuple[int, int]) -> str:
  """Why training on a split in memory sees other batches than of a stream; empty if it does not.

  All else is the same on both ways: their order, how they are decoded and fitted, and what the
  device does to them.
  """
  if AUGMENTATIONS['resized_crop'].on(config.augment.resized_crop):
    return 'augment.resized_crop cuts parts from the files, not from what was made of them'
  if config.data.skip_bad_images:
    return 'data.skip_bad_images puts other images in the place of bad ones'
  if own := memory.common_size(source, split, size):
    return (
      f'memory would keep all images at their {own[0]}x{own[1]} pixels and augment them there, '
      f'before the device enlarges them to {size[0]}x{size[1]}'
    )
  return ''


def open_split(
  config: ConfigDict,
  source: Source,
  split: str,
  size: tuple[int, int],
  fit: image_lib.Fit,
  to_train: bool = False,
) -> Split:
  """A split in memory or as a stream, as `data.cache` says.

  Args:
    config: its cache decided.
    source: of the split.
    split: in TFDS notation.
    size: (height, width) of what comes out.
    fit: `Experiment.fit`.
    to_train: it may be cropped at random.
  """
  data, crop = config.data, config.augment.resized_crop
  if data.cache == 'memory':
    return memory.load_examples(source, split, size, data.skip_bad_images, fit)
  cropped = to_train and AUGMENTATIONS['resized_crop'].on(crop)
  return stream.open_stream(
    source,
    split,
    size=size,
    fit=fit,
    crop=crop.to_dict() if cropped else None,
    skip_bad_images=data.skip_bad_images,
    workers=data.workers,
    threads=data.threads or stream.best_threads(data.workers),
  )


def report_split(name: str, examples: Split | None) -> None:
  """Logs the size of a split, and each image left out."""
  if examples is None:
    return
  log.info('%s: %s examples', name, f'{len(examples):,}')
  if isinstance(examples, Examples) and examples.skipped:
    log.warning('%s: skipped %d bad images:', name, len(examples.skipped))
    for message in examples.skipped:
      log.warning('  %s', message)
