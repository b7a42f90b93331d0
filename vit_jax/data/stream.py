"""Examples that are read, decoded and cropped while training goes on: what memory does not hold.

Decisions:
  * The step is the whole state here too. Grain maps the number of a part, some rows of a batch,
    to its pixels; threads, worker processes and order of arrival change nothing.
  * A process decodes only the rows that its own devices hold. All draws of an example derive from
    the seed and its position in the endless sequence, so that any number of processes makes the
    same batches.
  * A random crop is taken from the file at its full resolution, in the place of the device's.
    All other augmentations stay on the device.
  * What is bad stops the run, or gives way to the next good example, with that one's label: the
    same one in every run. Counted either way.
"""

from collections.abc import Iterator, Mapping, Sequence
import concurrent.futures
import dataclasses
import functools
import inspect
import itertools
import logging

import jax
import numpy as np
import PIL

from vit_jax.data import image as image_lib
from vit_jax.data import splits
from vit_jax.data.batching import Plan
from vit_jax.data.memory import Examples
from vit_jax.data.source import Example, Source, as_bytes, check_label, pixels, stop_at
from vit_jax.distributed import (
  check_can_start,
  end_with_parent,
  local_rows,
  num_cores,
  place_rows,
  unsignalled,
)

log = logging.getLogger(__name__)

PART = 16  # rows that a thread decodes before it goes on to others
AHEAD = 2  # batches on the device before they are asked for


@dataclasses.dataclass(frozen=True)
class Stream:
  """A split that is read anew in every epoch, in the place of `memory.Examples`.

  Attributes:
    source: what is read.
    pieces: `(split, start, stop)`, one after the other.
    size: (height, width) of what comes out.
    fit: as for `memory.load_examples`.
    crop: `min_area` and `max_aspect` of the random parts that training sees; None: `fit` decides.
    skip_bad_images: replace what can't be decoded, instead of raising.
    workers: processes that decode; 0: this one.
    threads: that decode in each of them.
  """

  source: Source
  pieces: tuple[tuple[str, int, int], ...]
  size: tuple[int, int]
  fit: image_lib.Fit
  crop: Mapping[str, float] | None = None
  skip_bad_images: bool = False
  workers: int = 0
  threads: int = 1

  def __len__(self) -> int:
    return splits.num_examples(self.pieces)

  @functools.cached_property
  def label_N(self) -> np.ndarray:
    """Every label, int32: quick of a folder; of TFDS the records are read for it."""
    return np.array([label for _, _, label in self.read_all()], np.int32)

  def batches(
    self, plan: Plan, over_batch: jax.sharding.Sharding
  ) -> Iterator[dict[str, jax.Array]]:
    """The batches of a `Plan`: `image`, `label` and, where bad images are replaced, `bad`.

    To be closed, which ends the workers.

    Raises:
      image.BadImage: an example that can't be decoded, where they are not replaced.
      ValueError: the data can't be read, workers can't be started, or one died.
    """
    if self.workers:
      check_can_start()
    grain = open_grain()
    row_N = local_rows(over_batch, plan.rows)
    parts = [row_N[i : i + PART] for i in range(0, len(row_N), PART)]
    each = -(-len(parts) // max(self.workers, 1))  # so that every worker is a batch ahead
    found = grain.MapDataset.range(len(plan.steps) * len(parts))
    found = found.map(functools.partial(read_part, self, plan, parts))
    found = found.to_iter_dataset(grain.ReadOptions(self.threads, max(self.threads, each)))
    found = found.mp_prefetch(
      grain.MultiprocessingOptions(self.workers, each), worker_init_fn=end_with_parent
    )
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
        f'A worker process that decodes images died: {error} If memory ran out, fewer data.workers '
        'need less. The same command goes on from the last checkpoint.'
      ) from error
    finally:
      iterator.close()

  def some(self, index_N: Sequence[int]) -> Examples:
    """Those at these places, in memory, as evaluation sees them."""
    found = self.decode_all(index_N)
    return Examples(found['image'], found['label'])

  def decode_all(self, index_N: Sequence[int]) -> dict[str, np.ndarray]:
    """The `rows` at these places, decoded by several threads."""
    parts = [index_N[i : i + PART] for i in range(0, len(index_N), PART)]
    with concurrent.futures.ThreadPoolExecutor(self.threads) as pool:
      return join_parts(list(pool.map(self.rows, parts)))

  def readable(self, index_N: Sequence[int]) -> np.ndarray:
    """Whether the images at these places can be decoded, `[N]`; all where bad ones stop the run."""
    if not self.skip_bad_images or not len(index_N):
      return np.ones(len(index_N), bool)
    return self.decode_all(index_N)['bad'] == 0

  def joined(self, other: 'Stream') -> 'Stream':
    """These, and after them the others."""
    return dataclasses.replace(self, pieces=self.pieces + other.pieces)

  def content(self) -> Iterator[tuple[str, np.ndarray]]:
    """What tells these examples from others: arrays by name, of files and what is made of them."""
    about = self.size, sorted(getattr(self.fit, 'keywords', {}).items()), PIL.__version__
    yield 'fit', np.frombuffer(repr(about).encode(), np.uint8)
    yield 'code', np.frombuffer(inspect.getsource(image_lib).encode(), np.uint8)
    for name, encoded, label in self.read_all():
      try:
        whole = encoded if isinstance(encoded, np.ndarray) else as_bytes(encoded)
      except image_lib.BadImage as error:
        if not self.skip_bad_images:
          stop_at(error)
        whole = b''
      yield f'{label} {name}', np.frombuffer(whole, np.uint8)

  def read_all(self) -> Iterator[Example]:
    """Every example in order, not decoded."""
    for split, start, stop in self.pieces:
      yield from self.source.read(split, range(start, stop))

  def read(self, index_N: Sequence[int]) -> list[Example]:
    """The examples at these places, not decoded."""
    index_N = np.asarray(index_N)
    begins = np.cumsum([0] + [stop - start for _, start, stop in self.pieces])
    piece_N = np.searchsorted(begins, index_N, side='right') - 1
    found = [None] * len(index_N)
    for piece in np.unique(piece_N):  # of what may be thousands, where examples are left out
      split, start, _ = self.pieces[piece]
      rows = np.flatnonzero(piece_N == piece)
      places = (index_N[rows] - begins[piece] + start).tolist()
      for row, example in zip(rows, self.source.read(split, places)):
        found[row] = example
    return found

  def rows(
    self, index_N: Sequence[int], uniform_N4: np.ndarray | None = None
  ) -> dict[str, np.ndarray]:
    """The examples at these places, decoded: `image`, `label`, and `bad`: how many gave way.

    Args:
      index_N: the places.
      uniform_N4: of `image.random_part`; None: no random part.
    """
    draws = itertools.repeat(None) if uniform_N4 is None else uniform_N4
    rows = [self.good(*row) for row in zip(self.read(index_N), index_N, draws)]
    image, label, bad = zip(*rows)
    found = {'image': np.stack(image), 'label': np.array(label, np.int32)}
    return found | ({'bad': np.array(bad, np.int32)} if self.skip_bad_images else {})

  def good(
    self, example: Example, index: int, uniform_4: np.ndarray | None
  ) -> tuple[np.ndarray, int, int]:
    """The image and label of the first good example from this one on; how many were bad.

    Raises:
      image.BadImage: it is bad and to stop the run, or all are.
    """
    for bad in range(1, len(self) + 1):
      try:
        return self.decode(example, uniform_4), example[2], bad - 1
      except image_lib.BadImage as error:
        if not self.skip_bad_images:
          stop_at(error)
        if bad == len(self):
          raise
        warn(str(error))
        (example,) = self.read([(index + bad) % len(self)])
    raise AssertionError('a split holds examples')

  def decode(self, example: Example, uniform_4: np.ndarray | None) -> np.ndarray:
    """`image_HWC`, uint8, of an example: a random part of it, or what `fit` makes of it.

    Raises:
      image.BadImage: it can't be decoded, or has a label that the source has not.
    """
    name, encoded, label = example
    if uniform_4 is None:
      return pixels(self.source, example, self.size, self.fit)
    check_label(self.source, name, label)
    choose = functools.partial(image_lib.random_part, uniform_4, **self.crop)
    if isinstance(encoded, np.ndarray):
      return image_lib.scale_part(encoded, choose(*encoded.shape[:2]), self.size)
    whole = as_bytes(encoded)
    return image_lib.decode_part(whole, name, self.source.channels, choose, self.size)


