"""Tests head training: the frozen backbone, cached features and sweeps."""

import dataclasses
import json
import logging
import os
import pathlib
import shutil
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from benchmarks import probe as benchmark
from tests.conftest import assert_equal, check_resumes_exactly, run_model, small_config
from vit_jax import cli, inherit, opening
from vit_jax import config as config_lib
from vit_jax.data import batching
from vit_jax.data.source import Source
from vit_jax.distributed import cluster, devices, sharding
from vit_jax.evaluation import answers, exact, features
from vit_jax.experiment import assemble
from vit_jax.inference import card
from vit_jax.model import attention
from vit_jax.training import closed_form, loop, probe, resume, session, state, trainer
from vit_jax.training.step import make_train_step
from vit_jax.workdir import Checkpoints, Task, stored, writer

FROZEN = {'freeze': 'backbone', 'augment.flip.probability': '0'}
AUGMENTED = {'freeze': 'backbone'}  # with the flips of `small_config`
SWEPT = FROZEN | {
  'sweep': '0.001,0.1',
  'data.train_split': 'train[:75%]',
  'data.val_split': 'train[75%:]',
  'eval_every': '0',
  'checkpoint_every': '0',
}


def backbone(params):
  return {name: leaves for name, leaves in params.items() if name != 'head'}


def make_step(**overrides):
  """Returns (experiment, state, compiled step, batches) as in a run."""
  exp, training = opening.from_config(small_config(**overrides))
  mesh = devices.make_mesh(32)
  train_state = state.init_state(exp, training, mesh)
  batches = batching.train_batches(training.train, 32, 0, 0, sharding.batch_sharding(mesh))
  step = make_train_step(exp, training, mesh)
  return exp, train_state, step.lower(train_state, next(batches)).compile(), batches


def test_a_batch_of_features_is_not_split():
  many = {'data.image_size': '32', 'model.patch_size': '4', 'batch_size': '512', 'epochs': '4'}
  exp, _ = opening.from_config(small_config(**FROZEN | many))
  fields = {field.name: getattr(exp, field.name) for field in dataclasses.fields(exp)}
  found = probe.OnFeatures(**fields)
  assert exp.training_parts(devices.make_mesh(512)) > 1
  assert found.training_parts(devices.make_mesh(512)) == 1


def test_an_evaluation_of_features_returns_no_features():
  exp, _ = opening.from_config(small_config(**FROZEN))
  fields = {field.name: getattr(exp, field.name) for field in dataclasses.fields(exp)}
  found, mesh = probe.OnFeatures(**fields), devices.make_mesh(1)
  batch = {'feature': jnp.ones((4, 16)), 'label': jnp.zeros(4, jnp.int32), 'mask': jnp.ones(4)}
  params = {'head': {'kernel': jnp.ones((16, 10)), 'bias': jnp.zeros(10)}}
  rows = answers.make_eval_step(found, mesh)(batch, params)
  assert rows['logits'].shape == (4, 10) and 'feature' not in rows


@pytest.mark.slow
def test_frozen_backbone_has_no_gradient_and_no_optimizer_state():
  flops = {}
  for freeze in ('', 'backbone'):
    overrides = {'freeze': freeze, 'micro_batches': '1', 'ema': '0.9'}
    exp, train_state, step, batches = make_step(**overrides)
    flops[freeze] = step.cost_analysis()['flops']
  kernel, bias = (16, 10), (10,)
  moments = [x.shape for x in jax.tree.leaves(train_state.opt_state) if x.ndim]
  assert sorted(moments) == sorted(2 * [kernel, bias])  # Adam's two moments, for the head only

  def forward(params, image_BHWC):
    return run_model(exp.model, params, exp.normalize(image_BHWC))

  image_BHWC = jnp.zeros((16, 8, 8, 3), jnp.uint8)  # each of the two devices has half a batch
  forward = jax.jit(forward).lower(train_state.params, image_BHWC).compile()
  forward = forward.cost_analysis()['flops']
  assert flops['backbone'] < 1.3 * forward and flops[''] > 2.5 * forward

  before = jax.device_get(train_state)
  for _ in range(3):
    train_state, _ = step(train_state, next(batches))
  after = jax.device_get(train_state)
  assert_equal(backbone(after.params), backbone(before.params))
  assert_equal(backbone(after.ema), backbone(before.params))
  assert (after.params['head']['kernel'] != before.params['head']['kernel']).any()


