"""Reads, decodes and crops examples batch by batch, for splits that are not kept in memory.

Decisions:
  * The step number is enough to resume, as for splits in memory. Grain (a data loading library)
    makes each batch in parts of a few rows, and each part depends only on its number. So batches do
    not depend on the number of threads and workers, or on the order in which parts are finished.
  * A process decodes only the rows that its own devices hold. The random numbers of an example
    depend only on the seed and on the position of the example in the endless training sequence. So
    any number of processes makes the same batches.
  * Random crops are taken on the host, at full resolution. The device does all other augmentation.
  * An image that cannot be decoded stops the run. With `skip_bad_images`, the next good example of
    the split replaces it. A run counts its replacements. Every run chooses the same replacements.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import concurrent.futures
import dataclasses
import functools
import inspect
import itertools
import logging

import jax
import numpy as np
import PIL

from vit_jax import limits
from vit_jax.data import image as image_lib
from vit_jax.data import splits
from vit_jax.data.batching import Plan
from vit_jax.data.label_rows import label_text
from vit_jax.data.memory import Examples
from vit_jax.data.source import Example, Source, as_bytes, check_label, fetched, pixels, stop_at
from vit_jax.distributed import (
  check_can_start,
  end_with_parent,
  local_rows,
  num_cores,
  place_rows,
  unsignalled,
)

log = logging.getLogger(__name__)

PART = 16  # rows that a thread decodes at a time
AHEAD = 2  # maximum number of batches that wait on the devices for their step
WARNED = {}  # messages that were already logged


@dataclasses.dataclass(frozen=True)
class Stream:
  """A split that is read and decoded again in every epoch, in contrast to `memory.Examples`.

  Attributes:
    source: dataset that contains the examples.
    pieces: `(split, start, stop)` ranges of examples that make up the split, in order.
    size: (height, width) of the images; None: `fit` chooses the size of each image.
    fit: function that scales an image, as in `memory.load_examples`.
    crop: {`min_area`, `max_aspect`} of the random crops in training; None: no random crops.
    skip_bad_images: True: replace images that cannot be decoded; False: raise an error.
    workers: number of worker processes that decode; 0: decode in this process.
    threads: number of decoding threads in each process.
    stack: function that joins a list of images to a batch.
  """

  source: Source
  pieces: tuple[tuple[str, int, int], ...]
  size: tuple[int, int] | None
  fit: image_lib.Fit
  crop: Mapping[str, float] | None = None
  skip_bad_images: bool = False
  workers: int = 0
  threads: int = 1
  stack: Callable[[Sequence[np.ndarray]], object] = np.stack

  def __len__(self) -> int:
    return splits.num_examples(self.pieces)

  @functools.cached_property
  def label_N(self) -> np.ndarray:
    """Labels of all examples, `[N]` or `[N, L]`. For TFDS data, this reads the whole split."""
    return np.array([label for _, _, label in self.read_all()], self.source.label_type)

  def batches(
    self, plan: Plan, over_batch: jax.sharding.Sharding
  ) -> Iterator[dict[str, jax.Array]]:
    """Yields the batches of a `Plan`, as dicts of global arrays with the same keys as in `rows`.

    The caller must close this iterator, because the worker processes run until it is closed.

    Raises:
      image.BadImage: an image cannot be decoded, and `skip_bad_images` is False.
      ValueError: the data cannot be read, the workers cannot be started, or a worker died.
    """
    if self.workers:
      check_can_start()
    grain = open_grain()
    row_N = local_rows(over_batch, plan.rows)
    parts = [row_N[i : i + PART] for i in range(0, len(row_N), PART)]
    each = -(-len(parts) // max(self.workers, 1))  # the workers decode one batch ahead
    found = grain.MapDataset.range(len(plan.steps) * len(parts))
    found = found.map(functools.partial(read_part, self, plan, parts))
    found = found.to_iter_dataset(grain.ReadOptions(self.threads, max(self.threads, each)))
    options = grain.MultiprocessingOptions(self.workers, each)
    found = found.mp_prefetch(options, worker_init_fn=end_with_parent)
    found = found.batch(len(parts), batch_fn=join_parts)
    found = found.map(functools.partial(place_rows, row_N, plan.rows, over_batch))
    iterator = iter(grain.experimental.ThreadPrefetchIterDataset(found, prefetch_buffer_size=AHEAD))
    try:
      with unsignalled():
        iterator.start_prefetch()
      yield from iterator
    except RuntimeError as error:
      if 'Worker process' not in str(error):
        raise
      raise ValueError(
        f'A worker process that decodes images died: {error} If memory ran out, use fewer '
        'data.workers. Repeat the command to resume from the last checkpoint.'
      ) from error
    finally:
      iterator.close()

  def some(self, index_N: Sequence[int]) -> Examples:
    """Returns the examples at these indices, decoded without random crops, as `Examples`."""
    return Examples.from_arrays(self.decode_all(index_N))

  def decode_all(self, index_N: Sequence[int]) -> dict[str, np.ndarray]:
    """Returns the same dict as `rows`, but decodes with several threads (`threads`)."""
    parts = [index_N[i : i + PART] for i in range(0, len(index_N), PART)]
    with concurrent.futures.ThreadPoolExecutor(self.threads) as pool:
      return join_parts(list(pool.map(self.rows, parts)))

  def readable(self, index_N: Sequence[int]) -> np.ndarray:
    """Returns whether each image at these indices can be decoded: bool `[N]`.

    If `skip_bad_images` is False, the result is always True, and no image is decoded.
    """
    if not self.skip_bad_images or not len(index_N):
      return np.ones(len(index_N), bool)
    return self.decode_all(index_N)['bad'] == 0

  def joined(self, other: 'Stream') -> 'Stream':
    """Returns a stream of these examples, followed by the examples of `other`."""
    return dataclasses.replace(self, pieces=self.pieces + other.pieces)

  def content(self) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, array) pairs for a checksum: settings, code of `image.py`, images as stored."""
    about = self.size, sorted(getattr(self.fit, 'keywords', {}).items()), PIL.__version__
    yield 'fit', np.frombuffer(repr(about).encode(), np.uint8)
    yield 'code', np.frombuffer(inspect.getsource(image_lib).encode(), np.uint8)
    for name, encoded, label in fetched(self.read_all()):
      try:
        whole = encoded if isinstance(encoded, np.ndarray) else as_bytes(encoded)
      except image_lib.BadImage as error:
        if not self.skip_bad_images:
          stop_at(error)
        whole = b''
      yield f'{label_text(label)} {name}', np.frombuffer(whole, np.uint8)

  def read_all(self) -> Iterator[Example]:
    """Yields every example (name, image, label) in order, without decoding its image."""
    for split, start, stop in self.pieces:
      yield from self.source.read(split, range(start, stop))

  def read(self, index_N: Sequence[int]) -> list[Example]:
    """Returns the examples (name, image, label) at these indices, without decoding images."""
    index_N = np.asarray(index_N)
    begins = np.cumsum([0] + [stop - start for _, start, stop in self.pieces])
    piece_N = np.searchsorted(begins, index_N, side='right') - 1
    found = [None] * len(index_N)
    for piece in np.unique(piece_N):  # there may be thousands of pieces; most are not needed
      split, start, _ = self.pieces[piece]
      rows = np.flatnonzero(piece_N == piece)
      places = (index_N[rows] - begins[piece] + start).tolist()
      for row, example in zip(rows, self.source.read(split, places)):
        found[row] = example
    return found

  @limits.memory_for('Decoding images')
  def rows(
    self, index_N: Sequence[int], uniform_N4: np.ndarray | None = None
  ) -> dict[str, np.ndarray]:
    """Returns the decoded examples at these indices: {'image': joined by `stack`, 'label': array}.

    If `skip_bad_images` is True, the dict also has `bad` `[N]` int32. For each row, `bad` is the
    number of bad images that were skipped to find a good image.

    Args:
      index_N: indices of the examples.
      uniform_N4: random numbers in [0, 1) for the crops (`image.random_part`); None: no crops.
    """
    row_N, draws = range(len(index_N)), uniform_N4
    if draws is None:  # decode repeated examples, such as padding, only once per part
      (index_N, row_N), draws = np.unique(index_N, return_inverse=True), itertools.repeat(None)
    rows = [self.good(*row) for row in zip(fetched(self.read(index_N)), index_N, draws)]
    image, label, bad = zip(*(rows[i] for i in row_N))
    found = {'image': self.stack(image), 'label': np.array(label, self.source.label_type)}
    return found | ({'bad': np.array(bad, np.int32)} if self.skip_bad_images else {})

  def good(
    self, example: Example, index: int, uniform_4: np.ndarray | None
  ) -> tuple[np.ndarray, int | np.ndarray, int]:
    """Returns (image, label, number of skipped examples) for `example` or the next good example.

    `index` is the index of `example`. After the last example, the search continues at the first.

    Raises:
      image.BadImage: the image is bad and `skip_bad_images` is False, or all images are bad.
    """
    for bad in itertools.count(1):
      try:
        return self.decode(example, uniform_4), example[2], bad - 1
      except image_lib.BadImage as error:
        if not self.skip_bad_images:
          stop_at(error)
        if bad == len(self):
          raise
        warn(str(error))
        (example,) = self.read([(index + bad) % len(self)])

  def decode(self, example: Example, uniform_4: np.ndarray | None) -> np.ndarray:
    """Decodes an image, and crops it at random or, if `uniform_4` is None, scales it with `fit`.

    `uniform_4` holds the random numbers that choose the crop (`image.random_part`).

    Raises:
      image.BadImage: the image cannot be decoded, or the source has no class for its label.
    """
    name, encoded, label = example
    if uniform_4 is None:
      return pixels(self.source, example, self.size, self.fit)
    check_label(self.source, name, label)
    choose = functools.partial(image_lib.random_part, uniform_4, **self.crop)
    if isinstance(encoded, np.ndarray):
      return image_lib.scale_part(encoded, choose(*encoded.shape[:2]), self.size)
    return image_lib.decode_part(as_bytes(encoded), name, self.source.channels, choose, self.size)


