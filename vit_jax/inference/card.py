"""Writes the model card of an export: a README.md that describes the weights and how to run them.

Decisions:
  * The card states only facts that are stored with the weights or measured by the export. All other
    facts are `unknown`. A run stores its config and its result; published weights store much less.
  * The card does not choose a license; the user does.
"""

from collections.abc import Mapping
import dataclasses
import pathlib

from vit_jax.inference.measuring import Comparison
from vit_jax.model import VARIANTS, ViT
from vit_jax.names import one_line
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
SHOWN = 100  # maximum number of thresholds; also of class names, if a JSON file lists all names


def write_card(
  format: str,
  loaded: Pretrained,
  source: str,
  result: dict | None = None,
  compared: Comparison | None = None,
) -> str:
  """Returns the text of a model card.

  Args:
    format: format of the export, one of `FORMATS`.
    loaded: the exported weights.
    source: path or name that the weights were read from.
    result: contents of the run's `result.json`; None if the file does not exist.
    compared: measurements of the exported program, and of the same program in float32. None if the
      export itself is in float32.
  """
  entry = FORMATS[format]
  if not entry.is_program:  # users of weights resize images directly to the input size
    whole = dataclasses.replace(loaded.preprocessing, stored_size=None)
    loaded = dataclasses.replace(loaded, preprocessing=whole)
  count = sum(leaf.size for leaf in flatten_params(loaded.params).values())
  about = {
    'architecture': architecture_text(loaded.model),
    'parameters': f'{count:,}',
    'images': images(loaded.preprocessing, image_channels(loaded.params)),
    'pixels': pixels_text(loaded.preprocessing),
    **training(loaded, source),
    'precision': precision_text(compared),
    quality_name(loaded): measured_text(compared) or accuracy_text(loaded, result),
    **calibration(entry, loaded),
    'license': 'not chosen yet',
  }
  rows = '\n'.join(f'| {name} | {value} |' for name, value in about.items())
  front = front_matter(entry.library, loaded.model) if entry.library else ''
  return f"""{front}# Vision Transformer {name_of(loaded.model)}

| | |
| --- | --- |
{rows}
{comparison(compared, loaded)}
To run the model on an `image.png` in this folder:

```python
{entry.usage(loaded)}
```

{classes(entry, loaded)}

{SIGNATURE}
"""


def front_matter(library: str, model: ViT) -> str:
  """Returns the YAML header of a model card, which the Hugging Face Hub reads.

  `library` is the name of the library that can load the weights, e.g. `timm`.
  """
  task = 'image-feature-extraction' if model.num_classes is None else 'image-classification'
  lines = [f'library_name: {library}', f'pipeline_tag: {task}', 'tags:']
  lines += ['- vision', '- vision-transformer']
  return '\n'.join(['---', *lines, '---', '', ''])


def name_of(model: ViT) -> str:
  """Returns a short name of a model: its variant and patch size, e.g. `B/16`.

  If the model is not one of `VARIANTS`, width and depth replace the variant's name: `64x6/8` has
  width 64, depth 6 and patch size 8.
  """
  p, q = model.patch_size
  patch = f'{p}' if p == q else f'{p}x{q}'
  for name, fields in VARIANTS.items():
    own = {'resnet': None, 'mlp': 'plain'} | fields | {'patch_size': model.patch_size}
    if all(getattr(model, key) == value for key, value in own.items()):
      return f'{name}/{patch}'
  return f'{model.width}x{model.depth}/{patch}'


def architecture_text(model: ViT) -> str:
  """Describes the sizes and the architecture of a model in words."""
  parts = [
    f'width {model.width}, {model.depth} blocks, {model.num_heads} heads of width '
    f'{model.head_size}, MLP width {model.mlp_dim}, '
    f'patch size {model.patch_size[0]}x{model.patch_size[1]}',
    f'pool `{model.pool}`, positions `{model.position}`, activation `{model.activation}`',
  ]
  if model.mlp != 'plain':
    parts.append(f'MLP `{model.mlp}`')
  if model.num_registers:
    parts.append(f'{model.num_registers} registers')
  if model.resnet is not None:
    parts.append(f'ResNet stem {model.resnet}')
  return '; '.join(parts)


