"""Pictures of what a model attends to and has learned."""

from vit_jax.figures.canvas import resize_map
from vit_jax.figures.gallery import visualize
from vit_jax.figures.maps import attention_summary

__all__ = ['attention_summary', 'resize_map', 'visualize']
