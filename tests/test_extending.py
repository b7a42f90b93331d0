"""Entries registered from outside the package work in every mode."""

import json
import re
import shutil

from flax import linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.conftest import call, error, run_model, small_config
import vit_jax
from vit_jax import cli, opening
from vit_jax.augment import AUGMENTATIONS, Augmentation
from vit_jax.cli.flags import WEIGHTS
from vit_jax.data import SOURCES, Source
from vit_jax.experiment import assemble
from vit_jax.figures import visualize
from vit_jax.inference import exporting
from vit_jax.keys import KEYS, Key
from vit_jax.model import (
  POOLS,
  POSITIONS,
  Pool,
  Position,
  first_layer,
  last_layer,
  resize_positions,
)
from vit_jax.opening import Request
from vit_jax.optim import LOSSES, OPTIMIZERS, SCHEDULES, training_recipe
from vit_jax.weights import FORMATS, Format, Preprocessing, Weights
from vit_jax.weights.layouts import SAME, Row, flatten_params
from vit_jax.workdir import Task


def check_every_mode(folder, classes=10, **overrides):
  """Trains 2 steps, resumes, evaluates, predicts, draws, exports; returns (weights, report)."""
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

  scores = vit_jax.evaluate(folder / 'run')
  assert scores['accuracy'] == pytest.approx(result['test_accuracy'])

  drawn = visualize(Request(folder / 'run'))
  (seen,) = vit_jax.predict(folder / 'run', [str(folder / 'run' / 'figures' / 'patches.png')])
  assert len(seen['predictions']) == min(classes, 5)

  exporting.export(folder / 'run', 'stablehlo', folder / 'out')
  program = jax.export.deserialize(bytearray((folder / 'out' / 'model.stablehlo').read_bytes()))
  image_BHWC = np.random.RandomState(0).randint(0, 256, (3, 8, 8, 3), np.uint8)
  p = loaded.preprocessing
  pixels = (image_BHWC / 255 - np.array(p.mean)) / np.array(p.std)
  want = run_model(loaded.model, loaded.params, jnp.asarray(pixels, jnp.float32))
  np.testing.assert_allclose(program.call(image_BHWC), want, atol=1e-4)
  return loaded, drawn[-1].read_text(encoding='utf-8')


def weighted_mean(model, x_BND):
  """Returns the mean of all tokens with learned weights, and sows these weights."""
  score_D = model.param('mine', nn.initializers.normal(), (model.width,))
  share_BN = jax.nn.softmax(x_BND @ score_D.astype(x_BND.dtype))
  model.sow('intermediates', 'share_BN', share_BN)
  return jnp.einsum('BN,BND->BD', share_BN, x_BND)


@pytest.mark.long
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
  assert 'What my weighted tokens attend to, for each block and head.' in report
  with pytest.raises(ValueError, match='npz cannot hold this model'):
    exporting.export(tmp_path / 'run', 'npz', tmp_path / 'npz')


@pytest.mark.slow
def test_a_pool_without_attention_maps_is_drawn_and_served(tmp_path, monkeypatch):
  entry = Pool(lambda model, token_BND: jax.nn.logsumexp(token_BND, axis=1), caption='mine')
  monkeypatch.setitem(POOLS, 'mine', entry)
  _, report = check_every_mode(tmp_path, **{'model.pool': 'mine'})
  assert 'attention' in report and 'cannot be drawn' in report
  page = pytest.importorskip('vit_jax.inference.page')
  exp, params, _ = opening.open_model(Request(tmp_path / 'run'))
  viewer = page.Viewer(exp, params)
  seen = viewer.see(np.full((*exp.task.stored_size, 3), 9, np.uint8))
  assert sum(viewer.guesses(seen).values()) == pytest.approx(1, abs=1e-5)
  picture = viewer.picture(seen, page.ROLLOUT, page.MEAN)
  assert (picture == 9).all() and viewer.layers == [page.ROLLOUT]


def axial(model, grid, whole):
  """Adds a learned vector for each row and each column: `[1, h w, D]`."""
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


@pytest.mark.long
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
  assert 'its row and column embedding to the embedding of every patch' in report
  model, params = vit_jax.load(tmp_path / 'run', grid=(4, 3))
  assert params['rows'].shape == (4, 1, 16) and params['columns'].shape == (1, 3, 16)
  assert run_model(model, params, jnp.zeros((1, 16, 12, 3))).shape == (1, 10)


