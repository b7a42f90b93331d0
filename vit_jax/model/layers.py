"""The layers that blocks and heads are made of.

Decisions:
  * Random numbers for an example depend on its index in the global batch, never on the
    shape of an array. So an example gets the same numbers for any number of devices or
    micro-batches.
  * A model returns its attention weights only in Flax's collection `intermediates`, under the name
    `attention_BKNN` of each attention layer. Apply the model with `mutable=['intermediates']` to
    receive this collection.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from vit_jax.distributed import target
from vit_jax.model import attention, positions
from vit_jax.model.products import activate, layer_norm, matmul

# The paper's code uses `gelu_tanh`, models from PyTorch use `gelu`, the first CLIP models use
# `quick_gelu`, and gated MLPs mostly use `silu`.
ACTIVATIONS = {
  'gelu_tanh': functools.partial(nn.gelu, approximate=True),
  'gelu': functools.partial(nn.gelu, approximate=False),
  'quick_gelu': lambda x: x * nn.sigmoid(1.702 * x),
  'silu': nn.silu,
}


@dataclasses.dataclass(frozen=True)
class Block:
  """Settings of an encoder block, which have the same names as the attributes of `ViT`.

  `ViT` documents the attributes. Two attributes differ: `head_dim` is never None, and
  `stochastic_depth` is the rate of this block.
  """

  num_heads: int
  head_dim: int
  mlp_dim: int
  dropout: float = 0.0
  attention_dropout: float = 0.0
  stochastic_depth: float = 0.0
  layer_scale: float | None = None
  qkv_bias: bool = True
  key_bias: bool | None = None
  qk_norm: bool = False
  out_norm: bool = False
  mlp: str = 'plain'
  activation: str = 'gelu_tanh'
  norm_epsilon: float = 1e-6
  dtype: Any = jnp.float32
  attention: str = 'auto'


class Dense(nn.Module):
  """A linear layer `y = x W + b` over the last `axes` axes of x, computed as one matrix product.

  Attributes:
    features: shape of the output's last axes; the kernel's shape is `[*inputs, *features]`.
    axes: number of axes over which the product sums; they are the last axes of x.
    use_bias: whether b is added.
    dtype: type of the computation; parameters are float32.
    kernel_init: initializer. It is called with the shape of a matrix: the product of `inputs` by
      the product of `features`. The result is reshaped to the kernel's shape.
    bias_init: initializer of the bias.
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
      y = (y + bias.reshape(-1)).astype(self.dtype)  # the bias's gradient is summed in float32
    return y.reshape(*batch, *self.features)

  def weights(self, inputs: tuple[int, ...]) -> jax.Array:
    """Returns the kernel `[*inputs, *features]`; `inputs` is the shape of the last axes of x."""
    matrix = math.prod(inputs), math.prod(self.features)

    def init_kernel(key, shape):
      return self.kernel_init(key, matrix).reshape(shape)

    return self.param('kernel', init_kernel, (*inputs, *self.features))


class CpuLayerNorm(nn.Module):
  """LayerNorm over the last `axes` axes of x, faster on CPUs than flax's (see `layer_norm`).

  Parameters and result are the same as in flax's LayerNorm.
  """

  epsilon: float
  dtype: Any = jnp.float32
  axes: int = 1

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = x.shape[-self.axes :]
    scale = self.param('scale', nn.initializers.ones, shape).reshape(-1)
    bias = self.param('bias', nn.initializers.zeros, shape).reshape(-1)
    y = layer_norm(x.reshape(-1, math.prod(shape)), scale, bias, self.epsilon)
    return y.reshape(x.shape).astype(self.dtype)


def norm_layer(epsilon: float, dtype: Any, name: str | None = None, axes: int = 1) -> nn.Module:
  """Returns a LayerNorm over the last `axes` axes; it is `CpuLayerNorm` on CPUs, else flax's."""
  if target().platform == 'cpu':
    return CpuLayerNorm(epsilon, dtype, axes, name=name)
  last = tuple(range(-axes, 0))
  return nn.LayerNorm(epsilon, dtype=dtype, reduction_axes=last, feature_axes=last, name=name)


class Dropout(nn.Module):
  """Dropout whose mask is drawn separately for each example.

  If `whole` is True, all values of an example are kept or dropped together. At the end of a
  residual branch, such dropout is stochastic depth (Huang et al. 2016, 1603.09382).
  """

  rate: float
  whole: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, example_B: jax.Array | None) -> jax.Array:
    """Returns `x`, `[B, ...]`, after dropout; if `example_B` is None, `x` is returned unchanged.

    `example_B` is the index of each example in the batch of all devices. The index determines the
    mask of the example.
    """
    if example_B is None or self.rate == 0:
      return x
    key = self.make_rng('dropout')
    shape = (1,) * (x.ndim - 1) if self.whole else x.shape[1:]

    def draw(example):
      return keep_mask(jax.random.fold_in(key, example), self.rate, shape)

    return jnp.where(jax.vmap(draw)(example_B), x / (1 - self.rate), 0).astype(x.dtype)