def test_a_head_on_a_random_backbone_is_reported(trained, caplog):
  for init, warns in (('', True), (str(trained[0]), False)):
    caplog.clear()
    opening.from_config(small_config(init=init, **FROZEN))
    assert ('does not train the backbone, but init is empty' in caplog.text) == warns


def test_a_frozen_backbone_has_no_dropout():
  asked = []
  model = types.SimpleNamespace(apply=lambda *_, train, **__: asked.append(train))
  batch = {'image': np.zeros((2, 8, 8, 3), np.uint8), 'example': jnp.arange(2)}
  for freeze in ('', 'backbone'):
    exp = assemble(small_config(freeze=freeze), Task(('a', 'b'), (8, 8), 3))
    dataclasses.replace(exp, model=model).logits({}, batch, jax.random.key(0))
  assert asked == [True, False]


@pytest.mark.slow
def test_head_is_averaged_and_clipped_by_its_own_gradient(trained):
  """Compares SGD with clipping and averaging with the closed form of the softmax gradient."""
  overrides = FROZEN | {
      'ema': '0.2', 'optimizer.name': 'sgd', 'optimizer.momentum': '0', 'optimizer.lr': '0.5',
      'optimizer.weight_decay': '0', 'optimizer.clip': '0.1', 'schedule.name': 'constant',
      'schedule.warmup': '0', 'model.dropout': '0.3', 'model.stochastic_depth': '0.5',
  }  # fmt: skip
  exp, train_state, step, batches = make_step(**overrides)
  params = stored.load_checkpoint(trained[0])[1]
  head = {name: np.asarray(x, np.float64) for name, x in params['head'].items()}
  average = {name: x.copy() for name, x in head.items()}
  replicated = sharding.replicated(devices.make_mesh(32))
  place = lambda tree: jax.device_put(jax.tree.map(np.copy, tree), replicated)
  train_state = train_state.replace(params=place(params), ema=place(params))
  pooled = exp.model.clone(num_classes=None)
  for i in range(3):
    batch, decay = next(batches), min(0.2, (1 + i) / (10 + i))
    x = np.asarray(run_model(pooled, params, exp.normalize(batch['image'])), np.float64)
    p = np.exp(x @ head['kernel'] + head['bias'])
    error = p / p.sum(1, keepdims=True) - np.eye(10)[np.asarray(batch['label'])]
    grads = {'kernel': x.T @ error / 32, 'bias': error.mean(0)}
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    assert norm > 0.1  # so that clipping has an effect
    for name, g in grads.items():
      head[name] = head[name] - 0.5 * g * 0.1 / norm
      average[name] = decay * average[name] + (1 - decay) * head[name]
    train_state, metrics = step(train_state, batch)
    assert float(metrics['grad_norm']) == pytest.approx(norm, rel=1e-3)
  for name in head:
    np.testing.assert_allclose(train_state.params['head'][name], head[name], atol=1e-5)
    np.testing.assert_allclose(train_state.ema['head'][name], average[name], atol=1e-5)


@pytest.mark.slow
@pytest.mark.slow_after_first
@pytest.mark.parametrize('overrides', [FROZEN, AUGMENTED], ids=['cached', 'augmented'])
def test_probe_resumes_bit_for_bit_and_loads_like_any_run(trained, tmp_path, capsys, overrides):
  init = shutil.copytree(trained[0], tmp_path / 'init')
  overrides = overrides | {'ema': '0.9', 'init': str(init), 'checkpoint_every': '8'}
  whole, _ = check_resumes_exactly(overrides, init, tmp_path)

  params = stored.restore_item(tmp_path / 'cut', 32, 'params')
  assert_equal(backbone(params), backbone(stored.load_checkpoint(trained[0])[1]))
  assert sorted(params) == sorted(stored.load_checkpoint(trained[0])[1])  # the whole model is saved
  again = exact.evaluate(tmp_path / 'cut', {})
  assert again['accuracy'] == whole['test_accuracy'] and again['examples'] == 256
  assert again['loss'] == pytest.approx(whole['test_loss'], abs=1e-5)
  flags = ['--mode=predict', f'--workdir={tmp_path}/cut', f'--images={tmp_path}/cut/examples']
  assert not cli.main(flags) and capsys.readouterr().out.count('.png\n') == 8


