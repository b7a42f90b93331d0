"""Recognises the projection of CLIP in timm's files, which store it as the head of a classifier.

Without this module, each dimension of CLIP's embedding would be read as the logit of a class.
"""

from collections.abc import Mapping

import numpy as np

from vit_jax.weights.layouts import Layout

# Our projection has no bias. timm stores its kernel as `head.weight`, and adds a bias of zeros.
ROWS = [
  (
    'projection/kernel',
    ('head.weight', 'head.bias'),
    Layout(
      lambda theirs, shapes: [theirs[0].T],
      lambda ours: [ours[0].T, np.zeros(ours[0].shape[1], np.float32)],
    ),
  )
]


def head_fields(
  count: int | None,
  arrays: Mapping[str, np.ndarray],
  pre_norm: bool,
  class_names: tuple[str, ...] | None,
) -> dict:
  """Returns the attributes `num_classes` and `projection` of `ViT` for the head in a file of timm.

  A config does not tell whether the head is CLIP's projection. This function treats the head as the
  projection if three conditions hold. The config names no classes, the model has a LayerNorm before
  the encoder (as only CLIP has), and the bias of the head is zero. Training makes the bias of a
  classifier differ from zero.

  Args:
    count: number of outputs of the head; None if the config has no head.
    arrays: arrays of the file.
    pre_norm: value of `ViT.pre_norm`.
    class_names: names of the classes in the config; None if it has no names.
  """
  bias = arrays.get('head.bias')
  projects = pre_norm and class_names is None and bias is not None and not np.any(bias)
  return dict(num_classes=None, projection=count) if projects else dict(num_classes=count)
