"""The encoder of the Vision Transformer and its block (paper, Section 3.1 and Figure 1)."""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp

from vit_jax.model.layers import Attention, Block, Dropout, Mlp, norm_layer

# Maps each value of `model.remat` to a policy of `jax.checkpoint`. The policy decides which values
# the forward pass saves. The backward pass computes all other values again. None: saves all values.
REMAT = {
  'none': None,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'full': jax.checkpoint_policies.nothing_saveable,
}


class Encoder(nn.Module):
  """The blocks and the LayerNorm after the last block: `[B, N, D]` to `[B, N, D]`.

  Attributes:
    block: settings of the last block. The other blocks differ only in their rate of stochastic
      depth. The rate rises linearly from 0 in the first block to the rate of the last block.
    depth: number of blocks.
    final_norm: whether a LayerNorm follows the last block.
    remat: which values are saved for the backward pass, one of `REMAT`.
  """

  block: Block
  depth: int
  final_norm: bool = True
  remat: str = 'none'

  @nn.compact
  def __call__(
    self,
    x_BND: jax.Array,
    example_B: jax.Array | None = None,
    rope_NE: tuple[jax.Array, jax.Array] | None = None,
    length_B: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the encoded tokens, `[B, N, D]`.

    Args:
      x_BND: tokens.
      example_B: index of each example in the batch of all devices. The dropout masks of an example
        depend on this index. None at inference.
      rope_NE: cosine and sine of the rotary angles, `[N, E/2]` each, for heads of size E. The shape
        is `[B, N, E/2]` if the examples have different angles. None for no rotation.
      length_B: number of tokens of each example; all later tokens are padding. None: no padding.
    """
    policy, block_class = REMAT[self.remat], EncoderBlock
    if policy is not None:
      block_class = nn.remat(EncoderBlock, policy=policy)
    for i in range(self.depth):
      rate = self.block.stochastic_depth * i / max(self.depth - 1, 1)
      block = dataclasses.replace(self.block, stochastic_depth=rate)
      x_BND = block_class(block, name=f'block_{i}')(x_BND, example_B, rope_NE, length_B)
    if self.final_norm:
      x_BND = norm_layer(self.block.norm_epsilon, self.block.dtype, 'norm')(x_BND)
    return x_BND


class EncoderBlock(nn.Module):
  """Pre-norm block: `z' = MSA(LN(z)) + z`, `z'' = MLP(LN(z')) + z'` (paper, equations 2 and 3).

  z are the tokens before the block, z' after attention (MSA), and z'' after the block.
  """

  block: Block

  @nn.compact
  def __call__(
    self,
    x_BND: jax.Array,
    example_B: jax.Array | None = None,
    rope_NE: tuple[jax.Array, jax.Array] | None = None,
    length_B: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the tokens after this block, `[B, N, D]`; arguments as in `Encoder.__call__`."""
    epsilon, dtype = self.block.norm_epsilon, self.block.dtype
    y_BND = norm_layer(epsilon, dtype, 'attention_norm')(x_BND)
    y_BND = Attention(self.block, name='attention')(y_BND, example_B, rope_NE, length_B)
    x_BND = x_BND + self.residual(y_BND, example_B, 'attention_scale')

    y_BND = norm_layer(epsilon, dtype, 'mlp_norm')(x_BND)
    y_BND = Mlp(self.block, name='mlp')(y_BND, example_B)
    return x_BND + self.residual(y_BND, example_B, 'mlp_scale')

  def residual(self, y_BND: jax.Array, example_B: jax.Array | None, name: str) -> jax.Array:
    """Applies dropout, LayerScale and stochastic depth to the output of a residual branch.

    Args:
      y_BND: output of attention or of the MLP.
      example_B: as in `Encoder.__call__`.
      name: name for the parameter of LayerScale (Touvron et al. 2021, 2103.17239, equation 4).
    """
    y_BND = Dropout(self.block.dropout)(y_BND, example_B)
    if self.block.layer_scale is not None:
      init = nn.initializers.constant(self.block.layer_scale)
      y_BND = y_BND * self.param(name, init, y_BND.shape[-1:]).astype(y_BND.dtype)
    return Dropout(self.block.stochastic_depth, whole=True)(y_BND, example_B)


def kept(
  x_BND: jax.Array,
  rope_NE: tuple[jax.Array, jax.Array] | None,
  seen_BS: jax.Array,
  prefix: int,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
  """Drops the tokens of all patches except the patches `seen_BS`.

  Args:
    x_BND: all tokens. The first `prefix` tokens are not patches, and are always kept.
    rope_NE: cosine and sine of the rotary angles of these tokens, `[N, E/2]` each, for heads of
      size E; None for no rotation.
    seen_BS: indices of the S patches to keep in each image, counted from 0 at the first patch.
    prefix: number of tokens before the patches.

  Returns:
    The kept tokens, `[B, prefix + S, D]`.
    Cosine and sine of the kept tokens, `[B, prefix + S, E/2]` each; None if `rope_NE` is None.
  """
  before_BP = jnp.broadcast_to(jnp.arange(prefix), (len(seen_BS), prefix))
  place_BT = jnp.concatenate([before_BP, prefix + seen_BS], axis=1)
  rope = rope_NE and tuple(jnp.asarray(angle_NE)[place_BT] for angle_NE in rope_NE)
  return jnp.take_along_axis(x_BND, place_BT[..., None], axis=1), rope


def block_tokens(model: nn.Module, params: dict, image_BHWC: jax.Array) -> list[jax.Array]:
  """Returns a list with the tokens `[B, N, D]` after each block, before the last LayerNorm.

  Args:
    model: a `ViT`.
    params: the model's parameters.
    image_BHWC: normalised images.
  """
  is_block = lambda module, method: isinstance(module, EncoderBlock) and method == '__call__'
  _, state = model.clone(remat='none').apply(
    {'params': params}, image_BHWC, capture_intermediates=is_block
  )
  blocks = state['intermediates']
  return [blocks[f'block_{i}']['__call__'][0] for i in range(model.depth)]


def kept_bytes(model: nn.Module, tokens: int) -> int:
  """Estimates how many bytes of activations per token a backward pass on a CPU needs.

  The estimate was fitted to `training.tracing.activations` for models of cifar10.py in float32. It
  is the same for bfloat16, because XLA then also stores float32 values (`bfloat16` in
  results/micro_batches.json). It is too high if `remat` saves memory, or if the blocks see only
  some of the tokens (masked autoencoders).

  Args:
    model: a `ViT`.
    tokens: number of tokens per example.
  """
  return 4 * model.depth * (9 * model.width + 5 * model.mlp_dim + model.num_heads * tokens)
