"""Batches: the order of training examples, and exact evaluation.

Decisions:
  * Training is one endless sequence, one permutation an epoch, cut into batches wherever
    they fall. Position `step * batch_size + i` of it depends on the seed alone, so the
    step is the whole state, and no example is dropped at an epoch's end.
  * A batch is a global array. Each process gathers only the rows that its own devices
    hold, and all agree on the order without talking.
  * Evaluation pads the last batch and carries a mask: every example counts once.
  * A `Plan` lists the examples of each batch. Examples in memory (`memory.py`) and streamed ones
    (`stream.py`) make the same batches from it.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
from typing import Protocol

import jax
import numpy as np

from vit_jax.distributed import gather

ENDLESS = 2**48  # steps


@functools.lru_cache(maxsize=2)  # of the epoch that ends and of the one that begins
def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
  """The permutation of an epoch."""
  # RandomState, because its stream is frozen for good: a resumed run must find the same
  # order under a newer NumPy.
  return np.random.RandomState([seed, epoch]).permutation(size)


@dataclasses.dataclass(frozen=True)
class Plan:
  """Which examples each batch holds. Batch `step` begins at position `step * stride`.

  Attributes:
    size: how many examples there are.
    stride: positions from one batch to the next.
    rows: of a batch.
    steps: the batches.
    seed: of the order, and of what is drawn for each position; None: the examples in their own
      order and as they are, the last one repeated.
  """

  size: int
  stride: int
  rows: int
  steps: range
  seed: int | None = None

  def positions(self, step: int) -> np.ndarray:
    """The positions of a batch, `[rows]`."""
    return step * self.stride + np.arange(self.rows)

  def examples(self, position_N: np.ndarray) -> np.ndarray:
    """The examples at these positions."""
    if self.seed is None:
      return np.minimum(position_N, self.size - 1)
    epoch_N, offset_N = np.divmod(position_N, self.size)
    index_N = np.empty_like(position_N)
    for epoch in np.unique(epoch_N):
      order = epoch_order(self.size, self.seed, int(epoch))
      index_N[epoch_N == epoch] = order[offset_N[epoch_N == epoch]]
    return index_N


class Split(Protocol):
  """Examples of which batches can be made: `memory.Examples` or a `stream.Stream`."""

  def __len__(self) -> int: ...

  def batches(
    self, plan: Plan, over_batch: jax.sharding.Sharding
  ) -> Iterator[dict[str, jax.Array]]: ...


def train_plan(size: int, batch_size: int, seed: int, start: int) -> Plan:
  """The endless sequence from batch `start` on."""
  return Plan(size, batch_size, batch_size, range(start, ENDLESS), seed)


def train_batches(
  examples: Split,
  batch_size: int,
  seed: int,
  start: int,
  over_batch: jax.sharding.Sharding,
) -> Iterator[dict[str, jax.Array]]:
  """Endless batches `image` `[B, H, W, C]` uint8 and `label` `[B]`, from batch `start` on.

  Where bad images are replaced by others, also `bad` `[B]`: how many, in the place of each.
  """
  return examples.batches(train_plan(len(examples), batch_size, seed, start), over_batch)


def eval_batches(
  examples: Split,
  batch_size: int,
  over_batch: jax.sharding.NamedSharding,
  **beside: np.ndarray,
) -> Iterator[dict[str, jax.Array]]:
  """Every example once, in order, all batches of one shape; `mask` is 0 for padding.

  The shape is `batch_size` rounded up to a multiple of the devices. `mask` is 0 for bad images
  too, where they are left out. The rows of `beside`, one for each example, come along.
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
      also = {name: gather(array, index_B, over_batch) for name, array in beside.items()}
      yield batch | also | {'mask': mask if bad is None else mask * (bad == 0)}
