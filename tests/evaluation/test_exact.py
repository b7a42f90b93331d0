"""Tests `--mode=eval`: what it computes, writes and prints, and how the temperature is fitted."""

import dataclasses
import json
import logging
import shutil

import jax
import numpy as np
import pytest
from scipy import special
from sklearn import metrics

from tests.conftest import call, run_model, small_config
import vit_jax
from vit_jax import evaluation, limits, names, opening, storage
from vit_jax.data import Examples, Source
from vit_jax.evaluation import answers, data, exact
from vit_jax.experiment import assemble, mesh_for
from vit_jax.inference import exporting
from vit_jax.training import trainer
from vit_jax.workdir import Calibration, Task, saved_steps
from vit_jax.workdir import calibration as calibration_lib

KEYS = {
  'accuracy', 'accuracy_interval', 'balanced_accuracy', 'per_class', 'ece', 'temperature',
  'examples', 'step', 'source', 'split', 'loss', 'ece_uncalibrated', 'temperature_examples',
  'confusion', 'reliability', 'coverage',
}  # fmt: skip


def with_validation(**overrides):
  """Returns the config of a run with 192 validation images and some mistakes on them."""
  splits = {'data.train_split': 'train[:256]', 'data.val_split': 'train[256:448]'}
  return small_config(**{'epochs': '4', 'optimizer.lr': '3e-3', **splits, **overrides})


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A finished run with a validation split."""
  workdir = tmp_path_factory.mktemp('validated')
  trainer.train(with_validation(), workdir)
  return workdir


@pytest.fixture
def workdir(run, tmp_path):
  """A copy of the run, which the test may change."""
  return shutil.copytree(run, tmp_path / 'run')


def logits_of(workdir, split):
  """Returns the float64 logits and the labels of a split, computed without batches."""
  exp, params, _ = opening.from_workdir(workdir)
  examples = evaluation.load_split(exp, split)
  logits_NL = run_model(exp.model, params, exp.normalize(examples.image_NHWC))
  return np.asarray(logits_NL, np.float64), examples.label_N


def test_eval_json_has_the_measures_of_the_test_split(workdir):
  result = vit_jax.evaluate(workdir)
  assert json.loads((workdir / 'eval.json').read_text()) == result and result.keys() >= KEYS
  logits_NL, label_N = logits_of(workdir, 'test')
  predicted_N = logits_NL.argmax(axis=1)
  assert result['accuracy'] == pytest.approx((predicted_N == label_N).mean())
  want = metrics.balanced_accuracy_score(label_N, predicted_N)
  assert result['balanced_accuracy'] == pytest.approx(want)
  want = metrics.f1_score(label_N, predicted_N, average=None, labels=range(10))
  names = opening.from_workdir(workdir)[0].task.class_names
  np.testing.assert_allclose([result['per_class'][name]['f1'] for name in names], want)
  assert sum(row['support'] for row in result['per_class'].values()) == result['examples'] == 256
  confidence_N = special.softmax(logits_NL / result['temperature'], axis=1).max(axis=1)
  confidences = [row['confidence'] for row in result['coverage']]
  assert confidences[-1] == pytest.approx(confidence_N.min(), rel=1e-5)
  assert result['coverage'][-1]['accuracy'] == pytest.approx(result['accuracy'])
  assert sum(row['examples'] for row in result['reliability']) == 256


def test_the_temperature_is_fitted_on_validation_at_the_end_of_training(run):
  saved = json.loads((run / 'calibration.json').read_text())
  exp, _, step = opening.from_workdir(run)
  logits_NL, label_N = logits_of(run, 'train[256:448]')
  assert (logits_NL.argmax(axis=1) != label_N).any() and exp.calibration.examples == 192
  assert exp.calibration.temperature == saved[str(step)]['temperature'] != 1
  grid = np.exp(np.linspace(np.log(0.05), np.log(20), 2001))
  own_N = logits_NL[np.arange(192), label_N]
  loss = [(special.logsumexp(logits_NL / t, axis=1) - own_N / t).mean() for t in grid]
  assert exp.calibration.temperature == pytest.approx(grid[np.argmin(loss)], rel=0.004)


@pytest.mark.parametrize('ema', ['0', pytest.param('0.5', marks=pytest.mark.slow)])
def test_the_last_and_the_best_checkpoint_have_their_own_temperature(tmp_path, monkeypatch, ema):
  # The first of two checkpoints is the best. With EMA, the raw weights are scored too.
  scores = iter(np.repeat([0.9, 0.5], 1 if ema == '0' else 2).tolist())

  def score(self, params, examples):
    val = examples is self.training.val
    return {'accuracy': next(scores) if val else 0.5, 'loss': 1.0, 'examples': len(examples)}

  monkeypatch.setattr('vit_jax.training.loop.Run.score', score)
  trainer.train(with_validation(ema=ema, eval_every='0', checkpoint_every='16'), tmp_path)
  saved = json.loads((tmp_path / 'calibration.json').read_text())
  assert [*map(int, saved)] == sorted(saved_steps(tmp_path)) and len(saved) == 2
  own = {step: opening.from_workdir(tmp_path, step=step)[0].calibration for step in saved}
  assert {step: found.temperature for step, found in own.items()} == {
    step: fields['temperature'] for step, fields in saved.items()
  }
  (first, last) = saved
  assert saved[first] != saved[last]
  (tmp_path / 'calibration.json').unlink()
  for step in saved:  # eval fits the same temperature, also for averaged weights
    found = vit_jax.evaluate(tmp_path, step=step)['temperature']
    assert found == pytest.approx(saved[step]['temperature'], rel=1e-4)


@pytest.mark.slow
def test_eval_fits_a_missing_temperature_once(workdir, monkeypatch, caplog):
  caplog.set_level(logging.INFO, 'vit_jax')
  before = (workdir / 'calibration.json').read_text()
  (workdir / 'calibration.json').unlink()
  first = vit_jax.evaluate(workdir)
  assert first['temperature_examples'] == 192 and 'fitted on 192 validation' in caplog.text
  now = json.loads((workdir / 'calibration.json').read_text())
  want = json.loads(before)[str(first['step'])]['temperature']
  assert now[str(first['step'])]['temperature'] == pytest.approx(want, rel=1e-4)
  monkeypatch.setattr(exact, 'calibrate', None)  # not called again
  assert vit_jax.evaluate(workdir) == first


@pytest.mark.parametrize(
  'overrides',
  [
    {'data.image_size': '4'},
    {'data.crop': '0.5'},
    {'data.interpolation': 'nearest'},
    {'data.stretch': 'true'},
    {'data.mean': '0.2'},
    {'data.std': '0.3'},
    {'model.dtype': 'bfloat16'},
  ],
)
@pytest.mark.slow
@pytest.mark.slow_after_first
def test_a_temperature_for_other_images_is_not_kept(workdir, overrides):
  (workdir / 'calibration.json').unlink()
  assert vit_jax.evaluate(workdir, overrides)['temperature_examples'] == 192
  assert not (workdir / 'calibration.json').exists()
  assert vit_jax.evaluate(workdir, {'eval_batch_size': '64'})['temperature_examples'] == 192
  assert (workdir / 'calibration.json').exists()


@pytest.mark.parametrize('overrides', [
  {'data.val_split': 'train[:100]'},  # these images were trained on
  {'data.source': 'digits', 'data.image_size': '8'},
])  # fmt: skip
@pytest.mark.slow
def test_no_temperature_is_fitted_on_other_data_than_the_runs(workdir, overrides):
  (workdir / 'calibration.json').unlink()
  exp, _, step = opening.from_workdir(workdir, overrides)
  assert data.load_validation(exp, workdir, step) is None


@pytest.mark.slow
def test_no_temperature_is_fitted_on_other_files_of_the_same_name(workdir, caplog):
  exp, _, step = opening.from_workdir(workdir)
  other = dataclasses.replace(exp, task=dataclasses.replace(exp.task, fingerprint='0123'))
  assert data.load_validation(other, workdir, step) is None
  assert 'the list of training files or their labels differ' in caplog.text


@pytest.mark.slow
def test_no_temperature_is_fitted_on_images_of_the_last_run_of_a_sweep(workdir, monkeypatch):
  exp, _, step = opening.from_workdir(workdir)
  assert data.load_validation(exp, workdir, step) is not None
  restore = data.restore_item

  def swept(*args):
    found = restore(*args)
    return found | {'config': found['config'] | {'sweep': [0.1, 0.2]}}

  monkeypatch.setattr(data, 'restore_item', swept)
  assert data.load_validation(exp, workdir, step) is None


@pytest.mark.slow
def test_no_temperature_is_fitted_with_max_patches(workdir):
  (workdir / 'calibration.json').unlink()
  assert vit_jax.evaluate(workdir, max_patches=4)['temperature_examples'] == 0
  assert not (workdir / 'calibration.json').exists()


@pytest.mark.slow
def test_without_validation_split_the_temperature_is_1(trained, tmp_path, capsys):
  workdir = shutil.copytree(trained[0], tmp_path / 'run')
  code, out, _ = call(capsys, '--mode=eval', f'--workdir={workdir}')
  result = json.loads((workdir / 'eval.json').read_text())
  assert not code and 'not fitted: temperature 1' in out
  assert (result['temperature'], result['temperature_examples']) == (1.0, 0)
  assert result['ece'] == result['ece_uncalibrated']
  assert not (workdir / 'calibration.json').exists()


@pytest.mark.slow
def test_scores_do_not_depend_on_the_batch_size_or_the_number_of_devices(workdir, monkeypatch):
  found = []
  for size, devices in ((7, 2), (100, 1), (256, 2)):
    monkeypatch.setattr(jax, 'device_count', lambda devices=devices: devices)
    found.append(vit_jax.evaluate(workdir, {'eval_batch_size': str(size)}))
  for other in found[1:]:
    assert other['confusion'] == found[0]['confusion']
    for name in ('loss', 'ece', 'accuracy'):
      assert other[name] == pytest.approx(found[0][name], abs=1e-6)


def test_eval_prints_an_interval_and_the_worst_classes(workdir, capsys):
  code, out, _ = call(capsys, '--mode=eval', f'--workdir={workdir}')
  result = json.loads((workdir / 'eval.json').read_text())
  numbers, summary, head, *rows = out.splitlines()
  fields = dict(part.split(' ') for part in numbers.split(', '))
  assert not code and float(fields['accuracy']) == pytest.approx(result['accuracy'])
  assert {'step', 'loss', 'top5_accuracy', 'examples', 'ece'} <= fields.keys()
  low, high = result['accuracy_interval']
  assert f'(95% interval {low:.2%} to {high:.2%})' in summary
  assert f'balanced accuracy {result["balanced_accuracy"]:.2%}' in summary
  assert f'ECE {result["ece"]:.2%}' in summary and 'fitted on 192 validation images' in summary
  lowest = sorted((row['f1'], name) for name, row in result['per_class'].items())[:5]
  assert head.split()[:4] == ['precision', 'recall', 'F1', 'examples']
  assert [row.split()[2] for row in rows] == [f'{f1:.2%}' for f1, _ in lowest]


CLASSES = tuple(f'pattern {i}' for i in range(10))


@pytest.mark.parametrize('names, channels, message', [
  (CLASSES[::-1], 3, 'The order differs. Use a dataset with the classes of the model'),
  (CLASSES[:9], 3, '10 classes .* has 9 classes .* only one of the two lists: pattern 9'),
  (('b, x', 'a', 'c', 'd', 'e'), 3, r'has 5 classes \(b, x; a; c; d; e\)'),
  (CLASSES, 1, 'takes images with 1 channels, but the images in synthetic have 3'),
])  # fmt: skip
def test_a_dataset_that_does_not_fit_the_model_is_refused(names, channels, message):
  with pytest.raises(ValueError, match=message):
    data.open_data(assemble(small_config(), Task(names, (8, 8), channels)))


@pytest.mark.parametrize('cache', ['memory', 'auto'])
def test_splits_that_together_do_not_fit_into_memory_are_not_loaded(monkeypatch, cache):
  exp = assemble(small_config(**{'data.cache': cache}), Task(CLASSES, (8, 8), 3))
  source = data.open_data(exp)
  parts = (source, 'train[:20]'), (source, 'test[:20]')
  monkeypatch.setattr(limits, 'limit', lambda: 2 * 30 * 8 * 8 * 3)  # 30 images
  assert isinstance(data.load_splits(exp, parts[0])[0], Examples)
  if cache == 'auto':
    assert not any(isinstance(split, Examples) for split in data.load_splits(exp, *parts))
  else:
    with pytest.raises(ValueError, match='40 images .*data.cache=stream'):
      data.load_splits(exp, *parts)


@pytest.mark.slow
def test_a_crop_that_would_have_no_effect_is_refused(tmp_path, capsys):
  """Small images are kept whole in memory, and images with `max_patches` keep their shape."""
  small = {'data.source': 'digits', 'data.cache': 'memory', 'epochs': '0', 'model.patch_size': '4'}
  trainer.train(small_config(**small | {'data.image_size': '16'}), tmp_path / 'small')
  trainer.train(small_config(**small | {'data.image_size': '8'}), tmp_path / 'same')
  for key, value in (('data.crop', '0.5'), ('data.stretch', 'true')):
    where = f'--workdir={tmp_path / "small"}', f'--config.{key}={value}'
    code, _, text = call(capsys, '--mode=eval', *where)
    assert code == 2 and f'error: {key} would have no effect: ' in text, text
    assert 'whole images of 8x8 pixels' in text
    init = str(tmp_path / 'small')
    with pytest.raises(ValueError, match=f'{key} would have no effect'):
      opening.open_model(opening.Request(init=init, overrides={key: value}))
    with pytest.raises(ValueError, match=f'{key} would have no effect: with --max_patches'):
      vit_jax.evaluate(tmp_path / 'same', {key: value}, max_patches=4)
    assert vit_jax.evaluate(tmp_path / 'same', {key: value})['overrides'] == {key: value}
  assert not (tmp_path / 'small' / 'eval.json').exists()
  with pytest.raises(ValueError, match='data.image_size would have no effect: with --max_patches'):
    vit_jax.evaluate(tmp_path / 'same', {'data.image_size': '16'}, max_patches=4)


def test_weights_without_class_names_have_the_classes_of_the_data(workdir, tmp_path, caplog):
  exporting.export(workdir, 'npz', tmp_path)
  settings = {'data.source': 'synthetic', 'data.image_size': '8'}
  found = vit_jax.evaluate(None, settings, init=tmp_path / 'model.npz')
  wanted = vit_jax.evaluate(workdir, step='last')
  assert found['accuracy'] == wanted['accuracy'] > 0.3
  assert [*found['per_class']] == [*wanted['per_class']] != ['class 0', 'class 1']
  assert 'assumed to be in the order of the logits' in caplog.text
  with pytest.raises(ValueError, match='set exactly one of them'):
    vit_jax.evaluate(workdir, settings, init=tmp_path / 'model.npz')


WORDS, IDS = ('tench, Tinca tinca', 'goldfish', 'cock'), ('n01440764', 'n01443537', 'n01514668')


@pytest.mark.parametrize('own, given, same', [
  (WORDS, IDS, True), (WORDS, WORDS, True), (WORDS, IDS[::-1], False), (WORDS, IDS[:2], False),
  (WORDS, ('n01440764', 'goldfish', 'n01514668'), False), (IDS, WORDS, False), (None, IDS, False),
  (tuple(sorted(WORDS)), IDS, False), (('T-shirt/top', 'Trouser', 'Pullover'), IDS, False),
  ((), (), True), ((), IDS, False),
])  # fmt: skip
def test_words_name_the_classes_of_sorted_wordnet_ids(own, given, same):
  assert names.same_classes(own, given) == same


def test_a_model_that_names_imagenets_classes_with_words_is_evaluated(monkeypatch, caplog):
  source = Source({}, IDS, 3, None)
  monkeypatch.setattr(data, 'open_source', lambda *_: source)
  assert data.open_data(assemble(small_config(), Task(WORDS, (8, 8), 3))) is source
  assert 'tench, Tinca tinca; goldfish; cock, and the data has the classes n0144' in caplog.text


def test_a_read_only_workdir_does_not_lose_the_printed_result(workdir, monkeypatch, capsys):
  (workdir / 'calibration.json').unlink()

  def refuse(path, text):
    raise storage.unwritten(path, 'Read-only file system')

  monkeypatch.setattr(storage, 'replace', refuse)
  code, out, err = call(capsys, '--mode=eval', f'--workdir={workdir}')
  assert not code and 'balanced accuracy' in out and 'fitted on 192 validation images' in out
  assert err.count('The result is only printed.') == 2  # calibration.json and eval.json
  assert not (workdir / 'eval.json').exists()


def test_a_very_large_split_is_fitted_on_evenly_spaced_examples(run, monkeypatch):
  exp, params, _ = opening.from_workdir(run)
  val = evaluation.load_split(exp, 'train[256:448]')
  asked = []
  monkeypatch.setattr(answers, 'FITTED', 64 * 10)
  monkeypatch.setattr(
    answers.measures, 'fit_temperature', lambda *given: asked.append(given) or 2.0
  )
  mesh = mesh_for(exp.config)
  found = answers.calibrate(answers.make_eval_step(exp, mesh), params, val, 50, mesh)
  (((logits_NL, label_N),)) = asked
  assert found == Calibration(2.0, examples=64) and logits_NL.shape == (64, 10)
  np.testing.assert_array_equal(label_N, val.label_N[::3])


@pytest.mark.parametrize('entry', ['7', '{"temperature": 0}', '{"temperature": "1"}', '{"t": 1}'])
def test_a_damaged_temperature_is_not_used(workdir, entry, caplog):
  step = saved_steps(workdir)[0]
  (workdir / 'calibration.json').write_text(f'{{"{step}": {entry}}}')
  assert opening.from_workdir(workdir, step='last')[0].calibration == Calibration()
  assert 'damaged' in caplog.text


@pytest.mark.slow
def test_a_new_run_forgets_the_temperatures_of_an_earlier_one(workdir):
  shutil.rmtree(workdir / 'checkpoints')
  (workdir / 'result.json').unlink()
  trainer.train(small_config(), workdir)  # as many steps, but no validation split
  assert opening.from_workdir(workdir)[0].calibration == Calibration()


def test_a_resumed_run_keeps_the_temperatures_of_earlier_steps(tmp_path):
  for step in (16, 32):
    calibration_lib.save_calibration(tmp_path, step, Calibration(2.0, examples=9))
  calibration_lib.forget_calibrations(tmp_path, 16)
  assert calibration_lib.find_calibration(tmp_path, 16, 10)['temperature'] == 2
  assert calibration_lib.find_calibration(tmp_path, 32, 10) is None
