"""Names of parameters and config fields in Hugging Face's image towers of CLIP and SigLIP.

Decisions:
  * The file of a whole model (image and text tower) is accepted; its text tower is not read.
  * Both families share one name table. A row is skipped if the model lacks the parameter. CLIP has
    no pooling with parameters, and SigLIP has no class token and no LayerNorm before the first
    block.
  * SigLIP 2 for fixed image sizes has the architecture of SigLIP. SigLIP 2 NaFlex models, whose
    number of patches varies, are refused.
"""

import dataclasses
import functools

from vit_jax.model import ViT
from vit_jax.weights.hf_config import NOTHING, Kind, Top, check_fields
from vit_jax.weights.layouts import (
  CONV,
  ROWS,
  SAME,
  VECTOR,
  linear,
  torch_fused,
  torch_linear,
  torch_norm,
)

LAYER = 'encoder.layers.{i}'
TABLE = [
  ('cls', 'embeddings.class_embedding', VECTOR),
  ('pos_embedding', 'embeddings.position_embedding.weight', ROWS),
  ('embedding/kernel', 'embeddings.patch_embedding.weight', CONV),
  ('embedding/bias', 'embeddings.patch_embedding.bias', SAME),
  *torch_norm('pre_norm', 'pre_layrnorm'),
  *torch_norm('block_{i}/attention_norm', f'{LAYER}.layer_norm1'),
  *torch_linear('block_{i}/attention/query', f'{LAYER}.self_attn.q_proj'),
  *torch_linear('block_{i}/attention/key', f'{LAYER}.self_attn.k_proj'),
  *torch_linear('block_{i}/attention/value', f'{LAYER}.self_attn.v_proj'),
  *torch_linear('block_{i}/attention/out', f'{LAYER}.self_attn.out_proj', axes=2),
  *torch_norm('block_{i}/mlp_norm', f'{LAYER}.layer_norm2'),
  *torch_linear('block_{i}/mlp/up', f'{LAYER}.mlp.fc1'),
  *torch_linear('block_{i}/mlp/down', f'{LAYER}.mlp.fc2'),
  *torch_norm('norm', 'post_layernorm'),
  ('map/query', 'head.probe', SAME),
  *torch_fused('map/attention', ('query', 'key', 'value'), 'head.attention.in_proj', joint='_'),
  *torch_linear('map/attention/out', 'head.attention.out_proj', axes=2),
  *torch_norm('map/mlp_norm', 'head.layernorm'),
  *torch_linear('map/mlp/up', 'head.mlp.fc1'),
  *torch_linear('map/mlp/down', 'head.mlp.fc2'),
]
PROJECTION = Top(
  [('projection/kernel', 'visual_projection.weight', linear())],
  lambda c: dict(projection=c['projection_dim']),
)

SIZES = dict(
  hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
  num_channels=3, image_size=224,
)  # fmt: skip
CLIP_DEFAULTS = SIZES | dict(
  patch_size=32, hidden_act='quick_gelu', layer_norm_eps=1e-5, projection_dim=512
)
SIGLIP_DEFAULTS = SIZES | dict(
  patch_size=16, hidden_act='gelu_pytorch_tanh', layer_norm_eps=1e-6, vision_use_head=True
)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROCESSOR = dict(default_to_square=False, resample=3)  # defaults of both families


def clip_fields(c: dict, origin: str) -> dict:
  """Converts the config of a CLIP to attributes of `ViT`; see `Kind.fields`."""
  return dict(mlp_dim=c['intermediate_size'], pre_norm=True)


def clip_config(model: ViT) -> dict:
  """Converts a model to the config fields of an image tower of CLIP; see `Kind.config`."""
  projected = {} if model.projection is None else dict(projection_dim=model.projection)
  return projected | dict(intermediate_size=model.mlp_dim)


def siglip_fields(c: dict, origin: str) -> dict:
  """Converts the config of a SigLIP to attributes of `ViT`; see `Kind.fields`."""
  pool = 'map' if c['vision_use_head'] else 'none'
  return dict(mlp_dim=c['intermediate_size'], class_token=False, pool=pool)


def siglip_config(model: ViT) -> dict:
  """Converts a model to the config fields of an image tower of SigLIP; see `Kind.config`."""
  return dict(intermediate_size=model.mlp_dim, vision_use_head=model.pool == 'map')


