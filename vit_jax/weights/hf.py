"""Reads and writes Hugging Face models: `model.safetensors` and `config.json`.

Decisions:
  * The models are ViT, DeiT, DINOv2 with and without registers, and DINOv3.
  * DeiT's distillation token becomes our first register, with its own position embedding.
  * Every field of a config is either used, or known not to affect the output, or refused by name.
"""

from collections.abc import Mapping
import dataclasses
import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

from vit_jax.model import ViT
from vit_jax.names import choose, pair
from vit_jax.weights import hf_dino, hf_names
from vit_jax.weights.formats import (
  ODD,
  Preprocessing,
  Pretrained,
  Weights,
  load_json,
  refuse,
  upright,
  write_params,
)
from vit_jax.weights.layouts import Row, add_prefix, image_channels, rows

KINDS = hf_names.KINDS | hf_dino.DINO_KINDS
ARCHITECTURES = hf_names.ARCHITECTURES | hf_dino.DINO_ARCHITECTURES


def read_hf(folder: pathlib.Path, config: dict, arrays: Mapping[str, np.ndarray]) -> Weights:
  """Returns the weights of a folder with a Hugging Face `config.json`.

  Raises:
    ValueError: the model, or a field of the config, is not supported.
  """
  origin = str(folder)
  choose(f'{origin}: model_type', config.get('model_type'), KINDS)
  architecture = (config.get('architectures') or [guess(config['model_type'], arrays)])[0]
  name, pool, head = choose(f'{origin}: architecture', architecture, ARCHITECTURES)
  if name != config['model_type']:
    raise ValueError(
      f'{origin}/config.json: model_type={config["model_type"]} does not fit the architecture '
      f'{architecture}.'
    )
  kind = KINDS[name]
  c = hf_names.complete(config, kind, f'{origin}/config.json')
  patch, image = (
    pair(c[name], f'{origin}/config.json: {name}') for name in ('patch_size', 'image_size')
  )
  fields = dict(
    num_classes=None,
    patch_size=patch,
    width=c['hidden_size'],
    depth=c['num_hidden_layers'],
    num_heads=c['num_attention_heads'],
    pool=pool,
    activation=choose(f'{origin}/config.json: hidden_act', c['hidden_act'], hf_names.ACTIVATIONS),
    norm_epsilon=c['layer_norm_eps'],
  ) | kind.fields(c, f'{origin}/config.json')
  labels = c.get('id2label')
  if head:
    fields['num_classes'] = len(labels) if labels else c.get('num_labels', 2)
  grid = image[0] // patch[0], image[1] // patch[1]
  return Weights(
    origin=origin,
    arrays=arrays,
    rows=hf_table(kind, fields.get('mlp', 'plain'), head, fields['depth']),
    fields=fields,
    channels=c['num_channels'],
    preprocessing=preprocessing(folder, kind, (grid[0] * patch[0], grid[1] * patch[1]), patch),
    grid=grid,
    class_names=class_names(labels, origin) if head and labels else None,
    ignored=hf_names.IGNORED,
  )


def guess(kind: str, arrays: Mapping[str, np.ndarray]) -> str:
  """Returns the architecture of a model whose config does not name its architecture."""
  headed = 'classifier.weight' in arrays
  found = [name for name, entry in ARCHITECTURES.items() if entry[0] == kind]
  return next((name for name in found if bool(ARCHITECTURES[name][2]) == headed), found[0])


def hf_table(kind: hf_names.Kind, mlp: str, head: list[tuple], depth: int) -> list[Row]:
  """Returns the name table of a whole file, given the kind of MLP and the rows of the head."""
  prefix = f'{kind.prefix}.' if head else ''
  body = [(ours, add_prefix(prefix, theirs), layout) for ours, theirs, layout in kind.rows[mlp]]
  return rows([*body, *head], depth)


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


def preprocessing(
  folder: pathlib.Path, kind: hf_names.Kind, size: tuple[int, int], patch: tuple[int, int]
) -> Preprocessing:
  """Reads `preprocessor_config.json`; without the file, returns the default of the model kind.

  The file's image size is used if it is a multiple of the patch size. This size can differ from
  the one that the position embeddings are for. For example, DINOv2 has positions for 518 pixels,
  but expects images of 224 pixels.
  """
  path = folder / 'preprocessor_config.json'
  if not path.is_file():
    return Preprocessing(size, **kind.prepared)
  p = load_json(path)
  try:
    found = processing(p, size, str(path))
  except ODD as error:
    raise ValueError(f'{path}: unexpected value ({error!r}).') from error
  fits = all(n % d == 0 for n, d in zip(found.size, patch))
  return found if fits else dataclasses.replace(found, size=size)


def processing(p: dict, size: tuple[int, int], origin: str) -> Preprocessing:
  """Converts the config of an image processor; without a height and width, `size` is used.

  Raises:
    ValueError: the processor does not scale pixels to [0, 1].
  """
  if not p.get('do_rescale', True) or not np.isclose(p.get('rescale_factor', 1 / 255), 1 / 255):
    raise ValueError(f'{origin}: pixels must be scaled by rescale_factor=1/255.')
  normal = p.get('do_normalize', True)
  resized, cropped = p.get('size', 224), p.get('crop_size')
  stretch = not isinstance(resized, dict) or 'shortest_edge' not in resized
  crop = 1.0
  if cropped is not None and p.get('do_center_crop', True):
    crop = min(edge(cropped) / edge(resized), 1.0)
    size = both(cropped)
  elif stretch and 'size' in p:
    size = both(resized)
  return Preprocessing(
    size,
    tuple(p['image_mean']) if normal else (0.0,),
    tuple(p['image_std']) if normal else (1.0,),
    choose(f'{origin}: resample', p.get('resample', 2), hf_names.RESAMPLING),
    crop,
    stretch,
  )


