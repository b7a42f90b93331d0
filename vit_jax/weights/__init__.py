"""Weights in the formats of other code bases."""

from vit_jax.weights.formats import Preprocessing, Weights, load_json
from vit_jax.weights.hf import save_hf
from vit_jax.weights.npz import read_arrays, save_npz, write_arrays
from vit_jax.weights.param_tree import flatten_params, image_channels
from vit_jax.weights.pretrained import Pretrained, adapt, check_params, square_grid
from vit_jax.weights.reader import read_weights
from vit_jax.weights.timm import save_timm

__all__ = [
  'Preprocessing',
  'Pretrained',
  'Weights',
  'adapt',
  'check_params',
  'flatten_params',
  'image_channels',
  'load_json',
  'read_arrays',
  'read_weights',
  'save_hf',
  'save_npz',
  'save_timm',
  'square_grid',
  'write_arrays',
]