def images(p: Preprocessing, channels: int) -> str:
  """Describes size and channels of a model's input, and how to resize image files."""
  height, width = p.size
  small = f'{p.stored_size[0]}x{p.stored_size[1]}, enlarged to ' if p.stored_size else ''
  fitted, side = ('stretched', 'each side') if p.stretch else ('cropped', 'the shorter side')
  part = f', keeping the central {p.crop:.4g} of {side}' if p.crop < 1 else ''
  kind = 'grey' if channels == 1 else 'RGB'
  return (
    f'{small}{height}x{width} pixels, {kind}; files are {fitted} to fit{part}, with '
    f'{p.interpolation} interpolation'
  )


def pixels_text(p: Preprocessing) -> str:
  """Describes how pixel values must be normalised, from the mean and std of the preprocessing."""
  mean, std = (', '.join(f'{x:.6g}' for x in values) for values in (p.mean, p.std))
  return f'divided by 255, then mean {mean} subtracted, then divided by std {std}'


def training(loaded: Pretrained, source: str) -> dict[str, str]:
  """Describes how weights were trained: on which data, how long, and from which initial weights.

  Args:
    loaded: the weights. Weights from a run of vit_jax contain the config of the run.
    source: path or name that the weights were read from.

  Returns:
    `{name: text}`, rows of the card's table.
  """
  if loaded.run is None:
    return {'trained on': 'unknown', 'weights': f'read from `{public(source)}`'}
  config, task = loaded.run['config'], loaded.run['task']
  part = '; only the head was trained' if config['freeze'] else ''
  if config.get('adapt'):  # missing in runs of older versions
    part = f'; only the head and an adapter ({config["adapt"]}) were trained'
  return {
    'trained on': source_text(config, task['train_examples']),
    'trained for': 'no steps: the head was computed from the features of these images '
    f'({config["classifier"]})'
    if config.get('classifier')
    else f'{config["epochs"]:g} epochs planned, with batch size '
    f'{config["batch_size"]}; these weights are from step {loaded.run["step"]:,}{part}',
    'initialised from': f'the weights `{public(config["init"])}`'
    if config['init']
    else 'random weights',
  }


def source_text(config: Mapping, count: int) -> str:
  """Describes training data: the dataset, the split or splits, and the number of images."""
  data = config['data']
  kind, colon, name = data['source'].partition(':')
  split = f'split `{data["train_split"]}`'
  if config.get('sweep'):  # the final head is also trained on the validation images
    split = f'splits `{data["train_split"]}` and `{data["val_split"]}`'
  return f'`{kind}{colon}{public(name)}`, {split}: {count:,} images'


def public(path: str) -> str:
  """Shortens an absolute or `~` path to its last part, so that a card shows no local folders."""
  place = pathlib.PurePath(path)
  return one_line(place.name if place.is_absolute() or path.startswith('~') else path)


def quality_name(loaded: Pretrained) -> str:
  """Returns `mean average precision` if images can have several labels, else `accuracy`."""
  return 'mean average precision' if loaded.multi_label else 'accuracy'


def accuracy_text(loaded: Pretrained, result: dict | None) -> str:
  """Returns the test accuracy of the weights as text, or their mean average precision.

  The text is `unknown` if there is no result, or if the result belongs to a different checkpoint.

  Args:
    loaded: the weights.
    result: contents of the run's `result.json`; None if the file does not exist.
  """
  name = f'test_{quality_name(loaded).replace(" ", "_")}'
  try:
    split, best = result['config']['data']['eval_split'], result.get('best', {})
    found = {best.get('step'): best.get(name), result['steps']: result[name]}
    value = found[loaded.run['step']]
    return f'{value:.2%} on the {result["examples"]:,} images of `{split}`'
  except (AttributeError, TypeError, KeyError, ValueError):  # result or run is missing or damaged
    return 'unknown'