@pytest.mark.slow
def test_cached_features_give_the_same_result(trained, tmp_path):
  overrides = FROZEN | {'init': str(trained[0]), 'ema': '0.9', 'loss.label_smoothing': '0.1'}
  cached = trainer.train(small_config(**overrides), tmp_path / 'cached')

  def plainly(exp, training, mesh, workdir):
    resume.record(exp, workdir, training.test)
    return session.fit(exp, training, mesh, workdir)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(closed_form, 'train_head', plainly)
    plain = trainer.train(small_config(**overrides), tmp_path / 'plain')
  assert list((tmp_path / 'cached' / 'features').glob('*.npz'))
  assert not (tmp_path / 'plain' / 'features').exists()
  for name in ('params', 'state'):
    a, b = (stored.restore_item(tmp_path / run, 32, name) for run in ('cached', 'plain'))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), a, b)
  for name in ('test_accuracy', 'test_loss', 'examples', 'steps', 'params'):
    assert cached[name] == pytest.approx(plain[name], abs=1e-5)
  lines = [writer.read_metrics(tmp_path / run) for run in ('cached', 'plain')]
  for a, b in zip(*lines, strict=True):
    assert a['step'] == b['step'] and a['loss'] == pytest.approx(b['loss'], abs=1e-5)
  start, end = (
    stored.load_checkpoint(trained[0])[1]['head'],
    stored.load_checkpoint(tmp_path / 'cached')[1],
  )
  assert abs(start['kernel'] - end['head']['kernel']).max() > 1e-3


@pytest.fixture
def counted(monkeypatch):
  """Records the number of examples of each computation of features."""
  computed, real = [], features.compute_features
  count = lambda step, params, examples, *rest: (
    computed.append(len(examples)) or real(step, params, examples, *rest)
  )
  monkeypatch.setattr(features, 'compute_features', count)
  return computed


@pytest.mark.slow
def test_augmented_images_are_not_cached(tmp_path, counted):
  trainer.train(small_config(epochs='0.25', **AUGMENTED), tmp_path)
  assert not counted and not (tmp_path / 'features').exists()


@pytest.mark.slow
def test_cached_features_are_reused_only_for_the_same_inputs(tmp_path, counted):
  exp, training = opening.from_config(small_config(**FROZEN))
  mesh, examples = devices.make_mesh(), training.test
  params = probe.initial_params(exp, training, tmp_path / 'none')
  step = features.make_feature_step(exp, mesh)

  def cached(exp=exp, params=params, examples=examples):
    before = len(counted)
    out = features.cached_features(exp, step, params, examples, mesh, tmp_path)
    return out.feature_ND, len(counted) - before

  first, new = cached()
  assert new == 1 and first.shape == (256, 16)
  again, new = cached()
  assert new == 0
  assert_equal(again, first)
  head = params | {'head': jax.tree.map(lambda x: x + 1, params['head'])}
  assert cached(params=head)[1] == 0  # features do not depend on the head
  pixel = training.test.image_NHWC.copy()
  pixel[100, 3, 3, 0] ^= 1
  other = {**params, 'norm': {**params['norm'], 'bias': params['norm']['bias'] + 1e-6}}
  sized = opening.from_config(small_config(**FROZEN, **{'data.mean': '0.4'}))[0]
  exact = opening.from_config(small_config(**FROZEN, **{'model.activation': 'gelu'}))[0]
  for change in (
    {'examples': type(examples)(pixel, examples.label_N)},
    {'examples': type(examples)(examples.image_NHWC, examples.label_N[::-1])},
    {'examples': training.train},
    {'params': other},
    {'exp': sized},
    {'exp': exact},
  ):
    assert cached(**change)[1] == 1
  assert len(list(tmp_path.iterdir())) == 7  # and no partly written files
  whole = tmp_path / f'{features.key(exp, params, examples)}.npz'
  for damage in (lambda data: b'', lambda data: data[:-9], lambda data: data.replace(b'f4', b'f2'),
                 lambda data: data[:600] + bytes([data[600] ^ 1]) + data[601:]):  # fmt: skip
    whole.write_bytes(damage(whole.read_bytes()))
    out, new = cached()
    assert new == 1
    assert_equal(out, first)


