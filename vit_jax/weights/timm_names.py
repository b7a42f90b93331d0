"""Translates timm's names to arguments of timm's classes, and the arguments to attributes of `ViT`.

A name has a size, a patch size, tags and a resolution: `vit_base_patch16_clip_224`. Reading a file
needs the name, because the arrays show neither the activation nor, in most models, the number of
heads. The tables are from timm 1.0.31, without models that `ViT` does not cover (parallel blocks,
RMSNorm). The number `norm_epsilon` and the name `mlp_layer` stand for Python objects in timm.
"""

import re

import numpy as np

from vit_jax.model import ViT
from vit_jax.names import choose, pair
from vit_jax.weights.formats import refuse


def size(embed_dim: int, depth: int, num_heads: int, **others) -> dict:
  """Returns timm's arguments that define a model size, such as `base`."""
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

FAMILIES = {'vit': {}, 'deit': {}, 'deit3': dict(no_embed_class=True, init_values=1e-6)}
CLIP = dict(pre_norm=True, norm_epsilon=1e-5)
GAP = dict(class_token=False, global_pool='avg', fc_norm=False)
SIGLIP = dict(class_token=False, global_pool='map')
TANH = dict(act_layer='gelu_tanh')
SCALE = dict(init_values=1e-5)


def registers(count: int, **others) -> dict:
  """Returns the arguments of timm's model class for models named `...reg<count>_gap...`."""
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
PACKED = 'SwiGLUPacked'  # the gated MLP of `VisionTransformer`
GATED = size(1536, 40, 24, mlp_ratio=2.66667 * 2, mlp_layer=PACKED, act_layer='silu')
# Names that do not follow the rule "size, patch size, tags"; some keys are for one resolution only.
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
  'vit_giant_patch14_dinov2': GATED | SCALE,
  'vit_giant_patch14_reg4_dinov2': GATED | TAGS['reg4_dinov2'],
  'vit_giant_patch14_reg1_tipsv2': GATED | TAGS['reg1_tipsv2'],
  'vit_small_patch16_36x1': SCALE | dict(depth=36),
  'vit_so150m_patch16_reg4_gap': GAP | dict(reg_tokens=4),
  'vit_so150m_patch16_reg4_map': SIGLIP | dict(reg_tokens=4),
  'vit_so150m2_patch16_reg1_gap': SCALE | dict(class_token=False, reg_tokens=1, global_pool='avg'),
}

# Names of the class `Eva`: EVA (Fang et al. 2022, 2211.07636), EVA-02 and DINOv3.
EVA02 = dict(mlp_ratio=4 * 2 / 3, swiglu_mlp=True, use_rot_pos_emb=True, ref_feat_shape=[16, 16])
NORMED = EVA02 | dict(qkv_fused=False, scale_mlp=True)
EVA_CLIP = NORMED | dict(scale_attn_inner=True, global_pool='token')
EVA_GIANT = size(1408, 40, 16, mlp_ratio=6144 / 1408)
EVAS = {
  'eva_giant_patch14': EVA_GIANT,
  'eva_giant_patch14_clip': EVA_GIANT | dict(global_pool='token'),
  'eva02_tiny_patch14': SIZES['tiny'] | EVA02,
  'eva02_small_patch14': SIZES['small'] | EVA02,
  'eva02_base_patch14': SIZES['base'] | NORMED,
  'eva02_large_patch14': SIZES['large'] | NORMED,
  'eva02_base_patch16_clip': SIZES['base'] | EVA_CLIP,
  'eva02_large_patch14_clip': SIZES['large'] | EVA_CLIP,
}
DINOV3 = dict(
  qkv_bias=False, dynamic_img_size=True, use_abs_pos_emb=False, use_rot_pos_emb=True,
  rope_type='dinov3', rope_temperature=100, rope_rotate_half=True, num_reg_tokens=4,
  use_fc_norm=False, init_values=1e-5, norm_epsilon=1e-5,
)  # fmt: skip
ALIGNED = dict(swiglu_mlp=True, swiglu_align_to=8)
DINOV3_SIZES = {
  'small': SIZES['small'],
  'small_plus': SIZES['small'] | ALIGNED,
  'base': SIZES['base'],
  'large': SIZES['large'],
  'huge_plus': size(1280, 32, 20) | ALIGNED,
  '7b': size(4096, 40, 32, mlp_ratio=2, swiglu_mlp=True, swiglu_align_to=64),
}
EVAS |= {f'vit_{name}_patch16_dinov3': own | DINOV3 for name, own in DINOV3_SIZES.items()}
EVAS |= {  # models in which queries and values have a bias
  f'vit_{name}_patch16_dinov3_qkvb': own | DINOV3 | dict(qkv_bias=True)
  for name, own in ({'tiny': SIZES['tiny']} | DINOV3_SIZES).items()
  if name != '7b'
}


