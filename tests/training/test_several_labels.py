"""Trains, evaluates and uses a model of images with several labels: pairs of digits."""

import contextlib
import csv
import io
import json
import re
import shutil

import jax
import numpy as np
import pytest
from sklearn import metrics

from benchmarks.pairs import write_pairs
from tests.conftest import call, run_model, small_config
from vit_jax import evaluation, opening
from vit_jax.data import sources, train_batches
from vit_jax.distributed import devices, sharding
from vit_jax.evaluation import exact
from vit_jax.experiment import assemble
from vit_jax.figures import visualize
from vit_jax.inference import exporting
from vit_jax.inference.prediction import predict
from vit_jax.opening import Request
from vit_jax.training import state, step, trainer
from vit_jax.weights import FORMATS
from vit_jax.workdir import Task, stored, writer

pytestmark = pytest.mark.slow  # these tests train small models


def config_for(folder, **overrides):
  settings = {
    'data.source': f'labels:{folder}/labels.csv', 'data.image_size': '8,16', 'epochs': '14',
    'data.train_split': 'train[:80%]', 'data.val_split': 'train[80%:]', 'checkpoint_every': '100',
    'eval_every': '0', 'loss.class_weights': 'balanced', 'loss.label_smoothing': '0.05',
    'augment.mix.probability': '0.1', 'augment.flip.probability': '0',
    'model.stochastic_depth': '0',
  }  # fmt: skip
  return small_config(**{**settings, **overrides})


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
  """A folder with 656 pictures of two digits, and `labels.csv`."""
  folder = tmp_path_factory.mktemp('pairs') / 'digits'
  write_pairs(sources.open_source('digits', '', (8, 8)), folder, {'train': 560, 'test': 96}, 8)
  return folder


@pytest.fixture(scope='module')
def run(pairs, tmp_path_factory):
  """A finished run on the pairs: (workdir, result)."""
  workdir = tmp_path_factory.mktemp('several')
  return workdir, trainer.train(config_for(pairs), workdir)


def test_pairs_have_the_labels_of_both_images(pairs):
  rows = list(csv.reader((pairs / 'labels.csv').open(encoding='utf-8')))
  counts = [len(label.split(';')) if label else 0 for _, label, _ in rows[1:]]
  assert {0, 1, 2} == set(counts) and len(counts) == 656
  assert counts.count(0) == 560 // 16 + 96 // 16


def outputs(workdir, split='test', **overrides):
  """Returns probabilities and labels of a split, computed without the project's scores."""
  exp, params, _ = opening.open_model(Request(workdir, step='last', overrides=overrides))
  test = evaluation.load_split(exp, split)
  logits = run_model(exp.model, params, exp.normalize(test.image_NHWC))
  return 1 / (1 + np.exp(-np.asarray(logits, np.float64))), test.label_N


def test_a_run_reports_mean_average_precision(run):
  workdir, result = run
  probability_NL, label_NL = outputs(workdir)
  want = metrics.average_precision_score(label_NL, probability_NL, average='macro')
  assert result['test_mean_average_precision'] == pytest.approx(want, abs=1e-4)
  assert want > 2 * label_NL.mean()  # clearly better than chance
  assert result['config']['loss']['name'] == 'sigmoid'
  item = stored.restore_item(workdir, result['steps'], 'config')
  assert item['task']['multi_label'] is True


def test_the_best_checkpoint_has_the_highest_mean_average_precision(run):
  workdir, result = run
  lines = [line for line in writer.read_metrics(workdir) if line['split'] == 'val']
  known = {line['step']: line['mean_average_precision'] for line in lines}
  assert len(known) > 1 and stored.accuracies(workdir).items() <= known.items()
  best = max(known.values())
  assert result['best']['val_mean_average_precision'] == best == known[result['best']['step']]
  (first, *_) = stored.preferred(workdir, 'best')
  assert first[1].startswith(f'validation mean average precision {best:.2%}')


