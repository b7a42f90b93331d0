"""Tests training from published weights, and predicting with and exporting published weights."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest

from tests.conftest import DATA, call, error, init_params, run_model, small_config
from tests.weights.test_pretrained import equal
import vit_jax
from vit_jax import config as config_lib
from vit_jax import inherit, opening
from vit_jax.data.source import Source
from vit_jax.figures import maps
from vit_jax.inference import exporting, prediction
from vit_jax.model import RESIZES, make
from vit_jax.opening import Request
from vit_jax.training import trainer
from vit_jax.weights import reader
from vit_jax.workdir import Calibration

PROCESSOR = {'image_mean': [0.2, 0.4, 0.6], 'image_std': [0.3, 0.2, 0.1], 'resample': 2}


@pytest.fixture
def weights(tmp_path):
  """A Hugging Face folder with exact GELU, epsilon 1e-12, and a mean and std per channel."""
  folder = tmp_path / 'published'
  shutil.copytree(DATA / 'hf_classifier', folder)
  folder.chmod(0o755)
  (folder / 'preprocessor_config.json').write_text(json.dumps(PROCESSOR))
  return folder


def fine_tuning(init, overrides):
  """Returns a config of 8 steps on synthetic images; the weights decide the model."""
  config = config_lib.default_config()
  settings = {
      'init': str(init), 'data.source': 'synthetic', 'data.image_size': '16', 'epochs': '1',
      'batch_size': '128', 'eval_every': '0', 'checkpoint_every': '0', 'optimizer.name': 'sgd',
      'optimizer.weight_decay': '0', 'optimizer.lr': '0.01',
  }  # fmt: skip
  for key, text in (settings | overrides).items():
    config_lib.override(config, key, text)
  return config


def test_a_run_takes_model_and_preprocessing_from_the_weights(weights, tmp_path):
  config = fine_tuning(weights, {'optimizer.lr': '0', 'model.activation': 'None'})
  result = vit_jax.train(config, tmp_path / 'run')
  model = result['config']['model']
  assert (model['activation'], model['norm_epsilon']) == ('gelu', 1e-12)
  assert (model['width'], model['depth'], model['num_heads']) == (32, 2, 2)
  assert result['config']['data']['mean'] == PROCESSOR['image_mean']
  assert result['config']['data']['std'] == PROCESSOR['image_std']
  own, ours = vit_jax.load(weights), vit_jax.load(tmp_path / 'run')
  head = ours.params.pop('head')
  assert not np.any(head['kernel']) and head['kernel'].shape == (32, len(ours.class_names))
  assert equal(ours.params, {name: x for name, x in own.params.items() if name != 'head'})
  assert ours.preprocessing.mean == own.preprocessing.mean


@pytest.mark.slow
def test_resume_does_not_need_the_initial_weights(weights, tmp_path):
  whole = vit_jax.train(fine_tuning(weights, {'epochs': '2'}), tmp_path / 'whole')
  config = fine_tuning(weights, {'epochs': '2', 'checkpoint_every': '9'})
  vit_jax.train(config, tmp_path / 'cut')
  (tmp_path / 'cut' / 'result.json').unlink()
  shutil.rmtree(tmp_path / 'cut' / 'checkpoints' / str(whole['steps']))
  shutil.rmtree(weights)
  again = vit_jax.train(config, tmp_path / 'cut')
  assert again['test_loss'] == whole['test_loss']
  assert equal(*(vit_jax.load(tmp_path / name).params for name in ('whole', 'cut')))


@pytest.mark.slow
def test_fine_tuning_learns_and_a_run_can_start_from_another_run(weights, tmp_path):
  first = vit_jax.train(fine_tuning(weights, {'epochs': '4'}), tmp_path / 'first')
  assert first['test_accuracy'] > 0.5
  second = fine_tuning(tmp_path / 'first', {'epochs': '0'})
  assert vit_jax.train(second, tmp_path / 'second')['test_loss'] == first['test_loss']


@pytest.mark.parametrize('overrides, message', [
    ({'model.variant': 'B/16'}, r"model.patch_size: \(16, 16\) in the config, \(4, 4\) in the"),
    ({'model.activation': 'gelu_tanh'}, "activation: 'gelu_tanh' in the config, 'gelu' in the"),
    ({'model.pool': 'gap'}, "model.pool: 'gap' in the config, 'cls'"),
    ({'model.layer_scale': '0.1'}, 'model.layer_scale: 0.1 in the config, None in the weights'),
    ({'data.mean': '0.5'}, r'data.mean: \(0.5,\) in the config, \(0.2, 0.4, 0.6\) in the weights'),
    ({'data.image_size': '18'}, 'does not divide into the patches'),
    ({'init': 'absent.npz'}, 'absent.npz: no such file'),
    ({'init_resize': 'nearest'}, "init_resize: unknown 'nearest'"),
    ({'data.source': 'digits', 'data.image_size': '8'}, 'expects images with 3 channel'),
])  # fmt: skip
def test_a_config_that_contradicts_the_weights_is_refused(weights, overrides, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    vit_jax.train(fine_tuning(weights, overrides), tmp_path / 'run')
  assert not (tmp_path / 'run' / 'checkpoints').exists()


def test_dropout_and_dtype_may_differ_from_the_init_run(trained):
  others = {'dropout': '0.1', 'attention_dropout': '0.3', 'stochastic_depth': '0.4'}
  others |= {'dtype': 'bfloat16', 'remat': 'full'}  # the run has 0, 0, 0.2, float32 and none
  config = small_config(init=str(trained[0]), **{f'model.{k}': v for k, v in others.items()})
  source = Source({}, tuple(f'pattern {i}' for i in range(10)), 3, None)
  model = inherit.open_init(config, source)[0].model
  assert {key: str(model[key]) for key in others} == others


def test_a_config_may_give_the_head_width_and_another_first_scale():
  """The scale of a layer is trained, so the value in the config is only its first value."""
  path, source = DATA / 'timm_avg_registers_qknorm_layerscale', Source({}, ('cat', 'dog'), 3, None)
  given = {'data.image_size': '16,24', 'model.head_dim': '16', 'model.layer_scale': '0.5'}
  model = inherit.open_init(fine_tuning(path, given), source)[0].model
  assert (model.head_dim, model.layer_scale, model.num_heads, model.width) == (16, 0.5, 2, 32)
  with pytest.raises(ValueError, match='model.head_dim: 8 in the config'):
    inherit.open_init(fine_tuning(path, given | {'model.head_dim': '8'}), source)


def test_one_mean_for_all_channels_agrees_with_three_equal_ones(weights):
  grey = {'image_mean': [0.4] * 3, 'image_std': [0.2] * 3}
  (weights / 'preprocessor_config.json').write_text(json.dumps(PROCESSOR | grey))
  config = fine_tuning(weights, {'data.mean': '0.4', 'data.std': '0.2'})
  data = inherit.open_init(config, Source({}, ('cat', 'dog'), 3, None))[0].data
  assert (data.mean, data.std) == ((0.4,), (0.2,))


def test_an_open_image_size_follows_the_positions_of_an_npz_file():
  path = DATA / 'paper_token' / 'weights.npz'
  wanted = reader.read_weights(path)
  assert wanted.preprocessing.size == (0, 0)  # the file does not name a size
  config = fine_tuning(path, {'data.image_size': 'None'})
  config = inherit.open_init(config, Source({}, ('cat', 'dog'), 3, None))[0]
  model, params = vit_jax.load(path)
  patches = params['pos_embedding'].shape[1] - 1
  side = round(patches**0.5) * model.patch_size[0]
  assert config.data.image_size == (side, side)


def test_positions_are_resized_to_the_image_size(weights):
  _, training = opening.from_config(fine_tuning(weights, {'data.image_size': '8,24'}))
  want = vit_jax.load(weights, grid=(2, 6)).params['pos_embedding']
  assert np.array_equal(training.params['pos_embedding'], want)


def write_image(path, size=(16, 16)):
  """Writes a PNG of noise; returns its pixels in [0, 1]."""
  pixels = np.random.RandomState(0).randint(0, 256, (*size, 3), np.uint8)
  Image.fromarray(pixels).save(path)
  return pixels / 255


@pytest.mark.slow
def test_predict_uses_published_weights_with_their_preprocessing(capsys, weights, tmp_path):
  pixels = write_image(tmp_path / 'a.png')
  flags = ['--mode=predict', f'--init={weights}', f'--images={tmp_path}/a.png', '--format=json']
  code, out, _ = call(capsys, *flags)
  model, params = vit_jax.load(weights)
  normal = (pixels - PROCESSOR['image_mean']) / PROCESSOR['image_std']
  want_L = jax.nn.softmax(run_model(model, params, normal[None].astype(np.float32))[0])
  found = {p['class']: p['probability'] for p in json.loads(out)['predictions']}
  assert not code and list(found) == [f'class {i}' for i in np.argsort(-want_L)]
  np.testing.assert_allclose([found[f'class {i}'] for i in range(4)], want_L, atol=1e-6)

  pixels = write_image(tmp_path / 'a.png', (24, 24))  # a larger image, with resized positions
  code, out, _ = call(capsys, *flags, '--config.data.image_size=24', '--topk=1')
  model, params = vit_jax.load(weights, grid=(6, 6))
  normal = (pixels - PROCESSOR['image_mean']) / PROCESSOR['image_std']
  want_L = jax.nn.softmax(run_model(model, params, normal[None].astype(np.float32))[0])
  (best,) = json.loads(out)['predictions']
  assert best['class'] == f'class {want_L.argmax()}'
  np.testing.assert_allclose(best['probability'], want_L.max(), atol=1e-6)

  pixels = write_image(tmp_path / 'a.png', (30, 40))  # resized as the weights require
  _, out, _ = call(capsys, *flags)
  resized = Image.fromarray(np.uint8(pixels * 255 + 0.5)).resize((16, 16), Image.BILINEAR)
  normal = (np.asarray(resized) / 255 - PROCESSOR['image_mean']) / PROCESSOR['image_std']
  model, params = vit_jax.load(weights)
  want_L = jax.nn.softmax(run_model(model, params, normal[None].astype(np.float32))[0])
  best = json.loads(out)['predictions'][0]
  np.testing.assert_allclose(best['probability'], want_L.max(), atol=1e-6)
  for flag in ('data.crop=0.5', 'data.stretch=false', 'data.interpolation=nearest'):
    _, other, _ = call(capsys, *flags, f'--config.{flag}')
    assert json.loads(other)['predictions'][0]['probability'] != best['probability']


@pytest.mark.slow
def test_the_way_files_are_resized_is_saved_with_the_weights(weights, tmp_path):
  geometry = {'data.interpolation': 'nearest', 'data.crop': '0.8', 'data.stretch': 'true'}
  vit_jax.train(fine_tuning(weights, {'epochs': '0'} | geometry), tmp_path / 'run')
  p = vit_jax.load(tmp_path / 'run').preprocessing
  assert (p.interpolation, p.crop, p.stretch) == ('nearest', 0.8, True)
  assert (p.mean, p.std) == tuple(tuple(PROCESSOR[key]) for key in ('image_mean', 'image_std'))
  exporting.export(tmp_path / 'run', 'hf', tmp_path / 'out')
  again = vit_jax.load(tmp_path / 'out')
  assert again.preprocessing == p and again.class_names[0] == 'pattern 0'


def test_the_head_is_kept_only_for_the_same_classes_in_the_same_order(trained):
  config, own = small_config(init=str(trained[0])), tuple(f'pattern {i}' for i in range(10))
  for classes in (own, own[::-1]):  # the second has the same number of classes in another order
    _, params, _ = inherit.open_init(config, Source({}, classes, 3, None))
    assert np.any(params['head']['kernel']) == (classes == own)


def test_the_head_of_an_imagenet_classifier_is_kept_for_wordnet_ids(monkeypatch, trained, caplog):
  ids = tuple(f'n{1440764 + i:08d}' for i in range(10))
  found = inherit.read_weights(str(trained[0]))
  found = dataclasses.replace(found, class_names=('tench, 0', *(f'word, {i}' for i in range(9))))
  monkeypatch.setattr(inherit, 'read_weights', lambda path: found)
  config = small_config(**{'init': str(trained[0]), 'distill.teacher': str(trained[0])})
  source = Source({}, ids, 3, None)
  assert np.any(inherit.open_init(config, source)[1]['head']['kernel'])
  assert inherit.open_teacher(config, source)[0] is not None
  assert caplog.text.count(' and 5 more, and the data has the classes n01440764, ') == 2


@pytest.mark.slow
def test_a_new_head_drops_the_pre_logits_for_any_number_of_classes(tmp_path, monkeypatch):
  """In the paper, both layers are the head, and fine-tuning removes all of it (Section 3.2)."""
  vit_jax.train(small_config(**{'epochs': '0', 'model.representation_size': '12'}), tmp_path)
  own = tuple(f'pattern {i}' for i in range(10))
  for classes, size in ((own, 12), (tuple('abcdefghij'), None), (('a', 'b'), None)):
    source = Source({}, classes, 3, None)
    config = small_config(init=str(tmp_path), **{'model.variant': 'None'})
    filled, params, _ = inherit.open_init(config, source)
    monkeypatch.setattr(opening, 'open_source', lambda *_, source=source: source)
    exp, fewshot_params = opening.from_init(str(tmp_path), {}, 'data')
    assert filled.model.representation_size == exp.model.representation_size == size
    for found in (params, fewshot_params):
      assert ('pre_logits' in found) == (size is not None)
      assert found['head']['kernel'].shape == (size or 16, len(classes))


@pytest.mark.slow
def test_init_resize_applies_with_and_without_training(weights):
  source, seen = Source({}, ('a', 'b'), 3, None), set()
  for method in RESIZES:
    settings = {'init_resize': method, 'data.image_size': '24'}
    want = vit_jax.load(weights, grid=(6, 6), resize=method).params['pos_embedding']
    _, trained_params, _ = inherit.open_init(fine_tuning(weights, settings), source)
    _, used_params = opening.from_init(str(weights), settings)
    np.testing.assert_array_equal(trained_params['pos_embedding'], want)
    np.testing.assert_array_equal(used_params['pos_embedding'], want)
    seen.add(want.tobytes())
  assert len(seen) == len(RESIZES)


@pytest.mark.slow
def test_fewshot_measures_published_weights(capsys, weights):
  flags = ['--mode=fewshot', f'--init={weights}', '--config.data.source=synthetic']
  code, out, _ = call(capsys, *flags)
  assert not code and [line.split()[0] for line in out.splitlines()] == ['1', '5', '10', '25']
  assert float(out.splitlines()[-1].split()[2].rstrip('%')) > 50  # of 10 classes
  code, _, err = call(capsys, *flags[:2], '--config.data.source=digits')
  assert code == 2 and 'error: The model takes images with 3 channels' in err
  code, out, err = call(capsys, *flags, '--config.data.train_split=train[:10%]')
  assert code is None
  assert 'more than 10 shots: class ' in err and 'has only 10 training image(s)' in err
  assert [line.split()[0] for line in out.splitlines()] == ['1', '5', '10']


@pytest.mark.slow_after_first
@pytest.mark.parametrize('form', ['hf', 'timm', 'npz'])
def test_export_writes_weights_that_load_again(capsys, form, trained, tmp_path):
  init = DATA / 'timm_token' if form == 'hf' else DATA / 'paper_token' / 'weights.npz'
  flags = ['--mode=export', f'--format={form}', f'--out={tmp_path}/out']
  code, out, _ = call(capsys, *flags, f'--init={init}')
  assert not code and sorted(out.split()) == sorted(map(str, (tmp_path / 'out').iterdir()))
  assert equal(vit_jax.load(tmp_path / 'out').params, vit_jax.load(init).params)
  workdir, _ = trained
  if form == 'hf':  # this run averages the patches, which Hugging Face's ViT cannot do
    assert 'cannot hold this model' in error(capsys, *flags, f'--workdir={workdir}')
    return
  code, _, _ = call(capsys, *flags, f'--workdir={workdir}')
  again, own = vit_jax.load(tmp_path / 'out'), vit_jax.load(workdir)
  assert not code and equal(again.params, own.params)
  assert again.class_names == (own.class_names if form == 'timm' else None)


WRITE = ['--format=hf', '--out=out']


@pytest.mark.slow_after_first
@pytest.mark.parametrize('name', ['paper_token', 'paper_prelogits', 'hf_backbone'])
def test_token_features_are_the_input_of_the_pooling(tmp_path, name):
  file = tmp_path / 'a.png'
  Image.fromarray(np.random.RandomState(0).randint(0, 256, (40, 40, 3), np.uint8)).save(file)
  init = DATA / name if name.startswith('hf') else DATA / name / 'weights.npz'
  take = lambda kind: prediction.features(Request(init=str(init)), [str(file)], kind)[0]['feature']
  tokens_BND, pooled_BD = take('tokens'), take('pooled')
  exp, params, _ = opening.open_model(Request(init=str(init)), 'any')
  patches = np.prod(maps.grid_of(exp.model, np.zeros((1, *exp.image_shape))))
  assert tokens_BND.shape == (1, exp.model.num_prefix + patches, exp.model.width)
  want_BD = tokens_BND[:, 0]
  if exp.model.representation_size:
    layer = params['pre_logits']
    want_BD = np.tanh(want_BD @ layer['kernel'] + layer['bias'])
  np.testing.assert_allclose(pooled_BD, want_BD, atol=1e-5)


@pytest.mark.parametrize('argv, message', [
    (['--mode=profile', '--init=w'], '--init is for eval, fewshot, predict, visualize, export'),
    (['--mode=train', '--init=w'], 'use --config.init'),
    (['--mode=predict', '--init=w', '--images=a.png', '--workdir=run'], '--init cannot be'),
    (['--mode=predict', '--init=absent.npz', '--images=.'], 'no such file or folder'),
    (['--mode=predict', f'--init={DATA}/hf_backbone', '--images=.'], 'has no head'),
    (['--mode=predict', '--init=w', '--images=.', '--config.model.width=8'], 'model.width: 8 in'),
    (['--mode=predict', '--init=w', '--images=.', '--config.data.crop=9'], 'data.crop must be'),
    (['--mode=predict', '--init=w', '--images=.', '--config.data.image_size=18'], 'patches'),
    (['--mode=export', '--init=w', '--out=out'], 'needs --format'),
    (['--mode=export', '--init=w', '--format=hf'], 'and --out'),
    (['--mode=export', '--init=w', '--format=onx', '--out=out'], "format: unknown 'onx'"),
    (['--mode=export', '--init=w', '--format=hf', '--out=a.png'], 'is a file'),
    (['--mode=export', '--init=w', '--workdir=run', *WRITE], '--init cannot be combined with'),
    (['--mode=export', '--workdir=nowhere', *WRITE], 'no such file or folder'),
    (['--mode=export', '--init=w', *WRITE, '--config.seed=1'], "config key: unknown 'seed'"),
])  # fmt: skip
def test_wrong_flags_are_refused_and_write_nothing(
  capsys, argv, message, weights, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  write_image(tmp_path / 'a.png')
  weights.rename('w')
  assert message in error(capsys, *argv)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['a.png', 'w']


@pytest.mark.slow
def test_frozen_training_and_fine_tuning_start_with_the_same_loss(weights, tmp_path):
  config = fine_tuning(weights, {'epochs': '0', 'freeze': 'backbone'})
  frozen = trainer.train(config, tmp_path / 'frozen')
  tuned = trainer.train(fine_tuning(weights, {'epochs': '0'}), tmp_path / 'tuned')
  assert frozen['test_loss'] == pytest.approx(tuned['test_loss'], rel=1e-6)


HUB = """
import sys, vit_jax
try:
  print(sum(x.size for x in vit_jax.load(sys.argv[1]).params['head'].values()))
