"""Tests that resized patch embeddings are FlexiViT's: exact when patches grow, else least squares.

Patches are resized by Pillow, and weights by a least-squares solver in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from tests.conftest import DATA, run_model
import vit_jax
from vit_jax import opening
from vit_jax.inference import prediction
from vit_jax.model import patching, variants
from vit_jax.opening import Request

DRAW = np.random.RandomState(0)


def resized(image_HWC, size):
  """Resizes each channel with Pillow's bilinear filter, which widens when it shrinks an image."""
  planes = [Image.fromarray(plane) for plane in np.moveaxis(image_HWC, 2, 0).astype(np.float32)]
  shape = size[::-1], Image.Resampling.BILINEAR
  return np.stack([np.asarray(plane.resize(*shape)) for plane in planes], axis=2)


def with_larger_patches(image_BHWC, patch_size, new):
  """Resizes each patch of the images by itself, so that no pixels of its neighbours mix in."""
  batch, height, width, channels = image_BHWC.shape
  (p, q), (y, x) = patch_size, new
  out = np.zeros((batch, height // p * y, width // q * x, channels), np.float32)
  for b, i, j in np.ndindex(batch, height // p, width // q):
    patch = image_BHWC[b, i * p : i * p + p, j * q : j * q + q]
    out[b, i * y : i * y + y, j * x : j * x + x] = resized(patch, new)
  return out


def matrix(size, new):
  """Returns the matrix that resizes a patch, `[p' q', p q]`; its columns are resized pixels."""
  pixels = np.eye(size[0] * size[1]).reshape(-1, *size, 1)
  return np.stack([resized(pixel, new).ravel() for pixel in pixels], axis=1).astype(np.float64)


@pytest.mark.parametrize('size, new', [(4, 8), (4, 7), (8, 2), (7, 5), (3, 1), (1, 4), (16, 14)])
def test_lines_are_resized_as_in_pillow(size, new):
  want = matrix((size, 1), (new, 1))
  np.testing.assert_allclose(patching.resize_matrix(size, new), want, atol=1e-6)


@pytest.mark.parametrize('size, new', [
    ((4, 4), (8, 8)), ((4, 4), (2, 2)), ((4, 6), (5, 3)), ((8, 8), (6, 6)), ((2, 3), (7, 7)),
])  # fmt: skip
def test_resized_weights_solve_the_least_squares_problem_of_the_paper(size, new):
  """For standard normal patches, the error of `<B x, w'>` has the variance `|w - B^T w'|^2`."""
  kernel = DRAW.normal(size=(*size, 2, 3)).astype(np.float32)
  flat = kernel.astype(np.float64).reshape(size[0] * size[1], -1)
  want = np.linalg.lstsq(matrix(size, new).T, flat, rcond=1e-5)[0].reshape(*new, 2, 3)
  found = patching.resize_embedding(kernel, new)
  assert isinstance(found, np.ndarray) and found.dtype == np.float32
  np.testing.assert_allclose(found, want, atol=1e-5)
  on_device = jax.jit(patching.resize_embedding, static_argnums=1)(jnp.asarray(kernel), new)
  np.testing.assert_allclose(on_device, want, atol=1e-5)
  assert patching.resize_embedding(kernel, size) is kernel


def flexible(**fields):
  return variants.make('tiny', 5, width=16, depth=1, mlp_dim=8, patch_size=4, **fields)


@pytest.mark.slow_after_first
@pytest.mark.parametrize('new', [(8, 8), (12, 8), (5, 7)])
@pytest.mark.parametrize('fields', [
    dict(pool='cls'), dict(pool='map', position='rope'),
    dict(pool='cls', position='rope_unit', mlp='gated'),
    dict(pool='gap', position='learned_rope', rope_grid=(3, 3)),
])  # fmt: skip
def test_larger_patches_of_a_larger_image_give_the_same_logits(new, fields):
  """The property of the paper, in the model, with one grid of patches and with another."""
  model = flexible(**fields)
  image = DRAW.normal(size=(2, 8, 12, 3)).astype(np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)['params']
  params = jax.tree.map(lambda x: DRAW.normal(size=x.shape).astype(np.float32), shapes)
  want = run_model(model, params, image)
  larger = with_larger_patches(image, (4, 4), new)
  model = variants.stretched(model, (8, 12), new)
  np.testing.assert_allclose(run_model(model, params, larger), want, rtol=1e-4, atol=1e-4)
  assert jax.eval_shape(model.init, jax.random.key(0), larger)['params'] == shapes
  assert variants.stretched(model, larger.shape[1:3], (4, 4)).embedding_size is None


def test_the_stored_weights_get_the_gradient_through_the_resizing():
  """Resizing is linear, so the gradient is its transpose, applied to the gradient behind it."""
  kernel = DRAW.normal(size=(4, 4, 1, 2)).astype(np.float32)
  weight = DRAW.normal(size=(2, 2, 1, 2)).astype(np.float32)
  loss = lambda kernel: (patching.resize_embedding(kernel, (2, 2)) * weight).sum()
  found = jax.jit(jax.grad(loss))(jnp.asarray(kernel))
  inverse = np.linalg.pinv(matrix((4, 4), (2, 2)).T)
  want = (inverse.T @ weight.reshape(4, -1)).reshape(kernel.shape)
  np.testing.assert_allclose(found, want, atol=1e-5)


@pytest.mark.slow_after_first
@pytest.mark.parametrize('name', [
    'paper_token/weights.npz', 'hf_dinov2', 'timm_map', 'hf_dinov3', 'timm_eva02', 'hf_clip',
])  # fmt: skip
def test_published_weights_load_with_larger_patches(name):
  own = vit_jax.load(DATA / name)
  image = np.load(DATA / name.split('/')[0] / 'io.npz')['image']
  p, q = own.model.patch_size
  grid = image.shape[1] // p, image.shape[2] // q
  own = vit_jax.load(DATA / name, grid=grid)
  new = (2 * p, 3 * q)
  loaded = vit_jax.load(DATA / name, grid=grid, patch_size=new)
  assert loaded.model.patch_size == new and loaded.model.embedding_size is None
  assert loaded.params['embedding']['kernel'].shape[:2] == new
  assert loaded.preprocessing.size == tuple(n * k for n, k in zip(image.shape[1:3], (2, 3)))
  larger = with_larger_patches(image, (p, q), new)
  want = run_model(own.model, own.params, image)
  np.testing.assert_allclose(run_model(loaded.model, loaded.params, larger), want, atol=2e-4)


def test_smaller_patches_keep_the_image_size_and_resize_the_positions():
  path = DATA / 'paper_token' / 'weights.npz'
  own, loaded = vit_jax.load(path), vit_jax.load(path, patch_size=4)
  size = own.preprocessing.size
  assert loaded.preprocessing.size == size and loaded.model.patch_size == (4, 4)
  assert loaded.model.learned_grid == (size[0] // 4, size[1] // 4)
  same = vit_jax.load(path, grid=loaded.model.learned_grid)
  np.testing.assert_array_equal(loaded.params['pos_embedding'], same.params['pos_embedding'])
  with pytest.raises(ValueError, match='do not divide into patches of 5x5. Pass grid='):
    vit_jax.load(path, patch_size=5)
  with pytest.raises(ValueError, match='patch_size: expected one or two positive integers, got 0'):
    vit_jax.load(path, patch_size=0)


@pytest.mark.slow
def test_loading_a_run_at_another_patch_size_equals_resizing_inside_its_model(trained):
  exp, params, _ = opening.from_workdir(trained[0], {'model.patch_size': '2'})
  assert exp.model.embedding_size == (4, 4) and params['embedding']['kernel'].shape[:2] == (4, 4)
  loaded = vit_jax.load(trained[0], patch_size=2)
  assert loaded.params['embedding']['kernel'].shape[:2] == (2, 2)
  image = DRAW.normal(size=(2, 8, 8, 3)).astype(np.float32)
  want = run_model(exp.model, params, image)
  np.testing.assert_allclose(run_model(loaded.model, loaded.params, image), want, atol=2e-5)


def test_weights_that_are_resized_in_the_model_are_not_written(trained, tmp_path):
  exp, params, _ = opening.from_workdir(trained[0], {'model.patch_size': '2'})
  with pytest.raises(ValueError, match=r'model.embedding_size=\(4, 4\): only None, \(2, 2\)'):
    vit_jax.save(exp.model, params, tmp_path, format='timm')


def test_a_hybrid_refuses_another_patch_size():
  path = DATA / 'paper_hybrid' / 'weights.npz'
  own = vit_jax.load(path)
  assert vit_jax.load(path, patch_size=own.model.patch_size).model == own.model
  with pytest.raises(ValueError, match='patches of a hybrid .* cannot be resized'):
    vit_jax.load(path, patch_size=2 * own.model.patch_size[0])


@pytest.mark.slow
def test_a_mode_uses_the_patch_size_of_its_config(trained):
  """Once for published weights, resized when they are loaded, and once for a run."""
  path = str(DATA / 'hf_classifier')
  image = next(DATA.parent.parent.glob('docs/images/serve.png'))
  request = Request(init=path, overrides={'model.patch_size': '4'})
  arrays, _ = prediction.features(request, [image], 'tokens')
  size = vit_jax.load(path).preprocessing.size
  assert arrays['feature'].shape[1] == 1 + size[0] // 4 * size[1] // 4
  request = Request(trained[0], overrides={'model.patch_size': '2'})
  arrays, _ = prediction.features(request, [image], 'tokens')
  assert arrays['feature'].shape == (1, 16, 16)  # images of 8x8