def is_eva(name: str) -> bool:
  """Returns whether an architecture name belongs to timm's class `Eva`."""
  return re.sub(r'_\d{3}$', '', name) in EVAS


def arguments_of(name: str) -> dict | None:
  """Returns timm's arguments for an architecture name; None for an unknown name."""
  if name.startswith('flexivit_'):
    found = SIZES.get(name.removeprefix('flexivit_'))
    return found and found | dict(patch_size=16, no_embed_class=True)
  if name.startswith('eva_large_patch14_'):
    return SIZES['large'] | dict(patch_size=14, global_pool='avg')
  stem = re.sub(r'_\d{3}$', '', name)
  if stem in EVAS:
    image = re.search(r'^eva02.*_(\d{3})$', name)
    found = EVAS[stem] | dict(patch_size=int(re.search(r'patch(\d+)', stem)[1]))
    return found | (dict(img_size=int(image[1])) if image else {})
  match = re.fullmatch(r'(vit|deit3?)_([a-z0-9]+)_(?:distilled_)?patch(\d+)_?(\w*)', stem)
  if not match or match[2] not in SIZES or ('_distilled_' in name and match[1] != 'deit'):
    return None
  own = EXCEPTIONS.get(name, EXCEPTIONS.get(stem, TAGS.get(match[4])))
  if own is None:
    return None
  return SIZES[match[2]] | dict(patch_size=int(match[3])) | FAMILIES[match[1]] | own


# Arguments of each class with their defaults. Arguments in `..._ONLY` must have the listed value.
SHARED = dict(
  img_size=224, patch_size=16, in_chans=3, num_classes=1000, embed_dim=768, depth=12, num_heads=12,
  mlp_ratio=4.0, qkv_bias=True, init_values=None, class_token=True, no_embed_class=False,
  norm_epsilon=1e-6,
)  # fmt: skip
VIT = SHARED | dict(
  global_pool='token', qk_norm=False, reg_tokens=0, pre_norm=False, fc_norm=None, act_layer='gelu',
  mlp_layer=None,
)  # fmt: skip
VIT_ONLY = dict(
  final_norm=True, norm_layer=None, pool_include_prefix=False, pos_embed='learn', proj_bias=True,
  scale_attn_norm=False, scale_mlp_norm=False,
)  # fmt: skip
EVA = SHARED | dict(
  global_pool='avg', num_reg_tokens=0, use_pre_transformer_norm=False, use_fc_norm=None,
  qkv_fused=True, scale_attn_inner=False, swiglu_mlp=False, swiglu_align_to=0, scale_mlp=False,
  use_abs_pos_emb=True, use_rot_pos_emb=False, ref_feat_shape=None, rope_type='cat',
  rope_temperature=10000.0, rope_rotate_half=False,
)  # fmt: skip
EVA_ONLY = dict(
  attn_only_layer_scale=False, attn_pool_mlp_ratio=None, attn_pool_num_heads=None, attn_type='eva',
  norm_layer=None, num_kv_heads=None, qk_norm=False, rope_grid_indexing='ij', rope_grid_offset=0.0,
  rope_mrope_section=None, use_post_norm=False, use_post_transformer_norm=None,
)  # fmt: skip
NEUTRAL = {  # arguments that do not affect the output: for training, or for other image sizes
  'attn_drop_rate', 'drop_path_rate', 'drop_rate', 'dynamic_img_pad', 'dynamic_img_size',
  'fix_init', 'head_init_scale', 'patch_drop_rate', 'pos_drop_rate', 'proj_drop_rate',
  'rope_jitter_coords', 'rope_rescale_coords', 'rope_shift_coords', 'strict_img_size',
  'weight_init',
}  # fmt: skip

POOLS = {'token': 'cls', 'avg': 'gap', 'map': 'map', '': 'none'}  # timm's name: our name
ACTIVATIONS = ('gelu', 'gelu_tanh', 'quick_gelu', 'silu')
POSITIONS = {  # (learned positions, type of rotary positions, rotation of halves): our name
  (True, None, False): 'learned',
  (True, 'cat', False): 'learned_rope',
  (False, 'dinov3', True): 'rope_unit',
}


def vision_fields(a: dict, origin: str) -> dict:
  """Converts the arguments `a` of timm's `VisionTransformer` to attributes of `ViT`."""
  gated = choose(f'{origin}: mlp_layer', a['mlp_layer'] or '', {'': False, PACKED: True})
  return dict(
    mlp='gated' if gated else 'plain',
    mlp_dim=int(a['embed_dim'] * a['mlp_ratio']) // (1 + gated),
    num_registers=a['reg_tokens'],
    pre_norm=a['pre_norm'],
    qk_norm=a['qk_norm'],
    activation=choose(f'{origin}: act_layer', a['act_layer'], ACTIVATIONS),
  )