def test_evaluation_does_not_depend_on_batches_or_devices(run):
  workdir, _ = run
  exp, params, _ = opening.open_model(Request(workdir))
  test, found = evaluation.load_split(exp, 'test'), []
  for count, size in ((2, 7), (2, 96), (1, 10)):  # number of devices, batch size
    mesh = devices.inference_mesh(size)
    if count == 1:
      mesh = devices.make_mesh(size, shape={'data': 1, 'fsdp': 1, 'tensor': 1})
    step = exact.make_eval_step(exp, mesh)
    found.append(exact.score_split(step, sharding.replicate(mesh, params), test, size, mesh))
  for other in found[1:]:
    assert other == pytest.approx(found[0], rel=1e-4)
  assert found[0]['examples'] == 96


def test_eval_prints_the_scores_of_each_class(run, capsys):
  workdir, _ = run
  probability_NL, label_NL = outputs(workdir)
  want = evaluation.evaluate(workdir, step='last')
  threshold_L = thresholds_of(workdir)
  f1 = metrics.f1_score(label_NL, probability_NL >= threshold_L, average=None, zero_division=0)
  assert [row['f1'] for row in want['per_class'].values()] == pytest.approx(list(f1))
  assert want['macro_f1_at_thresholds'] == pytest.approx(f1.mean())
  _, out, _ = call(capsys, '--mode=eval', f'--workdir={workdir}', '--step=last')
  assert f'mean_average_precision {want["mean_average_precision"]:.9g}' in out
  row = want['per_class']['3']
  cells = f'{row["average_precision"]:.2%} {row["threshold"]:.2%}', f'{row["f1"]:.2%}'
  (line,) = [' '.join(line.split()) for line in out.splitlines() if line.endswith('  3')]
  assert line.startswith(cells[0]) and line.endswith(f'{cells[1]} {row["support"]} 3')
  assert row['support'] == label_NL[:, 3].sum()
  assert len(out.splitlines()) == 3 + 10  # numbers, summary, header, and every class


def test_eval_json_has_only_measures_that_several_labels_allow(run):
  workdir, _ = run
  want = evaluation.evaluate(workdir, step='last')
  saved = json.loads((workdir / 'eval.json').read_text(encoding='utf-8'))
  assert saved == want and saved['threshold_examples'] == 111
  assert saved.keys() == {
    'step', 'source', 'split', 'loss', 'accuracy', 'mean_average_precision', 'macro_f1',
    'examples', 'macro_f1_at_thresholds', 'threshold_examples', 'per_class',
  }  # fmt: skip


def thresholds_of(workdir):
  """Returns the thresholds of the last checkpoint, which the end of the training has fitted."""
  exp, *_ = opening.open_model(Request(workdir, step='last'))
  assert exp.calibration.temperature == 1 and exp.calibration.examples > 0
  return np.array(exp.calibration.thresholds)


def test_thresholds_have_the_best_f1_on_the_validation_split(run):
  workdir, _ = run
  probability_NL, label_NL = outputs(workdir, split='train[80%:]')
  threshold_L = thresholds_of(workdir)
  f1 = lambda t: metrics.f1_score(label_NL, probability_NL >= t, average=None, zero_division=0)
  best_L = np.max([f1(t) for t in np.linspace(0, 1, 1001)], axis=0)
  assert (f1(threshold_L) >= best_L - 1e-9).all() and (threshold_L != 0.5).any()


def test_eval_fits_missing_thresholds_again(run, tmp_path):
  workdir = shutil.copytree(run[0], tmp_path / 'run')
  before = json.loads((workdir / 'calibration.json').read_text())
  (workdir / 'calibration.json').unlink()
  (image,) = list((workdir / 'examples').glob('0_*.png'))
  assert opening.open_model(Request(workdir))[0].calibration.thresholds is None
  assert predict(workdir, image)  # at 0.5
  result = evaluation.evaluate(workdir, step='last')
  now = json.loads((workdir / 'calibration.json').read_text())
  entry, step = now[str(result['step'])], str(result['step'])
  assert entry['thresholds'] == pytest.approx(before[step]['thresholds'], abs=1e-4)
  (workdir / 'calibration.json').write_text(json.dumps({step: entry | {'thresholds': ['x']}}))
  assert opening.open_model(Request(workdir, step=step))[0].calibration.thresholds is None


