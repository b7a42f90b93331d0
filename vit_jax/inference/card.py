"""The model card beside an export: what the weights are, and how to run them.

The facts are those that the weights bring: of a run of ours its config and result, of published
ones little. What is not known is said to be unknown. The license is the person's to choose.
"""

import dataclasses
import pathlib

from vit_jax.model import VARIANTS, ViT
from vit_jax.weights import (
  FORMATS,
  Format,
  Preprocessing,
  Pretrained,
  flatten_params,
  image_channels,
)

NAME = 'README.md'
SIGNATURE = 'Written by `python main.py --mode=export` of vit_jax.'
SHOWN = 100  # classes, where another file has all of them


def write_card(format: str, loaded: Pretrained, source: str, result: dict | None = None) -> str:
  """The text of a card.

  Args:
    format: of the export, one of `FORMATS`.
    loaded: the weights.
    source: where they were read.
    result: `result.json` of their run; None where there is none.
  """
  entry = FORMATS[format]
  if not entry.enlarges:  # they bring a file to the model's size at once
    whole = dataclasses.replace(loaded.preprocessing, stored_size=None)
    loaded = dataclasses.replace(loaded, preprocessing=whole)
  count = sum(leaf.size for leaf in flatten_params(loaded.params).values())
  about = {
    'architecture': architecture_text(loaded.model),
    'parameters': f'{count:,}',
    'images': images(loaded.preprocessing, image_channels(loaded.params)),
    'pixels': pixels_text(loaded.preprocessing),
    **training(loaded, source),
    'accuracy': accuracy_text(loaded, result),
    'license': 'not chosen yet',
  }
  rows = '\n'.join(f'| {name} | {value} |' for name, value in about.items())
  front = front_matter(entry.library, loaded.model) if entry.library else ''
  return f"""{front}# Vision Transformer {name_of(loaded.model)}

| | |
| --- | --- |
{rows}

To run it, in this folder, on any `image.png`:

```python
{entry.usage(loaded)}
```

{classes(entry, loaded)}

{SIGNATURE}
"""


def front_matter(library: str, model: ViT) -> str:
  """What the Hub reads at the head of a card."""
  task = 'image-feature-extraction' if model.num_classes is None else 'image-classification'
  lines = [f'library_name: {library}', f'pipeline_tag: {task}', 'tags:']
  lines += ['- vision', '- vision-transformer']
  return '\n'.join(['---', *lines, '---', '', ''])


def name_of(model: ViT) -> str:
  """`B/16` where the sizes are those of a variant, else the sizes."""
  p, q = model.patch_size
  patch = f'{p}' if p == q else f'{p}x{q}'
  for name, fields in VARIANTS.items():
    own = {'resnet': None} | fields | {'patch_size': model.patch_size}
    if all(getattr(model, key) == value for key, value in own.items()):
      return f'{name}/{patch}'
  return f'{model.width}x{model.depth}/{patch}'


def architecture_text(model: ViT) -> str:
  """The sizes and choices in words."""
  parts = [
    f'width {model.width}, {model.depth} blocks, {model.num_heads} heads of {model.head_size}, '
    f'MLP {model.mlp_dim}, patches {model.patch_size[0]}x{model.patch_size[1]}',
    f'pool `{model.pool}`, positions `{model.position}`, activation `{model.activation}`',
  ]
  if model.num_registers:
    parts.append(f'{model.num_registers} registers')
  if model.resnet is not None:
    parts.append(f'ResNet stem {model.resnet}')
  return '; '.join(parts)


def images(p: Preprocessing, channels: int) -> str:
  """Which images the model takes, and how a file becomes one."""
  height, width = p.size
  small = f'{p.stored_size[0]}x{p.stored_size[1]}, enlarged to ' if p.stored_size else ''
  cut = 'stretched' if p.stretch else 'cut about the centre'
  part = f' of {p.crop:.4g} of the shorter side' if p.crop < 1 else ''
  kind = 'grey' if channels == 1 else 'RGB'
  return f'{small}{height}x{width} pixels, {kind}; files are {cut}{part}, {p.interpolation}'


def pixels_text(p: Preprocessing) -> str:
  """What is done to the numbers of an image."""
  mean, std = (', '.join(f'{x:.6g}' for x in values) for values in (p.mean, p.std))
  return f'divided by 255, less {mean}, divided by {std}'


def training(loaded: Pretrained, source: str) -> dict[str, str]:
  """What the weights were trained on and from."""
  if loaded.run is None:
    return {'trained on': 'unknown to this file', 'weights': f'those of `{public(source)}`'}
  config, task = loaded.run['config'], loaded.run['task']
  kind, colon, name = config['data']['source'].partition(':')
  part = ', the head alone' if config['freeze'] else ''
  return {
    'trained on': f'`{kind}{colon}{public(name)}`, split `{config["data"]["train_split"]}`: '
    f'{task["train_examples"]:,} images',
    'for': f'{config["epochs"]:g} epochs asked for, in batches of {config["batch_size"]}; these '
    f'weights are of step {loaded.run["step"]:,}{part}',
    'from': f'the weights `{public(config["init"])}`' if config['init'] else 'random weights',
  }


def public(path: str) -> str:
  """The name of a file or folder; where it lies on this machine is nobody's business."""
  place = pathlib.PurePath(path)
  return place.name if place.is_absolute() or path.startswith('~') else path


def accuracy_text(loaded: Pretrained, result: dict | None) -> str:
  """That of the run's result, if it is of these weights: the last or the best."""
  try:
    split, best = result['config']['data']['eval_split'], result.get('best', {})
    found = {best.get('step'): best.get('test_accuracy'), result['steps']: result['test_accuracy']}
    value = found[loaded.run['step']]
    return f'{value:.2%} of the {result["examples"]:,} images of `{split}`'
  except (AttributeError, TypeError, KeyError, ValueError):  # no result or no run, or a damaged one
    return 'unknown'


def classes(entry: Format, loaded: Pretrained) -> str:
  """The names of the outputs."""
  names = loaded.class_names
  if loaded.model.num_classes is None:
    return 'There is no head: it gives features.'
  if names is None:
    return f'{loaded.model.num_classes} classes, whose names are unknown.'
  shown = names[:SHOWN] if entry.holds_names else names
  rest = f', and {len(names) - SHOWN:,} more in the JSON beside' if len(names) > len(shown) else ''
  listed = ', '.join(f'{i} {name}' for i, name in enumerate(shown))
  return f'{len(names):,} classes: {listed}{rest}.'
