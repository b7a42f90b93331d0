"""Loads published weights and adapts them to other patches, another grid and other classes.

    model, params = vit_jax.load('ViT-B_16.npz')

Decisions:
  * The file determines activation, epsilon and pooling of the model. If the format does not store
    one of these, the model uses the value of the code base that defined the format.
  * If the number of classes changes, a new head replaces the file's head and its pre-logits layer.
    In the paper, these two layers together are the head for pre-training (Section 3.1), and
    fine-tuning removes them (Section 3.2).
"""

from collections.abc import Sequence
import dataclasses
import logging
import math
import pathlib
import re

import numpy as np

from vit_jax.model import (
  POOLS,
  POSITIONS,
  ViT,
  check_model,
  pooled,
  resize_embedding,
  without_pool,
)
from vit_jax.names import SHOWN, check_positive, choose, pair
from vit_jax.weights import formats, layouts, reader
from vit_jax.weights.formats import Pretrained, Weights

log = logging.getLogger(__name__)

USUAL_SIZE = 224  # pixels; image size of models whose weights do not tell it


@dataclasses.dataclass(frozen=True)
class Adaptation:
  """Changes that `adapt` makes to a model; `load` documents the attributes except `new_head`.

  If `new_head` is True, the head is replaced even if it already has the right number of classes.
  """

  grid: tuple[int, int] | None = None
  source_grid: tuple[int, int] | None = None
  patch_size: int | tuple[int, int] | None = None
  num_classes: int | None = None
  resize: str = 'bilinear'
  new_head: bool = False


def load(
  path: str | pathlib.Path,
  *,
  grid: tuple[int, int] | None = None,
  source_grid: tuple[int, int] | None = None,
  patch_size: int | tuple[int, int] | None = None,
  num_classes: int | None = None,
  resize: str = 'bilinear',
  features: str = 'tokens',
) -> Pretrained:
  """Loads a model and its weights from a file, a folder, a workdir or the Hugging Face Hub.

  Args:
    path: `ViT-B_16.npz`; a folder with `config.json` and safetensors (Hugging Face, timm); a
      workdir or one of its checkpoints; or `organisation/name` on the Hub.
    grid: number of patches (down, across) of your images; None for the grid that the file expects.
    source_grid: number of patches (down, across) that the file's position embeddings are for. None
      for the grid in the file. If the file stores no grid (npz), None selects a square grid. If
      the number of patches is not a square number, None selects `grid`.
    patch_size: height and width of a patch in pixels. If the file has a different patch size, the
      patch embedding is resized (`model/patching.py`). None for the patch size of the file.
    num_classes: number of classes of the head; None keeps the file's head. If the file has no head,
      or a head for a different number of classes, the model gets a linear head of zeros. This
      new head also replaces the pre-logits layer and the projection.
    resize: how position embeddings are resized to another grid, one of `positions.RESIZES`.
    features: output of a model without a head. `tokens` gives the normalised tokens `[B, N, D]`.
      `pooled` gives one vector for each image `[B, D]`, after the projection if the model has one.

  Raises:
    ValueError: the path does not exist, the file is damaged or holds pickled objects, the weights
      contradict their config, or the grid does not fit. The message names the reason.
  """
  wanted = Adaptation(grid, source_grid, patch_size, num_classes, resize)
  loaded = adapt(reader.read_weights(path), wanted)
  function = choose('features', features, FEATURES)
  return function(loaded) if loaded.model.num_classes is None else loaded


