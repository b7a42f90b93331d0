"""The names in Hugging Face models: parameters, architectures and config fields."""

from collections.abc import Mapping

import numpy as np

from vit_jax.weights.layouts import CONV, SAME, Layout, torch_linear, torch_norm

ACTIVATIONS = {  # Hugging Face name: our name; if several fit, the first one is written
  'gelu': 'gelu',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'gelu_new': 'gelu_tanh',
  'gelu_fast': 'gelu_tanh',
  'quick_gelu': 'quick_gelu',
}
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
# Arguments of `Preprocessing`, if no file describes the image processor.
STRETCHED = dict(interpolation='bilinear', stretch=True)
CROPPED = IMAGENET | dict(interpolation='bicubic', crop=224 / 256)

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


def body(norms: tuple[str, str], up: str, down: str) -> list[tuple]:
  """Returns rows of the name table for all models, given the names of norms and MLP layers."""
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
    *torch_linear('block_{i}/mlp/up', f'{layer}.{up}'),
    *torch_linear('block_{i}/mlp/down', f'{layer}.{down}'),
    *torch_norm('norm', 'layernorm'),
  ]


VIT = body(('layernorm_before', 'layernorm_after'), 'intermediate.dense', 'output.dense')
DEIT = [*VIT, ('registers', 'embeddings.distillation_token', SAME)]
DINOV2 = [
  *body(('norm1', 'norm2'), 'mlp.fc1', 'mlp.fc2'),
  ('block_{i}/attention_scale', 'encoder.layer.{i}.layer_scale1.lambda1', SAME),
  ('block_{i}/mlp_scale', 'encoder.layer.{i}.layer_scale2.lambda1', SAME),
]
DINOV2_REGISTERS = [*DINOV2, ('registers', 'embeddings.register_tokens', SAME)]

HEAD = torch_linear('head', 'classifier')
TEACHER_HEAD = [
  ('head/kernel', ('cls_classifier.weight', 'distillation_classifier.weight'), TEACHER_KERNEL),
  ('head/bias', ('cls_classifier.bias', 'distillation_classifier.bias'), TEACHER_BIAS),
]

# KINDS maps each `model_type` to the prefix of parameter names in a classifier, the name table, and
# the config's defaults.
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
DINO = COMMON | dict(mlp_ratio=4, layer_norm_eps=1e-6, layerscale_value=1.0, use_swiglu_ffn=False)
KINDS = {
  'vit': ('vit', VIT, SINGLE),
  'deit': ('deit', DEIT, SINGLE),
  'dinov2': ('dinov2', DINOV2, DINO | dict(patch_size=14)),
  'dinov2_with_registers': (
    'dinov2_with_registers',
    DINOV2_REGISTERS,
    DINO | dict(num_register_tokens=4),
  ),
}
# Maps each name in `architectures` to (kind, pool, rows of the head).
ARCHITECTURES = {
  'ViTForImageClassification': ('vit', 'cls', HEAD),
  'ViTModel': ('vit', 'cls', []),
  'DeiTForImageClassification': ('deit', 'cls', HEAD),
  'DeiTForImageClassificationWithTeacher': ('deit', 'distilled', TEACHER_HEAD),
  'DeiTModel': ('deit', 'cls', []),
  'Dinov2ForImageClassification': ('dinov2', 'cls_gap', HEAD),
  'Dinov2Model': ('dinov2', 'cls_gap', []),
  'Dinov2WithRegistersForImageClassification': ('dinov2_with_registers', 'cls_gap', HEAD),
  'Dinov2WithRegistersModel': ('dinov2_with_registers', 'cls_gap', []),
}
IGNORED = (r'(\w+\.)?pooler\..*', r'(\w+\.)?embeddings\.mask_token')

# Fields that do not affect the output: for training, for other heads, for the library itself.
NEUTRAL = {
    '_attn_implementation_autoset', '_name_or_path', 'apply_layernorm', 'architectures',
    'attention_probs_dropout_prob', 'chunk_size_feed_forward', 'drop_path_rate', 'dtype',
    'encoder_stride', 'finetuning_task', 'hidden_dropout_prob', 'id2label', 'initializer_range',
    'interpolate_antialias', 'interpolate_offset', 'is_encoder_decoder', 'label2id', 'model_type',
    'num_labels', 'out_features', 'out_indices', 'output_attentions', 'output_hidden_states',
    'pooler_act', 'pooler_output_size', 'problem_type', 'pruned_heads', 'reshape_hidden_states',
    'return_dict', 'stage_names', 'tie_word_embeddings', 'torch_dtype', 'torchscript',
    'transformers_version', 'use_bfloat16', 'use_cache', 'use_mask_token',
}  # fmt: skip

# Attribute values that all of these architectures require.
PLAIN = {
  'representation_size': (None,),
  'position': ('learned',),
  'pre_norm': (False,),
  'norm_after_pool': (False,),
  'qk_norm': (False,),
  'resnet': (None,),
  'projection': (None,),
  'cosine': (False,),
}


def activation_name(activation: str) -> str:
  """Returns the Hugging Face name of an activation."""
  return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == activation)


def guess(kind: str, arrays: Mapping[str, np.ndarray]) -> str:
  """Returns the architecture of a model whose config does not name its architecture."""
  headed = 'classifier.weight' in arrays
  return next(a for a, (k, _, head) in ARCHITECTURES.items() if k == kind and bool(head) == headed)