@pytest.mark.slow
def test_a_file_name_that_is_not_utf8_has_cached_features(tmp_path):
  for i, name in enumerate((b'cat/gr\xfcn.png', b'dog/1.png', b'dog/2.png')):
    for k, split in enumerate((b'train', b'test')):
      path = os.path.join(os.fsencode(tmp_path), b'photos', split, name)
      os.makedirs(os.path.dirname(path), exist_ok=True)
      with open(path, 'wb') as file:
        Image.new('RGB', (8, 8), (i, k, 0)).save(file, 'PNG')
  photos = {'data.source': f'folder:{tmp_path}/photos', 'data.cache': 'stream', 'batch_size': '2'}
  trainer.train(small_config(**FROZEN, **photos), tmp_path / 'run')
  assert list((tmp_path / 'run' / 'features').glob('*.npz'))


@pytest.mark.slow
def test_feature_cache_key_depends_on_the_backbone_code(tmp_path, monkeypatch):
  exp, training = opening.from_config(small_config(**FROZEN))
  params = probe.initial_params(exp, training, tmp_path / 'none')
  before, attend = features.key(exp, params, training.test), attention.with_gradient
  assert features.key(exp, params, training.test) == before
  monkeypatch.setattr(attention, 'with_gradient', lambda *x: attend(*x) + 0.1)
  assert features.key(exp, params, training.test) != before


@pytest.mark.slow
def test_sweep_chooses_on_val_and_trains_on_both_splits(trained, tmp_path, counted, capsys):
  config = small_config(init=str(trained[0]), epochs='2', **SWEPT)
  fitted, real = [], probe.fit

  def fit(exp, training, mesh, workdir, **notes):
    fitted.append((workdir.name, len(training.train)))
    if len(fitted) == 2:
      raise KeyboardInterrupt  # between the first and the second rate
    return real(exp, training, mesh, workdir, **notes)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(probe, 'fit', fit)
    with pytest.raises(KeyboardInterrupt):
      trainer.train(config, tmp_path)
    assert not cli.main([f'--workdir={tmp_path}'])  # resumes the run
    result = trainer.train(config, tmp_path)
    assert trainer.train(config, tmp_path) == result
    assert not cli.main([f'--workdir={tmp_path}'])  # the run is already finished
    assert f'{result["test_accuracy"]:.2%} on 256' in capsys.readouterr().out
  assert fitted == [('0.001', 768), ('0.1', 768), ('0.1', 768), (tmp_path.name, 1024)]
  splits = card.source_text(config_lib.from_dict(result['config']), 1024)
  assert splits == '`synthetic`, splits `train[:75%]` and `train[75%:]`: 1,024 images'
  assert sorted(counted) == [256, 256, 768]  # once for each split, not again for each rate

  points = {point['lr']: point['val_accuracy'] for point in result['sweep']}
  assert list(points) == [0.001, 0.1] and len(set(points.values())) == 2
  for rate, accuracy in points.items():
    assert writer.read_json(tmp_path / 'sweep' / f'{rate:g}' / 'result.json')[
      'val_accuracy'
    ] == pytest.approx(accuracy)
    assert not (tmp_path / 'sweep' / f'{rate:g}' / 'checkpoints').exists()
  assert result['lr'] == max(points, key=points.get) and result['steps'] == 64
  assert json.loads((tmp_path / 'result.json').read_text()) == result
  assert 'val_accuracy' not in result

  alone = FROZEN | {'optimizer.lr': str(result['lr']), 'eval_every': '0', 'init': str(trained[0])}
  alone = trainer.train(small_config(epochs='2', **alone), tmp_path / 'alone')
  assert result['test_loss'] == pytest.approx(alone['test_loss'], abs=1e-5)

  more = small_config(init=str(trained[0]), epochs='3', **SWEPT)
  assert trainer.train(more, tmp_path)['sweep'] == result['sweep']  # the sweep is not repeated


