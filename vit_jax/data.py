"""Batches: the order of training examples, and exact evaluation.

Decisions:
  * Training is one endless sequence, one permutation an epoch, cut into batches wherever
    they fall. Position `step * batch_size + i` of it depends on the seed alone, so the
    step is the whole state, and no example is dropped at an epoch's end.
  * A batch is a global array. Each process gathers only the rows that its own devices
    hold, and all agree on the order without talking.
  * Evaluation pads the last batch and carries a mask: every example counts once.
"""

from collections.abc import Iterator

import jax
import numpy as np

from vit_jax.sources import Examples


def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
  """The permutation of an epoch."""
  # RandomState, because its stream is frozen for good: a resumed run must find the same
  # order under a newer NumPy.
  return np.random.RandomState([seed, epoch]).permutation(size)


def train_indices(size: int, batch_size: int, seed: int, start: int) -> Iterator[np.ndarray]:
  """The examples of batch `start`, `start + 1`, ..., each `[batch_size]`."""
  position, orders = start * batch_size, {}
  while True:
    epochs, offsets = np.divmod(np.arange(position, position + batch_size), size)
    for epoch in np.unique(epochs):
      if epoch not in orders:
        orders[epoch] = epoch_order(size, seed, int(epoch))
    yield np.concatenate([orders[e][offsets[epochs == e]] for e in np.unique(epochs)])
    orders = {epochs[-1]: orders[epochs[-1]]}
    position += batch_size


def train_batches(
  examples: Examples,
  batch_size: int,
  seed: int,
  start: int,
  sharding: jax.sharding.Sharding,
) -> Iterator[dict[str, jax.Array]]:
  """Endless batches `image` `[B, H, W, C]` uint8 and `label` `[B]`, from batch `start` on."""
  for index_B in train_indices(len(examples), batch_size, seed, start):
    yield {
      'image': gather(examples.image_NHWC, index_B, sharding),
      'label': gather(examples.label_N, index_B, sharding),
    }


def eval_batches(
  examples: Examples, batch_size: int, sharding: jax.sharding.NamedSharding
) -> Iterator[dict[str, jax.Array]]:
  """Every example once, in order, all batches of one shape; `mask` is 0 for padding.

  The shape is `batch_size` rounded up to a multiple of the devices.
  """
  devices = sharding.mesh.size
  rows = -(-batch_size // devices) * devices
  for start in range(0, len(examples), batch_size):
    index_B = np.arange(start, start + rows)
    mask_B = (index_B < min(start + batch_size, len(examples))).astype(np.float32)
    index_B = np.minimum(index_B, len(examples) - 1)
    yield {
      'image': gather(examples.image_NHWC, index_B, sharding),
      'label': gather(examples.label_N, index_B, sharding),
      'mask': gather(mask_B, np.arange(rows), sharding),
    }


def gather(array: np.ndarray, index_B: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
  """`array[index_B]` as a global array."""
  shape = (len(index_B), *array.shape[1:])
  return jax.make_array_from_callback(shape, sharding, lambda where: array[index_B[where[0]]])
