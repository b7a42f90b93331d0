"""The contents of a weights file, and the steps that all weight formats share.

Decisions:
  * Reading and writing use the same name tables (`layouts.py`). The expected shape of an array in a
    file is found by converting our parameter with `Layout.write`, so no table lists shapes.
  * Every array of a file is either read, or listed in `ignored`, or reported as an error.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
import dataclasses
import json
import os
import pathlib
import re

import ml_dtypes
import numpy as np

from vit_jax import bucket
from vit_jax.data import INTERPOLATIONS
from vit_jax.model import ViT
from vit_jax.names import choose
from vit_jax.weights import layouts
from vit_jax.weights.layouts import Row
from vit_jax.workdir import Calibration


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """Image preprocessing that weights expect.

  Attributes:
    size: (height, width) of the prepared image in pixels.
    mean: value to subtract from pixels in [0, 1]; one per channel, or one for all channels.
    std: divisor after the subtraction; one per channel, or one for all channels.
    interpolation: one of `image.INTERPOLATIONS`.
    crop: fraction of the shorter side that is kept, around the centre; if `stretch` is True, the
      fraction of each side.
    stretch: whether height and width are resized independently; if not, the longer side is cropped
      to the aspect ratio of `size`.
    stored_size: (height, width) to which an image file is resized first; the device then enlarges
      the image to `size`. None if files are resized directly to `size`.
  """

  size: tuple[int, int]
  mean: tuple[float, ...] = (0.5,)
  std: tuple[float, ...] = (0.5,)
  interpolation: str = 'bicubic'
  crop: float = 1.0
  stretch: bool = False
  stored_size: tuple[int, int] | None = None

  def check(self, channels: int, origin: object) -> None:
    """Raises ValueError if a setting is not valid for images with `channels` channels."""
    choose(f'{origin}: interpolation', self.interpolation, INTERPOLATIONS)
    for name in ('mean', 'std'):
      values = getattr(self, name)
      if len(values) not in (1, channels) or not np.isfinite(np.array(values, float)).all():
        raise ValueError(f'{origin}: {name}: expected 1 or {channels} numbers, got {values}.')
    if min(self.std) <= 0 or not 0 < self.crop <= 1:
      raise ValueError(
        f'{origin}: std must be positive, and crop must be above 0 and at most 1; got '
        f'std={self.std}, crop={self.crop}.'
      )


@dataclasses.dataclass(frozen=True)
class Weights:
  """Contents of a weights file: its arrays, and what its format and config say about the model.

  Attributes:
    origin: where the file came from, for messages.
    arrays: the file's arrays, by name.
    rows: the name table (`layouts.py`), which maps the file's arrays to our parameters.
    fields: values of `ViT`'s attributes; `num_classes` is None if the file has no head.
    channels: number of channels of an image.
    preprocessing: how images are prepared; `size` is (0, 0) if the file does not store a size.
    grid: number of patches (down, across) that the position embeddings are for; None if the file
      does not store this grid.
    class_names: names of the classes; None if the file does not store names.
    ignored: regular expressions for the names of arrays that do not affect the output.
    run: facts (e.g. `config`, `task`) of the vit_jax run that wrote the file; None for other files.
    multi_label: whether the weights were trained on images that can have several labels.
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
  multi_label: bool = False


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """The result of `load`; it unpacks as `model, params`.

  Attributes:
    model: the model, to be called as `model.apply({'params': params}, image_BHWC)`.
    params: float32 NumPy arrays.
    preprocessing: how the weights expect an image to be prepared; `size` is patch size x grid.
    class_names: names of the classes, in the order of the logits. None if the file does not store
      names, or if `load` replaced the file's head.
    ignored: names of the file's arrays that the model does not use.
    run: facts about the vit_jax run that wrote the weights, such as `config`, `task` and `step`;
      None for other weights.
    sigmoid: True if each image has one label, but the probability of a class is the sigmoid of its
      logit instead of a softmax. This is so in zero-shot classification with SigLIP.
    multi_label: whether the weights were trained on images that can have several labels.
  """

  model: ViT
  params: dict
  preprocessing: Preprocessing
  class_names: tuple[str, ...] | None
  ignored: tuple[str, ...]
  run: Mapping | None = None
  sigmoid: bool = False
  multi_label: bool = False

  @property
  def calibration(self) -> Calibration:
    """Settings that turn logits into probabilities or labels."""
    found = Calibration(sigmoid=True) if self.sigmoid else Calibration.load(self.run)
    classes = self.model.num_classes
    return found.with_thresholds(classes) if self.multi_label and classes else found

  def __iter__(self):
    return iter((self.model, self.params))


