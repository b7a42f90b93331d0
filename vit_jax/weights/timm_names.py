"""Translates timm's architecture names into the arguments of its `VisionTransformer`.

A name has a size, a patch size, tags and a resolution: `vit_base_patch16_clip_224`. The names are
needed because the arrays of a file do not show the activation, nor, if q, k and v are fused, the
number of heads. The tables are from timm 1.0.31. They do not include models that are more than a
ViT (parallel blocks, SwiGLU, RMSNorm, ...).
"""

import re


def size(embed_dim: int, depth: int, num_heads: int, **others) -> dict:
  """Returns the arguments that define a size, such as `base`."""
  return dict(embed_dim=embed_dim, depth=depth, num_heads=num_heads, **others)


SIZES = {
  'tiny': size(192, 12, 3),
  'xsmall': size(256, 10, 4),
  'wee': size(256, 14, 4, mlp_ratio=5),
  'little': size(320, 14, 5, mlp_ratio=5.6),
  'small': size(384, 12, 6),
  'medium': size(512, 12, 8),
  'mediumd': size(512, 20, 8),
  'betwixt': size(640, 12, 10),
  'base': size(768, 12, 12),
  'so150m': size(896, 18, 14, mlp_ratio=2.572),
  'so150m2': size(832, 21, 13, mlp_ratio=2.6153846153846154, qkv_bias=False),
  'large': size(1024, 24, 16),
  'so400m': size(1152, 27, 16, mlp_ratio=3.7362),
  'huge': size(1280, 32, 16),
  'giant': size(1408, 40, 16, mlp_ratio=4.363636363636363),
  'gigantic': size(1664, 48, 16, mlp_ratio=4.923076923076923),
  'giantopt': size(1536, 40, 16),
}

CLIP = dict(pre_norm=True, norm_epsilon=1e-5)
GAP = dict(class_token=False, global_pool='avg', fc_norm=False)
SIGLIP = dict(class_token=False, global_pool='map')
TANH = dict(act_layer='gelu_tanh')
SCALE = dict(init_values=1e-5)


def registers(count: int, **others) -> dict:
  """Returns the arguments of timm's own models with `reg<count>_gap` in the name."""
  common = dict(class_token=False, no_embed_class=True, global_pool='avg', reg_tokens=count)
  return common | others


TAGS = {  # the part of the name after the patch size, without the resolution
  '': {},
  'clip': CLIP,
  'clip_quickgelu': CLIP | dict(act_layer='quick_gelu'),
  'gap': GAP,
  'reg1_gap': registers(1, **SCALE),
  'reg4_gap': registers(4, **SCALE),
  'siglip': SIGLIP,
  'siglip_gap': GAP,
  'dinov2': SCALE,
  'reg4_dinov2': SCALE | dict(reg_tokens=4, no_embed_class=True),
  'reg1_tipsv2': dict(init_values=1.0, reg_tokens=1, no_embed_class=True),
}

BARE_GAP = GAP | dict(qkv_bias=False, init_values=1e-6)
PLUS = size(896, 12, 14)
# Names that do not follow the rule "size, patch size, tags". A key includes the resolution if only
# that resolution is an exception.
EXCEPTIONS = {
  'vit_base_patch16_224_miil': dict(qkv_bias=False),
  'vit_base_patch16_gap': GAP | dict(num_heads=16),
  'vit_base_patch16_plus': PLUS | SCALE,
  'vit_base_patch32_plus': PLUS | SCALE,
  'vit_base_patch16_plus_clip': PLUS | CLIP,
  'vit_base_patch16_reg4_gap': registers(4),
  'vit_base_patch32_siglip': SIGLIP | TANH,
  'vit_base_patch32_siglip_gap': GAP | TANH,
  'vit_medium_patch16_gap': BARE_GAP,
  'vit_betwixt_patch16_gap': BARE_GAP,
  'vit_large_patch16_siglip_512': SIGLIP | TANH,
  'vit_large_patch16_siglip_gap_512': GAP | TANH,
  'vit_so400m_patch16_siglip': SIGLIP | TANH,
  'vit_so400m_patch16_siglip_gap': GAP | TANH,
  'vit_so400m_patch14_reg1_tipsv2': TAGS['reg1_tipsv2'] | dict(mlp_ratio=3.736111111111111),
  'vit_giantopt_patch16_siglip': SIGLIP | TANH,
  'vit_giantopt_patch16_siglip_gap': GAP | TANH,
  'vit_small_patch16_36x1': SCALE | dict(depth=36),
  'vit_so150m_patch16_reg4_gap': GAP | dict(reg_tokens=4),
  'vit_so150m_patch16_reg4_map': SIGLIP | dict(reg_tokens=4),
  'vit_so150m2_patch16_reg1_gap': SCALE | dict(class_token=False, reg_tokens=1, global_pool='avg'),
}

NOT_A_VIT = {
  'vit_giant_patch14_dinov2',
  'vit_giant_patch14_reg4_dinov2',
  'vit_giant_patch14_reg1_tipsv2',
}


def arguments_of(name: str) -> dict | None:
  """Returns the arguments of an architecture name, or None for an unknown name."""
  if name.startswith('flexivit_'):
    found = SIZES.get(name.removeprefix('flexivit_'))
    return found and found | dict(patch_size=16, no_embed_class=True)
  if name.startswith('eva_large_patch14_'):
    return SIZES['large'] | dict(patch_size=14, global_pool='avg')
  stem = re.sub(r'_\d{3}$', '', name)
  match = re.fullmatch(r'vit_([a-z0-9]+)_patch(\d+)_?(\w*)', stem)
  if not match or match[1] not in SIZES or stem in NOT_A_VIT:
    return None
  exception = EXCEPTIONS.get(name, EXCEPTIONS.get(stem))
  if exception is None and match[3] not in TAGS:
    return None
  own = TAGS[match[3]] if exception is None else exception
  return SIZES[match[1]] | dict(patch_size=int(match[2])) | own