def test_predict_gives_every_label_above_the_threshold(run, pairs, capsys):
  workdir, _ = run
  files = sorted((pairs / 'test').glob('*.png'))
  probability_NL, _ = outputs(workdir)
  rows = list(predict(workdir, files, step='last'))
  names = opening.open_model(Request(workdir))[0].task.class_names
  by_file, threshold_L = {row['file']: row['predictions'] for row in rows}, thresholds_of(workdir)
  order = [path for _, path, _ in sources.open_source(
    f'labels:{pairs}/labels.csv', '', (8, 16)).read('test', range(96))]  # fmt: skip
  for path, probability_L in zip(order, probability_NL):
    given = {guess['class'] for guess in by_file[str(path)]}
    sure = np.abs(probability_L - threshold_L) > 1e-3
    wanted = {n for n, p, t in zip(names, probability_L, threshold_L) if p >= t}
    assert given == wanted or not sure.all()
    found = [guess['probability'] for guess in by_file[str(path)]]
    assert found == sorted(found, reverse=True)
  assert [len(row['predictions']) for row in predict(workdir, files[:2], topk=3)] == [3, 3]

  flags = '--mode=predict', f'--workdir={workdir}', f'--images={pairs}/test', '--step=last'
  _, out, _ = call(capsys, *flags, '--format=csv')
  lines = list(csv.DictReader(io.StringIO(out)))
  assert {line['file'] for line in lines} == set(by_file)  # also the files without a label
  empty = [line for line in lines if not line['class']]
  assert {line['file'] for line in empty} == {file for file, found in by_file.items() if not found}
  assert empty
  assert 'no label' in call(capsys, *flags)[1]


def test_an_exported_program_states_the_thresholds(run, capsys, tmp_path):
  workdir, _ = run
  flags = '--mode=export', '--format=stablehlo', '--step=last', f'--out={tmp_path}/out'
  assert not call(capsys, *flags, f'--workdir={workdir}')[0]
  about, want = json.loads((tmp_path / 'out/model.json').read_text()), thresholds_of(workdir)
  assert about['output']['thresholds'] == pytest.approx(want)
  assert about['output']['probabilities'] == 'sigmoid'
  card = (tmp_path / 'out/README.md').read_text(encoding='utf-8')
  assert f'{want[0]:.3g}, {want[1]:.3g}, ' in card and 'sigmoid' in card
  assert 'softmax' not in card


@pytest.mark.parametrize('format', ['stablehlo', 'onnx'])
def test_an_exported_program_agrees_with_eval_and_predict(run, pairs, format, tmp_path, capsys):
  if format == 'onnx':
    pytest.importorskip('jax2onnx', reason='needs requirements-onnx.txt')
  workdir, result = run
  exporting.export(workdir, format, tmp_path, 'last')
  test = evaluation.load_split(opening.open_model(Request(workdir))[0], 'test')
  logits_NL = FORMATS[format].opens(tmp_path)(test.image_NHWC).astype(np.float64)
  probability_NL, label_NL = outputs(workdir)
  np.testing.assert_allclose(1 / (1 + np.exp(-logits_NL)), probability_NL, atol=1e-4)
  precision = metrics.average_precision_score(label_NL, logits_NL, average='macro')
  assert precision == pytest.approx(result['test_mean_average_precision'], abs=1e-4)
  card = (tmp_path / 'README.md').read_text(encoding='utf-8')
  mean = f'{result["test_mean_average_precision"]:.2%} on the 96 images of `test`'
  assert f'| mean average precision | {mean} |' in card and '| accuracy |' not in card
  code = re.search(r'```python\n(.*?)```', card, re.DOTALL)[1]
  kinds = set()
  for file in sorted((pairs / 'test').glob('*.png'))[:12]:
    (row,) = predict(workdir, file, step='last')
    shutil.copy(file, tmp_path / 'image.png')
    with contextlib.chdir(tmp_path):
      exec(code, {})
    printed = capsys.readouterr().out.split()
    assert sorted(printed) == sorted(guess['class'] for guess in row['predictions'])
    kinds.add(len(printed))
  assert len(kinds) > 1  # images with different numbers of labels


