"""Reads and writes `.npz` files of the ViT paper and of big_vision, whose array names differ.

Decisions:
  * All models in such files use tanh GELU, epsilon 1e-6 and pixels in [-1, 1]; no file stores this.
  * Each array is read completely, so that its checksum is verified. Nothing is unpickled.
  * Models of the paper are written with the names of the paper's files (`OLDER`). Models that
    only big_vision has are written with big_vision's names (`NEWER`).
  * A file with big_vision's names and without positions is a model with sin-cos positions
    (`posemb='sincos2d'`), because big_vision computes and does not store them.
"""

import io
import logging
import pathlib
import re
import zipfile
import zlib

import ml_dtypes
import numpy as np

from vit_jax import storage
from vit_jax.model import ViT, stem_stride
from vit_jax.weights.formats import Preprocessing, Pretrained, Weights, refuse, write_params
from vit_jax.weights.layouts import SAME, STACKED, Row, image_channels, rows
from vit_jax.weights.usage import prepare_lines

log = logging.getLogger(__name__)

# Names of a block's modules in the file: (attention, first norm, second norm, MLP).
OLDER = ('MultiHeadDotProductAttention_1', 'LayerNorm_0', 'LayerNorm_2', 'MlpBlock_3')
NEWER = ('MultiHeadDotProductAttention_0', 'LayerNorm_0', 'LayerNorm_1', 'MlpBlock_0')

HOLDS = {
  'position': ('learned', 'sincos'), 'num_registers': (0,), 'layer_scale': (None,),
  'pre_norm': (False,), 'norm_after_pool': (False,), 'qkv_bias': (True,), 'key_bias': (None,),
  'qk_norm': (False,), 'out_norm': (False,), 'mlp': ('plain',), 'activation': ('gelu_tanh',),
  'norm_epsilon': (1e-6,), 'projection': (None,), 'cosine': (False,),
}  # fmt: skip

# Prefixes of all parameter names in: the paper's files, big_vision's files, big_vision's image
# towers (two prefixes), older files of big_vision. The first prefix that fits is used.
PREFIXES = ('', 'params/', 'params/img/', 'img/', 'opt/target/')


def norm(ours: str, theirs: str) -> list[tuple]:
  """Returns the rows (our name, name in the file, layout) of a LayerNorm or GroupNorm."""
  return [(f'{ours}/{leaf}', f'{theirs}/{leaf}', SAME) for leaf in ('scale', 'bias')]


def dense(ours: str, theirs: str) -> list[tuple]:
  """Returns the rows (our name, name in the file, layout) of a dense layer."""
  return [(f'{ours}/{leaf}', f'{theirs}/{leaf}', SAME) for leaf in ('kernel', 'bias')]


def attention_rows(ours: str, theirs: str) -> list[tuple]:
  """Returns the rows (our name, name in the file, layout) of attention's four projections."""
  parts = ('query', 'key', 'value', 'out')
  return [row for part in parts for row in dense(f'{ours}/{part}', f'{theirs}/{part}')]


def mlp(ours: str, theirs: str) -> list[tuple]:
  """Returns the rows (our name, name in the file, layout) of the two layers of an MLP."""
  return dense(f'{ours}/up', f'{theirs}/Dense_0') + dense(f'{ours}/down', f'{theirs}/Dense_1')


def block(ours: str, theirs: str, spelling: tuple[str, str, str, str]) -> list[tuple]:
  """Returns the rows (as in `norm`) of an encoder block; `spelling` is `OLDER` or `NEWER`."""
  names = [f'{theirs}/{name}' for name in spelling]
  return [
    *attention_rows(f'{ours}/attention', names[0]),
    *norm(f'{ours}/attention_norm', names[1]),
    *norm(f'{ours}/mlp_norm', names[2]),
    *mlp(f'{ours}/mlp', names[3]),
  ]


def stem(stages: tuple[int, ...]) -> list[tuple]:
  """Returns the rows, as in `norm`, of a ResNet; `stages` has the number of units of each stage."""
  found = [('stem/conv_root/kernel', 'conv_root/kernel', SAME), *norm('stem/gn_root', 'gn_root')]
  for i, units in enumerate(stages):
    for j in range(units):
      unit = f'block{i + 1}/unit{j + 1}'
      for part in ('1', '2', '3', '_proj'):
        kernel = f'{unit}/conv{part}/kernel'
        found += [(f'stem/{kernel}', kernel, SAME)]
        found += norm(f'stem/{unit}/gn{part}', f'{unit}/gn{part}')
  return found


def table(
  model_fields: dict, spelling: tuple, positions: str, prefix: str = '', scanned: bool = False
) -> list[Row]:
  """Returns a file's name table; `scanned`: whether the file stacks the weights of all blocks."""
  depth = model_fields['depth']
  head = [
    ('cls', 'cls', SAME),
    ('pos_embedding', positions, SAME),
    ('map/query', 'MAPHead_0/probe', SAME),
    *stem(model_fields.get('resnet') or ()),
    *dense('embedding', 'embedding'),
    *norm('norm', 'Transformer/encoder_norm'),
    *attention_rows('map/attention', 'MAPHead_0/MultiHeadDotProductAttention_0'),
    *norm('map/mlp_norm', 'MAPHead_0/LayerNorm_0'),
    *mlp('map/mlp', 'MAPHead_0/MlpBlock_0'),
    *dense('pre_logits', 'pre_logits'),
    *dense('head', 'head'),
  ]
  if scanned:
    one = block('block_{i}', 'Transformer/encoderblock', spelling)
    blocks = [
      (tuple(ours.replace('{i}', str(i)) for i in range(depth)), theirs, STACKED)
      for ours, theirs, _ in one
    ]
  else:
    blocks = block('block_{i}', 'Transformer/encoderblock_{i}', spelling)
  return rows([(ours, prefix + theirs, layout) for ours, theirs, layout in head + blocks], depth)


def is_npz(place: pathlib.Path) -> bool:
  """Returns whether a path is an `.npz` file, or a folder with exactly one such file."""
  return place.suffix == '.npz' if place.is_file() else len([*place.glob('*.npz')]) == 1


def read_npz(path: pathlib.Path) -> Weights:
  """Returns the weights of an `.npz` file, or of the only such file in a folder.

  Raises:
    ValueError: the file is damaged, or is not a ViT of the paper or of big_vision.
  """
  path = next(path.glob('*.npz')) if path.is_dir() else path
  arrays = {name: flat_norm(name, array) for name, array in read_arrays(path).items()}
  prefix = next((p for p in PREFIXES if f'{p}embedding/kernel' in arrays), None)
  if prefix is None:
    raise ValueError(
      f'{path}: not a ViT of the paper or of big_vision, because the array embedding/kernel is '
      f'missing. The file has {len(arrays)} other arrays, such as {", ".join(sorted(arrays)[:5])}.'
    )
  inside = {name.removeprefix(prefix) for name in arrays if name.startswith(prefix)}
  get = lambda name: arrays[prefix + name]
  scanned = any(name.startswith('Transformer/encoderblock/') for name in inside)
  first = 'Transformer/encoderblock' + ('' if scanned else '_0')
  spelling = OLDER if f'{first}/{OLDER[0]}/query/kernel' in inside else NEWER
  query, up = f'{first}/{spelling[0]}/query/kernel', f'{first}/{spelling[3]}/Dense_0/kernel'
  for name in (query, up):
    if prefix + name not in arrays:
      raise ValueError(f'{path}: the arrays do not match the model:\n  {prefix}{name}: missing')
  stages = find_stages(inside) if 'conv_root/kernel' in inside else None
  stride = 1 if stages is None else stem_stride(stages)
  *patch, channels, width = check_axes(path, 'embedding/kernel', get('embedding/kernel'), 4)
  heads, head_dim = check_axes(path, query, get(query), 3 + scanned)[-2:]
  paper_positions = 'Transformer/posembed_input/pos_embedding'
  has_class = 'cls' in inside
  fields = dict(
    num_classes=get('head/kernel').shape[-1] if 'head/kernel' in inside else None,
    patch_size=(patch[0] * stride, patch[1] * stride),
    width=width,
    depth=get(query).shape[0] if scanned else count(inside, r'Transformer/encoderblock_(\d+)/.*'),
    num_heads=heads,
    head_dim=None if heads * head_dim == width else head_dim,
    mlp_dim=get(up).shape[-1],
    pool='cls' if has_class else 'map' if 'MAPHead_0/probe' in inside else 'gap',
    position_prefix='none' if has_class and paper_positions not in inside else 'cls',
    activation='gelu_tanh',
    norm_epsilon=1e-6,
    resnet=stages,
  )
  if 'pre_logits/kernel' in inside:
    fields['representation_size'] = get('pre_logits/kernel').shape[-1]
  if stages is not None:
    *_, channels, fields['resnet_width'] = check_axes(path, 'conv_root', get('conv_root/kernel'), 4)
  positions = paper_positions if paper_positions in inside else 'pos_embedding'
  if spelling == NEWER and positions not in inside:
    fields['position'] = 'sincos'
    log.info('%s: sin-cos positions. The file does not tell the image size (default: 224).', path)
  return Weights(
    origin=str(path),
    arrays=arrays,
    rows=table(fields, spelling, positions, prefix, scanned),
    fields=fields,
    channels=channels,
    preprocessing=Preprocessing((0, 0), interpolation='bilinear', stretch=True),
    ignored=(rf'(?!{re.escape(prefix)}).*',) if prefix else (),
  )


def flat_norm(name: str, array: np.ndarray) -> np.ndarray:
  """Flattens an array of a GroupNorm, which flax before 0.3.6 stored as `[1, 1, 1, C]`."""
  older = re.search(r'\bgn(\d|_)', name) and array.shape[:-1] == (1, 1, 1)
  return array.reshape(-1) if older else array