@dataclasses.dataclass(frozen=True)
class Format:
  """A weight format; an entry of `FORMATS`.

  Attributes:
    save: function that writes the files. Its arguments are `(model, params, folder, preprocessing,
      class_names)`, or `(program, folder)` for a program. The function raises ValueError for a
      model that the format cannot hold.
    holds_labels: whether the format stores `multi_label`, which is then an argument of `save`.
    usage: `(loaded) -> text` returns Python code that runs the written files, for the model card.
    files: glob patterns for the names of the format's files.
    reads: `(path) -> bool` tells whether a file or a folder has this format; None if the format
      can only be written.
    read: `(path) -> Weights`; None if the format can only be written.
    library: name of the library on the Hub, for the model card.
    opens: `(folder) -> function` opens a program as a function `image_BHWC -> output_BL`. None for
      weights. The program itself enlarges images from `stored_size`, and applies the temperature.
    precisions: `{name: Precision}` for the precisions below float32 that a program can have.
    holds_names: whether the format can store class names.
  """

  save: Callable[..., None]
  usage: Callable[[Pretrained], str]
  files: tuple[str, ...]
  reads: Callable[[pathlib.Path], bool] | None = None
  read: Callable[[pathlib.Path], Weights] | None = None
  library: str = ''
  opens: Callable[[pathlib.Path], Callable[[np.ndarray], np.ndarray]] | None = None
  precisions: Mapping[str, object] = dataclasses.field(default_factory=dict)
  holds_names: bool = True
  holds_labels: bool = False

  @property
  def is_program(self) -> bool:
    """Whether the files hold a program, not only weights."""
    return self.opens is not None


# Exceptions that reading a config raises if a value has an unexpected type.
ODD = (KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError, RecursionError)


def place_of(path: str | os.PathLike) -> pathlib.Path:
  """Converts the location of weights to a `pathlib.Path`; the location can be a URL of a bucket."""
  return bucket.to_path(path)


def local_copy(place: pathlib.Path) -> AbstractContextManager[pathlib.Path]:
  """Returns a context manager that yields a local path; a bucket's files are downloaded first."""
  return bucket.downloaded(place)


def load_json(path: pathlib.Path) -> dict:
  """Returns the object in a JSON file. Raises ValueError if it is missing, or not an object."""
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except OSError as error:
    raise ValueError(f'{path}: cannot be read ({error.strerror}).') from error
  except (ValueError, RecursionError) as error:  # brackets can be nested too deeply
    raise ValueError(f'{path}: not valid JSON ({error}).') from error
  if not isinstance(value, dict):
    raise ValueError(f'{path}: expected a JSON object, got {type(value).__name__}.')
  return value


def read_params(
  weights: Weights, wanted: dict[str, tuple[int, ...]]
) -> tuple[dict, tuple[str, ...]]:
  """Reads all parameters of a model from a weights file.

  Args:
    weights: contents of the file.
    wanted: `{path: shape}` for the parameters of the model; a path is e.g. `head/kernel`.

  Returns:
    The parameters as a tree of float32 NumPy arrays, and the names of the file's unused arrays.

  Raises:
    ValueError: an array is missing, is not part of the model, has the wrong shape or type, or
      contains values that are not finite.
  """
  layouts.check_total(weights.origin, wanted, weights.arrays)
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
  empty = {name for name in left if not weights.arrays[name].size}  # e.g. of zero registers
  ignored = tuple(n for n in left if n in empty or any(re.fullmatch(p, n) for p in weights.ignored))
  problems += [f'{name}: not part of the model' for name in left if name not in ignored]
  unknown = set(wanted) - {name for row in weights.rows for name in row.ours}
  assert not unknown, f'the table has no row for {unknown}'
  if problems:
    shown = '\n  '.join(problems[:20] + [f'... {len(problems) - 20} more'] * (len(problems) > 20))
    raise ValueError(f'{weights.origin}: the arrays do not match the model:\n  {shown}')
  return layouts.unflatten_params(
    {name: np.ascontiguousarray(x) for name, x in params.items()}
  ), ignored


def check_array(name: str, array: np.ndarray, shape: tuple[int, ...]) -> str | None:
  """Returns a message about what is wrong with an array of a file; None if it is valid."""
  if array.dtype not in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16):
    return f'{name}: has type {array.dtype}, expected a floating-point type'
  if array.shape != shape:
    return f'{name}: has shape {array.shape}, expected {shape}'
  if not np.isfinite(array.astype(np.float32)).all():
    return f'{name}: contains values that are not finite'
  return None


def write_params(table: Sequence[Row], params: dict) -> dict[str, np.ndarray]:
  """Converts parameters to `{name in the file: array}`. First check the model with `refuse`."""
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
  """Raises ValueError if a model has attributes that a format cannot hold.

  Args:
    format_name: name of the format, for the message.
    model: the model to write.
    holds: for each attribute of `ViT`, the values that the format can hold.
  """
  if model.examples is not None:
    raise ValueError(
      f'The format {format_name} cannot hold a k-NN head, only a linear one. Use the format onnx '
      'or stablehlo, or compute a linear head: --mode=fewshot --classifier=ridge.'
    )
  holds = {'embedding_size': (None, model.patch_size)} | dict(holds)
  key = lambda name: name.replace('has_class', 'class_token')  # the config key
  wrong = [
    f'  model.{key(name)}={getattr(model, name)!r}: only {", ".join(map(repr, values))} can be '
    'written'
    for name, values in holds.items()
    if getattr(model, name) not in values
  ]
  if wrong:
    raise ValueError(f'The format {format_name} cannot hold this model:\n' + '\n'.join(wrong))
