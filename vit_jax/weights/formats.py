"""A file of weights as it is, and what its format and its config say of it.

Decisions:
  * Reading and writing use the same rows; that the shapes fit is checked against the layout's
    own `write`, so no shape is written down twice.
  * Every array of a file is accounted for: read, or named in `ignored`, or an error.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import pathlib
import re

import ml_dtypes
import numpy as np

from vit_jax.data import INTERPOLATIONS
from vit_jax.model import ViT
from vit_jax.names import choose
from vit_jax.weights import layouts
from vit_jax.weights.layouts import Row


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """What weights expect an image to be.

  Attributes:
    size: (height, width), pixels.
    mean: of each channel or of all, for pixels in [0, 1]; taken away.
    std: divided by after that.
    interpolation: one of `image.INTERPOLATIONS`.
    crop: the part of the shorter side that is kept, about the centre.
    stretch: scale height and width by themselves, instead of cutting the longer one.
    stored_size: (height, width) that a file is brought to, where the device enlarges it from
      there to `size`; None where it is brought to `size` at once.
  """

  size: tuple[int, int]
  mean: tuple[float, ...] = (0.5,)
  std: tuple[float, ...] = (0.5,)
  interpolation: str = 'bicubic'
  crop: float = 1.0
  stretch: bool = False
  stored_size: tuple[int, int] | None = None

  def check(self, channels: int, origin: object) -> None:
    """Raises ValueError for what no image can be prepared by."""
    choose(f'{origin}: interpolation', self.interpolation, INTERPOLATIONS)
    for name in ('mean', 'std'):
      values = getattr(self, name)
      if len(values) not in (1, channels) or not np.isfinite(np.array(values, float)).all():
        raise ValueError(f'{origin}: {name}: expected 1 or {channels} numbers, got {values}.')
    if min(self.std) <= 0 or not 0 < self.crop <= 1:
      raise ValueError(
        f'{origin}: std must be positive and crop above 0, at most 1; got {self.std}, {self.crop}.'
      )


@dataclasses.dataclass(frozen=True)
class Weights:
  """A file as it is, and the model that its format and its config say it is of.

  Attributes:
    origin: where it came from, for messages.
    arrays: by their names.
    rows: the table for this file.
    fields: attributes of `ViT`; `num_classes` is None where the file has no head.
    channels: of an image.
    preprocessing: its size is (0, 0) where the file doesn't tell.
    grid: patches (down, across) that its positions are for; None where it doesn't tell.
    class_names: None where it doesn't tell.
    ignored: patterns of names that no output reads.
    run: `config`, `task` and `step` of the run of ours that it is from; None for others.
  """

  origin: str
  arrays: Mapping[str, np.ndarray]
  rows: Sequence[Row]
  fields: dict
  channels: int
  preprocessing: Preprocessing
  grid: tuple[int, int] | None = None
  class_names: tuple[str, ...] | None = None
  ignored: tuple[str, ...] = ()
  run: Mapping | None = None


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """What `load` gives; unpacks as `model, params`.

  Attributes:
    model: for `model.apply({'params': params}, image_BHWC)`.
    params: float32 NumPy arrays.
    preprocessing: how the weights expect an image; its size fits the grid.
    class_names: of the head's logits; None where the file doesn't tell, or the head is new.
    ignored: names in the file of what the model has no use for.
    run: `config`, `task` and `step` of the run that the weights are from, if it is one of ours.
  """

  model: ViT
  params: dict
  preprocessing: Preprocessing
  class_names: tuple[str, ...] | None
  ignored: tuple[str, ...]
  run: Mapping | None = None

  def __iter__(self):
    return iter((self.model, self.params))


@dataclasses.dataclass(frozen=True)
class Format:
  """Everything that is to be known of a format of weights; an entry of `FORMATS`.

  Attributes:
    save: `(model, params, folder, preprocessing, class_names)` writes its files into the folder,
      and raises ValueError for a model that the format can't hold.
    usage: `(loaded) -> Python`, some lines that run a `Pretrained` from the files, for its card.
    files: patterns of the names of its files.
    reads: whether what lies at a path, a file or a folder, is of the format; None where it is
      written only.
    read: `(path) -> Weights`.
    library: that the Hub knows its files by.
    enlarges: whether it enlarges images that are stored smaller than the model's by itself.
    holds_names: whether it has a place for the names of classes.
  """

  save: Callable[[ViT, dict, pathlib.Path, Preprocessing, tuple[str, ...] | None], None]
  usage: Callable[[Pretrained], str]
  files: tuple[str, ...]
  reads: Callable[[pathlib.Path], bool] | None = None
  read: Callable[[pathlib.Path], Weights] | None = None
  library: str = ''
  enlarges: bool = False
  holds_names: bool = True


# What reading a config raises where a value is of another kind than expected.
ODD = (KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError)


def load_json(path: pathlib.Path) -> dict:
  """The object in a JSON file.

  Raises:
    ValueError: missing, or no JSON object.
  """
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except OSError as error:
    raise ValueError(f'{path}: can not be read ({error.strerror}).') from error
  except ValueError as error:
    raise ValueError(f'{path}: no valid JSON ({error}).') from error
  if not isinstance(value, dict):
    raise ValueError(f'{path}: expected a JSON object, got {type(value).__name__}.')
  return value


def read_params(
  weights: Weights, wanted: dict[str, tuple[int, ...]]
) -> tuple[dict, tuple[str, ...]]:
  """Every parameter wanted, and the names of the arrays ignored.

  Args:
    weights: the file.
    wanted: shape of each of our parameters.

  Raises:
    ValueError: arrays that are missing, left over, of another shape or type, or not finite.
  """
  params, used, problems = {}, set(), []
  for row in weights.rows:
    if not set(row.ours) <= set(wanted):
      continue
    used |= set(row.theirs)
    missing = [name for name in row.theirs if name not in weights.arrays]
    problems += [f'{name}: missing' for name in missing]
    if missing:
      continue
    own = [wanted[name] for name in row.ours]
    expected = [x.shape for x in row.layout.write([np.zeros(s, np.float32) for s in own])]
    theirs = [weights.arrays[name] for name in row.theirs]
    wrong = [check_array(*item) for item in zip(row.theirs, theirs, expected)]
    problems += filter(None, wrong)
    if not any(wrong):
      theirs = [array.astype(np.float32) for array in theirs]
      params |= zip(row.ours, row.layout.read(theirs, own))
  left = sorted(set(weights.arrays) - used)
  ignored = tuple(n for n in left if any(re.fullmatch(p, n) for p in weights.ignored))
  problems += [f'{name}: not part of the model' for name in left if name not in ignored]
  unknown = set(wanted) - {name for row in weights.rows for name in row.ours}
  assert not unknown, f'the table has no row for {unknown}'
  if problems:
    shown = '\n  '.join(problems[:20] + [f'... {len(problems) - 20} more'] * (len(problems) > 20))
    raise ValueError(f'{weights.origin} does not hold the weights of its model:\n  {shown}')
  return layouts.unflatten_params(
    {name: np.ascontiguousarray(x) for name, x in params.items()}
  ), ignored


def check_array(name: str, array: np.ndarray, shape: tuple[int, ...]) -> str | None:
  """What is wrong with an array of a file; None if nothing is."""
  if array.dtype not in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16):
    return f'{name}: of type {array.dtype}, expected a floating-point type'
  if array.shape != shape:
    return f'{name}: {array.shape} there, {shape} expected'
  if not np.isfinite(array.astype(np.float32)).all():
    return f'{name}: holds values that are not finite'
  return None


def write_params(table: Sequence[Row], params: dict) -> dict[str, np.ndarray]:
  """All parameters under their names. The format must be able to hold them: see `refuse`."""
  flat = {
    name: np.asarray(leaf, np.float32) for name, leaf in layouts.flatten_params(params).items()
  }
  arrays = {}
  for row in table:
    if set(row.ours) <= set(flat):
      theirs = row.layout.write([flat.pop(name) for name in row.ours])
      arrays |= zip(row.theirs, map(np.ascontiguousarray, theirs))
  assert not flat, f'the table has no row for {set(flat)}'
  return arrays


def refuse(format_name: str, model: ViT, holds: Mapping[str, Sequence]) -> None:
  """Raises ValueError for the attributes of a model that a format can't hold."""
  wrong = [
    f'  model.{name}={getattr(model, name)!r}: it holds {", ".join(map(repr, values))} only'
    for name, values in holds.items()
    if getattr(model, name) not in values
  ]
  if wrong:
    raise ValueError(f'The format {format_name} can not hold this model:\n' + '\n'.join(wrong))


def upright(channels: int) -> str:
  """`image`, a PIL image as people see it: a camera may say in EXIF which way it was held."""
  mode = 'L' if channels == 1 else 'RGB'
  return f"image = ImageOps.exif_transpose(Image.open('image.png')).convert('{mode}')"


def prepare_lines(p: Preprocessing, channels: int, size: Sequence[int]) -> str:
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