def check_axes(path: pathlib.Path, name: str, array: np.ndarray, axes: int) -> tuple[int, ...]:
  """Returns the shape of an array after checking its number of axes.

  Raises:
    ValueError: the array has a different number of axes.
  """
  if array.ndim != axes:
    raise ValueError(f'{path}: {name} has shape {array.shape}, expected {axes} axes.')
  return array.shape


def count(inside: set[str], pattern: str) -> int:
  """Returns the number of different texts that the group of `pattern` matches in array names."""
  return len({match[1] for match in (re.fullmatch(pattern, name) for name in inside) if match})


def find_stages(inside: set[str]) -> tuple[int, ...]:
  """Returns the number of units in each stage of a hybrid's ResNet, from the names of arrays."""
  number = count(inside, r'block(\d+)/unit\d+/.*')
  return tuple(count(inside, rf'block{i + 1}/unit(\d+)/.*') for i in range(number))


def read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns every array of an `.npz` file.

  Raises:
    ValueError: the file is missing or damaged, or holds pickled objects.
  """
  arrays = {}
  try:
    with path.open('rb') as file, zipfile.ZipFile(file) as archive:
      for name in archive.namelist():
        member = io.BytesIO(archive.read(name))  # `read` verifies the checksum
        array = np.lib.format.read_array(member, allow_pickle=False)
        if array.dtype == np.dtype('V2'):  # how NumPy stores bfloat16
          array = array.view(ml_dtypes.bfloat16)
        arrays[name.removesuffix('.npy')] = array
  except OSError as error:
    raise ValueError(f'{path}: cannot be read ({error.strerror or error}).') from error
  except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, NotImplementedError, RuntimeError,
          SyntaxError, MemoryError, OverflowError, TypeError) as error:  # fmt: skip
    raise ValueError(f'{path}: damaged, or not an .npz file of plain arrays ({error}).') from error
  return arrays


def write_arrays(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
  """Writes an `.npz` file atomically: a file under the final name is always complete."""
  with storage.replacing(path) as partial, partial.open('wb') as file:
    np.savez(file, **arrays)  # with checksums, unlike .npy


def save_npz(
  model: ViT,
  params: dict,
  folder: pathlib.Path,
  preprocessing: Preprocessing,
  class_names: tuple[str, ...] | None,
) -> None:
  """Writes `model.npz`, and warns about preprocessing and class names that are not stored.

  Raises:
    ValueError: the format cannot hold the model.
  """
  p, lost = preprocessing, [f'{len(class_names)} class names'] if class_names else []
  if set(p.mean + p.std) != {0.5}:
    lost += [f'mean {p.mean}', f'std {p.std}']
  if (p.interpolation, p.crop, p.stretch) != ('bilinear', 1.0, True):
    lost += [f'{p.interpolation} interpolation, crop {p.crop:g}, stretch {p.stretch}']
  if lost:
    log.warning(
      'The npz format cannot store these values, which users of the file need: %s.', ', '.join(lost)
    )
  refuse('npz', model, HOLDS | {'pool': ('cls', 'gap', 'map', 'none')})
  if model.pool in ('gap', 'map'):  # on reading, a class token means pool='cls'
    refuse('npz', model, {'class_token': (None, False)})
  if computed := model.position == 'sincos':
    refuse('npz', model, {'position_grid': (None,)})
  without = model.has_class and model.position_prefix == 'none'
  big_vision = model.pool == 'map' or without or computed
  fields = {'depth': model.depth, 'resnet': model.resnet}
  if big_vision:
    rows = table(fields, NEWER, 'pos_embedding', prefix='params/')
  else:
    rows = table(fields, OLDER, 'Transformer/posembed_input/pos_embedding')
  write_arrays(folder / 'model.npz', write_params(rows, params))


def run_npz(loaded: Pretrained) -> str:
  """Returns Python code that prepares an image and applies the model with vit_jax."""
  p, channels = loaded.preprocessing, image_channels(loaded.params)
  grid = tuple(n // q for n, q in zip(p.size, loaded.model.patch_size))
  grids = f', grid={grid}, source_grid={grid}' if grid[0] != grid[1] else ''
  axes = '[..., None]' if channels == 1 else ''
  mean, std = (repr(list(values)) for values in (p.mean, p.std))
  show = f'print({"output.argmax()" if loaded.model.num_classes else "output"})'
  if loaded.multi_label:
    found = loaded.calibration
    thresholds = list(found.thresholds) if found.examples else [0.5]
    show = f'print(np.flatnonzero(1 / (1 + np.exp(-output)) >= np.array({thresholds})))'
  return f"""import numpy as np
from PIL import Image, ImageOps
import vit_jax

model, params = vit_jax.load('model.npz'{grids})
{prepare_lines(p, channels, p.size)}
pixels = (np.asarray(image, np.float32){axes} / 255 - {mean}) / {std}
output = model.apply({{'params': params}}, pixels[None].astype(np.float32))[0]
{show}"""
