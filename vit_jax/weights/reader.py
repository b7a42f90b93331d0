"""What lies at a path, or on the Hub under a name, as `Weights`.

safetensors and `np.load` without pickle only: what could run code is refused. What lies at a path
decides how it is read.
"""

from collections.abc import Mapping
import dataclasses
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
from vit_jax.storage import local
from vit_jax.weights import formats, hf, layouts, npz, param_tree, timm
from vit_jax.weights.formats import Preprocessing, Weights
from vit_jax.weights.layouts import Row
from vit_jax.workdir import load_checkpoint

log = logging.getLogger(__name__)

PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl', '.pickle', '.msgpack', '.h5')
FILES = ('config.json', 'preprocessor_config.json', 'model.safetensors')  # of a Hub repository
INDEX = 'model.safetensors.index.json'  # where the weights are in several files


def read_weights(path: str | pathlib.Path, step: str = 'last') -> Weights:
  """What lies at a path, or on the Hub under that name, as it is.

  Args:
    path: see `load`.
    step: which checkpoint of a workdir, as in `stored.preferred`.

  Raises:
    ValueError: nothing that can be read; the message says what would be.
  """
  place = local(path)
  if place.is_dir():
    return read_folder(place, step=step)
  if place.is_file():
    return read_file(place)
  if re.fullmatch(r'[\w.-]+/[\w.-]+', str(path)) and place.suffix != '.npz':
    return read_folder(download(str(path)), origin=str(path))
  raise ValueError(f'{path}: there is no such file or folder.')


def read_file(path: pathlib.Path) -> Weights:
  """A `.npz`, or a `.safetensors` with its `config.json` beside it."""
  if path.suffix in PICKLES:
    raise ValueError(
      f'{path}: {path.suffix} files can run code when they are opened and are not read. Take the '
      'safetensors or npz file of the same weights, or write one: '
      'safetensors.torch.save_file(state_dict, "model.safetensors").'
    )
  if path.suffix == '.npz':
    return npz.read_npz(path)
  if path.suffix == '.safetensors':
    return read_torch(path.parent, load_arrays(path), str(path))
  raise ValueError(f'{path}: expected .npz, .safetensors, or a folder.')


def read_folder(folder: pathlib.Path, origin: str | None = None, step: str = 'last') -> Weights:
  """A workdir, a checkpoint, or what Hugging Face, timm or `save` wrote."""
  origin = origin or str(folder)
  if (folder / 'checkpoints').is_dir():
    return read_checkpoint(folder, step)
  if folder.parent.name == 'checkpoints' and folder.name.isdigit():
    return read_checkpoint(folder.parent.parent, folder.name)
  files = sorted(folder.glob('*.safetensors'))
  if (folder / INDEX).is_file():
    index = formats.load_json(folder / INDEX).get('weight_map')
    if not isinstance(index, dict):
      raise ValueError(f'{folder / INDEX}: expected a weight_map, from names to files.')
    files = [folder / name for name in sorted(set(index.values()))]
  elif len(files) > 1:
    files = [f for f in files if f.name == 'model.safetensors'] or files
  if files and (folder / 'config.json').is_file():
    arrays = {}
    for file in files:
      arrays |= load_arrays(file)
    return read_torch(folder, arrays, origin)
  found = sorted(folder.glob('*.npz'))
  if len(found) == 1:
    return npz.read_npz(found[0])
  names = ', '.join(sorted(p.name for p in folder.iterdir())[:8]) or 'nothing'
  raise ValueError(
    f'{origin}: found no weights: expected checkpoints/, or config.json with *.safetensors, or one '
    f'*.npz; there is {names}.'
  )


def read_torch(folder: pathlib.Path, arrays: Mapping[str, np.ndarray], origin: str) -> Weights:
  """safetensors by the `config.json` beside them: timm's names an `architecture`."""
  config = formats.load_json(folder / 'config.json')
  read = timm.read_timm if 'architecture' in config else hf.read_hf
  try:
    found = read(folder, config, arrays)
  except formats.ODD as error:
    raise ValueError(f'{folder}/config.json: an unexpected value ({error!r}).') from error
  check_kinds(found.fields, f'{folder}/config.json')
  found.preprocessing.check(found.channels, f'{folder}: the config of its images')
  if found.class_names and len(found.class_names) != found.fields['num_classes']:
    raise ValueError(
      f'{folder}/config.json: {len(found.class_names)} class names for '
      f'{found.fields["num_classes"]} classes.'
    )
  return dataclasses.replace(found, origin=origin)


PLAIN = {int, float, bool, str, type(None)}


def check_kinds(fields: dict, origin: str) -> None:
  """Raises ValueError for an attribute of a `ViT` that is of another kind, as '12' for 12."""
  for name, hint in typing.get_type_hints(ViT).items():
    kinds, value = typing.get_args(hint) or (hint,), fields.get(name)
    kinds += (int,) * (float in kinds) + (type(None),)
    plain = typing.get_origin(hint) is not tuple and set(kinds) <= PLAIN
    if plain and type(value) not in kinds:
      raise ValueError(
        f'{origin}: an unexpected value: {name} is {value!r}, expected {kinds[0].__name__}.'
      )


def load_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of a safetensors file.

  Raises:
    ValueError: missing or damaged.
  """
  try:
    return load_file(path)
  except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
    raise ValueError(f'{path}: no safetensors file, or a damaged one ({error}).') from error


def read_checkpoint(workdir: pathlib.Path, step: str) -> Weights:
  """This project's own: the averaged weights where the run keeps them."""
  step, params, saved = load_checkpoint(workdir, step)
  config, task = saved['config'], saved['task']
  data, class_names = config['data'], tuple(task['class_names'])
  fields = {name: tuple(v) if isinstance(v, list) else v for name, v in config['model'].items()}
  if fields.get('patch_size'):
    fields['patch_size'] = pair(fields['patch_size'])
  with config_lib.naming_imports(saved):
    model = make(fields.pop('variant'), len(class_names), **fields | dict(dtype='float32'))
  size = pair(data['image_size'])
  whole = tuple(task['stored_size']) != size  # smaller images are kept as they are, uncut
  wanted = param_tree.param_shapes(model, (*size, task['channels']))
  arrays = param_tree.flatten_params(params)
  return Weights(
    origin=str(workdir),
    arrays=arrays,
    rows=[Row((name,), (name,), layouts.SAME) for name in sorted(wanted)],
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
    class_names=class_names,
    run=saved | {'step': step},
  )


def download(name: str) -> pathlib.Path:
  """The folder of a Hub repository in the Hub's own cache, fetched where it is not there.

  Raises:
    ValueError: no such repository, no network and not in the cache, or no safetensors in it.
  """
  from huggingface_hub import snapshot_download

  log.info('%s is no file or folder here: looking for it on the Hugging Face Hub ...', name)
  try:
    folder = snapshot_download(name, allow_patterns=[*FILES, INDEX, 'model-*.safetensors', '*.npz'])
  except Exception as error:  # the Hub's client and its transports raise many kinds
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise ValueError(
      f'{name}: there is no such file or folder here. Taken for the name of a repository on the '
      f'Hugging Face Hub, it could not be fetched either: {reason}'
    ) from error
  return pathlib.Path(folder)
