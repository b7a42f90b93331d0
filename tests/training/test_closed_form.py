"""Tests the workdirs that --mode=fewshot leaves: their logits, and what modes do with them."""

import json
import types

import jax
import numpy as np
from PIL import Image
import pytest
from sklearn import linear_model, neighbors, preprocessing

from tests.conftest import call, error, run_model, small_config
import vit_jax
from vit_jax import evaluation, inherit, opening
from vit_jax.check import check
from vit_jax.data import Features, open_source
from vit_jax.inference import exporting
from vit_jax.training import closed_form, train

pytestmark = pytest.mark.slow  # these tests train small models


def features_of(exp, params, split):
  """Returns features and labels of a split, in float64."""
  examples = evaluation.load_split(exp, split)
  backbone = exp.model.clone(num_classes=None)
  feature_ND = run_model(backbone, params, exp.normalize(examples.image_NHWC))
  return np.asarray(feature_ND, np.float64), examples.label_N


def ridge(train_ND, label_N, test_ND):
  mean_D, std_D = train_ND.mean(axis=0), train_ND.std(axis=0) + 1e-5
  prepare = lambda x: np.pad((x - mean_D) / std_D, ((0, 0), (0, 1)), constant_values=100.0)
  fitted = linear_model.Ridge(alpha=1024.0, fit_intercept=False, solver='svd')
  return fitted.fit(prepare(train_ND), 2 * np.eye(10)[label_N] - 1).predict(prepare(test_ND))


def knn(train_ND, label_N, test_ND):
  weights = lambda distance: np.exp((1 - distance) / 0.07)
  fitted = neighbors.KNeighborsClassifier(20, metric='cosine', algorithm='brute', weights=weights)
  return fitted.fit(train_ND, label_N).predict_proba(test_ND)


@pytest.mark.parametrize(
  'classifier, reference', [('ridge', ridge), pytest.param('knn', knn, marks=pytest.mark.slow)]
)
def test_fewshot_leaves_a_workdir_with_the_scores_of_scikit_learn(
  capsys, trained, tmp_path, classifier, reference
):
  out = tmp_path / 'few'
  command = ['--mode=fewshot', f'--workdir={trained[0]}', f'--classifier={classifier}']
  code, printed, _ = call(capsys, *command, f'--out={out}')
  assert (
    not code
    and f'({classifier}), which was computed from all training images, is in {out}/' in printed
  )

  exp, params, step = opening.from_workdir(out)
  train_ND, label_N = features_of(exp, params, 'train')
  test_ND, test_label_N = features_of(exp, params, 'test')
  wanted = reference(train_ND, label_N, test_ND)
  test = evaluation.load_split(exp, 'test')
  found = run_model(exp.model, params, exp.normalize(test.image_NHWC))
  found = np.asarray(jax.nn.softmax(found)) if classifier == 'knn' else found
  np.testing.assert_allclose(found, wanted, atol=1e-4)

  result = json.loads((out / 'result.json').read_text())
  accuracy = (wanted.argmax(axis=1) == test_label_N).mean()
  assert result['test_accuracy'] == pytest.approx(accuracy, abs=1 / 256) and step == 0
  assert result['config']['classifier'] == classifier and result['test_accuracy'] > 0.5
  again = vit_jax.evaluate(out)
  assert again['accuracy'] == result['test_accuracy'] and again['examples'] == 256
  rows = list(vit_jax.predict(out, [out / 'examples'], topk=1))
  assert len(rows) == 8 and all('predictions' in row for row in rows)

  before = {path: path.read_bytes() for path in out.rglob('*') if path.is_file()}
  assert call(capsys, *command, f'--out={out}')[1] == printed  # finished, so nothing is computed
  assert before == {path: path.read_bytes() for path in out.rglob('*') if path.is_file()}
  other = {'ridge': 'knn', 'knn': 'ridge'}[classifier]
  code, _, err = call(capsys, *command[:2], f'--classifier={other}', f'--out={out}')
  assert code == 2 and f"classifier: '{classifier}' in the workdir, '{other}' given" in err
  message = error(capsys, f'--workdir={out}', '--config.epochs=1')
  assert 'computes the head without training, so it cannot be combined with epochs=1.0' in message


@pytest.fixture(scope='module')
def nearest(trained, tmp_path_factory):
  """A workdir with a k-NN head."""
  out = tmp_path_factory.mktemp('nearest')
  config = closed_form.classifier_config(opening.Request(trained[0]), 'knn')
  train(config, out)
  return out


@pytest.mark.slow
def test_knn_head_is_exported_as_a_program_but_not_as_weights(nearest, tmp_path):
  exp, params, _ = opening.from_workdir(nearest)
  exporting.export(nearest, 'stablehlo', tmp_path / 'program')
  program = jax.export.deserialize((tmp_path / 'program' / 'model.stablehlo').read_bytes())
  test = evaluation.load_split(exp, 'test[:9]')
  wanted = run_model(exp.model, params, exp.normalize(test.image_NHWC))
  np.testing.assert_allclose(program.call(test.image_NHWC), wanted, atol=1e-3)
  assert 'no steps: the head was computed' in (tmp_path / 'program' / 'README.md').read_text()
  for format in ('npz', 'timm', 'hf'):
    with pytest.raises(ValueError, match=f'format {format}.* cannot hold a k-NN head'):
      exporting.export(nearest, format, tmp_path / format)


@pytest.mark.slow
def test_the_weights_of_a_knn_head_predict_as_its_workdir(nearest):
  exp, params, _ = opening.from_workdir(nearest)
  found, same = opening.from_init(str(nearest), {})
  image_BHWC = exp.normalize(evaluation.load_split(exp, 'test[:9]').image_NHWC)
  wanted = run_model(exp.model, params, image_BHWC)
  np.testing.assert_array_equal(run_model(found.model, same, image_BHWC), wanted)


