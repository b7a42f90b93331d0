"""Computes arrays that show what a trained model attends to and has learned.

`draw.py` draws these arrays. K counts heads; h and w count the patches down and across.

    layers, read_BKN = maps.attentions(model, params, image_BHWC)
    map_Bhw = maps.rollout(layers, read_BKN.mean(axis=1), maps.grid_of(model, image_BHWC))

Decisions:
  * The model itself returns its attention weights, through Flax's `sow`. For this, it uses the
    attention kernel `plain` (`attention.py`), which computes the weights explicitly.
  * `read_BKN` tells how much each token of the last block contributes to the pooled output. For the
    pool `cls`, only the class token contributes. For `gap`, all patches contribute equally. For
    `map`, the contributions are the attention of the probe, the pool's learned query.
  * `Missing` is raised if a model does not have the requested array. It is a separate subclass of
    `ValueError`, so that a report can skip one figure and give the reason.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.figures.components import principal_components
from vit_jax.model import POOLS, POSITIONS, ViT, cut


class Missing(ValueError):
  """Raised if the data for a figure is not available; the message gives the reason."""


def grid_of(model: ViT, image_BHWC: jax.Array) -> tuple[int, int]:
  """Returns the number of patches (down, across) into which the model cuts each image."""
  _, height, width, _ = image_BHWC.shape
  return height // model.patch_size[0], width // model.patch_size[1]


def attentions(
  model: ViT, params: dict, image_BHWC: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
  """Returns the attention of every block, and each token's contribution to the pooled output.

  Args:
    model: the model. Its entry in `POOLS` must be `linear` (the pool computes fixed means of
      tokens) or have a `probe` (a learned query).
    params: the model's parameters.
    image_BHWC: normalised images.

  Returns:
    A list with one float32 `attention_BKNN` for each block; rows (queries) sum to 1.
    `read_BKN`: how much each token of the last block contributes to the pooled output; rows sum to
      1. K is the number of heads of the pool's probe, or 1 for a pool without a probe. If the pool
      concatenates several vectors, each vector has the same weight.

  Raises:
    Missing: the pool returns all tokens, or the pool is not `linear` and has no `probe`.
  """
  pool = POOLS[model.pool]
  if pool.tokens:
    raise Missing(f'model.pool={model.pool} does not pool the tokens. Try model.clone(pool="cls").')
  if not (pool.linear or pool.probe):
    raise Missing(
      f'model.pool={model.pool} does not tell how much each token contributes to the pooled '
      'output, so this figure cannot be drawn.'
    )
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
  """Returns how much each of N tokens contributes to the output of a linear pool: `[N]`, sum 1.

  The contributions are computed by applying the pool to unit vectors. If the pool concatenates
  several vectors, the contributions are averaged over the vectors. `tokens` is N.
  """
  unit_1NN = jnp.eye(tokens)[None]
  return POOLS[model.pool].function(model, unit_1NN).reshape(-1, tokens).mean(axis=0)


def rollout(layers: Sequence[jax.Array], read_BN: jax.Array, grid: tuple[int, int]) -> jax.Array:
  """Returns how much of the pooled output comes from each patch of the image: `map_Bhw`.

  This is attention rollout (Abnar and Zuidema 2020, 2005.00928, Section 3), as in Figure 6 of the
  ViT paper. Each block is represented by the matrix `(A + I) / 2`. A is the mean attention of the
  heads, and the identity I stands for the residual connection. `read_BN` is multiplied by all these
  matrices, from the last block to the first.

  Args:
    layers: `attention_BKNN` of each block, in order.
    read_BN: how much each token contributes to the pooled output. This is the mean over the heads
      of `read_BKN`, which `attentions` returns.
    grid: number of patches (down, across). The patches must be the last tokens.

  Returns:
    The share of each patch in the output. The shares of all tokens sum to 1. The map does not
    contain the class token and the registers, so its values can have a smaller sum.
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
  """Returns an attention map of the patches for each head of one block: `map_BKhw`.

  The map is the mean attention of all tokens, weighted by their contributions to the pooled output.
  For pool `cls`, the map is the class token's attention; for `gap`, the patches' mean attention.

  Args:
    attention_BKNN: attention of one block.
    read_BN: as in `rollout`.
    grid: as in `rollout`.
  """
  return on_grid(jnp.einsum('BN,BKNM->BKM', read_BN, attention_BKNN), grid)


