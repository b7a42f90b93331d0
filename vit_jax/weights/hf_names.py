"""The names in Hugging Face models: parameters, architectures and config fields.

`hf_dino.py` has the names in DINOv2 and DINOv3.
"""

from collections.abc import Callable, Mapping
import dataclasses

import numpy as np

from vit_jax.model import ViT
from vit_jax.weights.layouts import CONV, SAME, Layout, torch_linear, torch_norm

ACTIVATIONS = {  # Hugging Face name: our name; if several fit, the first one is written
  'gelu': 'gelu',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'gelu_new': 'gelu_tanh',
  'gelu_fast': 'gelu_tanh',
  'quick_gelu': 'quick_gelu',
  'silu': 'silu',
  'swish': 'silu',
}
RESAMPLING = {0: 'nearest', 1: 'lanczos', 2: 'bilinear', 3: 'bicubic', 4: 'box', 5: 'hamming'}
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

# Two classifiers whose logits are averaged become one classifier on two concatenated tokens.
# Halving and doubling the weights are exact in floating point.
TEACHER_KERNEL = Layout(
  lambda theirs, shapes: [np.concatenate([x.T for x in theirs]) / 2],
  lambda ours: [2 * half.T for half in np.split(ours[0], 2)],
)
TEACHER_BIAS = Layout(
  lambda theirs, shapes: [(theirs[0] + theirs[1]) / 2],
  lambda ours: [ours[0], ours[0]],
)


def body(norms: tuple[str, str], mlp: list[tuple]) -> list[tuple]:
  """Returns rows of the name table, given the names of the norms and the rows of the MLP."""
  layer = 'encoder.layer.{i}'
  heads = [
    row
    for part in ('query', 'key', 'value')
    for row in torch_linear(f'block_{{i}}/attention/{part}', f'{layer}.attention.attention.{part}')
  ]
  return [
    ('cls', 'embeddings.cls_token', SAME),
    ('pos_embedding', 'embeddings.position_embeddings', SAME),
    ('embedding/kernel', 'embeddings.patch_embeddings.projection.weight', CONV),
    ('embedding/bias', 'embeddings.patch_embeddings.projection.bias', SAME),
    *heads,
    *torch_linear('block_{i}/attention/out', f'{layer}.attention.output.dense', axes=2),
    *torch_norm('block_{i}/attention_norm', f'{layer}.{norms[0]}'),
    *torch_norm('block_{i}/mlp_norm', f'{layer}.{norms[1]}'),
    *mlp,
    *torch_norm('norm', 'layernorm'),
  ]


def plain_mlp(up: str, down: str) -> list[tuple]:
  """Returns the rows of a plain MLP, given the names of its two layers."""
  up, down = (f'encoder.layer.{{i}}.{name}' for name in (up, down))
  return [*torch_linear('block_{i}/mlp/up', up), *torch_linear('block_{i}/mlp/down', down)]


VIT = body(('layernorm_before', 'layernorm_after'), plain_mlp('intermediate.dense', 'output.dense'))
DEIT = [*VIT, ('registers', 'embeddings.distillation_token', SAME)]
HEAD = torch_linear('head', 'classifier')
TEACHER_HEAD = [
  ('head/kernel', ('cls_classifier.weight', 'distillation_classifier.weight'), TEACHER_KERNEL),
  ('head/bias', ('cls_classifier.bias', 'distillation_classifier.bias'), TEACHER_BIAS),
]

COMMON = dict(
  hidden_size=768,
  num_hidden_layers=12,
  num_attention_heads=12,
  hidden_act='gelu',
  image_size=224,
  patch_size=16,
  num_channels=3,
  qkv_bias=True,
)
SINGLE = COMMON | dict(intermediate_size=3072, layer_norm_eps=1e-12)


def vit_fields(c: dict, origin: str) -> dict:
  """Returns the attributes of `ViT` that the config of a ViT gives; see `Kind.fields`."""
  return dict(mlp_dim=c['intermediate_size'], qkv_bias=c['qkv_bias'])


def vit_config(model: ViT) -> dict:
  """Returns the config fields of a ViT; see `Kind.config`."""
  return dict(intermediate_size=model.mlp_dim, qkv_bias=model.qkv_bias)


def deit_fields(c: dict, origin: str) -> dict:
  """Returns the attributes of `ViT` that the config of a DeiT gives; see `Kind.fields`."""
  return vit_fields(c, origin) | dict(num_registers=1, position_prefix='all')


