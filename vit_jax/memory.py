"""A split in memory: what is decoded once. `stream.py` has what is decoded anew in every epoch.

Decisions:
  * Images are kept as uint8, at their own size where all have one and it is no larger
    than the model's; the device enlarges them. CIFAR-10 at 224 pixels would fill 7.5 GB.
"""

from collections.abc import Iterator, Sequence
import concurrent.futures
import dataclasses
import math
import os

import jax
import numpy as np

from vit_jax import image as image_lib
from vit_jax import progress, sharding, sources, splits


@dataclasses.dataclass(frozen=True)
class Examples:
  """A split in memory: `image_NHWC` uint8, `label_N` int32; `skipped` names bad images."""

  image_NHWC: np.ndarray
  label_N: np.ndarray
  skipped: tuple[str, ...] = ()

  def __len__(self) -> int:
    return len(self.label_N)

  @property
  def size(self) -> tuple[int, int]:
    """Height and width."""
    return self.image_NHWC.shape[1:3]

  def batches(self, plan, over_batch: jax.sharding.Sharding) -> Iterator[dict[str, jax.Array]]:
    """The batches of a `data.Plan`: `image` and `label`."""
    for step in plan.steps:
      index_B = plan.examples(plan.positions(step))
      yield {
        'image': sharding.gather(self.image_NHWC, index_B, over_batch),
        'label': sharding.gather(self.label_N, index_B, over_batch),
      }

  def some(self, index_N: Sequence[int]) -> 'Examples':
    """Those at these places."""
    return Examples(self.image_NHWC[index_N], self.label_N[index_N])

  def joined(self, other: 'Examples') -> 'Examples':
    """These, and after them the others."""
    return Examples(
      np.concatenate([self.image_NHWC, other.image_NHWC]),
      np.concatenate([self.label_N, other.label_N]),
    )

  def content(self) -> Iterator[tuple[str, np.ndarray]]:
    """What tells these examples from others: arrays by name."""
    yield 'images', self.image_NHWC
    yield 'labels', self.label_N


def load(
  source: sources.Source,
  split: str,
  size: tuple[int, int],
  keep_smaller: bool = False,
  skip_bad_images: bool = False,
  fit: image_lib.Fit = image_lib.fit,
) -> Examples:
  """Reads a split into memory.

  Args:
    source: what to read.
    split: in TFDS notation.
    size: (height, width) that images are fitted to.
    keep_smaller: leave images as they are where all are of one size not above `size`.
    skip_bad_images: leave out what can't be decoded, instead of raising.
    fit: `image.fit`, its further arguments bound.

  Raises:
    image.BadImage: the first file that can't be decoded.
    ValueError: the split doesn't exist or holds nothing.
  """

  def keep_or_fit(image, size):
    smaller = image.height <= size[0] and image.width <= size[1]
    return np.asarray(image) if keep_smaller and smaller else fit(image, size)

  def decode(example):
    try:
      return example[0], sources.pixels(source, example, size, keep_or_fit), example[2]
    except image_lib.BadImage as error:
      if not skip_bad_images:
        sources.stop_at(error)
      return str(error), None, example[2]

  pieces = source.pieces(split)
  count = splits.length(pieces)
  check_memory(split, count, size, source.channels)

  def read():
    for name, start, stop in pieces:
      yield from source.read(name, range(start, stop))

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    chunks = sources.chunks(read(), 4096)
    read_all = (example for chunk in chunks for example in pool.map(decode, chunk))
    decoded = list(progress.bar(read_all, f'Reading {split}', 'image', count))
  skipped = tuple(name for name, image, _ in decoded if image is None)
  good = [(image, label) for _, image, label in decoded if image is not None]
  if not good:
    raise ValueError(f'Split {split!r}: all {len(skipped)} images are bad.')
  images = [image for image, _ in good]
  if keep_smaller and len({image.shape for image in images}) > 1:
    images = [image_lib.refit(image, size, fit) for image in images]
  return Examples(np.stack(images), np.array([label for _, label in good], np.int32), skipped)


def need(count: int, size: tuple[int, int], channels: int) -> str:
  """How much memory images need where that is more than half of the machine's; else empty."""
  bytes_ = count * math.prod(size) * channels
  memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  if bytes_ <= memory / 2:
    return ''
  return (
    f'{count:,} images of {size[0]}x{size[1]} need {bytes_ / 1e9:.1f} GB, this machine has '
    f'{memory / 1e9:.1f} GB'
  )


def check_memory(split: str, count: int, size: tuple[int, int], channels: int) -> None:
  """Raises ValueError where a split would fill more than half of the memory."""
  if too_much := need(count, size, channels):
    raise ValueError(
      f'Split {split!r}: {too_much}. Stream it (data.cache=stream), take a part, e.g. '
      f'{split}[:10%], or set a smaller data.image_size.'
    )