def eva_fields(a: dict, origin: str) -> dict:
  """Converts the arguments `a` of timm's `Eva` to attributes of `ViT`.

  Raises:
    ValueError: the positions, the MLP or the pooling are not supported.
  """
  rotary = a['rope_type'] if a['use_rot_pos_emb'] else None
  kind = bool(a['use_abs_pos_emb']), rotary, bool(rotary and a['rope_rotate_half'])
  if kind not in POSITIONS or (a['scale_mlp'] and not a['swiglu_mlp']) or a['global_pool'] == 'map':
    names = ('use_abs_pos_emb', 'use_rot_pos_emb', 'rope_type', 'rope_rotate_half', 'scale_mlp')
    given = ', '.join(f'{name}={a[name]}' for name in (*names, 'swiglu_mlp', 'global_pool'))
    raise ValueError(f'{origin}: this combination of arguments is not supported: {given}.')
  width = int(a['embed_dim'] * a['mlp_ratio'])
  aligned = width + -width % (a['swiglu_align_to'] or 1)
  gated = 'gated_norm' if a['scale_mlp'] else 'gated'
  return dict(
    mlp=gated if a['swiglu_mlp'] else 'plain',
    mlp_dim=aligned if a['swiglu_mlp'] else width,
    num_registers=a['num_reg_tokens'],
    pre_norm=a['use_pre_transformer_norm'],
    key_bias=False if a['qkv_bias'] else None,
    out_norm=a['scale_attn_inner'],
    position=POSITIONS[kind],
    rope_theta=1.0 * a['rope_temperature'],
    rope_grid=a['ref_feat_shape'] and pair(a['ref_feat_shape'], f'{origin}: ref_feat_shape'),
    activation='silu' if a['swiglu_mlp'] else 'gelu',
  )


HOLDS = dict(representation_size=(None,), projection=(None,), resnet=(None,), cosine=(False,))


def mlp_ratio(model: ViT, factor: int = 1) -> float:
  """Returns the `mlp_ratio` with which timm's MLP gets `factor * model.mlp_dim` hidden units."""
  ratio = factor * model.mlp_dim / model.width
  exact = int(model.width * ratio) == factor * model.mlp_dim
  return ratio if exact else np.nextafter(ratio, np.inf).item()


def arguments_for(model: ViT) -> tuple[str, dict]:
  """Returns an architecture name for a model, and arguments for the timm class of that name.

  Raises:
    ValueError: neither timm's `VisionTransformer` nor timm's `Eva` can hold the model.
  """
  needs_eva = model.position in ('learned_rope', 'rope_unit') or model.key_bias is False
  return (eva_arguments if needs_eva else vit_arguments)(model)


def vit_arguments(model: ViT) -> tuple[str, dict]:
  """Returns a `VisionTransformer` architecture for a model, and the arguments of this class."""
  refuse('timm', model, HOLDS | {
    'mlp': ('plain',) if model.pool == 'map' else ('plain', 'gated'),  # timm pools with a plain MLP
    'position': ('learned',), 'key_bias': (None,), 'out_norm': (False,), 'activation': ACTIVATIONS,
    'norm_epsilon': (1e-6,), 'pool': tuple(POOLS.values()),
  })  # fmt: skip
  gated = model.mlp == 'gated'
  return 'vit_giant_patch14_dinov2' if gated else 'vit_base_patch16_224', dict(
    mlp_ratio=mlp_ratio(model, 1 + gated), reg_tokens=model.num_registers, pre_norm=model.pre_norm,
    fc_norm=model.norm_after_pool, qk_norm=model.qk_norm, act_layer=model.activation,
  )  # fmt: skip


def eva_arguments(model: ViT) -> tuple[str, dict]:
  """Returns an architecture of timm's `Eva` for a model, and the arguments of this class."""
  unit = model.position == 'rope_unit'
  refuse('timm (Eva)', model, HOLDS | {
    'position': tuple(POSITIONS.values()), 'pool': ('cls', 'gap', 'none'), 'qk_norm': (False,),
    'key_bias': (False,) if model.qkv_bias else (False, None),
    'activation': ('gelu',) if model.mlp == 'plain' else ('silu',),
    'norm_epsilon': (1e-5 if unit else 1e-6,),
  })  # fmt: skip
  return 'vit_small_patch16_dinov3' if unit else 'eva02_tiny_patch14_224', dict(
    qkv_fused=False, mlp_ratio=mlp_ratio(model), swiglu_mlp=model.mlp != 'plain', swiglu_align_to=0,
    scale_mlp=model.mlp == 'gated_norm', scale_attn_inner=model.out_norm,
    num_reg_tokens=model.num_registers, use_pre_transformer_norm=model.pre_norm,
    use_fc_norm=model.norm_after_pool, use_abs_pos_emb=not unit,
    use_rot_pos_emb=model.position != 'learned', rope_type='dinov3' if unit else 'cat',
    rope_temperature=model.rope_theta, rope_rotate_half=unit,
    ref_feat_shape=model.rope_grid and list(model.rope_grid),
  )  # fmt: skip
