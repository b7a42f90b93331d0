"""Compares our parser of the split notation with the one of TFDS."""

from hypothesis import example, given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from vit_jax.data import splits


def boundaries_of_tfds(part, name, size):
  from tensorflow_datasets import core

  info = core.SplitInfo(name=name, shard_lengths=[size], num_bytes=0)
  (found,) = core.ReadInstruction.from_spec(part).to_absolute({name: info})
  return found.from_ or 0, size if found.to is None else found.to


number = st.one_of(
  st.integers(-120, 120).map(str),
  st.floats(-101, 101, allow_nan=False).map('{:.3f}'.format),
  st.sampled_from(['', '1_0', '.', '1.', '-']),
)
unit = st.sampled_from(['', '%'])
part = st.tuples(number, unit, st.sampled_from([':', ':', '']), number, unit).map(''.join)


@settings(deadline=None, derandomize=True, max_examples=500)  # the first example imports TFDS
@given(part.map('train[{}]'.format), st.integers(1, 100))
@example('train', 7)
@example('train[:]', 7)
@example('train[10:50%]', 70)
@example('train[0.5%:]', 100)  # Python rounds to even
@example('train[:12.5%]', 100)
@example('train[-0:-0]', 3)
@example('train[1:2:3]', 3)
@example('train[:100.4%]', 1)  # refused, although it is rounded to 1
@example('train[:5', 30)
def test_every_part_means_what_it_means_in_tfds(part, size):
  try:
    want = boundaries_of_tfds(part, 'train', size)
  except (ValueError, AssertionError):
    with pytest.raises(ValueError, match='Split'):
      splits.boundaries(part, 'train', size)
  else:
    assert splits.boundaries(part, 'train', size) == want


def test_unwanted_examples_leave_the_positions_of_the_others():
  """The pieces can start behind the first example of a split, as those of `train[90%:]` do."""
  unwanted = np.isin(np.arange(12), (1, 5, 6, 11))
  found = splits.remove([('train', 4, 12), ('val', 2, 5)], {'train': unwanted})
  assert found == [('train', 4, 5), ('train', 7, 11), ('val', 2, 5)]
