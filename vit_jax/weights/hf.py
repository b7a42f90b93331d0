"""Reads and writes Hugging Face models: `model.safetensors` and `config.json`.

Decisions:
  * The models are ViT, DeiT, DINOv2 with and without registers, DINOv3, and the image towers of
    CLIP and SigLIP. `KINDS` has an entry for each `model_type`. A model consists of a body
    (embedding, encoder) and a top (e.g. a head).
  * DeiT's distillation token becomes our first register, with its own position embedding.
  * A config is refused if it has a field that is neither used nor known to have no effect. The
    error names the field. Private fields (`_x`), and fields that are None or False, are ignored.
"""

from collections.abc import Mapping
import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

from vit_jax.model import ViT
from vit_jax.names import check_positive, choose, pair
from vit_jax.weights import hf_config, hf_names, hf_towers
from vit_jax.weights.formats import (
  Preprocessing,
  Pretrained,
  Weights,
  refuse,
  write_params,
)
from vit_jax.weights.layouts import Row, add_prefix, check_depth, image_channels, rows
from vit_jax.weights.usage import label_lines, upright

KINDS = hf_names.VIT_KINDS | hf_towers.TOWER_KINDS
ARCHITECTURES = hf_names.VIT_ARCHITECTURES | hf_towers.TOWER_ARCHITECTURES
SEVERAL = 'multi_label_classification'  # the `problem_type` for several labels per image


def read_hf(folder: pathlib.Path, config: dict, arrays: Mapping[str, np.ndarray]) -> Weights:
  """Returns the weights of a folder with a Hugging Face `config.json`.

  Raises:
    ValueError: the model, or a field of the config, is not supported.
  """
  origin, model_type = f'{folder}/config.json', config.get('model_type')
  hf_towers.refuse_naflex(model_type, origin)
  kind = choose(f'{origin}: model_type', model_type, KINDS)
  architecture = (config.get('architectures') or [guess(model_type, arrays)])[0]
  own_type, pool, top = choose(f'{origin}: architecture', architecture, ARCHITECTURES)
  if own_type != model_type:
    raise ValueError(
      f'{origin}: model_type={model_type} does not fit the architecture {architecture}.'
    )
  c = hf_config.complete(config, kind, origin)
  patch, image = (pair(c[name], f'{origin}: {name}') for name in ('patch_size', 'image_size'))
  fields = dict(
    num_classes=None,
    patch_size=patch,
    width=c['hidden_size'],
    depth=c['num_hidden_layers'],
    num_heads=c['num_attention_heads'],
    pool=pool,
    activation=choose(f'{origin}: hidden_act', c['hidden_act'], hf_config.ACTIVATIONS),
    norm_epsilon=c['layer_norm_eps'],
  )
  fields |= kind.fields(c, origin) | top.fields(c)
  check_positive(f'{origin}: num_channels', c['num_channels'])
  check_depth(origin, fields['depth'], arrays)
  grid = image[0] // patch[0], image[1] // patch[1]
  size = grid[0] * patch[0], grid[1] * patch[1]
  prefixed = any(name.startswith(kind.prefix) for name in arrays)
  headed, labels = fields['num_classes'] is not None, c.get('id2label')
  return Weights(
    origin=str(folder),
    arrays=arrays,
    rows=hf_table(kind, fields.get('mlp', 'plain'), top, fields['depth'], prefixed),
    fields=fields,
    channels=c['num_channels'],
    preprocessing=hf_config.preprocessing(folder, size, patch, kind),
    grid=grid,
    class_names=class_names(labels, origin) if headed and labels else None,
    ignored=kind.ignored,
    multi_label=headed and c.get('problem_type') == SEVERAL,
  )


def guess(model_type: str, arrays: Mapping[str, np.ndarray]) -> str:
  """Finds the architecture from the names of arrays, for a config without `architectures`."""
  found = {name: top for name, (own, _, top) in ARCHITECTURES.items() if own == model_type}
  for name, top in found.items():
    if any(theirs in arrays for row in rows(top.rows, 1) for theirs in row.theirs):
      return name
  return [*found][-1]


def hf_table(
  kind: hf_config.Kind, mlp: str, top: hf_config.Top, depth: int, prefixed: bool
) -> list[Row]:
  """Returns the name table (`layouts.py`) of a whole file.

  Args:
    kind: entry of `KINDS` for the body.
    mlp: kind of MLP in the blocks, the value of `ViT.mlp`.
    top: the layers after the body, such as a head.
    depth: number of blocks.
    prefixed: whether the names of the body's arrays in the file begin with `kind.prefix`.
  """
  prefix = kind.prefix * prefixed
  body = [(ours, add_prefix(prefix, theirs), layout) for ours, theirs, layout in kind.rows[mlp]]
  return rows([*body, *top.rows], depth)


