"""Augmentation, mixing and normalisation of image batches on the device."""

from vit_jax.augment.crops import PAD_MODES
from vit_jax.augment.mixing import partner
from vit_jax.augment.pipeline import (
  AUGMENTATIONS,
  Augmentation,
  active,
  augment,
  augment_and_mix,
  mixes,
  normalize,
)
from vit_jax.augment.randaugment import MAX_MAGNITUDES, SPACES

__all__ = [
  'AUGMENTATIONS',
  'MAX_MAGNITUDES',
  'PAD_MODES',
  'SPACES',
  'Augmentation',
  'active',
  'augment',
  'augment_and_mix',
  'mixes',
  'normalize',
  'partner',
]
