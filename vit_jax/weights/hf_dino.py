"""The names in DINOv2 and DINOv3 of Hugging Face, as in `hf_names.py`.

Decisions:
  * DINOv3's positions are rotary, so a file has no array that shows them. The model type alone
    implies them, and `refuse` stops models with other positions from being written as DINOv3.
  * A bias that a file lacks is absent in the model too. A zero would be trained in fine-tuning.
  * `pos_embed_shift`, `pos_embed_jitter` and `pos_embed_rescale` change DINOv3's positions at
    random, only in pre-training. They are ignored.
"""

import numpy as np

from vit_jax.model import ViT
from vit_jax.weights.formats import refuse
from vit_jax.weights.hf_names import (
  COMMON,
  CROPPED,
  HEAD,
  IMAGENET,
  LEARNED,
  Kind,
  body,
  plain_mlp,
)
from vit_jax.weights.layouts import (
  CONV,
  SAME,
  VECTOR,
  fused,
  linear,
  torch_linear,
  torch_norm,
)


def packed_mlp() -> list[tuple]:
  """Returns the rows of a gated MLP, whose gate and inner layer are one array in the file."""
  mlp, inner = 'encoder.layer.{i}.mlp', [f'block_{{i}}/mlp/{name}' for name in ('gate', 'up')]
  return [
    ([f'{name}/kernel' for name in inner], f'{mlp}.weights_in.weight', fused(linear())),
    ([f'{name}/bias' for name in inner], f'{mlp}.weights_in.bias', fused(VECTOR)),
    *torch_linear('block_{i}/mlp/down', f'{mlp}.weights_out'),
  ]


def dinov2(mlp: list[tuple]) -> list[tuple]:
  """Returns the name table of DINOv2, given the rows of the MLP."""
  return [
    *body(('norm1', 'norm2'), mlp),
    ('block_{i}/attention_scale', 'encoder.layer.{i}.layer_scale1.lambda1', SAME),
    ('block_{i}/mlp_scale', 'encoder.layer.{i}.layer_scale2.lambda1', SAME),
    ('registers', 'embeddings.register_tokens', SAME),
  ]


DINOV2 = {'plain': dinov2(plain_mlp('mlp.fc1', 'mlp.fc2')), 'gated': dinov2(packed_mlp())}
DINOV2_DEFAULTS = COMMON | dict(
  mlp_ratio=4, layer_norm_eps=1e-6, layerscale_value=1.0, use_swiglu_ffn=False
)
DINOV3 = [
  ('cls', 'embeddings.cls_token', SAME),
  ('registers', 'embeddings.register_tokens', SAME),
  ('embedding/kernel', 'embeddings.patch_embeddings.weight', CONV),
  ('embedding/bias', 'embeddings.patch_embeddings.bias', SAME),
  *torch_norm('block_{i}/attention_norm', 'layer.{i}.norm1'),
  *torch_linear('block_{i}/attention/query', 'layer.{i}.attention.q_proj'),
  *torch_linear('block_{i}/attention/key', 'layer.{i}.attention.k_proj'),
  *torch_linear('block_{i}/attention/value', 'layer.{i}.attention.v_proj'),
  *torch_linear('block_{i}/attention/out', 'layer.{i}.attention.o_proj', axes=2),
  ('block_{i}/attention_scale', 'layer.{i}.layer_scale1.lambda1', SAME),
  *torch_norm('block_{i}/mlp_norm', 'layer.{i}.norm2'),
  *torch_linear('block_{i}/mlp/gate', 'layer.{i}.mlp.gate_proj'),
  *torch_linear('block_{i}/mlp/up', 'layer.{i}.mlp.up_proj'),
  *torch_linear('block_{i}/mlp/down', 'layer.{i}.mlp.down_proj'),
  ('block_{i}/mlp_scale', 'layer.{i}.layer_scale2.lambda1', SAME),
  *torch_norm('norm', 'norm'),
]
DINOV3_DEFAULTS = dict(
  hidden_size=384,
  num_hidden_layers=12,
  num_attention_heads=6,
  intermediate_size=1536,
  hidden_act='gelu',
  image_size=224,
  patch_size=16,
  num_channels=3,
  layer_norm_eps=1e-5,
  rope_theta=100.0,
  query_bias=True,
  key_bias=False,
  value_bias=True,
  proj_bias=True,
  mlp_bias=True,
  layerscale_value=1.0,
  use_gated_mlp=False,
  num_register_tokens=0,
)


def dinov2_fields(c: dict, origin: str) -> dict:
  """Returns the attributes of `ViT` that the config of a DINOv2 gives; see `Kind.fields`.

  The activation of the gated MLP is always `silu`; `hidden_act` does not change it.
  """
  fields = dict(
    mlp_dim=mlp_width(c['hidden_size'], c['mlp_ratio'], c['use_swiglu_ffn']),
    qkv_bias=c['qkv_bias'],
    layer_scale=float(c['layerscale_value']),
    num_registers=c.get('num_register_tokens', 0),
  )
  if c['use_swiglu_ffn']:
    fields |= dict(mlp='gated', activation='silu')
  return fields


