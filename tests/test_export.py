"""Exports run elsewhere: in fresh processes, most of them without this package."""

import json
import os
import re
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from tests.conftest import DATA, small_config
from tests.test_main import call, error
import vit_jax
from vit_jax import card, export, image, positions, pretrained, vit, weights

ONNX = 'needs requirements-onnx.txt'
# Imports nothing but what the packages named need.
WITHOUT = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path=None, target=None):
    if name.split('.')[0] in {BLOCKED}:
      raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
"""
OURS = {'vit_jax', 'main', 'tests', 'flax', 'optax', 'orbax', 'ml_collections', 'clu', 'safetensors'}


def run(code, folder, blocked=OURS):
  """stdout of Python code that is run by itself, in a folder, where some packages are missing."""
  head = WITHOUT.replace('{BLOCKED}', repr(blocked)) if blocked else ''
  paths = [p for p in sys.path if 'site-packages' not in p or not blocked]
  # -I leaves PYTHONPATH out, which may be where the packages are that are not blocked.
  paths = [os.path.abspath(p) for p in os.environ.get('PYTHONPATH', '').split(os.pathsep) if p]
  code = f'import sys; sys.path += {paths}\n{head}\n{code}'
  command = [sys.executable, '-I', '-c', code]
  env = os.environ | {'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done.stdout


def program(format):
  """Code that saves what an export gives for `images.npy`."""
  if format == 'stablehlo':
    return (
      'import jax.export, numpy as np\n'
      "model = jax.export.deserialize(bytearray(open('model.stablehlo', 'rb').read()))\n"
      "np.save('out.npy', model.call(np.load('images.npy')))"
    )
  return (
    'import numpy as np, onnxruntime\n'
    "model = onnxruntime.InferenceSession('model.onnx')\n"
    "np.save('out.npy', model.run(None, {'image': np.load('images.npy')})[0])"
  )


def outputs(format, folder, image_BHWC):
  """What an export gives in a process of its own."""
  np.save(folder / 'images.npy', image_BHWC)
  run(program(format), folder, OURS if format == 'stablehlo' else OURS | {'jax', 'jaxlib'})
  return np.load(folder / 'out.npy')


def normalized(image_BHWC, p):
  """As NumPy does it."""
  pixels = image_BHWC / 255
  return ((pixels - np.array(p.mean)) / np.array(p.std)).astype(np.float32)


def images(p, channels, count=3):
  shape = (count, *(p.stored_size or p.size), channels)
  return np.random.RandomState(1).randint(0, 256, shape, np.uint8)


def random_model(image_shape=(8, 8, 3), **fields):
  """A model whose parameters are all random."""
  sizes = dict(width=16, depth=2, num_heads=2, mlp_dim=32, patch_size=(4, 4))
  model = vit_jax.make(None, 5, **sizes | fields)
  params = model.init(jax.random.key(0), jnp.zeros((1, *image_shape)))['params']
  keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(params)))
  noise = jax.tree.unflatten(jax.tree.structure(params), list(keys))
  add = lambda x, key: np.asarray(x + 0.3 * jax.random.normal(key, x.shape))
  return model, jax.tree.map(add, params, noise)


MODELS = {
  'class token, learned': dict(pool='cls', activation='gelu'),
  'GAP, sincos': dict(pool='gap', position='sincos', norm_after_pool=True),
  'MAP, rope': dict(pool='map', position='rope', num_registers=2, qk_norm=True, layer_scale=0.5),
  'hybrid': dict(resnet=(), resnet_width=32, representation_size=7, activation='quick_gelu'),
  'no head': dict(num_classes=None, pool='gap', pre_norm=True),
}


@pytest.mark.parametrize('format', ['stablehlo', 'onnx'])
@pytest.mark.parametrize('name', MODELS)
def test_programs_give_what_the_model_does(format, name, tmp_path):
  if format == 'onnx':
    pytest.importorskip('jax2onnx', reason=ONNX)
  fields = dict(MODELS[name])
  if 'num_classes' in fields:
    model, params = random_model(**{k: v for k, v in fields.items() if k != 'num_classes'})
    model, params = model.clone(num_classes=None), {k: v for k, v in params.items() if k != 'head'}
  else:
    model, params = random_model(**fields)
  p = weights.Preprocessing((8, 8), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
  vit_jax.save(model, params, tmp_path, format=format, preprocessing=p)
  image_BHWC = images(p, 3)
  want = model.apply({'params': params}, normalized(image_BHWC, p))
  for batch in (1, 3):  # any number of images
    found = outputs(format, tmp_path, image_BHWC[:batch])
    assert found.dtype == np.float32
    atol = (1e-5 if format == 'stablehlo' else 1e-4) * max(1, np.abs(want).max())
    np.testing.assert_allclose(found, want[:batch], atol=atol)


FIXTURES = ('paper_token', 'hf_classifier', 'timm_map', 'timm_avg_registers_qknorm_layerscale')


@pytest.mark.parametrize('format', ['stablehlo', 'onnx'])
@pytest.mark.parametrize('name', FIXTURES)
def test_programs_of_published_weights_give_what_the_original_does(format, name, tmp_path):
  if format == 'onnx':
    pytest.importorskip('jax2onnx', reason=ONNX)
  path = DATA / name / 'weights.npz'
  export.run(path if path.exists() else DATA / name, format, tmp_path / 'out')
  loaded = vit_jax.load(path if path.exists() else DATA / name)
  image_BHWC = images(loaded.preprocessing, 3)
  want = loaded.model.apply(
    {'params': loaded.params}, normalized(image_BHWC, loaded.preprocessing)
  )
  np.testing.assert_allclose(outputs(format, tmp_path / 'out', image_BHWC), want, atol=1e-4)
