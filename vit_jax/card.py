"""The model card beside an export: what the weights are, and how to run them.

The facts are those that the weights bring: of a run of ours its config and result, of published
ones little. What is not known is said to be unknown. The license is the person's to choose.
"""

from collections.abc import Sequence
import dataclasses
import pathlib

from vit_jax import vit, weights
from vit_jax.pretrained import Pretrained
from vit_jax.weights import Preprocessing

NAME = 'README.md'
SIGNATURE = 'Written by `python main.py --mode=export` of vit_jax.'
LIBRARIES = {'hf': 'transformers', 'timm': 'timm'}  # as the Hub names them
PROGRAMS = ('stablehlo', 'onnx')
SHOWN = 100  # classes, where another file has all of them


def write(format: str, loaded: Pretrained, source: str, result: dict | None = None) -> str:
  """The text of a card.

  Args:
    format: of the export, one of `pretrained.FORMATS`.
    loaded: the weights.
    source: where they were read.
    result: `result.json` of their run; None where there is none.
  """
  if format not in PROGRAMS:  # they bring a file to the model's size at once
    whole = dataclasses.replace(loaded.preprocessing, stored_size=None)
    loaded = dataclasses.replace(loaded, preprocessing=whole)
  count = sum(leaf.size for leaf in weights.flatten(loaded.params).values())
  about = {
    'architecture': architecture(loaded.model),
    'parameters': f'{count:,}',
    'images': images(loaded.preprocessing, weights.channels(loaded.params)),
    'pixels': pixels(loaded.preprocessing),
    **training(loaded, source),
    'accuracy': accuracy(loaded, result),
    'license': 'not chosen yet',
  }
  rows = '\n'.join(f'| {name} | {value} |' for name, value in about.items())
  front = front_matter(LIBRARIES[format], loaded.model) if format in LIBRARIES else ''
  return f"""{front}# Vision Transformer {name_of(loaded.model)}

| | |
| --- | --- |
{rows}

To run it, in this folder, on any `image.png`:

```python
{RUN[format](loaded)}
```

{classes(format, loaded)}

{SIGNATURE}
"""


def front_matter(library: str, model: vit.ViT) -> str:
  """What the Hub reads at the head of a card."""
  task = 'image-feature-extraction' if model.num_classes is None else 'image-classification'
  lines = [f'library_name: {library}', f'pipeline_tag: {task}', 'tags:']
  lines += ['- vision', '- vision-transformer']
  return '\n'.join(['---', *lines, '---', '', ''])


def name_of(model: vit.ViT) -> str:
  """`B/16` where the sizes are those of a variant, else the sizes."""
  p, q = model.patch_size
  patch = f'{p}' if p == q else f'{p}x{q}'
  for name, fields in vit.VARIANTS.items():
    own = {'resnet': None} | fields | {'patch_size': model.patch_size}
    if all(getattr(model, key) == value for key, value in own.items()):
      return f'{name}/{patch}'
  return f'{model.width}x{model.depth}/{patch}'


def architecture(model: vit.ViT) -> str:
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


def pixels(p: Preprocessing) -> str:
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


def accuracy(loaded: Pretrained, result: dict | None) -> str:
  """That of the run's result, if it is of these weights: the last or the best."""
  try:
    split, best = result['config']['data']['eval_split'], result.get('best', {})
    found = {best.get('step'): best.get('test_accuracy'), result['steps']: result['test_accuracy']}
    value = found[loaded.run['step']]
    return f'{value:.2%} of the {result["examples"]:,} images of `{split}`'
  except (AttributeError, TypeError, KeyError, ValueError):  # no result or no run, or a damaged one
    return 'unknown'


def classes(format: str, loaded: Pretrained) -> str:
  """The names of the outputs."""
  names = loaded.class_names
  if loaded.model.num_classes is None:
    return 'There is no head: it gives features.'
  if names is None:
    return f'{loaded.model.num_classes} classes, whose names are unknown.'
  shown = names if format == 'npz' else names[:SHOWN]
  rest = f', and {len(names) - SHOWN:,} more in the JSON beside' if len(names) > len(shown) else ''
  listed = ', '.join(f'{i} {name}' for i, name in enumerate(shown))
  return f'{len(names):,} classes: {listed}{rest}.'


# How to run an export of each format, as lines of Python that work within its folder.


def upright(channels: int) -> str:
  """`image`, a PIL image as people see it: a camera may say in EXIF which way it was held."""
  mode = 'L' if channels == 1 else 'RGB'
  return f"image = ImageOps.exif_transpose(Image.open('image.png')).convert('{mode}')"