def mlp_width(width: int, ratio: float, gated: bool) -> int:
  """Returns the hidden width of DINOv2's MLP; if gated, two thirds, rounded up to 8, 16, 24, ..."""
  plain = int(width * ratio)
  return (int(plain * 2 / 3) + 7) // 8 * 8 if gated else plain


def dinov2_config(model: ViT) -> dict:
  """Returns the config fields of a DINOv2; see `Kind.config`.

  Raises:
    ValueError: a gated MLP has another activation than `silu`, or an odd width.
  """
  gated = model.mlp == 'gated'
  if gated:
    refuse('hf (Dinov2)', model, {'activation': ('silu',)})
  exact = model.mlp_dim * (1.5 if gated else 1) / model.width
  width_of = lambda ratio: mlp_width(model.width, ratio, gated)
  # transformers expects an integer, and rounds the product with the model's width down.
  ratios = (round(exact), exact, np.nextafter(exact, np.inf).item())
  ratio = next((ratio for ratio in ratios if width_of(ratio) == model.mlp_dim), None)
  if ratio is None:
    raise ValueError(
      'The format hf (Dinov2) cannot hold this model:\n'
      f'  model.mlp_dim={model.mlp_dim}: only multiples of 8 can be written with model.mlp=gated'
    )
  registers = dict(num_register_tokens=model.num_registers) if model.num_registers else {}
  return registers | dict(
    mlp_ratio=ratio,
    use_swiglu_ffn=gated,
    qkv_bias=model.qkv_bias,
    layerscale_value=model.layer_scale,
  )


def dinov3_fields(c: dict, origin: str) -> dict:
  """Returns the attributes of `ViT` that the config of a DINOv3 gives; see `Kind.fields`.

  Raises:
    ValueError: the config has a combination of biases that no published model has.
  """
  for name, only in (('proj_bias', True), ('mlp_bias', True), ('value_bias', c['query_bias'])):
    if c[name] != only:
      raise ValueError(
        f'{origin}: {name}={c[name]} with query_bias={c["query_bias"]} is not supported, only '
        f'{name}={only}.'
      )
  return dict(
    mlp='gated' if c['use_gated_mlp'] else 'plain',
    mlp_dim=c['intermediate_size'],
    qkv_bias=c['query_bias'],
    key_bias=None if c['key_bias'] == c['query_bias'] else c['key_bias'],
    position='rope_unit',
    rope_theta=float(c['rope_theta']),
    num_registers=c['num_register_tokens'],
    layer_scale=float(c['layerscale_value']),
  )


def dinov3_config(model: ViT) -> dict:
  """Returns the config fields of a DINOv3; see `Kind.config`.

  Raises:
    ValueError: the model has no LayerScale, which DINOv3 always has.
  """
  if model.layer_scale is None:
    raise ValueError(
      'The format hf (DINOv3ViT) cannot hold this model:\n'
      '  model.layer_scale=None: only models with LayerScale can be written'
    )
  return dict(
    use_gated_mlp=model.mlp == 'gated',
    intermediate_size=model.mlp_dim,
    query_bias=model.qkv_bias,
    key_bias=model.qkv_bias if model.key_bias is None else model.key_bias,
    value_bias=model.qkv_bias,
    rope_theta=model.rope_theta,
    num_register_tokens=model.num_registers,
    layerscale_value=model.layer_scale,
  )


DINO_KINDS = {
  'dinov2': Kind(
    prefix='dinov2',
    rows=DINOV2,
    defaults=DINOV2_DEFAULTS | dict(patch_size=14),
    fields=dinov2_fields,
    config=dinov2_config,
    holds=LEARNED | {'pool': ('cls_gap',), 'position_prefix': ('cls',)},
    prepared=CROPPED,
  ),
  'dinov2_with_registers': Kind(
    prefix='dinov2_with_registers',
    rows=DINOV2,
    defaults=DINOV2_DEFAULTS | dict(num_register_tokens=4),
    fields=dinov2_fields,
    config=dinov2_config,
    holds=LEARNED | {'pool': ('cls_gap',), 'position_prefix': ('cls',)},
    prepared=CROPPED,
  ),
  'dinov3_vit': Kind(
    prefix='',  # transformers has no classifier of this kind
    rows={'plain': DINOV3, 'gated': DINOV3},
    defaults=DINOV3_DEFAULTS,
    fields=dinov3_fields,
    config=dinov3_config,
    holds={'position': ('rope_unit',), 'pool': ('cls',), 'num_classes': (None,)},
    prepared=IMAGENET | dict(interpolation='bilinear', stretch=True),
  ),
}
DINO_ARCHITECTURES = {
  'Dinov2ForImageClassification': ('dinov2', 'cls_gap', HEAD),
  'Dinov2Model': ('dinov2', 'cls_gap', []),
  'Dinov2WithRegistersForImageClassification': ('dinov2_with_registers', 'cls_gap', HEAD),
  'Dinov2WithRegistersModel': ('dinov2_with_registers', 'cls_gap', []),
  'DINOv3ViTModel': ('dinov3_vit', 'cls', []),
  'DINOv3ViTBackbone': ('dinov3_vit', 'cls', []),
}
