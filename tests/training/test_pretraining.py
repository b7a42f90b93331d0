"""Follows a run without labels: training, resuming, and everything that its workdir is for."""

import json

import jax
import numpy as np
from PIL import Image
import pytest

from tests.conftest import call, check_resumes_exactly, error, run_model, small_config
import vit_jax
from vit_jax import default_config, opening
from vit_jax.check import check
from vit_jax.distributed import sharding
from vit_jax.evaluation import score_split
from vit_jax.evaluation.answers import make_eval_step
from vit_jax.evaluation.data import load_split
from vit_jax.experiment import mesh_for
from vit_jax.training import loop, state, trainer
from vit_jax.training.step import make_train_step
from vit_jax.workdir import stored, writer

MASKED = {
  'objective': 'masked',
  'masked.decoder_width': '16', 'masked.decoder_depth': '1', 'masked.decoder_heads': '2',
  'data.image_size': '16', 'optimizer.lr': '3e-3',
}  # fmt: skip


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
  """A finished run without labels, with its result."""
  workdir = tmp_path_factory.mktemp('mae')
  overrides = {'data.train_split': 'train[:512]', 'data.val_split': 'train[512:640]', 'epochs': '2'}
  return workdir, trainer.train(small_config(**MASKED | overrides), workdir)


def test_a_run_without_labels_reports_the_error_of_hidden_patches(pretrained, capsys):
  workdir, result = pretrained
  assert result['test_accuracy'] is None and 0 < result['test_loss'] < 1.2
  lines = writer.read_metrics(workdir)
  assert {'train', 'val', 'test'} == {line['split'] for line in lines}
  assert not any('accuracy' in line for line in lines)
  assert result['best']['step'] in (16, 32)
  _, out, _ = call(capsys, '--mode=eval', f'--workdir={workdir}', '--step=last')
  found = json.loads((workdir / 'eval.json').read_text())
  assert found['loss'] == pytest.approx(result['test_loss'], rel=1e-5)
  assert f'{found["loss"]:.4f}' in out and 'accuracy' not in out
  fewer = vit_jax.evaluate(workdir, {'masked.share': '0.5'}, step='last')
  assert fewer['overrides'] == {'masked.share': '0.5'} and fewer['loss'] != found['loss']
  assert sorted(path.name for path in (workdir / 'examples').iterdir())[0] == '0_no-label.png'


@pytest.mark.parametrize('setting', ['class_weights=balanced', 'label_smoothing=0.1'])
def test_settings_of_a_classifier_loss_are_refused(tmp_path, capsys, setting):
  flags = ['--config=configs/mae.py:tiny,cifar10', f'--workdir={tmp_path}/run']
  message = error(capsys, *flags, f'--config.loss.{setting}')
  assert 'trains no classification head' in message and f'loss.{setting}' in message


def test_a_run_with_settings_of_a_classifier_loss_can_still_be_opened():
  config = default_config()
  config.objective, config.loss.label_smoothing = 'masked', 0.1
  check(config, trains=False)
  with pytest.raises(ValueError, match=r'loss.label_smoothing=0.1'):
    check(config)


@pytest.mark.parametrize('flag, message', [
  ('--config.model.patch_size=8', 'model.patch_size=8x8, masked.decoder_depth='),
  ('--config.masked.decoder_depth=2', 'model.patch_size=4x4, masked.decoder_depth=2, '),
  ('--config.masked.decoder_heads=1', 'model.patch_size=4x4, masked.decoder_depth='),
  ('--max_patches=4', 'A masked autoencoder needs images of one size'),
])  # fmt: skip
def test_patches_that_the_decoder_cannot_predict_are_refused(pretrained, capsys, flag, message):
  code, _, err = call(capsys, '--mode=eval', f'--workdir={pretrained[0]}', flag)
  assert code == 2 and f'error: {message}' in err


@pytest.mark.slow
def test_evaluation_does_not_depend_on_the_batch_size(pretrained):
  exp, params, _ = opening.from_workdir(pretrained[0])
  test = load_split(exp, 'test')
  mesh = mesh_for(exp.config)
  params, step = sharding.replicate(mesh, params), make_eval_step(exp, mesh)
  one, other = (score_split(step, params, test, size, mesh)['loss'] for size in (100, 64))
  assert one == pytest.approx(other, rel=1e-6)


def test_the_weights_start_a_classifier_that_lacks_only_its_head(pretrained):
  workdir = pretrained[0]
  saved = stored.restore_weights(workdir, 32)
  settings = {'init': str(workdir), 'data.image_size': '16', 'model.variant': 'None'}
  settings |= {f'model.{name}': 'None' for name in ('width', 'depth', 'mlp_dim', 'pool')}
  exp, training = opening.from_config(small_config(**settings))
  assert training.params.keys() == saved.keys() - {'decoder'} | {'head'}
  for name in saved.keys() - {'decoder'}:
    jax.tree.map(np.testing.assert_array_equal, training.params[name], saved[name])
  assert not training.params['head']['kernel'].any()
  assert exp.objective.labels and exp.model.num_classes == 10


@pytest.mark.slow
def test_pretraining_can_start_from_a_classifier(trained):
  settings = MASKED | {'init': str(trained[0]), 'data.image_size': '8', 'masked.share': '0.5'}
  exp, training = opening.from_config(small_config(**settings))
  saved = stored.restore_weights(trained[0], 32)
  assert training.params.keys() == saved.keys() - {'head'} and exp.model.num_classes is None
  jax.tree.map(np.testing.assert_array_equal, training.params['block_1'], saved['block_1'])


