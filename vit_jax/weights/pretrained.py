"""Published weights, for the grid and the classes wanted.

    model, params = vit_jax.load('ViT-B_16.npz')

Decisions:
  * The file decides the model: its activation, epsilon, pooling. Where a format does not say, its
    code base does.
  * A new head takes the place of the pre-logits layer too: the paper's head for pre-training is
    both (Section 3.1), and fine-tuning removes all of it (Section 3.2).
"""

from collections.abc import Sequence
import dataclasses
import logging
import math
import pathlib

import numpy as np

from vit_jax.model import POOLS, POSITIONS, ViT, check_model, pooled
from vit_jax.weights import formats, layouts, reader
from vit_jax.weights.formats import Pretrained, Weights

log = logging.getLogger(__name__)


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
  loaded = adapt(reader.read_weights(path), grid, source_grid, num_classes, resize)
  return as_tokens(loaded) if loaded.model.num_classes is None else loaded


def adapt(
  source: Weights,
  grid: tuple[int, int] | None = None,
  source_grid: tuple[int, int] | None = None,
  num_classes: int | None = None,
  resize: str = 'bilinear',
  new_head: bool = False,
) -> Pretrained:
  """The model of a file, for the grid and the classes wanted; see `load`.

  Args:
    source: what was read.
    grid: see `load`.
    source_grid: see `load`.
    num_classes: see `load`.
    resize: see `load`.
    new_head: whether the head is new even if it has as many classes as the file's.
  """
  if num_classes is not None and num_classes < 1:
    raise ValueError(f'num_classes must be positive, got {num_classes}.')
  model = ViT(**source.fields)
  check_model(model)
  own_grid = find_grid(source, model, grid, source_grid)
  grid = own_grid if grid is None else check_grid('grid', grid)
  own_size, size = ([n * p for n, p in zip(g, model.patch_size)] for g in (own_grid, grid))
  wanted = layouts.param_shapes(model, (*own_size, source.channels))
  params, ignored = formats.read_params(source, wanted)

  for name, function in POSITIONS[model.position].params.items():
    if function is not None and name in params:
      params[name] = function(params[name], model, own_grid, grid, resize)
  class_names = source.class_names
  if new_head or num_classes not in (None, model.num_classes):
    # The file may leave the pool open.
    model = pooled(model.clone(num_classes=num_classes, representation_size=None))
    params, dropped = without(params, ('pre_logits', 'head'))
    ignored, class_names = ignored + dropped, None
  if num_classes is not None and 'head' not in params:
    shapes = layouts.param_shapes(model, (*size, source.channels))
    params['head'] = {
      leaf: np.zeros(shapes[f'head/{leaf}'], np.float32) for leaf in ('kernel', 'bias')
    }
  if ignored:
    log.info('%s: not used: %s', source.origin, ', '.join(ignored))
  preprocessing = dataclasses.replace(source.preprocessing, size=tuple(size))
  return Pretrained(model, params, preprocessing, class_names, ignored, source.run)


def as_tokens(loaded: Pretrained) -> Pretrained:
  """The model without its pooling: it gives the normalised tokens `[B, N, D]`."""
  model = loaded.model
  params, dropped = without(loaded.params, (*POOLS[model.pool].params, 'pre_logits'))
  if dropped:
    log.info('Not used: %s', ', '.join(dropped))
  model = model.clone(pool='none', class_token=model.has_class, representation_size=None)
  ignored = loaded.ignored + dropped
  return dataclasses.replace(loaded, model=model, params=params, ignored=ignored)


def without(params: dict, names: Sequence[str]) -> tuple[dict, tuple[str, ...]]:
  """Parameters without these top-level ones, and the paths of what was left out."""
  dropped = layouts.flatten_params({name: params[name] for name in names if name in params})
  return {name: leaf for name, leaf in params.items() if name not in names}, tuple(dropped)


def find_grid(
  source: Weights,
  model: ViT,
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
  if square_grid(patches) is None:
    raise ValueError(
      f'{source.origin} has positions for {patches} patches, which is no square: say '
      'source_grid=(h, w), the patches down and across, or on the command line '
      "--config.data.image_size, the file's own (height, width)."
    )
  return square_grid(patches)


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


def square_grid(count: int) -> tuple[int, int] | None:
  """The square grid of `count` patches; None where there is none."""
  side = math.isqrt(max(count, 0))
  return (side, side) if side and side * side == count else None


def check_params(model: ViT, params: dict, size: tuple[int, int], origin: object) -> None:
  """Raises ValueError where parameters don't have the names and shapes of the model."""
  image_shape = (*size, layouts.image_channels(params))
  compare_shapes(layouts.param_shapes(model, image_shape), layouts.shapes_of(params), origin)


def compare_shapes(wanted: dict, given: dict, origin: object) -> None:
  """Raises ValueError where two sets of named shapes differ, listing where."""
  differences = [
    f'  {name}: {given.get(name, "missing")} there, {wanted.get(name, "none")} in the model'
    for name in sorted(wanted | given)
    if wanted.get(name) != given.get(name)
  ]
  if differences:
    shown = '\n'.join(differences[:10] + ['  ...'] * (len(differences) > 10))
    raise ValueError(f'{origin}: its weights are not those of the model asked for:\n{shown}')
