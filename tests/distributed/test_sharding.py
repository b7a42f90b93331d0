"""Checks that parts of a batch on several devices give the same result as the whole batch."""

import re

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

from vit_jax.distributed import cluster, microbatch, sharding
from vit_jax.distributed import devices as devices_lib
from vit_jax.model import variants


@pytest.mark.parametrize(
  ('batch_size', 'tokens', 'width', 'parts'),
  [
    (256, 64, 48, 8),  # 16 images of 64 tokens on each of two devices
    (128, 64, 256, 4),
    (128, 64, 512, 2),  # best is 2,048 tokens for width 512
    (16, 196, 192, 2),
    (16, 196, 768, 1),  # 8 images per device: 1,568 tokens are nearest to 3,072
    (64, 196, 768, 2),
    (254, 64, 48, 1),  # 127 is prime: one part rather than 127
    (64, 16, 48, 1),
    (4, 4096, 48, 2),  # one image already has more tokens
    (46, 250, 48, 23),  # 23 is prime: 250 tokens are nearer to 1,024 than 23 times as many
  ],
)
def test_micro_batches_fit_the_cache(batch_size, tokens, width, parts):
  assert microbatch.micro_batches(devices_lib.make_mesh(2), batch_size, tokens, width) == parts


@pytest.mark.parametrize(
  ('batch_size', 'tokens', 'width', 'kept', 'parts'),
  [
    (256, 16, 128, 60_000, 4),  # 32 images: 64 images would keep 59 MiB
    (256, 9, 128, 60_000, 4),  # 32 images: 16 MiB
    (256, 64, 48, 26_000, 8),  # the activations of 1,024 tokens fit
    (128, 64, 256, 143_000, 4),  # 227 tokens would fit: fewer than the width
    (254, 64, 48, 100_000, 1),  # 127 is prime, and one image has too few tokens
  ],
)
def test_activations_fit_31_mib_if_tokens_suffice(batch_size, tokens, width, kept, parts):
  mesh = devices_lib.make_mesh(2)
  assert microbatch.micro_batches(mesh, batch_size, tokens, width, kept=kept) == parts


def test_a_micro_batch_keeps_mixed_pairs_together():
  mesh = devices_lib.make_mesh(2)  # 18 images on each device, and 9 of them fill a micro-batch
  assert microbatch.micro_batches(mesh, 36, tokens=114, width=48) == 2
  assert microbatch.micro_batches(mesh, 36, tokens=114, width=48, group=2) == 3