def edge(size) -> int:
  """Returns the shorter side, in pixels, of a `size` in the config of an image processor."""
  if isinstance(size, dict):
    return size.get('shortest_edge') or min(size['height'], size['width'])
  return size if isinstance(size, int) else min(size)


def both(size) -> tuple[int, int]:
  """Returns a `size` in the config of an image processor as (height, width)."""
  return (size['height'], size['width']) if isinstance(size, dict) else pair(size)


def architecture(model: ViT) -> str:
  """Returns the name of the Hugging Face architecture that can hold a model.

  Raises:
    ValueError: no architecture can hold the model; the message lists the wrong attributes.
  """
  refuse('hf', model, hf_names.COMMON_HOLDS)
  if model.position == 'rope_unit':
    family = 'DINOv3ViT'
  elif model.layer_scale is not None:
    family = 'Dinov2WithRegisters' if model.num_registers else 'Dinov2'
  else:
    family = 'DeiT' if model.num_registers else 'ViT'
  suffix = 'ForImageClassification' + 'WithTeacher' * (model.pool == 'distilled')
  kind = KINDS[ARCHITECTURES[f'{family}Model'][0]]
  holds = kind.holds | {'mlp': tuple(kind.rows)}
  if model.num_classes is None:
    suffix, holds['pool'] = 'Model', (*holds['pool'], 'none')
  refuse(f'hf ({family})', model, holds)
  if model.head_size * model.num_heads != model.width:
    refuse(f'hf ({family})', model, {'head_dim': (None, model.width // model.num_heads)})
  return family + suffix


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
  name = architecture(model)
  model_type, _, head = ARCHITECTURES[name]
  kind = KINDS[model_type]
  arrays = write_params(hf_table(kind, model.mlp, head, model.depth), params)
  same = model.patch_size[0] == model.patch_size[1]
  config = dict(
    architectures=[name],
    model_type=model_type,
    hidden_size=model.width,
    num_hidden_layers=model.depth,
    num_attention_heads=model.num_heads,
    hidden_act=next(
      theirs for theirs, ours in hf_names.ACTIVATIONS.items() if ours == model.activation
    ),
    layer_norm_eps=model.norm_epsilon,
    image_size=list(preprocessing.size),
    patch_size=model.patch_size[0] if same else list(model.patch_size),
    num_channels=params['embedding']['kernel'].shape[2],
  ) | kind.config(model)
  if head:
    names = class_names or [f'LABEL_{i}' for i in range(model.num_classes)]
    config['id2label'] = {str(i): name for i, name in enumerate(names)}
    config['label2id'] = {name: i for i, name in enumerate(names)}
  processor = processor_config(preprocessing, config['num_channels'])
  save_file(arrays, folder / 'model.safetensors', metadata={'format': 'pt'})
  (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
  text = json.dumps(processor, indent=2) + '\n'
  (folder / 'preprocessor_config.json').write_text(text, encoding='utf-8')


def processor_config(p: Preprocessing, channels: int) -> dict:
  """Returns the contents of the `preprocessor_config.json` that describes a preprocessing.

  Raises:
    ValueError: no image processor of Hugging Face can do this preprocessing.
  """
  height, width = p.size
  if height != width and not p.stretch:
    raise ValueError(
      'hf: Hugging Face image processors can only crop squares, but the images are '
      f'{height}x{width}. Save with a preprocessing that has stretch=True, or use format timm.'
    )
  resized = {'height': round(height / p.crop), 'width': round(width / p.crop)}
  config = dict(
    image_processor_type='ViTImageProcessor',
    do_resize=True,
    do_rescale=True,
    rescale_factor=1 / 255,
    do_normalize=True,
    image_mean=list(p.mean) * (channels if len(p.mean) == 1 else 1),
    image_std=list(p.std) * (channels if len(p.std) == 1 else 1),
    resample=next(
      number for number, name in hf_names.RESAMPLING.items() if name == p.interpolation
    ),
    size=resized,
  )
  if not p.stretch or p.crop < 1:  # crop after resizing
    config |= dict(
      image_processor_type='BitImageProcessor',
      do_center_crop=True,
      crop_size={'height': height, 'width': width},
      size=resized if p.stretch else {'shortest_edge': min(resized.values())},
    )
  return config


def run_hf(loaded: Pretrained) -> str:
  """Returns Python code that loads the files with transformers and applies the model."""
  headed = loaded.model.num_classes is not None
  kind = 'AutoModelForImageClassification' if headed else 'AutoModel'
  show = 'print(model.config.id2label[model(**inputs).logits.argmax().item()])'
  return f"""from PIL import Image, ImageOps
from transformers import AutoImageProcessor, {kind}

processor = AutoImageProcessor.from_pretrained('.')
model = {kind}.from_pretrained('.')
{upright(image_channels(loaded.params))}
inputs = processor(image, return_tensors='pt')
{show if headed else 'print(model(**inputs).last_hidden_state)'}"""
