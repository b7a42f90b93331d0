"""`POOLS`: the ways to turn the tokens of the last block into one vector.

Other packages can add an entry:

    POOLS['max'] = Pool(lambda model, x_BND: x_BND[:, model.num_prefix :].max(axis=1))
"""

from collections.abc import Callable, Mapping
import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp

from vit_jax.model.layers import Attention, Block, Mlp, norm_layer


@dataclasses.dataclass(frozen=True)
class Pool:
  """A pooling method, an entry of `POOLS`, and its properties.

  Attributes:
    function: `(model, token_BND) -> vector`, called inside the model. The tokens are in the order
      class token (if present), registers, patches. The vector can have any width.
    padded: whether the function has a third argument, `length_B`: the number of tokens of each
      image. All later tokens are padding; None means no padding. Only a pool with this argument can
      be used for images of different shapes in one batch.
    class_token: whether the pool reads the class token.
    registers: smallest number of registers that the pool needs.
    tokens: whether the pool returns all tokens, `[B, N, D]`, instead of a vector for a classifier.
    params: names of the top-level parameters that the pool adds to the model. The function
      `last_layer` also returns these names.
    linear: whether the vector is a fixed weighted mean of tokens, or several such means
      concatenated. If True, attention maps average the attention of all query tokens. In this
      average, the weight of a query token is its share of the vector (`maps.pool_shares`).
    probe: for a pool with learned attention, a function `(model, sown) -> share_BKN` that returns
      the attention weight of each token. `sown` is Flax's collection `intermediates` that the model
      returns. K is the model's number of heads, or 1. If a pool is not linear and has no probe,
      there are no attention maps for the model.
    distills: whether the vector is the class token followed by a distillation token. A run with a
      teacher then trains a head for each of the two tokens (Touvron et al. 2020, 2012.12877,
      Section 4).
    caption: part of the caption "What {caption}, for each block and head." under the attention
      maps, e.g. `the class token attends to`. This part names the tokens that the pool reads.
  """

  function: Callable[..., jax.Array]
  padded: bool = False
  class_token: bool = False
  registers: int = 0
  tokens: bool = False
  params: tuple[str, ...] = ()
  linear: bool = False
  probe: Callable[[nn.Module, Mapping], jax.Array] | None = None
  distills: bool = False
  caption: str = 'the tokens that the pool reads attend to'


class MapHead(nn.Module):
  """Multi-head attention pooling with one learned query, `[B, N, D]` to `[B, D]`.

  The layer is described in Section 3.1 of Zhai et al. 2021 (2106.04560).
  """

  block: Block

  @nn.compact
  def __call__(self, x_BND: jax.Array, length_B: jax.Array | None = None) -> jax.Array:
    block, (batch, _, width) = self.block, x_BND.shape
    query_11D = self.param('query', nn.initializers.xavier_uniform(), (1, 1, width))
    query_B1D = jnp.broadcast_to(query_11D.astype(x_BND.dtype), (batch, 1, width))
    x_B1D = Attention(block, name='attention')(x_BND, query_BND=query_B1D, length_B=length_B)
    y_B1D = norm_layer(block.norm_epsilon, block.dtype, 'mlp_norm')(x_B1D)
    return (x_B1D + Mlp(block, name='mlp')(y_B1D))[:, 0]


def first(model: nn.Module, x_BND: jax.Array, length_B: jax.Array | None = None) -> jax.Array:
  """Returns the first token, which is the class token: `[B, D]`."""
  return x_BND[:, 0]


def map_pool(model: nn.Module, x_BND: jax.Array, length_B: jax.Array | None = None) -> jax.Array:
  """Pools the patch tokens with a `MapHead` that has the model's sizes: returns `[B, D]`."""
  fields = dict(qkv_bias=True, key_bias=None, qk_norm=False, out_norm=False, mlp='plain')
  block = dataclasses.replace(model.block, **fields)
  patches_B = None if length_B is None else length_B - model.num_prefix
  return MapHead(block, name='map')(x_BND[:, model.num_prefix :], patches_B)


