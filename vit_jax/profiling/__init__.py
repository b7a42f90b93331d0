"""Repeats training steps of a run, to show where their time goes or to verify results."""

from vit_jax.profiling.recording import profile
from vit_jax.profiling.replay import Verdict, verify
from vit_jax.profiling.table import as_table

__all__ = ['Verdict', 'as_table', 'profile', 'verify']
