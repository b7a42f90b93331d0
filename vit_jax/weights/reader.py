"""Reads the weights at a path, or under a name on the Hub, as `Weights`.

Decisions:
  * Only safetensors and `.npz` without pickle are read. Formats that can run code are refused.
  * The names of the files at the path show the format. Files of timm and of Hugging Face have the
    same names, so the keys of `config.json` tell these two formats apart.
"""

from collections.abc import Callable
import dataclasses
import functools
import logging
import pathlib
import re
import typing

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from vit_jax import config as config_lib
from vit_jax.model import ViT, attributes, make
from vit_jax.names import pair
from vit_jax.weights.formats import (
  ODD,
  Format,
  Preprocessing,
  Weights,
  load_json,
  local_copy,
  place_of,
)
from vit_jax.weights.hf import read_hf, run_hf, save_hf
from vit_jax.weights.layouts import SAME, Row, flatten_params, param_shapes
from vit_jax.weights.npz import is_npz, read_npz, run_npz, save_npz
from vit_jax.weights.onnx_program import PROGRAMS
from vit_jax.weights.timm import read_timm, run_timm, save_timm
from vit_jax.workdir import load_checkpoint

log = logging.getLogger(__name__)

# Suffixes of weights in formats that are refused, because some of these formats can run code.
PICKLES = {'.bin', '.pt', '.pth', '.ckpt', '.pkl', '.pickle', '.msgpack', '.h5'}
REFUSED = (
  'files can run code when they are opened, so they are not read. Use the safetensors or npz file '
  'of the same weights, or write one: safetensors.torch.save_file(state_dict, "model.safetensors").'
)
FILES = (  # files to download from a Hub repository; its pickled files are not downloaded
  'config.json', 'preprocessor_config.json', 'processor_config.json', 'model.safetensors',
)  # fmt: skip
INDEX = 'model.safetensors.index.json'  # exists if the weights are split into several files
TORCH = ('*.safetensors', '*.index.json')


def read_weights(path: str | pathlib.Path, step: str = 'last') -> Weights:
  """Returns the weights at a path, or in a repository on the Hub, without adapting them.

  Args:
    path: a file, a folder, a workdir, a checkpoint or a name on the Hub, as in `load`.
    step: which checkpoint of a workdir to read: `best`, `last`, a number, or empty. Empty stands
      for the best checkpoint if there is a validation accuracy, otherwise for the last one.

  Raises:
    ValueError: no readable weights were found; the message names what was expected.
  """
  place, checkpoint = place_of(path), find_checkpoint(path, step)
  if checkpoint:
    return read_checkpoint(*checkpoint)
  if place.exists():
    # The folder of a `.safetensors` file also contains its `config.json`.
    whole = place.parent if place.suffix == '.safetensors' else place
    with local_copy(whole) as copy:
      return read_place(copy if whole == place else copy / place.name, str(path))
  name = re.sub('^hf[-_]hub:', '', str(path))  # timm's prefix
  if re.fullmatch(r'[\w.-]+/[\w.-]+', name) and place.suffix != '.npz':
    return read_place(download(name), name)
  hint = f" For timm's weights, write timm/{name}." if re.match(r'\w+_patch\d', name) else ''
  raise ValueError(f'{path}: no such file or folder.{hint}')


def find_checkpoint(path: str | pathlib.Path, step: str) -> tuple[pathlib.Path, str] | None:
  """Returns the workdir and the step if a path names a workdir or a checkpoint; otherwise None.

  For a workdir, `step` is returned unchanged. For the folder of a checkpoint, the step is the name
  of this folder.
  """
  place = place_of(path)
  if (place / 'checkpoints').is_dir():
    return place, step
  if place.parent.name == 'checkpoints' and place.name.isdigit():
    return place.parent.parent, place.name
  return None


