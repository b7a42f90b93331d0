"""Reads and writes the image towers of CLIP and SigLIP in Hugging Face's layout.

Decisions:
  * A file of a whole model also holds a text tower, which is not read.
  * One name table serves both families. CLIP has no pooling with parameters. SigLIP has no class
    token and no LayerNorm before the first block.
  * SigLIP 2 for fixed image sizes is a SigLIP. Its NaFlex models, whose number of patches varies,
    are refused.
"""

from collections.abc import Mapping
import pathlib
from typing import NamedTuple

import numpy as np

from vit_jax.model import ViT
from vit_jax.names import check_positive, choose, pair
from vit_jax.weights import hf_names, hf_processor
from vit_jax.weights.formats import Weights, refuse, write_params
from vit_jax.weights.layouts import (
  CONV,
  ROWS,
  SAME,
  VECTOR,
  linear,
  rows,
  torch_fused,
  torch_linear,
  torch_norm,
)

LAYER = 'vision_model.encoder.layers.{i}'
POOLING = 'vision_model.head'
TABLE = [
  ('cls', 'vision_model.embeddings.class_embedding', VECTOR),
  ('pos_embedding', 'vision_model.embeddings.position_embedding.weight', ROWS),
  ('embedding/kernel', 'vision_model.embeddings.patch_embedding.weight', CONV),
  ('embedding/bias', 'vision_model.embeddings.patch_embedding.bias', SAME),
  *torch_norm('pre_norm', 'vision_model.pre_layrnorm'),
  *torch_norm('block_{i}/attention_norm', f'{LAYER}.layer_norm1'),
  *torch_linear('block_{i}/attention/query', f'{LAYER}.self_attn.q_proj'),
  *torch_linear('block_{i}/attention/key', f'{LAYER}.self_attn.k_proj'),
  *torch_linear('block_{i}/attention/value', f'{LAYER}.self_attn.v_proj'),
  *torch_linear('block_{i}/attention/out', f'{LAYER}.self_attn.out_proj', axes=2),
  *torch_norm('block_{i}/mlp_norm', f'{LAYER}.layer_norm2'),
  *torch_linear('block_{i}/mlp/up', f'{LAYER}.mlp.fc1'),
  *torch_linear('block_{i}/mlp/down', f'{LAYER}.mlp.fc2'),
  *torch_norm('norm', 'vision_model.post_layernorm'),
  ('map/query', f'{POOLING}.probe', SAME),
  *torch_fused(
    'map/attention',
    ('query', 'key', 'value'),
    (f'{POOLING}.attention.in_proj_weight', f'{POOLING}.attention.in_proj_bias'),
  ),
  *torch_linear('map/attention/out', f'{POOLING}.attention.out_proj', axes=2),
  *torch_norm('map/mlp_norm', f'{POOLING}.layernorm'),
  *torch_linear('map/mlp/up', f'{POOLING}.mlp.fc1'),
  *torch_linear('map/mlp/down', f'{POOLING}.mlp.fc2'),
  ('projection/kernel', 'visual_projection.weight', linear()),
]
IGNORED = (r'(.*\.)?embeddings\.position_ids',)  # integers, stored by older versions
OF_TEXT = (r'text_model\..*', r'text_projection\.weight', 'logit_scale', 'logit_bias')


class Family(NamedTuple):
  """An image tower of Hugging Face.

  Attributes:
    kind: its `model_type`.
    defaults: values of the config's fields.
    fields: attributes of `ViT` that all its models have.
    prepared: arguments of `Preprocessing`, if no file describes the image processor.
    missing: values of keys that the file of the image processor lacks.
  """

  kind: str
  defaults: dict
  fields: dict
  prepared: dict
  missing: dict


SIZES = dict(
  hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
  num_channels=3, image_size=224,
)  # fmt: skip
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP = Family(
  'clip_vision_model',
  SIZES | dict(patch_size=32, hidden_act='quick_gelu', layer_norm_eps=1e-5, projection_dim=512),
  dict(pool='cls', pre_norm=True),
  dict(mean=MEAN, std=STD),
  dict(size=224, crop_size=224, image_mean=MEAN, image_std=STD),
)
SIGLIP = Family(
  'siglip_vision_model',
  SIZES
  | dict(patch_size=16, hidden_act='gelu_pytorch_tanh', layer_norm_eps=1e-6, vision_use_head=True),
  dict(pool='map', class_token=False),
  dict(stretch=True),
  dict(size={'height': 224, 'width': 224}, image_mean=(0.5,), image_std=(0.5,)),
)
PROCESSOR = dict(default_to_square=False, resample=3)  # values of both families
# By `model_type`: the family of the image tower.
TOWERS = {'clip_vision_model': CLIP, 'siglip_vision_model': SIGLIP}
WHOLE = {'clip': CLIP, 'siglip': SIGLIP}
# By name in `architectures`: `model_type`, and whether the features are projected.
ARCHITECTURES = {
  'CLIPModel': ('clip', True),
  'CLIPVisionModelWithProjection': ('clip_vision_model', True),
  'CLIPVisionModel': ('clip_vision_model', False),
  'SiglipModel': ('siglip', False),
  'SiglipVisionModel': ('siglip_vision_model', False),
}
NAFLEX = ('siglip2', 'siglip2_vision_model')
TYPES = (*TOWERS, *WHOLE, *NAFLEX)

