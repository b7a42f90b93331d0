"""Tests runs with adapt=lora: what is trained, resuming, layouts, and the merged weights."""

import re
import shutil

import jax
import numpy as np
import pytest

from tests.conftest import assert_equal, call, check_resumes_exactly, run_model, small_config
import vit_jax
from vit_jax import opening
from vit_jax.data import batching
from vit_jax.distributed import devices, sharding
from vit_jax.evaluation import exact, scoring
from vit_jax.inference import cost, exporting, summary
from vit_jax.model import merged
from vit_jax.training import state, trainer
from vit_jax.training.step import make_train_step
from vit_jax.workdir import stored

LORA = {'adapt': 'lora', 'lora.rank': '3', 'lora.scale': '2', 'checkpoint_every': '8'}


def kept(params):
  return {name: leaves for name, leaves in params.items() if name not in ('head', 'lora')}


@pytest.fixture(scope='module')
def adapted(trained, tmp_path_factory):
  """A finished run that adapts the weights of `trained`: (workdir, result)."""
  workdir = tmp_path_factory.mktemp('adapted')
  return workdir, trainer.train(small_config(init=str(trained[0]), **LORA), workdir)


@pytest.mark.slow
def test_only_the_head_and_the_factors_are_trained(trained, adapted):
  base, (workdir, result) = stored.load_checkpoint(trained[0])[1], adapted
  params, item = (stored.restore_item(workdir, 32, name) for name in ('params', 'state'))
  assert_equal(kept(params), kept(base))
  changed = jax.tree.map(lambda x: bool(np.abs(x).max() > 0), params['lora'])
  assert all(jax.tree.leaves(changed))
  assert np.abs(params['head']['kernel'] - base['head']['kernel']).max() > 0
  trained_shapes = [x.shape for x in jax.tree.leaves([params['lora'], params['head']])]
  moments = [x.shape for x in jax.tree.leaves(item['opt_state']) if x.ndim]
  assert sorted(moments) == sorted(2 * trained_shapes)  # Adam's two moments
  assert result['test_accuracy'] > trained[1]['test_accuracy']


