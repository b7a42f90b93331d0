"""Makes batches: for training in a reproducible order, for evaluation with each example once.

Decisions:
  * Training reads one endless sequence, in which each epoch is a new permutation of the examples.
    The sequence is cut into batches, so a batch can have examples of two epochs. The example at
    position `step * batch_size + i` of the sequence depends only on the seed and the number of
    examples. So the step number is enough to resume, and no example is dropped at the end of an
    epoch.
  * A batch is a global array. Each process gathers only the rows that its own devices hold. All
    processes compute the same order, so they need not communicate.
  * Evaluation pads the last batch and adds a mask, so that every example counts once.
  * A `Plan` lists the examples of each batch. The batches of a plan are the same for examples in
    memory (`memory.py`) and for streamed examples (`stream.py`).
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
from typing import Protocol

import jax
import numpy as np

from vit_jax.distributed import gather

ENDLESS = 2**48  # number of training steps, more than any run takes


@functools.lru_cache(maxsize=2)  # a batch may cross from one epoch to the next
def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
  """Returns the order of `size` examples in an epoch: a permutation of their indices, `[size]`."""
  # NumPy guarantees that RandomState's numbers never change, so a run that is resumed with a newer
  # NumPy keeps its order.
  return np.random.RandomState([seed, epoch]).permutation(size)


@dataclasses.dataclass(frozen=True)
class Plan:
  """Defines which examples each batch holds.

  All batches are ranges of one sequence of examples. Batch `step` begins at position
  `step * stride` of this sequence.

  Attributes:
    size: number of examples.
    stride: number of positions from the start of one batch to the start of the next.
    rows: number of rows in a batch.
    steps: the step numbers of the batches.
    seed: seed of the order and of the random numbers for each position, for training. None means
      evaluation: the sequence is the examples in their own order, then copies of the last example
      as padding. No example is cropped at random.
  """

  size: int
  stride: int
  rows: int
  steps: range
  seed: int | None = None

  def positions(self, step: int) -> np.ndarray:
    """Returns the positions in the sequence that a batch covers, one per row: `[rows]`."""
    return step * self.stride + np.arange(self.rows)

  def examples(self, position_N: np.ndarray) -> np.ndarray:
    """Returns the indices of the examples at the positions `position_N` of the sequence: `[N]`."""
    if self.seed is None:
      return np.minimum(position_N, self.size - 1)
    epoch_N, offset_N = np.divmod(position_N, self.size)
    index_N = np.empty_like(position_N)
    for epoch in np.unique(epoch_N):
      order = epoch_order(self.size, self.seed, int(epoch))
      index_N[epoch_N == epoch] = order[offset_N[epoch_N == epoch]]
    return index_N


class Split(Protocol):
  """Interface of `memory.Examples` and `stream.Stream`: labelled examples, read in batches."""

  label_N: np.ndarray  # int32, or multi-hot `[N, L]` uint8

  def __len__(self) -> int: ...

  def batches(
    self, plan: Plan, over_batch: jax.sharding.Sharding
  ) -> Iterator[dict[str, jax.Array]]: ...


def train_plan(size: int, batch_size: int, seed: int, start: int) -> Plan:
  """Returns the plan of endless training batches of `size` examples, from batch `start` on."""
  return Plan(size, batch_size, batch_size, range(start, ENDLESS), seed)


def train_batches(
  examples: Split,
  batch_size: int,
  seed: int,
  start: int,
  over_batch: jax.sharding.Sharding,
) -> Iterator[dict[str, jax.Array]]:
  """Yields endless training batches, as dicts of global arrays, from batch number `start` on.

  A batch has `image` `[B, H, W, C]` uint8 and `label` `[B]` int32. If images can have several
  labels, `label` is multi-hot, `[B, L]` uint8. If bad images are replaced, a batch also has `bad`
  `[B]` int32: the number of bad images that were skipped to fill each row.

  Args:
    examples: the split.
    batch_size: number of examples in a batch, over all devices.
    seed: seed of the order and of random crops.
    start: number of the first batch, from 0.
    over_batch: sharding of arrays whose first axis is the batch.
  """
  return examples.batches(train_plan(len(examples), batch_size, seed, start), over_batch)


def eval_batches(
  examples: Split,
  batch_size: int,
  over_batch: jax.sharding.NamedSharding,
  **extra: np.ndarray,
) -> Iterator[dict[str, jax.Array]]:
  """Yields batches of one shape, whose `mask` selects every example once, in order.

  A batch has `image` and `label` as in `train_batches`, and `mask` `[B]` float32. `mask` is 0 for
  padding and for bad images that are skipped, else 1.

  Args:
    examples: the split.
    batch_size: number of examples in a batch. The number of rows is rounded up to a multiple of the
      number of devices.
    over_batch: sharding of arrays whose first axis is the batch.
    **extra: arrays with one row per example. A batch contains the rows of its own examples, under
      the same names.
  """
  devices, count = over_batch.mesh.size, len(examples)
  rows = -(-batch_size // devices) * devices
  plan = Plan(count, batch_size, rows, range(-(-count // batch_size)))
  with contextlib.closing(examples.batches(plan, over_batch)) as batches:
    for step, batch in zip(plan.steps, batches):
      inside_B = plan.positions(step) < min((step + 1) * batch_size, count)
      mask = gather(inside_B.astype(np.float32), np.arange(rows), over_batch)
      bad = batch.pop('bad', None)
      index_B = plan.examples(plan.positions(step))
      also = {name: gather(array, index_B, over_batch) for name, array in extra.items()}
      yield batch | also | {'mask': mask if bad is None else mask * (bad == 0)}
