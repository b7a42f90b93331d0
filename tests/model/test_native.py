"""Tests images of different shapes in one padded batch: each gives what it gives alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import run_model
from vit_jax.model import Packer, Pool, native_grid, pooling, variants

DRAW = np.random.RandomState(0)
GRIDS = [(2, 3), (3, 2), (1, 6), (4, 1), (2, 2)]  # of the images; positions are for a grid of 3 x 3
IMAGES = [DRAW.normal(size=(4 * h, 4 * w, 3)).astype(np.float32) for h, w in GRIDS]


def build(**fields):
  """Returns a model with the positions of a 3 x 3 grid, and random parameters."""
  model = variants.make('tiny', 5, width=16, depth=2, mlp_dim=8, patch_size=4, **fields)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 12, 12, 3)))['params']
  params = jax.tree.map(lambda x: DRAW.normal(size=x.shape).astype(np.float32) / 2, shapes)
  return model.clone(position_grid=(3, 3)), params


@pytest.mark.slow_after_first
@pytest.mark.parametrize('fields', [
    dict(pool='cls'),
    dict(pool='gap', position='rope'),
    dict(pool='map', position='sincos', qk_norm=True),
    dict(pool='cls_gap', num_registers=2, position_prefix='all', norm_after_pool=True),
    dict(pool='distilled', num_registers=1, position_prefix='all', pre_norm=True),
    dict(pool='gap', position='none', remat='full', embedding_size=(3, 5)),
    dict(pool='map', num_registers=1, class_token=True, position_prefix='none', layer_scale=0.1),
    dict(pool='cls', num_registers=1, position='rope_unit', mlp='gated', key_bias=False),  # DINOv3
    dict(pool='gap', class_token=True, position='learned_rope', rope_grid=(16, 16),
         mlp='gated_norm', out_norm=True),  # EVA-02
    dict(pool='map', position='learned_rope', mlp='gated'),
    dict(pool='cls', pre_norm=True, projection=6, cosine=True),  # zero-shot with CLIP
])  # fmt: skip
def test_padded_images_have_the_logits_of_each_image_alone(fields):
  model, params = build(**fields)
  padded = Packer(model, params, 6)(IMAGES)
  assert padded.patch_BNpqC.shape == (5, 6, 4, 4, 3) and padded.count_B.tolist() == [6, 6, 6, 4, 4]
  found = run_model(model, params, padded)
  for image, logits in zip(IMAGES, found):
    np.testing.assert_allclose(logits, run_model(model, params, image[None])[0], atol=2e-5)
  outside = np.arange(6) >= padded.count_B[:, None]
  noise = np.where(outside[..., None, None, None], 1e3, padded.patch_BNpqC).astype(np.float32)
  np.testing.assert_array_equal(run_model(model, params, padded.replace(patch_BNpqC=noise)), found)
  longer = run_model(model, params, Packer(model, params, 9)(IMAGES))
  np.testing.assert_allclose(longer, found, atol=2e-5)


@pytest.mark.slow
def test_padded_images_agree_in_bfloat16():
  model, params = build(pool='map')
  want = run_model(model, params, Packer(model, params, 6)(IMAGES))
  half = model.clone(dtype=jnp.bfloat16)
  found = run_model(half, params, Packer(half, params, 6)(IMAGES))
  alone = np.concatenate([run_model(half, params, image[None]) for image in IMAGES])
  bound = 16 * 2.0**-8 * np.abs(want).max()  # 16 rounding errors
  np.testing.assert_allclose(found, alone, atol=bound)
  np.testing.assert_allclose(found, want, atol=bound)


@pytest.mark.slow
def test_attention_weights_of_padding_are_zero():
  model, params = build(pool='cls')
  padded = Packer(model, params, 6)(IMAGES)
  _, state = model.apply({'params': params}, padded, mutable=['intermediates'])
  weights = np.asarray(state['intermediates']['block_1']['attention']['attention_BKNN'][0])
  np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-6)
  assert (weights[3, :, :, 5:] == 0).all() and (weights[3, :, :, :5] > 0).all()


def brute_force(size, patch, most):
  """Returns the last grid of at most `most` patches while the scale grows in small steps."""
  scale = np.exp(np.linspace(-9, 9, 400_001))
  h, w = (np.maximum(np.ceil(scale * n / p - 1e-9), 1) for n, p in zip(size, patch))
  last = np.flatnonzero(h * w <= most)[-1]
  return int(h[last]), int(w[last])


@pytest.mark.parametrize('size', [(480, 640), (640, 480), (7, 500), (33, 32), (1, 1), (1080, 1920)])
@pytest.mark.parametrize('most', [1, 7, 64, 256])
def test_the_grid_is_the_largest_that_keeps_the_aspect_ratio(size, most):
  for patch in ((16, 16), (8, 14)):
    found = native_grid(size, patch, most)
    assert found == brute_force(size, patch, most)
    assert found[0] * found[1] <= most


@pytest.mark.slow
def test_the_grid_is_that_of_siglip_2_in_transformers():
  from transformers.models.siglip2 import image_processing_pil_siglip2 as theirs

  for height, width, most in DRAW.randint((20, 20, 16), (2000, 2000, 1025), size=(200, 3)).tolist():
    want = theirs.get_image_size_for_max_num_patches(height, width, 16, most)
    assert native_grid((height, width), (16, 16), most) == (want[0] // 16, want[1] // 16)


def test_models_that_cannot_read_padded_images_are_refused_by_name(monkeypatch):
  model, params = build(pool='none')
  with pytest.raises(ValueError, match='model.pool=none is not defined .* cls, gap, map, cls_gap'):
    Packer(model, params, 6)
  mine = Pool(lambda model, x_BND: x_BND.max(axis=1))
  monkeypatch.setitem(pooling.POOLS, 'mine', mine)
  with pytest.raises(ValueError, match='model.pool=mine is not defined for images of different'):
    Packer(model.clone(pool='mine'), params, 6)
  padded = Packer(model.clone(pool='gap'), params, 6)(IMAGES)
  with pytest.raises(ValueError, match='model.pool=mine is not defined'):  # in the model, too
    model.clone(pool='mine').apply({'params': params}, padded)
  with pytest.raises(ValueError, match='need a model without a stem, got model.resnet='):
    Packer(model.clone(resnet=(1,)), params, 6)
  with pytest.raises(ValueError, match='max_patches must be a positive integer, got 0'):
    Packer(model.clone(pool='gap'), params, 0)
  with pytest.raises(ValueError, match='max_patches=65537: expected at most 65,536'):
    Packer(model.clone(pool='gap'), params, 65537)
  with pytest.raises(ValueError, match='An image has 6 patches, more than max_patches=4 allows'):
    Packer(model.clone(pool='gap'), params, 4)(IMAGES)
