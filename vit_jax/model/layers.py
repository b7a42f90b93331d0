"""The layers that blocks and heads are made of.

Decisions:
  * Random numbers for an example depend on its index in the batch of all devices, never on the
    shape of the array. The number of devices and micro-batches therefore does not change them.
  * `sow('intermediates', 'attention_BKNN')` is the only way to get attention weights. Apply the
    model with `mutable=['intermediates']` to receive the weights.
"""

import dataclasses
import functools
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from vit_jax.model import attention, positions
from vit_jax.model.products import matmul

# The paper's code uses `gelu_tanh`, models from PyTorch use `gelu`, and the first CLIP models use
# `quick_gelu`.
ACTIVATIONS = {
  'gelu_tanh': functools.partial(nn.gelu, approximate=True),
  'gelu': functools.partial(nn.gelu, approximate=False),
  'quick_gelu': lambda x: x * nn.sigmoid(1.702 * x),
}


@dataclasses.dataclass(frozen=True)
class Block:
  """Description of an encoder block; `ViT` documents the attributes with the same names.

  `head_dim` is the size of a head, and `stochastic_depth` is the rate of this block.
  """

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
  attention: str = 'auto'


class Dense(nn.Module):
  """A linear layer `y = x W + b` over the last `axes` axes of x, as one two-dimensional product.

  Attributes:
    features: shape of the output's last axes; the kernel's shape is `[*inputs, *features]`.
    axes: number of axes of x, counted from the last, that the product sums over.
  """

  features: tuple[int, ...]
  axes: int = 1
  use_bias: bool = True
  dtype: Any = jnp.float32
  kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
  bias_init: nn.initializers.Initializer = nn.initializers.zeros

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    batch, inputs = x.shape[: -self.axes], x.shape[-self.axes :]
    matrix = math.prod(inputs), math.prod(self.features)
    kernel = self.weights(inputs).astype(self.dtype).reshape(matrix)
    y = matmul(x.astype(self.dtype).reshape(-1, matrix[0]), kernel)
    if self.use_bias:
      bias = self.param('bias', self.bias_init, self.features)
      y = y + bias.astype(self.dtype).reshape(-1)
    return y.reshape(*batch, *self.features)

  def weights(self, inputs: tuple[int, ...]) -> jax.Array:
    """Returns the kernel for inputs of this shape, `[*inputs, *features]`."""
    matrix = math.prod(inputs), math.prod(self.features)

    def init_kernel(key, shape):
      return self.kernel_init(key, matrix).reshape(shape)

    return self.param('kernel', init_kernel, (*inputs, *self.features))


class Dropout(nn.Module):
  """Dropout whose mask is drawn separately for each example.

  With `whole`, all values of an example are kept or dropped together. At the end of a residual
  branch, this is stochastic depth (Huang et al. 2016, 1603.09382).
  """

  rate: float
  whole: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, example_B: jax.Array | None) -> jax.Array:
    """Applies dropout to `x`, `[B, ...]`; `Encoder` describes `example_B`."""
    if example_B is None or self.rate == 0:
      return x
    key = self.make_rng('dropout')
    shape = (1,) * (x.ndim - 1) if self.whole else x.shape[1:]

    def draw(example):
      return keep_mask(jax.random.fold_in(key, example), self.rate, shape)

    return jnp.where(jax.vmap(draw)(example_B), x / (1 - self.rate), 0).astype(x.dtype)


def keep_mask(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
  """Draws which values dropout keeps. The rate is rounded to a multiple of 2^-16.

  Random numbers are a large part of the cost of dropout, so each one serves two values.
  """
  *outer, inner = shape
  word = jax.random.bits(key, (*outer, -(-inner // 2)), jnp.uint32)
  bits = jnp.concatenate([word & 0xFFFF, word >> 16], axis=-1)[..., :inner]
  return bits >= round(rate * 2**16)


class Attention(nn.Module):
  """Multi-head attention (paper, Appendix A).

  Keys and values come from `x_BND`. Queries come from `query_BND`; if it is None, from `x_BND`.
  `Encoder` describes the other arguments.
  """

  block: Block

  @nn.compact
  def __call__(
    self,
    x_BND: jax.Array,
    example_B: jax.Array | None = None,
    rope_NE: tuple[jax.Array, jax.Array] | None = None,
    length_B: jax.Array | None = None,
    query_BND: jax.Array | None = None,
  ) -> jax.Array:
    block = self.block
    heads = block.num_heads, block.head_dim
    project = functools.partial(Dense, heads, use_bias=block.qkv_bias, dtype=block.dtype)
    query_BNKE = project(name='query')(x_BND if query_BND is None else query_BND)
    key_BNKE = project(name='key')(x_BND)
    value_BNKE = project(name='value')(x_BND)
    if block.qk_norm:  # Dehghani et al. 2023 (2302.05442), Section 2.1
      norm = functools.partial(nn.LayerNorm, block.norm_epsilon, dtype=block.dtype)
      query_BNKE, key_BNKE = norm(name='query_norm')(query_BNKE), norm(name='key_norm')(key_BNKE)
    if rope_NE is not None:
      query_BNKE, key_BNKE = (positions.rotate(x, *rope_NE) for x in (query_BNKE, key_BNKE))

    rate, keep_BKNN = block.attention_dropout, None
    if rate and example_B is not None:
      (batch, queries, heads, _), keys = query_BNKE.shape, key_BNKE.shape[1]
      ones_BKNN = jnp.ones((batch, heads, queries, keys))
      keep_BKNN = Dropout(rate)(ones_BKNN, example_B) > 0
    choice = block.attention
    if self.is_mutable_collection('intermediates'):
      weights_BKNN = attention.attention_weights(query_BNKE, key_BNKE, length_B)
      self.sow('intermediates', 'attention_BKNN', weights_BKNN)
      choice = 'plain'  # which computes the same weights, so XLA computes them once
    if length_B is not None:
      y_BNKE = attention.padded(query_BNKE, key_BNKE, value_BNKE, length_B)
    else:
      kernel = attention.select_kernel(choice, query_BNKE, key_BNKE, keep_BKNN is not None)
      y_BNKE = kernel(query_BNKE, key_BNKE, value_BNKE, keep_BKNN, rate)
    return Dense((x_BND.shape[-1],), axes=2, dtype=block.dtype, name='out')(y_BNKE)


class Mlp(nn.Module):
  """An MLP of two layers with a GELU between them (paper, Section 3.1)."""

  block: Block

  @nn.compact
  def __call__(self, x_BND: jax.Array, example_B: jax.Array | None = None) -> jax.Array:
    block, bias_init = self.block, nn.initializers.normal(stddev=1e-6)
    dense = functools.partial(Dense, dtype=block.dtype, bias_init=bias_init)
    x_BNM = ACTIVATIONS[block.activation](dense((block.mlp_dim,), name='up')(x_BND))
    x_BNM = Dropout(block.dropout)(x_BNM, example_B)
    return dense((x_BND.shape[-1],), name='down')(x_BNM)
