"""Tests maps against hand-computed cases, exact properties, NumPy and scikit-learn."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import decomposition, metrics

from tests.conftest import run_model
from vit_jax.distributed import Target, compiled_for
from vit_jax.figures import charts, maps
from vit_jax.figures.maps import Missing
from vit_jax.model import attention, pooling, resnet, variants

SIZE = (8, 12)  # pixels; the grid is (2, 3)
GRID = (2, 3)
CASES = {
  'cls': {},
  'registers': dict(num_registers=3),
  'gap': dict(pool='gap'),
  'gap with a class token': dict(pool='gap', class_token=True, num_registers=1),
  'map': dict(pool='map'),
  'map with a class token': dict(pool='map', class_token=True, num_registers=2),
  'cls_gap': dict(pool='cls_gap', num_registers=1),
  'distilled': dict(pool='distilled', num_registers=1),
}


def build(**overrides):
  """Returns `(model, random parameters, two images)`."""
  sizes = dict(width=16, depth=2, num_heads=2, mlp_dim=16, patch_size=4)
  model = variants.make(None, 5, **(sizes | overrides))
  random = np.random.RandomState(0)
  image = jnp.asarray(random.normal(size=(2, *SIZE, 3)), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)['params']
  draw = lambda leaf: jnp.asarray(0.3 * random.normal(size=leaf.shape), jnp.float32)
  return model, jax.tree.map(draw, shapes), image


def output_of(model, params, image, *path):
  """Returns the output of a module in the model."""
  wanted = lambda module, _: module.path == path
  _, state = model.apply({'params': params}, image, capture_intermediates=wanted)
  for name in path:
    state = state.get('intermediates', state)[name]
  return state['__call__'][0]


def random_attention(seed, shape):
  """Returns random attention `[B, K, N, N]` whose rows sum to 1."""
  batch, heads, tokens = shape
  return np.random.RandomState(seed).dirichlet(np.ones(tokens), (batch, heads, tokens))


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def attend(params, query, x, heads):
  """Computes the attention weights of the paper (equations 5 and 6) in float64: `[B, K, Q, N]`."""
  project = lambda y, p: (
    np.einsum('bnd,dke->bnke', y, np.float64(p['kernel'])) + np.float64(p['bias'])
  )
  q, k = project(query, params['query']), project(x, params['key'])
  return softmax(np.einsum('bqke,bnke->bkqn', q, k) / np.sqrt(q.shape[-1]))


def test_rollout_of_two_layers_matches_hand_computation():
  # The class token gives half of its attention to the only patch, which attends to itself.
  # (A + I) / 2 = [[3/4, 1/4], [0, 1]], and the first row of its square is 9/16, 7/16.
  layer = np.array([[0.5, 0.5], [0, 1]])[None, None]
  found = maps.rollout([layer, layer], np.array([[1.0, 0]]), (1, 1))
  assert found.shape == (1, 1, 1) and float(found[0, 0, 0]) == 7 / 16


def test_rollout_follows_attention_from_the_last_block_to_the_first():
  to_patch = np.array([[0, 1.0], [0, 1]])[None, None]
  to_class = np.array([[1.0, 0], [1, 0]])[None, None]
  flow = lambda layers: float(maps.rollout(layers, np.array([[1.0, 0]]), (1, 1))[0, 0, 0])
  # The products of [[1/2, 1/2], [0, 1]] and [[1, 0], [1/2, 1/2]] depend on their order.
  assert (flow([to_class, to_patch]), flow([to_patch, to_class])) == (0.25, 0.5)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
  st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(1, 3), st.integers(1, 3)
)
@pytest.mark.slow
def test_rollout_is_the_product_of_the_layers(depth, heads, prefix, h, w):
  tokens = prefix + h * w
  layers = [random_attention(i, (2, heads, tokens)) for i in range(depth)]
  product = np.eye(tokens)
  for layer in layers:  # Abnar and Zuidema's recursion with full matrices in float64
    product = (layer.mean(axis=1) + np.eye(tokens)) / 2 @ product
  read = np.random.RandomState(9).dirichlet(np.ones(tokens), 2)
  want = np.einsum('bn,bnm->bm', read, product)
  found = maps.rollout(layers, read, (h, w))
  np.testing.assert_allclose(found.reshape(2, -1), want[:, prefix:], atol=1e-6)
  everything = maps.rollout(layers, read, (1, tokens))
  np.testing.assert_allclose(everything.sum(axis=(1, 2)), 1, atol=1e-6)


def test_identity_attention_gives_identity_rollout():
  layers = [np.eye(6)[None, None].repeat(6, axis=0)] * 4
  np.testing.assert_array_equal(maps.rollout(layers, np.eye(6), (2, 3)).reshape(6, 6), np.eye(6))


SIXTH = 1 / 6  # share of each of the 6 patches
SHARES = {  # shares in token order: class token, registers, patches
  'cls': [1] + [0] * 6,
  'registers': [1] + [0] * 9,
  'gap': [SIXTH] * 6,
  'gap with a class token': [0, 0] + [SIXTH] * 6,
  'cls_gap': [0.5, 0] + [SIXTH / 2] * 6,
  'distilled': [0.5, 0.5] + [0] * 6,
}


@pytest.mark.slow
@pytest.mark.parametrize('case', SHARES)
def test_linear_pool_reads_the_expected_share_of_each_token(case):
  model, params, image = build(**CASES[case])
  layers, read = maps.attentions(model, params, image)
  tokens = len(SHARES[case])
  assert layers[0].shape[-1] == tokens == model.num_prefix + 6
  want = np.broadcast_to(np.float32(SHARES[case]), (2, 1, tokens))
  np.testing.assert_allclose(read, want, atol=1e-7)


@pytest.mark.slow
@pytest.mark.slow_after_first
@pytest.mark.parametrize('case', ['map', 'map with a class token'])
def test_map_head_reads_what_its_probe_attends_to(case):
  model, params, image = build(**CASES[case])
  _, read = maps.attentions(model, params, image)
  body = model.clone(pool='none', num_classes=None, class_token=model.has_class)
  token = np.float64(run_model(body, params, image))[:, model.num_prefix :]
  query = np.float64(params['map']['query']).repeat(2, axis=0)
  want = attend(params['map']['attention'], query, token, 2)[:, :, 0]
  np.testing.assert_array_equal(read[..., : model.num_prefix], 0)
  np.testing.assert_allclose(read[..., model.num_prefix :], want, atol=1e-5)


@pytest.mark.slow_after_first
@pytest.mark.parametrize('case', ['registers', 'gap'])
def test_attention_of_the_first_block_matches_the_papers_formula(case):
  model, params, image = build(**CASES[case])
  layers, _ = maps.attentions(model, params, image)
  token = np.float64(output_of(model, params, image, 'block_0', 'attention_norm'))
  want = attend(params['block_0']['attention'], token, token, 2)
  np.testing.assert_allclose(layers[0], want, atol=1e-5)
  assert len(layers) == 2
  for layer in layers:
    np.testing.assert_allclose(layer.sum(axis=-1), 1, atol=1e-6)


def test_attentions_without_a_pool_raise_missing():
  model, params, image = build(pool='none', class_token=True)
  with pytest.raises(Missing, match='Try model.clone'):
    maps.attentions(model, params, image)


def test_attentions_raise_missing_if_a_pool_does_not_report_what_it_reads(monkeypatch):
  largest = lambda model, token_BND: token_BND.max(axis=1)
  monkeypatch.setitem(pooling.POOLS, 'max', pooling.Pool(largest))
  model, params, image = build(pool='max')
  with pytest.raises(Missing, match='model.pool=max does not tell how much'):
    maps.attentions(model, params, image)


@pytest.mark.slow
@pytest.mark.parametrize('backend', ['cpu', 'cuda'])
def test_maps_use_the_plain_path_where_the_model_uses_a_fused_kernel(monkeypatch, backend):
  """cuDNN's kernel needs a GPU, so XLA computes the same attention in this test."""
  dtype = {'cpu': 'float32', 'cuda': 'bfloat16'}[backend]
  model, params, image = build(pool='map', dtype=dtype)
  calls, plain = [], attention.plain

  def spy(name, function):
    def call(*args, **kwargs):
      calls.append(name)
      return function(*args, **kwargs)

    return call

  monkeypatch.setattr(attention, 'flash_obstacle', lambda *_: '')  # the heads are small
  monkeypatch.setattr(attention, 'flash', spy('fused', plain))
  monkeypatch.setattr(attention, 'with_gradient', spy('fused', attention.with_gradient))
  monkeypatch.setattr(attention, 'plain', spy('plain', plain))

  with compiled_for(Target(backend, 9.0)):
    logits = model.apply({'params': params}, image)
    assert calls.count('fused') >= model.depth
    calls.clear()
    looked, _ = model.apply({'params': params}, image, mutable=['intermediates'])
    layers, read = maps.attentions(model, params, image)
    assert set(calls) == {'plain'}
    want_layers, want_read = maps.attentions(model.clone(attention='plain'), params, image)

  tolerance = {'cpu': 1e-5, 'cuda': 0.1}[backend]
  np.testing.assert_allclose(looked, logits, atol=tolerance)
  for found, want in zip([*layers, read], [*want_layers, want_read]):
    np.testing.assert_array_equal(found, want)


