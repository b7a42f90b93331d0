"""Tests dense features and the colours of their principal components."""

import jax
import numpy as np
import pytest
from sklearn.decomposition import PCA

from tests.conftest import DATA, init_params, run_model
import vit_jax
from vit_jax import figures, opening
from vit_jax.figures import components, gallery
from vit_jax.model import variants
from vit_jax.opening import Request

DRAW = np.random.RandomState(0)
IMAGE = DRAW.normal(size=(2, 8, 12, 3)).astype(np.float32)


def test_components_signs_and_shares_equal_those_of_scikit_learn():
  x_ND = DRAW.normal(size=(50, 9)) @ DRAW.normal(size=(9, 9)) + 3
  found, share = components.principal_components(x_ND, 4)
  want = PCA(4, svd_solver='full').fit(x_ND)
  np.testing.assert_allclose(found, want.components_, atol=1e-10)
  np.testing.assert_allclose(share, want.explained_variance_ratio_, atol=1e-12)
  again, _ = components.principal_components(x_ND[::-1], 4)  # the order of patches is irrelevant
  np.testing.assert_allclose(found, again, atol=1e-10)
  assert components.principal_components(x_ND[:3], 4)[0].shape == (2, 9)


def test_maps_are_the_projections_of_all_images_together():
  feature = DRAW.normal(size=(3, 4, 5, 7)).astype(np.float32)
  found, share = components.component_maps(feature)
  want = PCA(3, svd_solver='full').fit_transform(feature.reshape(-1, 7).astype(np.float64))
  np.testing.assert_allclose(found.reshape(-1, 3), want, atol=1e-5)
  assert found.shape == (3, 4, 5, 3) and (np.diff(share) <= 0).all()
  alone, _ = components.component_maps(feature[:1])
  assert not np.allclose(alone, found[:1], atol=0.1)


def test_colours_cover_the_range_between_the_percentiles():
  maps = DRAW.normal(size=(2, 10, 10, 4))
  found = components.component_colours(maps)
  for channel in range(3):
    low, high = np.percentile(maps[..., channel], (2, 98))
    want = np.clip((maps[..., channel] - low) / (high - low), 0, 1)
    np.testing.assert_allclose(found[..., channel], want, atol=1e-12)
  flat = components.component_colours(np.zeros((1, 2, 2, 1)))
  np.testing.assert_array_equal(flat, np.full((1, 2, 2, 3), 0.5))


@pytest.mark.slow
@pytest.mark.slow_after_first
@pytest.mark.parametrize('fields', [
    dict(pool='cls', num_registers=2), dict(pool='map'), dict(pool='gap', norm_after_pool=True),
    dict(pool='cls_gap', representation_size=4), dict(pool='cls', projection=4, cosine=True),
])  # fmt: skip
def test_dense_features_are_the_normalised_patches_of_the_last_block(fields):
  model = variants.make('tiny', 5, width=16, depth=2, mlp_dim=8, **fields)
  params = init_params(model, IMAGE)
  found = jax.jit(components.dense_features, static_argnums=0)(model, params, IMAGE)
  assert found.shape == (2, 2, 3, 16)
  token = np.asarray(jax.jit(vit_jax.block_tokens, static_argnums=0)(model, params, IMAGE)[-1])
  token = token[:, model.num_prefix :].astype(np.float64)
  centred = token - token.mean(axis=-1, keepdims=True)
  want = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + model.norm_epsilon)
  np.testing.assert_allclose(found.reshape(2, 6, 16), want, atol=1e-4)  # new norms change nothing


@pytest.mark.slow
def test_gap_of_dense_features_is_the_pooled_feature_of_published_weights():
  model, params = vit_jax.load(DATA / 'paper_gap' / 'weights.npz', grid=(2, 4))
  image = np.load(DATA / 'paper_gap' / 'io.npz')['image']
  feature = components.dense_features(model, params, image)
  pooled = run_model(model.clone(num_classes=None), params, image)
  np.testing.assert_allclose(feature.mean(axis=(1, 2)), pooled, atol=1e-5)


@pytest.mark.slow
def test_the_picture_shows_the_patches_of_a_run_at_any_size(trained, tmp_path):
  request = Request(trained[0], overrides={'data.image_size': '24'})
  drawn = gallery.visualize(request, out=tmp_path)
  assert tmp_path / 'figures' / 'components.png' in drawn
  text = drawn[-1].read_text(encoding='utf-8')
  assert 'Principal components of the patch features' in text
  exp, params, _ = opening.open_model(request)
  assert components.dense_features(exp.model, params, np.zeros((1, 24, 24, 3))).shape[1:3] == (6, 6)


def test_the_documented_names_are_public():
  for name in ('dense_features', 'component_maps', 'component_colours', 'draw_components'):
    assert name in figures.__all__