def test_run_with_another_backbone_is_detected(trained, tmp_path):
  params = stored.load_checkpoint(trained[0])[1]
  other_head = params | {'head': jax.tree.map(lambda x: x + 1, params['head'])}
  other = params | {'norm': jax.tree.map(lambda x: x + 1, params['norm'])}
  assert not probe.has_other_backbone(tmp_path, params)  # no run there
  assert not probe.has_other_backbone(trained[0], params)
  assert not probe.has_other_backbone(trained[0], other_head)
  assert probe.has_other_backbone(trained[0], other)
  assert probe.has_other_backbone(trained[0], backbone(params) | {'block_9': params['norm']})


def tried(folder, rate, origin, **overrides):
  """Tries a learning rate of a sweep with a stand-in for training; returns whether it trained."""
  exp, training = opening.from_config(small_config(**FROZEN | overrides))
  params = probe.initial_params(exp, training, pathlib.Path('none'))
  training = dataclasses.replace(training, params=params)
  fitted = []

  def fit(exp, plan, mesh, folder, **notes):
    fitted.append(rate)
    result = {'val_accuracy': 0.5, 'config': exp.saved()['config'], 'steps': 32} | notes
    writer.write_json(folder / 'result.json', result)
    return result

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(probe, 'fit', fit)
    origin = probe.measured_on(exp, training) | origin
    assert probe.score_rate(exp, training, None, folder, rate, origin) == 0.5
  return bool(fitted)


@pytest.mark.slow
def test_a_finished_rate_of_a_sweep_belongs_to_its_data_backbone_and_config(tmp_path):
  assert tried(tmp_path, 0.1, {})
  assert not tried(tmp_path, 0.1, {})
  assert tried(tmp_path, 0.1, {'backbone': 'another'})
  with pytest.raises(ValueError, match='the data of synthetic changed after learning rate 0.1 was'):
    tried(tmp_path, 0.1, {'data': 'other', 'backbone': 'another'})
  with pytest.raises(ValueError, match='seed'):
    tried(tmp_path, 0.1, {}, seed='7')


def test_a_rate_of_a_sweep_resumes_before_a_damaged_checkpoint(tmp_path):
  exp, training = opening.from_config(small_config(**FROZEN | {'optimizer.lr': '0.1'}))
  params = probe.initial_params(exp, training, pathlib.Path('none'))
  params = jax.tree.map(jnp.asarray, params)
  with Checkpoints(tmp_path) as checkpoints:
    for step in (8, 16):
      now = state.TrainState(jnp.int32(step), params, {'mu': jnp.zeros(3)}, None)
      checkpoints.save(now, exp.saved() | {'seconds': 0.0})
  for file in (tmp_path / 'checkpoints' / '16' / 'params').rglob('d/*'):
    file.write_bytes(b'')
  assert tried(tmp_path, 0.1, {})
  (damaged,) = (tmp_path / 'damaged').iterdir()
  assert damaged.name.startswith('16-')


def test_the_backbone_of_a_sweep_is_identified_without_its_head():
  exp, training = opening.from_config(small_config(**FROZEN))
  params = probe.initial_params(exp, training, pathlib.Path('none'))
  known = lambda params: probe.measured_on(exp, dataclasses.replace(training, params=params))
  head = params | {'head': jax.tree.map(lambda x: x + 1, params['head'])}
  norm = params | {'norm': jax.tree.map(lambda x: x + 1, params['norm'])}
  assert known(params) == known(head) != known(norm)
  assert known(params)['data'] == exp.task.fingerprint


