"""Checks parameters split over eight devices: the numbers, the memory and the checkpoints."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.conftest import ROOT
from vit_jax.distributed import devices, sharding
from vit_jax.model import variants

HERE = pathlib.Path(__file__).parent
SPLIT = ['fsdp', 'fsdp_tensor', 'parts']


@pytest.fixture(scope='module')
def found(tmp_path_factory):
  command = [sys.executable, HERE / 'on_eight_devices.py', tmp_path_factory.mktemp('layouts')]
  path = {'PYTHONPATH': str(ROOT)}
  done = subprocess.run(command, capture_output=True, text=True, env=os.environ | path)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.slow_after_first
@pytest.mark.parametrize('name', SPLIT)
def test_split_model_trains_like_a_replicated_one(found, name):
  whole = found['replicated']
  np.testing.assert_allclose(found[name]['losses'], whole['losses'], rtol=1e-5)
  assert whole['losses'][-1] < whole['losses'][0] - 0.1
  for key, value in whole['scores'].items():
    np.testing.assert_allclose(found[name]['scores'][key], value, rtol=1e-5)
  assert found[name]['stays']  # the layout stays, so no step is compiled again


@pytest.mark.slow
def test_each_device_holds_only_its_share(found):
  whole, fsdp = found['replicated'], found['fsdp']
  assert whole['held'] == whole['all'] == fsdp['all']
  assert fsdp['held'] <= (fsdp['all'] - fsdp['small']) / 8 + fsdp['small']
  assert fsdp['small'] < fsdp['all'] / 10
  both = found['fsdp_tensor']  # nearly all arrays are halved twice
  assert both['held'] < 0.3 * both['all']


@pytest.mark.slow
def test_every_layout_restores_the_checkpoints_of_every_other(found):
  assert found['wrong'] == []


@pytest.mark.parametrize('name, mlp', [('B/16', 'plain'), ('g/14', 'plain'), ('B/16', 'gated')])
def test_all_large_arrays_of_published_models_are_split(name, mlp):
  model = variants.make(name, num_classes=1000, mlp=mlp)
  image = jax.ShapeDtypeStruct((1, 224, 224, 3), 'float32')
  params = jax.eval_shape(model.init, jax.random.key(0), image)['params']
  mesh = jax.sharding.AbstractMesh((2, 16, 4), devices.AXES)
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    spec = sharding.partition(mesh, path, x.shape)
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    assert x.ndim == 1 or ('fsdp' in spec) == (x.size >= sharding.SPLIT_FROM), name
    shares = [{None: 1, 'fsdp': 16, 'tensor': 4}[axis] for axis in spec]
    assert all(size % share == 0 for size, share in zip(x.shape, shares)), name
    last = ('query', 'key', 'value', 'out', 'gate', 'up', 'down')
    inside = name.startswith('block_') and name.split('/')[-2] in last
    assert ('tensor' in spec) == (inside and not name.endswith(('out/bias', 'down/bias'))), name
