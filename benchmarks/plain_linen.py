"""A Vision Transformer built from flax's own layers, as a baseline for speed.

It uses `nn.MultiHeadDotProductAttention` and `nn.Dense` on `[B, N, D]`, as the paper's repository
does.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp


class PlainViT(nn.Module):
  """Vision Transformer with learned positions and the pool `cls` or `gap`.

  The fields are the arguments that `works.sizes` returns.
  """

  image_size: int
  patch_size: int
  width: int
  depth: int
  num_heads: int
  head_dim: int
  mlp_dim: int
  activation: str
  pool: str
  num_classes: int
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, image_BHWC: jax.Array) -> jax.Array:
    patch = (self.patch_size,) * 2
    x = nn.Conv(self.width, patch, patch, 'VALID', dtype=self.dtype, name='embedding')(image_BHWC)
    x = x.reshape(len(x), -1, self.width)
    if self.pool == 'cls':
      cls = self.param('cls', nn.initializers.zeros, (1, 1, self.width)).astype(x.dtype)
      x = jnp.concatenate([jnp.broadcast_to(cls, (len(x), 1, self.width)), x], axis=1)
    normal = nn.initializers.normal(0.02)
    x += self.param('pos_embedding', normal, (1, *x.shape[1:])).astype(x.dtype)
    for i in range(self.depth):
      y = nn.LayerNorm(1e-6, dtype=self.dtype, name=f'attention_norm_{i}')(x)
      x += nn.MultiHeadDotProductAttention(
        self.num_heads,
        dtype=self.dtype,
        qkv_features=self.num_heads * self.head_dim,
        out_features=self.width,
        name=f'attention_{i}',
      )(y, y)
      y = nn.LayerNorm(1e-6, dtype=self.dtype, name=f'mlp_norm_{i}')(x)
      y = nn.Dense(self.mlp_dim, dtype=self.dtype, name=f'up_{i}')(y)
      y = nn.gelu(y, approximate=self.activation == 'gelu_tanh')
      x += nn.Dense(self.width, dtype=self.dtype, name=f'down_{i}')(y)
    x = nn.LayerNorm(1e-6, dtype=self.dtype, name='norm')(x)
    x = x[:, 0] if self.pool == 'cls' else x.mean(axis=1)
    return nn.Dense(self.num_classes, name='head')(x)