def adapt(source: Weights, to: Adaptation = Adaptation()) -> Pretrained:
  """Returns the model and the weights of a file, adapted to a patch size, a grid and classes.

  Args:
    source: contents of the file.
    to: the wanted patch size, grid and number of classes; each None keeps the value of the file.

  Raises:
    ValueError: the arrays do not match the model, or the grid or patch size does not fit them.
  """
  num_classes = to.num_classes
  if num_classes is not None:
    check_positive('num_classes', num_classes)
  model = ViT(**source.fields)
  check_model(model)
  own_grid = find_grid(source, model, to)
  own_size = tuple(n * p for n, p in zip(own_grid, model.patch_size))
  wanted = layouts.param_shapes(model, (*own_size, source.channels))
  params, ignored = formats.read_params(source, wanted)

  patch = model.patch_size if to.patch_size is None else pair(to.patch_size, 'patch_size')
  # A hybrid must keep its patch size. The kernel of its embedding reads the stem's feature map, so
  # it is smaller than a patch, and cannot be resized.
  if patch != model.patch_size:
    model, params = with_patches(model, params, patch)
  grid = grid_in(own_size, model, source.origin) if to.grid is None else to.grid
  size = tuple(n * p for n, p in zip(check_grid('grid', grid), model.patch_size))
  resized = {name: f for name, f in POSITIONS[model.position].params.items() if f is not None}
  for name, function in resized.items():
    if name in params:
      params[name] = function(params[name], model, own_grid, tuple(grid), to.resize)
      model = model.clone(learned_grid=tuple(grid))
  if not resized and tuple(grid) != own_grid:
    model = model.clone(position_grid=model.position_grid or own_grid)
  class_names = source.class_names
  if to.new_head or num_classes not in (None, model.num_classes):
    # The pool of the file's model may return all tokens, but a head needs a single vector.
    old = dict(representation_size=None, projection=None, examples=None, cosine=False)
    model = pooled(model.clone(num_classes=num_classes, **old))
    params, dropped = without(params, ('pre_logits', 'projection', 'head'))
    ignored, class_names = ignored + dropped, None
  if num_classes is not None and 'head' not in params:
    shapes = layouts.param_shapes(model, (*size, source.channels))
    params['head'] = {
      leaf: np.zeros(shapes[f'head/{leaf}'], np.float32) for leaf in ('kernel', 'bias')
    }
  if ignored:
    log.info('%s: arrays not used: %s', source.origin, listed(ignored))
  preprocessing = dataclasses.replace(source.preprocessing, size=size)
  facts = dict(run=source.run, multi_label=source.multi_label)
  return Pretrained(model, params, preprocessing, class_names, ignored, **facts)


def as_tokens(loaded: Pretrained) -> Pretrained:
  """Returns a copy of `loaded` whose model returns normalised tokens `[B, N, D]`."""
  model = loaded.model
  params, dropped = without(loaded.params, (*POOLS[model.pool].params, 'pre_logits', 'projection'))
  if dropped:
    log.info('Arrays not used: %s', ', '.join(dropped))
  ignored = loaded.ignored + dropped
  return dataclasses.replace(loaded, model=without_pool(model), params=params, ignored=ignored)


def with_pooling(loaded: Pretrained) -> Pretrained:
  """Returns a copy of `loaded` whose model gives one vector for each image (see `pooled`)."""
  return dataclasses.replace(loaded, model=pooled(loaded.model))


FEATURES = {'tokens': as_tokens, 'pooled': with_pooling}


def listed(names: Sequence[str]) -> str:
  """Returns a text that lists arrays by name. A module with many arrays is listed as one entry."""
  modules = {}
  for name in names:
    modules.setdefault(re.split('[./]', name)[0], []).append(name)
  return ', '.join(
    f'{module} ({len(inside)} arrays)' if len(inside) > SHOWN else ', '.join(inside)
    for module, inside in modules.items()
  )


def headless(loaded: Pretrained) -> Pretrained:
  """Returns a copy of `loaded` without a head: its model returns pooled features `[B, D]`."""
  loaded = dataclasses.replace(loaded, model=pooled(loaded.model))
  params, dropped = without(loaded.params, ('pre_logits', 'head'))
  model = loaded.model.clone(num_classes=None, representation_size=None, examples=None)
  ignored = loaded.ignored + dropped
  return dataclasses.replace(loaded, model=model, params=params, class_names=None, ignored=ignored)


def without(params: dict, names: Sequence[str]) -> tuple[dict, tuple[str, ...]]:
  """Returns the parameters without the top-level keys in `names`, and the removed arrays' paths."""
  dropped = layouts.flatten_params({name: params[name] for name in names if name in params})
  return {name: leaf for name, leaf in params.items() if name not in names}, tuple(dropped)


def with_patches(model: ViT, params: dict, patch_size: tuple[int, int]) -> tuple[ViT, dict]:
  """Returns the model for another patch size, and its parameters with a resized patch embedding.

  Raises:
    ValueError: the model is a hybrid, whose patches come from a feature map.
  """
  resized = model.clone(patch_size=patch_size, embedding_size=model.patch_size)
  check_model(resized)
  kernel = resize_embedding(params['embedding']['kernel'], patch_size)
  params = params | {'embedding': params['embedding'] | {'kernel': kernel}}
  return resized.clone(embedding_size=None), params


