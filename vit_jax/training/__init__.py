"""The train step, the loop around it, and how a run resumes."""

from vit_jax.training.fitting import estimated
from vit_jax.training.resume import saved_config
from vit_jax.training.state import init_state
from vit_jax.training.tracing import OTHER, activations, module_of, of_stages, work
from vit_jax.training.trainer import train

__all__ = [
  'OTHER',
  'activations',
  'estimated',
  'init_state',
  'module_of',
  'of_stages',
  'saved_config',
  'train',
  'work',
]
