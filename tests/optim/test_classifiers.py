"""Tests the heads that are computed without training, against scikit-learn."""

import jax
import numpy as np
import pytest
from sklearn import linear_model, neighbors, preprocessing

from vit_jax.model import heads
from vit_jax.optim import CLASSIFIERS, classifiers

LABELS = np.random.RandomState(0).randint(0, 5, 90).astype(np.int32)


def draw(count, seed):
  """Returns features with an offset, a scale per dimension, and a signal of the class."""
  random = np.random.RandomState(seed)
  centre, scale = random.normal(size=(5, 12)), np.geomspace(0.01, 100, 12)
  return ((random.normal(size=(count, 12)) + centre[LABELS[:count]]) * scale + 7).astype(np.float32)


@pytest.mark.parametrize('count', [8, 90])  # fewer and more images than features
@pytest.mark.parametrize('block', [16, 1000])
def test_folded_ridge_head_equals_the_regression_on_normalised_features(count, block, monkeypatch):
  monkeypatch.setattr(classifiers, 'BLOCK', block)
  train, test = draw(count, 1), draw(90, 2)
  scaler = preprocessing.StandardScaler().fit(train.astype(float))
  scaler.scale_ = train.astype(float).std(axis=0) + 1e-5
  prepare = lambda x: np.pad(
    scaler.transform(x.astype(float)), ((0, 0), (0, 1)), constant_values=100.0
  )
  target = np.where(LABELS[:count, None] == np.arange(5), 1.0, -1.0)
  ridge = linear_model.Ridge(alpha=1024.0, fit_intercept=False, solver='svd')
  wanted = ridge.fit(prepare(train), target).predict(prepare(test))
  head = CLASSIFIERS['ridge'].fit(train, LABELS[:count], 5)
  assert head['kernel'].shape == (12, 5) and head['kernel'].dtype == np.float64
  found = CLASSIFIERS['ridge'].scores(test, head, 5)
  np.testing.assert_allclose(found, wanted, atol=1e-9)


def test_constant_features_do_not_enlarge_the_kernel():
  """Their standard deviation is 0, so their weight must be 0, not 1e5 times a rounding error."""
  train = draw(90, 1)
  train[:, 3] = 0.1
  head = CLASSIFIERS['ridge'].fit(train, LABELS, 5)
  assert np.abs(head['kernel'][3]).max() < 1e-6


@pytest.mark.parametrize('count, rows', [(90, 1000), (13, 64)])  # one and two parts of test images
def test_knn_votes_equal_scikit_learns(count, rows, monkeypatch):
  monkeypatch.setattr(classifiers, 'ROWS', rows)
  train, test = draw(count, 1), draw(90, 2)
  reference = neighbors.KNeighborsClassifier(
    min(20, count),
    metric='cosine',
    algorithm='brute',
    weights=lambda distance: np.exp((1 - distance) / 0.07),
  )
  wanted = reference.fit(train, LABELS[:count]).predict_proba(test)
  head = CLASSIFIERS['knn'].fit(train, LABELS[:count], 5)
  np.testing.assert_allclose(np.linalg.norm(head['feature'], axis=1), 1, rtol=1e-6)
  found = np.asarray(jax.nn.softmax(CLASSIFIERS['knn'].scores(test, head, 5)))
  np.testing.assert_allclose(found, wanted, atol=1e-4)
  assert (found.max(axis=1) < 0.99).any()  # neighbours of several classes vote


def test_knn_head_ignores_padding():
  head = CLASSIFIERS['knn'].fit(draw(30, 1), LABELS[:30], 5)
  padded = {
    'feature': np.pad(head['feature'], ((0, 9), (0, 0)), constant_values=-1),
    'label': np.pad(head['label'], (0, 9), constant_values=-1),
  }
  scores = [CLASSIFIERS['knn'].scores(draw(50, 2), entry, 5) for entry in (head, padded)]
  np.testing.assert_allclose(*scores, atol=1e-5)
  only = {'feature': padded['feature'][25:], 'label': padded['label'][25:]}  # 5 images, 9 padding
  found = np.asarray(jax.nn.softmax(CLASSIFIERS['knn'].scores(draw(50, 2), only, 5)))
  absent = sorted({*range(5)} - {*LABELS[25:30].tolist()})
  assert absent and found[:, absent].max() <= heads.LOWEST * 1.01


def test_zero_features_give_finite_logits():
  head = CLASSIFIERS['knn'].fit(np.zeros((4, 3), np.float32), LABELS[:4], 5)
  assert np.isfinite(CLASSIFIERS['knn'].scores(np.zeros((2, 3), np.float32), head, 5)).all()