@pytest.mark.parametrize(('devices', 'parts'), [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_parts_give_the_result_of_the_whole_batch(devices, parts):
  mesh = devices_lib.make_mesh(devices)
  x = np.random.RandomState(0).normal(size=(12, 4)).astype(np.float32)
  matrix = jnp.arange(8.0).reshape(4, 2)
  sizes = []

  def rows(batch, matrix):
    sizes.append(len(batch['x']))
    return batch['x'] @ matrix

  def sums(batch, matrix):
    return {'sum': rows(batch, matrix).sum(axis=0), 'count': jnp.ones(len(batch['x'])).sum()}

  batch = jax.device_put({'x': x}, sharding.batch_sharding(mesh))
  each = jax.jit(microbatch.concatenate(rows, mesh, parts))(batch, matrix)
  np.testing.assert_allclose(each, x @ matrix, rtol=1e-4, atol=1e-5)
  total = jax.jit(microbatch.add_up(sums, mesh, parts))(batch, matrix)
  np.testing.assert_allclose(total['sum'], (x @ matrix).sum(axis=0), rtol=1e-4)
  assert total['count'] == 12 and set(sizes) == {12 // devices // parts}


@pytest.mark.parametrize('shape', [{'data': 2}, {'data': 1, 'fsdp': 2}, {'data': 1, 'tensor': 2}])
@pytest.mark.parametrize('parts', [1, 3])
def test_joined_rows_have_the_order_of_the_batch_on_any_mesh(shape, parts):
  mesh = devices_lib.make_mesh(2, shape=devices_lib.ALL_DATA | shape)
  batch = jax.device_put({'x': np.arange(12.0)}, sharding.batch_sharding(mesh))
  rows = lambda batch: {'same': batch['x'], 'pair': jnp.stack([batch['x'], -batch['x']], axis=1)}
  found = jax.jit(microbatch.concatenate(rows, mesh, parts))(batch)
  np.testing.assert_array_equal(found['same'], np.arange(12))
  np.testing.assert_array_equal(found['pair'], np.arange(12)[:, None] * [1, -1])


@pytest.mark.parametrize('count', [1, 2])
def test_devices_communicate_once_per_batch_and_a_single_one_never(count):
  """The compiled loop over micro-batches contains no communication."""
  mesh = devices_lib.make_mesh(count)
  loss = lambda batch, weights: jnp.tanh(batch @ weights).sum()
  gradient = microbatch.add_up(jax.grad(loss, argnums=1), mesh, parts=3)
  text = jax.jit(gradient).lower(jnp.ones((12, 4)), jnp.ones((4, 2))).compile().as_text()
  assert ' while(' in text and text.count(' all-reduce(') == (count > 1)
  assert count == 1 or text.index(' all-reduce(') > text.index('ENTRY')


def test_a_factored_optimizer_state_with_fewer_dimensions_is_placed():
  mesh = devices_lib.make_mesh(2, shape=devices_lib.ALL_DATA | {'data': 1, 'tensor': 2})
  params = {'query': {'kernel': jnp.zeros((8, 4, 2))}, 'up': {'kernel': jnp.zeros((8, 6))}}
  state = jax.eval_shape(optax.scale_by_factored_rms(min_dim_size_to_factor=8).init, params)
  specs = jax.tree.map(lambda x: x.spec, sharding.layout(mesh, state))
  assert specs.v['up']['kernel'] == PartitionSpec(None, 'tensor')
  assert specs.v_row['up']['kernel'] == PartitionSpec(None)  # shape (1,): it is not used


def test_cpu_mesh_size_depends_on_the_batch_size(monkeypatch):
  size = lambda *arguments, **shape: (
    devices_lib.make_mesh(*arguments, shape=devices_lib.ALL_DATA | shape).size
  )
  sizes = lambda: [size(32), size(64), size(65), size(64, 1, 64), size(32, tensor=2)]
  assert sizes() == [2, 2, 1, 1, 2]  # conftest has set two devices, as a user can
  assert devices_lib.inference_mesh(7).size == 2
  monkeypatch.setattr(devices_lib, '_one_per_core', True)
  assert sizes() == [1, 2, 1, 1, 2] and devices_lib.make_mesh().size == 2
  assert [devices_lib.inference_mesh(n).size for n in (1, 63, 64)] == [1, 1, 2]
  with monkeypatch.context() as on_gpu:  # `start_up` also runs there
    on_gpu.setattr(jax, 'default_backend', lambda: 'gpu')
    assert devices_lib.inference_mesh(1).size == 2
  monkeypatch.setattr(jax, 'process_count', lambda: 2)  # each process needs a device of the mesh
  assert devices_lib.inference_mesh(1).size == 2


def test_the_log_reports_when_a_batch_could_use_more_devices(monkeypatch):
  assert devices_lib.few_devices(128) is None  # the user, here conftest, has asked for two
  monkeypatch.setattr(devices_lib, '_one_per_core', True)
  monkeypatch.setattr(cluster, 'num_cores', lambda: 4)
  told = devices_lib.few_devices(128)
  assert 'started with 2 CPU device(s), but batch_size=128 would use 4. ' in told
  assert told.endswith('or set JAX_NUM_CPU_DEVICES=4.')
  assert 'would use 3. ' in devices_lib.few_devices(132, micro_batches=2, group=2)  # 33 pairs
  assert devices_lib.few_devices(128, micro_batches=32, group=2) is None  # 2 pairs
  assert devices_lib.few_devices(64) is None


@pytest.mark.parametrize('arguments, shape, message', [
    ((30, 4), {}, 'batch_size=30 must be a positive multiple of 4 (4 micro-batches).'),
    ((36, 4, 2), {}, 'batch_size=36 must be a positive multiple of 8 '
     '(4 micro-batches x 2, because images are mixed in pairs).'),
    ((6, 2), {'data': 2}, 'does not divide over 2 devices. Make batch_size a multiple of 4.'),
    ((12, 2, 2), {'data': 2}, 'does not divide over 2 devices. Make batch_size a multiple of 8 '
     '(2 devices x 2 micro-batches x 2, because images are mixed in pairs).'),
    ((10, 1, 2), {'data': 2}, 'multiple of 4 (2 devices x 2, because images are mixed in pairs).'),
    ((6, 2), {'fsdp': 2}, 'does not divide over 2 devices. Make batch_size a multiple of 4.'),
])  # fmt: skip
def test_an_indivisible_batch_error_names_the_multiple(arguments, shape, message):
  with pytest.raises(ValueError, match=re.escape(message) + '$'):
    devices_lib.make_mesh(*arguments, shape=devices_lib.ALL_DATA | shape)


def test_devices_that_a_requested_mesh_leaves_out_are_reported(caplog):
  assert devices_lib.make_mesh(7).size == 1  # the user asked for no mesh
  one = dict.fromkeys(devices_lib.AXES, 1)
  assert devices_lib.make_mesh(8, shape=one).size == 1 and not caplog.messages
  assert devices_lib.make_mesh(7, shape=devices_lib.ALL_DATA | {'fsdp': -1}).size == 1
  assert 'The mesh has only 1 of 2 devices, because batch_size=7 does' in caplog.text


# Shape of each array, and the mesh axes that split it: with `fsdp` alone, and with `tensor` too.
SPECS = {
  'embedding/kernel': ((4, 4, 3, 128), [None, None, None, 'fsdp'], [None, None, None, 'fsdp']),
  'embedding/bias': ((128,), [None], [None]),
  'pos_embedding': ((1, 65, 128), [None, None, 'fsdp'], [None, None, 'fsdp']),
  'block_0/attention/query/kernel': (
    (128, 4, 48), ['fsdp', None, None], ['fsdp', 'tensor', None]
  ),
  'block_0/attention/query/bias': ((4, 48), [None, None], ['tensor', None]),
  'block_0/attention/out/kernel': (
    (4, 48, 128), [None, None, 'fsdp'], ['tensor', None, 'fsdp']
  ),
  'block_0/attention/out/bias': ((128,), [None], [None]),
  'block_0/mlp/up/kernel': ((128, 512), [None, 'fsdp'], ['fsdp', 'tensor']),
  'block_0/mlp/up/bias': ((512,), [None], ['tensor']),
  'block_0/mlp/down/kernel': ((512, 128), ['fsdp', None], ['tensor', 'fsdp']),
  'block_0/mlp/down/bias': ((128,), [None], [None]),
  'block_0/mlp_norm/scale': ((128,), [None], [None]),
  'head/kernel': ((128, 1000), [None, 'fsdp'], [None, 'fsdp']),
  'head/bias': ((1000,), [None], [None]),
}  # fmt: skip


@pytest.mark.parametrize(('sizes', 'column'), [((1, 4, 1), 0), ((2, 4, 2), 1)])
def test_fsdp_splits_the_longest_axis_and_tensor_the_heads_and_hidden_units(sizes, column):
  model = variants.make(
    'tiny', 1000, width=128, depth=1, num_heads=4, head_dim=48, mlp_dim=512, pool='cls'
  )
  image = jnp.zeros((1, 32, 32, 3))
  params = jax.eval_shape(model.init, jax.random.key(0), image)['params']
  mesh = jax.sharding.AbstractMesh(sizes, devices_lib.AXES)
  found = {
    jax.tree_util.keystr(path, simple=True, separator='/'): (x.shape, layout.spec)
    for (path, x), layout in zip(
      jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(sharding.layout(mesh, params))
    )
  }
  for name, (shape, *specs) in SPECS.items():
    assert found[name] == (shape, PartitionSpec(*specs[column])), name


def test_axis_not_divisible_by_the_devices_is_not_split():
  mesh = jax.sharding.AbstractMesh((1, 4, 2), devices_lib.AXES)
  path = tuple(map(jax.tree_util.DictKey, ('query', 'kernel')))
  split = lambda *shape: tuple(sharding.partition(mesh, path, shape))
  assert split(66, 3, 64) == (None, None, 'fsdp')  # neither 3 heads nor 66 features can be split
  assert split(66, 2, 66) == (None, 'tensor', None)


def test_the_size_on_a_device_is_that_of_its_parts():
  mesh = devices_lib.make_mesh(2, shape={'data': 1, 'fsdp': 2, 'tensor': 1})
  tree = {'kernel': np.zeros((64, 128), np.float32), 'bias': np.zeros(128, jnp.bfloat16)}
  placed = sharding.place_params(mesh, tree)
  (first, *_) = mesh.devices.flat
  held = [s.data for x in placed.values() for s in x.addressable_shards if s.device == first]
  assert sharding.size_on_device(mesh, tree) == sum(x.nbytes for x in held) == 64 * 64 * 4 + 256