@functools.cache
def warn(message: str) -> None:
  """Logs it once: a bad image comes again in every epoch."""
  log.warning('%s', message)


def best_threads(workers: int) -> int:
  """Threads of each process where none are asked for. More would wait for Python's lock."""
  return min(16, max(1, num_cores() // max(1, workers)))


def open_grain():
  """Grain, imported where it is needed. It reads flags of absl's, which may not be in use here."""
  from absl import flags
  import grain

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  return grain


def open_stream(source: Source, split: str, **arguments) -> Stream:
  """A split as a stream; `Stream` has the arguments.

  Raises:
    ValueError: the split doesn't exist or holds nothing.
  """
  return Stream(source, tuple(source.pieces(split)), **arguments)


def read_part(
  stream: Stream, plan: Plan, parts: list[np.ndarray], number: int
) -> dict[str, np.ndarray]:
  """The pixels of some rows of a batch: what Grain calls, in threads and workers.

  Args:
    stream: whose examples they are.
    plan: a `Plan`.
    parts: the rows of each part of a batch.
    number: of the part, counted from the plan's first batch on.
  """
  step, part = divmod(number, len(parts))
  position_N = plan.positions(plan.steps[step])[parts[part]]
  random = plan.seed is not None and stream.crop is not None
  uniform_N4 = np.stack([draw_uniform(plan.seed, p) for p in position_N]) if random else None
  return stream.rows(plan.examples(position_N), uniform_N4)


def draw_uniform(seed: int, position: int) -> np.ndarray:
  """Four numbers in [0, 1) of a position."""
  # A counter of its own for each position. Bits are drawn, not numbers, because NumPy keeps the
  # stream of bits for good, and that of numbers not.
  bits = np.random.Philox(key=np.array([seed, position], np.uint64)).random_raw(4)
  return (bits >> np.uint64(11)) * 2.0**-53


def join_parts(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """One dictionary of arrays from several, which are emptied, in this process's own memory."""
  # Frames of Grain's hold parts till the end, when it is too late to free what workers share.
  names = list(parts[0])
  return {name: np.concatenate([np.asarray(part.pop(name)) for part in parts]) for name in names}
