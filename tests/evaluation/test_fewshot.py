"""Tests the draw of shots, the regression against independent solvers, and the written result."""

import dataclasses
import json
import os
import statistics

import numpy as np
import pytest
from sklearn import linear_model

from tests.conftest import run_model
from vit_jax import cli, evaluation, opening
from vit_jax.data import Examples, Features, sources, stream
from vit_jax.distributed import devices
from vit_jax.evaluation import features, few_shot

NAMES = ('a', 'b', 'c')
NAMES10 = tuple('0123456789')
LABELS = np.random.RandomState(0).permutation(np.repeat(np.arange(3), [30, 40, 50]))


def test_shots_are_drawn_without_replacement_and_nested():
  drawn = [few_shot.draw_shots(LABELS, NAMES, 25, seed) for seed in few_shot.SEEDS]
  for index_LS in drawn:
    assert index_LS.shape == (3, 25) and len(set(index_LS.ravel())) == 75
    assert (LABELS[index_LS] == np.arange(3)[:, None]).all()
  sets = [set(index_LS.ravel()) for index_LS in drawn]
  assert sets[0] != sets[1] != sets[2] != sets[0]
  np.testing.assert_array_equal(few_shot.draw_shots(LABELS, NAMES, 5, 1), drawn[1][:, :5])


@pytest.mark.parametrize('fewest, shots', [(1, 1), (4, 1), (5, 5), (9, 5), (10, 10), (25, 25)])
def test_the_smallest_class_limits_the_shots(fewest, shots):
  label_N = np.repeat(np.arange(3, dtype=np.int32), [30, fewest, 40])
  train = Examples(np.zeros((len(label_N), 1, 1, 1), np.uint8), label_N)
  drawn, _ = few_shot.draw_readable(train, NAMES)
  assert [index_LS.shape for index_LS in drawn] == [(3, shots)] * 3


def test_too_few_images_of_a_class_are_refused():
  with pytest.raises(ValueError, match="31 images of each class, but the class 'a' has 30"):
    few_shot.draw_shots(LABELS, NAMES, 31, 0)