def read_place(place: pathlib.Path, origin: str) -> Weights:
  """Returns the weights in a local file or folder; if several `FORMATS` fit, the last one is used.

  Args:
    place: the file or folder.
    origin: the path that the user gave, for messages.

  Raises:
    ValueError: no format fits.
  """
  if place.suffix in PICKLES and place.is_file():
    raise ValueError(f'{place}: {place.suffix} {REFUSED}')
  for entry in reversed(FORMATS.values()):
    if entry.reads is not None and entry.reads(place):
      return dataclasses.replace(entry.read(place), origin=origin)
  if not place.is_dir():
    raise ValueError(f'{place}: expected an .npz file, a .safetensors file or a folder.')
  names, kinds = sorted(p.name for p in place.iterdir()), {p.suffix for p in place.iterdir()}
  bare = 'config.json' in names and set(names) <= set(FILES)  # a repository without safetensors
  hint = f' Pickled {REFUSED}' if bare or kinds & PICKLES else ''
  hint = ' The file config.json is missing.' if '.safetensors' in kinds else hint
  raise ValueError(
    f'{origin}: found no weights. Expected checkpoints/, or config.json with *.safetensors, or one '
    f'*.npz; the folder holds {", ".join(names[:8]) or "nothing"}.{hint}'
  )


def is_torch(place: pathlib.Path, of_timm: bool) -> bool:
  """Returns whether a path holds safetensors of timm, or with `of_timm=False` of Hugging Face.

  Args:
    place: a file, or a folder.
    of_timm: True for timm, whose `config.json` has the key `architecture`; False for Hugging Face.
  """
  if place.is_file():
    return place.suffix == '.safetensors' and of_timm == is_of_timm(place.parent)
  known = (place / 'config.json').is_file() and any(place.glob('*.safetensors'))
  return known and of_timm == is_of_timm(place)


def is_of_timm(folder: pathlib.Path) -> bool:
  """Returns whether a folder's `config.json` has timm's format."""
  file = folder / 'config.json'
  return file.is_file() and 'architecture' in load_json(file)


def safetensors(place: pathlib.Path) -> list[pathlib.Path]:
  """Returns the paths of the safetensors files that belong to the model at a path.

  Raises:
    ValueError: the folder has an index file, but this file does not list the weights files.
  """
  if place.is_file():
    return [place]
  if (place / INDEX).is_file():
    index = load_json(place / INDEX).get('weight_map')
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
      raise ValueError(f'{place / INDEX}: expected a weight_map from array names to files.')
    return [place / name for name in sorted(set(index.values()))]
  files = sorted(place.glob('*.safetensors'))
  return [f for f in files if f.name == 'model.safetensors'] or files


def read_torch(place: pathlib.Path, read: Callable[..., Weights]) -> Weights:
  """Returns the weights in safetensors files, interpreted by the `config.json` next to them.

  Args:
    place: a file, or a folder.
    read: `(folder, config, arrays) -> Weights` interprets the config and the arrays.

  Raises:
    ValueError: a file is damaged, the files are empty, or the config describes a model that is not
      supported.
  """
  arrays, folder = {}, place.parent if place.is_file() else place
  for file in safetensors(place):
    arrays |= load_arrays(file)
  if not arrays:
    raise ValueError(f'{place}: found no arrays in the safetensors files.')
  config = load_json(folder / 'config.json')
  try:
    found = read(folder, config, arrays)
  except ODD as error:
    raise ValueError(
      f'{folder}/config.json: a key is missing, or its value is wrong ({error!r}).'
    ) from error
  check_kinds(found.fields, f'{folder}/config.json')
  found.preprocessing.check(found.channels, f'{folder}: preprocessing config')
  if found.class_names and len(found.class_names) != found.fields['num_classes']:
    raise ValueError(
      f'{folder}/config.json: {len(found.class_names)} class names for '
      f'{found.fields["num_classes"]} classes; expected one name for each class.'
    )
  return found


PLAIN = {int, float, bool, str, type(None)}