def test_the_last_run_of_a_sweep_keeps_added_cycles(caplog):
  exp, training = opening.from_config(small_config(epochs='2', **SWEPT), cycles=(32,))
  exp, last = probe.on_all(exp, training, 0.1)
  assert last.cycles == (32,) and last.steps == 64 and exp.task.train_examples == 1024
  assert float(last.schedule(31)) < 0.01 < float(last.schedule(40))  # the second warms up again
  with caplog.at_level(logging.INFO):
    loop.Run(exp, last, None, None, None, None, {}).log_cycle()
  assert 'warm-up to a rate of 0.05, then' in caplog.text  # half of the sweep's choice


def test_a_notice_at_the_end_of_a_rate_stops_the_sweep(monkeypatch, tmp_path):
  tried = []

  def score_rate(exp, training, mesh, folder, rate, origin):
    with cluster.Preemption():
      signal.raise_signal(signal.SIGTERM)  # after the last step
    tried.append(rate)
    return 0.5

  monkeypatch.setattr(probe, 'score_rate', score_rate)
  monkeypatch.setattr(probe, 'measured_on', lambda *_: {})
  task = types.SimpleNamespace(multi_label=False)
  exp = types.SimpleNamespace(config=small_config(**SWEPT), task=task)
  training = types.SimpleNamespace(val=range(probe.FEW))
  with pytest.raises(cluster.Preempted, match='after it tried learning rate 0.001'):
    probe.sweep(exp, training, None, tmp_path)
  assert tried == [0.001] and not (tmp_path / 'sweep.json').exists()


@pytest.mark.parametrize('images, warns', [(probe.FEW - 1, True), (probe.FEW, False)])
def test_a_sweep_continues_after_a_rate_that_diverges(monkeypatch, tmp_path, caplog, images, warns):
  def score_rate(exp, training, mesh, folder, rate, origin):
    if rate == 0.001:
      raise FloatingPointError('The loss of step 9 is nan')
    return 0.5

  monkeypatch.setattr(probe, 'score_rate', score_rate)
  monkeypatch.setattr(probe, 'measured_on', lambda *_: {})
  task = types.SimpleNamespace(multi_label=False)
  exp = types.SimpleNamespace(config=small_config(**SWEPT), task=task)
  kept = tmp_path / 'sweep/0.001/checkpoints/8'
  kept.mkdir(parents=True)
  points = probe.sweep(exp, types.SimpleNamespace(val=range(images)), None, tmp_path)
  assert not kept.parent.exists()
  assert points == [{'lr': 0.001, 'val_accuracy': None}, {'lr': 0.1, 'val_accuracy': 0.5}]
  assert 'Learning rate 0.001: The loss of step 9 is nan' in caplog.text
  assert (f'compared on only {images} validation images' in caplog.text) == warns


@pytest.mark.parametrize('scores, best', [((0.2, 0.7, 0.5), 1), ((None, 0.0, None), 1)])
def test_the_last_run_uses_the_best_rate_that_did_not_diverge(monkeypatch, tmp_path, scores, best):
  points = [{'lr': 10.0**i, 'val_accuracy': score} for i, score in enumerate(scores)]
  exp, training = opening.from_config(small_config(**SWEPT | {'augment.flip.probability': '0.5'}))
  replaced = {
    'initial_params': lambda *_: {}, 'record': lambda *_: None, 'sweep': lambda *_: points,
    'fit': lambda exp, training, mesh, workdir, **notes: notes | {'plan': training},
  }  # fmt: skip
  for name, function in replaced.items():
    monkeypatch.setattr(probe, name, function)
  result = probe.train_head(exp, training, None, tmp_path)
  assert result['lr'] == 10.0**best and result['sweep'] == points
  # The last of the 6 warm-up steps has the full rate.
  assert float(result['plan'].schedule(5)) == pytest.approx(10.0**best)