def test_images_are_decoded_in_parts_that_fit_into_memory(monkeypatch):
  monkeypatch.setattr(few_shot, 'PART', 4)
  parts = few_shot.in_parts(np.arange(10))
  assert [part.tolist() for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def reference(train, label, test, test_label):
  """Computes the accuracy of `ridge` with scikit-learn."""
  from sklearn import preprocessing

  scaler = preprocessing.StandardScaler().fit(train)
  scaler.scale_ = train.std(axis=0) + 1e-5
  bias = lambda x: np.concatenate([scaler.transform(x), np.full((len(x), 1), 100.0)], axis=1)
  target = np.where(label[:, None] == np.arange(label.max() + 1), 1.0, -1.0)
  ridge = linear_model.Ridge(alpha=1024.0, fit_intercept=False, solver='svd')
  scores = ridge.fit(bias(train), target).predict(bias(test))
  return (scores.argmax(axis=1) == test_label).mean()


def test_the_accuracy_equals_a_ridge_regression():
  random = np.random.RandomState(2)
  centre = random.normal(size=(5, 30))

  def make(counts):
    label = random.permutation(np.repeat(np.arange(5), counts))
    noise = 8 * random.normal(size=(len(label), 30))
    return label, (10 + 3 * centre[label] + noise).astype(np.float32)

  label, train = make([400, 300, 300, 200, 200])  # uneven, so that the bias matters
  test_label, test = make([200] * 5)
  known, tested = Features(train, label), Features(test, test_label)
  got = few_shot.classifier_accuracy('ridge', known, tested, 5)
  assert got == reference(train.astype(float), label, test.astype(float), test_label)
  assert 0.3 < got < 0.95  # better than chance, but not trivial


@pytest.fixture(scope='module')
def opened(trained):
  return opening.from_workdir(trained[0])


def test_features_are_the_input_of_the_head(opened):
  exp, params, _ = opened
  test = evaluation.load_split(exp, 'test[:70]')
  mesh = devices.make_mesh()
  step = features.make_feature_step(exp, mesh)
  found = features.compute_features(
    step, params, test, 33, mesh
  )  # a batch size that fits neither 70 examples nor 2 devices
  np.testing.assert_array_equal(found.label_N, test.label_N)
  feature_ND = found.feature_ND
  assert feature_ND.shape == (70, 16) and feature_ND.dtype == np.float32
  logits = run_model(exp.model, params, exp.normalize(test.image_NHWC))
  head = params['head']
  np.testing.assert_allclose(feature_ND @ head['kernel'] + head['bias'], logits, atol=1e-4)


def test_a_result_that_cannot_be_written_is_still_printed(capsys, trained, monkeypatch):
  workdir = trained[0]
  score = {'mean': 0.5, 'std': 0.0, 'accuracy': [0.5]}
  monkeypatch.setattr(few_shot, 'score_backbone', lambda *_: {'shots': {'1': score}})
  (workdir / f'fewshot.json.{os.getpid()}.partial').symlink_to('/dev/full')
  assert not cli.main(['--mode=fewshot', f'--workdir={workdir}'])
  out, err = capsys.readouterr()
  assert ' 1 shots: 50.00%' in out and '/fewshot.json (No space left' in err


@pytest.mark.slow
def test_fewshot_measures_a_trained_workdir(capsys, trained, opened, monkeypatch):
  workdir, _ = trained
  tested = []
  real = few_shot.classifier_accuracy
  monkeypatch.setattr(
    few_shot, 'classifier_accuracy', lambda *a: tested.append(len(a[2])) or real(*a)
  )
  assert not cli.main(['--mode=fewshot', f'--workdir={workdir}'])
  out = capsys.readouterr().out
  result = json.loads((workdir / 'fewshot.json').read_text())
  assert result['step'] == 32 and result['examples'] == 256 and result['l2'] == 1024
  assert tested == [256] * 12  # the whole test split, every time
  assert list(result['shots']) == ['1', '5', '10', '25']
  for score in result['shots'].values():
    assert len(score['accuracy']) == 3
    assert score['mean'] == pytest.approx(np.mean(score['accuracy']))
    assert score['std'] == pytest.approx(statistics.stdev(score['accuracy']))
  assert result['shots']['25']['mean'] > 0.5 and f'{result["shots"]["25"]["mean"]:.2%}' in out

  exp, params, _ = opened
  train, test = (evaluation.load_split(exp, split) for split in ('train', 'test'))
  backbone = exp.model.clone(num_classes=None)
  apply = lambda image: np.asarray(run_model(backbone, params, exp.normalize(image)), float)
  index = few_shot.draw_shots(train.label_N, exp.task.class_names, 5, seed=1).ravel()
  want = reference(
    apply(train.image_NHWC[index]), train.label_N[index], apply(test.image_NHWC), test.label_N
  )
  assert result['shots']['5']['accuracy'][1] == pytest.approx(want, abs=1 / 256)


def test_bad_images_are_replaced_by_others_of_their_class(opened, monkeypatch):
  exp, params, _ = opened
  source = sources.open_source('synthetic', '', (8, 8))
  streams = [
    stream.open_stream(source, split, size=(8, 8), fit=exp.fit, skip_bad_images=True)
    for split in ('train[:150]', 'test[:40]')
  ]
  index = np.concatenate(
    [few_shot.draw_shots(streams[0].label_N, NAMES10, 10, s)[:2] for s in (0, 1)]
  )
  bad = set(index[:, 0].tolist())  # the first drawn image of each of the first two classes

  def read(split, indices):
    for i, (name, pixels, label) in zip(indices, source.read(split, indices)):
      yield name, b'bad' if split == 'train' and i in bad else pixels, label

  streams = [dataclasses.replace(s, source=dataclasses.replace(source, read=read)) for s in streams]
  monkeypatch.setattr(few_shot, 'open_both', lambda _: (*streams, 0))
  labels, real = [], few_shot.classifier_accuracy
  monkeypatch.setattr(
    few_shot, 'classifier_accuracy', lambda *a: labels.append(a[1].label_N) or real(*a)
  )
  result = few_shot.score_backbone(exp, params)
  assert list(result['shots']) == ['1', '5', '10'] and result['examples'] == 40
  for label_N, shots in zip(labels, np.repeat([1, 5, 10], 3)):
    np.testing.assert_array_equal(np.bincount(label_N, minlength=10), shots)
  for index_LS in few_shot.draw_readable(streams[0], NAMES10)[0]:
    assert not bad & set(index_LS.ravel().tolist())
  assert streams[0].readable([]).shape == (0,)


def test_the_training_split_is_not_decoded_before_its_images_are_drawn(opened):
  train, test, left_out = few_shot.open_both(opened[0])
  assert isinstance(train, stream.Stream) and isinstance(test, Examples) and not left_out


def test_a_split_that_is_too_small_is_refused(capsys, trained):
  flags = ['--mode=fewshot', f'--workdir={trained[0]}', '--config.data.train_split=train[:5]']
  assert cli.main(flags) == 2
  assert '1 shots need 1 images of each class' in capsys.readouterr().err
