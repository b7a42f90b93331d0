"""Tests reading and writing of all weight formats against outputs of the original code bases."""

import contextlib
import dataclasses
import json
import math
import re
import shutil
import struct

from flax import linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.conftest import DATA, init_params, run_model
import vit_jax
from vit_jax import opening
from vit_jax.inference import exporting
from vit_jax.model import positions, variants
from vit_jax.model.vit import ViT
from vit_jax.weights import hf, hf_config, layouts, npz, reader, timm, timm_names
from vit_jax.weights.formats import Preprocessing

# By folder: the arguments that its file needs, and the formats that can hold the model.
FIXTURES = {
  'paper_token': ({}, {'npz', 'hf', 'timm'}),
  'paper_prelogits': ({}, {'npz'}),
  'paper_gap': ({'grid': (2, 4)}, {'npz', 'timm'}),
  'paper_hybrid': ({}, {'npz'}),
  'paper_hybrid_root': ({}, {'npz'}),
  'hf_classifier': ({}, {'hf'}),
  'hf_backbone': ({}, {'hf'}),
  'hf_deit': ({}, {'hf'}),
  'hf_dinov2': ({}, {'hf'}),
  'hf_dinov2_swiglu': ({}, {'hf'}),
  'hf_dinov3': ({}, {'hf', 'timm'}),
  'hf_clip': ({'features': 'pooled'}, {'hf'}),
  'hf_siglip': ({'features': 'pooled'}, {'hf', 'npz', 'timm'}),
  'timm_token': ({}, {'timm', 'hf'}),
  'timm_avg_registers_qknorm_layerscale': ({}, {'timm'}),
  'timm_dinov2_registers': ({}, {'timm'}),
  'timm_map': ({}, {'timm'}),
  'timm_dinov2_swiglu': ({}, {'timm'}),
  'timm_eva02': ({}, {'timm'}),
  'timm_deit': ({}, {'hf'}),
}


def source(name):
  """Returns the path of a fixture, for `load`."""
  path = DATA / name / 'weights.npz'
  return path if path.exists() else DATA / name


def logits(loaded, image):
  return run_model(loaded.model, loaded.params, image)


def equal(a, b):
  """Whether two trees hold identical arrays."""
  a, b = layouts.flatten_params(a), layouts.flatten_params(b)
  return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.filterwarnings('error::RuntimeWarning')
@pytest.mark.parametrize('name', FIXTURES)
def test_outputs_match_the_original_before_and_after_a_round_trip(name, tmp_path):
  arguments, held = FIXTURES[name]
  data = np.load(DATA / name / 'io.npz')
  loaded = vit_jax.load(source(name), **arguments)
  np.testing.assert_allclose(logits(loaded, data['image']), data['output'], atol=2e-5)
  for form in ('hf', 'timm', 'npz'):  # the other formats are programs, which can hold every model
    out = tmp_path / form
    save = lambda out=out, form=form: vit_jax.save(
      *loaded, out, format=form, preprocessing=loaded.preprocessing
    )
    if form not in held:
      with pytest.raises(ValueError, match=r'cannot hold this model:\n  model\.'):
        save()
      continue
    save()
    again = vit_jax.load(out, **arguments)
    assert equal(again.params, loaded.params)
    np.testing.assert_allclose(logits(again, data['image']), data['output'], atol=2e-5)
    if name.startswith(
      form
    ):  # npz stores no preprocessing, and hf and timm round a crop differently
      assert three_channels(again.preprocessing) == three_channels(loaded.preprocessing)


