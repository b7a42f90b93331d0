"""Computes features of patches, and their principal components, which can be drawn as colours.

    feature_BhwD = dense_features(model, params, image_BHWC)
    map_BhwF, share_F = component_maps(feature_BhwD)

An image has h x w patches. F is the number of components.

Decisions:
  * The components are computed from the patches of all images together, so that equal colours mean
    similar features, also in different images (Oquab et al. 2023, 2304.07193, Figure 1).
  * The sign of a component is arbitrary, so it is chosen to make the entry with the largest
    magnitude positive.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.experiment import Experiment
from vit_jax.model import ViT, without_pool

# Percentiles of a component that are drawn as black and as full colour. The minimum and the maximum
# would depend on a few outliers.
EDGES = (2, 98)


def dense_features(model: ViT, params: dict, image_BHWC: jax.Array) -> jax.Array:
  """Returns the features of the patches, `[B, h, w, D]` in float32.

  The features are the tokens of the last block after the last LayerNorm, without the class token
  and the registers.

  Args:
    model: the model, with any pool, with or without a head.
    params: the model's parameters.
    image_BHWC: normalised images. If the position embeddings were learned for another image size,
      set the model's `position_grid` to the grid of patches at that size. Alternatively, load the
      weights with the argument `grid`, the grid of patches in `image_BHWC`.
  """
  token_BND = without_pool(model).apply({'params': params}, image_BHWC).astype(jnp.float32)
  h, w = (n // patch for n, patch in zip(image_BHWC.shape[1:3], model.patch_size))
  return token_BND[:, model.num_prefix :].reshape(len(token_BND), h, w, -1)


def principal_components(x_ND: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Computes the first principal components of N vectors of length D.

  The mean of the vectors is subtracted first.

  Args:
    x_ND: the vectors.
    count: maximum number of components. F is the smallest of `count`, N - 1 and D.

  Returns:
    The components, float64 `[F, D]`, in decreasing order of variance. Each is a unit vector whose
      entry with the largest magnitude is positive.
    The share of each component in the variance of the vectors, float64 `[F]`.
  """
  x_ND = np.asarray(x_ND, np.float64)
  _, deviation_F, component_FD = np.linalg.svd(x_ND - x_ND.mean(axis=0), full_matrices=False)
  kept = min(count, len(x_ND) - 1, x_ND.shape[1])
  component_FD = component_FD[:kept]
  largest_F = np.abs(component_FD).argmax(axis=1)
  component_FD *= np.sign(component_FD[np.arange(kept), largest_F])[:, None]
  variance_F = deviation_F**2
  share_F = variance_F / max(variance_F.sum(), np.finfo(np.float64).tiny)
  return component_FD, share_F[:kept]


def component_maps(feature_BhwD: np.ndarray, count: int = 3) -> tuple[np.ndarray, np.ndarray]:
  """Projects patch features on their first principal components: returns one map per component.

  Args:
    feature_BhwD: features of the patches of one or several images.
    count: maximum number F of components.

  Returns:
    `map_BhwF`, float32: the projection of each patch's features on each component. The mean
      features of all patches are subtracted first.
    `share_F`: the share of each component in the variance of the features.
  """
  x_ND = np.asarray(feature_BhwD, np.float64).reshape(-1, feature_BhwD.shape[-1])
  component_FD, share_F = principal_components(x_ND, count)
  map_NF = (x_ND - x_ND.mean(axis=0)) @ component_FD.T
  return map_NF.reshape(*feature_BhwD.shape[:3], -1).astype(np.float32), share_F


def component_colours(map_BhwF: np.ndarray) -> np.ndarray:
  """Converts the first three component maps to red, green and blue: `[B, h, w, 3]`, 0 to 1.

  In each map, the two percentiles `EDGES` of the values in all images become 0 and 1. Values
  between these percentiles are scaled linearly, and all other values are clipped. If a map is
  constant or missing, its colour is 0.5.

  Args:
    map_BhwF: the maps that `component_maps` returns.
  """
  low_F, high_F = np.percentile(map_BhwF, EDGES, axis=(0, 1, 2))
  range_F = high_F - low_F
  shade = (map_BhwF - low_F) / np.where(range_F > 0, range_F, 1)
  shade = np.where(range_F > 0, np.clip(shade, 0, 1), 0.5)[..., :3]
  missing = 3 - shade.shape[-1]
  return np.pad(shade, [(0, 0)] * 3 + [(0, missing)], constant_values=0.5)


def of_images(
  exp: Experiment, params: dict, image_BHWC: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Computes the patch features of uint8 images, and returns their `component_maps`."""
  features = jax.jit(functools.partial(dense_features, exp.model))
  return component_maps(features(params, exp.normalize(image_BHWC)))