# Fields of the config of a whole model.
OF_WHOLE = {
  'clip': {'logit_scale_init_value', 'projection_dim', 'text_config', 'text_config_dict',
           'vision_config', 'vision_config_dict'},
  'siglip': {'text_config', 'vision_config'},
}  # fmt: skip
# Fields that do not affect the output. Most are fields of text generation, which older versions of
# transformers wrote into every config.
NEUTRAL = hf_names.NEUTRAL | {
    'add_cross_attention', 'attention_dropout', 'bad_words_ids', 'begin_suppress_tokens',
    'bos_token_id', 'cross_attention_hidden_size', 'decoder_start_token_id', 'diversity_penalty',
    'do_sample', 'dropout', 'early_stopping', 'encoder_no_repeat_ngram_size', 'eos_token_id',
    'exponential_decay_length_penalty', 'forced_bos_token_id', 'forced_eos_token_id',
    'initializer_factor', 'is_decoder', 'length_penalty', 'max_length', 'min_length',
    'no_repeat_ngram_size', 'num_beam_groups', 'num_beams', 'num_return_sequences',
    'output_scores', 'pad_token_id', 'prefix', 'remove_invalid_values', 'repetition_penalty',
    'return_dict_in_generate', 'sep_token_id', 'suppress_tokens', 'task_specific_params',
    'temperature', 'tf_legacy_loss', 'tie_encoder_decoder', 'tokenizer_class', 'top_k', 'top_p',
    'typical_p',
}  # fmt: skip


def read_towers(folder: pathlib.Path, config: dict, arrays: Mapping[str, np.ndarray]) -> Weights:
  """Returns the weights of the image tower in a folder, given its config and arrays.

  Raises:
    ValueError: the model, or a field of the config, is not supported.
  """
  origin, kind = f'{folder}/config.json', config['model_type']
  if kind in NAFLEX:
    raise ValueError(
      f'{origin}: model_type={kind}: NaFlex models, whose number of patches varies, are not '
      'supported. Use SigLIP 2 weights for a fixed image size, such as '
      'google/siglip2-base-patch16-224. Their model_type is siglip.'
    )
  architecture = (config.get('architectures') or [likely(kind, arrays)])[0]
  own, projected = choose(f'{origin}: architecture', architecture, ARCHITECTURES)
  if own != kind:
    raise ValueError(f'{origin}: model_type={kind} does not fit the architecture {architecture}.')
  family = (TOWERS | WHOLE)[kind]
  if kind in WHOLE:
    check_fields(origin, config, OF_WHOLE[kind])
    config = of_tower(origin, config, family)
  check_fields(origin, config, family.defaults)
  c = family.defaults | config
  patch, image = (pair(c[name], f'{origin}: {name}') for name in ('patch_size', 'image_size'))
  fields = family.fields | dict(
    num_classes=None,
    patch_size=patch,
    width=c['hidden_size'],
    depth=c['num_hidden_layers'],
    num_heads=c['num_attention_heads'],
    mlp_dim=c['intermediate_size'],
    projection=c['projection_dim'] if projected else None,
    activation=choose(f'{origin}: hidden_act', c['hidden_act'], hf_names.ACTIVATIONS),
    norm_epsilon=c['layer_norm_eps'],
  )
  if 'vision_use_head' in c:
    fields['pool'] = {True: 'map', False: 'none'}[c['vision_use_head']]
  check_positive(f'{origin}: num_channels', c['num_channels'])
  grid = image[0] // patch[0], image[1] // patch[1]
  size = grid[0] * patch[0], grid[1] * patch[1]
  return Weights(
    origin=str(folder),
    arrays=arrays,
    rows=rows(names_in(arrays), fields['depth']),
    fields=fields,
    channels=c['num_channels'],
    preprocessing=hf_processor.preprocessing(
      folder, size, patch, family.prepared, PROCESSOR | family.missing
    ),
    grid=grid,
    ignored=IGNORED + OF_TEXT * (kind in WHOLE),
  )


