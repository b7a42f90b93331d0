"""Parameters by their paths."""

from collections.abc import Mapping
import functools

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.model import ViT


def param_shapes(model: ViT, image_shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
  """`{'block_0/mlp/up/kernel': (48, 192), ...}` of the model's parameters, for (H, W, C)."""
  init = functools.partial(model.init, jax.random.key(0))
  return shapes_of(jax.eval_shape(init, jnp.zeros((1, *image_shape)))['params'])


def shapes_of(tree: dict) -> dict[str, tuple[int, ...]]:
  """The shape of every leaf, by its path."""
  return {name: tuple(leaf.shape) for name, leaf in flatten_params(tree).items()}


def image_channels(params: dict) -> int:
  """Of the images that parameters are for; 3 where the first layer's are missing."""
  kernel = params.get('stem', {}).get('conv_root', params.get('embedding', {})).get('kernel')
  return 3 if kernel is None else kernel.shape[2]


def flatten_params(tree: dict) -> dict[str, np.ndarray]:
  """`{'block_0/mlp/up/kernel': ..., ...}`."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}


def unflatten_params(flat: Mapping[str, np.ndarray]) -> dict:
  """The inverse of `flatten`."""
  tree = {}
  for name, leaf in flat.items():
    *parents, last = name.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree
