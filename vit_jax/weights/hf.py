"""Reads and writes Hugging Face models: `model.safetensors` and `config.json`.

Decisions:
  * The models are ViT, DeiT, DINOv2 with and without registers, and the image towers of CLIP and
    SigLIP (`hf_towers.py`).
  * DeiT's distillation token becomes our first register, with its own position embedding.
  * Every field of a config is either used, or known not to affect the output, or refused by name.
"""

from collections.abc import Mapping
import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

from vit_jax.model import ViT
from vit_jax.names import choose, pair
from vit_jax.weights import hf_names, hf_processor, hf_towers
from vit_jax.weights.formats import (
  Preprocessing,
  Pretrained,
  Weights,
  refuse,
  upright,
  write_params,
)
from vit_jax.weights.layouts import image_channels, rows


def read_hf(folder: pathlib.Path, config: dict, arrays: Mapping[str, np.ndarray]) -> Weights:
  """Returns the weights of a folder with a Hugging Face `config.json`.

  Raises:
    ValueError: the model, or a field of the config, is not supported.
  """
  kind = config.get('model_type')
  if kind in hf_towers.TYPES:
    return hf_towers.read_towers(folder, config, arrays)
  choose(f'{folder}: model_type', kind, (*hf_names.KINDS, *hf_towers.WHOLE, *hf_towers.TOWERS))
  return read_vit(folder, config, arrays)


def read_vit(folder: pathlib.Path, config: dict, arrays: Mapping[str, np.ndarray]) -> Weights:
  """Returns the weights of a ViT, DeiT or DINOv2; the arguments are those of `read_hf`."""
  origin = str(folder)
  architecture = (config.get('architectures') or [hf_names.guess(config['model_type'], arrays)])[0]
  kind, pool, head = choose(f'{origin}: architecture', architecture, hf_names.ARCHITECTURES)
  prefix, body_rows, defaults = hf_names.KINDS[kind]
  unknown = sorted(set(config) - set(defaults) - hf_names.NEUTRAL)
  if unknown or kind != config['model_type']:
    raise ValueError(
      f'{origin}/config.json: unsupported fields: {", ".join(unknown)}.'
      if unknown
      else f'{origin}/config.json: model_type={config["model_type"]} does not fit the architecture '
      f'{architecture}.'
    )
  c = defaults | config
  if c.get('use_swiglu_ffn'):
    raise ValueError(f'{origin}/config.json: use_swiglu_ffn=True: SwiGLU is not supported.')
  patch, image = (
    pair(c[name], f'{origin}/config.json: {name}') for name in ('patch_size', 'image_size')
  )
  ratio = c.get('mlp_ratio')
  fields = dict(
    num_classes=None,
    patch_size=patch,
    width=c['hidden_size'],
    depth=c['num_hidden_layers'],
    num_heads=c['num_attention_heads'],
    mlp_dim=int(c['hidden_size'] * ratio) if ratio else c['intermediate_size'],
    pool=pool,
    activation=choose(f'{origin}/config.json: hidden_act', c['hidden_act'], hf_names.ACTIVATIONS),
    norm_epsilon=c['layer_norm_eps'],
    qkv_bias=c['qkv_bias'],
  )
  if kind == 'deit':
    fields |= dict(num_registers=1, position_prefix='all')
  if 'layerscale_value' in c:
    fields['layer_scale'] = float(c['layerscale_value'])
  if 'num_register_tokens' in c:
    fields['num_registers'] = c['num_register_tokens']
  labels = c.get('id2label')
  if head:
    fields['num_classes'] = len(labels) if labels else c.get('num_labels', 2)
    body_rows = [(ours, f'{prefix}.{theirs}', layout) for ours, theirs, layout in body_rows]
  grid = image[0] // patch[0], image[1] // patch[1]
  size = grid[0] * patch[0], grid[1] * patch[1]
  prepared = hf_names.STRETCHED if kind == 'vit' else hf_names.CROPPED
  return Weights(
    origin=origin,
    arrays=arrays,
    rows=rows([*body_rows, *head], fields['depth']),
    fields=fields,
    channels=c['num_channels'],
    preprocessing=hf_processor.preprocessing(folder, size, patch, prepared),
    grid=grid,
    class_names=class_names(labels, origin) if head and labels else None,
    ignored=hf_names.IGNORED,
  )


def class_names(labels: Mapping, origin: str) -> tuple[str, ...] | None:
  """Returns the names of `id2label` in the order of their ids; None for the default `LABEL_<i>`.

  Raises:
    ValueError: the ids are not 0, 1, 2, ...
  """
  ids = [str(i) for i in range(len(labels))]
  if set(labels) != set(ids):
    raise ValueError(f'{origin}/config.json: id2label: expected the ids 0 to {len(ids) - 1}.')
  names = tuple(str(labels[key]) for key in ids)
  return None if names == tuple(f'LABEL_{i}' for i in range(len(names))) else names