def likely(kind: str, arrays: Mapping[str, np.ndarray]) -> str:
  """Returns the architecture of a model whose config does not name its architecture."""
  fits = {name: projected for name, (own, projected) in ARCHITECTURES.items() if own == kind}
  has = 'visual_projection.weight' in arrays
  return next((name for name, projected in fits.items() if projected == has), next(iter(fits)))


def check_fields(origin: str, config: Mapping, known: set[str] | dict) -> None:
  """Raises ValueError if a config has fields that are neither known nor without effect."""
  if unknown := sorted(set(config) - set(known) - NEUTRAL):
    raise ValueError(f'{origin}: unsupported fields: {", ".join(unknown)}.')


def of_tower(origin: str, config: dict, family: Family) -> dict:
  """Returns the config of the image tower from the config of a whole model.

  Raises:
    ValueError: the image tower is of a different kind.
  """
  found, later = config.get('vision_config') or {}, config.get('vision_config_dict')
  if later:  # in older files; it overrides all fields, and its missing fields have the defaults
    found = found | family.defaults | later
  if found.get('model_type', family.kind) != family.kind:
    raise ValueError(
      f'{origin}: vision_config: expected model_type={family.kind}, got {found["model_type"]!r}.'
    )
  if 'projection_dim' in family.defaults:
    found = found | {'projection_dim': config.get('projection_dim', 512)}
  return found


def names_in(arrays: Mapping[str, np.ndarray]) -> list[tuple]:
  """Returns the name table of a file with these arrays.

  A tower that transformers 5 saved alone has no prefix `vision_model` before its names.
  """
  if any(name.startswith('vision_model.') for name in arrays):
    return TABLE
  return [(ours, theirs.removeprefix('vision_model.'), layout) for ours, theirs, layout in TABLE]


def holds_tower(model: ViT) -> bool:
  """Returns whether a model is like a tower of CLIP or SigLIP, not like a ViT, DeiT or DINOv2."""
  return model.num_classes is None and (
    model.pre_norm or model.pool == 'map' or not model.has_class
  )


def architecture_of(model: ViT) -> str:
  """Returns the name of the architecture that can hold a model.

  Raises:
    ValueError: no architecture can hold the model; the message lists the wrong attributes.
  """
  name = 'CLIPVisionModel' if model.pre_norm else 'SiglipVisionModel'
  pool = 'cls' if model.pre_norm else 'map'
  holds = hf_names.PLAIN | {
    'pre_norm': (model.pre_norm,),
    'has_class': (model.pre_norm,),
    'pool': (pool, 'none'),
    'projection': (model.projection if model.pool == 'cls' else None,),
    'num_registers': (0,),
    'layer_scale': (None,),
    'qkv_bias': (True,),
    'head_dim': (None, model.width // model.num_heads),
    'activation': tuple(dict.fromkeys(hf_names.ACTIVATIONS.values())),
  }
  refuse(f'hf ({name})', model, holds)
  return name + 'WithProjection' * (model.projection is not None)


def tower_contents(
  model: ViT, params: dict, size: tuple[int, int]
) -> tuple[dict, dict[str, np.ndarray]]:
  """Returns the config and the arrays of a file; `size` is the image size in pixels.

  Raises:
    ValueError: no architecture can hold the model, or the images or the patches are not square.
  """
  name = architecture_of(model)
  if len({*size}) > 1 or len({*model.patch_size}) > 1:
    raise ValueError(
      f'The format hf ({name}) cannot hold this model:\n  images of {size[0]}x{size[1]} pixels, '
      f'patches of {model.patch_size[0]}x{model.patch_size[1]}: only squares can be written'
    )
  kind = ARCHITECTURES[name][0]
  config = dict(
    architectures=[name],
    model_type=kind,
    hidden_size=model.width,
    intermediate_size=model.mlp_dim,
    num_hidden_layers=model.depth,
    num_attention_heads=model.num_heads,
    hidden_act=hf_names.activation_name(model.activation),
    layer_norm_eps=model.norm_epsilon,
    image_size=size[0],
    patch_size=model.patch_size[0],
    num_channels=params['embedding']['kernel'].shape[2],
  )
  if model.projection is not None:
    config['projection_dim'] = model.projection
  if kind == SIGLIP.kind:
    config['vision_use_head'] = model.pool == 'map'
  return config, write_params(rows(TABLE, model.depth), params)
