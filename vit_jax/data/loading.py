"""Opens the splits of a source, in memory or as a stream."""

from collections.abc import Mapping, Sequence
import dataclasses
import logging

import jax

from vit_jax.data import image as image_lib
from vit_jax.data import memory, stream
from vit_jax.data.batching import Split
from vit_jax.data.memory import Examples
from vit_jax.data.source import Source
from vit_jax.distributed import from_first

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Reading:
  """How splits are read.

  Attributes:
    cache: `memory`, `stream` or, until it is decided, `auto`.
    fit: what is made of a file.
    crop: arguments of the random part of a file that training sees; None where it sees all.
    skip_bad_images: leave out what can't be decoded, instead of stopping.
    workers: processes that decode a stream; 0: this one.
    threads: that decode in each of them; None: one a core.
  """

  cache: str
  fit: image_lib.Fit
  crop: Mapping[str, float] | None = None
  skip_bad_images: bool = False
  workers: int = 0
  threads: int | None = None


def decide_cache(
  reading: Reading,
  source: Source,
  names: Sequence[str],
  size: tuple[int, int],
  trains: bool = False,
) -> str:
  """Where splits are kept: `reading.cache`, decided where it is left open.

  Memory is taken where the splits fill no more than half of it, and where training sees the same
  batches as of a stream (`differs`): a run must not depend on the memory of its machine.
  Evaluation always sees the same pixels.

  Args:
    reading: of the splits.
    source: of the splits.
    names: of all splits that are held at once.
    size: (height, width) that images are fitted to.
    trains: whether the first of them is trained on.
  """
  if reading.cache != 'auto':
    return reading.cache

  def reason():
    too_much = memory.excess(source, names, size)
    return too_much or (differs(reading, source, names[0], size) if trains else '')

  # Hosts may have more or less memory: the first decides.
  why = from_first(reason) if jax.distributed.is_initialized() else reason()
  cache = 'stream' if why else 'memory'
  log.info(
    'data.cache: auto takes %s: %s.', cache, why or f'{", ".join(names)} fit into half of it'
  )
  return cache


def differs(reading: Reading, source: Source, split: str, size: tuple[int, int]) -> str:
  """Why training on a split in memory sees other batches than of a stream; empty if it does not.

  All else is the same on both ways: their order, how they are decoded and fitted, and what the
  device does to them.
  """
  if reading.crop:
    return 'augment.resized_crop cuts parts from the files, not from what was made of them'
  if reading.skip_bad_images:
    return 'data.skip_bad_images puts other images in the place of bad ones'
  if own := memory.common_size(source, split, size):
    return (
      f'memory would keep all images at their {own[0]}x{own[1]} pixels and augment them there, '
      f'before the device enlarges them to {size[0]}x{size[1]}'
    )
  return ''


def open_split(
  reading: Reading, source: Source, split: str, size: tuple[int, int], to_train: bool = False
) -> Split:
  """A split in memory or as a stream.

  Args:
    reading: how; its cache is decided.
    source: of the split.
    split: in TFDS notation.
    size: (height, width) of what comes out.
    to_train: it may be cropped at random.
  """
  if reading.cache == 'memory':
    return memory.load_examples(source, split, size, reading.skip_bad_images, reading.fit)
  return stream.open_stream(
    source,
    split,
    size=size,
    fit=reading.fit,
    crop=reading.crop if to_train else None,
    skip_bad_images=reading.skip_bad_images,
    workers=reading.workers,
    threads=reading.threads or stream.best_threads(reading.workers),
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
