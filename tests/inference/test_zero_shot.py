"""Tests zero-shot classification with text embeddings that transformers computed.

The fixtures `hf_clip` and `hf_siglip` hold whole models, and `classes.npz` for `--classes`.
"""

import csv
import importlib.util
import io
import json
import re

import numpy as np
from PIL import Image
import pytest
from safetensors.numpy import load_file, save_file
from scipy import special

from tests.conftest import DATA, call, error, run_model
from tests.inference.test_export import outputs
from tests.weights.test_towers import FAMILIES, features_of, photo_folder, stored  # noqa: F401
import vit_jax
from vit_jax import inherit, opening
from vit_jax.evaluation import evaluate_checkpoint
from vit_jax.inference import prediction
from vit_jax.opening import Request
from vit_jax.optim import TextClasses
from vit_jax.weights import reader, timm
from vit_jax.weights.formats import write_params
from vit_jax.weights.hf_towers import MEAN, STD

NAMES = ('cat', 'dog', 'a bird')


def classes_of(name, **changed):
  """Returns the arrays of the file for `--classes`, changed; None leaves out an array."""
  arrays = dict(np.load(DATA / name / 'classes.npz')) | changed
  return {key: value for key, value in arrays.items() if value is not None}


def write_classes(path, **arrays):
  np.savez(path, **arrays)
  return path


def probabilities(name, logits_BL):
  return special.expit(logits_BL) if name == 'hf_siglip' else special.softmax(logits_BL, axis=1)


@pytest.mark.slow_after_first
@pytest.mark.parametrize('name', FAMILIES)
def test_zero_shot_gives_the_logits_and_probabilities_of_transformers(name):
  loaded = vit_jax.load(DATA / name, features='pooled')
  loaded = inherit.with_classes(loaded, inherit.open_classes(DATA / name / 'classes.npz'))
  logits_BL = run_model(loaded.model, loaded.params, stored(name)['image'])
  np.testing.assert_allclose(logits_BL, stored(name)['logits'], atol=2e-5)
  assert loaded.class_names == NAMES
  assert loaded.calibration.sigmoid == (name == 'hf_siglip')


@pytest.fixture
def timm_clip(tmp_path):
  """Returns a folder with the fixture `hf_clip` as timm stores CLIP: the projection is a head."""
  model, params = vit_jax.load(DATA / 'hf_clip', features='pooled')
  params = dict(params)
  head = {'kernel': params.pop('projection')['kernel'], 'bias': np.zeros(12, np.float32)}
  sizes = dict(img_size=28, patch_size=7, embed_dim=24, depth=2, num_heads=3, mlp_ratio=32 / 24)
  about = dict(input_size=[3, 28, 28], mean=MEAN, std=STD, crop_pct=1.0, num_classes=12)
  config = dict(
    architecture='vit_base_patch32_clip_quickgelu_224',
    num_classes=12,
    model_args=sizes,
    pretrained_cfg=about,
  )
  table = timm.timm_table(timm.arguments('timm', config), model.pool, False, model.depth)
  folder = tmp_path / 'timm_clip'
  folder.mkdir()
  save_file(write_params(table, params | {'head': head}), folder / 'model.safetensors')
  (folder / 'config.json').write_text(json.dumps(config))
  return folder


def test_the_head_of_timms_clip_is_its_projection(timm_clip):
  image = stored('hf_clip')['image']
  loaded = vit_jax.load(timm_clip, features='pooled')
  np.testing.assert_allclose(
    run_model(*loaded, image), run_model(*vit_jax.load(DATA / 'hf_clip', features='pooled'), image)
  )
  loaded = inherit.with_classes(loaded, inherit.open_classes(DATA / 'hf_clip' / 'classes.npz'))
  logits_BL = run_model(loaded.model, loaded.params, image)
  np.testing.assert_allclose(logits_BL, stored('hf_clip')['logits'], atol=2e-5)


