"""The train step, the loop around it, and how a run resumes."""

from vit_jax.training.resume import saved_config
from vit_jax.training.state import init_state
from vit_jax.training.step import loss_fn
from vit_jax.training.trainer import train

__all__ = ['init_state', 'loss_fn', 'saved_config', 'train']