def grid_in(size: tuple[int, int], model: ViT, origin: str) -> tuple[int, int]:
  """Returns the number of patches (down, across) in images of size (height, width).

  Raises:
    ValueError: the images do not divide into patches.
  """
  p, q = model.patch_size
  if size[0] % p or size[1] % q:
    raise ValueError(
      f'{origin}: images of {size[0]}x{size[1]} pixels do not divide into patches of {p}x{q}. Pass '
      'grid=(patches down, patches across), or a different patch_size.'
    )
  return size[0] // p, size[1] // q


def find_grid(source: Weights, model: ViT, to: Adaptation) -> tuple[int, int]:
  """Returns the grid (down, across) that a file's position embeddings are for.

  Raises:
    ValueError: the number of positions does not fit `to.source_grid` or the grid in the file. Or
      both are None, and the number does not fit `to.grid` and is not a square number.
  """
  found = [
    array
    for row in source.rows
    if row.ours == ('pos_embedding',) and (array := source.arrays.get(row.theirs[0])) is not None
  ]
  grid = to.grid
  if not found:  # nothing to resize; `read_params` reports positions that are missing
    usual = tuple(max(USUAL_SIZE // p, 1) for p in model.patch_size)
    return source.grid or check_grid('grid', grid or usual)
  if found[0].ndim not in (2, 3):
    raise ValueError(
      f'{source.origin}: positions have shape {found[0].shape}, expected 2 or 3 axes.'
    )
  patches = found[0].shape[-2] - model.num_positions
  for name, given in (('source_grid', to.source_grid), ("the config's grid", source.grid)):
    if given is None:
      continue
    given = check_grid(name, given)
    if math.prod(given) != patches:
      raise ValueError(
        f'{source.origin}: {name} {given} has {math.prod(given)} patches, but the file has '
        f'positions for {patches} patches (plus {model.num_positions} for other tokens).'
      )
    return given
  if square := square_grid(patches):  # even if `grid` has as many patches: most files are square
    return square
  if grid is not None and math.prod(check_grid('grid', grid)) == patches:
    return check_grid('grid', grid)
  raise ValueError(
    f'{source.origin}: the file has positions for {patches} patches, which do not form a square '
    'grid. Pass source_grid=(patches down, patches across). On the command line, set '
    '--config.data.image_size to the (height, width) that the file was trained with.'
  )


def check_grid(name: str, grid: tuple[int, int]) -> tuple[int, int]:
  """Checks a grid, and returns it as a tuple (patches down, patches across).

  Raises:
    ValueError: the grid is not two positive integers.
  """
  grid = tuple(grid) if isinstance(grid, (tuple, list)) else grid
  if not (
    isinstance(grid, tuple) and len(grid) == 2 and all(isinstance(n, int) and n > 0 for n in grid)
  ):
    raise ValueError(f'{name}: expected a tuple (patches down, patches across), got {grid!r}.')
  return grid


def square_grid(count: int) -> tuple[int, int] | None:
  """Returns the square grid of `count` patches, or None if `count` is not a square number."""
  side = math.isqrt(max(count, 0))
  return (side, side) if side and side * side == count else None


def check_params(model: ViT, params: dict, size: tuple[int, int], origin: object) -> None:
  """Raises ValueError if parameters do not have the names and shapes of the model.

  `size` is the (height, width) of the images, and `origin` begins the message.
  """
  image_shape = (*size, layouts.image_channels(params))
  compare_shapes(layouts.param_shapes(model, image_shape), layouts.shapes_of(params), origin)


def compare_shapes(wanted: dict, given: dict, origin: object) -> None:
  """Raises ValueError if two sets of named shapes differ; the message lists the differences."""
  differences = [
    f'  {name}: {given.get(name, "missing")} in the weights, '
    f'{wanted.get(name, "missing")} in the model'
    for name in sorted(wanted | given)
    if wanted.get(name) != given.get(name)
  ]
  if differences:
    shown = '\n'.join(differences[:10] + ['  ...'] * (len(differences) > 10))
    raise ValueError(f'{origin}: the weights do not fit the requested model:\n{shown}')