# Attribute values that both families require.
OF_TOWER = dict(qkv_bias=(True,), num_registers=(0,), layer_scale=(None,))
IGNORED_IDS = (r'(.*\.)?embeddings\.position_ids',)  # integers, stored by older versions
TOWERS = {
  'clip_vision_model': Kind(
    rows={'plain': TABLE},
    defaults=CLIP_DEFAULTS,
    fields=clip_fields,
    config=clip_config,
    holds=OF_TOWER
    | dict(pool=('cls',), position_prefix=('cls', 'all'), pre_norm=(True,), projection=None),
    prepared=dict(mean=MEAN, std=STD),
    processor=PROCESSOR | dict(size=224, crop_size=224, image_mean=MEAN, image_std=STD),
    prefix='vision_model.',
    bare=False,
    ignored=IGNORED_IDS,
    square=True,
  ),
  'siglip_vision_model': Kind(
    rows={'plain': TABLE},
    defaults=SIGLIP_DEFAULTS,
    fields=siglip_fields,
    config=siglip_config,
    holds=OF_TOWER | dict(pool=('map',), has_class=(False,)),
    prepared=dict(stretch=True),
    processor=PROCESSOR
    | dict(size={'height': 224, 'width': 224}, image_mean=(0.5,), image_std=(0.5,)),
    prefix='vision_model.',
    bare=False,
    ignored=IGNORED_IDS,
    square=True,
  ),
}


def tower_config(config: dict, origin: str, tower: str, known: set[str]) -> dict:
  """Extracts the config of the image tower from the config of a whole model; see `Kind.body`.

  Args:
    config: config of the whole model.
    origin: the config's path, for messages.
    tower: `model_type` of the image tower.
    known: names of the fields that the config of the whole model can have.

  Raises:
    ValueError: a field is not supported, or the image tower is of a different kind.
  """
  check_fields(config, known, origin)
  found, later = config.get('vision_config') or {}, config.get('vision_config_dict')
  defaults = TOWERS[tower].defaults
  if later:  # only in older files; fields missing in `later` have the defaults
    found = found | defaults | later
  if found.get('model_type', tower) != tower:
    raise ValueError(
      f'{origin}: vision_config: expected model_type={tower}, got {found["model_type"]!r}.'
    )
  if 'projection_dim' in defaults:
    found = found | {'projection_dim': config.get('projection_dim', defaults['projection_dim'])}
  return found


def whole_model(tower: str, known: set[str]) -> Kind:
  """Returns the `Kind` of a whole model (image and text tower); arguments as in `tower_config`."""
  text = (r'text_model\..*', r'text_projection\.weight', 'logit_scale', 'logit_bias')
  kind = TOWERS[tower]
  body = functools.partial(tower_config, tower=tower, known=known)
  return dataclasses.replace(kind, body=body, ignored=kind.ignored + text)


TOWER_KINDS = TOWERS | {
  'clip': whole_model(
    'clip_vision_model',
    {'logit_scale_init_value', 'projection_dim', 'text_config', 'text_config_dict',
     'vision_config', 'vision_config_dict'},
  ),
  'siglip': whole_model('siglip_vision_model', {'text_config', 'vision_config'}),
}  # fmt: skip
TOWER_ARCHITECTURES = {
  'CLIPModel': ('clip', 'cls', PROJECTION),
  'CLIPVisionModelWithProjection': ('clip_vision_model', 'cls', PROJECTION),
  'CLIPVisionModel': ('clip_vision_model', 'cls', NOTHING),
  'SiglipModel': ('siglip', 'map', NOTHING),
  'SiglipVisionModel': ('siglip_vision_model', 'map', NOTHING),
}
NAFLEX = ('siglip2', 'siglip2_vision_model')


def refuse_naflex(model_type: str | None, origin: str) -> None:
  """Raises ValueError if a config describes a SigLIP 2 whose number of patches varies."""
  if model_type in NAFLEX:
    raise ValueError(
      f'{origin}: model_type={model_type}: NaFlex models, whose number of patches varies, are not '
      'supported. Use SigLIP 2 weights for a fixed image size, such as '
      'google/siglip2-base-patch16-224. Their model_type is siglip.'
    )


def tower_family(model: ViT) -> str | None:
  """Returns the Hugging Face family of a CLIP or SigLIP image tower; None for all other models.

  A model of these families has no head. CLIP is recognised by `pre_norm` or a projection, SigLIP by
  the pool `map` or a missing class token.
  """
  if model.num_classes is not None:
    return None
  if model.pre_norm or model.projection is not None:
    return 'CLIPVision'
  return 'SiglipVision' if model.pool == 'map' or not model.has_class else None
