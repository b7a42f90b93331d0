"""Compares measures with scikit-learn, SciPy, closed forms and simulations."""

import numpy as np
import pytest
from scipy import special, stats
from sklearn import calibration, metrics

from vit_jax.evaluation import measures
from vit_jax.evaluation.answers import trust
from vit_jax.evaluation.scoring import Answers, Scores
from vit_jax.workdir import Calibration

NAN = dict(average=None, zero_division=np.nan)


def predictions(seed=0, examples=500, classes=6):
  """Returns random probabilities with ties, and labels; class 3 has no examples."""
  random = np.random.RandomState(seed)
  probability_NL = special.softmax(random.randint(0, 4, (examples, classes)).astype(float), axis=1)
  return probability_NL, random.choice([0, 1, 2, 4, 5], examples)


def test_class_scores_match_scikit_learn_with_absent_and_never_predicted_classes():
  probability_NL, label_N = predictions()
  predicted_N = probability_NL.argmax(axis=1)
  predicted_N[predicted_N == 5] = 0  # class 5 has examples and is never predicted
  found = measures.class_scores(label_N, predicted_N, 8)  # classes 6 and 7 have neither
  want = metrics.precision_recall_fscore_support(label_N, predicted_N, labels=range(8), **NAN)
  for name, want_L in zip(('precision', 'recall', 'f1', 'support'), want):
    np.testing.assert_allclose(found[name], want_L, err_msg=name)
  assert np.isnan(found['precision'][5]) and np.isnan(found['recall'][3])
  balanced = metrics.balanced_accuracy_score(label_N, predicted_N)
  assert measures.balanced_accuracy(found['recall']) == pytest.approx(balanced)


def test_the_confusion_matrix_matches_scikit_learn():
  probability_NL, label_N = predictions()
  predicted_N, names = probability_NL.argmax(axis=1), list('abcdef')
  found = measures.confused(label_N, predicted_N, names)
  matrix = [[found.get(true, {}).get(given, 0) for given in names] for true in names]
  want = metrics.confusion_matrix(label_N, predicted_N, labels=range(6))
  np.testing.assert_array_equal(matrix, want)
  assert 'd' not in found and all(all(row.values()) for row in found.values())


@pytest.mark.parametrize('correct, examples', [(0, 1), (1, 1), (0, 30), (7, 30), (359, 360)])
def test_the_interval_matches_scipy(correct, examples):
  want = stats.binomtest(correct, examples).proportion_ci(0.95, 'wilson')
  found = measures.wilson_interval(correct, examples)
  np.testing.assert_allclose(found, (want.low, want.high), atol=1e-12)
  assert 0 <= found[0] <= correct / examples <= found[1] <= 1


@pytest.mark.parametrize('examples', [30, 360])
def test_the_interval_covers_the_true_accuracy_at_its_nominal_rate(examples):
  random, draws = np.random.RandomState(0), 20_000
  true_D = random.uniform(size=draws)
  bounds_N2 = np.array([measures.wilson_interval(k, examples) for k in range(examples + 1)])
  low_D, high_D = bounds_N2[random.binomial(examples, true_D)].T
  rate = ((low_D <= true_D) & (true_D <= high_D)).mean()
  assert rate == pytest.approx(0.95, abs=4 * np.sqrt(0.95 * 0.05 / draws))


