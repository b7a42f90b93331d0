"""The Vision Transformer as Flax modules."""

from vit_jax.model.encoder import REMAT
from vit_jax.model.layers import ACTIVATIONS, Dense
from vit_jax.model.pooling import POOLS
from vit_jax.model.positions import RESIZES, resize_positions, sincos
from vit_jax.model.resnet import stem_stride
from vit_jax.model.variants import (
  ATTRIBUTES,
  POSITION_PREFIXES,
  POSITIONS,
  VARIANTS,
  attributes,
  check_model,
  make,
  variant_fields,
)
from vit_jax.model.vit import ViT

__all__ = [
  'ACTIVATIONS',
  'ATTRIBUTES',
  'POOLS',
  'POSITIONS',
  'POSITION_PREFIXES',
  'REMAT',
  'RESIZES',
  'VARIANTS',
  'Dense',
  'ViT',
  'attributes',
  'check_model',
  'make',
  'resize_positions',
  'sincos',
  'stem_stride',
  'variant_fields',
]
