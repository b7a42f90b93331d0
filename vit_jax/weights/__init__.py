"""Reads and writes weights in the formats of this project and of other code bases."""

from vit_jax.weights.formats import Format, Preprocessing, Pretrained, Weights, load_json
from vit_jax.weights.layouts import flatten_params, image_channels
from vit_jax.weights.npz import read_arrays, write_arrays
from vit_jax.weights.pretrained import (
  Adaptation,
  adapt,
  check_params,
  headless,
  square_grid,
  with_pooling,
)
from vit_jax.weights.program import Program
from vit_jax.weights.reader import FORMATS, find_checkpoint, read_weights

__all__ = [
  'FORMATS', 'Adaptation', 'Format', 'Preprocessing', 'Pretrained', 'Program', 'Weights', 'adapt',
  'check_params', 'find_checkpoint', 'flatten_params', 'headless', 'image_channels', 'load_json',
  'read_arrays', 'read_weights', 'square_grid', 'with_pooling', 'write_arrays',
]  # fmt: skip
