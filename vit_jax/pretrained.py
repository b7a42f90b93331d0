"""Published weights in, and out: the paper's npz, big_vision, Hugging Face, timm, our own.

    model, params = vit_jax.load('ViT-B_16.npz')
    vit_jax.save(model, params, 'out/', format='hf')

Decisions:
  * The file decides the model: its activation, epsilon, pooling. Where a format does not say, its
    code base does.
  * safetensors and `np.load` without pickle only: what could run code is refused.
  * A new head takes the place of the pre-logits layer too: the paper's head for pre-training is
    both (Section 3.1), and fine-tuning removes all of it (Section 3.2).
  * `FORMATS` writes; what a path is, is told from what lies there.
"""

from collections.abc import Mapping
import contextlib
import dataclasses
import logging
import math
import pathlib
import re
import tempfile
import typing

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from vit_jax import (
  checkpoint,
  format_hf,
  format_npz,
  format_program,
  format_timm,
  output,
  positions,
  vit,
  weights,
)
from vit_jax.names import choose
from vit_jax.paths import local
from vit_jax.weights import Preprocessing, Weights, pair

log = logging.getLogger(__name__)

PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl', '.pickle', '.msgpack', '.h5')
FILES = ('config.json', 'preprocessor_config.json', 'model.safetensors')  # of a Hub repository
INDEX = 'model.safetensors.index.json'  # where the weights are in several files


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

  model: vit.ViT
  params: dict
  preprocessing: Preprocessing
  class_names: tuple[str, ...] | None
  ignored: tuple[str, ...]
  run: Mapping | None = None

  def __iter__(self):
    return iter((self.model, self.params))


def load(
  path: str | pathlib.Path,
  *,
  grid: tuple[int, int] | None = None,
  source_grid: tuple[int, int] | None = None,
  num_classes: int | None = None,
  resize: str = 'bilinear',
) -> Pretrained:
  """The model and the weights of a file, a folder, a workdir or a Hugging Face Hub name.

  Args:
    path: `ViT-B_16.npz`; a folder with `config.json` and safetensors (Hugging Face, timm); a
      workdir or one of its checkpoints; or `organisation/name` on the Hub.
    grid: patches (down, across) of the images wanted; None for the file's own.
    source_grid: the file's, where it doesn't tell and is no square; `grid` where that has as
      many patches.
    num_classes: of the head; one other than the file's gives a new head of zeros, without
      pre-logits. None for the file's; where it has no head, the model gives the normalised tokens
      `[B, N, D]`.
    resize: how positions are brought to another grid, one of `positions.RESIZES`.

  Raises:
    ValueError: nothing there, a damaged file, one with pickled objects, weights that
      contradict their config, or a grid that does not fit; the message says which.
  """
  return adapt(read(path), grid, source_grid, num_classes, resize)


def save(
  model: vit.ViT,
  params: dict,
  folder: str | pathlib.Path,
  *,
  format: str,
  preprocessing: Preprocessing | None = None,
  class_names: tuple[str, ...] | None = None,
  card: str | None = None,
) -> None:
  """Writes weights into a folder for the code base of a format; `load` reads the first three.

  Args:
    model: their model.
    params: its parameters.
    folder: made where it is missing; files of the same names are replaced once all are whole.
    format: one of `FORMATS`.
    preprocessing: how images are to be; None for pixels in [-1, 1] at the size of a square grid.
    class_names: of the logits; None for none.
    card: text of a `README.md` beside them; None for no such file.

  Raises:
    ValueError: a model that the format can't hold; the message names what.
  """
  write = choose('format', format, FORMATS)
  folder = local(folder)
  preprocessing = preprocessing or Preprocessing(image_size(model, params), stretch=True)
  check_params(model, params, preprocessing.size, 'save')
  if class_names is not None and len(class_names) != model.num_classes:
    raise ValueError(f'{len(class_names)} class names for {model.num_classes} classes.')
  output.check_folder(folder)
  with output.writing(folder), contextlib.ExitStack() as stack:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix='.writing_', dir=folder))
    write(model, params, pathlib.Path(temporary), preprocessing, class_names)
    if card is not None:
      (pathlib.Path(temporary) / 'README.md').write_text(
        card, encoding='utf-8', errors='backslashreplace'
      )
    files = sorted(pathlib.Path(temporary).iterdir())
    check_free(folder, [file.name for file in files])
    for file in files:
      file.replace(folder / file.name)