def keep_mask(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
  """Returns a random mask, bool of the given shape: True for values that dropout keeps.

  Random numbers are a large part of the cost of dropout, so each random 32-bit number decides about
  two values. Each decision uses 16 bits, so the rate is rounded to a multiple of 2^-16.
  """
  *outer, inner = shape
  word = jax.random.bits(key, (*outer, -(-inner // 2)), jnp.uint32)
  bits = jnp.concatenate([word & 0xFFFF, word >> 16], axis=-1)[..., :inner]
  return bits >= round(rate * 2**16)


class Attention(nn.Module):
  """Multi-head attention (paper, Appendix A), with one output `[D]` for each query token.

  Keys and values come from `x_BND`. Queries come from `query_BND`, or from `x_BND` if `query_BND`
  is None. The other arguments are as in `Encoder.__call__`.
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
    project = functools.partial(Dense, heads, dtype=block.dtype)
    norm = functools.partial(norm_layer, block.norm_epsilon, block.dtype)
    bias = block.qkv_bias
    key_bias = bias if block.key_bias is None else block.key_bias
    query_BNKE = project(name='query', use_bias=bias)(x_BND if query_BND is None else query_BND)
    key_BNKE = project(name='key', use_bias=key_bias)(x_BND)
    value_BNKE = project(name='value', use_bias=bias)(x_BND)
    if block.qk_norm:  # Dehghani et al. 2023 (2302.05442), Section 2.1
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
      choice = 'plain'  # `plain` uses the same weights, so XLA computes them only once
    if length_B is not None:
      y_BNKE = attention.padded(query_BNKE, key_BNKE, value_BNKE, length_B)
    else:
      kernel = attention.select_kernel(choice, query_BNKE, key_BNKE, keep_BKNN is not None)
      y_BNKE = kernel(query_BNKE, key_BNKE, value_BNKE, keep_BKNN, rate)
    if block.out_norm:  # Wang et al. 2022 (2210.06423), Section 2.1: one norm over all heads
      y_BNKE = norm(name='out_norm', axes=2)(y_BNKE)
    return Dense((x_BND.shape[-1],), axes=2, dtype=block.dtype, name='out')(y_BNKE)


def plain_units(block: Block, dense: Callable, x_BND: jax.Array) -> jax.Array:
  """Returns M hidden units `f(x W + b)` for each token, `[B, N, M]`; f is the activation."""
  return activate(ACTIVATIONS[block.activation], dense((block.mlp_dim,), name='up')(x_BND))


def gated_units(block: Block, dense: Callable, x_BND: jax.Array) -> jax.Array:
  """Returns the M hidden units `f(x W + b) * (x V + c)` of a gated MLP for each token: `[B, N, M]`.

  f is the activation: `silu` gives SwiGLU, and `gelu` gives GEGLU (Shazeer 2020, 2002.05202,
  equation 6, where the MLPs have no biases).
  """
  gate_BNM = activate(ACTIVATIONS[block.activation], dense((block.mlp_dim,), name='gate')(x_BND))
  return gate_BNM * dense((block.mlp_dim,), name='up')(x_BND)


def normed_units(block: Block, dense: Callable, x_BND: jax.Array) -> jax.Array:
  """Returns the LayerNorm of `gated_units`, `[B, N, M]` (Fang et al. 2023, 2303.11331, 2.1)."""
  norm = norm_layer(block.norm_epsilon, block.dtype, 'hidden_norm')
  return norm(gated_units(block, dense, x_BND))


# Functions `(block, dense, x_BND) -> x_BNM` that compute the hidden units of an MLP. `Mlp` calls
# them. `dense(features, name=...)` creates a linear layer. The name of the layer must be listed in
# `ADAPTED` (`adapters.py`) and in `TENSOR_AXIS` (`distributed/sharding.py`).
MLPS = {'plain': plain_units, 'gated': gated_units, 'gated_norm': normed_units}


class Mlp(nn.Module):
  """The MLP of a block: computes hidden units by `MLPS[block.mlp]` and projects them to `[D]`."""

  block: Block

  @nn.compact
  def __call__(self, x_BND: jax.Array, example_B: jax.Array | None = None) -> jax.Array:
    block, bias_init = self.block, nn.initializers.normal(stddev=1e-6)
    dense = functools.partial(Dense, dtype=block.dtype, bias_init=bias_init)
    x_BNM = Dropout(block.dropout)(MLPS[block.mlp](block, dense, x_BND), example_B)
    return dense((x_BND.shape[-1],), name='down')(x_BNM)
