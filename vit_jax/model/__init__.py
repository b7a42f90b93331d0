"""The Vision Transformer as Flax modules."""

from vit_jax.model.adapters import (
  ADAPTED,
  ADAPTERS,
  adapted,
  applied,
  check_adapter,
  merged,
)
from vit_jax.model.attention import ATTENTION, flash, flash_obstacle, plain, select_kernel
from vit_jax.model.encoder import REMAT, Encoder, kept_bytes
from vit_jax.model.heads import head_logits, knn_logits, unit
from vit_jax.model.layers import ACTIVATIONS, MLPS, Block, Dense
from vit_jax.model.patching import Packer, Padded, cut, native_grid, resize_embedding
from vit_jax.model.pooling import POOLS, Pool, pooled, without_pool
from vit_jax.model.positions import POSITIONS, RESIZES, Position, resize_positions, sincos
from vit_jax.model.products import stored_transpose, wants_stored
from vit_jax.model.resnet import stem_stride
from vit_jax.model.variants import (
  ATTRIBUTES,
  POSITION_PREFIXES,
  VARIANTS,
  attributes,
  check_model,
  check_parameters,
  make,
  stretched,
  variant_fields,
  variant_of,
)
from vit_jax.model.vit import ViT, first_layer, last_layer

__all__ = [
  'ACTIVATIONS',
  'ADAPTED',
  'ADAPTERS',
  'ATTENTION',
  'ATTRIBUTES',
  'MLPS',
  'POOLS',
  'POSITIONS',
  'POSITION_PREFIXES',
  'REMAT',
  'RESIZES',
  'VARIANTS',
  'Block',
  'Dense',
  'Encoder',
  'Packer',
  'Padded',
  'Pool',
  'Position',
  'ViT',
  'adapted',
  'applied',
  'attributes',
  'check_adapter',
  'check_model',
  'check_parameters',
  'cut',
  'first_layer',
  'flash',
  'flash_obstacle',
  'head_logits',
  'kept_bytes',
  'knn_logits',
  'last_layer',
  'make',
  'merged',
  'native_grid',
  'plain',
  'pooled',
  'resize_embedding',
  'resize_positions',
  'select_kernel',
  'sincos',
  'stem_stride',
  'stored_transpose',
  'stretched',
  'unit',
  'variant_fields',
  'variant_of',
  'wants_stored',
  'without_pool',
]