def check_free(folder: pathlib.Path, names: list[str]) -> None:
  """Raises ValueError where a folder holds a run, or weights that would be read before these."""
  runs = [name for name in ('checkpoints', 'metrics.jsonl') if (folder / name).exists()]
  kinds = ('*.safetensors', '*.npz', '*.index.json', '*.stablehlo', '*.onnx*')
  kept = [file.name for kind in kinds for file in folder.glob(kind)]
  if others := runs + sorted(set(kept) - set(names)):
    held = ', '.join(others)
    raise ValueError(f'{folder} holds {held} already: give another folder, or an empty one.')


FORMATS = {
  'hf': format_hf.save,
  'timm': format_timm.save,
  'npz': format_npz.save,
  'stablehlo': format_program.save_stablehlo,
  'onnx': format_program.save_onnx,
}


def image_size(model: vit.ViT, params: dict) -> tuple[int, int]:
  """The pixels of the square grid that learned positions are for.

  Raises:
    ValueError: they are for no square, or not learned.
  """
  if model.position != 'learned':
    raise ValueError(f'model.position={model.position!r} tells no image size: give preprocessing.')
  grid = square(params['pos_embedding'].shape[1] - model.num_positions)
  if grid is None:
    raise ValueError('The positions are for no square grid: give preprocessing, with its size.')
  return grid[0] * model.patch_size[0], grid[1] * model.patch_size[1]


def square(count: int) -> tuple[int, int] | None:
  """The square grid of `count` patches; None where there is none."""
  side = math.isqrt(max(count, 0))
  return (side, side) if side and side * side == count else None


def adapt(
  source: Weights,
  grid: tuple[int, int] | None = None,
  source_grid: tuple[int, int] | None = None,
  num_classes: int | None = None,
  resize: str = 'bilinear',
  tokens: bool = True,
  new_head: bool = False,
) -> Pretrained:
  """The model of a file, for the grid and the classes wanted; see `load`.

  Args:
    source: what was read.
    grid: see `load`.
    source_grid: see `load`.
    num_classes: see `load`.
    resize: see `load`.
    tokens: whether a file without a head gives tokens, or what its own pooling makes of them.
    new_head: whether the head is new even if it has as many classes as the file's.
  """
  if num_classes is not None and num_classes < 1:
    raise ValueError(f'num_classes must be positive, got {num_classes}.')
  model = vit.ViT(**source.fields)
  vit.check(model)
  own_grid = find_grid(source, model, grid, source_grid)
  grid = own_grid if grid is None else check_grid('grid', grid)
  own_size, size = ([n * p for n, p in zip(g, model.patch_size)] for g in (own_grid, grid))
  wanted = weights.param_shapes(model, (*own_size, source.channels))
  params, ignored = weights.read(source, wanted)

  if 'pos_embedding' in params:
    params['pos_embedding'] = positions.resize(
      params['pos_embedding'], own_grid, grid, model.num_positions, resize
    )
  class_names = source.class_names
  if num_classes is None and model.num_classes is None and tokens:
    model, dropped = model.clone(pool='none', class_token=model.has_class), ('map', 'pre_logits')
  elif new_head or num_classes not in (None, model.num_classes):
    model, dropped = model.clone(num_classes=num_classes), ('pre_logits', 'head')
    class_names = None
    if model.pool == 'none':  # the file leaves it open
      model = model.clone(pool='cls' if model.has_class else 'gap')
  else:
    dropped = ()
  if 'pre_logits' in dropped:
    model = model.clone(representation_size=None)
  for name in dropped:
    ignored += tuple(f'{name}/{leaf}' for leaf in weights.flatten(params.pop(name, {})))
  if num_classes is not None and 'head' not in params:
    shapes = weights.param_shapes(model, (*size, source.channels))
    params['head'] = {
      leaf: np.zeros(shapes[f'head/{leaf}'], np.float32) for leaf in ('kernel', 'bias')
    }
  if ignored:
    log.info('%s: not used: %s', source.origin, ', '.join(ignored))
  preprocessing = dataclasses.replace(source.preprocessing, size=tuple(size))
  return Pretrained(model, params, preprocessing, class_names, ignored, source.run)


