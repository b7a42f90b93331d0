"""Names of parameters and config fields in Hugging Face's ViT, DeiT, DINOv2 and DINOv3.

Decisions:
  * No array in a DINOv3 file shows that its positions are rotary; only the model type implies this.
    Therefore, only models with `position='rope_unit'` are written as DINOv3.
  * A missing bias is not replaced by zeros, because fine-tuning would change the zeros.
  * DINOv3's `pos_embed_shift`, `_jitter` and `_rescale` are ignored: they act only in pre-training.
  * `layouts.py` describes name tables. The body of a model consists of its embedding and encoder.
"""

import numpy as np

from vit_jax.model import ViT
from vit_jax.weights.formats import refuse
from vit_jax.weights.hf_config import NOTHING, Kind, Top
from vit_jax.weights.layouts import (
  CONV,
  SAME,
  TEACHER_BIAS,
  TEACHER_KERNEL,
  torch_fused,
  torch_linear,
  torch_norm,
)

# Fields of `Preprocessing`.
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CROPPED = IMAGENET | dict(interpolation='bicubic', crop=224 / 256)


def body(norms: tuple[str, str], mlp: list[tuple]) -> list[tuple]:
  """Returns a body's name table with the MLP rows `mlp`; `norms` names the norms of a block."""
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
  """Returns the name table's rows for a plain MLP; `up` and `down` are its layers in the file."""
  up, down = (f'encoder.layer.{{i}}.{name}' for name in (up, down))
  return [*torch_linear('block_{i}/mlp/up', up), *torch_linear('block_{i}/mlp/down', down)]


def packed_mlp() -> list[tuple]:
  """Returns the name table's rows for a gated MLP whose `gate` and `up` are joined in the file."""
  ours, theirs = 'block_{i}/mlp', 'encoder.layer.{i}.mlp'
  inner = torch_fused(ours, ('gate', 'up'), f'{theirs}.weights_in')
  return [*inner, *torch_linear(f'{ours}/down', f'{theirs}.weights_out')]


def dinov2(mlp: list[tuple]) -> list[tuple]:
  """Returns DINOv2's table of names, without a head; `mlp` has the rows for the MLP."""
  return [
    *body(('norm1', 'norm2'), mlp),
    ('block_{i}/attention_scale', 'encoder.layer.{i}.layer_scale1.lambda1', SAME),
    ('block_{i}/mlp_scale', 'encoder.layer.{i}.layer_scale2.lambda1', SAME),
    ('registers', 'embeddings.register_tokens', SAME),
  ]


VIT = body(('layernorm_before', 'layernorm_after'), plain_mlp('intermediate.dense', 'output.dense'))
DEIT = [*VIT, ('registers', 'embeddings.distillation_token', SAME)]
DINOV2 = {'plain': dinov2(plain_mlp('mlp.fc1', 'mlp.fc2')), 'gated': dinov2(packed_mlp())}
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

# Default of each config field that affects the output.
COMMON = dict(
  hidden_size=768, num_hidden_layers=12, num_attention_heads=12, hidden_act='gelu', image_size=224,
  patch_size=16, num_channels=3, qkv_bias=True,
)  # fmt: skip
SINGLE = COMMON | dict(intermediate_size=3072, layer_norm_eps=1e-12)
DINOV2_DEFAULTS = COMMON | dict(
  mlp_ratio=4, layer_norm_eps=1e-6, layerscale_value=1.0, use_swiglu_ffn=False
)
DINOV3_DEFAULTS = dict(
  hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536,
  hidden_act='gelu', image_size=224, patch_size=16, num_channels=3, layer_norm_eps=1e-5,
  rope_theta=100.0, query_bias=True, key_bias=False, value_bias=True, proj_bias=True,
  mlp_bias=True, layerscale_value=1.0, use_gated_mlp=False, num_register_tokens=0,
)  # fmt: skip


def vit_fields(c: dict, origin: str) -> dict:
  """Converts the config of a ViT to attributes of `ViT`; see `Kind.fields`."""
  return dict(mlp_dim=c['intermediate_size'], qkv_bias=c['qkv_bias'])


def vit_config(model: ViT) -> dict:
  """Converts a model to the config fields of a ViT; see `Kind.config`."""
  return dict(intermediate_size=model.mlp_dim, qkv_bias=model.qkv_bias)


def deit_fields(c: dict, origin: str) -> dict:
  """Converts the config of a DeiT to attributes of `ViT`; see `Kind.fields`."""
  return vit_fields(c, origin) | dict(num_registers=1, position_prefix='all')


def of_head(c: dict) -> dict:
  """Reads the number of classes from a config of Hugging Face; returns `{'num_classes': ...}`."""
  return dict(num_classes=len(c.get('id2label') or ()) or c.get('num_labels', 2))


def dinov2_fields(c: dict, origin: str) -> dict:
  """Converts the config of a DINOv2 to attributes of `ViT`; see `Kind.fields`.

  The activation of the gated MLP is always `silu`; `hidden_act` does not change it.
  """
  gated = dict(mlp='gated', activation='silu') if c['use_swiglu_ffn'] else {}
  return gated | dict(
    mlp_dim=mlp_width(c['hidden_size'], c['mlp_ratio'], bool(gated)),
    qkv_bias=c['qkv_bias'],
    layer_scale=float(c['layerscale_value']),
    num_registers=c.get('num_register_tokens', 0),
  )