@pytest.mark.slow
def test_onnx_holds_a_knn_head(nearest, tmp_path):
  pytest.importorskip('jax2onnx')
  exporting.export(nearest, 'onnx', tmp_path)  # compares the outputs with JAX's
  assert (tmp_path / 'model.onnx').exists()


@pytest.mark.slow
def test_training_from_a_knn_head_starts_with_a_new_linear_head(nearest, trained):
  source = open_source('synthetic', '', (8, 8))
  _, params, _ = inherit.open_init(small_config(init=str(nearest)), source)
  assert params['head'].keys() == {'kernel', 'bias'} and not params['head']['kernel'].any()
  exp, params = opening.from_init(str(nearest), {'data.source': 'synthetic'}, 'data')
  assert exp.model.examples is None and params['head'].keys() == {'kernel', 'bias'}
  model, params = vit_jax.load(nearest, num_classes=3)
  assert model.examples is None and params['head']['kernel'].shape == (16, 3)


@pytest.mark.slow
@pytest.mark.slow_after_first
@pytest.mark.parametrize('extra', [{'model.cosine': 'true'}, {'model.representation_size': '8'}])
def test_a_head_for_other_classes_and_layers_after_the_pool(extra, tmp_path):
  train(small_config(**extra), tmp_path / 'run')
  for i, colour in enumerate([(200, 20, 20), (20, 200, 20), (20, 20, 200)] * 10):
    file = tmp_path / 'colours' / 'rgb'[i % 3] / f'{i}.png'
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (8, 8), colour).save(file)
  other = {'data.source': f'folder:{tmp_path}/colours', 'data.train_split': 'train'}
  for name, overrides in (('other', other), ('same', {})):
    request = opening.Request(tmp_path / 'run', overrides=overrides)
    result = train(closed_form.classifier_config(request, 'ridge'), tmp_path / name)
    exp, params, _ = opening.from_workdir(tmp_path / name)
    backbone, test = exp.model.clone(num_classes=None), evaluation.load_split(exp, 'test')
    train_ND, label_N = features_of(exp, params, 'train')
    test_ND = run_model(backbone, params, exp.normalize(test.image_NHWC))
    if exp.model.cosine:
      train_ND, test_ND = map(preprocessing.normalize, (train_ND, test_ND))
    found = run_model(exp.model, params, exp.normalize(test.image_NHWC))
    classes = found.shape[1]
    wanted = ridge(train_ND, label_N, np.asarray(test_ND, np.float64))[:, :classes]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    accuracy = (wanted.argmax(axis=1) == test.label_N).mean()
    assert result['test_accuracy'] == pytest.approx(accuracy, abs=1 / 256) and accuracy > 0.3


def test_skipped_images_leave_padding_in_a_knn_head(monkeypatch):
  feature_ND = np.random.RandomState(0).normal(size=(7, 4)).astype(np.float32)
  found = Features(feature_ND, np.arange(7, dtype=np.int32) % 3)
  monkeypatch.setattr(closed_form, 'make_feature_step', lambda *_: None)
  monkeypatch.setattr(closed_form, 'replicate', lambda *_: None)
  monkeypatch.setattr(closed_form, 'compute_features', lambda *_: found)
  config = types.SimpleNamespace(classifier='knn', eval_batch_size=8)
  exp = opening.assemble(small_config(), opening.Task(('a', 'b', 'c'), (8, 8), 3))
  object.__setattr__(exp, 'config', config)
  training = types.SimpleNamespace(train=range(9), params={'head': None, 'norm': 1})
  monkeypatch.setattr(
    closed_form.dataclasses, 'replace', lambda x, **new: types.SimpleNamespace(**vars(x) | new)
  )
  exp, training = closed_form.with_head(exp, training, None, restored=False)
  head = training.params['head']
  assert exp.model.examples == 9 and head['feature'].shape == (9, 4)
  assert head['label'].tolist() == [0, 1, 2, 0, 1, 2, 0, -1, -1]


@pytest.mark.parametrize('overrides, message', [
  ({'classifier': 'knn', 'epochs': '0'}, 'knn does not train the backbone.*random weights'),
  ({'classifier': 'ridge', 'init': 'x'}, 'cannot be combined with epochs=1.0. Set epochs=0'),
  ({'classifier': 'ridge', 'epochs': '0', 'ema': '0.5'}, 'cannot be combined with ema=0.5'),
  ({'classifier': 'ridge', 'epochs': '0', 'distill.teacher': 'x'}, 'with distill.teacher=x.*init='),
  ({'classifier': 'knn', 'epochs': '1'}, 'This head cannot be trained further'),
  ({'classifier': 'tree', 'epochs': '0'}, "unknown 'tree'.*Valid: '' .empty., knn, ridge"),
])  # fmt: skip
def test_wrong_settings_are_rejected(overrides, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    train(small_config(**overrides), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_the_config_keeps_how_positions_are_resized(trained):
  request = opening.Request(
    init=str(trained[0]), overrides={'init_resize': 'bicubic', 'data.source': 'synthetic'}
  )
  config = closed_form.classifier_config(request, 'ridge')
  assert config.init_resize == 'bicubic'
  assert config.batch_size is None  # chosen so that it fits any number of devices


def test_class_weights_are_refused_because_a_computed_head_does_not_use_them():
  config = small_config(classifier='ridge', epochs='0', **{'loss.class_weights': 'balanced'})
  with pytest.raises(ValueError, match='cannot be combined with loss.class_weights=balanced'):
    check(config)
