"""Tests which training images are shown next to the mistakes of a model."""

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from tests.conftest import small_config
from vit_jax.data import Examples, Features
from vit_jax.evaluation import Scores
from vit_jax.experiment import assemble
from vit_jax.figures import canvas, neighbours, subject
from vit_jax.figures.maps import Missing
from vit_jax.workdir import Task

NAMES = ('cat', 'dog', 'a very long name of a class')


def make(count, seed):
  """Returns random 2x3 images with labels."""
  random = np.random.RandomState(seed)
  image_NHWC = random.randint(0, 256, (count, 2, 3, 3)).astype(np.uint8)
  return Examples(image_NHWC, random.randint(0, 3, count).astype(np.int32))


@pytest.fixture
def pixels_as_features(monkeypatch):
  def compute(step, params, examples, *_):
    feature = examples.image_NHWC.reshape(len(examples), -1).astype(np.float32) - 100
    return Features(feature, examples.label_N)

  monkeypatch.setattr(neighbours, 'make_feature_step', lambda *_: None)
  monkeypatch.setattr(neighbours, 'compute_features', compute)


def find(test, train):
  return neighbours.find_neighbours(
    assemble(small_config(), Task(NAMES, (8, 8), 3)), {}, test, train, None
  )


@pytest.mark.parametrize('part', [1000, 7])  # 7 images at a time: the nearest of all parts count
def test_nearest_images_equal_scikit_learns(monkeypatch, pixels_as_features, part):
  monkeypatch.setattr(neighbours, 'PART', part)
  test, train = make(4, 1), make(40, 2)
  flat = lambda examples: examples.image_NHWC.reshape(len(examples), -1).astype(float) - 100
  reference = NearestNeighbors(n_neighbors=5, metric='cosine').fit(flat(train))
  distance_RK, index_RK = reference.kneighbors(flat(test))
  found = find(test, train)
  np.testing.assert_array_equal(found.image_RKHWC, train.image_NHWC[index_RK])
  np.testing.assert_array_equal(found.label_RK, train.label_N[index_RK])
  np.testing.assert_allclose(found.similarity_RK, 1 - distance_RK, atol=1e-6)
  assert found.among == 40


def test_a_large_split_is_sampled_evenly_and_bad_images_are_left_out(
  monkeypatch, pixels_as_features
):
  monkeypatch.setattr(neighbours, 'AMONG', 11)
  asked = []

  class Train(Examples):
    def readable(self, index_N):
      return np.asarray(index_N) != 30

    def some(self, index_N):
      asked.extend(index_N.tolist())
      return super().some(index_N)

  train = make(101, 2)
  found = find(make(2, 1), Train(train.image_NHWC, train.label_N))
  assert asked == [0, 10, 20, 40, 50, 60, 70, 80, 90, 100] and found.among == 10


def test_fewer_training_images_than_columns_are_drawn(pixels_as_features, tmp_path):
  test = make(2, 1)
  found = find(test, make(3, 2))
  assert found.label_RK.shape == (2, 3)
  titles = [('cat', 'dog', '90.0%'), ('dog', NAMES[2], '80.0%')]
  figure = neighbours.draw_neighbours(test.image_NHWC, titles, found, NAMES)
  canvas.save_figure(figure, tmp_path / 'figure.png')
  shown = [axis.get_title() for axis in figure.axes if axis.get_title()]
  rows = [[canvas.short(NAMES[label]) for label in row] for row in found.label_RK]
  assert shown == ['true: cat', *rows[0], 'true: dog', *rows[1]]
  for axis, label in zip(figure.axes[2:5], found.label_RK[0]):
    wanted = {0: canvas.GREEN, 1: canvas.ORANGE}.get(label, canvas.GREY)  # true, predicted, others
    assert axis.title.get_color() == wanted


def test_a_training_split_without_a_readable_image_is_reported(monkeypatch, pixels_as_features):
  class Unreadable(Examples):
    def readable(self, index_N):
      return np.zeros(len(index_N), bool)

  exp, test, train = assemble(small_config(), Task(NAMES, (8, 8), 3)), make(3, 1), make(9, 2)
  monkeypatch.setattr(subject, 'load_split', lambda *_: Unreadable(train.image_NHWC, train.label_N))
  wrong = Scores(np.arange(3), test.label_N, (test.label_N + 1) % 3, *[np.ones(3)] * 3)
  found = subject.near_mistakes(exp, {}, test, wrong, None)
  assert isinstance(found, Missing) and str(found) == 'none of the training images can be read.'


def test_the_mistakes_are_those_of_the_images_that_were_read(monkeypatch, pixels_as_features):
  """Images 0 and 2 of five could not be read, so row 1 of the scores belongs to image 3."""
  exp, test = assemble(small_config(), Task(NAMES, (8, 8), 3)), make(5, 1)
  monkeypatch.setattr(subject, 'load_split', lambda *_: test)
  index_N = np.array([1, 3, 4])
  predicted_N = (test.label_N[index_N] + [0, 1, 0]) % 3
  scores = Scores(index_N, test.label_N[index_N], predicted_N, *[np.ones(3)] * 3)
  found = subject.near_mistakes(exp, {}, test, scores, None)
  np.testing.assert_array_equal(found.image_RKHWC[:, 0], test.image_NHWC[[3]])


def test_missing_mistakes_or_training_data_are_reported(monkeypatch):
  exp = assemble(small_config(), Task(NAMES, (8, 8), 3))
  test = make(3, 1)
  scores = lambda predicted_N: Scores(np.arange(3), test.label_N, predicted_N, *[np.ones(3)] * 3)
  found = subject.near_mistakes(exp, {}, test, scores(test.label_N), None)
  assert isinstance(found, Missing) and 'every test image correctly' in str(found)
  wrong = scores((test.label_N + 1) % 3)

  def fail(*_):
    raise ValueError('no such folder')

  monkeypatch.setattr(subject, 'load_split', fail)
  found = subject.near_mistakes(exp, {}, test, wrong, None)
  assert str(found) == 'cannot read the training data: no such folder'