except ValueError as error:
  print('error:', error)
"""


def test_the_processor_of_a_repository_is_downloaded(monkeypatch, tmp_path):
  whole = shutil.copytree(DATA / 'hf_clip', tmp_path / 'whole')
  processor = {'image_mean': [0.1] * 3, 'image_std': [0.2] * 3}
  (whole / 'processor_config.json').write_text(json.dumps({'image_processor': processor}))

  def download(name, allow_patterns):
    part = tmp_path / name.replace('/', '_')
    part.mkdir()
    for file in whole.iterdir():
      if any(file.match(pattern) for pattern in allow_patterns):
        shutil.copy(file, part)
    return str(part)

  monkeypatch.setattr('huggingface_hub.snapshot_download', download)
  assert reader.read_weights('someone/clip').preprocessing.mean == (0.1,) * 3


def test_the_reason_of_a_failed_download_is_given(monkeypatch):
  def download(name, allow_patterns):
    raise OSError('401 Client Error. (Request ID: 1)\n\nCannot access gated repo.\nPlease log in.')

  monkeypatch.setattr('huggingface_hub.snapshot_download', download)
  message = r'could not be downloaded: 401 .* Cannot access gated repo. Please log in.$'
  with pytest.raises(ValueError, match=message):
    reader.read_weights('someone/clip')


@pytest.mark.slow
def test_hub_names_load_from_the_cache_without_a_network(tmp_path):
  commit = 'f' * 40
  repository = tmp_path / 'hub' / 'models--someone--some-vit'
  (repository / 'refs').mkdir(parents=True)
  (repository / 'refs' / 'main').write_text(commit)
  shutil.copytree(DATA / 'hf_classifier', repository / 'snapshots' / commit)
  environment = {'HF_HOME': str(tmp_path), 'HF_HUB_OFFLINE': '1', 'JAX_PLATFORMS': 'cpu'}

  def load(name):
    command = [sys.executable, '-c', HUB, name]
    run = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()

  assert load('someone/some-vit') == str(32 * 4 + 4)
  message = load('someone/another-vit')
  want = 'error: someone/another-vit: no such file or folder, and the Hugging Face Hub repository'
  assert message.startswith(want)


@pytest.mark.slow
@pytest.mark.slow_after_first
@pytest.mark.parametrize('position', ['sincos', 'rope'])
def test_positions_without_parameters_are_stretched_as_in_the_workdir(position, tmp_path):
  """`--init` and `--workdir` see the same model at another size, and a new run keeps it."""
  trainer.train(small_config(**{'model.position': position}), tmp_path / 'run')
  exp, params, _ = opening.from_workdir(tmp_path / 'run', {'data.image_size': '16'})
  image_BHWC = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
  wanted = run_model(exp.model, params, image_BHWC)
  init = str(tmp_path / 'run')
  found, params = opening.from_init(init, {'data.image_size': '16'})
  np.testing.assert_array_equal(run_model(found.model, params, image_BHWC), wanted)
  model, params = vit_jax.load(init, grid=(4, 4))
  np.testing.assert_array_equal(run_model(model, params, image_BHWC), wanted)

  settings = {'data.image_size': '16', 'optimizer.lr': '0', 'model.activation': 'None'}
  vit_jax.train(fine_tuning(init, settings), tmp_path / 'tuned')
  exp, params, _ = opening.from_workdir(tmp_path / 'tuned')
  np.testing.assert_array_equal(run_model(exp.model, params, image_BHWC), wanted)
  again = vit_jax.load(tmp_path / 'tuned')
  np.testing.assert_array_equal(run_model(*again, image_BHWC), wanted)


def test_none_leaves_the_data_keys_of_weights_and_runs_as_they_are(trained):
  open_keys = {'data.image_size': 'None', 'data.train_split': 'None'}
  exp, *_ = opening.from_workdir(trained[0], open_keys)
  assert exp.image_shape == (8, 8, 3) and exp.config.data.train_split == 'train'
  exp, _ = opening.from_init(str(trained[0]), open_keys)
  assert exp.image_shape == (8, 8, 3) and exp.config.data.train_split == 'train'


def test_several_labels_survive_in_hugging_face_files(tmp_path):
  fields = dict(variant=None, patch_size=4, width=16, depth=1, num_heads=2, mlp_dim=32)
  model = make(num_classes=3, **fields)
  params = init_params(model, np.zeros((1, 8, 8, 3), np.float32))
  for several in (False, True):
    calibration = Calibration(thresholds=(0.2, 0.5, 0.7)) if several else None
    out = tmp_path / str(several)
    vit_jax.save(model, params, out, format='hf', calibration=calibration)
    problem = json.loads((out / 'config.json').read_text()).get('problem_type')
    assert problem == ('multi_label_classification' if several else None)
    assert vit_jax.load(out).multi_label == several
    assert opening.from_init(str(out), {})[0].task.multi_label == several
  loaded = vit_jax.load(tmp_path / 'True')  # these files have no thresholds
  assert loaded.calibration == Calibration(thresholds=(0.5, 0.5, 0.5))
  vit_jax.save(*loaded, tmp_path / 'again', format='hf', calibration=loaded.calibration)
  assert vit_jax.load(tmp_path / 'again').multi_label
  assert vit_jax.load(tmp_path / 'again', num_classes=5).calibration.thresholds == (0.5,) * 5
  assert Calibration(thresholds=(0.2,) * 3, examples=9).with_thresholds(2).thresholds == (0.5, 0.5)


def test_a_program_takes_images_of_the_size_that_predict_uses(weights, tmp_path):
  """The positions are for 16 pixels, and the processor asks for 8, as in DINOv2's files."""
  processor = PROCESSOR | {'size': {'height': 8, 'width': 8}}
  (weights / 'preprocessor_config.json').write_text(json.dumps(processor))
  assert opening.from_init(str(weights), {})[0].image_shape[:2] == (8, 8)
  exporting.export(weights, 'stablehlo', tmp_path / 'out')
  about = json.loads((tmp_path / 'out' / 'model.json').read_text())
  assert about['input']['shape'][1:3] == [8, 8]


def test_an_export_does_not_replace_weights_that_it_did_not_write(weights, tmp_path):
  before = (weights / 'model.safetensors').read_bytes()
  for format in ('hf', 'timm'):
    with pytest.raises(ValueError, match='model.safetensors already exists and was not written by'):
      exporting.export(weights, format, weights)
  assert (weights / 'model.safetensors').read_bytes() == before
  (tmp_path / 'site').mkdir()
  (tmp_path / 'site' / 'config.json').write_text('{}')
  with pytest.raises(ValueError, match='site/config.json already exists and was not written by'):
    exporting.export(weights, 'hf', tmp_path / 'site')
  exporting.export(weights, 'hf', tmp_path / 'out')
  exporting.export(weights, 'hf', tmp_path / 'out')  # replaces an export