def mlp_width(width: int, ratio: float, gated: bool) -> int:
  """Returns `width * ratio`; for a gated MLP, 2/3 of the product, rounded up to a multiple of 8."""
  plain = int(width * ratio)
  return (int(plain * 2 / 3) + 7) // 8 * 8 if gated else plain


def dinov2_config(model: ViT) -> dict:
  """Converts a model to the config fields of a DINOv2; see `Kind.config`.

  Raises:
    ValueError: a gated MLP has another activation than `silu`, or its width is not a multiple of 8.
  """
  gated = model.mlp == 'gated'
  if gated:
    refuse('hf (Dinov2)', model, {'activation': ('silu',)})
  exact = model.mlp_dim * (1.5 if gated else 1) / model.width
  width_of = lambda ratio: mlp_width(model.width, ratio, gated)
  # The first ratio is an integer, as transformers expects. The last ratio is slightly larger than
  # `exact`, because widths are rounded down.
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


def dinov2_kind(prefix: str, **defaults: int) -> Kind:
  """Returns the `Kind` of a DINOv2 model; the names of its arrays begin with `prefix`."""
  return Kind(
    rows=DINOV2,
    defaults=DINOV2_DEFAULTS | defaults,
    fields=dinov2_fields,
    config=dinov2_config,
    holds={'pool': ('cls_gap',), 'position_prefix': ('cls',)},
    prepared=CROPPED,
    prefix=prefix,
  )


def dinov3_fields(c: dict, origin: str) -> dict:
  """Converts the config of a DINOv3 to attributes of `ViT`; see `Kind.fields`.

  Raises:
    ValueError: the config has a combination of biases that no published model has.
  """
  for name, only in (('proj_bias', True), ('mlp_bias', True), ('value_bias', c['query_bias'])):
    if c[name] != only:
      given = f' with query_bias={only}' if name == 'value_bias' else ''
      raise ValueError(f'{origin}: {name}={c[name]}{given} is not supported, only {name}={only}.')
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
  """Converts a model to the config fields of a DINOv3; see `Kind.config`.

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


HEAD = Top(torch_linear('head', 'classifier'), of_head)
TEACHER_HEAD = Top(
  [
    ('head/kernel', ('cls_classifier.weight', 'distillation_classifier.weight'), TEACHER_KERNEL),
    ('head/bias', ('cls_classifier.bias', 'distillation_classifier.bias'), TEACHER_BIAS),
  ],
  of_head,
)

VIT_KINDS = {
  'vit': Kind(
    rows={'plain': VIT},
    defaults=SINGLE,
    fields=vit_fields,
    config=vit_config,
    holds={'pool': ('cls',), 'position_prefix': ('cls', 'all')},
    prepared=dict(interpolation='bilinear', stretch=True),
    prefix='vit.',
  ),
  'deit': Kind(
    rows={'plain': DEIT},
    defaults=SINGLE,
    fields=deit_fields,
    config=vit_config,
    holds={'pool': ('cls', 'distilled'), 'position_prefix': ('all',), 'num_registers': (1,)},
    prepared=CROPPED,
    prefix='deit.',
  ),
  'dinov2': dinov2_kind('dinov2.', patch_size=14),
  'dinov2_with_registers': dinov2_kind('dinov2_with_registers.', num_register_tokens=4),
  'dinov3_vit': Kind(
    rows={'plain': DINOV3, 'gated': DINOV3},
    defaults=DINOV3_DEFAULTS,
    fields=dinov3_fields,
    config=dinov3_config,
    # transformers has no classifier for DINOv3.
    holds={'position': ('rope_unit',), 'key_bias': None, 'pool': ('cls',), 'num_classes': (None,)},
    prepared=IMAGENET | dict(interpolation='bilinear', stretch=True),
  ),
}
# {name in a config's `architectures`: (model type, pool, top)}. For each model type, the last
# architecture must be one without a top, because `hf.guess` relies on this order.
VIT_ARCHITECTURES = {
  'ViTForImageClassification': ('vit', 'cls', HEAD),
  'ViTModel': ('vit', 'cls', NOTHING),
  'DeiTForImageClassification': ('deit', 'cls', HEAD),
  'DeiTForImageClassificationWithTeacher': ('deit', 'distilled', TEACHER_HEAD),
  'DeiTModel': ('deit', 'cls', NOTHING),
  'Dinov2ForImageClassification': ('dinov2', 'cls_gap', HEAD),
  'Dinov2Model': ('dinov2', 'cls_gap', NOTHING),
  'Dinov2WithRegistersForImageClassification': ('dinov2_with_registers', 'cls_gap', HEAD),
  'Dinov2WithRegistersModel': ('dinov2_with_registers', 'cls_gap', NOTHING),
  'DINOv3ViTBackbone': ('dinov3_vit', 'cls', NOTHING),
  'DINOv3ViTModel': ('dinov3_vit', 'cls', NOTHING),
}
