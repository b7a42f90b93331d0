"""Checks the order of training examples and the batches for evaluation."""

import itertools

import jax
import numpy as np
import pytest

from vit_jax.data import batching
from vit_jax.data.memory import Examples
from vit_jax.distributed import devices as devices_lib
from vit_jax.distributed import sharding


def take(count, **arguments):
  plan = batching.train_plan(**arguments)
  return [plan.examples(plan.positions(step)) for step in itertools.islice(plan.steps, count)]


@pytest.mark.parametrize('size, batch', [(10, 3), (7, 7), (5, 12)])
def test_every_epoch_holds_every_example_once(size, batch):
  stream = np.concatenate(take(5 * size, size=size, batch_size=batch, seed=1, start=0))
  epochs = stream[: len(stream) // size * size].reshape(-1, size)
  assert len(epochs) >= 5
  np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(size), (len(epochs), 1)))
  assert len({tuple(epoch) for epoch in epochs}) > 3  # in a different order each time


def test_order_differs_for_each_seed_and_epoch():
  orders = {tuple(batching.epoch_order(20, seed, epoch)) for seed in range(6) for epoch in range(6)}
  assert len(orders) == 36


def test_an_epoch_has_the_same_order_in_every_version():
  """A run that is resumed with a newer version must go on in the same order."""
  found = batching.epoch_order(10, seed=3, epoch=2)
  assert found.tolist() == [0, 9, 3, 8, 1, 6, 7, 5, 4, 2]


def test_order_resumes_from_the_step_alone():
  whole = take(20, size=11, batch_size=4, seed=3, start=0)
  np.testing.assert_array_equal(take(9, size=11, batch_size=4, seed=3, start=11), whole[11:])
  assert not np.array_equal(take(20, size=11, batch_size=4, seed=4, start=0), whole)


@pytest.mark.parametrize('batch_size', [1, 4, 7, 13, 50])
def test_evaluation_counts_each_example_once(batch_size):
  image = np.arange(13 * 4, dtype=np.uint8).reshape(13, 2, 2, 1)
  examples = Examples(image, np.arange(13, dtype=np.int32))
  over_batch = sharding.batch_sharding(devices_lib.make_mesh(2))
  tens = 10 * np.arange(13)
  batches = list(batching.eval_batches(examples, batch_size, over_batch, tens=tens))
  assert len({batch['image'].shape for batch in batches}) == 1
  seen = [label for b in batches for label, m in zip(b['label'], b['mask']) if m]
  assert [int(label) for label in seen] == list(range(13))
  for batch in batches:
    np.testing.assert_array_equal(batch['image'], image[np.asarray(batch['label'])])
    np.testing.assert_array_equal(batch['tens'], 10 * batch['label'])


class LabelsFirst(Examples):
  """Examples whose dict of arrays has another order than the fields."""

  def arrays(self):
    return {'label': self.label_N, 'image': self.image_NHWC}


def test_selected_and_joined_examples_keep_images_and_labels_apart():
  image, label = np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1), np.arange(3, dtype=np.int32)
  found = LabelsFirst(image, label).some([2, 0]).joined(LabelsFirst(image[1:2], label[1:2]))
  np.testing.assert_array_equal(found.image_NHWC, image[[2, 0, 1]])
  np.testing.assert_array_equal(found.label_N, [2, 0, 1])


def test_batch_is_split_over_the_devices():
  mesh = devices_lib.make_mesh(8)
  examples = Examples(np.zeros((9, 2, 2, 1), np.uint8), np.arange(9, dtype=np.int32))
  batch = next(batching.train_batches(examples, 8, 0, 0, sharding.batch_sharding(mesh)))
  assert mesh.size == len(jax.devices()) == 2
  assert [shard.data.shape for shard in batch['image'].addressable_shards] == [(4, 2, 2, 1)] * 2


@pytest.mark.parametrize('batch, parts, devices', [(8, 1, 2), (7, 1, 1), (6, 2, 1), (12, 3, 2)])
def test_cpu_mesh_uses_devices_that_divide_the_batch(batch, parts, devices):
  assert devices_lib.make_mesh(batch, parts).size == devices


@pytest.mark.parametrize('batch, parts', [(0, 1), (-4, 1), (8, 3)])
def test_impossible_batches_are_refused(batch, parts):
  with pytest.raises(ValueError, match='must be a positive multiple'):
    devices_lib.make_mesh(batch, parts)
