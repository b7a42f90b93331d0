"""Decodes a split once and keeps the images in memory.

The alternative is `stream.py`, which decodes each image again in every epoch.

Decisions:
  * Images are kept as uint8. If all images have the same size, and the model's input is larger, a
    run can keep the images at their own size (`common_size`). The device then enlarges each batch.
    This saves memory: CIFAR-10 needs 0.15 GB with its own images of 32 x 32 pixels, but 7.5 GB with
    images of 224 x 224 pixels.
  * Each image is decoded into its row of the final array, so the split is never in memory twice.
"""

import abc
from collections.abc import Iterator, Mapping, Sequence
import concurrent.futures
import dataclasses
import itertools
import math
import socket
from typing import NoReturn, Self

import jax
import numpy as np

from vit_jax import limits, progress
from vit_jax.data import image as image_lib
from vit_jax.data import source as source_lib
from vit_jax.data import splits
from vit_jax.data.batching import Plan
from vit_jax.data.source import Source
from vit_jax.distributed import from_all, gather, num_cores
from vit_jax.names import SHOWN


class InMemory(abc.ABC):
  """A split in memory: the common part of `Examples` and `Features`."""

  label_N: np.ndarray

  @abc.abstractmethod
  def arrays(self) -> dict[str, np.ndarray]:
    """Returns the arrays with one row per example, by their names in a batch."""

  @classmethod
  @abc.abstractmethod
  def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
    """Creates a split from a dict like the result of the method `arrays`."""

  def __len__(self) -> int:
    return len(self.label_N)

  def batches(
    self, plan: Plan, over_batch: jax.sharding.Sharding
  ) -> Iterator[dict[str, jax.Array]]:
    """Yields the batches of a `Plan`, as dicts of global arrays with the names of `arrays`."""
    for step in plan.steps:
      index_B = plan.examples(plan.positions(step))
      yield {name: gather(array, index_B, over_batch) for name, array in self.arrays().items()}

  def some(self, index_N: Sequence[int]) -> Self:
    """Returns the examples at these indices."""
    return self.from_arrays({name: array[index_N] for name, array in self.arrays().items()})

  def joined(self, other: Self) -> Self:
    """Returns these examples, followed by the examples of `other`."""
    mine, more = self.arrays(), other.arrays()
    return self.from_arrays({name: np.concatenate([mine[name], more[name]]) for name in mine})


