"""The Vision Transformer (Dosovitskiy et al., 2020, https://arxiv.org/abs/2010.11929).

Dimension letters, used in the names of arrays throughout the project:

  B batch, H W image height and width, C channels, h w patch grid, N tokens, D width,
  K heads, E head size, M MLP width, L classes.

Decisions:
  * Every product is taken in two dimensions, `[B N, D] x [D, F]`: XLA's CPU backend
    computes the gradient of a batched one about four times slower.
  * A random draw derives from the example's position in the global batch, never from
    the shape it is computed in, so that devices and micro-batches don't change it.
  * Attention weights leave through `sow('intermediates', 'attention_BKNN')`, and by no other
    way: ask with `mutable=['intermediates']`.
  * Parameters are float32; `dtype` is the type of the computation. LayerNorm, softmax and
    logits are float32.
"""

import dataclasses
import functools
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from vit_jax import attention, positions, resnet
from vit_jax.matmul import matmul
from vit_jax.names import choose

# Paper, Table 1; g and G: Zhai et al. 2021 (2106.04560), Table 2; Ti and S: Touvron et al.
# 2020 (2012.12877), Table 1. The last three are this project's sizes for 32x32 images.
VARIANTS = {
  'Ti': dict(width=192, depth=12, num_heads=3, mlp_dim=768),
  'S': dict(width=384, depth=12, num_heads=6, mlp_dim=1536),
  'B': dict(width=768, depth=12, num_heads=12, mlp_dim=3072),
  'L': dict(width=1024, depth=24, num_heads=16, mlp_dim=4096),
  'H': dict(width=1280, depth=32, num_heads=16, mlp_dim=5120),
  'g': dict(width=1408, depth=40, num_heads=16, mlp_dim=6144),
  'G': dict(width=1664, depth=48, num_heads=16, mlp_dim=8192),
  'tiny': dict(width=48, depth=4, num_heads=4, mlp_dim=192, patch_size=4),
  'small': dict(width=256, depth=7, num_heads=4, mlp_dim=512, patch_size=4),
  'wide': dict(width=512, depth=8, num_heads=12, mlp_dim=3072, patch_size=4, head_dim=64),
}
# Hybrids (paper, Section 3.1): a ResNet's stages, then a ViT on its feature map. The patch size
# is that of the whole, stem included: R50+B/16, R50+L/32, R26+B/32, R26+S/32, and R+Ti/32, which
# is published as R+Ti/16: its stem reduces by 4, its patches of the feature map by 8.
VARIANTS |= {
  'R50+B': VARIANTS['B'] | dict(resnet=(3, 4, 9)),
  'R50+L': VARIANTS['L'] | dict(resnet=(3, 4, 6, 3)),
  'R26+B': VARIANTS['B'] | dict(resnet=(2, 2, 2, 2)),
  'R26+S': VARIANTS['S'] | dict(resnet=(2, 2, 2, 2)),
  'R+Ti': VARIANTS['Ti'] | dict(resnet=()),
}

# The paper's code uses the tanh form, PyTorch's models the exact one, the first CLIP the last.
ACTIVATIONS = {
  'gelu_tanh': functools.partial(nn.gelu, approximate=True),
  'gelu': functools.partial(nn.gelu, approximate=False),
  'quick_gelu': lambda x: x * nn.sigmoid(1.702 * x),
}

POSITIONS = ('learned', 'sincos', 'rope', 'none')

POSITION_PREFIXES = ('cls', 'none', 'all')

REMAT = {  # what the backward pass keeps instead of computing it again
  'none': None,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'full': jax.checkpoint_policies.nothing_saveable,
}


class Dense(nn.Module):
  """`y = x W + b` over the last `axes` axes of x, as one two-dimensional product.

  Attributes:
    features: shape of the output's last axes; the kernel is `[*inputs, *features]`.
    axes: number of trailing axes of x that are contracted.
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

    def init_kernel(key, shape):
      return self.kernel_init(key, matrix).reshape(shape)

    kernel = self.param('kernel', init_kernel, (*inputs, *self.features))
    kernel = kernel.astype(self.dtype).reshape(matrix)
    y = matmul(x.astype(self.dtype).reshape(-1, matrix[0]), kernel)
    if self.use_bias:
      bias = self.param('bias', self.bias_init, self.features)
      y = y + bias.astype(self.dtype).reshape(-1)
    return y.reshape(*batch, *self.features)


class Dropout(nn.Module):
  """Dropout drawn for each example by itself; one draw an example with `whole`.

  With `whole`, it drops a residual branch of an example: stochastic depth (Huang et al.
  2016, 1603.09382).
  """

  rate: float
  whole: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, example_B: jax.Array | None) -> jax.Array:
    """`x` is `[B, ...]`; `example_B` the examples' positions, None at inference."""
    if example_B is None or self.rate == 0:
      return x
    key = self.make_rng('dropout')
    shape = (1,) * (x.ndim - 1) if self.whole else x.shape[1:]

    def draw(example):
      return jax.random.bernoulli(jax.random.fold_in(key, example), 1 - self.rate, shape)

    return jnp.where(jax.vmap(draw)(example_B), x / (1 - self.rate), 0).astype(x.dtype)