@pytest.mark.parametrize('name, tag, published, warns', [
  ('patch32_clip_224', 'openai', 12, True),
  ('patch32_clip_224', 'laion400m_e32', 12, True),
  ('patch16_clip_224', 'laion400m_e32', 12, False),
  ('patch32_clip_quickgelu_224', 'openai', 12, False),
  ('patch32_clip_224', 'openai', 512, False),  # fine-tuned on other classes
])  # fmt: skip
def test_a_clip_with_another_activation_is_reported(name, tag, published, warns, timm_clip, caplog):
  config = json.loads((timm_clip / 'config.json').read_text())
  config['architecture'] = f'vit_base_{name}'
  config['pretrained_cfg'] |= dict(tag=tag, num_classes=published)
  (timm_clip / 'config.json').write_text(json.dumps(config))
  reader.read_weights(str(timm_clip))
  assert ('were trained with QuickGELU' in caplog.text) == warns


def test_a_classifier_that_was_trained_from_timms_clip_keeps_its_head(timm_clip):
  arrays = load_file(timm_clip / 'model.safetensors')
  arrays['head.bias'][3] = 0.1
  save_file(arrays, timm_clip / 'model.safetensors')
  assert vit_jax.load(timm_clip).model.num_classes == 12


def test_timms_clip_does_not_classify_without_classes(timm_clip, capsys, tmp_path):
  init = f'--init={timm_clip}'
  Image.new('RGB', (8, 8)).save(tmp_path / 'a.png')
  modes = [('--mode=predict', f'--images={tmp_path}')]
  modes += [('--mode=eval', '--config.data.source=synthetic')]
  modes += [('--mode=serve',)] if importlib.util.find_spec('gradio') else []
  for argv in modes:
    text = error(capsys, *argv, init)
    assert 'has no head and therefore no classes' in text and 'with --classes' in text
  code, _, text = call(
    capsys, '--mode=export', init, '--format=stablehlo', f'--out={tmp_path / "out"}'
  )
  assert not code, text
  about = json.loads((tmp_path / 'out' / 'model.json').read_text())
  assert about['output'] == {'name': 'features', 'dtype': 'float32', 'shape': ['b', 12]}


WRONG = [
  (dict(names=None), r'Missing: names\. Unknown: none'),
  (dict(embeddings=None, texts=np.zeros(3)), r'Missing: embeddings\. Unknown: texts'),
  (dict(logit_bais=np.zeros(())), 'Unknown: logit_bais'),
  (dict(names=np.array(['cat', 'dog'])), 'names has 2 entries, but embeddings has 3 rows'),
  (dict(names=np.array(['cat', 'dog', 'cat'])), "occur twice: 'cat'"),
  (dict(names=np.array(['cat', 'dog', ' '])), 'names are empty or'),
  (dict(names=np.arange(3)), r'names: expected an array of texts.*int64 \[3\]'),
  (dict(names=np.array(b'cat')), 'names: expected an array of texts'),
  (dict(embeddings=np.zeros((3, 12, 1))), r'embeddings: expected .*float64 \[3, 12, 1\]'),
  (dict(embeddings=np.ones((3, 12), int)), 'embeddings: expected floating-point'),
  (dict(embeddings=np.full((3, 12), np.nan)), 'zero or not finite for: cat, dog, a bird'),
  (dict(embeddings=np.eye(3, 12)[[0, 1, 1]] * [[1], [1], [0]]), 'not finite for: a bird'),
  (dict(embeddings=np.ones((3, 9), 'f4')), 'have width 9, but the features .* have width 12'),
  (
    dict(logit_scale=np.array(4.6052)),
    'looks like the logarithm.*the factor itself: 100.003',
  ),
  (
    dict(logit_scale=np.array(-1.0)),
    r'logit_scale=-1: expected a number from 7 to 1000, .* multiplied\.$',
  ),
  (dict(logit_scale=np.array(2.7e43)), r'logit_scale=2.7e\+43'),
  (dict(logit_scale=np.array(np.inf)), 'logit_scale: expected one finite number, .* inf'),
  (dict(logit_scale=np.ones(3)), r'logit_scale: expected one finite number, got float64 \[3\]'),
  (dict(logit_bias=np.array(np.nan)), 'logit_bias: expected one finite number'),
  (dict(logit_bias=np.array('-12')), 'logit_bias: expected one finite number'),
]