@pytest.mark.parametrize('edges', [False, True])
def test_the_calibration_error_matches_the_bins_of_scikit_learn(edges):
  random = np.random.RandomState(0)
  confidence_N = random.uniform(0.2, 1, 400)
  if edges:  # on the limits of bins, and 1
    confidence_N = np.linspace(0, 1, measures.BINS + 1)[random.randint(4, measures.BINS + 1, 400)]
  correct_N = random.uniform(size=400) < confidence_N**2
  found = measures.reliability(confidence_N, correct_N)
  there = found['examples'] > 0
  accuracy, confidence = calibration.calibration_curve(
    correct_N, confidence_N, n_bins=measures.BINS, strategy='uniform'
  )
  np.testing.assert_allclose(found['accuracy'][there], accuracy)
  np.testing.assert_allclose(found['confidence'][there], confidence)
  assert there.sum() < measures.BINS and np.isnan(found['accuracy'][~there]).all()
  in_bin = (confidence_N[:, None] > found['low']) & (confidence_N[:, None] <= found['high'])
  np.testing.assert_array_equal(in_bin.sum(axis=0), found['examples'])
  want = np.average(np.abs(accuracy - confidence), weights=found['examples'][there])
  assert measures.calibration_error(found) == pytest.approx(want)


def test_accuracy_at_a_coverage_is_the_precision_above_its_threshold():
  random = np.random.RandomState(0)
  confidence_N = random.randint(20, 100, 400) / 100  # many ties
  correct_N = random.uniform(size=400) < confidence_N
  found = measures.coverage_curve(confidence_N, correct_N, points=400)  # one point per example
  precision, _, threshold = metrics.precision_recall_curve(correct_N, confidence_N)
  for share, value in zip(precision, threshold):
    place = np.sum(confidence_N >= value) - 1
    assert found['accuracy'][place] == pytest.approx(share)
    assert found['confidence'][place] == value
  shuffled = random.permutation(400)
  again = measures.coverage_curve(confidence_N[shuffled], correct_N[shuffled], points=400)
  np.testing.assert_allclose(again['accuracy'], found['accuracy'])
  assert found['accuracy'][-1] == pytest.approx(correct_N.mean())


@pytest.mark.parametrize('correct, margin', [(90, 5.0), (75, 0.3), (60, 2.0)])
def test_the_temperature_of_equal_margins_has_its_closed_form(correct, margin):
  """With two classes and one margin m, the best probability is the accuracy: T = m / logit."""
  logits_NL = np.tile([margin, 0.0], (100, 1)).astype(np.float32)
  label_N = (np.arange(100) >= correct).astype(int)
  want = margin / special.logit(correct / 100)
  assert measures.fit_temperature(logits_NL, label_N) == pytest.approx(want, rel=1e-4)


def miscalibrated(temperature, seed, examples=4000):
  """Returns logits that are `temperature` times too large for the labels drawn from them."""
  random = np.random.RandomState(seed)
  true_NL = random.normal(size=(examples, 10)) * 2
  probability_NL = special.softmax(true_NL, axis=1)
  label_N = (random.uniform(size=(examples, 1)) > probability_NL.cumsum(axis=1)).sum(axis=1)
  return (temperature * true_NL).astype(np.float32), label_N.astype(np.int32)


@pytest.mark.parametrize('temperature', [0.4, 3.0])
def test_the_temperature_lowers_the_calibration_error_and_keeps_the_accuracy(temperature):
  fitted = measures.fit_temperature(*miscalibrated(temperature, seed=0))
  assert fitted == pytest.approx(temperature, rel=0.05)
  logits_NL, label_N = miscalibrated(temperature, seed=1)
  answers = Answers(np.arange(4000), label_N, logits_NL, np.zeros(4000))
  before, after = (
    trust(Scores.of(answers, Calibration(value)), [*'abcdefghij'], Calibration(value, examples=9))
    for value in (1.0, fitted)
  )
  assert before['ece'] == before['ece_uncalibrated'] == after['ece_uncalibrated'] > 0.1
  assert after['ece'] < 0.03
  for name in ('accuracy_interval', 'balanced_accuracy', 'per_class', 'confusion'):
    assert before[name] == after[name]
  confidence_N = special.softmax(logits_NL / fitted, axis=1).max(axis=1)
  np.testing.assert_allclose(
    Scores.of(answers, Calibration(fitted)).confidence_N, confidence_N, rtol=1e-5
  )


