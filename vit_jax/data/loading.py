"""Opens the splits of a source, in memory or as a stream."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import logging

import jax
import numpy as np

from vit_jax.data import image as image_lib
from vit_jax.data import memory, stream
from vit_jax.data.batching import Split
from vit_jax.data.memory import Examples
from vit_jax.data.source import Source
from vit_jax.distributed import from_all, from_first

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Reading:
  """Settings for reading splits.

  Attributes:
    cache: `memory`, `stream` or `auto`. For `auto`, `decide_cache` chooses `memory` or `stream`.
    fit: function `(image, size) -> image_HWC` that scales a Pillow image, e.g. `image.fit_image`.
    crop: {`min_area`, `max_aspect`} of the random crops in training; None: no random crops.
    skip_bad_images: skip images that cannot be decoded, instead of stopping.
    workers: number of worker processes that decode a stream; 0: decode in this process.
    threads: number of decoding threads in each process; None: the result of `stream.best_threads`.
    stack: function that joins a list of streamed images to a batch.
  """

  cache: str
  fit: image_lib.Fit
  crop: Mapping[str, float] | None = None
  skip_bad_images: bool = False
  workers: int = 0
  threads: int | None = None
  stack: Callable[[Sequence[np.ndarray]], object] = np.stack


def decide_cache(
  reading: Reading,
  source: Source,
  names: Sequence[str],
  size: tuple[int, int],
  kept: Callable[[], tuple[int, int] | None] | None = None,
) -> str:
  """Decides whether splits are kept in memory or streamed; returns `memory` or `stream`.

  The result is `reading.cache`, if this is not `auto`. For `auto`, the result is `memory` if two
  conditions hold. First, the splits need at most half of the available memory. Second, training
  batches from memory are the same as streamed batches (`differs` checks this). Because of the
  second condition, a run has the same outcome on machines with more or less memory. For evaluation,
  only the first condition counts, because evaluation batches from memory have the same pixels as
  streamed batches.

  Args:
    reading: settings for reading the splits.
    source: dataset that contains the splits.
    names: all splits that would be in memory at the same time.
    size: (height, width) that images are scaled to.
    kept: None for evaluation. For training, a function without arguments. If images would be kept
      in memory at a smaller size, and enlarged to `size` on the device, the function returns this
      smaller (height, width). Otherwise, it returns None.
  """
  if reading.cache != 'auto':
    return reading.cache
  most = min(from_all(memory.memory_share()))  # hosts may have different amounts of memory

  def reason():
    too_much = memory.excess(source, names, size, most)
    return too_much or (differs(reading, size, kept) if kept else '')

  why = from_first(reason) if jax.distributed.is_initialized() else reason()
  cache = 'stream' if why else 'memory'
  log.info(
    'data.cache=auto selects %s: %s.',
    cache,
    why or f'the splits {", ".join(names)} fit into half of the RAM',
  )
  return cache


def differs(
  reading: Reading, size: tuple[int, int], kept: Callable[[], tuple[int, int] | None]
) -> str:
  """Returns why training batches from memory would differ from streamed ones; '' if they agree.

  The reason is a text for the log. The arguments are the same as in `decide_cache`.
  """
  if reading.crop:
    return 'augment.resized_crop crops the original files only if images are streamed'
  if reading.skip_bad_images:
    return 'data.skip_bad_images replaces bad images with others only if images are streamed'
  if own := kept():
    return (
      f'with data.cache=memory, images would be augmented at {own[0]}x{own[1]} pixels, and only '
      f'then enlarged to {size[0]}x{size[1]} pixels'
    )
  return ''


def open_split(
  reading: Reading, source: Source, split: str, size: tuple[int, int] | None, to_train: bool = False
) -> Split:
  """Opens a split in memory or as a stream.

  Args:
    reading: settings for reading the split; `cache` must not be `auto`.
    source: dataset that contains the split.
    split: the split in TFDS notation, such as `train[:90%]`.
    size: (height, width) of the images; None: `reading.fit` chooses the size of each image.
    to_train: whether the split is used for training. If False, `reading.crop` is ignored.
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
    stack=reading.stack,
  )


def report_split(name: str, examples: Split | None) -> None:
  """Logs the number of examples in the split `name`, and each bad image that was skipped.

  Nothing is logged if `examples` is None.
  """
  if examples is None:
    return
  log.info('%s: %s examples', name, f'{len(examples):,}')
  if isinstance(examples, Examples) and examples.skipped:
    log.warning('%s: skipped %d bad images:', name, len(examples.skipped))
    for message in examples.skipped:
      log.warning('  %s', message)
