"""Reads and writes the configs of Hugging Face's image processors.

Decisions:
  * `processor_config.json` comes first, as in transformers. Since version 5, a processor of images
    and texts stores the image processor only there.
"""

import dataclasses
import pathlib

import numpy as np

from vit_jax.names import choose, pair
from vit_jax.weights.formats import ODD, Preprocessing, load_json

RESAMPLING = {0: 'nearest', 1: 'lanczos', 2: 'bilinear', 3: 'bicubic', 4: 'box', 5: 'hamming'}


def preprocessing(
  folder: pathlib.Path,
  size: tuple[int, int],
  patch: tuple[int, int],
  prepared: dict,
  missing: dict | None = None,
) -> Preprocessing:
  """Reads the config of the image processor in a folder.

  The file's image size is used if it is a multiple of the patch size. This size can differ from
  the one that the position embeddings are for. For example, DINOv2 has positions for 518 pixels,
  but expects images of 224 pixels.

  Args:
    folder: folder of the weights.
    size: (height, width) in pixels that the positions are for.
    patch: (height, width) of a patch.
    prepared: arguments of `Preprocessing` for a folder without the file.
    missing: values of keys that the file lacks.

  Raises:
    ValueError: the file is damaged, or describes a different kind of preprocessing.
  """
  path, p = find_processor(folder)
  if p is None:
    return Preprocessing(size, **prepared)
  try:
    found = processing((missing or {}) | p, size, str(path))
  except ODD as error:
    raise ValueError(f'{path}: unexpected value ({error!r}).') from error
  fits = all(n % d == 0 for n, d in zip(found.size, patch))
  return found if fits else dataclasses.replace(found, size=size)


def find_processor(folder: pathlib.Path) -> tuple[pathlib.Path, dict | None]:
  """Returns the file that describes the image processor, and the description; None without one.

  Raises:
    ValueError: a file is not valid JSON, or not a JSON object.
  """
  whole, own = (folder / name for name in ('processor_config.json', 'preprocessor_config.json'))
  if whole.is_file():
    found = load_json(whole).get('image_processor')
    if isinstance(found, dict):
      return whole, found
  return own, load_json(own) if own.is_file() else None


def processing(p: dict, size: tuple[int, int], origin: str) -> Preprocessing:
  """Converts the config of an image processor; without a height and width, `size` is used.

  A single number in `size` is the height and the width or, without `default_to_square`, the shorter
  side.

  Raises:
    ValueError: the processor does not scale pixels to [0, 1].
  """
  if not p.get('do_rescale', True) or not np.isclose(p.get('rescale_factor', 1 / 255), 1 / 255):
    raise ValueError(f'{origin}: pixels must be scaled by rescale_factor=1/255.')
  normal = p.get('do_normalize', True)
  resized, cropped = p.get('size', 224), p.get('crop_size')
  if isinstance(resized, int) and not p.get('default_to_square', True):
    resized = {'shortest_edge': resized}
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
    choose(f'{origin}: resample', p.get('resample', 2), RESAMPLING),
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
    resample=next(number for number, name in RESAMPLING.items() if name == p.interpolation),
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