@pytest.mark.slow
def test_remat_does_not_change_maps():
  model, params, image = build()
  for found, want in zip(
    maps.attentions(model.clone(remat='full'), params, image)[0],
    maps.attentions(model, params, image)[0],
  ):
    np.testing.assert_allclose(found, want, atol=1e-6)


@pytest.mark.slow
@pytest.mark.slow_after_first
@pytest.mark.parametrize('case', ['registers', 'gap', 'map with a class token'])
def test_summary_matches_maps_of_the_whole_batch(case):
  model, params, image = build(**CASES[case])
  found = jax.jit(functools.partial(maps.attention_summary, model))(params, image)
  layers, read = maps.attentions(model, params, image)
  read_mean = read.mean(axis=1)
  close = functools.partial(np.testing.assert_allclose, atol=1e-5)
  close(found['rollout'], maps.rollout(layers, read_mean, GRID))
  assert found['rollout'].shape == (2, *GRID)
  rows = 2 + (model.pool == 'map')
  assert found['heads'].shape == (2, rows, 2, *GRID)
  prefix = model.num_prefix
  for i, layer in enumerate(layers):
    want = np.einsum('bn,bknm->bkm', read_mean, layer)[..., prefix:].reshape(2, 2, *GRID)
    close(found['heads'][:, i], want)
    close(found['distance'][:, i], maps.mean_attention_distance(layer, GRID, (4, 4)), rtol=1e-5)
  if model.pool == 'map':
    close(found['heads'][:, 2], read[..., prefix:].reshape(2, 2, *GRID))