def prepare(p: Preprocessing, channels: int, size: Sequence[int]) -> str:
  """`image`, upright and of the size wanted."""
  opened = upright(channels)
  method = f'Image.Resampling.{p.interpolation.upper()}'
  shape = f'({size[1]}, {size[0]}), {method}'
  if not p.stretch:
    bleed = f', bleed={(1 - p.crop) / 2:.6g}' if p.crop < 1 else ''
    return f'{opened}\nimage = ImageOps.fit(image, {shape}{bleed})'
  if p.crop == 1:
    return f'{opened}\nimage = image.resize({shape})'
  cut = f'w * {(1 - p.crop) / 2:.6g}, h * {(1 - p.crop) / 2:.6g}'
  end = f'w * {(1 + p.crop) / 2:.6g}, h * {(1 + p.crop) / 2:.6g}'
  return f'{opened}\nw, h = image.size\nimage = image.resize({shape}, ({cut}, {end}))'


def program(loaded: Pretrained, imports: str, read: str, call: str) -> str:
  """For `model.json` and a file of a program."""
  p, channels = loaded.preprocessing, weights.channels(loaded.params)
  axes = 'None, ..., None' if channels == 1 else 'None'
  lines = [
    imports,
    'from PIL import Image, ImageOps\n',
    read,
    prepare(p, channels, p.stored_size or p.size),
    call.replace('IMAGE', f'np.asarray(image)[{axes}]'),
  ]
  if loaded.class_names:
    names = "json.load(open('model.json'))['class_names']"
    return '\n'.join([*lines, f'print({names}[output.argmax()])'])
  return '\n'.join([*lines, 'print(output)'])


def run_stablehlo(loaded: Pretrained) -> str:
  """With JAX alone."""
  return program(
    loaded,
    'import json\n\nimport jax.export\nimport numpy as np',
    "model = jax.export.deserialize(open('model.stablehlo', 'rb').read())",
    'output = np.asarray(model.call(IMAGE))[0]',
  )


def run_onnx(loaded: Pretrained) -> str:
  """With onnxruntime."""
  return program(
    loaded,
    'import json\n\nimport numpy as np\nimport onnxruntime',
    "model = onnxruntime.InferenceSession('model.onnx')",
    "output = model.run(None, {'image': IMAGE})[0][0]",
  )


def run_hf(loaded: Pretrained) -> str:
  """With transformers."""
  headed = loaded.model.num_classes is not None
  kind = 'AutoModelForImageClassification' if headed else 'AutoModel'
  show = 'print(model.config.id2label[model(**inputs).logits.argmax().item()])'
  return f"""from PIL import Image, ImageOps
from transformers import AutoImageProcessor, {kind}

processor = AutoImageProcessor.from_pretrained('.')
model = {kind}.from_pretrained('.')
{upright(weights.channels(loaded.params))}
inputs = processor(image, return_tensors='pt')
{show if headed else 'print(model(**inputs).last_hidden_state)'}"""


def run_timm(loaded: Pretrained) -> str:
  """With timm."""
  show = 'print(output)'
  if loaded.class_names:
    show = "print(model.pretrained_cfg['label_names'][output.argmax()])"
  return f"""from PIL import Image, ImageOps
import timm

model = timm.create_model('local-dir:.', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
{upright(weights.channels(loaded.params))}
output = model(transform(image)[None])[0]
{show}"""


def run_npz(loaded: Pretrained) -> str:
  """With this package: the file has no place for what is done to an image."""
  p, channels = loaded.preprocessing, weights.channels(loaded.params)
  grid = tuple(n // q for n, q in zip(p.size, loaded.model.patch_size))
  axes = '[..., None]' if channels == 1 else ''
  mean, std = (repr(list(values)) for values in (p.mean, p.std))
  return f"""import numpy as np
from PIL import Image, ImageOps
import vit_jax

model, params = vit_jax.load('model.npz'{f', grid={grid}' if grid[0] != grid[1] else ''})
{prepare(p, channels, p.size)}
pixels = (np.asarray(image, np.float32){axes} / 255 - {mean}) / {std}
output = model.apply({{'params': params}}, pixels[None].astype(np.float32))[0]
print({'output.argmax()' if loaded.model.num_classes else 'output'})"""


RUN = {
  'hf': run_hf,
  'timm': run_timm,
  'npz': run_npz,
  'stablehlo': run_stablehlo,
  'onnx': run_onnx,
}