def find_grid(
  source: Weights,
  model: vit.ViT,
  grid: tuple[int, int] | None,
  source_grid: tuple[int, int] | None,
) -> tuple[int, int]:
  """The grid that a file's positions are for.

  Raises:
    ValueError: they don't fit the grid given, or are for no square and none is given.
  """
  found = [
    array
    for row in source.rows
    if row.ours == ('pos_embedding',) and (array := source.arrays.get(row.theirs[0])) is not None
  ]
  if not found:  # nothing to resize; a position that is missing shows when the file is read
    return source.grid or check_grid('grid', grid or (1, 1))
  if found[0].ndim != 3:
    raise ValueError(f'{source.origin}: positions of shape {found[0].shape}, expected 3 axes.')
  patches = found[0].shape[1] - model.num_positions
  for name, given in (('source_grid', source_grid), ("the config's grid", source.grid)):
    if given is None:
      continue
    given = check_grid(name, given)
    if math.prod(given) != patches:
      raise ValueError(
        f'{source.origin}: {name} {given} has {math.prod(given)} patches, and the file has '
        f'positions for {patches} (and {model.num_positions} tokens before them).'
      )
    return given
  if grid is not None and math.prod(check_grid('grid', grid)) == patches:
    return check_grid('grid', grid)
  if square(patches) is None:
    raise ValueError(
      f'{source.origin} has positions for {patches} patches, which is no square: say '
      'source_grid=(h, w), the patches down and across, or on the command line '
      "--config.data.image_size, the file's own (height, width)."
    )
  return square(patches)


def check_grid(name: str, grid: tuple[int, int]) -> tuple[int, int]:
  """A grid as (h, w).

  Raises:
    ValueError: not two positive integers.
  """
  grid = tuple(grid) if isinstance(grid, (tuple, list)) else grid
  if not (
    isinstance(grid, tuple) and len(grid) == 2 and all(isinstance(n, int) and n > 0 for n in grid)
  ):
    raise ValueError(f'{name}: expected (patches down, patches across), got {grid!r}.')
  return grid


def check_params(model: vit.ViT, params: dict, size: tuple[int, int], origin: object) -> None:
  """Raises ValueError where parameters don't have the names and shapes of the model."""
  image_shape = (*size, weights.channels(params))
  compare(weights.param_shapes(model, image_shape), weights.shapes(params), origin)


def compare(wanted: dict, given: dict, origin: object) -> None:
  """Raises ValueError where two sets of named shapes differ, listing where."""
  differences = [
    f'  {name}: {given.get(name, "missing")} there, {wanted.get(name, "none")} in the model'
    for name in sorted(wanted | given)
    if wanted.get(name) != given.get(name)
  ]
  if differences:
    shown = '\n'.join(differences[:10] + ['  ...'] * (len(differences) > 10))
    raise ValueError(f'{origin}: its weights are not those of the model asked for:\n{shown}')


def read(path: str | pathlib.Path, step: str = 'last') -> Weights:
  """What lies at a path, or on the Hub under that name, as it is.

  Args:
    path: see `load`.
    step: which checkpoint of a workdir, as in `checkpoint.preferred`.

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
    return format_npz.read(path)
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
    index = weights.read_json(folder / INDEX).get('weight_map')
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
  npz = sorted(folder.glob('*.npz'))
  if len(npz) == 1:
    return format_npz.read(npz[0])
  names = ', '.join(sorted(p.name for p in folder.iterdir())[:8]) or 'nothing'
  raise ValueError(
    f'{origin}: found no weights: expected checkpoints/, or config.json with *.safetensors, or one '
    f'*.npz; there is {names}.'
  )


def read_torch(folder: pathlib.Path, arrays: Mapping[str, np.ndarray], origin: str) -> Weights:
  """safetensors by the `config.json` beside them: timm's names an `architecture`."""
  config = weights.read_json(folder / 'config.json')
  module = format_timm if 'architecture' in config else format_hf
  try:
    found = module.read(folder, config, arrays)
  except weights.ODD as error:
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
  for name, hint in typing.get_type_hints(vit.ViT).items():
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
  step, params, saved = checkpoint.load(workdir, step)
  config, task = saved['config'], saved['task']
  data, class_names = config['data'], tuple(task['class_names'])
  fields = {name: tuple(v) if isinstance(v, list) else v for name, v in config['model'].items()}
  if fields.get('patch_size'):
    fields['patch_size'] = pair(fields['patch_size'])
  model = vit.make(fields.pop('variant'), len(class_names), **fields | dict(dtype='float32'))
  size = pair(data['image_size'])
  whole = tuple(task['stored_size']) != size  # smaller images are kept as they are, uncut
  wanted = weights.param_shapes(model, (*size, task['channels']))
  arrays = weights.flatten(params)
  return Weights(
    origin=str(workdir),
    arrays=arrays,
    rows=[weights.Row((name,), (name,), weights.SAME) for name in sorted(wanted)],
    fields=vit.attributes(model),
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