@pytest.mark.slow
def test_opening_a_run_merges_the_adapter(capsys, adapted, tmp_path):
  workdir, result = adapted
  exp, params, _ = opening.from_workdir(workdir)
  assert_equal(params, merged(stored.restore_item(workdir, 32, 'params'), exp.config))
  again = exact.evaluate(workdir)
  assert again['accuracy'] == result['test_accuracy']
  assert again['loss'] == pytest.approx(result['test_loss'], abs=1e-5)
  image_BHWC = np.random.RandomState(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
  wanted = run_model(exp.model, params, image_BHWC)
  exporting.export(workdir, 'npz', tmp_path / 'npz')
  for path in (workdir, tmp_path / 'npz'):
    model, own = vit_jax.load(path)
    np.testing.assert_allclose(run_model(model, own, image_BHWC), wanted, atol=1e-5)
  assert 'an adapter (lora) were trained' in (tmp_path / 'npz' / 'README.md').read_text()
  assert (
    call(capsys, '--mode=predict', f'--workdir={workdir}', f'--images={workdir}/examples')[1].count(
      '.png\n'
    )
    == 8
  )
  out = call(capsys, '--mode=inspect', f'--workdir={workdir}')[1]
  count = sum(x.size for x in jax.tree.leaves(params))
  own = sum(x.size for x in jax.tree.leaves(stored.restore_item(workdir, 32, 'params')['lora']))
  assert f'Trained parameters: {own + 170:,} of {count + own:,}.' in out  # the head has 170


@pytest.mark.slow
def test_memory_and_compute_count_only_what_is_trained():
  sizes = {
    'model.width': '64',
    'model.mlp_dim': '128',
    'batch_size': '32',
    'augment.flip.probability': '0',
  }
  summaries = {}
  for adapt in ('', 'lora'):
    exp, examples, _ = summary.summary_of_config(small_config(adapt=adapt, **sizes))
    summaries[adapt] = cost.measure(exp, examples)
  full, lora = summaries[''], summaries['lora']
  assert lora.state_bytes['gradients'] == 4 * lora.trained
  assert lora.state_bytes['optimizer'] == 8 * lora.trained + 8  # two moments and two step counters
  assert lora.trained < full.trained / 4
  # Of three products for each kernel, the gradient of the kernel is not computed.
  assert 2 / 3 < lora.train_flops / full.train_flops < 0.85


def test_loading_a_checkpoint_merges_the_adapter(monkeypatch):
  random = np.random.RandomState(0)
  kernel, a, b = (random.normal(size=shape) for shape in ((4, 5), (4, 2), (2, 5)))
  params = {
    'block_0': {'mlp': {'up': {'kernel': kernel, 'bias': np.ones(5)}}},
    'lora': {'block_0': {'mlp': {'up': {'a': a, 'b': b}}}},
  }
  average = jax.tree.map(lambda x: x / 2, params)
  for ema in (0.0, 0.9):
    config = {'config': {'ema': ema, 'adapt': 'lora', 'lora': {'rank': 2, 'scale': 3.0}}}
    config['task'] = {'class_names': ['a', 'b']}
    items = {'config': config, 'names': {}, 'params': params, 'state': {'ema': average}}
    monkeypatch.setattr(stored, 'saved_steps', lambda _: [8])
    monkeypatch.setattr(stored, 'find_calibration', lambda *_: None)
    monkeypatch.setattr(stored, 'read_item', lambda workdir, step, item, items=items: items[item])
    _, found, _ = stored.load_checkpoint(None)
    half = 2.0 if ema else 1.0
    wanted = kernel / half + 3 * (a / half) @ (b / half)
    np.testing.assert_allclose(found['block_0']['mlp']['up']['kernel'], wanted)
    assert found.keys() == {'block_0'}


@pytest.mark.slow
def test_adapted_run_resumes_bit_for_bit(trained, tmp_path):
  init = shutil.copytree(trained[0], tmp_path / 'init')
  overrides = LORA | {'ema': '0.9', 'init': str(init), 'micro_batches': '2'}
  _, state = check_resumes_exactly(overrides, init, tmp_path)
  ema = state['ema']
  loaded = stored.load_checkpoint(tmp_path / 'cut')[1]
  assert_equal(loaded, merged(ema, small_config(**overrides)))  # the averages, merged
  assert_equal(kept(ema), kept(stored.load_checkpoint(trained[0])[1]))


@pytest.mark.long
def test_layouts_and_micro_batches_change_only_rounding(trained):
  overrides = LORA | {
      'init': str(trained[0]), 'optimizer.layer_decay': '0.8',
      'model.dropout': '0.1', 'lora.rank': '4',
  }  # fmt: skip
  losses = {}
  for layout in ({'data': 1}, {'data': 1, 'fsdp': 2}, {'data': 1, 'tensor': 2}, {'parts': 4}):
    axes = {f'mesh.{axis}': str(size) for axis, size in layout.items() if axis != 'parts'}
    config = small_config(micro_batches=str(layout.get('parts', 1)), **overrides, **axes)
    exp, training = opening.from_config(config)
    mesh = devices.make_mesh(32, micro_batches=config.micro_batches, shape=dict(config.mesh))
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(sharding, 'SPLIT_FROM', 32)  # the arrays of this model are small
      now = state.init_state(exp, training, mesh)
      given = sharding.place(training.params, {k: now.params[k] for k in training.params})
      now = now.replace(params=now.params | given)
      if layout.get('tensor'):
        spec = now.params['lora']['block_0']['attention']['query']['b'].sharding.spec
        assert tuple(spec) == (None, 'tensor', None)
      step = make_train_step(exp, training, mesh)
      batches = batching.train_batches(training.train, 32, 0, 0, sharding.batch_sharding(mesh))
      found = []
      for _ in range(4):
        now, metrics = step(now, next(batches))
        found.append(scoring.summarize([metrics['score']])['loss'])
    losses[str(layout)] = found
  first, *others = losses.values()
  for other in others:
    np.testing.assert_allclose(other, first, rtol=2e-5)
  assert len({*first}) == 4


@pytest.mark.parametrize('flags, message', [
  ([], 'adapt=lora does not train the backbone, but init is empty.*Set --config.init'),
  (['--config.init=INIT', '--config.lora.rank=17'],
   r'lora.rank=17 is larger than a side of the kernel block_0/attention/key \(16x16\)'),
  (['--config.init=INIT', '--config.freeze=backbone'], 'adapt=lora cannot be combined with freeze'),
  (['--config.init=INIT', '--config.lora.scale=0'], 'lora.scale must be from 1e-06'),
])  # fmt: skip
def test_wrong_settings_are_rejected_and_leave_no_files(capsys, trained, tmp_path, flags, message):
  flags = [flag.replace('INIT', str(trained[0])) for flag in flags]
  common = ['--config=tests/small.py', '--config.adapt=lora', f'--workdir={tmp_path}/run']
  code, _, err = call(capsys, *common, *flags)
  assert code == 2 and re.search(f'error: {message}', err)
  assert not (tmp_path / 'run').exists()
