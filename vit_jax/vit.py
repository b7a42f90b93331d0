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
import numpy as np

from vit_jax import attention
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

ACTIVATIONS = {  # the paper's code uses the tanh form, PyTorch's models the exact one
  'gelu_tanh': functools.partial(nn.gelu, approximate=True),
  'gelu': functools.partial(nn.gelu, approximate=False),
}

POSITIONS = ('learned', 'sincos', 'rope', 'none')

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
    bias = self.param('bias', self.bias_init, self.features)
    kernel, bias = kernel.astype(self.dtype).reshape(matrix), bias.astype(self.dtype)
    y = matmul(x.astype(self.dtype).reshape(-1, matrix[0]), kernel) + bias.reshape(-1)
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
    project = functools.partial(Dense, (self.num_heads, self.head_dim), dtype=self.dtype)
    query_BNKE = project(name='query')(x_BND if query_BND is None else query_BND)
    key_BNKE = project(name='key')(x_BND)
    value_BNKE = project(name='value')(x_BND)
    if self.qk_norm:  # Dehghani et al. 2023 (2302.05442), Section 2.1
      norm = functools.partial(nn.LayerNorm, self.norm_epsilon, dtype=self.dtype)
      query_BNKE, key_BNKE = norm(name='query_norm')(query_BNKE), norm(name='key_norm')(key_BNKE)
    if rope_NE is not None:
      query_BNKE, key_BNKE = rotate(query_BNKE, *rope_NE), rotate(key_BNKE, *rope_NE)

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
  qk_norm: bool
  activation: str
  norm_epsilon: float
  dtype: Any

  @nn.compact
  def __call__(self, x_BND: jax.Array) -> jax.Array:
    batch, _, width = x_BND.shape
    query_11D = self.param('query', nn.initializers.xavier_uniform(), (1, 1, width))
    query_B1D = jnp.broadcast_to(query_11D.astype(x_BND.dtype), (batch, 1, width))
    x_B1D = Attention(
      self.num_heads,
      self.head_dim,
      qk_norm=self.qk_norm,
      norm_epsilon=self.norm_epsilon,
      dtype=self.dtype,
      name='attention',
    )(x_BND, query_BND=query_B1D)
    y_B1D = nn.LayerNorm(self.norm_epsilon, dtype=self.dtype, name='mlp_norm')(x_B1D)
    mlp = Mlp(self.mlp_dim, activation=self.activation, dtype=self.dtype, name='mlp')
    return (x_B1D + mlp(y_B1D))[:, 0]