@pytest.mark.parametrize('part, entry, message', [
    ('position', Position(axial, params={'rows': None}),
     'model.position=mine creates parameters that its registry entry lacks: columns. Add them to '
     "params={...} of the Position in POSITIONS['mine']."),
    ('pool', Pool(weighted_mean, class_token=True),
     'model.pool=mine creates parameters that its registry entry lacks: mine. Add them to '
     "params=(...) of the Pool in POOLS['mine']."),
], ids=['position', 'pool'])  # fmt: skip
def test_parameters_that_no_entry_lists_are_named(monkeypatch, part, entry, message):
  monkeypatch.setitem({'position': POSITIONS, 'pool': POOLS}[part], 'mine', entry)
  with pytest.raises(ValueError, match=re.escape(message)):
    assemble(small_config(**{f'model.{part}': 'mine'}), Task(('a', 'b'), (8, 8), 3))


def lion(schedule, weight_decay, b1, b2, slowness, **_):
  return optax.chain(
    optax.lion(schedule, b1, b2, weight_decay=weight_decay), optax.scale(1 / slowness)
  )


@pytest.mark.slow
def test_a_new_optimizer_schedule_and_loss_work_in_every_mode(tmp_path, monkeypatch):
  monkeypatch.setitem(OPTIMIZERS, 'lion', lion)
  monkeypatch.setitem(KEYS, 'optimizer.slowness', Key(10.0, 'divisor of each update'))
  monkeypatch.setitem(SCHEDULES, 'square', lambda fraction: (1 - fraction) ** 2)
  squares = lambda logits_BL, label_B, label_smoothing: (
    (logits_BL - jax.nn.one_hot(label_B, logits_BL.shape[1])) ** 2
  ).sum(axis=1)
  monkeypatch.setitem(LOSSES, 'squares', squares)
  names = {'optimizer.name': 'lion', 'schedule.name': 'square', 'loss.name': 'squares'}
  check_every_mode(tmp_path, **names)
  lines = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
  tested = [line for line in map(json.loads, lines) if line['split'] == 'test']
  assert tested[-1]['loss'] == pytest.approx(1, abs=0.2)  # (0 - 1)² for the target class


def focal(logits_BL, label_B, *, gamma):
  log_p_B = -optax.softmax_cross_entropy_with_integer_labels(logits_BL, label_B)
  return -((1 - jnp.exp(log_p_B)) ** gamma) * log_p_B


@pytest.mark.slow
def test_a_loss_gets_only_the_keys_that_it_accepts(monkeypatch):
  monkeypatch.setitem(KEYS, 'loss.gamma', Key(2.0, 'exponent of the focal loss'))
  monkeypatch.setitem(LOSSES, 'focal', focal)
  monkeypatch.setitem(LOSSES, 'all', lambda logits_BL, label_B, **keys: keys)
  loss = lambda name: assemble(
    small_config(**{'loss.name': name, 'loss.gamma': '3'}), Task(('a', 'b'), (8, 8), 3)
  ).loss(jnp.zeros((1, 2)), jnp.zeros(1, int))
  half = np.log(2)
  np.testing.assert_allclose(
    [loss('softmax')[0], loss('sigmoid')[0], loss('focal')[0]], [half, 2 * half, half / 8], 1e-6
  )
  assert loss('all') == {'label_smoothing': 0, 'gamma': 3}


def test_an_optimizer_gets_only_the_keys_that_it_accepts(monkeypatch):
  monkeypatch.setitem(OPTIMIZERS, 'mine', lambda schedule, *, b1: optax.sgd(schedule, momentum=b1))
  recipe = training_recipe(small_config(**{'optimizer.name': 'mine'}), 1024)
  recipe['optimizer'].init({'kernel': jnp.zeros(2)})


def negative(key_B, image_BHWC, probability):
  happens_B = jax.vmap(lambda key: jax.random.bernoulli(key, probability))(key_B)
  return jnp.where(happens_B[:, None, None, None], 255 - image_BHWC, image_BHWC)


@pytest.mark.long
def test_a_new_augmentation_works_in_every_mode(tmp_path, monkeypatch):
  entry = Augmentation(negative, 'probability', 0, strong=True)
  monkeypatch.setitem(AUGMENTATIONS, 'negative', entry)
  monkeypatch.setitem(KEYS, 'augment.negative.probability', Key(0.0, 'probability', range=(0, 1)))
  plain, _ = check_every_mode(tmp_path / 'plain')
  found, _ = check_every_mode(tmp_path / 'negative', **{'augment.negative.probability': '1'})
  same = [
    np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (plain.params, found.params)))
  ]
  assert not all(same)