@pytest.mark.slow
@pytest.mark.slow_after_first
@pytest.mark.parametrize('format', ['npz', 'hf'])
def test_the_code_of_a_card_prints_the_labels_of_predict(run, pairs, format, tmp_path, capsys):
  if format == 'hf':
    pytest.importorskip('transformers', reason='needs requirements-peers.txt')
    square = {'model.pool': 'cls', 'data.image_size': '16', 'data.stretch': 'true'}
    trainer.train(config_for(pairs, **square), tmp_path / 'run')
  workdir, out = tmp_path / 'run' if format == 'hf' else run[0], tmp_path / 'out'
  exporting.export(workdir, format, out, 'last')
  card = (out / 'README.md').read_text(encoding='utf-8')
  code = re.search(r'```python\n(.*?)```', card, re.DOTALL)[1]
  names, kinds = opening.open_model(Request(workdir))[0].task.class_names, set()
  for file in sorted((pairs / 'test').glob('*.png'))[:12]:
    (row,) = predict(workdir, file, step='last')
    shutil.copy(file, out / 'image.png')
    with contextlib.chdir(out):
      exec(code, {})
    printed = re.findall(r'\d+', capsys.readouterr().out)
    printed = [names[int(i)] for i in printed] if format == 'npz' else printed
    assert sorted(printed) == sorted(guess['class'] for guess in row['predictions'])
    kinds.add(len(printed))
  assert len(kinds) > 1


def test_without_fitted_thresholds_a_program_states_one_half(run, tmp_path):
  workdir = shutil.copytree(run[0], tmp_path / 'run')
  (workdir / 'calibration.json').unlink()
  exporting.export(workdir, 'stablehlo', tmp_path / 'out')
  about = json.loads((tmp_path / 'out/model.json').read_text())
  assert about['output']['thresholds'] == [0.5] * 10
  assert about['output']['probabilities'] == 'sigmoid'
  assert '0.5 for each class, not fitted' in (tmp_path / 'out/README.md').read_text()


def test_thresholds_for_other_classes_are_not_used(run, tmp_path, caplog):
  workdir = shutil.copytree(run[0], tmp_path / 'run')
  step = str(stored.latest_step(workdir))
  entry = json.loads((workdir / 'calibration.json').read_text())[step]
  entry['thresholds'] = entry['thresholds'][:3]
  (workdir / 'calibration.json').write_text(json.dumps({step: entry}))
  assert opening.open_model(Request(workdir, step=step))[0].calibration.thresholds is None
  assert f'step {step} has 3 thresholds for 10 classes, so it is not used' in caplog.text


def test_weights_of_such_a_run_keep_its_task(run, pairs):
  workdir, _ = run
  files = sorted((pairs / 'test').glob('*.png'))[:4]
  ours, theirs = (
    list(predict(*where, files, init=init, step=step))
    for where, init, step in (((workdir,), '', 'best'), ((None,), str(workdir), ''))
  )
  shape = lambda rows: [[guess['class'] for guess in row['predictions']] for row in rows]
  assert shape(ours) == shape(theirs)


def test_a_finished_run_is_resumed_by_the_same_command(run, pairs):
  workdir, result = run
  assert trainer.train(config_for(pairs), workdir) == result


