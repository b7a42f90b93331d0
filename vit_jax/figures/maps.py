"""What a trained model looks at and what it has learned, as arrays; `draw.py` draws them.

    layers, read_BKN = maps.attentions(model, params, image_BHWC)
    map_Bhw = maps.rollout(layers, read_BKN.mean(axis=1), maps.grid_of(model, image_BHWC))

Decisions:
  * Attention leaves the model by `sow`, which has it take the kernel that forms the weights
    (`attention.py`); there is no second model.
  * What the pooled output reads of the last block's tokens is an array, `read`: 1 on the class
    token, equal on every patch, or the attention of a MAP head's probe. Whatever is asked about
    attention starts from it, and so holds for every pool.
  * `Missing` says that a model has no such thing. It is a `ValueError` of its own, so that a
    report can leave out one picture and say why.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.model import POOLS, POSITIONS, ViT


class Missing(ValueError):
  """There is no such thing to look at; the message says why."""


def grid_of(model: ViT, image_BHWC: jax.Array) -> tuple[int, int]:
  """Patches (down, across) of images of this size."""
  _, height, width, _ = image_BHWC.shape
  return height // model.patch_size[0], width // model.patch_size[1]


def attentions(
  model: ViT, params: dict, image_BHWC: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
  """Every block's attention, and what the pooled output reads of the last block's tokens.

  Args:
    model: of a pool that is linear or has a probe.
    params: its parameters.
    image_BHWC: normalised images.

  Returns:
    One `attention_BKNN` a block, float32, whose rows (queries) sum to 1; and `read_BKN`, whose
    rows sum to 1 too: by head of the probe if the pool has one, else with one head. Vectors side
    by side count alike.

  Raises:
    Missing: the model does not pool, or its pool does not tell what it reads.
  """
  pool = POOLS[model.pool]
  if pool.tokens:
    raise Missing(
      f'model.pool={model.pool} gives every token: ask for a pool, model.clone(pool="cls").'
    )
  if not (pool.linear or pool.probe):
    raise Missing(f'model.pool={model.pool} does not tell how much it reads of each token.')
  _, state = model.apply({'params': params}, image_BHWC, mutable=['intermediates'])
  sown = state['intermediates']
  layers = [
    sown[f'block_{i}']['attention']['attention_BKNN'][0].astype(jnp.float32)
    for i in range(model.depth)
  ]
  if pool.probe:
    return layers, pool.probe(model, sown).astype(jnp.float32)
  tokens = layers[0].shape[-1]
  share_N = pool_shares(model, tokens)
  return layers, jnp.broadcast_to(share_N, (len(image_BHWC), 1, tokens))


def pool_shares(model: ViT, tokens: int) -> jax.Array:
  """The share of each of the `tokens` in the output of a linear pool: `[N]`, sums to 1.

  They are what the pool makes of unit tokens, averaged over the vectors that it puts side by side.
  """
  unit_1NN = jnp.eye(tokens)[None]
  return POOLS[model.pool].function(model, unit_1NN).reshape(-1, tokens).mean(axis=0)


def rollout(layers: Sequence[jax.Array], read_BN: jax.Array, grid: tuple[int, int]) -> jax.Array:
  """How much of the pooled output comes from each patch of the image: `map_Bhw`.

  Attention rollout (Abnar and Zuidema 2020, 2005.00928, Section 3; paper, Figure 6): heads are
  averaged, the residual connection is an identity of equal weight, `(A + I) / 2`, and the layers
  are multiplied. Only the rows that the pool reads are followed, from the last block down.

  Args:
    layers: `attention_BKNN` of each block, the first block first.
    read_BN: the pool's share of each of the last block's tokens; see `attentions`.
    grid: patches (down, across); they are the last tokens.

  Returns:
    Shares of the pooled output. With those of the class token and the registers, which the map
    leaves out, they sum to 1.
  """
  flow_BN = read_BN
  for attention_BKNN in reversed(layers):
    step_BNN = attention_BKNN.mean(axis=1) + jnp.eye(attention_BKNN.shape[-1])
    step_BNN = step_BNN / step_BNN.sum(axis=-1, keepdims=True)
    flow_BN = jnp.einsum('BN,BNM->BM', flow_BN, step_BNN)
  return on_grid(flow_BN, grid)


def head_attention(
  attention_BKNN: jax.Array, read_BN: jax.Array, grid: tuple[int, int]
) -> jax.Array:
  """What each head of a block attends to, for the tokens that the pool reads: `map_BKhw`.

  With `cls` that is the class token's attention; with `gap` the mean of the patches', with `map`
  weighted as the probe weights them; with `cls_gap` and `distilled` half of each that they read.
  What goes to class token and registers is left out.
  """
  return on_grid(jnp.einsum('BN,BKNM->BKM', read_BN, attention_BKNN), grid)


def attention_summary(model: ViT, params: dict, image_BHWC: jax.Array) -> dict[str, jax.Array]:
  """What `draw` needs of attention, small where attention is large.

  One image at a time, and of that each block's attention only until it is summed up: a B/16 at
  224 pixels needs little beside its weights.

  Returns:
    `rollout` `[B, h, w]`; `heads` `[B, R, K, h, w]`, `head_attention` of each block, and a last
    row of the probe's own if the pool has one; `distance` `[B, depth, K]`, pixels.

  Raises:
    Missing: the model does not pool.
  """
  grid = grid_of(model, image_BHWC)

  def look(image_HWC):
    layers, read_BKN = attentions(model, params, image_HWC[None])
    read_BN = read_BKN.mean(axis=1)
    heads = [head_attention(attention_BKNN, read_BN, grid)[0] for attention_BKNN in layers]
    if POOLS[model.pool].probe:
      heads.append(jnp.broadcast_to(on_grid(read_BKN, grid)[0], heads[0].shape))
    distance = [mean_attention_distance(x, grid, model.patch_size)[0] for x in layers]
    return {
      'rollout': rollout(layers, read_BN, grid)[0],
      'heads': jnp.stack(heads),
      'distance': jnp.stack(distance),
    }

  return jax.lax.map(look, image_BHWC)


def on_grid(x: jax.Array, grid: tuple[int, int]) -> jax.Array:
  """The patches of `[..., N]` as `[..., h, w]`; the tokens before them are left out."""
  h, w = grid
  return x[..., x.shape[-1] - h * w :].reshape(*x.shape[:-1], h, w)


def mean_attention_distance(
  attention_BKNN: jax.Array, grid: tuple[int, int], patch_size: tuple[int, int]
) -> jax.Array:
  """How far each head looks, in pixels of the model's input: `distance_BK`.

  The distance between the centres of the patch that asks and the patch that answers, weighted
  by attention and averaged over the patches that ask (paper, Section 4.5 and Appendix D.7).
  Class token and registers have no place: they neither ask nor answer, and what attention the
  patches leave to each other counts as the whole.
  """
  count = grid[0] * grid[1]
  attention_BKNN = attention_BKNN[..., -count:, -count:]
  total_BKN = jnp.maximum(attention_BKNN.sum(axis=-1), jnp.finfo(jnp.float32).tiny)
  distance_NN = patch_distances(grid, patch_size)
  distance_BKN = jnp.einsum('BKNM,NM->BKN', attention_BKNN, distance_NN) / total_BKN
  return distance_BKN.mean(axis=-1)


def patch_distances(grid: tuple[int, int], patch_size: tuple[int, int]) -> np.ndarray:
  """Between the centres of every two patches, in pixels: `[h w, h w]`.

  The mean of all is the mean attention distance of a head that attends everywhere alike.
  """
  centre_N2 = np.argwhere(np.ones(grid)) * np.asarray(patch_size)
  apart_NN2 = centre_N2[:, None] - centre_N2[None]
  return np.hypot(apart_NN2[..., 0], apart_NN2[..., 1]).astype(np.float32)


def position_embeddings(model: ViT, params: dict, grid: tuple[int, int]) -> np.ndarray:
  """The position embeddings of the patches: `position_hwD`.

  Raises:
    Missing: the model has none.
  """
  position = POSITIONS[model.position]
  if position.angles and not position.table:
    raise Missing(
      f'model.position={model.position} adds no position embeddings: it turns queries and keys by '
      'their place.'
    )
  if not position.table:
    raise Missing(f'model.position={model.position}: the model has no position embeddings.')
  bound = model.bind({'params': params})
  position_1ND = np.asarray(position.table(bound, grid, model.position_grid or grid))
  return position_1ND[0, -grid[0] * grid[1] :].reshape(*grid, model.width)


def position_similarity(position_hwD: np.ndarray) -> np.ndarray:
  """Cosine similarity of each position to every other: `similarity_hwhw` (paper, Figure 7)."""
  norm_hw1 = np.linalg.norm(position_hwD, axis=-1, keepdims=True)
  unit_hwD = position_hwD / np.maximum(norm_hw1, np.finfo(np.float32).tiny)
  return np.einsum('hwD,yxD->hwyx', unit_hwD, unit_hwD)


def filters(model: ViT, params: dict, count: int = 28) -> tuple[np.ndarray, np.ndarray]:
  """Principal components of the patch embedding's filters (paper, Figure 7, left).

  Each of the D columns of the embedding is a filter over a patch; their components, about their
  mean, are patches again.

  Args:
    model: without a convolutional stem.
    params: its parameters.
    count: of components wanted; there are no more than numbers in a patch, and fewer than D.

  Returns:
    `filter_FpqC`, each of length 1, its entry of the largest magnitude positive, the most
    important first; and `share_F`, its share of the filters' variance.

  Raises:
    Missing: a hybrid's patches are of a feature map, not of pixels.
  """
  if model.resnet is not None:
    raise Missing("a hybrid embeds patches of its stem's feature map, which have no colours.")
  kernel_pqCD = np.asarray(params['embedding']['kernel'], np.float64)
  *patch, width = kernel_pqCD.shape
  filter_DP = kernel_pqCD.reshape(-1, width).T
  filter_DP = filter_DP - filter_DP.mean(axis=0)
  _, deviation_F, component_FP = np.linalg.svd(filter_DP, full_matrices=False)
  kept = min(count, width - 1, component_FP.shape[0])
  component_FP = component_FP[:kept]
  largest_F = np.abs(component_FP).argmax(axis=1)
  component_FP *= np.sign(component_FP[np.arange(kept), largest_F])[:, None]
  variance_F = deviation_F**2
  share_F = variance_F / max(variance_F.sum(), np.finfo(np.float64).tiny)
  return component_FP.reshape(kept, *patch).astype(np.float32), share_F[:kept]


def patches(image_HWC: np.ndarray, patch_size: tuple[int, int]) -> np.ndarray:
  """The image cut as the model cuts it (paper, Figure 1): `[h, w, p, q, C]`."""
  height, width, channels = image_HWC.shape
  p, q = patch_size
  return image_HWC.reshape(height // p, p, width // q, q, channels).transpose(0, 2, 1, 3, 4)


def confusion(label_N: np.ndarray, predicted_N: np.ndarray, num_classes: int) -> np.ndarray:
  """How many examples of each class (row) were taken for each class (column): `count_LL`."""
  pair_N = np.asarray(label_N, np.int64) * num_classes + predicted_N
  return np.bincount(pair_N, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_accuracy(count_LL: np.ndarray) -> np.ndarray:
  """The share of each class's examples that were recognised: `[L]`; NaN for a class of none."""
  total_L = count_LL.sum(axis=1)
  return np.where(total_L > 0, np.diag(count_LL) / np.maximum(total_L, 1), np.nan)