def class_names(labels: Mapping, origin: str) -> tuple[str, ...] | None:
  """Returns the class names in `id2label`, ordered by id; None for the default names `LABEL_<i>`.

  Raises:
    ValueError: the ids are not 0, 1, 2, ...
  """
  ids = [str(i) for i in range(len(labels))]
  if set(labels) != set(ids):
    raise ValueError(f'{origin}: id2label: expected the ids 0 to {len(ids) - 1}.')
  names = tuple(str(labels[key]) for key in ids)
  return None if names == tuple(f'LABEL_{i}' for i in range(len(names))) else names


def architecture(model: ViT) -> str:
  """Returns the name of the Hugging Face architecture that can hold a model.

  Raises:
    ValueError: no architecture can hold the model; the message lists the unsuitable attributes.
  """
  family = hf_towers.tower_family(model)
  if family is None:
    if model.position == 'rope_unit':
      family = 'DINOv3ViT'
    elif model.layer_scale is not None:
      family = 'Dinov2WithRegisters' if model.num_registers else 'Dinov2'
    else:
      family = 'DeiT' if model.num_registers else 'ViT'
  kind = KINDS[ARCHITECTURES[f'{family}Model'][0]]
  holds = hf_config.HOLDS | kind.holds | {'mlp': tuple(kind.rows)}
  suffix = 'ForImageClassification' + 'WithTeacher' * (model.pool == 'distilled')
  if model.num_classes is None:
    suffix = 'Model' + 'WithProjection' * (model.projection is not None)
    holds['pool'] += ('none',) * (suffix == 'Model')
  if model.head_size * model.num_heads != model.width:
    holds['head_dim'] = (None, model.width // model.num_heads)
  refuse(f'hf ({family})', model, {name: x for name, x in holds.items() if x is not None})
  return family + suffix


def save_hf(
  model: ViT,
  params: dict,
  folder: pathlib.Path,
  preprocessing: Preprocessing,
  class_names: tuple[str, ...] | None,
  multi_label: bool,
) -> None:
  """Writes `model.safetensors`, `config.json` and `preprocessor_config.json` into a folder.

  All arguments except `folder` are attributes of `Pretrained`.

  Raises:
    ValueError: no Hugging Face architecture can hold the model.
  """
  name, size, patch = architecture(model), preprocessing.size, model.patch_size
  model_type, _, top = ARCHITECTURES[name]
  kind = KINDS[model_type]
  if kind.square and (size[0] != size[1] or patch[0] != patch[1]):
    raise ValueError(
      f'The format hf ({name}) cannot hold this model:\n  images of {size[0]}x{size[1]} pixels, '
      f'patches of {patch[0]}x{patch[1]}: both must be square'
    )
  prefixed = bool(top.rows) or not kind.bare
  arrays = write_params(hf_table(kind, model.mlp, top, model.depth, prefixed), params)
  config = dict(
    architectures=[name],
    model_type=model_type,
    hidden_size=model.width,
    num_hidden_layers=model.depth,
    num_attention_heads=model.num_heads,
    hidden_act=hf_config.activation_name(model.activation),
    layer_norm_eps=model.norm_epsilon,
    image_size=size[0] if size[0] == size[1] else list(size),
    patch_size=patch[0] if patch[0] == patch[1] else list(patch),
    num_channels=params['embedding']['kernel'].shape[2],
  ) | kind.config(model)
  if model.num_classes is not None:
    names = class_names or [f'LABEL_{i}' for i in range(model.num_classes)]
    config['id2label'] = {str(i): name for i, name in enumerate(names)}
    config['label2id'] = {name: i for i, name in enumerate(names)}
  if multi_label:
    config['problem_type'] = SEVERAL
  processor = hf_config.processor_config(preprocessing, config['num_channels'])
  save_file(arrays, folder / 'model.safetensors', metadata={'format': 'pt'})
  (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
  text = json.dumps(processor, indent=2) + '\n'
  (folder / 'preprocessor_config.json').write_text(text, encoding='utf-8')


def run_hf(loaded: Pretrained) -> str:
  """Returns Python code that loads the files with transformers and applies the model."""
  headed = loaded.model.num_classes is not None
  kind = 'AutoModelForImageClassification' if headed else 'AutoModel'
  # In CLIP, the last LayerNorm is applied only to the pooled token.
  pooled = loaded.model.pool == 'map' or (loaded.model.pre_norm and loaded.model.pool == 'cls')
  features = 'pooler_output' if pooled else 'last_hidden_state'
  if loaded.model.projection is not None:
    kind, features = 'CLIPVisionModelWithProjection', 'image_embeds'
  show = f'print(model(**inputs).{features})'
  if headed:
    show = 'print(model.config.id2label[model(**inputs).logits.argmax().item()])'
  if loaded.multi_label:
    show = f"""logits = model(**inputs).logits[0]
{label_lines(loaded)}
for i in labels:
  print(model.config.id2label[i])"""
  torch = 'import torch\n' if loaded.multi_label else ''
  return f"""from PIL import Image, ImageOps
{torch}from transformers import AutoImageProcessor, {kind}

processor = AutoImageProcessor.from_pretrained('.')
model = {kind}.from_pretrained('.')
{upright(image_channels(loaded.params))}
inputs = processor(image, return_tensors='pt')
{show}"""
