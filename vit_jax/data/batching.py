"""Makes reproducible training batches, and evaluation batches that hold each example once.

Decisions:
  * Training reads one endless sequence, in which each epoch is a new permutation of the examples.
    The sequence is cut into batches. No example is dropped at the end of an epoch, so a batch can
    have examples of two epochs. The example at a position of the sequence depends only on the
    position, the seed and the number of examples. So the step number is enough to resume.
  * A batch consists of global JAX arrays, which are spread over the devices of all processes. Each
    process gathers only the rows that its own devices hold. The processes need not communicate,
    because all of them compute the same order of the examples.
  * Evaluation pads the last batch, and marks the padding in a mask, so that every example counts
    exactly once.
  * A `Plan` defines which examples each batch holds, for examples in memory (`memory.py`) and for
    streamed examples (`stream.py`).
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
from typing import Protocol

import jax
import numpy as np

from vit_jax.distributed import gather

ENDLESS = 2**48  # stands for endless training: more steps than any run takes


@functools.lru_cache(maxsize=2)  # a batch can have examples of two epochs
def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
  """Returns the indices of the examples in the order of an epoch: `[size]`."""
  # NumPy guarantees that RandomState's numbers never change, so a run that is resumed with a newer
  # NumPy keeps its order.
  return np.random.RandomState([seed, epoch]).permutation(size)


@dataclasses.dataclass(frozen=True)
class Plan:
  """Defines which examples each batch holds.

  All batches are ranges of one sequence of examples: batch number `step` begins at the position
  `step * stride` of the sequence.

  Attributes:
    size: number of examples in the split.
    stride: number of positions from the start of one batch to the start of the next.
    rows: number of rows in a batch, including padding.
    steps: the step numbers of the batches.
    seed: in training, the seed of the order of the examples and of the random crops. None in
      evaluation: nothing is cropped at random, and the examples keep the order of the split. The
      sequence then ends with copies of the last example as padding.
  """

  size: int
  stride: int
  rows: int
  steps: range
  seed: int | None = None

  def positions(self, step: int) -> np.ndarray:
    """Returns the position in the sequence for each row of a batch: `[rows]`."""
    return step * self.stride + np.arange(self.rows)

  def examples(self, position_N: np.ndarray) -> np.ndarray:
    """Returns the indices `[N]` of the examples at positions `position_N` in the sequence."""
    if self.seed is None:
      return np.minimum(position_N, self.size - 1)
    epoch_N, offset_N = np.divmod(position_N, self.size)
    index_N = np.empty_like(position_N)
    for epoch in np.unique(epoch_N):
      order = epoch_order(self.size, self.seed, int(epoch))
      index_N[epoch_N == epoch] = order[offset_N[epoch_N == epoch]]
    return index_N


class Split(Protocol):
  """Interface of `Examples`, `Features` and `Stream`: labelled examples, read in batches."""

  label_N: np.ndarray  # class indices, int32, or multi-hot `[N, L]` uint8

  def __len__(self) -> int: ...

  def batches(
    self, plan: Plan, over_batch: jax.sharding.Sharding
  ) -> Iterator[dict[str, jax.Array]]: ...


def train_plan(size: int, batch_size: int, seed: int, start: int) -> Plan:
  """Returns the plan for endless training on `size` examples; `start` is the first step."""
  return Plan(size, batch_size, batch_size, range(start, ENDLESS), seed)


def train_batches(
  examples: Split,
  batch_size: int,
  seed: int,
  start: int,
  over_batch: jax.sharding.Sharding,
) -> Iterator[dict[str, jax.Array]]:
  """Yields training batches without end. Each batch is a dict of global arrays.

  A batch has `image` `[B, H, W, C]` uint8 or `feature` `[B, D]` float32, and `label` `[B]` int32.
  If images can have several labels, `label` is multi-hot, `[B, L]` uint8. If a stream replaces bad
  images (images that cannot be decoded), a batch also has `bad` `[B]` int32. For each row, `bad` is
  the number of bad images that were skipped to find a good image.

  Args:
    examples: the training split.
    batch_size: number of examples in a batch, over all devices.
    seed: seed of the order of the examples and of their random crops.
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
  """Yields batches of the same shape, which together hold each example of a split once, in order.

  A batch has the arrays of `train_batches`, and `mask` `[B]` float32. `mask` is 1 in
  rows to evaluate, and 0 in rows that are padding or replace a bad image.

  Args:
    examples: the split to evaluate.
    batch_size: number of examples in a batch. The number of rows B is `batch_size` rounded up to a
      multiple of the number of devices.
    over_batch: sharding of arrays whose first axis is the batch.
    **extra: arrays with one row per example of the split. For each of these arrays, a batch has an
      entry with the same name, which holds the rows of the batch's examples.
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