# Each takes the model and the normalised tokens, prefix first, and gives `[B, D]`
# (`none`: the tokens themselves).
POOLS = {
  'cls': lambda model, x_BND: x_BND[:, 0],
  'gap': lambda model, x_BND: x_BND[:, model.num_registers :].mean(axis=1),
  'map': lambda model, x_BND: MapHead(
    model.num_heads,
    model.head_size,
    model.mlp_dim,
    model.qk_norm,
    model.activation,
    model.norm_epsilon,
    model.dtype,
    name='map',
  )(x_BND),
  'none': lambda model, x_BND: x_BND,
}


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
    pool: how tokens become one vector, one of `POOLS`; `cls` adds the class token.
    position: one of `POSITIONS`.
    num_registers: register tokens, without position (Darcet et al. 2023, 2309.16588).
    representation_size: width of the tanh pre-logits layer; None for no such layer.
    dropout: rate after positions, in the MLP, and at the end of each branch.
    attention_dropout: rate on the attention weights.
    stochastic_depth: rate at which the last block's branches drop; rises linearly from 0.
    layer_scale: initial LayerScale; None for no LayerScale.
    qk_norm: LayerNorm on queries and keys.
    activation: one of `ACTIVATIONS`.
    norm_epsilon: LayerNorm's epsilon.
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
  position: str = 'learned'
  num_registers: int = 0
  representation_size: int | None = None
  dropout: float = 0.0
  attention_dropout: float = 0.0
  stochastic_depth: float = 0.0
  layer_scale: float | None = None
  qk_norm: bool = False
  activation: str = 'gelu_tanh'
  norm_epsilon: float = 1e-6
  dtype: Any = jnp.float32
  remat: str = 'none'

  @property
  def head_size(self) -> int:
    return self.head_dim or self.width // self.num_heads

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
        self.qk_norm,
        self.activation,
        self.norm_epsilon,
        self.dtype,
        name=f'block_{i}',
      )(x_BND, example_B, rope_NE)
    x_BND = nn.LayerNorm(self.norm_epsilon, dtype=self.dtype, name='norm')(x_BND)

    x = POOLS[self.pool](self, x_BND)
    if self.representation_size is not None:
      x = Dense((self.representation_size,), dtype=self.dtype, name='pre_logits')(x)
      x = jnp.tanh(x)
    if self.num_classes is None:
      return x
    # The head starts at zero (Appendix B.1.1): the first loss is log L whatever the body.
    return Dense((self.num_classes,), kernel_init=nn.initializers.zeros, name='head')(x)

  def embed(self, image_BHWC: jax.Array) -> jax.Array:
    """Patches, each embedded by the same linear map (equation 1): `[B, h, w, D]`."""
    batch, height, width, channels = image_BHWC.shape
    p, q = self.patch_size
    if height % p or width % q:
      raise ValueError(
        f'An image of {height}x{width} pixels does not divide into patches of {p}x{q}: set '
        'data.image_size to multiples of model.patch_size.'
      )
    x = image_BHWC.reshape(batch, height // p, p, width // q, q, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    embedding = Dense(
      (self.width,),
      axes=3,
      dtype=self.dtype,
      kernel_init=nn.initializers.lecun_normal(),
      name='embedding',
    )
    return embedding(x)

  def tokens(self, x_BhwD: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """Adds positions, class token and registers: `[B, N, D]`, and RoPE's angles if asked.

    The class token comes first and the registers after it. The class token has a learned
    position as in the paper; it has none with the other kinds, and registers never have.
    """
    batch, h, w, width = x_BhwD.shape
    x_BND = x_BhwD.reshape(batch, h * w, width)
    zeros, normal = nn.initializers.zeros, nn.initializers.normal(stddev=0.02)

    def prefix(name, init, count):
      token_1ND = self.param(name, init, (1, count, width)).astype(x_BND.dtype)
      return jnp.broadcast_to(token_1ND, (batch, count, width))

    has_class = self.pool == 'cls'
    if self.position == 'sincos':
      x_BND = x_BND + sincos_positions(h, w, width).astype(x_BND.dtype)
    if has_class:
      x_BND = jnp.concatenate([prefix('cls', zeros, 1), x_BND], axis=1)
    if self.position == 'learned':
      position = self.param('pos_embedding', normal, (1, *x_BND.shape[1:]))
      x_BND = x_BND + position.astype(x_BND.dtype)
    if self.num_registers:
      registers = prefix('registers', normal, self.num_registers)
      parts = [x_BND[:, :has_class], registers, x_BND[:, has_class:]]
      x_BND = jnp.concatenate(parts, axis=1)
    rope_NE = None
    if self.position == 'rope':
      rope_NE = rope_angles(h, w, self.head_size, prefix=has_class + self.num_registers)
    return x_BND, rope_NE


def sincos_positions(h: int, w: int, width: int) -> np.ndarray:
  """Fixed 2-D sine-cosine positions `[1, h w, D]` (Beyer et al. 2022, 2205.01580).

  A quarter of the width each: sine and cosine of the column, sine and cosine of the row.
  """
  omega = 1.0 / 10_000 ** (np.arange(width // 4) / max(width // 4 - 1, 1))
  y, x = np.mgrid[:h, :w]
  x, y = np.outer(x, omega), np.outer(y, omega)
  table = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
  return table[None].astype(np.float32)


def rope_angles(h: int, w: int, head_size: int, prefix: int) -> tuple[np.ndarray, np.ndarray]:
  """Cosine and sine `[N, E/2]` of the axial rotary positions (Heo et al. 2024, 2403.13298).

  The first half of the angles follows the row, the second the column; the `prefix`
  tokens have angle 0, hence no position.
  """
  theta = 100.0 ** (-np.arange(head_size // 4) / (head_size // 4))
  y, x = np.mgrid[:h, :w]
  angle = np.concatenate([np.outer(y, theta), np.outer(x, theta)], axis=1)
  angle = np.concatenate([np.zeros((prefix, angle.shape[1])), angle])
  return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotate(x_BNKE: jax.Array, cos_NE: jax.Array, sin_NE: jax.Array) -> jax.Array:
  """Rotates each pair (first half, second half) of a head's features by its angle."""
  cos, sin = cos_NE[:, None], sin_NE[:, None]
  a, b = jnp.split(x_BNKE.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x_BNKE.dtype)


def make(variant: str, num_classes: int | None, **overrides) -> ViT:
  """The model of a published size, e.g. `make('B/16', num_classes=10, pool='gap')`.

  Args:
    variant: a name in `VARIANTS`, with the patch size after a slash (`B/16`; optional
      where the variant has one).
    num_classes: width of the head; None for no head.
    **overrides: any attribute of `ViT`; None keeps the variant's.

  Raises:
    ValueError: an unknown variant or choice, or sizes that don't fit together; the message
      lists what is valid.
  """
  name, _, patch = variant.partition('/')
  fields = {'num_classes': num_classes} | choose('model.variant', name, VARIANTS)
  if patch and not (patch.isascii() and patch.isdigit()):
    raise ValueError(f'model.variant: {variant!r} should look like B/16, patch size in pixels.')
  if patch:
    fields['patch_size'] = int(patch)
  known = {field.name for field in dataclasses.fields(ViT)}
  for key, value in overrides.items():
    choose('model', key, known)
    if value is not None:
      fields[key] = value
  if 'patch_size' not in fields:
    raise ValueError(f'model.variant: {variant!r} names no patch size; write e.g. {name}/16.')
  if isinstance(fields['patch_size'], int):
    fields['patch_size'] = (fields['patch_size'],) * 2
  fields['dtype'] = jnp.dtype(fields.get('dtype', jnp.float32))
  model = ViT(**fields)
  check(model)
  return model


def check(model: ViT) -> None:
  """Raises ValueError where the model's sizes or choices are not possible."""
  for name, table in (
    ('pool', POOLS),
    ('position', POSITIONS),
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