@pytest.mark.slow
def test_a_sweep_is_repeated_until_its_last_run_has_begun(monkeypatch, tmp_path):
  exp, training = opening.from_config(small_config(**SWEPT))
  old = [{'lr': 0.5, 'val_accuracy': 0.9}]
  (tmp_path / 'sweep.json').write_text(json.dumps({'sweep': old}))
  training = dataclasses.replace(training, params=probe.initial_params(exp, training, tmp_path))
  monkeypatch.setattr(probe, 'score_rate', lambda *_: 0.25)
  points = probe.sweep(exp, training, devices.make_mesh(), tmp_path)
  assert points == [{'lr': rate, 'val_accuracy': 0.25} for rate in (0.001, 0.1)]
  assert json.loads((tmp_path / 'sweep.json').read_text()) == {'sweep': points}
  monkeypatch.setattr(probe, 'latest_step', lambda _: 8)
  (tmp_path / 'sweep.json').write_text(json.dumps({'sweep': old}))
  assert probe.sweep(exp, training, devices.make_mesh(), tmp_path) == old


@pytest.mark.parametrize('overrides, message', [
  ({'freeze': 'head'}, r"Valid: '' .empty., backbone"),
  ({'sweep': '0.1,0.2'}, 'sweep needs freeze=backbone and a data.val_split'),
  (SWEPT | {'data.val_split': ''}, 'sweep needs freeze=backbone and a data.val_split'),
  (SWEPT | {'sweep': '0.1,0'}, 'distinct learning rates above 0'),
  (SWEPT | {'sweep': '0.1,0.1'}, 'distinct learning rates above 0'),
  ({'optimizer.layer_decay': '1.5'}, 'optimizer.layer_decay must be from'),
])  # fmt: skip
def test_bad_values_are_rejected(overrides, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    trainer.train(small_config(**overrides), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_sweep_fails_if_all_rates_diverge(trained, tmp_path):
  overrides = SWEPT | {'sweep': '1e30,1e31', 'optimizer.name': 'sgd', 'optimizer.clip': '0'}
  with pytest.raises(FloatingPointError, match=r'every learning rate of sweep=\(1e\+30, 1e\+31\)'):
    trainer.train(small_config(init=str(trained[0]), **overrides), tmp_path)


def test_other_classes_get_a_new_head(trained, tmp_path):
  source = Source({}, ('cat', 'dog'), 3, None)
  _, params, _ = inherit.open_init(small_config(init=str(trained[0])), source)
  assert params['head']['kernel'].shape == (16, 2) and not params['head']['kernel'].any()
  assert_equal(backbone(params), backbone(stored.load_checkpoint(trained[0])[1]))


def test_finetune_configs_follow_the_paper(capsys):

  steps = {'cifar10': (50_000, 10_000), 'imagenet2012': (1_281_167, 20_000)}
  for dataset, (examples, wanted) in steps.items():
    config = cli.load_file(f'configs/finetune.py:b16,{dataset}')
    assert round(config.epochs * (examples / config.batch_size)) == wanted
    assert round(config.schedule.warmup * (examples / config.batch_size)) == 500
    assert config.batch_size == 512 and tuple(config.data.image_size) == (384, 384)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.momentum, optimizer.clip) == ('sgd', 0.9, 1.0)
    assert optimizer.weight_decay == 0 and optimizer.lr == 0.03
  for variant, message in {
    'b16': 'must be <model>,<dataset>', 'b15,cifar10': 'Did you mean b16',
    'b16,cifar': 'Did you mean cifar10', 'b16,cifar10,adam': 'Did you mean adamw',
  }.items():  # fmt: skip
    assert cli.main([f'--config=configs/finetune.py:{variant}', '--workdir=nowhere']) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_benchmark_compares_frozen_and_cached_epochs():
  config = small_config(**FROZEN)
  result = benchmark.measure(config, examples=64, rounds=3)
  assert result['examples'] == 64 and result['features_once_seconds'] > 0
  medians = {name: float(np.median(times)) for name, times in result['rounds'].items()}
  assert result['epoch_seconds'] == medians and set(medians) == {'frozen', 'cached'}
  assert result['times_as_fast'] == medians['frozen'] / medians['cached']
  assert benchmark.settings().freeze == 'backbone' and not benchmark.settings().sweep


def test_close_learning_rates_have_folders_of_their_own():
  rates = (0.1, 0.10000000001, 1.0, 1e-5)
  assert [probe.short(rate) for rate in rates] == ['0.1', '0.10000000001', '1', '1e-05']
