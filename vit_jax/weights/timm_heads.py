"""Arrays of the heads in timm's files: of classifiers, of DeiT's two classifiers, and of CLIP.

timm's files store the projection of CLIP as the head of a classifier. If it were not recognised,
each dimension of CLIP's embedding would be read as the logit of a class. Warnings name the CLIP
models whose outputs are not what a user expects.
"""

from collections.abc import Mapping
import logging
import re

import numpy as np

from vit_jax.weights.layouts import SAME, TEACHER_BIAS, TEACHER_KERNEL, Layout, torch_linear
from vit_jax.weights.timm_names import POOLS

log = logging.getLogger(__name__)

# Rows of the name table. Our projection has no bias. timm stores its kernel as `head.weight`, and
# adds a bias of zeros.
ONE_HEAD = [
  ('registers', 'reg_token', SAME),
  *torch_linear('head', 'head'),
  (
    'projection/kernel',
    ('head.weight', 'head.bias'),
    Layout(
      lambda theirs, shapes: [theirs[0].T],
      lambda ours: [ours[0].T, np.zeros(ours[0].shape[1], np.float32)],
    ),
  ),
]
TWO_HEADS = [  # timm's `VisionTransformerDistilled`; our distillation token is the first register
  ('registers', 'dist_token', SAME),
  ('head/kernel', ('head.weight', 'head_dist.weight'), TEACHER_KERNEL),
  ('head/bias', ('head.bias', 'head_dist.bias'), TEACHER_BIAS),
]
# Names, with their tag, that timm's sources mark as natively QuickGELU.
QUICK = re.compile(
  r'.*_clip_\d+\.(openai|metaclip_400m|metaclip_2pt5b|dfn5b)'
  r'|vit_large_patch14_clip_224\.dfn2b|vit_base_patch32_clip_224\.laion400m_e32'
)


def pools_of(name: str) -> dict[str, str]:
  """Returns the poolings of an architecture: our names by timm's names."""
  return {'token': 'distilled'} if re.match(r'deit_[a-z]+_distilled_', name) else POOLS


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


def warn_of_clip(
  origin: str, architecture: str, about: Mapping, fields: Mapping, named: bool
) -> None:
  """Logs a warning if a CLIP has another activation than in training, or outputs no logits.

  The config of a CLIP with QuickGELU can name exact GELU. The projection of EVA-CLIP has a bias,
  but `ViT.projection` has none, so such a head is read as a classifier. Published classifiers that
  were trained from a CLIP have `ft_` in their tag.

  Args:
    origin: path of the config, for the message.
    architecture: timm's name of the model.
    about: the config's `pretrained_cfg`.
    fields: attributes of `ViT`.
    named: whether the config names the classes.
  """
  classes, tag = fields['num_classes'], about.get('tag') or ''
  count = classes or fields.get('projection')
  if named or not count or count != about.get('num_classes'):
    return  # fine-tuned: timm then keeps the tag of the published weights
  if QUICK.fullmatch(f'{architecture}.{tag}'):
    log.warning(
      '%s: these weights were trained with QuickGELU, but the architecture %s has exact GELU, as '
      'in timm. For the original outputs, copy the files into a folder, and write %s as '
      '"architecture" in config.json.',
      origin, architecture, architecture.replace('_clip_', '_clip_quickgelu_'),
    )  # fmt: skip
  if classes and tag and 'ft_' not in tag and re.match(r'eva\w*_clip_', architecture):
    log.warning(
      '%s: the %d outputs of the head are an embedding of CLIP, but they are read as the logits of '
      'classes. Do not use them as predictions. Use the features before the head, with '
      '--features=pooled, or fine-tune the weights, which replaces the head.', origin, classes,
    )  # fmt: skip