def check_kinds(fields: dict, origin: str) -> None:
  """Raises ValueError if an attribute of `ViT` has a value of the wrong type, e.g. '12'."""
  for name, hint in typing.get_type_hints(ViT).items():
    kinds, value = typing.get_args(hint) or (hint,), fields.get(name)
    kinds += (int,) * (float in kinds) + (type(None),)
    plain = typing.get_origin(hint) is not tuple and set(kinds) <= PLAIN
    if plain and type(value) not in kinds:
      raise ValueError(
        f'{origin}: unexpected value: {name} is {value!r}, expected {kinds[0].__name__}.'
      )


def load_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the arrays of a safetensors file.

  Raises:
    ValueError: the file is missing or damaged.
  """
  try:
    return load_file(path)
  except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
    raise ValueError(f'{path}: damaged, or not a safetensors file ({error}).') from error


def read_checkpoint(workdir: pathlib.Path, step: str) -> Weights:
  """Returns the weights of a run's checkpoint: the EMA weights if the run has them.

  Parameters that only training needs, such as a decoder, are left out. `step` is as in
  `read_weights`.
  """
  step, params, saved = load_checkpoint(workdir, step)
  config, task = saved['config'], saved['task']
  data, class_names = config['data'], tuple(task['class_names'])
  fields = {name: tuple(v) if isinstance(v, list) else v for name, v in config['model'].items()}
  if fields.get('patch_size'):
    fields['patch_size'] = pair(fields['patch_size'])
  if 'feature' in params.get('head', {}):  # a k-NN head
    fields['examples'] = len(params['head']['feature'])
  with config_lib.naming_imports(saved):
    model = make(fields.pop('variant'), len(class_names) or None, **fields | dict(dtype='float32'))
  size = pair(data['image_size'])
  # If the run stored images at another size than `image_size`, it resized them without cropping.
  whole = tuple(task['stored_size']) != size
  wanted = param_shapes(model, (*size, task['channels']))
  return Weights(
    origin=str(workdir),
    arrays=flatten_params(params),
    rows=[Row((name,), (name,), SAME) for name in sorted(wanted)],
    fields=attributes(model),
    channels=task['channels'],
    preprocessing=Preprocessing(
      size,
      tuple(data['mean']),
      tuple(data['std']),
      data.get('interpolation', 'bicubic'),
      1.0 if whole else data.get('crop', 1.0),
      not whole and data.get('stretch', False),
      tuple(task['stored_size']) if whole else None,
    ),
    grid=(size[0] // model.patch_size[0], size[1] // model.patch_size[1]),
    class_names=class_names or None,
    run=saved | {'step': step},
    multi_label=bool(task.get('multi_label')),
  )


def download(name: str) -> pathlib.Path:
  """Returns the local folder of a Hub repository; downloads the repository if it is not cached.

  Raises:
    ValueError: the repository does not exist, or is not cached and cannot be downloaded.
  """
  from huggingface_hub import snapshot_download

  log.info('%s is not a local file or folder: looking for it on the Hugging Face Hub ...', name)
  try:
    folder = snapshot_download(name, allow_patterns=[*FILES, INDEX, 'model-*.safetensors', '*.npz'])
  except Exception as error:  # the Hub's client raises many types of errors
    reason = ' '.join(str(error).split()) or type(error).__name__  # it has several lines
    where = 'no such file or folder, and the Hugging Face Hub repository of this name'
    raise ValueError(f'{name}: {where} could not be downloaded: {reason}') from error
  return pathlib.Path(folder)


# Formats by their --format name. To add a format, add an entry.
FORMATS = {
  'npz': Format(save_npz, run_npz, ('*.npz',), is_npz, read_npz, holds_names=False),
  'hf': Format(
    save_hf,
    run_hf,
    TORCH,
    functools.partial(is_torch, of_timm=False),
    functools.partial(read_torch, read=read_hf),
    library='transformers',
    holds_labels=True,
  ),
  'timm': Format(
    save_timm,
    run_timm,
    TORCH,
    functools.partial(is_torch, of_timm=True),
    functools.partial(read_torch, read=read_timm),
    library='timm',
  ),
  **PROGRAMS,
}