def mistakes(
  label_N: np.ndarray, predicted_N: np.ndarray, confidence_N: np.ndarray, count: int
) -> np.ndarray:
  """The indices of the mistakes that the model was surest of, the surest first; `count` at most.

  Args:
    label_N: the truth.
    predicted_N: what the model took it for.
    confidence_N: the probability that it gave to that.
    count: wanted.
  """
  wrong = np.flatnonzero(np.asarray(label_N) != predicted_N)
  return wrong[np.argsort(-np.asarray(confidence_N)[wrong], kind='stable')][:count]


def spread_over_classes(label_N: np.ndarray, num_classes: int, count: int) -> np.ndarray:
  """The indices of `count` examples, evenly over the classes: the first of each, then the second.

  Fewer where there are fewer examples; with more classes than `count`, classes evenly apart.
  """
  label_N = np.asarray(label_N)
  if num_classes > count:
    wanted = np.arange(count) * num_classes // count
    few = np.isin(label_N, wanted)
    label_N = np.where(few, label_N, num_classes)  # after all that are wanted
  order = np.argsort(label_N, kind='stable')
  first = np.searchsorted(label_N[order], label_N[order])
  rank_N = np.empty(len(label_N), np.int64)
  rank_N[order] = np.arange(len(label_N)) - first
  return np.lexsort((label_N, rank_N, label_N == num_classes))[:count]