def three_channels(p):
  return dataclasses.replace(p, mean=p.mean * (3 // len(p.mean)), std=p.std * (3 // len(p.std)))


# The biases of DeiT's two classifiers become one.
REWRITTEN = [n for n in FIXTURES if not n.startswith('paper') and not n.endswith('deit')]


@pytest.mark.parametrize('name', REWRITTEN)
def test_saving_loaded_weights_reproduces_the_file(name, tmp_path):
  form = name.split('_')[0]
  loaded = vit_jax.load(source(name), **FIXTURES[name][0])
  vit_jax.save(*loaded, tmp_path, format=form, preprocessing=loaded.preprocessing)
  before, after = (load_file(f / 'model.safetensors') for f in (DATA / name, tmp_path))
  for absent in loaded.ignored:
    del before[absent]
  assert before.keys() == after.keys()
  assert all(before[key].tobytes() == after[key].tobytes() for key in before)


def test_saving_paper_weights_reproduces_the_file_with_its_older_names(tmp_path, caplog):
  loaded = vit_jax.load(source('paper_hybrid'))
  vit_jax.save(*loaded, tmp_path, format='npz')
  assert 'without preprocessing, the files say that images are stretched to' in caplog.text
  before = npz.read_arrays(source('paper_hybrid'))
  after = npz.read_arrays(tmp_path / 'model.npz')
  assert before.keys() == after.keys()
  assert all(before[key].tobytes() == after[key].tobytes() for key in before)


@pytest.mark.parametrize('name', ['paper_hybrid', 'paper_hybrid_root'])
def test_group_norms_with_the_shape_of_older_flax_are_read(name, tmp_path):
  arrays = npz.read_arrays(source(name))
  norms = [key for key in arrays if re.search(r'\bgn\w+/(scale|bias)$', key)]
  assert norms
  older = {key: arrays[key].reshape(1, 1, 1, -1) for key in norms}
  np.savez(tmp_path / 'older.npz', **(arrays | older))
  assert equal(vit_jax.load(tmp_path / 'older.npz').params, vit_jax.load(source(name)).params)


# big_vision's model, built from flax modules so that the automatic names are big_vision's names.


class Mlp(nn.Module):
  @nn.compact
  def __call__(self, x):
    hidden = nn.gelu(nn.Dense(40)(x))
    return nn.Dense(x.shape[-1])(hidden)


class Encoder1DBlock(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    y = nn.LayerNorm()(x)
    x = x + nn.MultiHeadDotProductAttention(2)(y, y)
    return x + Mlp(name='MlpBlock_0')(nn.LayerNorm()(x)), None


class Encoder(nn.Module):
  scan: bool

  @nn.compact
  def __call__(self, x):
    if self.scan:
      axes = {'params': 0}
      block = nn.scan(Encoder1DBlock, variable_axes=axes, split_rngs={'params': True}, length=3)
      x = block(name='encoderblock')(x, None)[0]
    else:
      for i in range(3):
        x = Encoder1DBlock(name=f'encoderblock_{i}')(x)[0]
    return nn.LayerNorm(name='encoder_norm')(x)


class MAPHead(nn.Module):
  @nn.compact
  def __call__(self, x):
    probe = self.param('probe', nn.initializers.normal(1), (1, 1, x.shape[-1]))
    x = nn.MultiHeadDotProductAttention(2)(jnp.tile(probe, (len(x), 1, 1)), x)
    return (x + Mlp(name='MlpBlock_0')(nn.LayerNorm()(x)))[:, 0]


class BigVision(nn.Module):
  pool: str
  scan: bool
  positions: str = 'learn'

  @nn.compact
  def __call__(self, image):
    x = nn.Conv(24, (4, 4), (4, 4), name='embedding')(image)
    (h, w), x = x.shape[1:3], x.reshape(len(image), -1, 24)
    if self.positions == 'learn':
      x += self.param('pos_embedding', nn.initializers.normal(1), (1, x.shape[1], 24))
    else:  # big_vision's sincos2d
      turns = [[t / 10_000 ** (k / 5) for k in range(6)] for t in range(max(h, w))]
      waves = [[*map(math.sin, turn), *map(math.cos, turn)] for turn in turns]
      x += np.array([waves[column] + waves[row] for row in range(h) for column in range(w)])
    if self.pool == 'tok':
      cls = self.param('cls', nn.initializers.normal(1), (1, 1, 24))
      x = jnp.concatenate([jnp.tile(cls, (len(x), 1, 1)), x], axis=1)
    x = Encoder(self.scan, name='Transformer')(x)
    x = {'map': lambda: MAPHead()(x), 'gap': lambda: x.mean(1), 'tok': lambda: x[:, 0]}[self.pool]()
    return nn.Dense(5, name='head')(jnp.tanh(nn.Dense(24, name='pre_logits')(x)))


@pytest.mark.slow
@pytest.mark.slow_after_first
@pytest.mark.parametrize('pool, scan, prefix', [
    ('map', True, 'params/'), ('gap', False, ''), ('tok', True, 'params/img/'),
])  # fmt: skip
def test_big_vision_weights_give_big_vision_outputs(pool, scan, prefix, tmp_path):
  image = np.random.RandomState(0).normal(size=(2, 12, 12, 3)).astype(np.float32)
  theirs = BigVision(pool, scan)
  variables = theirs.init(jax.random.key(0), image)
  leaves, tree = jax.tree.flatten(variables)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  leaves = [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)]
  variables = jax.tree.unflatten(tree, leaves)
  arrays = {
    prefix + n: np.asarray(x) for n, x in layouts.flatten_params(variables['params']).items()
  }
  if prefix:
    other = 'params/txt/head/bias' if 'img' in prefix else 'chrono/seconds'
    arrays |= {other: np.zeros(3, np.float32), 'opt/count': np.zeros(())}
  np.savez(tmp_path / 'weights.npz', **arrays)
  loaded = vit_jax.load(tmp_path / 'weights.npz')
  np.testing.assert_allclose(logits(loaded, image), theirs.apply(variables, image), atol=2e-5)
  assert len(loaded.ignored) == (2 if prefix else 0)
  vit_jax.save(*loaded, tmp_path / 'again', format='npz')
  assert equal(vit_jax.load(tmp_path / 'again').params, loaded.params)


@pytest.mark.slow_after_first
@pytest.mark.parametrize('pool', ['gap', 'map', 'tok'])
def test_files_of_big_vision_without_positions_have_sincos_positions(pool, tmp_path):
  image = np.random.RandomState(0).normal(size=(2, 12, 12, 3)).astype(np.float32)
  theirs = BigVision(pool, False, 'sincos2d')
  variables = theirs.init(jax.random.key(0), image)
  np.savez(tmp_path / 'weights.npz', **layouts.flatten_params(variables['params']))
  loaded = vit_jax.load(tmp_path / 'weights.npz')
  assert loaded.model.position == 'sincos' and loaded.preprocessing.size == (224, 224)
  for size in ((12, 12), (8, 20)):
    image = np.random.RandomState(1).normal(size=(2, *size, 3)).astype(np.float32)
    np.testing.assert_allclose(logits(loaded, image), theirs.apply(variables, image), atol=2e-5)
  kept = dict(format='npz', preprocessing=loaded.preprocessing)
  vit_jax.save(*loaded, tmp_path / 'again', **kept)
  again = vit_jax.load(tmp_path / 'again', grid=(2, 5))
  assert equal(again.params, loaded.params) and again.model == loaded.model
  stretched = loaded.model.clone(position_grid=(3, 3))
  with pytest.raises(ValueError, match='position_grid'):
    vit_jax.save(stretched, loaded.params, tmp_path / 'other', **kept)


def test_a_file_of_the_paper_without_positions_is_refused(tmp_path):
  arrays = npz.read_arrays(source('paper_token'))
  del arrays['Transformer/posembed_input/pos_embedding']
  np.savez(tmp_path / 'weights.npz', **arrays)
  with pytest.raises(ValueError, match='pos_embedding: missing'):
    vit_jax.load(tmp_path / 'weights.npz')


def test_older_and_newer_names_of_the_paper_load_the_same_model(tmp_path):
  older = npz.read_arrays(source('paper_token'))
  newer = {
    name.replace('MultiHeadDotProductAttention_1', 'MultiHeadDotProductAttention_0')
    .replace('LayerNorm_2', 'LayerNorm_1')
    .replace('MlpBlock_3', 'MlpBlock_0'): array
    for name, array in older.items()
  }
  assert newer.keys() != older.keys()
  np.savez(tmp_path / 'weights.npz', **newer)
  assert equal(vit_jax.load(tmp_path).params, vit_jax.load(source('paper_token')).params)


def test_other_float_types_are_converted_to_float32(tmp_path):
  exact = npz.read_arrays(source('paper_gap'))
  for dtype in (np.float16, ml_dtypes.bfloat16, np.float64):
    np.savez(tmp_path / 'weights.npz', **{n: x.astype(dtype) for n, x in exact.items()})
    params = vit_jax.load(tmp_path, grid=(2, 4)).params
    assert params['head']['kernel'].dtype == np.float32
    assert np.array_equal(params['head']['kernel'], exact['head/kernel'].astype(dtype))


# Adapting to another grid or other classes.


@pytest.mark.slow_after_first
@pytest.mark.parametrize('before, after', [
    ((4, 4), (6, 6)), ((8, 6), (3, 5)), ((5, 5), (5, 9)), ((2, 3), (1, 1)),
])  # fmt: skip
@pytest.mark.parametrize('prefix', [0, 2])
def test_resized_positions_match_pytorch_and_the_papers_code(before, after, prefix):
  given = np.random.RandomState(0).normal(size=(1, prefix + before[0] * before[1], 7))
  given = given.astype(np.float32)
  table = given[0, prefix:].reshape(*before, 7)
  ours = {m: positions.resize_positions(given, before, after, prefix, m) for m in positions.RESIZES}
  for resized in ours.values():
    assert np.array_equal(resized[:, :prefix], given[:, :prefix])
    assert resized.shape == (1, prefix + after[0] * after[1], 7)
  ndimage = pytest.importorskip('scipy.ndimage')
  ratio = (after[0] / before[0], after[1] / before[1], 1)
  want = ndimage.zoom(table, ratio, order=1).reshape(-1, 7)
  np.testing.assert_allclose(ours['paper'][0, prefix:], want, atol=1e-5)
  torch = pytest.importorskip('torch')
  for method in ('bilinear', 'bicubic'):
    want = torch.nn.functional.interpolate(
      torch.tensor(table).permute(2, 0, 1)[None], after, mode=method, antialias=True
    )
    want = want[0].permute(1, 2, 0).reshape(-1, 7)
    np.testing.assert_allclose(ours[method][0, prefix:], want, atol=1e-5)


@pytest.mark.slow
def test_load_adapts_to_another_grid_and_other_classes():
  own = vit_jax.load(source('timm_dinov2_registers'))
  loaded = vit_jax.load(source('timm_dinov2_registers'), grid=(3, 4), num_classes=7)
  assert loaded.preprocessing.size == (42, 56) and loaded.class_names is None
  assert loaded.params['pos_embedding'].shape == (
    1,
    12,
    24,
  )  # no_embed_class: only patches have positions
  assert not np.any(loaded.params['head']['kernel']) and not np.any(loaded.params['head']['bias'])
  assert set(loaded.ignored) == {'head/kernel', 'head/bias'}
  assert logits(loaded, np.ones((1, 42, 56, 3), np.float32)).shape == (1, 7)
  assert equal(loaded.params['block_0'], own.params['block_0'])


def test_a_new_head_also_replaces_the_pre_logits():
  loaded = vit_jax.load(source('paper_prelogits'), num_classes=3)
  assert loaded.model.representation_size is None and 'pre_logits' not in loaded.params
  assert loaded.params['head']['kernel'].shape == (24, 3)
  assert 'pre_logits/kernel' in loaded.ignored
  same = vit_jax.load(source('paper_prelogits'), num_classes=5)
  assert same.model.representation_size == 20 and np.any(same.params['head']['kernel'])


@pytest.mark.slow
def test_a_file_without_a_head_gives_tokens_unless_num_classes_is_set():
  tokens = vit_jax.load(source('hf_backbone'))
  image = np.load(DATA / 'hf_backbone' / 'io.npz')['image']
  assert tokens.model.num_classes is None and logits(tokens, image).shape == (2, 5, 24)
  assert tokens.ignored == ('pooler.dense.bias', 'pooler.dense.weight')
  headed = vit_jax.load(source('hf_backbone'), num_classes=4)
  assert headed.model.pool == 'cls' and logits(headed, image).shape == (2, 4)


def test_a_grid_that_is_not_square_must_be_given():
  with pytest.raises(ValueError, match='8 patches, which do not form a square grid. Pass'):
    vit_jax.load(source('paper_gap'))
  with pytest.raises(ValueError, match='do not form a square'):
    vit_jax.load(source('paper_gap'), grid=(3, 3))
  with pytest.raises(ValueError, match=r'source_grid \(3, 4\) has 12 patches.* 8 '):
    vit_jax.load(source('paper_gap'), grid=(3, 3), source_grid=(3, 4))
  with pytest.raises(ValueError, match='expected a tuple .patches down'):
    vit_jax.load(source('paper_gap'), grid=4)
  loaded = vit_jax.load(source('paper_gap'), grid=(4, 2), source_grid=(2, 4))
  own = vit_jax.load(source('paper_gap'), grid=(2, 4))
  want = positions.resize_positions(own.params['pos_embedding'], (2, 4), (4, 2), 0)
  assert np.array_equal(loaded.params['pos_embedding'], want)
  # The 16 positions of `paper_token` are a square grid, also for images with 2 x 8 patches.
  token = vit_jax.load(source('paper_token'), grid=(2, 8)).params['pos_embedding']
  square = vit_jax.load(source('paper_token')).params['pos_embedding']
  assert np.array_equal(token, positions.resize_positions(square, (4, 4), (2, 8), 1))
  kept = vit_jax.load(source('paper_token'), grid=(2, 8), source_grid=(2, 8))
  assert np.array_equal(kept.params['pos_embedding'], square)
  with pytest.raises(
    ValueError, match='image has 4 patches, but the position embeddings are for 8'
  ):
    logits(own, np.zeros((1, 16, 16, 3)))


@pytest.mark.slow
def test_a_loaded_model_refuses_another_grid_with_the_same_number_of_patches(trained, tmp_path):
  for own, size in (
    (vit_jax.load(source('paper_gap'), grid=(2, 4)), (32, 16)),
    (vit_jax.load(trained[0], grid=(4, 4)), (8, 32)),
  ):
    right = np.zeros((1, *own.preprocessing.size, 3), np.float32)
    assert logits(own, right).shape == (1, own.model.num_classes)
    with pytest.raises(ValueError, match=r'has \dx\d patches, but the position embeddings are for'):
      logits(own, np.zeros((1, *size, 3), np.float32))
  wide = vit_jax.load(trained[0], grid=(2, 8))
  vit_jax.save(*wide, tmp_path, format='timm')  # the image size follows from the model's grid
  assert vit_jax.load(tmp_path).preprocessing.size == (8, 32)


@pytest.mark.slow
def test_a_workdir_and_its_checkpoints_load(trained):
  workdir, result = trained
  loaded = vit_jax.load(workdir)
  step = vit_jax.load(workdir / 'checkpoints' / str(result['steps']))
  assert equal(loaded.params, step.params)
  assert loaded.class_names[:1] == ('pattern 0',) and loaded.preprocessing.size == (8, 8)
  earlier = vit_jax.load(workdir / 'checkpoints' / '16')
  assert not equal(loaded.params, earlier.params)
  wider = vit_jax.load(workdir, grid=(3, 5), num_classes=4)
  assert logits(wider, np.zeros((1, 12, 20, 3))).shape == (1, 4)


# Names and configs.


def test_timms_names_stand_for_its_arguments():
  reference = json.loads((DATA / 'timm_names.json').read_text())
  assert len(reference) > 130
  assert {name: timm_names.arguments_of(name) for name in reference} == reference


def test_the_saved_timm_mlp_ratio_gives_the_exact_mlp_width(tmp_path):
  assert int(28 * (61 / 28)) == 60  # timm rounds down
  model = ViT(None, (4, 4), width=28, depth=1, num_heads=2, mlp_dim=61)
  shapes = layouts.param_shapes(model, (8, 8, 3))
  params = layouts.unflatten_params({name: np.zeros(shape, 'f4') for name, shape in shapes.items()})
  vit_jax.save(model, params, tmp_path, format='timm')
  config = json.loads((tmp_path / 'config.json').read_text())
  assert int(28 * config['model_args']['mlp_ratio']) == 61


def timm_folder(tmp_path, fields, drop=('model_args',)):
  """Copies timm_token with another config."""
  config = json.loads((DATA / 'timm_token' / 'config.json').read_text())
  for key in drop:
    config.pop(key)
  shutil.copy(DATA / 'timm_token' / 'model.safetensors', tmp_path)
  (tmp_path / 'config.json').write_text(json.dumps(config | fields))
  return tmp_path


def hf_folder(tmp_path, **fields):
  """Copies hf_classifier with another config."""
  config = json.loads((DATA / 'hf_classifier' / 'config.json').read_text()) | fields
  shutil.copy(DATA / 'hf_classifier' / 'model.safetensors', tmp_path)
  (tmp_path / 'config.json').write_text(json.dumps(config))
  return tmp_path


ARGS = json.loads((DATA / 'timm_token' / 'config.json').read_text())['model_args']


@pytest.mark.parametrize('changed, message', [
    (dict(embed_dim=48), r'has shape \(32, 3, 4, 4\), expected \(48, 3, 4, 4\)'),
    (dict(depth=3), 'blocks.2.*missing'),
    (dict(depth=1), 'blocks.1.*not part of the model'),
    (dict(num_heads=3), 'not divisible'),
    (dict(img_size=24), 'has 36 patches, but the file has positions for 16'),
    (dict(qkv_bias=False), 'qkv.bias: not part of the model'),
    (dict(qk_norm=True), 'q_norm.*missing'),
    (dict(final_norm=False), 'final_norm=False'),
    (dict(norm_layer='rmsnorm'), "norm_layer='rmsnorm'"),
    (dict(act_layer='relu'), "act_layer: unknown 'relu'"),
    (dict(global_pool='avgmax'), "global_pool: unknown 'avgmax'"),
    (dict(block_fn='parallel'), "unsupported argument 'block_fn'"),
    (dict(num_classes=9), r'has shape \(4, 32\), expected \(9, 32\)'),
    (dict(embed_dim='wide'), 'or its value is wrong'),
    (dict(num_classes='4'), "num_classes is '4', expected int"),
    (dict(patch_size=[4, 4, 4]), 'config.json: patch_size: expected one or two positive integers'),
])  # fmt: skip
def test_every_timm_argument_is_used_or_refused(changed, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    vit_jax.load(timm_folder(tmp_path, dict(model_args=ARGS | changed)))


@pytest.mark.parametrize('changed, warns', [
  ({}, True), (dict(tag='merged2b_ft_in1k'), False), (dict(label_names=list('abcd')), False),
  (dict(num_classes=512), False),
])  # fmt: skip
def test_an_embedding_of_eva_clip_is_reported(changed, warns, tmp_path, caplog):
  shutil.copytree(DATA / 'timm_eva02', tmp_path, dirs_exist_ok=True)
  config = json.loads((tmp_path / 'config.json').read_text())
  config['pretrained_cfg'] = dict(tag='merged2b', num_classes=4) | changed
  (tmp_path / 'config.json').write_text(json.dumps(config))
  reader.read_weights(str(tmp_path))
  assert ('4 outputs of the head are an embedding of CLIP' in caplog.text) == warns


def test_an_unknown_timm_architecture_is_refused(tmp_path):
  with pytest.raises(ValueError, match="unknown architecture 'vit_base_patch16_xp_224'"):
    vit_jax.load(timm_folder(tmp_path, dict(architecture='vit_base_patch16_xp_224')))


@pytest.mark.parametrize('changed, message', [
    (dict(hidden_size=48), r'expected'),
    (dict(num_hidden_layers=3), 'layer.2.*missing'),
    (dict(qkv_bias=False), 'query.bias: not part of the model'),
    (dict(hidden_act='relu'), "hidden_act: unknown 'relu'"),
    (dict(model_type='swin'), "model_type: unknown 'swin'"),
    (dict(architectures=['ViTForMaskedImageModeling']), "architecture: unknown 'ViTForMasked"),
    (dict(architectures=['DeiTModel']), 'model_type=vit does not fit the architecture DeiTModel'),
    (dict(use_rope=True), 'unsupported fields: use_rope'),
    (dict(rope=0), 'unsupported fields: rope'),
    (dict(image_size=24), 'has 36 patches'),
    (dict(id2label={'0': 'a', '1': 'b'}), r'has shape \(4, 32\), expected \(2, 32\)'),
    (dict(num_attention_heads='2'), 'unexpected value'),
    (dict(layer_norm_eps='1e-12'), "layer_norm_eps is '1e-12', expected float"),
    (dict(patch_size=0), 'config.json: patch_size: expected one or two positive integers'),
    (dict(id2label={'0': 'a', '1': 'b', '2': 'c', 'x': 'd'}), 'expected the ids 0 to 3'),
])  # fmt: skip
def test_every_hugging_face_field_is_used_or_refused(changed, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    vit_jax.load(hf_folder(tmp_path, **changed))


def test_names_of_hugging_face_classes_are_in_the_order_of_numbers():
  names = tuple(f'bird {i}' for i in range(12))  # as texts, 10 and 11 come before 2
  assert hf.class_names({str(i): name for i, name in enumerate(names)}, 'file') == names


def test_the_hugging_face_config_decides_the_model(tmp_path):
  labels = {str(i): f'bird {i}' for i in reversed(range(4))}
  loaded = vit_jax.load(hf_folder(tmp_path, hidden_act='gelu_new', id2label=labels))
  assert loaded.model.activation == 'gelu_tanh' and loaded.model.norm_epsilon == 1e-12
  assert loaded.class_names == ('bird 0', 'bird 1', 'bird 2', 'bird 3')
  assert (
    vit_jax.load(source('hf_classifier')).class_names is None
  )  # LABEL_0, ... are not real names
  vit_jax.save(*loaded, tmp_path / 'out', format='hf', class_names=loaded.class_names)
  assert vit_jax.load(tmp_path / 'out').class_names == loaded.class_names
  processor = dict(
    size={'shortest_edge': 20}, crop_size={'height': 16, 'width': 16}, resample=3,
    do_center_crop=True, image_mean=[0.1, 0.2, 0.3], image_std=[1, 2, 3],
  )  # fmt: skip
  (tmp_path / 'preprocessor_config.json').write_text(json.dumps(processor))
  assert vit_jax.load(tmp_path).preprocessing == Preprocessing(
    (16, 16), (0.1, 0.2, 0.3), (1, 2, 3), 'bicubic', 0.8, False
  )


HF_FIELDS = dict(  # fields of the Hub's configs, without effect here
  attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0, initializer_range=0.02,
  torch_dtype='float32', transformers_version='4.42.0', encoder_stride=16, hidden_act='gelu',
  _attn_implementation_autoset=True, tie_word_embeddings=True, pruned_heads={},
  _commit_hash='f' * 40, _num_labels=4, gradient_checkpointing=True, padding='max_length',
  of_another_version=None, used_by_others=False,
)  # fmt: skip
DINO_FIELDS = dict(
  apply_layernorm=True, drop_path_rate=0.0, image_size=518, mlp_ratio=4, layerscale_value=1.0,
  out_features=['stage12'], out_indices=[12], patch_size=14, reshape_hidden_states=True,
  stage_names=['stem', 'stage1'], use_swiglu_ffn=False, layer_norm_eps=1e-6,
)  # fmt: skip
DINO_PROCESSOR = dict(
  size={'shortest_edge': 256}, crop_size={'height': 224, 'width': 224}, resample=3,
  do_center_crop=True, do_convert_rgb=True, image_mean=[0.485, 0.456, 0.406],
  image_std=[0.229, 0.224, 0.225],
)  # fmt: skip


@pytest.mark.parametrize('kind, architecture, fields', [
    ('vit', 'ViTModel', dict(layer_norm_eps=1e-12, qkv_bias=True)),
    ('deit', 'DeiTForImageClassificationWithTeacher', dict(layer_norm_eps=1e-12)),
    ('dinov2', 'Dinov2Model', DINO_FIELDS),
    ('dinov2_with_registers', 'Dinov2WithRegistersModel',
     DINO_FIELDS | dict(num_register_tokens=4, interpolate_antialias=True,
                        interpolate_offset=0.0)),
])  # fmt: skip
def test_configs_from_the_hub_are_read(kind, architecture, fields, tmp_path):
  config = HF_FIELDS | dict(model_type=kind, architectures=[architecture]) | fields
  (tmp_path / 'preprocessor_config.json').write_text(json.dumps(DINO_PROCESSOR))
  found = hf.read_hf(tmp_path, config, {})
  registers = {'deit': 1, 'dinov2_with_registers': 4}.get(kind, 0)
  assert found.fields['width'] == 768 and found.fields.get('num_registers', 0) == registers
  patches = found.preprocessing.size[0] / found.fields['patch_size'][0]
  assert patches == (16 if 'dino' in kind else 14)  # 224 pixels, though positions are for 518
  assert found.grid == ((37, 37) if 'dino' in kind else (14, 14))
  assert found.preprocessing.crop == 224 / 256


NESTED = '[' * 100_000 + ']' * 100_000  # deeper than Python's parser of JSON can follow


@pytest.mark.parametrize('name, file', [
    ('hf_backbone', 'config.json'), ('hf_backbone', 'preprocessor_config.json'),
    ('hf_backbone', reader.INDEX), ('timm_token', 'config.json'),
])  # fmt: skip
def test_a_json_file_that_is_nested_too_deeply_is_refused(name, file, tmp_path):
  folder = shutil.copytree(DATA / name, tmp_path / name)
  (folder / file).write_text(f'{{"architecture": {NESTED}}}')
  message = rf'/{re.escape(file)}: not valid JSON .*recursion'
  with pytest.raises(ValueError, match=message) as raised:
    vit_jax.load(folder)
  assert '\n' not in str(raised.value)


@pytest.mark.parametrize('name, key, value, message', [
    ('hf_backbone', 'num_hidden_layers', 10**9, '1,000,000,000 blocks, .* has only 40 arrays'),
    ('timm_token', 'depth', 10**9, 'the model has 1,000,000,000 blocks, .* has only 32 arrays'),
    ('hf_backbone', 'intermediate_size', 10**10, r'block_0/mlp/down/kernel .* \(10000000000, 24\)'),
    ('hf_backbone', 'num_channels', 10**9, r'embedding/kernel .* have only 28,992 numbers'),
    ('timm_token', 'embed_dim', 10**9, 'block_0/.* together have only'),
    ('timm_token', 'mlp_ratio', 10**9, 'block_0/mlp/down/kernel .* together have only'),
])  # fmt: skip
def test_a_config_of_a_huge_model_is_refused_at_once(name, key, value, message, tmp_path):
  folder = shutil.copytree(DATA / name, tmp_path / name)
  config = json.loads((folder / 'config.json').read_text())
  config.get('model_args', config)[key] = value
  (folder / 'config.json').write_text(json.dumps(config))
  with pytest.raises(ValueError, match=message) as raised:
    vit_jax.load(folder)
  assert str(raised.value).startswith(str(folder)) and '\n' not in str(raised.value)
  save_file({}, folder / 'model.safetensors')
  with pytest.raises(ValueError, match=f'{name}: found no arrays in the safetensors files'):
    vit_jax.load(folder)


@pytest.mark.parametrize('processor, message', [
    ('{', 'preprocessor_config.json: not valid JSON'),
    ({'size': 16}, "preprocessor_config.json: a key is missing, .* .KeyError.'image_mean'"),
    ({'image_mean': [0.5], 'image_std': [0.0]}, 'std must be positive'),
    ({'image_mean': [0.5, 0.5], 'image_std': [1.0]}, 'mean: expected 1 or 3 numbers'),
    ({'image_mean': [0.5], 'image_std': [1.0], 'rescale_factor': 1}, 'pixels must be scaled by'),
    ({'image_mean': [0.5], 'image_std': [1.0], 'resample': 7}, 'resample: unknown 7. Valid: 0, 1,'),
    ({'image_mean': [0.5], 'image_std': [1.0], 'size': 0, 'crop_size': 8}, 'ZeroDivision'),
])  # fmt: skip
def test_an_invalid_image_processor_is_refused(processor, message, tmp_path):
  text = processor if isinstance(processor, str) else json.dumps(processor)
  (hf_folder(tmp_path) / 'preprocessor_config.json').write_text(text)
  with pytest.raises(ValueError, match=message):
    vit_jax.load(tmp_path)


def test_older_timm_configs_without_nesting_are_read(tmp_path):
  flat = dict(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], interpolation='bilinear', crop_pct=0.9)
  fields = flat | dict(model_args=ARGS, labels=['a', 'b', 'c', 'd'])
  loaded = vit_jax.load(timm_folder(tmp_path, fields, drop=('pretrained_cfg',)))
  p = loaded.preprocessing
  assert (p.mean, p.std, p.interpolation) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 'bilinear')
  assert p.crop == 0.9 and loaded.class_names == ('a', 'b', 'c', 'd')
  for broken, message in (
    (dict(crop_pct=9), 'at most 1'),
    (dict(interpolation='random'), "interpolation: unknown 'random'"),
    (dict(labels=['a', 'b']), '2 class names for 4 classes'),
    (dict(labels={'a': 0}), 'expected a list'),
  ):
    timm_folder(tmp_path, fields | broken, drop=('pretrained_cfg',))
    with pytest.raises(ValueError, match=message):
      vit_jax.load(tmp_path)


def test_class_names_beside_the_nested_config_of_timm_are_read(tmp_path):
  about = json.loads((DATA / 'timm_token' / 'config.json').read_text())['pretrained_cfg']
  nested = {name: value for name, value in about.items() if name not in ('label_names', 'labels')}
  fields = dict(pretrained_cfg=nested, label_names=['a', 'b', 'c', 4], model_args=ARGS)
  assert vit_jax.load(timm_folder(tmp_path, fields)).class_names == ('a', 'b', 'c', '4')


def test_missing_timm_preprocessing_takes_timm_defaults(tmp_path):
  folder = timm_folder(tmp_path, {'model_args': ARGS}, drop=('pretrained_cfg',))
  p = vit_jax.load(folder).preprocessing
  assert (p.interpolation, p.crop, p.stretch) == ('bicubic', 0.875, False)
  assert (p.mean, p.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


# Bad input.


def test_missing_files_and_files_that_can_run_code_are_refused(tmp_path):
  with pytest.raises(ValueError, match='no such file or folder'):
    vit_jax.load('absent.npz')
  name = 'vit_base_patch16_224.augreg_in21k'
  with pytest.raises(ValueError, match=f"For timm's weights, write timm/{name}."):
    vit_jax.load(name)
  (tmp_path / 'pytorch_model.bin').write_bytes(b'')
  with pytest.raises(ValueError, match='can run code'):
    vit_jax.load(tmp_path / 'pytorch_model.bin')
  found = 'found no weights.*the folder holds pytorch_model.bin. Pickled files can run code'
  with pytest.raises(ValueError, match=found):
    vit_jax.load(tmp_path)
  np.savez(tmp_path / 'weights.npz', **{'embedding/kernel': np.array([{}], object)})
  with pytest.raises(ValueError, match='not an .npz file of plain arrays'):
    vit_jax.load(tmp_path / 'weights.npz')
  np.savez(tmp_path / 'weights.npz', a=np.zeros(3))
  with pytest.raises(
    ValueError, match='embedding/kernel is missing. The file has 1 other arrays, such as a'
  ):
    vit_jax.load(tmp_path / 'weights.npz')


@pytest.mark.parametrize('left, message', [
    ('config.json', 'the folder holds config.json. Pickled files can run code'),  # as on the Hub
    ('model.safetensors', 'the folder holds model.safetensors. The file config.json is missing.'),
])  # fmt: skip
def test_a_folder_without_one_of_its_two_files_is_refused(left, message, tmp_path):
  shutil.copy(DATA / 'hf_classifier' / left, tmp_path)
  with pytest.raises(ValueError, match=message):
    vit_jax.load(tmp_path)


def changed_arrays(change):
  arrays = npz.read_arrays(source('paper_token'))
  change(arrays)
  return arrays


QUERY = 'Transformer/encoderblock_1/MultiHeadDotProductAttention_1/query/kernel'


@pytest.mark.parametrize('change, message', [
    (lambda a: a.pop(QUERY), f'{QUERY}: missing'),
    (lambda a: a.pop('Transformer/posembed_input/pos_embedding'), 'pos_embedding: missing'),
    (lambda a: a.pop('head/bias'), 'head/bias: missing'),
    (lambda a: a.pop('cls'), '17 patches, which do not form a square grid'),
    (lambda a: a.update(extra=np.zeros(3)), 'extra: not part of the model'),
    (lambda a: a.update({QUERY: a[QUERY].astype(np.int32)}), 'has type int32'),
    (lambda a: a.update({QUERY: a[QUERY] + 1j}), 'has type complex'),
    (lambda a: a.update({QUERY: a[QUERY] * np.nan}), 'not finite'),
    (lambda a: a.update({QUERY: a[QUERY].T}), 'has shape .*, expected'),
    (lambda a: a.update({QUERY.replace('_1/M', '_0/M'): np.zeros(3)}), 'expected 3 axes'),
])  # fmt: skip
def test_the_error_lists_arrays_that_do_not_match_the_model(change, message, tmp_path):
  np.savez(tmp_path / 'weights.npz', **changed_arrays(change))
  with pytest.raises(ValueError, match=message):
    vit_jax.load(tmp_path)


def refused_or_the_same(path, whole):
  """Loads a damaged file: returns True if it is refused, and fails if a different model loads."""
  try:
    loaded = vit_jax.load(path)
  except ValueError as error:
    assert str(path.parent) in str(error) and len(str(error)) > len(str(path)) + 20
    return True
  assert equal(loaded.params, whole.params) and loaded.model == whole.model
  return False


def test_a_damaged_npz_is_refused(tmp_path):
  data, draw = source('paper_token').read_bytes(), np.random.RandomState(0)
  whole, path = vit_jax.load(source('paper_token')), tmp_path / 'weights.npz'
  refused = 0
  for _ in range(30):
    damaged = bytearray(data)
    where = draw.randint(len(data))
    damaged[where] ^= 1 << draw.randint(8)
    path.write_bytes(damaged)
    refused += refused_or_the_same(path, whole)
  assert refused >= 25  # the other changes hit bytes without meaning, such as a date
  for length in (0, 1, 100, len(data) // 2, len(data) - 1):
    path.write_bytes(data[:length])
    assert refused_or_the_same(path, whole)


def test_a_damaged_safetensors_header_is_refused(tmp_path):
  shutil.copytree(source('timm_token'), tmp_path, dirs_exist_ok=True)
  path = tmp_path / 'model.safetensors'
  data, draw = path.read_bytes(), np.random.RandomState(0)
  whole, (header,) = vit_jax.load(source('timm_token')), struct.unpack('<Q', data[:8])
  refused = 0
  for _ in range(30):
    damaged = bytearray(data)
    damaged[draw.randint(8 + header)] ^= 1 << draw.randint(8)
    path.write_bytes(damaged)
    refused += refused_or_the_same(path, whole)
  assert refused >= 25
  for length in (0, 7, 8 + header // 2, 8 + header, len(data) - 1):
    path.write_bytes(data[:length])
    assert refused_or_the_same(path, whole)


def test_a_safetensors_array_that_is_not_floating_point_is_refused(tmp_path):
  shutil.copytree(source('timm_token'), tmp_path, dirs_exist_ok=True)
  arrays = load_file(tmp_path / 'model.safetensors')
  arrays['norm.weight'] = arrays['norm.weight'].astype(np.int64)
  save_file(arrays, tmp_path / 'model.safetensors')
  with pytest.raises(ValueError, match='norm.weight: has type int64'):
    vit_jax.load(tmp_path)


def test_weights_split_into_several_files_load(tmp_path):
  shutil.copytree(source('hf_classifier'), tmp_path, dirs_exist_ok=True)
  arrays = load_file(tmp_path / 'model.safetensors')
  (tmp_path / 'model.safetensors').unlink()
  parts = {'model-1.safetensors': {}, 'model-2.safetensors': {}}
  index = {}
  for i, (name, array) in enumerate(arrays.items()):
    index[name] = list(parts)[i % 2]
    parts[index[name]][name] = array
  for name, part in parts.items():
    save_file(part, tmp_path / name)
  (tmp_path / reader.INDEX).write_text(json.dumps({'weight_map': index}))
  assert equal(vit_jax.load(tmp_path).params, vit_jax.load(source('hf_classifier')).params)
  (tmp_path / 'model-2.safetensors').unlink()
  with pytest.raises(ValueError, match='model-2.safetensors'):
    vit_jax.load(tmp_path)


def test_other_safetensors_files_next_to_the_model_are_not_read(tmp_path):
  shutil.copytree(source('hf_classifier'), tmp_path, dirs_exist_ok=True)
  arrays = load_file(tmp_path / 'model.safetensors')
  older = {name: 2 * array for name, array in arrays.items()}
  save_file(older, tmp_path / 'older.safetensors')
  assert equal(vit_jax.load(tmp_path).params, vit_jax.load(source('hf_classifier')).params)


def test_saving_refuses_unknown_formats_and_wrong_parameters(tmp_path):
  model, params = vit_jax.load(source('paper_token'))
  with pytest.raises(ValueError, match="format: unknown 'tflite'"):
    vit_jax.save(model, params, tmp_path, format='tflite')
  with pytest.raises(ValueError, match='head/bias: missing in the weights'):
    broken = params | {'head': {'kernel': params['head']['kernel']}}
    vit_jax.save(model, broken, tmp_path, format='npz')
  with pytest.raises(ValueError, match='2 class names for 5 classes'):
    vit_jax.save(model, params, tmp_path, format='hf', class_names=('a', 'b'))
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='is a file'):
    vit_jax.save(model, params, tmp_path / 'file', format='npz')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['file']


def test_saving_npz_warns_about_values_that_it_cannot_store(tmp_path, monkeypatch):
  warnings = []
  monkeypatch.setattr(npz.log, 'warning', lambda text, *values: warnings.append(text % values))
  loaded = vit_jax.load(source('paper_token'))
  vit_jax.save(*loaded, tmp_path, format='npz', preprocessing=loaded.preprocessing)
  assert not warnings
  other = dataclasses.replace(loaded.preprocessing, mean=(0.2,), crop=0.9)
  vit_jax.save(*loaded, tmp_path, format='npz', preprocessing=other, class_names=tuple('abcde'))
  (text,) = warnings
  assert all(part in text for part in ('5 class names', 'mean (0.2,)', 'crop 0.9'))


def test_saving_does_not_touch_a_folder_with_other_files(tmp_path):
  loaded = vit_jax.load(source('timm_token'))
  for name in (
    'checkpoints',
    'metrics.jsonl',
    'model-1.safetensors',
    'other.npz',
    reader.INDEX,
  ):
    folder = tmp_path / name
    (folder / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=f'already holds {name}'):
      vit_jax.save(*loaded, folder, format='timm')
    assert [file.name for file in folder.iterdir()] == [name]
  for _ in range(2):  # files of an earlier save are replaced
    vit_jax.save(*loaded, tmp_path / 'out', format='timm')


@pytest.mark.slow
def test_exporting_weights_without_a_head_keeps_their_pooling(tmp_path):
  config = json.loads((DATA / 'timm_map' / 'config.json').read_text())
  config['num_classes'] = config['model_args']['num_classes'] = 0
  arrays = load_file(DATA / 'timm_map' / 'model.safetensors')
  arrays = {name: x for name, x in arrays.items() if not name.startswith('head.')}
  save_file(arrays, tmp_path / 'model.safetensors')
  (tmp_path / 'config.json').write_text(json.dumps(config))
  exporting.export(tmp_path, 'timm', tmp_path / 'out')
  again = load_file(tmp_path / 'out' / 'model.safetensors')
  assert all(np.array_equal(again[name], arrays[name]) for name in arrays | again)
  image = np.load(DATA / 'timm_map' / 'io.npz')['image']
  assert logits(vit_jax.load(tmp_path / 'out'), image).ndim == 3  # tokens
  assert logits(vit_jax.load(tmp_path / 'out', num_classes=5), image).shape == (len(image), 5)


@pytest.mark.slow
def test_saving_refuses_preprocessing_that_hugging_face_cannot_do(tmp_path):
  loaded = vit_jax.load(source('hf_classifier'), grid=(2, 4))
  cut = Preprocessing((8, 16))
  with pytest.raises(ValueError, match='only crop squares, but the images are 8x16'):
    vit_jax.save(*loaded, tmp_path, format='hf', preprocessing=cut)
  vit_jax.save(*loaded, tmp_path, format='hf', preprocessing=loaded.preprocessing)
  grey = variants.make('tiny', 3, pool='cls', activation='gelu')
  params = init_params(grey, np.zeros((1, 8, 8, 1)))
  vit_jax.save(grey, jax.device_get(params), tmp_path / 'grey', format='hf')
  assert vit_jax.load(tmp_path / 'grey').preprocessing.mean == (0.5,)


@pytest.mark.slow
def test_hybrids_have_the_patch_size_of_their_names():
  for variant, patch in (('R50+B/16', 16), ('R50+L/32', 32), ('R26+S/32', 32), ('R+Ti/32', 32)):
    model = variants.make(variant, 10)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)['params']
    assert shapes['pos_embedding'].shape[1] == (224 // patch) ** 2 + 1
  with pytest.raises(ValueError, match='must be a multiple of 16'):
    variants.make('R50+B/8', 10)


def test_a_missing_image_processor_is_replaced_with_a_warning(caplog, tmp_path):
  vit_jax.load(hf_folder(tmp_path))
  (text,) = [row.getMessage() for row in caplog.records]
  assert text.startswith(f'{tmp_path}/preprocessor_config.json is missing. Using')
  assert 'mean=(0.5,)' in text and 'interpolation=bilinear' in text
  caplog.clear()
  about = {'image_mean': [0.5], 'image_std': [0.5], 'size': 16}
  (tmp_path / 'preprocessor_config.json').write_text(json.dumps(about))
  vit_jax.load(tmp_path)
  assert not caplog.records


def test_an_image_processor_without_a_filter_uses_bilinear_as_in_transformers():
  about = {'image_mean': [0.5], 'image_std': [0.5], 'size': 32}
  assert hf_config.processing(about, (32, 32), 'processor').interpolation == 'bilinear'


@pytest.mark.slow
def test_npz_refuses_an_epsilon_that_it_cannot_store(tmp_path):
  model = vit_jax.make('tiny', 3, norm_epsilon=1e-5)
  params = init_params(model, jnp.zeros((1, 8, 8, 3)))
  with pytest.raises(ValueError, match='norm_epsilon'):
    vit_jax.save(model, params, tmp_path, format='npz')


@pytest.mark.parametrize('pool', ['gap', 'map'])
def test_npz_refuses_a_class_token_that_the_pool_does_not_read(pool, tmp_path):
  model = vit_jax.make('tiny', 3, pool=pool, class_token=True)
  with pytest.raises(ValueError, match='model.class_token=True: only None, False can be written'):
    npz.save_npz(model, {}, tmp_path, Preprocessing((8, 8)), None)


def test_a_hybrid_keeps_its_embedding_at_its_own_patch_size():
  """Its embedding is for the feature map of the stem, which is smaller than a patch."""
  path = DATA / 'paper_hybrid' / 'weights.npz'
  model, params = vit_jax.load(path)
  _, same = vit_jax.load(path, patch_size=model.patch_size)
  _, opened = opening.from_init(str(path), {}, 'any')
  for found in (same, opened):
    np.testing.assert_array_equal(found['embedding']['kernel'], params['embedding']['kernel'])


def test_timm_refuses_a_gated_mlp_with_a_map_head(tmp_path):
  """One `mlp_ratio` of timm is for both MLPs, and the MLP of its pooling is never gated."""
  fields = dict(variant=None, patch_size=4, width=16, depth=1, num_heads=2, mlp_dim=32)
  for pool, refused in (('cls', False), ('map', True)):
    model = variants.make(num_classes=3, mlp='gated', activation='silu', pool=pool, **fields)
    params = init_params(model, np.zeros((1, 8, 8, 3), np.float32))
    with pytest.raises(ValueError, match='model.mlp') if refused else contextlib.nullcontext():
      vit_jax.save(model, params, tmp_path / pool, format='timm')


@pytest.mark.parametrize('processor, want', [
    (dict(do_normalize=False), dict(mean=(0.0,), std=(1.0,))),
    (dict(do_center_crop=False, crop_size=8, size={'height': 24, 'width': 32}),
     dict(size=(24, 32), crop=1.0, stretch=True)),
    (dict(default_to_square=False, size=256), dict(size=(16, 16), crop=1.0, stretch=False)),
    (dict(size={'height': 30, 'width': 40}, crop_size={'height': 24, 'width': 32}),
     dict(size=(24, 32), crop=0.8, stretch=True)),
])  # fmt: skip
def test_an_image_processor_can_leave_out_steps(processor, want):
  about = {'image_mean': [0.1] * 3, 'image_std': [0.2] * 3} | processor
  found = hf_config.processing(about, (16, 16), 'processor')
  assert {name: getattr(found, name) for name in want} == want


def test_written_configs_give_height_and_width_in_the_order_of_their_library():
  p = Preprocessing((24, 32), (0.1,), (0.2,), 'box', 0.8, stretch=True)
  found = hf_config.processor_config(p, 3)
  assert found['size'] == {'height': 30, 'width': 40} and found['resample'] == 4
  assert found['crop_size'] == {'height': 24, 'width': 32} and found['do_center_crop']
  assert (found['image_mean'], found['image_std']) == ([0.1] * 3, [0.2] * 3)
  found = timm.pretrained_cfg(p, 3, 5)
  assert found['input_size'] == [3, 24, 32] and found['crop_mode'] == 'squash'
  assert (found['mean'], found['std'], found['crop_pct']) == ([0.1] * 3, [0.2] * 3, 0.8)


@pytest.mark.parametrize('name, sizes', [('hf_deit', (28, 7)), ('hf_dinov3', ([28, 42], 7))])
def test_written_configs_give_one_number_for_squares(name, sizes, tmp_path):
  loaded = vit_jax.load(source(name))
  vit_jax.save(*loaded, tmp_path, format='hf', preprocessing=loaded.preprocessing)
  config = json.loads((tmp_path / 'config.json').read_text())
  assert (config['image_size'], config['patch_size']) == sizes


def test_processors_of_grey_images_do_not_convert_to_colour():
  for channels in (1, 3):
    found = hf_config.processor_config(Preprocessing((8, 8), crop=0.9), channels)
    assert found['do_convert_rgb'] == (channels == 3)