def test_head_attention_with_a_class_token_is_its_row():
  model, params, image = build(**CASES['registers'])
  layers, read = maps.attentions(model, params, image)
  found = maps.head_attention(layers[1], read[:, 0], GRID)
  np.testing.assert_array_equal(found, layers[1][:, :, 0, 4:].reshape(2, 2, *GRID))


@pytest.mark.slow
def test_summary_of_eight_images_at_224_pixels_needs_less_than_100_mb_for_a_b16():
  model = variants.make('B/16', 10)
  image = jax.ShapeDtypeStruct((8, 224, 224, 3), jnp.float32)
  params = jax.eval_shape(model.init, jax.random.key(0), image)['params']
  compiled = (
    jax.jit(functools.partial(maps.attention_summary, model)).lower(params, image).compile()
  )
  assert compiled.memory_analysis().temp_size_in_bytes < 1e8


def test_attention_distances_match_hand_computation():
  uniform = np.full((1, 1, 2, 2), 0.5)
  # Two adjacent patches, 4 pixels wide. Each attends half to itself and half to the other.
  assert float(maps.mean_attention_distance(uniform, (1, 2), (9, 4))[0, 0]) == 2
  assert float(maps.mean_attention_distance(uniform, (2, 1), (9, 4))[0, 0]) == 4.5
  one_way = np.array([[[[0.0, 1], [0, 1]]]])  # both patches attend to the second
  assert float(maps.mean_attention_distance(one_way, (1, 2), (3, 3))[0, 0]) == 1.5
  np.testing.assert_allclose(maps.patch_distances((2, 2), (3, 4))[0], [0, 4, 3, 5])


def test_attention_distance_ignores_class_token_and_registers():
  identity = np.eye(6)[None, None]
  np.testing.assert_array_equal(maps.mean_attention_distance(identity, (2, 3), (4, 4)), 0)
  uniform = np.full((2, 3, 6, 6), 1 / 6)
  even = maps.patch_distances((2, 3), (4, 4)).mean()
  np.testing.assert_allclose(maps.mean_attention_distance(uniform, (2, 3), (4, 4)), even, rtol=1e-6)
  # A class token and a register that receive nine tenths of all attention change nothing.
  sink = np.pad(uniform / 10, [(0, 0), (0, 0), (2, 0), (2, 0)], constant_values=0.45)
  np.testing.assert_allclose(maps.mean_attention_distance(sink, (2, 3), (4, 4)), even, rtol=1e-6)


@pytest.mark.parametrize('prefix', ['cls', 'none', 'all'])
def test_position_similarity_matches_scikit_learn(prefix):
  model, params, _ = build(num_registers=2, position_prefix=prefix)
  position = maps.position_embeddings(model, params, GRID)
  learned = np.asarray(params['pos_embedding'])[0, -6:]
  np.testing.assert_array_equal(position.reshape(6, 16), learned)
  found = maps.position_similarity(position)
  assert found.shape == (2, 3, 2, 3)
  np.testing.assert_allclose(
    found.reshape(6, 6), metrics.pairwise.cosine_similarity(learned), atol=1e-6
  )