@pytest.mark.parametrize('changed, message', WRONG)
def test_a_wrong_file_of_classes_is_refused(changed, message):
  loaded = vit_jax.load(DATA / 'hf_clip', features='pooled')
  with pytest.raises(ValueError, match=message) as raised:
    inherit.with_classes(loaded, TextClasses.read(classes_of('hf_clip', **changed), 'here.npz'))
  assert str(raised.value).startswith('here.npz: ')


def test_pickled_names_and_files_that_are_no_npz_are_refused(tmp_path):
  path = write_classes(tmp_path / 'a.npz', **classes_of('hf_clip', names=np.array(NAMES, object)))
  with pytest.raises(ValueError, match='a.npz: damaged, or not an .npz file of plain arrays'):
    inherit.open_classes(path)
  (tmp_path / 'b.npz').write_text('cat,dog')
  with pytest.raises(ValueError, match='b.npz: damaged, or not an .npz file'):
    inherit.open_classes(tmp_path / 'b.npz')
  with pytest.raises(ValueError, match='absent.npz: cannot be read'):
    inherit.open_classes(tmp_path / 'absent.npz')


def wanted(name, files):
  """Returns the logits of NAMES for image files, from features without a head."""
  x_BD, arrays = features_of(name, files, 'pooled'), classes_of(name)
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  logits_BL = arrays['logit_scale'] * unit(x_BD) @ unit(arrays['embeddings']).T
  return logits_BL + arrays.get('logit_bias', 0)


@pytest.mark.slow_after_first
@pytest.mark.parametrize('name', FAMILIES)
def test_predict_prints_zero_shot_probabilities(name, photos, capsys):
  init, classes = f'--init={DATA / name}', f'--classes={DATA / name / "classes.npz"}'
  files = sorted(photos.glob('test/*/*.png'))
  code, out, _ = call(
    capsys, '--mode=predict', init, classes, f'--images={photos / "test"}', '--format=csv'
  )
  assert not code
  want_BL = probabilities(name, wanted(name, files))
  found = {
    (row['file'], row['class']): row['probability'] for row in csv.DictReader(io.StringIO(out))
  }
  assert len(found) == len(files) * 3  # no class is left out by a threshold
  for file, want_L in zip(files, want_BL):
    for label, want in zip(NAMES, want_L):
      assert float(found[str(file), label]) == pytest.approx(want, abs=2e-5)
  rows = prediction.predict(None, files[:1], 1, init=str(DATA / name), classes=classes[10:])
  assert next(rows)['predictions'][0]['class'] == NAMES[want_BL[0].argmax()]