def warn(message: str) -> None:
  """Logs a message only once, because a bad image is reported again in every epoch."""
  if WARNED.setdefault(message, token := object()) is token:
    log.warning('%s', message)


def best_threads(workers: int) -> int:
  """Returns the default number of decoding threads per process: at most 16, because of the GIL."""
  return min(16, max(1, num_cores() // max(1, workers)))


def open_grain():
  """Imports and returns `grain`. Marks absl's flags as parsed, because Grain reads absl flags."""
  from absl import flags
  import grain

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  return grain


def open_stream(source: Source, split: str, **arguments) -> Stream:
  """Opens a split as a stream; `arguments` are attributes of `Stream`.

  Raises:
    ValueError: the split does not exist, or contains no examples.
  """
  return Stream(source, tuple(source.pieces(split)), **arguments)


def read_part(
  stream: Stream, plan: Plan, parts: list[np.ndarray], number: int
) -> dict[str, np.ndarray]:
  """Returns the decoded rows of one part of a batch. Grain calls this in its threads or workers.

  Args:
    stream: the stream that holds the examples.
    plan: the plan of the batches.
    parts: for each part of a batch, the indices of its rows in the batch.
    number: index of the part to read. The parts of all batches are numbered consecutively from 0.
  """
  step, part = divmod(number, len(parts))
  position_N = plan.positions(plan.steps[step])[parts[part]]
  random = plan.seed is not None and stream.crop is not None
  uniform_N4 = np.stack([draw_uniform(plan.seed, p) for p in position_N]) if random else None
  return stream.rows(plan.examples(position_N), uniform_N4)


def draw_uniform(seed: int, position: int) -> np.ndarray:
  """Returns random numbers in [0, 1) for a position in the training sequence: float64 `[4]`."""
  # The position is part of the key, so each position has its own numbers. We draw raw bits, because
  # NumPy guarantees the same bits in every version, but not the same floats.
  bits = np.random.Philox(key=np.array([seed, position], np.uint64)).random_raw(4)
  return (bits >> np.uint64(11)) * 2.0**-53


def join_parts(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """Concatenates the arrays of all parts by name, and removes the old arrays from the parts."""
  # Grain's stack frames refer to the parts until the iterator ends. This is too late to free memory
  # that is shared with the workers, so the parts are emptied here.
  join = lambda *arrays: np.concatenate(list(map(np.asarray, arrays)))
  return {name: jax.tree.map(join, *[part.pop(name) for part in parts]) for name in list(parts[0])}
