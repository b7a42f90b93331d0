"""How the tokens of the last block become one vector: `POOLS`."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from vit_jax.model.layers import Attention, Mlp


class MapHead(nn.Module):
  """Multi-head attention pooling by one learned query (Zhai et al. 2021, 2106.04560, 3.1)."""

  num_heads: int
  head_dim: int
  mlp_dim: int
  activation: str
  norm_epsilon: float
  dtype: Any

  @nn.compact
  def __call__(self, x_BND: jax.Array) -> jax.Array:
    batch, _, width = x_BND.shape
    query_11D = self.param('query', nn.initializers.xavier_uniform(), (1, 1, width))
    query_B1D = jnp.broadcast_to(query_11D.astype(x_BND.dtype), (batch, 1, width))
    attention = Attention(self.num_heads, self.head_dim, dtype=self.dtype, name='attention')
    x_B1D = attention(x_BND, query_BND=query_B1D)
    y_B1D = nn.LayerNorm(self.norm_epsilon, dtype=self.dtype, name='mlp_norm')(x_B1D)
    mlp = Mlp(self.mlp_dim, activation=self.activation, dtype=self.dtype, name='mlp')
    return (x_B1D + mlp(y_B1D))[:, 0]


def map_pool(model: nn.Module, patch_BND: jax.Array) -> jax.Array:
  """`MapHead` of the model's sizes."""
  return MapHead(
    model.num_heads,
    model.head_size,
    model.mlp_dim,
    model.activation,
    model.norm_epsilon,
    model.dtype,
    name='map',
  )(patch_BND)


# Each takes the model and its tokens: class token, registers, patches. It gives `[B, D]`, but
# `none` the tokens, and the two that put two vectors side by side `[B, 2 D]`: `cls_gap` as
# DINOv2's classifier, `distilled` (class and distillation token, which is the first
# register) as DeiT's.
POOLS = {
  'cls': lambda model, x_BND: x_BND[:, 0],
  'gap': lambda model, x_BND: x_BND[:, model.num_prefix :].mean(axis=1),
  'map': lambda model, x_BND: map_pool(model, x_BND[:, model.num_prefix :]),
  'cls_gap': lambda model, x_BND: jnp.concatenate(
    [x_BND[:, 0], x_BND[:, model.num_prefix :].mean(axis=1)], axis=-1
  ),
  'distilled': lambda model, x_BND: jnp.concatenate([x_BND[:, 0], x_BND[:, 1]], axis=-1),
  'none': lambda model, x_BND: x_BND,
}
CLASS_POOLS = ('cls', 'cls_gap', 'distilled')  # they read the class token