def test_prediction_explains_that_there_are_no_classes_yet(pretrained, capsys, tmp_path):
  workdir, photo = pretrained[0], next((pretrained[0] / 'examples').glob('*.png'))
  flags = '--mode=predict', f'--workdir={workdir}', f'--images={photo}'
  code, _, message = call(capsys, *flags)
  assert code == 2 and 'no classes yet' in message and f'--config.init={workdir}' in message
  out = tmp_path / 'features.npz'
  assert call(capsys, *flags, '--features=pooled', f'--out={out}')[0] in (0, None)
  assert np.load(out)['feature'].shape == (1, 16)


@pytest.mark.long
def test_pictures_show_what_is_seen_and_filled_in(pretrained, capsys, tmp_path):
  out = tmp_path / 'look'
  code, _, _ = call(capsys, '--mode=visualize', f'--workdir={pretrained[0]}', f'--out={out}')
  drawn = {path.stem for path in (out / 'figures').iterdir()}
  assert code in (0, None) and {'reconstruction', 'curves', 'rollout', 'filters'} <= drawn
  assert not {'confusion', 'mistakes', 'neighbours'} & drawn


@pytest.mark.slow
def test_reconstructions_keep_the_seen_pixels(pretrained):
  from vit_jax.figures.reconstruction import GREY, reconstruct

  exp, params, _ = opening.from_workdir(pretrained[0])
  image_BHWC = load_split(exp, 'test').image_NHWC[:5]
  image, seen, filled = reconstruct(exp, params, image_BHWC)
  np.testing.assert_array_equal(image, image_BHWC)
  hidden = (seen == GREY) & (image != GREY)
  np.testing.assert_array_equal(filled[~hidden & (seen != GREY)], image[~hidden & (seen != GREY)])
  assert 0.7 < hidden.mean() <= 0.75 and (filled != image)[hidden].mean() > 0.5


def test_few_shot_accuracy_uses_the_classes_of_the_data(pretrained, capsys):
  code, _, _ = call(capsys, '--mode=fewshot', f'--workdir={pretrained[0]}')
  found = json.loads((pretrained[0] / 'fewshot.json').read_text())
  assert code in (0, None) and found['shots']['25']['mean'] > 0.3  # ten classes


@pytest.mark.parametrize('format', ['npz', 'timm'])
def test_exports_hold_the_model_without_its_decoder(pretrained, capsys, tmp_path, format):
  workdir, out = pretrained[0], tmp_path / 'out'
  flags = '--mode=export', f'--format={format}', f'--out={out}'
  code, _, err = call(capsys, *flags, f'--init={workdir}')
  assert code in (0, None), err
  own, other = vit_jax.load(workdir), vit_jax.load(out)
  image_BHWC = np.random.RandomState(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
  want, found = (run_model(loaded.model, loaded.params, image_BHWC) for loaded in (own, other))
  np.testing.assert_allclose(found, want, atol=1e-5)


def test_inspection_counts_the_decoder_and_the_cheaper_step(pretrained, capsys):
  _, out, _ = call(capsys, '--mode=inspect', f'--workdir={pretrained[0]}')
  assert 'decoder' in out and 'no labels' in out


def test_images_without_labels_cannot_train_a_classifier(tmp_path):
  for i in range(20):
    folder = tmp_path / 'deep' / f'{i % 3}'
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(i).randint(0, 256, (16, 16, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / f'{i}.png')
  settings = {'data.source': f'images:{tmp_path}', 'data.image_size': '16', 'batch_size': '4'}
  with pytest.raises(ValueError, match=r'has no labels.*configs/mae.py'):
    opening.from_config(small_config(**settings))
  exp, training = opening.from_config(small_config(**MASKED | settings))
  assert len(training.train) + len(training.test) == 20 and exp.task.class_names == ()


@pytest.mark.slow
def test_a_run_without_labels_resumes_bit_for_bit(tmp_path):
  overrides = MASKED | {'ema': '0.9', 'checkpoint_every': '8', 'model.dropout': '0.1'}
  unused = tmp_path / 'unused'
  unused.mkdir()
  whole, found = check_resumes_exactly(overrides, unused, tmp_path)
  assert 'decoder' in found['ema'] and whole['test_accuracy'] is None


def two_steps(parts=1, shape=None, **overrides):
  """Returns parameters and metrics after two steps."""
  sizes = {f'mesh.{axis}': str(size) for axis, size in (shape or {'data': 1}).items()}
  sgd = {'optimizer.name': 'sgd', 'optimizer.lr': '0.1', 'model.dropout': '0.1'}
  exp, training = opening.from_config(
    small_config(**MASKED | sgd | sizes | overrides, micro_batches=str(parts))
  )
  mesh = mesh_for(exp.config)
  now, step = state.init_state(exp, training, mesh), make_train_step(exp, training, mesh)
  batches = loop.train_batches(training.train, 32, 0, 0, sharding.batch_sharding(mesh))
  for _ in range(2):
    now, metrics = step(now, next(batches))
  return jax.device_get(now.params), jax.device_get(metrics)


@pytest.mark.long
@pytest.mark.parametrize(
  'parts, shape', [(4, {'data': 1}), (2, {'data': 2}), (1, {'data': 1, 'fsdp': 2})]
)
def test_micro_batches_and_devices_do_not_change_a_run(parts, shape, monkeypatch):
  monkeypatch.setattr(sharding, 'SPLIT_FROM', 256)
  want, metrics = two_steps()
  found, same = two_steps(parts, shape)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, want)
  assert float(same['grad_norm']) == pytest.approx(float(metrics['grad_norm']), rel=1e-4)


@pytest.mark.slow
def test_bfloat16_trains_without_labels():
  _, metrics = two_steps(**{'model.dtype': 'bfloat16'})
  _, exact = two_steps()
  loss = lambda found: found['score'].loss.compute()
  assert float(loss(metrics)) == pytest.approx(float(loss(exact)), rel=0.02)
