"""Shows where the time of a training step goes."""

from vit_jax.profiling.recording import profile
from vit_jax.profiling.table import as_table

__all__ = ['as_table', 'profile']
