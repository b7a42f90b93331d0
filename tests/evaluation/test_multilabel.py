"""Compares the scores of images with several labels with scikit-learn and by brute force."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics

from vit_jax.evaluation import multilabel, scoring
from vit_jax.evaluation.multilabel import Labelled
from vit_jax.workdir import Calibration

NAMES = tuple('abcde')


def random_scores(seed, ties, count=200):
  draw = np.random.RandomState(seed)
  probability_NL = draw.uniform(size=(count, len(NAMES)))
  if ties:
    probability_NL = 0.05 + np.round(0.9 * probability_NL, 1)
  label_NL = (draw.uniform(size=probability_NL.shape) < 0.2 + 0.5 * probability_NL).astype(np.uint8)
  return probability_NL, label_NL


@pytest.mark.parametrize('ties', [False, True])
def test_average_precision_equals_scikit_learns(ties):
  probability_NL, label_NL = random_scores(0, ties)
  want = metrics.average_precision_score(label_NL, probability_NL, average=None)
  np.testing.assert_allclose(multilabel.average_precision(probability_NL, label_NL), want)
  summary = Labelled(probability_NL, label_NL).summary()
  np.testing.assert_allclose(summary['mean_average_precision'], want.mean())


def test_scores_of_each_class_equal_scikit_learns():
  probability_NL, label_NL = random_scores(1, ties=True)
  threshold_L = np.array([0.2, 0.4, 0.5, 0.7, 2.0])
  found = Labelled(probability_NL, label_NL).by_class(NAMES, threshold_L)
  want = metrics.precision_recall_fscore_support(
    label_NL, probability_NL >= threshold_L, average=None, zero_division=0
  )
  columns = ('precision', 'recall', 'f1', 'support')
  assert found['e']['precision'] is None  # the class is never given
  for column, values in zip(columns, want):
    np.testing.assert_allclose([found[name][column] or 0 for name in NAMES], values)
  given = Labelled(probability_NL, label_NL).summary()['macro_f1']
  np.testing.assert_allclose(
    given, metrics.f1_score(label_NL, probability_NL >= 0.5, average='macro', zero_division=0)
  )


def test_classes_without_positive_images_are_skipped_in_means():
  probability_NL, label_NL = random_scores(2, ties=False)
  label_NL[:, 3] = 0
  found = Labelled(probability_NL, label_NL)
  assert found.by_class(NAMES)['d']['average_precision'] is None
  rest = [0, 1, 2, 4]
  assert found.summary() == Labelled(probability_NL[:, rest], label_NL[:, rest]).summary()
  assert Labelled(probability_NL, 0 * label_NL).summary() == {
    'mean_average_precision': 0.0, 'macro_f1': 0.0
  }  # fmt: skip


@pytest.mark.parametrize('ties', [False, True])
def test_thresholds_reach_the_highest_f1(ties):
  probability_NL, label_NL = random_scores(3, ties, count=60)
  threshold_L = multilabel.best_thresholds(probability_NL, label_NL)
  f1 = lambda i, t: metrics.f1_score(label_NL[:, i], probability_NL[:, i] >= t)
  for i, threshold in enumerate(threshold_L):
    highest = max(f1(i, t) for t in np.unique(probability_NL[:, i]))
    assert f1(i, threshold) == highest
    assert np.abs(probability_NL[:, i] - threshold).min() > 0  # not at a probability that occurs
  label_NL[:, 1] = 0
  assert multilabel.best_thresholds(probability_NL, label_NL)[1] == multilabel.THRESHOLD


def test_of_equal_f1_the_highest_threshold_is_chosen():
  probability_N1 = np.array([[0.9], [0.8], [0.1]])
  assert multilabel.best_thresholds(probability_N1, np.array([[1], [0], [0]])) == pytest.approx(
    0.85
  )
  assert multilabel.best_thresholds(probability_N1, np.array([[1], [1], [1]])) == pytest.approx(
    0.05
  )
  # With the labels 1, 0, 0, 1, the thresholds 0.8 and 0.15 both give an F1 of 2/3.
  tie = np.array([[0.9], [0.7], [0.6], [0.3]]), np.array([[1], [0], [0], [1]])
  assert multilabel.best_thresholds(*tie) == pytest.approx(0.8)


def test_labels_at_or_above_the_threshold_are_given_most_likely_first():
  probability_L = np.array([0.5, 0.2, 0.9, 0.49])
  assert multilabel.given_labels(probability_L).tolist() == [2, 0]
  assert multilabel.given_labels(probability_L, np.array([0.6, 0.1, 0.95, 0.4])).tolist() == [3, 1]
  assert multilabel.given_labels(probability_L, [0.91] * 4).tolist() == []


def test_rows_of_batches_are_joined():
  logits = np.array([[0.0, 800.0], [-800.0, 1.0], [5.0, 5.0]], np.float32)
  label = np.array([[1, 0], [0, 1], [1, 1]], np.uint8)
  first, second = (Labelled.of(logits[rows], label[rows], np.ones(2)) for rows in ([0, 1], [2, 0]))
  found = Labelled.joined([first, second])
  np.testing.assert_allclose(found.probability_NL[:2], [[0.5, 1], [0, 1 / (1 + np.exp(-1))]])
  np.testing.assert_array_equal(found.label_NL, label[[0, 1, 2, 0]])
  assert found.loss_N.shape == (4,)


def test_measures_at_the_thresholds_equal_scikit_learns():
  probability_NL, label_NL = random_scores(4, ties=False)
  thresholds = (0.2, 0.4, 0.5, 0.7, 0.3)
  found = Labelled(probability_NL, label_NL).trust(NAMES, Calibration(1.0, thresholds, 9))
  want = metrics.f1_score(label_NL, probability_NL >= thresholds, average='macro')
  assert found['macro_f1_at_thresholds'] == pytest.approx(want)
  assert found['threshold_examples'] == 9
  assert [row['threshold'] for row in found['per_class'].values()] == [*thresholds]
  found = Labelled(probability_NL, label_NL)
  without = found.trust(NAMES, Calibration())
  assert without['threshold_examples'] == 0
  assert without['macro_f1_at_thresholds'] == found.summary()['macro_f1']


def test_accuracy_counts_a_prediction_that_is_one_of_the_labels():
  logits_BL = jnp.array([[3.0, 1, 2], [3, 1, 2], [1, 3, 2], [1, 2, 3], [1, 2, 3]])
  label_BL = jnp.array([[1, 1, 0], [0, 1, 1], [0, 1, 0], [0, 0, 0], [0, 0, 1]], jnp.uint8)
  rows = map(np.asarray, (logits_BL, label_BL, jnp.ones(5)))
  found = Labelled.of(*rows).means()
  assert found['accuracy'] == pytest.approx(3 / 4)
  assert (found['loss'], found['examples']) == (1.0, 5)
  trained = scoring.summarize([scoring.training_score(logits_BL, label_BL, jnp.ones(5))])
  assert trained['accuracy'] == pytest.approx(3 / 4) and trained['examples'] == 5
  nothing = scoring.summarize([scoring.training_score(logits_BL, 0 * label_BL, jnp.ones(5))])
  assert nothing['accuracy'] == 0


@pytest.mark.parametrize('labelled', [True, False])
def test_every_image_counts_once_in_training_batches_of_different_sizes(labelled):
  logits_NL, loss_N = jnp.eye(3)[jnp.array([0, 0, 0, 1, 1, 2, 2])], jnp.arange(7.0)
  label_N = jnp.array([0, 1, 1, 1, 1, 2, 0])
  batches = [
    scoring.training_score(logits_NL[part] if labelled else None, label_N[part], loss_N[part])
    for part in (slice(2), slice(2, 7))
  ]
  want = {'loss': 3, 'examples': 7} | ({'accuracy': 4 / 7} if labelled else {})
  assert scoring.summarize(batches) == pytest.approx(want)


def test_checkpoints_are_compared_by_mean_average_precision_if_there_is_one():
  assert scoring.quality({'accuracy': 0.5}) == 0.5
  assert scoring.quality({'accuracy': 0.5, 'mean_average_precision': 0.3}) == 0.3
