"""Compares schedules and optimizers with closed forms, and losses with float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.distributed import devices
from vit_jax.model import variants
from vit_jax.optim import OBJECTIVES, Objective, losses, optimizers
from vit_jax.optim.schedules import make_schedule

MESH = devices.make_mesh()
PARAMS = {'a': {'kernel': jnp.array([[1.0, -2.0]]), 'bias': jnp.array([[0.5, 3.0]])}}
GRADS = [
  {'a': {'kernel': jnp.array([[0.1, -0.3]]), 'bias': jnp.array([[0.2, 0.1]])}},
  {'a': {'kernel': jnp.array([[-0.2, 0.4]]), 'bias': jnp.array([[0.3, 0.0]])}},
]


@pytest.mark.parametrize('name, middle, end', [
    ('cosine', 0.5, 0.0), ('linear', 0.5, 0.0), ('constant', 1.0, 1.0),
])  # fmt: skip
def test_schedules_warm_up_and_decay(name, middle, end):
  schedule = make_schedule(name, 0.2, steps=110, warmup=10)
  rates = [float(schedule(step)) for step in range(111)]
  np.testing.assert_allclose(rates[:10], 0.2 * np.arange(1, 11) / 10, rtol=1e-5)
  np.testing.assert_allclose([rates[60], rates[110]], [0.2 * middle, 0.2 * end], atol=1e-7)
  if name == 'cosine':
    want = [0.1 * (1 + math.cos(math.pi * (s - 10) / 100)) for s in range(10, 110)]
    np.testing.assert_allclose(rates[10:110], want, atol=1e-6)


def test_schedule_without_steps_and_warmup_is_finite():
  assert np.isfinite(make_schedule('cosine', 0.1, steps=0, warmup=0)(0))


def steps(name, **arguments):
  optimizer = optimizers.make_optimizer(name, lambda step: 0.1, **arguments)
  params, state = PARAMS, optimizer.init(PARAMS)
  for grads in GRADS:
    updates, state = optimizer.update(grads, state, params)
    params = jax.tree.map(jnp.add, params, updates)
  return params['a']


def test_adamw_decays_only_matrices():
  out = steps('adamw', weight_decay=0.2, b1=0.9, b2=0.99, momentum=0.5, clip=0.0)
  for name, decay in (('kernel', 0.2), ('bias', 0.0)):
    p, m, v = np.array(PARAMS['a'][name], np.float64), 0, 0
    for t, grads in enumerate(GRADS, start=1):
      g = np.array(grads['a'][name], np.float64)
      m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
      step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
      p = p - 0.1 * (step + decay * p)
    np.testing.assert_allclose(out[name], p, rtol=1e-4)


@pytest.mark.parametrize(('name', 'saved'), [('adamw', 'mu'), ('sgd', 'trace')])
def test_first_moment_can_be_bfloat16(name, saved):
  arguments = dict(weight_decay=0.2, b1=0.9, b2=0.99, momentum=0.9, clip=0.0)
  exact = steps(name, **arguments)
  rounded = steps(name, moment_dtype='bfloat16', **arguments)
  np.testing.assert_allclose(rounded['kernel'], exact['kernel'], rtol=2e-2)
  assert rounded['kernel'].dtype == jnp.float32 and (rounded['kernel'] != exact['kernel']).any()
  optimizer = optimizers.make_optimizer(name, lambda _: 0.1, moment_dtype='bfloat16', **arguments)
  moments = optax.tree.get(optimizer.init(PARAMS), saved)
  assert {x.dtype for x in jax.tree.leaves(moments)} == {jnp.dtype('bfloat16')}


def test_sgd_equals_its_closed_form():
  out = steps('sgd', weight_decay=0.2, b1=0, b2=0, momentum=0.9, clip=0.0)
  for name, decay in (('kernel', 0.2), ('bias', 0.0)):
    p, m = np.array(PARAMS['a'][name], np.float64), 0
    for grads in GRADS:
      m = 0.9 * m + np.array(grads['a'][name], np.float64)
      p = p - 0.1 * (m + decay * p)
    np.testing.assert_allclose(out[name], p, rtol=1e-5)


def every_kind_of_parameter():
  """Returns a tiny array without zeros for each parameter of a model with all kinds of them."""
  model = variants.make(
    'R+Ti', 3, patch_size=8, resnet_width=32, width=8, depth=1, num_heads=2, mlp_dim=4, pool='map',
    class_token=True, num_registers=2, position_prefix='all', layer_scale=0.1, pre_norm=True,
    qk_norm=True, representation_size=6,
  )  # fmt: skip
  model = model.clone(resnet=(1,))
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))['params']
  return jax.tree.map(lambda x: np.full((2,) * x.ndim, 2, np.float32), params)


@pytest.mark.slow_after_first
@pytest.mark.parametrize('name', ['adamw', 'muon', 'sgd'])
def test_weight_decay_applies_only_to_kernels(name):
  params = every_kind_of_parameter()
  zeros = jax.tree.map(np.zeros_like, params)
  optimizer = optimizers.make_optimizer(
    name, lambda _: 0.1, clip=0.0, weight_decay=0.3, b1=0.9, b2=0.99, momentum=0.9
  )
  updates, _ = optimizer.update(zeros, optimizer.init(params), params, mesh=MESH, dtype=jnp.float32)
  flat = jax.tree_util.tree_leaves_with_path(updates)
  found = {jax.tree_util.keystr(path, simple=True, separator='/'): x for path, x in flat}
  others = {'cls', 'registers', 'pos_embedding', 'map/query', 'block_0/mlp_scale', 'norm/scale'}
  assert others < found.keys() and {n.rpartition('/')[2] for n in found.keys() - others} == {
    'kernel', 'bias', 'scale', 'attention_scale'
  }  # fmt: skip
  for path, update in found.items():
    want = -0.1 * 0.3 * 2 if path.endswith('/kernel') else 0
    np.testing.assert_allclose(update, want, rtol=1e-6, err_msg=path)


def test_clipping_scales_by_the_global_norm():
  grads = GRADS[0]
  norm = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
  optimizer = optimizers.make_optimizer(
    'sgd', lambda step: 0.5, clip=0.1, weight_decay=0.0, momentum=0.0
  )
  updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
  jax.tree.map(
    lambda u, g: np.testing.assert_allclose(u, -0.5 * g * 0.1 / norm, rtol=1e-5), updates, grads
  )


def test_unknown_names_list_the_valid_ones():
  with pytest.raises(ValueError, match='Did you mean adamw.*Valid: adamw, muon, sgd'):
    optimizers.make_optimizer('adamv', None, 1.0)
  with pytest.raises(ValueError, match='Valid: constant, cosine, linear'):
    make_schedule('step', 1.0, 1, 1)


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_softmax_loss_equals_float64(smoothing):
  logits = np.random.RandomState(0).normal(size=(6, 4)).astype(np.float32) * 3
  label = np.array([0, 1, 2, 3, 0, 1])
  log_p = logits - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
  target = np.eye(4)[label] * (1 - smoothing) + smoothing / 4
  out = losses.softmax(jnp.asarray(logits), jnp.asarray(label), smoothing)
  np.testing.assert_allclose(out, -(target * log_p).sum(1), rtol=1e-5)


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_sigmoid_loss_equals_float64(smoothing):
  logits = np.random.RandomState(0).normal(size=(6, 4)).astype(np.float32) * 3
  label = np.array([0, 1, 2, 3, 0, 1])
  p = 1 / (1 + np.exp(-logits.astype(np.float64)))
  target = np.eye(4)[label] * (1 - smoothing) + smoothing / 4
  out = losses.sigmoid(jnp.asarray(logits), jnp.asarray(label), smoothing)
  want = -(target * np.log(p) + (1 - target) * np.log(1 - p)).sum(1)
  np.testing.assert_allclose(out, want, rtol=1e-5)


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_losses_equal_pytorchs(smoothing):
  torch = pytest.importorskip('torch')
  logits = np.random.RandomState(0).normal(size=(6, 4)).astype(np.float32) * 9
  label = np.array([0, 1, 2, 3, 0, 1])
  run = lambda name: losses.LOSSES[name](jnp.asarray(logits), jnp.asarray(label), smoothing)
  their_logits, their_label = torch.tensor(logits), torch.tensor(label)
  functional = torch.nn.functional
  want = functional.cross_entropy(
    their_logits, their_label, reduction='none', label_smoothing=smoothing
  )
  np.testing.assert_allclose(run('softmax'), want, rtol=1e-5, atol=1e-6)
  target = functional.one_hot(their_label, 4) * (1 - smoothing) + smoothing / 4
  want = functional.binary_cross_entropy_with_logits(their_logits, target.float(), reduction='none')
  np.testing.assert_allclose(run('sigmoid'), want.sum(1), rtol=1e-5, atol=1e-6)


DEEP = {  # exponents of the decay for two blocks, as from BEiT's `get_num_layer`
  'pos_embedding': 3, 'cls': 3, 'embedding': 3, 'registers': 3, 'stem': 3, 'block_0': 2,
  'block_1': 1, 'norm': 0, 'map': 0, 'pre_logits': 0, 'head': 0,
}  # fmt: skip


@pytest.mark.parametrize('name', ['adamw', 'sgd'])
def test_layer_decay_gives_each_layer_its_own_learning_rate(name):
  draw = np.random.RandomState(0).normal
  leaf = lambda: {'kernel': jnp.asarray(draw(size=(3, 2)), jnp.float32)}
  params, grads = {key: leaf() for key in DEEP}, [{key: leaf() for key in DEEP} for _ in range(3)]
  rate = {key: 0.1 * 0.7**power for key, power in DEEP.items()}
  optimizer = optimizers.make_optimizer(
    name, lambda _: 0.1, clip=0.0, layer_decay=0.7, weight_decay=0.3, b1=0.9, b2=0.99, momentum=0.9
  )
  state, now = optimizer.init(params), params
  for g in grads:
    updates, state = optimizer.update(g, state, now)
    now = jax.tree.map(jnp.add, now, updates)
  for key in DEEP:  # each parameter behaves as if it were trained alone at its own learning rate
    p, m, v = np.array(params[key]['kernel'], np.float64), 0, 0
    for t, g in enumerate((np.array(g[key]['kernel'], np.float64) for g in grads), start=1):
      if name == 'sgd':
        m = step = 0.9 * m + g
      else:
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
      p = p - rate[key] * (step + 0.3 * p)
    np.testing.assert_allclose(now[key]['kernel'], p, rtol=1e-4, err_msg=key)


def test_parameter_of_unknown_layer_is_rejected():
  optimizer = optimizers.scale_by_layer(0.5)
  with pytest.raises(AssertionError, match='layer of parameter tail is unknown'):
    optimizer.update({'tail': jnp.ones(1)}, optimizer.init({}), None)


@pytest.mark.slow
def test_every_parameter_of_a_model_has_a_layer():
  for pool in ('cls', 'map'):
    model = variants.make('tiny', 2, pool=pool, num_registers=1, representation_size=8, depth=11)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))['params']
    ones = jax.tree.map(lambda x: jnp.ones(x.shape), params)
    scaled, _ = optimizers.scale_by_layer(0.5).update(ones, optax.EmptyState(), None)
    assert float(scaled['block_10']['mlp']['up']['bias'][0]) == 0.5
    assert float(scaled['block_2']['mlp']['up']['bias'][0]) == 0.5**9
    assert float(scaled['head']['bias'][0]) == 1


def test_an_adapter_has_the_layers_of_its_kernels():
  ones = {f'block_{i}': {'mlp': {'up': {'a': jnp.ones(2), 'b': jnp.ones(3)}}} for i in range(3)}
  ones = {'head': {'kernel': jnp.ones(1)}, 'lora': ones | {'map': {'a': jnp.ones(1)}}}
  scaled, _ = optimizers.scale_by_layer(0.5).update(ones, optax.EmptyState(), None)
  found = [float(scaled['lora'][f'block_{i}']['mlp']['up']['b'][0]) for i in range(3)]
  assert found == [0.5**3, 0.5**2, 0.5]
  assert float(scaled['head']['kernel'][0]) == float(scaled['lora']['map']['a'][0]) == 1


def test_parameters_that_an_objective_adds_are_trained_like_the_head(monkeypatch):
  monkeypatch.setitem(OBJECTIVES, 'mine', Objective(None, None, params=('projector',)))
  ones = {'embedding': jnp.ones(1), 'projector': jnp.ones(1)}
  scaled, _ = optimizers.scale_by_layer(0.5).update(ones, optax.EmptyState(), None)
  assert (scaled['embedding'][0], scaled['projector'][0]) == (0.5, 1)
  assert optimizers.split_frozen(ones, '', 'lora')[0].keys() == {'projector'}


@pytest.mark.parametrize('name', ['adamw', 'muon', 'sgd'])
def test_weight_decay_pulls_the_factors_of_lora_to_zero(name):
  params = {
    'head': {'bias': 2 * np.ones(3)},
    'lora': {'block_0': {'up': {'a': 2 * np.ones((4, 2))}}},
  }
  optimizer = optimizers.make_optimizer(
    name, lambda _: 0.1, clip=0.0, weight_decay=0.3, b1=0.9, b2=0.99, momentum=0.9
  )
  zeros = jax.tree.map(np.zeros_like, params)
  updates, _ = optimizer.update(zeros, optimizer.init(params), params, mesh=MESH, dtype=jnp.float32)
  np.testing.assert_allclose(updates['lora']['block_0']['up']['a'], -0.1 * 0.3 * 2, rtol=1e-6)
  np.testing.assert_array_equal(updates['head']['bias'], 0)


def test_freeze_backbone_trains_only_the_head():
  params = {'embedding': 1, 'block_0': 2, 'head': 3}
  assert optimizers.split_frozen(params, '') == (params, {})
  assert optimizers.split_frozen(params, 'backbone') == (
    {'head': 3},
    {'embedding': 1, 'block_0': 2},
  )
  with pytest.raises(ValueError, match='freeze: unknown'):
    optimizers.split_frozen(params, 'head')
  lora = params | {'lora': 4}
  assert optimizers.split_frozen(lora, '', 'lora')[0] == {'head': 3, 'lora': 4}
