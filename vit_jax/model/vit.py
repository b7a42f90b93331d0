"""The Vision Transformer (Dosovitskiy et al., 2020, https://arxiv.org/abs/2010.11929).

Array names throughout the project end in dimension letters:

  * B: batch. H, W: image height and width. C: channels. h, w: rows and columns of patches.
  * N: tokens, or examples of a split. D: width. K: heads. E: head size. M: MLP width. L: classes.
  * Q: queries. I, O: inputs, outputs of a layer. p, q: rows and columns in a patch. P: p times q.
  * V: grey levels. F: filters. R: rows of a figure.

Parameters are float32. `dtype` is the type of the computation, except that LayerNorm, softmax and
logits are computed in float32.
"""

import dataclasses
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from vit_jax.model import resnet
from vit_jax.model.encoder import Encoder, kept
from vit_jax.model.heads import KnnHead, unit
from vit_jax.model.layers import Block, Dense, Dropout, norm_layer
from vit_jax.model.patching import Padded, PatchEmbedding, check_divides, check_padded, cut
from vit_jax.model.pooling import POOLS
from vit_jax.model.positions import POSITION_PREFIXES, POSITIONS
from vit_jax.names import choose


class ViT(nn.Module):
  """The Vision Transformer: patches to tokens to logits (paper, Section 3.1, equations 1 to 4).

  Attributes:
    num_classes: L, number of classes. None for a model without a head, which returns the pooled
      features.
    patch_size: (height, width) of a patch in pixels.
    embedding_size: (height, width) of the patches that the parameters of the embedding are for. For
      another `patch_size`, the embedding is resized (`patching.py`). None: the patch size.
    width: D, size of a token.
    depth: number of encoder blocks.
    num_heads: K, number of attention heads.
    mlp_dim: M, hidden width of a block's MLP.
    head_dim: E, size of a head; None for `width / num_heads`.
    pool: how tokens become one vector, one of `POOLS`.
    class_token: whether the model has a class token. None: True if the pool reads it, else False.
    position: position embedding, one of `POSITIONS`.
    position_prefix: which tokens before the patches have a learned position, one of
      `POSITION_PREFIXES`: `cls` (the class token only, as in the paper), `none`, or `all`.
    position_grid: (down, across), the grid of patches to make positions for. For an image with a
      different grid, these positions are stretched. None: the grid of each image, no stretching.
    learned_grid: (down, across), the grid that the values of `pos_embedding` were learned for. The
      model checks that this grid equals `position_grid`, or the grid of the image if
      `position_grid` is None. None: unknown; the model checks only the number of patches.
    rope_theta: base of the rotary frequencies. A larger base makes the slowest rotation slower.
    rope_grid: (down, across), used only if `position` is `learned_rope`: coordinates are measured
      in patches of this grid. None: the grid that the positions are made for.
    num_registers: number of registers, learned tokens between the class token and the patches
      (Darcet et al. 2023, 2309.16588).
    representation_size: width of the pre-logits layer, a linear layer with tanh before the head;
      None for no such layer.
    projection: width of a linear layer without a bias after the pooling, as in CLIP (Radford et al.
      2021, 2103.00020, Figure 3); None for no such layer.
    cosine: whether the head's input is scaled to length 1. For zero-shot classification, columns of
      the head's kernel are scaled text embeddings, so logits are scaled cosine similarities.
    dropout: dropout rate after the positions, in the MLP, and at the end of each residual branch.
    attention_dropout: dropout rate of the attention weights.
    stochastic_depth: drop rate of the last block's residual branches. The rate rises linearly from
      0 in the first block.
    layer_scale: initial value of LayerScale; None for no LayerScale.
    pre_norm: whether a LayerNorm precedes the first block, as in CLIP. If True, the embedding of
      the patches has no bias.
    norm_after_pool: whether the last LayerNorm follows the pooling instead of the last block.
    qkv_bias: whether queries, keys and values have biases.
    key_bias: whether keys have biases; None: as `qkv_bias`.
    qk_norm: whether queries and keys are normalised by a LayerNorm.
    out_norm: whether a LayerNorm over all heads precedes the output projection of attention.
    mlp: kind of MLP, one of `MLPS`.
    activation: activation function of the MLP, one of `ACTIVATIONS`.
    norm_epsilon: epsilon of every LayerNorm.
    resnet: number of units in each stage of a hybrid's stem (`resnet.py`); None for no stem.
    resnet_width: number of channels of the stem's root.
    dtype: type of the computation; parameters are float32.
    remat: which values are saved for the backward pass, one of `REMAT`.
    attention: which kernel computes attention, one of `ATTENTION`.
    examples: number of training images that a k-NN head stores (`heads.py`); None: a linear head.
  """

  num_classes: int | None
  patch_size: tuple[int, int]
  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  head_dim: int | None = None
  embedding_size: tuple[int, int] | None = None
  pool: str = 'cls'
  class_token: bool | None = None
  position: str = 'learned'
  position_prefix: str = 'cls'
  position_grid: tuple[int, int] | None = None
  learned_grid: tuple[int, int] | None = None
  rope_theta: float = 100.0
  rope_grid: tuple[int, int] | None = None
  num_registers: int = 0
  representation_size: int | None = None
  projection: int | None = None
  cosine: bool = False
  dropout: float = 0.0
  attention_dropout: float = 0.0
  stochastic_depth: float = 0.0
  layer_scale: float | None = None
  pre_norm: bool = False
  norm_after_pool: bool = False
  qkv_bias: bool = True
  key_bias: bool | None = None
  qk_norm: bool = False
  out_norm: bool = False
  mlp: str = 'plain'
  activation: str = 'gelu_tanh'
  norm_epsilon: float = 1e-6
  resnet: tuple[int, ...] | None = None
  resnet_width: int = 64
  dtype: Any = jnp.float32
  remat: str = 'none'
  attention: str = 'auto'
  examples: int | None = None

  @property
  def head_size(self) -> int:
    """Size E of a head."""
    return self.head_dim or self.width // self.num_heads

  @property
  def has_class(self) -> bool:
    """Whether the model has a class token."""
    pool = choose('model.pool', self.pool, POOLS)
    return pool.class_token if self.class_token is None else self.class_token

  @property
  def num_prefix(self) -> int:
    """Number of tokens before the patches."""
    return self.has_class + self.num_registers

  @property
  def num_positions(self) -> int:
    """Number of learned positions for tokens before the patches."""
    return POSITION_PREFIXES[self.position_prefix](self)

  @property
  def block(self) -> Block:
    """The settings of the last block; earlier blocks have a lower `stochastic_depth`."""
    fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(Block)}
    return Block(**fields | {'head_dim': self.head_size})

  @nn.compact
  def __call__(
    self,
    image_BHWC: jax.Array | Padded,
    *,
    train: bool = False,
    example_B: jax.Array | None = None,
    seen_BS: jax.Array | None = None,
  ) -> jax.Array:
    """Returns logits `[B, L]` in float32, or features of type `dtype` if `num_classes` is None.

    Args:
      image_BHWC: normalised images; H and W are multiples of the patch size. Images of different
        shapes are given as `Padded`.
      train: whether to apply dropout, which needs `rngs={'dropout': key}`.
      example_B: index of each example in the batch of all devices. The random numbers of an example
        depend on this index. The default is `0..B-1`.
      seen_BS: indices of the S patches that the blocks see, counted row by row from 0. All other
        patches are dropped after their positions are added. None: all patches.

    Returns:
      Logits. If `num_classes` is None: the pooled features, or all tokens if `pool='none'`.

    Raises:
      ValueError: the patch size does not divide the image size, or the model cannot read `Padded`.
    """
    if not train:
      example_B = None
    elif example_B is None:
      example_B = jnp.arange(len(image_BHWC))

    if isinstance(image_BHWC, Padded):
      check_padded(self)
      of_pool = (length_B := image_BHWC.count_B + self.num_prefix,)
    else:
      of_pool, length_B = (), None
    x_BND, rope_NE = self.tokens(image_BHWC)
    if seen_BS is not None:
      x_BND, rope_NE = kept(x_BND, rope_NE, seen_BS, self.num_prefix)
    if self.pre_norm:
      x_BND = norm_layer(self.norm_epsilon, self.dtype, 'pre_norm')(x_BND)
    x_BND = Dropout(self.dropout)(x_BND, example_B)

    encoder = Encoder(self.block, self.depth, not self.norm_after_pool, self.remat)
    nn.share_scope(self, encoder)  # puts the encoder's parameters at the top level
    x = POOLS[self.pool].function(self, encoder(x_BND, example_B, rope_NE, length_B), *of_pool)
    if self.norm_after_pool:
      x = norm_layer(self.norm_epsilon, self.dtype, 'norm')(x)
    if self.representation_size is not None:
      x = jnp.tanh(Dense((self.representation_size,), dtype=self.dtype, name='pre_logits')(x))
    if self.projection is not None:
      x = Dense((self.projection,), use_bias=False, dtype=self.dtype, name='projection')(x)
    if self.num_classes is None:
      return x
    if self.cosine:
      x = unit(x.astype(jnp.float32))
    if self.examples is not None:
      return KnnHead(self.num_classes, self.examples, name='head')(x)
    # The head is initialised with zeros (Appendix B.1.1), so all first logits are 0, and the first
    # softmax loss is log L.
    return Dense((self.num_classes,), kernel_init=nn.initializers.zeros, name='head')(x)

  def cut(self, image_BHWC: jax.Array) -> jax.Array:
    """Cuts images, or in a hybrid the stem's feature map, into patches `[B, h, w, p, q, C]`."""
    if len(image_BHWC.shape) != 4:
      raise ValueError(
        f'images: expected the shape [B, H, W, C], got {image_BHWC.shape}. One image needs a batch '
        'axis: image[None].'
      )
    if self.resnet is None:
      return cut(image_BHWC, self.patch_size)
    check_divides(self.patch_size, image_BHWC)
    x = resnet.Stem(self.resnet, self.resnet_width, self.dtype, name='stem')(image_BHWC)
    stride = resnet.stem_stride(self.resnet)
    return cut(x, tuple(n // stride for n in self.patch_size))

  def tokens(
    self, image_BHWC: jax.Array | Padded
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """Returns the tokens `[B, N, D]` before the first block (equation 1), and RoPE's angles.

    The class token comes first, then the registers, then the patches. If the table of the position
    embedding has k more rows than there are patches, the first k tokens get a position too. The
    angles are cosine and sine, `[N, E/2]` each; None without RoPE.
    """
    if isinstance(image_BHWC, Padded):
      patch_BNpqC, positions = image_BHWC.patch_BNpqC, lambda: image_BHWC.positions
    else:
      patch_BhwpqC = self.cut(image_BHWC)
      batch, h, w, *patch = patch_BhwpqC.shape
      patch_BNpqC = patch_BhwpqC.reshape(batch, h * w, *patch)
      positions = functools.partial(self.positions, (h, w))
    x_BND = PatchEmbedding(
      (self.width,),
      size=self.embedding_size if self.resnet is None else None,
      use_bias=not self.pre_norm,
      dtype=self.dtype,
      name='embedding',
    )(patch_BNpqC)
    batch, patches, width = x_BND.shape

    prefix = []
    if self.has_class:
      prefix.append(self.param('cls', nn.initializers.zeros, (1, 1, width)))
    if self.num_registers:
      normal = nn.initializers.normal(stddev=0.02)
      prefix.append(self.param('registers', normal, (1, self.num_registers, width)))
    prefix = [jnp.broadcast_to(x.astype(x_BND.dtype), (batch, *x.shape[1:])) for x in prefix]

    table, rope_NE = positions()  # comes last: initial values depend on the order of parameters
    if table is not None:
      table = table.astype(x_BND.dtype)
      count = table.shape[1] - patches
      x_BND = x_BND + table[:, count:]
      if count:
        prefix_BND = jnp.concatenate(prefix, axis=1)
        prefix = [prefix_BND[:, :count] + table[:, :count], prefix_BND[:, count:]]
    return jnp.concatenate([*prefix, x_BND], axis=1), rope_NE

  def positions(self, grid: tuple[int, int]) -> tuple:
    """Returns `(table, angles)` of the position embedding for a grid (down, across) of patches.

    `Position` describes table and angles. If the embedding has no table or no angles, the result
    contains None instead.
    """
    position, whole = POSITIONS[self.position], self.position_grid or grid
    return tuple(make and make(self, grid, whole) for make in (position.table, position.angles))

  def learned(self, name: str, init: nn.initializers.Initializer, shape: tuple) -> jax.Array:
    """Returns a top-level parameter. Unlike `param`, this method also works in a bound model."""
    given = self.get_variable('params', name)
    return self.param(name, init, shape) if given is None else given


def first_layer() -> tuple[str, ...]:
  """Returns the names of all top-level parameters that a model may have before its first block."""
  positions = dict.fromkeys(name for entry in POSITIONS.values() for name in entry.params)
  return ('embedding', 'stem', 'cls', 'registers', *positions, 'pre_norm')


def last_layer() -> tuple[str, ...]:
  """Returns the names of all top-level parameters that a model may have after its last block."""
  pools = dict.fromkeys(name for entry in POOLS.values() for name in entry.params)
  return ('norm', *pools, 'pre_logits', 'projection', 'head')
