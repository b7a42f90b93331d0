"""Reads and writes weights in the formats of this project and of other code bases."""

from vit_jax.weights.formats import Format, Preprocessing, Pretrained, Weights, load_json
from vit_jax.weights.layouts import flatten_params, image_channels
from vit_jax.weights.npz import read_arrays, write_arrays
from vit_jax.weights.pretrained import Adaptation, adapt, check_params, square_grid, with_pooling
from vit_jax.weights.reader import FORMATS, read_weights

__all__ = [
  'FORMATS', 'Adaptation', 'Format', 'Preprocessing', 'Pretrained', 'Weights', 'adapt',
  'check_params', 'flatten_params', 'image_channels', 'load_json', 'read_arrays', 'read_weights',
  'square_grid', 'with_pooling', 'write_arrays',
]  # fmt: skip