def test_similarity_of_fixed_positions_depends_only_on_their_distance():
  model, params, _ = build(position='sincos')
  found = maps.position_similarity(maps.position_embeddings(model, params, (4, 5)))
  np.testing.assert_allclose(np.einsum('yxyx->yx', found), 1, atol=1e-6)
  np.testing.assert_allclose(found[0, 0, :3, :4], found[1, 1, 1:, 1:], atol=1e-6)


@pytest.mark.parametrize('position', ['rope', 'none'])
def test_position_embeddings_of_a_model_without_them_raise_missing(position):
  model, params, _ = build(position=position)
  with pytest.raises(Missing, match=f'model.position={position}'):
    maps.position_embeddings(model, params, GRID)


def test_filters_match_scikit_learns_principal_components():
  model, params, _ = build(width=64)
  found, share = maps.filters(model, params, count=10)
  kernel = np.float64(params['embedding']['kernel']).reshape(48, 64)
  pca = decomposition.PCA(10, svd_solver='full').fit(kernel.T)
  assert found.shape == (10, 4, 4, 3)
  sign = np.sign((found.reshape(10, -1) * pca.components_).sum(axis=1, keepdims=True))
  np.testing.assert_allclose(found.reshape(10, -1), sign * pca.components_, atol=1e-5)
  np.testing.assert_allclose(share, pca.explained_variance_ratio_, rtol=1e-6)
  flat = found.reshape(10, -1)
  assert (flat[np.arange(10), np.abs(flat).argmax(axis=1)] > 0).all()


def test_number_of_filters_is_limited_by_the_embedding():
  model, params, _ = build()  # 16 columns without their mean have 15 components
  assert maps.filters(model, params)[0].shape == (15, 4, 4, 3)
  model, params, _ = build(width=64, patch_size=(2, 1))
  found, share = maps.filters(model, params)
  assert found.shape == (6, 2, 1, 3) and abs(share.sum() - 1) < 1e-9


def test_filters_of_a_hybrid_raise_missing():
  stride = resnet.stem_stride((1,))
  model = variants.make(
    None, 5, width=16, depth=1, num_heads=2, mlp_dim=16, patch_size=stride, resnet=(1,)
  )
  with pytest.raises(Missing, match='feature map'):
    maps.filters(model, {})


@pytest.mark.slow
def test_patches_are_cut_as_the_model_embeds_them():
  model, params, image = build(patch_size=(2, 4))
  found = maps.patches(np.asarray(image[0]), (2, 4))
  assert found.shape == (4, 3, 2, 4, 3)
  np.testing.assert_array_equal(found[1, 2], image[0, 2:4, 8:12])
  layer = params['embedding']
  want = output_of(model, params, image, 'embedding')[0]
  embedded = np.einsum('hwpqc,pqcd->hwd', found, layer['kernel']) + layer['bias']
  np.testing.assert_allclose(embedded.reshape(want.shape), want, atol=1e-4)


def test_confusion_and_class_accuracy_match_scikit_learn():
  random = np.random.RandomState(0)
  label, predicted = random.randint(0, 4, 200), random.randint(0, 5, 200)
  found = charts.confusion(label, predicted, 5)
  want = metrics.confusion_matrix(label, predicted, labels=range(5))
  np.testing.assert_array_equal(found, want)
  recall = metrics.recall_score(label, predicted, labels=range(4), average=None)
  accuracy = charts.class_accuracy(found)
  np.testing.assert_allclose(accuracy[:4], recall)
  assert np.isnan(accuracy[4])  # class 4 has no examples


def test_most_confident_mistakes_come_first():
  label, predicted = np.array([0, 1, 2, 0, 1]), np.array([0, 2, 1, 1, 0])
  confidence = np.array([0.99, 0.5, 0.8, 0.5, 0.6])
  assert maps.mistakes(label, predicted, confidence, 3).tolist() == [2, 4, 1]
  assert maps.mistakes(label, predicted, confidence, 9).tolist() == [2, 4, 1, 3]
  assert not len(maps.mistakes(label, label, confidence, 3))


@pytest.mark.parametrize('labels, classes, count, want', [
  ([2, 0, 0, 1, 2, 1], 3, 4, [1, 3, 0, 2]),  # the first of each class, then a second
  ([2, 0, 0, 1, 2, 1], 3, 9, [1, 3, 0, 2, 5, 4]),  # fewer examples than requested
  ([3, 2, 1, 0], 4, 2, [3, 1]),  # classes 0 and 2 are chosen
  ([3, 1, 1, 1], 4, 2, [0, 1]),  # classes 0 and 2 have no examples, so others are used
])  # fmt: skip
def test_examples_are_spread_over_the_classes(labels, classes, count, want):
  assert maps.spread_over_classes(np.array(labels), classes, count).tolist() == want