class Attention(nn.Module):
  """Multi-head attention (paper, Appendix A), of x to itself or of `query_BND` to x."""

  num_heads: int
  head_dim: int
  dropout: float = 0.0
  qkv_bias: bool = True
  qk_norm: bool = False
  norm_epsilon: float = 1e-6
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    x_BND: jax.Array,
    example_B: jax.Array | None = None,
    rope_NE: tuple[jax.Array, jax.Array] | None = None,
    query_BND: jax.Array | None = None,
  ) -> jax.Array:
    heads = self.num_heads, self.head_dim
    project = functools.partial(Dense, heads, use_bias=self.qkv_bias, dtype=self.dtype)
    query_BNKE = project(name='query')(x_BND if query_BND is None else query_BND)
    key_BNKE = project(name='key')(x_BND)
    value_BNKE = project(name='value')(x_BND)
    if self.qk_norm:  # Dehghani et al. 2023 (2302.05442), Section 2.1
      norm = functools.partial(nn.LayerNorm, self.norm_epsilon, dtype=self.dtype)
      query_BNKE, key_BNKE = norm(name='query_norm')(query_BNKE), norm(name='key_norm')(key_BNKE)
    if rope_NE is not None:
      query_BNKE, key_BNKE = (positions.rotate(x, *rope_NE) for x in (query_BNKE, key_BNKE))

    keep_BKNN = None
    if self.dropout and example_B is not None:
      (batch, queries, heads, _), keys = query_BNKE.shape, key_BNKE.shape[1]
      ones_BKNN = jnp.ones((batch, heads, queries, keys))
      keep_BKNN = Dropout(self.dropout)(ones_BKNN, example_B) > 0
    inspect = None
    if self.is_mutable_collection('intermediates'):
      inspect = functools.partial(self.sow, 'intermediates', 'attention_BKNN')
    y_BNKE = attention.attention(query_BNKE, key_BNKE, value_BNKE, keep_BKNN, self.dropout, inspect)
    return Dense((x_BND.shape[-1],), axes=2, dtype=self.dtype, name='out')(y_BNKE)


class Mlp(nn.Module):
  """Two layers with a GELU (paper, Section 3.1)."""

  mlp_dim: int
  dropout: float = 0.0
  activation: str = 'gelu_tanh'
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_BND: jax.Array, example_B: jax.Array | None = None) -> jax.Array:
    dense = functools.partial(
      Dense, dtype=self.dtype, bias_init=nn.initializers.normal(stddev=1e-6)
    )
    x_BNM = ACTIVATIONS[self.activation](dense((self.mlp_dim,), name='up')(x_BND))
    x_BNM = Dropout(self.dropout)(x_BNM, example_B)
    return dense((x_BND.shape[-1],), name='down')(x_BNM)


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


def map_pool(model: 'ViT', patch_BND: jax.Array) -> jax.Array:
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