@dataclasses.dataclass(frozen=True)
class Examples(InMemory):
  """The decoded images and the labels of a split, in memory.

  Attributes:
    image_NHWC: uint8 images.
    label_N: class indices, int32, or multi-hot labels, uint8 `[N, L]`.
    skipped: one message for each bad image that was skipped.
  """

  image_NHWC: np.ndarray
  label_N: np.ndarray
  skipped: tuple[str, ...] = ()

  def arrays(self) -> dict[str, np.ndarray]:
    return {'image': self.image_NHWC, 'label': self.label_N}

  @classmethod
  def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
    return cls(image_NHWC=arrays['image'], label_N=arrays['label'])

  @property
  def size(self) -> tuple[int, int]:
    """Height and width of the images."""
    return self.image_NHWC.shape[1:3]

  def readable(self, index_N: Sequence[int]) -> np.ndarray:
    """Returns True for each index, because all images in memory are decoded: bool `[N]`."""
    return np.ones(len(index_N), bool)

  def content(self) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the arrays with images and labels, as (name, array) pairs, for a checksum."""
    yield 'images', self.image_NHWC
    yield 'labels', self.label_N


@dataclasses.dataclass(frozen=True)
class Features(InMemory):
  """The features that a backbone computed for a split, and the labels, in memory.

  Attributes:
    feature_ND: features, float32.
    label_N: class indices, int32, or multi-hot labels, uint8 `[N, L]`.
  """

  feature_ND: np.ndarray
  label_N: np.ndarray

  def arrays(self) -> dict[str, np.ndarray]:
    return {'feature': self.feature_ND, 'label': self.label_N}

  @classmethod
  def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
    return cls(feature_ND=arrays['feature'], label_N=arrays['label'])


@limits.memory_for('Reading images')
def load_examples(
  source: Source,
  split: str,
  size: tuple[int, int],
  skip_bad_images: bool = False,
  fit: image_lib.Fit = image_lib.fit_image,
) -> Examples:
  """Decodes a split and returns its examples in memory.

  Args:
    source: dataset that contains the split.
    split: the split in TFDS notation, such as `train[:90%]`.
    size: (height, width) that images are scaled to.
    skip_bad_images: skip images that cannot be decoded, instead of raising.
    fit: function `(image, size) -> image_HWC` for Pillow images, such as `image.fit_image`.

  Raises:
    image.BadImage: an image cannot be decoded, and bad images are not skipped.
    ValueError: the split does not exist, or none of its images can be used.
  """
  pieces = source.pieces(split)
  count = splits.num_examples(pieces)
  image_NHWC = np.empty((count, *size, source.channels), np.uint8)
  label_N = np.empty((count, *source.label_shape), source.label_type)

  def decode(example, row):
    """Decodes an example into row number `row`; returns the error message, or '' on success."""
    try:
      image_NHWC[row] = source_lib.pixels(source, example, size, fit)
    except image_lib.BadImage as error:
      return str(error)
    label_N[row] = example[2]
    return ''

  rows = itertools.count()
  with concurrent.futures.ThreadPoolExecutor(num_cores()) as pool:
    chunks = source_lib.read_pieces(source, pieces)
    decoded = (error for chunk in chunks for error in pool.map(decode, chunk, rows))
    errors = list(progress.bar(decoded, f'Reading {split}', 'image', count))
  if any(errors) and not skip_bad_images:
    stop_at_all(split, list(filter(None, errors)), count)
  good = [row for row, error in enumerate(errors) if not error]
  if not good:
    raise ValueError(f'Split {split!r}: all {count} images are unreadable or have a wrong label.')
  for row, old in enumerate(good):  # in place: a second array would double the memory
    if row != old:
      image_NHWC[row], label_N[row] = image_NHWC[old], label_N[old]
  return Examples(image_NHWC[: len(good)], label_N[: len(good)], tuple(filter(None, errors)))


def stop_at_all(split: str, errors: Sequence[str], count: int) -> NoReturn:
  """Raises one BadImage for all bad images of a split; its message quotes the first errors."""
  text = ' '.join(errors[:SHOWN])
  if len(errors) > 1:
    text = f'{split}: {len(errors):,} of {count:,} images are bad. {text}'
  if len(errors) > SHOWN:
    text += f' And {len(errors) - SHOWN:,} more.'
  source_lib.stop_at(image_lib.BadImage(text))


def common_size(source: Source, split: str, size: tuple[int, int]) -> tuple[int, int] | None:
  """Returns the common (height, width) of a split's images if smaller than `size`, else None.

  The result is None if two images have different sizes, or if an image is higher or wider than
  `size`. The result is also None if all images have exactly the size `size`. Bad images are
  ignored. The function uses `source.own_size`, which usually decodes no pixels. It stops at the
  first image that makes the result None.
  """
  found = None
  for chunk in source_lib.read_pieces(source, source.pieces(split)):
    for example in chunk:
      try:
        own = source_lib.own_size(example)
      except image_lib.BadImage:  # reported or skipped when it is decoded
        continue
      smaller = own[0] <= size[0] and own[1] <= size[1] and own != size
      if not smaller or found not in (None, own):
        return None
      found = own
  return found


def memory_share() -> float:
  """Returns the number of bytes of memory that this process may use.

  The processes on one host, for example one for each GPU, share `limits.limit()` bytes. All
  processes must call this function, because it counts the processes on each host.
  """
  host = socket.gethostname()
  return limits.limit() / from_all(host).count(host)


def excess(source: Source, names: Sequence[str], size: tuple[int, int], most: float) -> str:
  """Returns a message if the images of the splits `names` need more than `most / 2` bytes, else ''.

  Each image is a uint8 array with the (height, width) `size`.
  """
  count = sum(splits.num_examples(source.pieces(name)) for name in names)
  bytes_ = count * math.prod(size) * source.channels
  if bytes_ <= most / 2:
    return ''
  return (
    f'{count:,} images of {size[0]}x{size[1]} need {bytes_ / 1e9:.1f} GB, more than half of the '
    f'{most / 1e9:.1f} GB of memory that each process can use'
  )


def check_memory(source: Source, names: Sequence[str], size: tuple[int, int]) -> None:
  """Raises ValueError if the splits `names` need more than half of this process's memory.

  Each image is a uint8 array with the (height, width) `size`. All processes must call this
  function, because it counts the processes that share the memory of a host.
  """
  if too_much := excess(source, names, size, memory_share()):
    raise ValueError(
      f'{", ".join(names)}: {too_much}. Stream the images (data.cache=stream), use a part such '
      f'as {names[0]}[:10%], or set a smaller data.image_size.'
    )