@pytest.mark.slow_after_first
@pytest.mark.parametrize('name, patch', [('hf_clip', 7), ('hf_siglip', 14)])
def test_images_of_any_shape_have_the_probabilities_of_each_image_alone(name, patch, tmp_path):
  """With the patch size of the weights, and with a larger one."""
  draw, classes = np.random.RandomState(0), DATA / name / 'classes.npz'
  for h, w in (
    (2, 4),
    (4, 2),
    (1, 8),
  ):  # grids of exactly `max_patches`, so that nothing is resized
    pixels = draw.randint(0, 256, (h * patch, w * patch, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / f'{h}x{w}.png')
  loaded = vit_jax.load(DATA / name, patch_size=patch, features='pooled')
  loaded = inherit.with_classes(loaded, inherit.open_classes(classes))
  model, p = loaded.model.clone(position_grid=(28 // patch, 28 // patch)), loaded.preprocessing
  rows = vit_jax.predict(
    None, [tmp_path], 3, init=str(DATA / name), overrides={'model.patch_size': str(patch)},
    classes=classes, max_patches=8,
  )  # fmt: skip
  for row in rows:
    image = ((np.asarray(Image.open(row['file'])) / 255 - p.mean) / p.std).astype(np.float32)
    want = probabilities(name, run_model(model, loaded.params, image[None]))[0]
    found = {guess['class']: guess['probability'] for guess in row['predictions']}
    assert found == pytest.approx(dict(zip(NAMES, want)), abs=2e-5)


@pytest.mark.slow_after_first
@pytest.mark.parametrize('name', FAMILIES)
def test_eval_matches_class_folders_with_names(name, photos, capsys):
  source = f'folder:{photos}'
  request = Request(
    None, str(DATA / name), overrides={'data.source': source},
    zero_shot=DATA / name / 'classes.npz',
  )  # fmt: skip
  result = evaluate_checkpoint(request)
  files = [file for label in ('a bird', 'cat') for file in sorted(photos.glob(f'test/{label}/*'))]
  logits_BL = wanted(name, files)[:, [2, 0]]  # the order of the folders
  label_B = np.repeat([0, 1], 3)
  assert result['accuracy'] == np.mean(logits_BL.argmax(axis=1) == label_B)
  assert [*result['per_class']] == ['a bird', 'cat']
  want = probabilities(name, logits_BL).max(axis=1)
  bins = [row for row in result['reliability'] if row['examples']]
  mean = sum(row['examples'] * row['confidence'] for row in bins) / 6
  assert mean == pytest.approx(want.mean(), abs=1e-5)
  missing = classes_of(name, names=np.array(['bird', 'cat', 'dog']))
  path = write_classes(photos / 'missing.npz', **missing)
  code, _, text = call(
    capsys, '--mode=eval', f'--init={DATA / name}', f'--classes={path}',
    f'--config.data.source={source}',
  )  # fmt: skip
  assert code == 2
  assert 'no embeddings for 1 of the 2 classes' in text and 'a bird' in text


@pytest.mark.slow
@pytest.mark.slow_after_first
@pytest.mark.parametrize('name', FAMILIES)
def test_the_card_of_a_lower_precision_has_the_zero_shot_accuracy(name, photos, capsys, tmp_path):
  """The folders have two of the three classes in the file, in another order."""
  argv = (
    '--mode=export', f'--init={DATA / name}', '--format=stablehlo', '--precision=bfloat16',
    f'--out={tmp_path / "out"}',
  )  # fmt: skip
  classes = f'--classes={DATA / name / "classes.npz"}'
  code, _, text = call(capsys, *argv, classes, f'--config.data.source=folder:{photos}')
  assert not code, text
  files = [file for label in ('a bird', 'cat') for file in sorted(photos.glob(f'test/{label}/*'))]
  right = wanted(name, files)[:, [2, 0]].argmax(axis=1) == np.repeat([0, 1], 3)
  text = (tmp_path / 'out' / 'README.md').read_text()
  assert f'{np.mean(right):.2%}' in text
  assert 'accuracy on the 6 images of `test` (2 of the 3 classes)' in text
  about = json.loads((tmp_path / 'out' / 'model.json').read_text())
  assert about['class_names'] == [*NAMES]  # the program keeps all classes

  missing = classes_of(name, names=np.array(['bird', 'cat', 'dog']))
  classes = f'--classes={write_classes(tmp_path / "missing.npz", **missing)}'
  code, _, text = call(capsys, *argv, classes, f'--config.data.source=folder:{photos}')
  assert not code and 'The accuracy of this export is not measured' in text


def test_images_with_several_labels_need_a_bias():
  classes = TextClasses.read(classes_of('hf_clip'), 'classes.npz')
  with pytest.raises(ValueError, match='several labels. Without logit_bias'):
    classes.matching(NAMES, 'labels:a.csv', multi_label=True)
  siglip = TextClasses.read(classes_of('hf_siglip'), 'classes.npz')
  found = siglip.matching(('dog', 'cat'), 'labels:a.csv', multi_label=True)
  assert np.array_equal(found.embedding_LD, siglip.embedding_LD[[1, 0]])


def test_classes_that_no_model_can_use_are_refused_on_the_command_line(trained, capsys, tmp_path):
  classes = f'--classes={DATA / "hf_clip" / "classes.npz"}'
  images = f'--images={tmp_path}'
  Image.new('RGB', (8, 8)).save(tmp_path / 'a.png')
  for argv, message in (
    ((f'--workdir={trained[0]}', classes), 'The model of a workdir has no text encoder'),
    ((f'--init={DATA / "hf_clip"}',), 'give the text embeddings of classes with --classes'),
    ((f'--init={DATA / "hf_clip"}', classes, '--features=pooled'), '--features cannot be combined'),
  ):
    text = error(capsys, '--mode=predict', *argv, images)
    assert re.search(message, text), text
  for init, message in (
    (trained[0], 'error: .*classes.npz: .* but these weights have a head for 10 classes'),
    (DATA / 'hf_siglip', 'error: .* width 12, but the features .* width 24'),
  ):
    code, _, text = call(capsys, '--mode=predict', f'--init={init}', classes, images)
    assert code == 2 and re.search(message, text), text
  text = error(capsys, '--mode=visualize', f'--init={DATA / "hf_clip"}', classes)
  assert '--classes is for eval, predict, export, serve' in text


@pytest.mark.slow
@pytest.mark.parametrize('format', ['stablehlo', 'onnx'])
@pytest.mark.parametrize('name', FAMILIES)
def test_zero_shot_programs_give_the_logits_of_transformers(name, format, tmp_path, capsys):
  if format == 'onnx':
    pytest.importorskip('jax2onnx', reason='needs requirements-onnx.txt')
  code, _, _ = call(
    capsys, '--mode=export', f'--init={DATA / name}', f'--format={format}', f'--out={tmp_path}',
    f'--classes={DATA / name / "classes.npz"}',
  )  # fmt: skip
  assert not code
  about = json.loads((tmp_path / 'model.json').read_text())
  assert about['class_names'] == [*NAMES]
  assert about['output'].get('probabilities') == ('sigmoid' if name == 'hf_siglip' else None)
  assert ('the sigmoid of each logit' in (tmp_path / 'README.md').read_text()) == (
    name == 'hf_siglip'
  )
  pixels = np.random.RandomState(0).randint(0, 256, (2, 28, 28, 3), np.uint8)
  request = Request(None, str(DATA / name), zero_shot=DATA / name / 'classes.npz')
  exp, params, _ = opening.open_model(request)
  want = exp.logits(params, {'image': pixels})
  np.testing.assert_allclose(outputs(format, tmp_path, pixels), want, atol=1e-4)


@pytest.mark.slow
def test_the_page_shows_zero_shot_probabilities(photos):
  pytest.importorskip('gradio', reason='needs requirements-demo.txt')
  from vit_jax.inference.page import Viewer

  file = sorted(photos.glob('test/*/*.png'))[0]
  request = Request(None, str(DATA / 'hf_siglip'), zero_shot=DATA / 'hf_siglip' / 'classes.npz')
  exp, params, _ = opening.open_model(request)
  viewer = Viewer(exp, params)
  found = viewer.guesses(viewer.open(file.read_bytes()))
  want = probabilities('hf_siglip', wanted('hf_siglip', [file]))[0]
  assert found == pytest.approx(dict(zip(NAMES, want)), abs=2e-5)