def stripes(argument, data_dir, image_size):
  """Creates images of horizontal or vertical stripes with the period `argument`."""

  def read(split, indices):
    for i in indices:
      image_HW = np.zeros((8, 8), np.uint8)
      image_HW[:: int(argument)] = 255
      image_HW = image_HW if i % 2 else image_HW.T
      yield f'stripes/{split}/{i}', np.repeat(image_HW[..., None], 3, 2), i % 2

  return Source({'train': 1024, 'test': 64}, tuple('ab'), 3, read)


@pytest.mark.long
def test_a_new_data_source_works_in_every_mode(tmp_path, monkeypatch):
  monkeypatch.setitem(SOURCES, 'stripes', stripes)
  loaded, _ = check_every_mode(tmp_path, classes=2, **{'data.source': 'stripes:2'})
  assert loaded.class_names == ('a', 'b')


def save_one_array_a_file(model, params, folder, preprocessing, class_names):
  for name, leaf in flatten_params(params).items():
    np.save(folder / f'{name.replace("/", ".")}.npy', leaf)
  about = {'fields': {n: getattr(model, n) for n in ('num_classes', 'width', 'depth', 'num_heads')}}
  about['fields'] |= {'mlp_dim': model.mlp_dim, 'patch_size': model.patch_size, 'pool': model.pool}
  about |= {'size': preprocessing.size, 'class_names': class_names}
  (folder / 'about.json').write_text(json.dumps(about))


def read_one_array_a_file(folder):
  about = json.loads((folder / 'about.json').read_text())
  arrays = {file.stem.replace('.', '/'): np.load(file) for file in folder.glob('*.npy')}
  fields = about['fields'] | {'patch_size': tuple(about['fields']['patch_size'])}
  rows = [Row((name,), (name,), SAME) for name in arrays]
  size, names = tuple(about['size']), tuple(about['class_names'])
  return Weights(str(folder), arrays, rows, fields, 3, Preprocessing(size), class_names=names)


@pytest.mark.slow
def test_a_new_weight_format_can_be_exported_loaded_and_fine_tuned(tmp_path, monkeypatch):
  entry = Format(
    save_one_array_a_file,
    lambda loaded: 'import numpy',
    ('*.npy', 'about.json'),
    lambda place: (place / 'about.json').is_file(),
    read_one_array_a_file,
  )
  monkeypatch.setitem(FORMATS, 'mine', entry)
  vit_jax.train(small_config(epochs='0.0625'), tmp_path / 'run')
  exporting.export(tmp_path / 'run', 'mine', tmp_path / 'out')
  assert 'import numpy' in (tmp_path / 'out' / 'README.md').read_text()
  ours, theirs = vit_jax.load(tmp_path / 'run'), vit_jax.load(tmp_path / 'out')
  jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
  assert theirs.class_names == ours.class_names
  with pytest.raises(ValueError, match='already holds .*npy'):
    exporting.export(tmp_path / 'run', 'npz', tmp_path / 'out')
  vit_jax.train(small_config(epochs='0.03125', init=str(tmp_path / 'out')), tmp_path / 'tuned')
  images = [str(tmp_path / 'run' / 'examples')]
  assert len(visualize(Request(init=str(tmp_path / 'out')), images, tmp_path / 'look')) > 5


def test_a_new_mode_gets_its_flags_and_the_opened_model(capsys, trained, monkeypatch):
  def run_count(args):
    exp, params, step = opening.open_model(cli.request_of(args))
    print(args.unit, step, params['head']['kernel'].size == 16 * len(exp.task.class_names))

  flags = (*WEIGHTS, cli.Flag('unit', 'counted unit', default='parameters'))
  mode = cli.Mode('counts parameters', '--workdir=runs/digits', flags, run_count)
  monkeypatch.setitem(cli.MODES, 'count', mode)
  argv = ['--mode=count', f'--workdir={trained[0]}', '--step=16', '--config.eval_batch_size=9']
  assert call(capsys, *argv, '--unit=weights')[:2] == (None, 'weights 16 True\n')
  assert '--topk is for predict, not for --mode=count' in error(capsys, *argv, '--topk=3')
  assert '--unit is for count' in error(capsys, f'--workdir={trained[0]}', '--unit=weights')
  assert 'counts parameters' in call(capsys, '--help')[1]
  page = call(capsys, '--mode=count', '--help')[1]
  assert '--unit=<unit>' in page and '--mode=count --workdir=runs/digits' in page
