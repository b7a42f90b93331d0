"""Entries registered from outside of the package work in every mode."""

import shutil

from flax import linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import small_config
import vit_jax
from vit_jax.evaluation import exact
from vit_jax.figures import gallery
from vit_jax.inference import exporting, prediction
from vit_jax.model import (
  POOLS,
  POSITIONS,
  Pool,
  Position,
  first_layer,
  last_layer,
  resize_positions,
)


def check_every_mode(folder, **overrides):
  """Trains two steps, resumes, evaluates, predicts, draws and exports: (loaded weights, report)."""
  steps = {'epochs': '0.0625', 'checkpoint_every': '1', 'eval_every': '0', 'model.depth': '1'}
  config = small_config(**steps, **overrides)
  result = vit_jax.train(config, folder / 'run')
  loaded = vit_jax.load(folder / 'run')

  shutil.copytree(folder / 'run', folder / 'resumed')
  shutil.rmtree(folder / 'resumed' / 'checkpoints' / '2')
  (folder / 'resumed' / 'result.json').unlink()
  vit_jax.train(config, folder / 'resumed')
  resumed = vit_jax.load(folder / 'resumed').params
  jax.tree.map(np.testing.assert_array_equal, loaded.params, resumed)

  scores = exact.evaluate(folder / 'run', {})
  assert scores['accuracy'] == pytest.approx(result['test_accuracy'])

  drawn = gallery.visualize(folder / 'run')
  (seen,) = prediction.predict(folder / 'run', [str(folder / 'run' / 'figures' / 'patches.png')])
  assert len(seen['predictions']) == 5

  exporting.export(folder / 'run', 'stablehlo', folder / 'out')
  program = jax.export.deserialize(bytearray((folder / 'out' / 'model.stablehlo').read_bytes()))
  image_BHWC = np.random.RandomState(0).randint(0, 256, (3, 8, 8, 3), np.uint8)
  p = loaded.preprocessing
  pixels = (image_BHWC / 255 - np.array(p.mean)) / np.array(p.std)
  want = loaded.model.apply({'params': loaded.params}, jnp.asarray(pixels, jnp.float32))
  np.testing.assert_allclose(program.call(image_BHWC), want, atol=1e-4)
  return loaded, drawn[-1].read_text(encoding='utf-8')


def weighted_mean(model, x_BND):
  """Mean of all tokens by learned weights, which are sown."""
  score_D = model.param('mine', nn.initializers.normal(), (model.width,))
  share_BN = jax.nn.softmax(x_BND @ score_D.astype(x_BND.dtype))
  model.sow('intermediates', 'share_BN', share_BN)
  return jnp.einsum('BN,BND->BD', share_BN, x_BND)


def test_a_new_pool_works_in_every_mode(tmp_path, monkeypatch):
  entry = Pool(
    weighted_mean,
    class_token=True,
    registers=1,
    params=('mine',),
    probe=lambda model, sown: sown['share_BN'][0][:, None],
    caption='my weighted tokens attend to',
  )
  monkeypatch.setitem(POOLS, 'mine', entry)
  with pytest.raises(ValueError, match=r'model.pool=mine needs 1 register\(s\), got 0'):
    vit_jax.make('tiny', 5, pool='mine')
  fields = {'model.pool': 'mine', 'model.num_registers': '1', 'optimizer.layer_decay': '0.9'}
  loaded, report = check_every_mode(tmp_path, **fields)
  assert loaded.model.has_class and 'mine' in last_layer()
  assert 'What my weighted tokens attend to, by block and head.' in report
  with pytest.raises(ValueError, match='npz can not hold this model'):
    exporting.export(tmp_path / 'run', 'npz', tmp_path / 'npz')


def axial(model, grid, whole):
  """A learned vector of each row and each column: `[1, h w, D]`."""
  init, (h, w) = nn.initializers.normal(), whole
  row_h1D = model.learned('rows', init, (h, 1, model.width))
  column_1wD = model.learned('columns', init, (1, w, model.width))
  table_1ND = (row_h1D + column_1wD).reshape(1, h * w, model.width)
  return resize_positions(table_1ND, whole, grid, 0)


def resize_rows(row_h1D, model, own_grid, grid, method):
  return jax.image.resize(row_h1D, (grid[0], 1, model.width), 'linear')


def resize_columns(column_1wD, model, own_grid, grid, method):
  return jax.image.resize(column_1wD, (1, grid[1], model.width), 'linear')


def refuse_odd_width(model):
  if model.width % 2:
    raise ValueError('model.position=axial needs an even width.')


def test_a_new_position_works_in_every_mode(tmp_path, monkeypatch):
  entry = Position(
    axial,
    params={'rows': resize_rows, 'columns': resize_columns},
    check=refuse_odd_width,
    caption='row and column embedding',
  )
  monkeypatch.setitem(POSITIONS, 'axial', entry)
  with pytest.raises(ValueError, match='needs an even width'):
    vit_jax.make('tiny', 5, position='axial', width=15, num_heads=3)
  fields = {'model.position': 'axial', 'optimizer.layer_decay': '0.9'}
  loaded, report = check_every_mode(tmp_path, **fields)
  assert loaded.params['rows'].shape == (2, 1, 16) and {'rows', 'columns'} <= {*first_layer()}
  assert 'row and column embedding to those of all patches' in report
  model, params = vit_jax.load(tmp_path / 'run', grid=(4, 3))
  assert params['rows'].shape == (4, 1, 16) and params['columns'].shape == (1, 3, 16)
  assert model.apply({'params': params}, jnp.zeros((1, 16, 12, 3))).shape == (1, 10)