class ViT(nn.Module):
  """Patches to tokens to logits (paper, Section 3.1, equations 1 to 4).

  Attributes:
    num_classes: width of the head; None for none (the pooled features are returned).
    patch_size: (height, width) of a patch, pixels.
    width: D, size of a token.
    depth: number of encoder blocks.
    num_heads: K, attention heads.
    mlp_dim: M, hidden width of a block's MLP.
    head_dim: E, size of a head; None for `width / num_heads`.
    pool: how tokens become one vector, one of `POOLS`.
    class_token: whether there is one; None where the pool reads it.
    position: one of `POSITIONS`.
    position_prefix: which tokens before the patches have a learned position: `cls` (as in the
      paper; registers have none), `none`, or `all`.
    position_grid: (down, across) of the patches that the positions are of, for images of any
      number of patches, over which they are stretched; None: as many as the image has.
    num_registers: tokens between the class token and the patches (Darcet et al. 2023,
      2309.16588).
    representation_size: width of the tanh pre-logits layer; None for no such layer.
    dropout: rate after positions, in the MLP, and at the end of each branch.
    attention_dropout: rate on the attention weights.
    stochastic_depth: rate at which the last block's branches drop; rises linearly from 0.
    layer_scale: initial LayerScale; None for no LayerScale.
    pre_norm: LayerNorm before the first block, and no bias in the embedding, as in CLIP.
    norm_after_pool: the last LayerNorm follows the pooling instead of the last block.
    qkv_bias: whether queries, keys and values have biases.
    qk_norm: LayerNorm on queries and keys.
    activation: one of `ACTIVATIONS`.
    norm_epsilon: LayerNorm's epsilon.
    resnet: units in each stage of a hybrid's stem (`resnet.py`); None for no stem.
    resnet_width: channels of the stem's root.
    dtype: type of the computation; parameters are float32.
    remat: one of `REMAT`.
  """

  num_classes: int | None
  patch_size: tuple[int, int]
  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  head_dim: int | None = None
  pool: str = 'cls'
  class_token: bool | None = None
  position: str = 'learned'
  position_prefix: str = 'cls'
  position_grid: tuple[int, int] | None = None
  num_registers: int = 0
  representation_size: int | None = None
  dropout: float = 0.0
  attention_dropout: float = 0.0
  stochastic_depth: float = 0.0
  layer_scale: float | None = None
  pre_norm: bool = False
  norm_after_pool: bool = False
  qkv_bias: bool = True
  qk_norm: bool = False
  activation: str = 'gelu_tanh'
  norm_epsilon: float = 1e-6
  resnet: tuple[int, ...] | None = None
  resnet_width: int = 64
  dtype: Any = jnp.float32
  remat: str = 'none'

  @property
  def head_size(self) -> int:
    return self.head_dim or self.width // self.num_heads

  @property
  def has_class(self) -> bool:
    return self.pool in CLASS_POOLS if self.class_token is None else self.class_token

  @property
  def num_prefix(self) -> int:
    """Tokens before the patches."""
    return self.has_class + self.num_registers

  @property
  def num_positions(self) -> int:
    """Those of them that have a learned position."""
    return {'cls': int(self.has_class), 'none': 0, 'all': self.num_prefix}[self.position_prefix]

  @nn.compact
  def __call__(
    self, image_BHWC: jax.Array, *, train: bool = False, example_B: jax.Array | None = None
  ) -> jax.Array:
    """Logits `[B, L]`, float32.

    Args:
      image_BHWC: normalised images; H and W are multiples of the patch.
      train: whether to drop out; needs `rngs={'dropout': key}`.
      example_B: position of each example in the global batch, which the draws derive
        from; `0..B-1` by default.

    Returns:
      Logits; the pooled features (tokens, for `pool='none'`) where `num_classes` is None.

    Raises:
      ValueError: the patch does not divide the image.
    """
    if not train:
      example_B = None
    elif example_B is None:
      example_B = jnp.arange(len(image_BHWC))

    x_BhwD = self.embed(image_BHWC)
    x_BND, rope_NE = self.tokens(x_BhwD)
    if self.pre_norm:
      x_BND = nn.LayerNorm(self.norm_epsilon, dtype=self.dtype, name='pre_norm')(x_BND)
    x_BND = Dropout(self.dropout)(x_BND, example_B)

    block = EncoderBlock
    if self.remat != 'none':
      block = nn.remat(EncoderBlock, policy=REMAT[self.remat])
    for i in range(self.depth):
      x_BND = block(
        self.num_heads,
        self.head_size,
        self.mlp_dim,
        self.dropout,
        self.attention_dropout,
        self.stochastic_depth * i / max(self.depth - 1, 1),
        self.layer_scale,
        self.qkv_bias,
        self.qk_norm,
        self.activation,
        self.norm_epsilon,
        self.dtype,
        name=f'block_{i}',
      )(x_BND, example_B, rope_NE)
    norm = nn.LayerNorm(self.norm_epsilon, dtype=self.dtype, name='norm')
    if self.norm_after_pool:
      x = norm(POOLS[self.pool](self, x_BND))
    else:
      x = POOLS[self.pool](self, norm(x_BND))
    if self.representation_size is not None:
      x = Dense((self.representation_size,), dtype=self.dtype, name='pre_logits')(x)
      x = jnp.tanh(x)
    if self.num_classes is None:
      return x
    # The head starts at zero (Appendix B.1.1): the first loss is log L whatever the body.
    return Dense((self.num_classes,), kernel_init=nn.initializers.zeros, name='head')(x)

  def embed(self, image_BHWC: jax.Array) -> jax.Array:
    """Patches, each embedded by the same linear map (equation 1): `[B, h, w, D]`.

    A hybrid's are patches of the stem's feature map.
    """
    _, height, width, _ = image_BHWC.shape
    p, q = self.patch_size
    if height % p or width % q:
      raise ValueError(
        f'An image of {height}x{width} pixels does not divide into patches of {p}x{q}: set '
        'data.image_size to multiples of model.patch_size.'
      )
    x = image_BHWC
    if self.resnet is not None:
      x = resnet.Stem(self.resnet, self.resnet_width, self.dtype, name='stem')(x)
      stride = resnet.stride(self.resnet)
      p, q = p // stride, q // stride
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // p, p, width // q, q, channels).transpose(0, 1, 3, 2, 4, 5)
    embedding = Dense(
      (self.width,),
      axes=3,
      use_bias=not self.pre_norm,
      dtype=self.dtype,
      kernel_init=nn.initializers.lecun_normal(),
      name='embedding',
    )
    return embedding(x)

  def tokens(self, x_BhwD: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """Adds positions, class token and registers: `[B, N, D]`, and RoPE's angles if asked.

    The class token comes first and the registers after it. Of the positions only learned ones
    reach them, as `position_prefix` says.
    """
    batch, h, w, width = x_BhwD.shape
    whole = self.position_grid or (h, w)
    x_BND = x_BhwD.reshape(batch, h * w, width)
    zeros, normal = nn.initializers.zeros, nn.initializers.normal(stddev=0.02)

    prefix = []
    if self.has_class:
      prefix.append(self.param('cls', zeros, (1, 1, width)))
    if self.num_registers:
      prefix.append(self.param('registers', normal, (1, self.num_registers, width)))
    prefix = [jnp.broadcast_to(x.astype(x_BND.dtype), (batch, *x.shape[1:])) for x in prefix]

    rope_NE = None
    if self.position == 'sincos':
      x_BND = x_BND + positions.sincos(h, w, width, whole).astype(x_BND.dtype)
    elif self.position == 'rope':
      rope_NE = positions.rope_angles(h, w, self.head_size, self.num_prefix, whole)
    elif self.position == 'learned':
      count = self.num_positions
      position = self.learned_positions(normal, (1, count + math.prod(whole), width))
      position = positions.resize(position, whole, (h, w), count).astype(x_BND.dtype)
      x_BND = x_BND + position[:, count:]
      if count:
        prefix_BND = jnp.concatenate(prefix, axis=1)
        prefix = [prefix_BND[:, :count] + position[:, :count], prefix_BND[:, count:]]
    return jnp.concatenate([*prefix, x_BND], axis=1), rope_NE

  def learned_positions(self, init: nn.initializers.Initializer, shape: tuple) -> jax.Array:
    """The parameter `pos_embedding`.

    Raises:
      ValueError: the parameters given are of another grid.
    """
    given = self.get_variable('params', 'pos_embedding')
    if given is not None and given.shape != shape:
      raise ValueError(
        f'The image has {shape[1] - self.num_positions} patches, the position embeddings are for '
        f'{given.shape[1] - self.num_positions}: resize the image, or load the weights with '
        'grid=(h, w), the number of patches down and across.'
      )
    return self.param('pos_embedding', init, shape)


def block_tokens(model: ViT, params: dict, image_BHWC: jax.Array) -> list[jax.Array]:
  """The tokens `[B, N, D]` after each block, the first one's first, before the last LayerNorm.

  Args:
    model: whose blocks they are.
    params: its parameters.
    image_BHWC: normalised images.
  """
  is_block = lambda module, method: isinstance(module, EncoderBlock) and method == '__call__'
  _, state = model.clone(remat='none').apply(
    {'params': params}, image_BHWC, capture_intermediates=is_block
  )
  blocks = state['intermediates']
  return [blocks[f'block_{i}']['__call__'][0] for i in range(model.depth)]


SIZES = ('patch_size', 'width', 'depth', 'num_heads', 'mlp_dim')
ATTRIBUTES = tuple(f.name for f in dataclasses.fields(ViT) if f.name not in ('parent', 'name'))


def attributes(model: ViT) -> dict:
  """What `ViT(**attributes)` makes the same model of."""
  return {name: getattr(model, name) for name in ATTRIBUTES}


def make(variant: str | None, num_classes: int | None, **overrides) -> ViT:
  """The model of a published size, e.g. `make('B/16', num_classes=10, pool='gap')`.

  Args:
    variant: a name in `VARIANTS`, with the patch size after a slash (`B/16`; optional
      where the variant has one); None where the overrides give every size.
    num_classes: width of the head; None for no head.
    **overrides: any attribute of `ViT`; None keeps the variant's.

  Raises:
    ValueError: an unknown variant or choice, or sizes that don't fit together; the message
      lists what is valid.
  """
  fields = {'num_classes': num_classes} | (variant_fields(variant) if variant else {})
  for key, value in overrides.items():
    choose('model', key, ATTRIBUTES)
    if value is not None:
      fields[key] = value
  missing = [name for name in SIZES if name not in fields]
  if missing:
    hint = f' write e.g. {variant}/16, or' if missing == ['patch_size'] else ' give a variant, or'
    raise ValueError(f'model.variant: {variant!r} names no {", ".join(missing)};{hint} set them.')
  if isinstance(fields['patch_size'], int):
    fields['patch_size'] = (fields['patch_size'],) * 2
  fields['dtype'] = jnp.dtype(fields.get('dtype', jnp.float32))
  model = ViT(**fields)
  check(model)
  return model


def variant_fields(variant: str) -> dict:
  """The attributes that a variant stands for: `B/16`.

  Raises:
    ValueError: an unknown one.
  """
  name, _, patch = variant.partition('/')
  fields = dict(choose('model.variant', name, VARIANTS))
  if patch and not (patch.isascii() and patch.isdigit()):
    raise ValueError(f'model.variant: {variant!r} should look like B/16, patch size in pixels.')
  size = patch or fields.get('patch_size')
  return fields | ({'patch_size': (int(size),) * 2} if size else {})


def check(model: ViT) -> None:
  """Raises ValueError where the model's sizes or choices are not possible."""
  for name, table in (
    ('pool', POOLS),
    ('position', POSITIONS),
    ('position_prefix', POSITION_PREFIXES),
    ('remat', REMAT),
    ('activation', ACTIVATIONS),
  ):
    choose(f'model.{name}', getattr(model, name), table)
  sizes = {name: getattr(model, name) for name in ('width', 'depth', 'num_heads', 'mlp_dim')}
  for name in ('head_dim', 'representation_size'):
    if getattr(model, name) is not None:
      sizes[name] = getattr(model, name)
  for name, size in sizes.items():
    if size < 1:
      raise ValueError(f'model.{name} must be positive, got {size}.')
  if len(model.patch_size) != 2 or min(model.patch_size) < 1:
    raise ValueError(f'model.patch_size: expected (height, width), got {model.patch_size}.')
  stride = 1 if model.resnet is None else resnet.stride(model.resnet)
  if model.resnet is not None and (any(n < 1 for n in model.resnet) or model.resnet_width % 32):
    raise ValueError(
      f'model.resnet={model.resnet}, model.resnet_width={model.resnet_width}: expected units a '
      'stage, each positive, and a multiple of 32 channels.'
    )
  if any(size % stride for size in model.patch_size):
    raise ValueError(
      f'model.patch_size={model.patch_size} must be a multiple of {stride}, by which the stem '
      f'of model.resnet={model.resnet} reduces the image.'
    )
  if model.pool in CLASS_POOLS and not model.has_class:
    raise ValueError(f'model.pool={model.pool} reads the class token: model.class_token is False.')
  if model.pool == 'distilled' and model.num_registers < 1:
    raise ValueError('model.pool=distilled reads the first register: set model.num_registers.')
  if model.num_registers < 0:
    raise ValueError(f'model.num_registers must not be negative, got {model.num_registers}.')
  if model.head_dim is None and model.width % model.num_heads:
    raise ValueError(
      f'model.width={model.width} is not divisible by model.num_heads={model.num_heads}: '
      'change one, or set model.head_dim, the size of a head.'
    )
  if model.position == 'sincos' and model.width % 4:
    raise ValueError(f'model.position=sincos needs a width divisible by 4, got {model.width}.')
  if model.position == 'rope' and model.head_size % 4:
    raise ValueError(
      f'model.position=rope needs a head size divisible by 4, got {model.head_size}: set '
      'model.head_dim.'
    )
  for name in ('dropout', 'attention_dropout', 'stochastic_depth'):
    if not 0 <= getattr(model, name) < 1:
      raise ValueError(f'model.{name} must be in [0, 1), got {getattr(model, name)}.')
