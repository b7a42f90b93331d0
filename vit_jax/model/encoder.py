"""The encoder's block (paper, Section 3.1, equations 2 and 3)."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from vit_jax.model.layers import Attention, Dropout, Mlp

REMAT = {  # what the backward pass keeps instead of computing it again
  'none': None,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'full': jax.checkpoint_policies.nothing_saveable,
}


class EncoderBlock(nn.Module):
  """Pre-norm block: `z' = MSA(LN(z)) + z`, `z'' = MLP(LN(z')) + z'` (equations 2 and 3)."""

  num_heads: int
  head_dim: int
  mlp_dim: int
  dropout: float = 0.0
  attention_dropout: float = 0.0
  stochastic_depth: float = 0.0
  layer_scale: float | None = None
  qkv_bias: bool = True
  qk_norm: bool = False
  activation: str = 'gelu_tanh'
  norm_epsilon: float = 1e-6
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    x_BND: jax.Array,
    example_B: jax.Array | None = None,
    rope_NE: tuple[jax.Array, jax.Array] | None = None,
  ) -> jax.Array:
    y_BND = nn.LayerNorm(self.norm_epsilon, dtype=self.dtype, name='attention_norm')(x_BND)
    y_BND = Attention(
      self.num_heads,
      self.head_dim,
      self.attention_dropout,
      self.qkv_bias,
      self.qk_norm,
      self.norm_epsilon,
      self.dtype,
      name='attention',
    )(y_BND, example_B, rope_NE)
    x_BND = x_BND + self.residual(y_BND, example_B, 'attention_scale')

    y_BND = nn.LayerNorm(self.norm_epsilon, dtype=self.dtype, name='mlp_norm')(x_BND)
    y_BND = Mlp(self.mlp_dim, self.dropout, self.activation, self.dtype, name='mlp')(
      y_BND, example_B
    )
    return x_BND + self.residual(y_BND, example_B, 'mlp_scale')

  def residual(self, y_BND: jax.Array, example_B: jax.Array | None, name: str) -> jax.Array:
    """Dropout, LayerScale (Touvron et al. 2021, 2103.17239, eq. 4), stochastic depth."""
    y_BND = Dropout(self.dropout)(y_BND, example_B)
    if self.layer_scale is not None:
      init = nn.initializers.constant(self.layer_scale)
      y_BND = y_BND * self.param(name, init, y_BND.shape[-1:]).astype(y_BND.dtype)
    return Dropout(self.stochastic_depth, whole=True)(y_BND, example_B)