def test_the_reliability_diagram_belongs_to_the_calibrated_error():
  logits_NL, label_N = miscalibrated(3.0, seed=1)
  answers, fitted = Answers(np.arange(4000), label_N, logits_NL, np.zeros(4000)), Calibration(3.0)
  found = trust(Scores.of(answers, fitted), [*'abcdefghij'], fitted)
  rows = [row for row in found['reliability'] if row['examples']]
  gap = sum(row['examples'] * abs(row['accuracy'] - row['confidence']) for row in rows) / 4000
  assert gap == pytest.approx(found['ece']) and gap < found['ece_uncalibrated'] / 2


def test_the_confidence_of_a_sigmoid_depends_on_the_largest_logit_alone():
  logits_NL = np.random.RandomState(0).normal(size=(50, 4)).astype(np.float32)
  answers = Answers(np.arange(50), np.zeros(50, int), logits_NL, np.zeros(50))
  scores = Scores.of(answers, Calibration(sigmoid=True))
  for confidence_N in (scores.confidence_N, scores.raw_N):
    np.testing.assert_allclose(confidence_N, special.expit(logits_NL.max(axis=1)), rtol=1e-6)


def test_at_the_fitted_temperature_the_likelihood_has_no_slope(monkeypatch):
  logits_NL, label_N = miscalibrated(2.0, seed=2, examples=500)
  fitted = measures.fit_temperature(logits_NL, label_N)
  probability_NL = special.softmax(logits_NL / fitted, axis=1)
  expected, own = (probability_NL * logits_NL).sum(axis=1), logits_NL[np.arange(500), label_N]
  assert np.mean(expected - own) == pytest.approx(0, abs=1e-3)
  monkeypatch.setattr(measures, 'CHUNK', 70)  # seven examples at once
  assert measures.fit_temperature(logits_NL, label_N) == pytest.approx(fitted, rel=1e-6)


def test_the_temperature_is_1_if_every_prediction_is_correct():
  assert measures.fit_temperature(np.eye(4, dtype=np.float32), np.arange(4)) == 1.0


def test_the_temperature_stays_finite_if_the_model_is_worse_than_chance():
  found = measures.fit_temperature(np.eye(4, dtype=np.float32), np.arange(4)[::-1])
  assert found == pytest.approx(measures.HOTTEST, rel=1e-3)


@pytest.mark.parametrize('classes, top5', [(7, 5 / 7), (6, 5 / 6), (5, None)])
def test_top_5_counts_five_classes(classes, top5):
  """The label of row i is the class with rank i in this row."""
  rank_NL = np.stack([np.roll(np.arange(classes), i) for i in range(classes)])
  label_N = np.argmax(rank_NL == np.arange(classes)[:, None], axis=1)
  answers = Answers(np.arange(classes), label_N, -1.0 * rank_NL, np.arange(classes) * 1.0)
  want = {'loss': (classes - 1) / 2, 'accuracy': 1 / classes, 'examples': classes}
  want |= {} if top5 is None else {'top5_accuracy': top5}
  assert Scores.of(answers).means() == pytest.approx(want)


def test_top_5_matches_scikit_learn_with_random_logits():
  logits_NL = np.random.RandomState(0).normal(size=(200, 9))
  label_N = np.random.RandomState(1).randint(0, 9, 200)
  answers = Answers(np.arange(200), label_N, logits_NL, np.zeros(200))
  want = metrics.top_k_accuracy_score(label_N, logits_NL, k=5, labels=range(9))
  assert Scores.of(answers).means()['top5_accuracy'] == pytest.approx(want)


def test_of_equal_logits_the_first_is_predicted_and_ranks_first():
  answers = Answers(np.arange(7), np.arange(7), np.zeros((7, 7)), np.zeros(7))
  scores = Scores.of(answers)
  assert (scores.predicted_N == 0).all()
  assert scores.top5_N.tolist() == [True] * 5 + [False] * 2