def map_probe(model: nn.Module, sown: Mapping) -> jax.Array:
  """Returns the attention weights of the query of the `MapHead`: `[B, K, N]`.

  The weights of tokens before the patches are 0. `sown` is the collection `intermediates` that the
  model returns.
  """
  (share_BK1P,) = sown['map']['attention']['attention_BKNN']
  return jnp.pad(share_BK1P[:, :, 0], [(0, 0), (0, 0), (model.num_prefix, 0)])


def patch_mean(model: nn.Module, x_BND: jax.Array, length_B: jax.Array | None = None) -> jax.Array:
  """Returns the mean of the patch tokens, without padding: `[B, D]`."""
  x_BPD = x_BND[:, model.num_prefix :]
  if length_B is None:
    return x_BPD.mean(axis=1)
  patches_B1 = length_B[:, None] - model.num_prefix
  inside_BP = jnp.arange(x_BPD.shape[1]) < patches_B1
  total_BD = jnp.where(inside_BP[..., None], x_BPD, 0).sum(axis=1, dtype=jnp.float32)
  return (total_BD / patches_B1).astype(x_BPD.dtype)


def first_and_mean(
  model: nn.Module, x_BND: jax.Array, length_B: jax.Array | None = None
) -> jax.Array:
  """Returns the class token, followed by the mean of the patch tokens: `[B, 2 D]`."""
  return jnp.concatenate([x_BND[:, 0], patch_mean(model, x_BND, length_B)], axis=-1)


def first_two(model: nn.Module, x_BND: jax.Array, length_B: jax.Array | None = None) -> jax.Array:
  """Returns the class token, followed by the first register: `[B, 2 D]`."""
  return jnp.concatenate([x_BND[:, 0], x_BND[:, 1]], axis=-1)


POOLS = {
  'cls': Pool(
    first,
    padded=True,
    class_token=True,
    linear=True,
    caption='the class token attends to',
  ),
  'gap': Pool(
    patch_mean,
    padded=True,
    linear=True,
    caption='the patches attend to on average, since the pool averages them',
  ),
  'map': Pool(
    map_pool,
    padded=True,
    params=('map',),
    probe=map_probe,
    caption=(
      'the patches attend to, weighted by the attention of the learned query, and (in the row '
      '"pool") what the learned query attends to'
    ),
  ),
  'cls_gap': Pool(  # DINOv2's classifier
    first_and_mean,
    padded=True,
    class_token=True,
    linear=True,
    caption='the class token and the averaged patches attend to, each weighted by one half',
  ),
  'distilled': Pool(  # DeiT's pooling; its distillation token is the first register
    first_two,
    padded=True,
    class_token=True,
    registers=1,
    linear=True,
    distills=True,
    caption='the class token and the distillation token attend to, each weighted by one half',
  ),
  'none': Pool(lambda model, x_BND: x_BND, tokens=True),
}


def pooled(model: nn.Module) -> nn.Module:
  """Returns the model, with a pool that gives one vector for each image.

  A pool that returns all tokens is replaced by `cls`, or by `gap` in a model without a class token.
  Any other pool is kept.
  """
  if not POOLS[model.pool].tokens:
    return model
  return model.clone(pool='cls' if model.has_class else 'gap')


def without_pool(model: nn.Module) -> nn.Module:
  """Returns a model that outputs all tokens `[B, N, D]`: it has the pool `none` and no head.

  The new model has no pre-logits layer and no projection either. The last LayerNorm normalises the
  tokens, even if it follows the pooling in `model`.
  """
  later = dict(representation_size=None, projection=None, num_classes=None)
  # By default, the pool `none` has no class token.
  return model.clone(pool='none', class_token=model.has_class, **later)