def test_modes_for_one_label_refuse_or_skip(run, pairs, capsys, tmp_path):
  workdir, _ = run
  code, _, message = call(capsys, '--mode=fewshot', f'--workdir={workdir}')
  assert code == 2 and 'one label per image' in message and 'linear_probe' in message
  for key, part in (
    ('classifier=ridge', 'one label per image'),
    ('distill.teacher', 'cannot be used for images with several labels'),
  ):
    name, _, value = key.partition('=')
    changed = {name: value or str(workdir)}
    fixed = {'epochs': '0', 'init': str(workdir), 'loss.class_weights': 'none'}
    changed |= fixed if value else {}
    with pytest.raises(ValueError, match=part):
      trainer.train(config_for(pairs, **changed), tmp_path / name)
  with pytest.raises(ValueError, match='data.real_labels needs a model that predicts one label'):
    evaluation.evaluate(workdir, {'data.real_labels': 'real.json'})
  visualize(Request(workdir), out=tmp_path)
  page = (tmp_path / 'report.html').read_text(encoding='utf-8')
  assert 'Confusion matrix</td><td>this figure needs one label per image' in page
  assert (tmp_path / 'figures/rollout.png').exists()


def test_a_model_of_several_labels_is_tested_on_a_file_with_one_label(run, pairs, tmp_path):
  workdir, _ = run
  rows = list(csv.reader((pairs / 'labels.csv').open(encoding='utf-8')))[1:]
  single = [
    (pairs / path, label, split) for path, label, split in rows if label and ';' not in label
  ]
  rest = [(pairs / p, label.split(';')[0], split) for p, label, split in rows if ';' in label]
  lines = [json.dumps({'path': str(p), 'label': c, 'split': s}) for p, c, s in single + rest]
  (tmp_path / 'one.jsonl').write_text('\n'.join(lines))
  source = {'data.source': f'labels:{tmp_path}/one.jsonl'}
  found = evaluation.evaluate(workdir, source)
  assert found['examples'] == 90 and 0 < found['mean_average_precision'] < 1
  with pytest.raises(ValueError, match='loss.name=softmax expects one label per image.*sigmoid'):
    trainer.train(config_for(pairs, **{'loss.name': 'softmax'}), tmp_path / 'new')
  with pytest.raises(ValueError, match="class_weights: class: unknown 'x'"):
    trainer.train(config_for(pairs, **{'loss.class_weights': 'x=2'}), tmp_path / 'new')
  exp = assemble(config_for(pairs), Task(source_names(pairs), (8, 16), 3))
  with pytest.raises(ValueError, match='several labels per image, but the model was trained'):
    evaluation.open_data(exp)


def source_names(pairs):
  return sources.open_source(f'labels:{pairs}/labels.csv', '', (8, 16)).class_names


def test_the_loss_of_a_step_uses_class_weights_and_both_labels(pairs):
  """Without augmentation, the logged loss is the weighted binary cross-entropy in float64."""
  config = config_for(pairs, **{'loss.label_smoothing': '0', 'augment.mix.probability': '0'})
  exp, training = opening.from_config(config)
  label_NL = training.train.label_N
  weight_L = label_NL.sum() / (10 * label_NL.sum(axis=0))
  np.testing.assert_allclose(exp.weight_L, weight_L, rtol=1e-5)
  mesh = devices.make_mesh(config.batch_size)
  start = state.init_state(exp, training, mesh)
  batch = next(train_batches(training.train, 32, 0, 0, sharding.batch_sharding(mesh)))
  params, image, label = jax.device_get((start.params, batch['image'], batch['label']))
  logits = np.asarray(run_model(exp.model, params, exp.normalize(image)), np.float64)
  p = 1 / (1 + np.exp(-logits))
  want = -(weight_L * label * np.log(p) + (1 - label) * np.log(1 - p)).sum(axis=1).mean()
  _, found = step.make_train_step(exp, training, mesh)(start, batch)
  assert evaluation.summarize([jax.device_get(found['score'])])['loss'] == pytest.approx(want, 1e-4)


@pytest.mark.slow
def test_a_linear_probe_with_a_sweep_trains_on_several_labels(pairs, tmp_path):
  overrides = {'freeze': 'backbone', 'sweep': '0.001,0.1', 'augment.mix.probability': '0'}
  result = trainer.train(config_for(pairs, **overrides), tmp_path)
  assert 0 < result['test_mean_average_precision'] < 1
  values = [point['val_mean_average_precision'] for point in result['sweep']]
  assert result['lr'] == (0.001, 0.1)[int(np.argmax(values))]