def architecture(model: ViT) -> str:
  """Returns the name of the Hugging Face architecture that can hold a model.

  Raises:
    ValueError: no architecture can hold the model; the message lists the wrong attributes.
  """
  activations = tuple(dict.fromkeys(hf_names.ACTIVATIONS.values()))
  refuse('hf', model, hf_names.PLAIN | {'activation': activations})
  headed = model.num_classes is not None
  if model.layer_scale is not None:
    pools, prefixes = ('cls_gap',), ('cls',)
    kind = 'Dinov2WithRegisters' if model.num_registers else 'Dinov2'
  elif model.num_registers:
    pools, prefixes, kind = ('cls', 'distilled'), ('all',), 'DeiT'
    refuse(f'hf ({kind})', model, {'num_registers': (1,)})
  else:
    pools, prefixes, kind = ('cls',), ('cls', 'all'), 'ViT'
  if not headed:
    pools, suffix = (*pools, 'none'), 'Model'
  else:
    suffix = 'ForImageClassification' + 'WithTeacher' * (model.pool == 'distilled')
  refuse(f'hf ({kind})', model, {'pool': pools, 'position_prefix': prefixes, 'has_class': (True,)})
  if model.head_size * model.num_heads != model.width:
    refuse(f'hf ({kind})', model, {'head_dim': (None, model.width // model.num_heads)})
  return kind + suffix


def save_hf(
  model: ViT,
  params: dict,
  folder: pathlib.Path,
  preprocessing: Preprocessing,
  class_names: tuple[str, ...] | None,
) -> None:
  """Writes `model.safetensors`, `config.json` and `preprocessor_config.json`.

  Raises:
    ValueError: no Hugging Face architecture can hold the model.
  """
  if hf_towers.holds_tower(model):
    config, arrays = hf_towers.tower_contents(model, params, preprocessing.size)
  else:
    config, arrays = contents(model, params, preprocessing.size, class_names)
  processor = hf_processor.processor_config(preprocessing, config['num_channels'])
  save_file(arrays, folder / 'model.safetensors', metadata={'format': 'pt'})
  (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
  text = json.dumps(processor, indent=2) + '\n'
  (folder / 'preprocessor_config.json').write_text(text, encoding='utf-8')


def contents(
  model: ViT, params: dict, size: tuple[int, int], class_names: tuple[str, ...] | None
) -> tuple[dict, dict[str, np.ndarray]]:
  """Returns the config and the arrays of a file; `size` is the image size in pixels.

  Raises:
    ValueError: no Hugging Face architecture can hold the model.
  """
  name = architecture(model)
  kind, _, head = hf_names.ARCHITECTURES[name]
  prefix, body_rows, _ = hf_names.KINDS[kind]
  if head:
    body_rows = [(ours, f'{prefix}.{theirs}', layout) for ours, theirs, layout in body_rows]
  arrays = write_params(rows([*body_rows, *head], model.depth), params)
  same = model.patch_size[0] == model.patch_size[1]
  config = dict(
    architectures=[name],
    model_type=kind,
    hidden_size=model.width,
    num_hidden_layers=model.depth,
    num_attention_heads=model.num_heads,
    hidden_act=hf_names.activation_name(model.activation),
    layer_norm_eps=model.norm_epsilon,
    image_size=list(size),
    patch_size=model.patch_size[0] if same else list(model.patch_size),
    num_channels=params['embedding']['kernel'].shape[2],
    qkv_bias=model.qkv_bias,
  )
  if kind.startswith('dinov2'):
    ratio = model.mlp_dim / model.width
    config |= dict(mlp_ratio=int(ratio) if ratio.is_integer() else ratio)
    config |= dict(layerscale_value=model.layer_scale)
    if model.num_registers:
      config['num_register_tokens'] = model.num_registers
  else:
    config['intermediate_size'] = model.mlp_dim
  if head:
    names = class_names or [f'LABEL_{i}' for i in range(model.num_classes)]
    config['id2label'] = {str(i): name for i, name in enumerate(names)}
    config['label2id'] = {name: i for i, name in enumerate(names)}
  return config, arrays


def run_hf(loaded: Pretrained) -> str:
  """Returns Python code that loads the files with transformers and applies the model."""
  headed = loaded.model.num_classes is not None
  kind = 'AutoModelForImageClassification' if headed else 'AutoModel'
  features = 'pooler_output' if loaded.model.pool == 'map' else 'last_hidden_state'
  if loaded.model.projection is not None:
    kind, features = 'CLIPVisionModelWithProjection', 'image_embeds'
  show = f'print(model(**inputs).{features})'
  if headed:
    show = 'print(model.config.id2label[model(**inputs).logits.argmax().item()])'
  return f"""from PIL import Image, ImageOps
from transformers import AutoImageProcessor, {kind}

processor = AutoImageProcessor.from_pretrained('.')
model = {kind}.from_pretrained('.')
{upright(image_channels(loaded.params))}
inputs = processor(image, return_tensors='pt')
{show}"""