@dataclasses.dataclass(frozen=True)
class Kind:
  """A `model_type` of Hugging Face.

  Attributes:
    prefix: prefix of the body's parameter names in a classifier.
    rows: the name table of the body, by the kind of MLP (`ViT.mlp`).
    defaults: default of each config field that affects the output.
    fields: `(config, origin) -> dict` returns attributes of `ViT`, without the attributes that
      `read_hf` finds for every kind. `origin` is the config's path, for messages.
    config: `(model) -> dict` returns the config fields to write, without the fields that
      `save_hf` writes for every kind.
    holds: values of `ViT` attributes that the kind can hold; see `formats.refuse`.
    prepared: fields of `Preprocessing` if the folder has no `preprocessor_config.json`.
  """

  prefix: str
  rows: Mapping[str, list[tuple]]
  defaults: dict
  fields: Callable[[dict, str], dict]
  config: Callable[[ViT], dict]
  holds: dict
  prepared: dict


LEARNED = {'position': ('learned',), 'key_bias': (None,)}
CROPPED = IMAGENET | dict(interpolation='bicubic', crop=224 / 256)
KINDS = {
  'vit': Kind(
    prefix='vit',
    rows={'plain': VIT},
    defaults=SINGLE,
    fields=vit_fields,
    config=vit_config,
    holds=LEARNED | {'pool': ('cls',), 'position_prefix': ('cls', 'all')},
    prepared=dict(interpolation='bilinear', stretch=True),
  ),
  'deit': Kind(
    prefix='deit',
    rows={'plain': DEIT},
    defaults=SINGLE,
    fields=deit_fields,
    config=vit_config,
    holds=LEARNED
    | {'pool': ('cls', 'distilled'), 'position_prefix': ('all',), 'num_registers': (1,)},
    prepared=CROPPED,
  ),
}
# Maps each name in `architectures` to (kind, pool, rows of the head).
ARCHITECTURES = {
  'ViTForImageClassification': ('vit', 'cls', HEAD),
  'ViTModel': ('vit', 'cls', []),
  'DeiTForImageClassification': ('deit', 'cls', HEAD),
  'DeiTForImageClassificationWithTeacher': ('deit', 'distilled', TEACHER_HEAD),
  'DeiTModel': ('deit', 'cls', []),
}
IGNORED = (r'(\w+\.)?pooler\..*', r'(\w+\.)?embeddings\.mask_token')

# Fields that do not affect the output: for training, for other heads, for the library itself.
NEUTRAL = {
    '_attn_implementation_autoset', '_name_or_path', 'apply_layernorm', 'architectures',
    'attention_dropout', 'attention_probs_dropout_prob', 'chunk_size_feed_forward',
    'drop_path_rate', 'dtype', 'encoder_stride', 'finetuning_task', 'hidden_dropout_prob',
    'id2label', 'initializer_range', 'interpolate_antialias', 'interpolate_offset',
    'is_encoder_decoder', 'label2id', 'model_type', 'num_labels', 'out_features', 'out_indices',
    'output_attentions', 'output_hidden_states', 'pooler_act', 'pooler_output_size',
    'pos_embed_jitter', 'pos_embed_rescale', 'pos_embed_shift', 'problem_type', 'pruned_heads',
    'reshape_hidden_states', 'return_class_token', 'return_dict', 'stage_names',
    'tie_word_embeddings', 'torch_dtype', 'torchscript', 'transformers_version', 'use_bfloat16',
    'use_cache', 'use_mask_token',
}  # fmt: skip

# Attribute values that all of these architectures require.
COMMON_HOLDS = {
  'activation': tuple(dict.fromkeys(ACTIVATIONS.values())),
  'representation_size': (None,),
  'pre_norm': (False,),
  'norm_after_pool': (False,),
  'qk_norm': (False,),
  'out_norm': (False,),
  'resnet': (None,),
  'has_class': (True,),
}


def complete(config: dict, kind: Kind, origin: str) -> dict:
  """Returns a config with the defaults of its kind.

  Raises:
    ValueError: a field is not supported, is null, or has another type than its default.
  """
  unknown = sorted(set(config) - set(kind.defaults) - NEUTRAL)
  if unknown:
    raise ValueError(f'{origin}: unsupported fields: {", ".join(unknown)}.')
  c = kind.defaults | config
  for name, default in kind.defaults.items():
    kinds = type(default), type(c[name])
    if c[name] is None or any((kinds[0] is kind) != (kinds[1] is kind) for kind in (bool, str)):
      raise ValueError(
        f'{origin}: unexpected value: {name} is {c[name]!r}, expected {type(default).__name__}.'
      )
  return c