def precision_text(compared: Comparison | None) -> str:
  """Returns the precision of the exported files as text, e.g. `int8`.

  If the precision needs sample images, the text also gives the number of these images. `compared`
  is None for an export in float32.
  """
  if compared is None:
    return 'float32'
  on = f', calibrated on {compared.calibrated:,} images' if compared.calibrated else ''
  return f'{list(compared.found)[-1]}{on}'


def measured_text(compared: Comparison | None) -> str:
  """Returns the measured accuracy of the exported program, or its mean average precision, as text.

  The text is empty if the export is in float32, because nothing was measured (`compared` is None).
  """
  if compared is None:
    return ''
  value = list(compared.found.values())[-1].quality
  return 'unknown' if value is None else f'{value:.2%} on the {compared.test}'


def comparison(compared: Comparison | None, loaded: Pretrained) -> str:
  """Returns a Markdown table of size, latency and accuracy of a program in several precisions.

  The text is empty if the export is in float32, because nothing was measured (`compared` is None).
  """
  if compared is None:
    return ''
  known = all(one.quality is not None for one in compared.found.values())
  name = quality_name(loaded)
  title = f'{name} on the {compared.test}' if known else f'{name}: not measured'
  lines = [
    f'| precision | size | latency | {title} |\n| --- | --- | --- | --- |',
    *(
      f'| {precision} | {one.size / 1e6:,.2f} MB | {1000 * one.seconds:.3g} ms | '
      f'{f"{one.quality:.2%}" if known else "unknown"} |'
      for precision, one in compared.found.items()
    ),
  ]
  text = '\n'.join(lines)
  return (
    f'\n{text}\n\nThe latency is the median time for one image. It was measured on '
    f'{compared.machine}.\n'
  )


def calibration(entry: Format, loaded: Pretrained) -> dict[str, str]:
  """Describes how to compute probabilities or labels from logits, as `{name: text}`.

  The dict is empty if the probabilities are the softmax of the logits without a temperature.
  """
  found = loaded.calibration
  if found.sigmoid:
    return {'probabilities': 'the sigmoid of each logit; probabilities do not add up to 1'}
  use = 'an image has a class if the sigmoid of the class logit reaches the class threshold'
  if loaded.multi_label and not found.examples:
    return {'thresholds': f'0.5 for each class, not fitted; {use}'}
  if not found.examples:
    return {}
  if found.thresholds:
    shown = ', '.join(f'{value:.3g}' for value in found.thresholds[:SHOWN])
    rest = ', ...' if len(found.thresholds) > SHOWN else ''
    return {
      'thresholds': f'{shown}{rest}, in the order of the classes, fitted on {found.examples:,} '
      f'validation images; {use}'
    }
  use = 'divide the logits by this value before softmax to get calibrated probabilities'
  if entry.is_program:
    use = 'already applied: the softmax of the output gives calibrated probabilities'
  fitted = f'fitted on {found.examples:,} validation images'
  return {'temperature': f'{found.temperature:.6g}, {fitted}; {use}'}


def classes(entry: Format, loaded: Pretrained) -> str:
  """Describes the model's outputs: features, or classes with their names."""
  names = loaded.class_names
  if loaded.model.num_classes is None:
    return 'The model has no head: it returns features.'
  if names is None:
    return f'{loaded.model.num_classes} classes; their names are unknown.'
  shown = names[:SHOWN] if entry.holds_names else names
  rest = f', and {len(names) - SHOWN:,} more in the JSON file' if len(names) > len(shown) else ''
  listed = ', '.join(f'{i} {one_line(name)}' for i, name in enumerate(shown))
  return f'{len(names):,} classes: {listed}{rest}.'