def attention_summary(model: ViT, params: dict, image_BHWC: jax.Array) -> dict[str, jax.Array]:
  """Returns the attention arrays that the figures need, as a dict.

  Images are processed one at a time, so that the attention of only one image is in memory.
  `attentions` describes the arguments and the error `Missing`.

  Returns:
    `rollout`: `[B, h, w]`, the result of `rollout`.
    `heads`: `[B, R, K, h, w]`. Each of the R rows is the `head_attention` of one block. If the pool
      has a `probe`, the last row is instead the attention of the pool's learned query.
    `distance`: `[B, depth, K]`, the `mean_attention_distance` of each block, in pixels.
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
  """Drops the tokens before the patches from `[..., N]`, and reshapes the rest to `[..., h, w]`."""
  h, w = grid
  return x[..., x.shape[-1] - h * w :].reshape(*x.shape[:-1], h, w)


def mean_attention_distance(
  attention_BKNN: jax.Array, grid: tuple[int, int], patch_size: tuple[int, int]
) -> jax.Array:
  """Returns the mean attention distance of each head, in pixels of the input: `distance_BK`.

  For each query patch, the distances to the centres of all key patches are averaged, weighted by
  attention. The result is the mean over all query patches (paper, Section 4.5 and Appendix
  D.7). The class token and the registers have no position, so they are left out as queries and as
  keys. The remaining attention of each query patch is rescaled to sum to 1.
  """
  count = grid[0] * grid[1]
  attention_BKNN = attention_BKNN[..., -count:, -count:]
  total_BKN = jnp.maximum(attention_BKNN.sum(axis=-1), jnp.finfo(jnp.float32).tiny)
  distance_NN = patch_distances(grid, patch_size)
  distance_BKN = jnp.einsum('BKNM,NM->BKN', attention_BKNN, distance_NN) / total_BKN
  return distance_BKN.mean(axis=-1)


def patch_distances(grid: tuple[int, int], patch_size: tuple[int, int]) -> np.ndarray:
  """Returns the distance in pixels between the centres of every two patches: `[h * w, h * w]`.

  The mean of this array is the attention distance of a head that attends to all patches equally.
  """
  centre_N2 = np.argwhere(np.ones(grid)) * np.asarray(patch_size)
  apart_NN2 = centre_N2[:, None] - centre_N2[None]
  return np.hypot(apart_NN2[..., 0], apart_NN2[..., 1]).astype(np.float32)


def position_embeddings(model: ViT, params: dict, grid: tuple[int, int]) -> np.ndarray:
  """Returns the position embeddings of the patches: `position_hwD`.

  Raises:
    Missing: the model has no position embeddings.
  """
  position = POSITIONS[model.position]
  if position.angles and not position.table:
    raise Missing(
      f'model.position={model.position} adds no position embeddings: it rotates queries and keys '
      'by their position.'
    )
  if not position.table:
    raise Missing(f'model.position={model.position}: the model has no position embeddings.')
  bound = model.bind({'params': params})
  position_1ND = np.asarray(position.table(bound, grid, model.position_grid or grid))
  return position_1ND[0, -grid[0] * grid[1] :].reshape(*grid, model.width)


def position_similarity(position_hwD: np.ndarray) -> np.ndarray:
  """Returns the cosine similarity of every two positions: `similarity_hwhw` (paper, Figure 7)."""
  norm_hw1 = np.linalg.norm(position_hwD, axis=-1, keepdims=True)
  unit_hwD = position_hwD / np.maximum(norm_hw1, np.finfo(np.float32).tiny)
  return np.einsum('hwD,yxD->hwyx', unit_hwD, unit_hwD)


def filters(model: ViT, params: dict, count: int = 28) -> tuple[np.ndarray, np.ndarray]:
  """Returns principal components of the patch embedding's filters (paper, Figure 7, left).

  The kernel of the embedding has D columns. Each column is a filter with the shape of a patch. The
  mean filter is subtracted first.

  Args:
    model: a model without a convolutional stem.
    params: the model's parameters.
    count: maximum number of components F. F is the smallest of `count`, D - 1 and the number of
      values in a patch.

  Returns:
    `filter_FpqC`: F components of p x q pixels, in decreasing order of variance. Each is a unit
      vector, whose entry with the largest magnitude is positive.
    `share_F`: the share of each component in the variance of the filters.

  Raises:
    Missing: the model is a hybrid, whose patches come from a feature map and not from pixels.
  """
  if model.resnet is not None:
    raise Missing("with model.resnet, patches are cut from a stem's feature map, not from images.")
  kernel_pqCD = np.asarray(params['embedding']['kernel'], np.float64)
  *patch, width = kernel_pqCD.shape
  component_FP, share_F = principal_components(kernel_pqCD.reshape(-1, width).T, count)
  return component_FP.reshape(-1, *patch).astype(np.float32), share_F


def patches(image_HWC: np.ndarray, patch_size: tuple[int, int]) -> np.ndarray:
  """Cuts an image into patches of p x q pixels (paper, Figure 1): returns `[h, w, p, q, C]`."""
  return cut(image_HWC[None], patch_size)[0]


def mistakes(
  label_N: np.ndarray, predicted_N: np.ndarray, confidence_N: np.ndarray, count: int
) -> np.ndarray:
  """Returns the indices of the most confident mistakes, in decreasing order of confidence.

  Args:
    label_N: true classes.
    predicted_N: predicted classes.
    confidence_N: probabilities of the predicted classes.
    count: maximum number of mistakes.
  """
  wrong = np.flatnonzero(np.asarray(label_N) != predicted_N)
  return wrong[np.argsort(-np.asarray(confidence_N)[wrong], kind='stable')][:count]


def spread_over_classes(label_N: np.ndarray, num_classes: int, count: int) -> np.ndarray:
  """Returns the indices of `count` examples, spread evenly over the classes.

  The first example of each class comes first, then the second example of each class, and so on. If
  there are fewer examples than `count`, all are used. If there are more classes than `count`, the
  examples come from `count` evenly spaced classes. If these classes have fewer than `count`
  examples, examples of other classes follow.
  """
  label_N = np.asarray(label_N)
  if num_classes > count:
    wanted = np.arange(count) * num_classes // count
    few = np.isin(label_N, wanted)
    label_N = np.where(few, label_N, num_classes)  # sorted after the chosen classes
  order = np.argsort(label_N, kind='stable')
  first = np.searchsorted(label_N[order], label_N[order])
  rank_N = np.empty(len(label_N), np.int64)
  rank_N[order] = np.arange(len(label_N)) - first
  return np.lexsort((label_N, rank_N, label_N == num_classes))[:count]
