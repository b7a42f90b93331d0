"""Computes the features of a frozen backbone once, and caches them in files.

Decisions:
  * Features are the input of the head: the pooled tokens, after the pre-logits layer if the model
    has one.
  * If the model scales the input of the head to length 1 (`cosine`), the features have length 1.
  * Features are float32, which also represents the output of a bfloat16 backbone exactly.
  * The name of a cache file is a hash of everything that features depend on, so any change leads
    to a new file. The hash covers the weights, the preprocessing, the program that JAX traces, the
    pixels and the labels.
  * If images are decoded for each batch (`data.cache=stream`), the hash covers the bytes of the
    image files and the decoding code instead of the pixels.
"""

from collections.abc import Callable
import dataclasses
import functools
import hashlib
import itertools
import logging
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import limits, progress
from vit_jax.data import Features, Split, eval_batches
from vit_jax.distributed import (
  batch_sharding,
  concatenate,
  from_first,
  is_first,
  replicated,
  to_host,
)
from vit_jax.experiment import Experiment
from vit_jax.model import unit
from vit_jax.weights import read_arrays, write_arrays

log = logging.getLogger(__name__)

FeatureStep = Callable[[dict[str, jax.Array], dict], jax.Array]


def make_feature_step(exp: Experiment, mesh: jax.sharding.Mesh) -> FeatureStep:
  """Returns a compiled function that computes features: `(batch, params) -> feature_BD`.

  `batch['image']` contains uint8 images `[B, H, W, C]`.
  """

  def build(parts):
    function = concatenate(functools.partial(extract, exp), mesh, parts)
    return jax.jit(function, out_shardings=replicated(mesh))

  return exp.fitted(build, mesh)


def extract(exp: Experiment, batch: dict[str, jax.Array], params: dict) -> jax.Array:
  """Computes the features of the uint8 images `batch['image']`: float32 `[B, D]`."""
  backbone = exp.model.clone(num_classes=None)
  feature_BD = backbone.apply({'params': params}, exp.normalize(batch['image']))
  feature_BD = feature_BD.astype(jnp.float32)
  return unit(feature_BD) if exp.model.cosine else feature_BD


@limits.memory_for('Feature extraction')
def compute_features(
  feature_step: FeatureStep,
  params: dict,
  examples: Split,
  batch_size: int,
  mesh: jax.sharding.Mesh,
) -> Features:
  """Computes the features of all examples of a split, in order.

  Args:
    feature_step: the function from `make_feature_step`.
    params: the model's parameters, on the devices of the mesh.
    examples: the split.
    batch_size: number of examples per batch.
    mesh: the devices.

  Returns:
    The features with the labels. Bad images are skipped, so they have no row.
  """
  batches = eval_batches(examples, batch_size, batch_sharding(mesh))
  count = math.ceil(len(examples) / batch_size)
  batches = progress.bar(batches, 'Computing features', 'batch', count)
  found = []
  for batch in batches:
    arrays = feature_step(batch, params), batch['label'], batch['mask']
    feature_BD, label_B, mask_B = to_host(arrays)
    found.append((feature_BD[mask_B > 0], label_B[mask_B > 0]))
  return Features(*map(np.concatenate, zip(*found)))


def cached_features(
  exp: Experiment,
  feature_step: FeatureStep,
  params: dict,
  examples: Split,
  mesh: jax.sharding.Mesh,
  folder: pathlib.Path,
) -> Features:
  """Returns the features of a split; computes them only if the cache does not contain them.

  Args:
    exp: the experiment that defines the backbone and the preprocessing.
    feature_step: the function from `make_feature_step`.
    params: all parameters of the model, on the devices of the mesh.
    examples: a split with uint8 images.
    mesh: the devices.
    folder: folder of the cache files `<key>.npz`. New features are written to this folder.
  """
  path = folder / f'{key(exp, params, examples)}.npz'
  if (arrays := from_first(lambda: read_cache(path))) is not None:
    log.info('Read the features of %d examples from %s', len(arrays['label_N']), path)
    return Features(arrays['feature_ND'], arrays['label_N'])
  log.info('Computing the features of %d examples ...', len(examples))
  found = compute_features(feature_step, params, examples, exp.config.eval_batch_size, mesh)
  if is_first():
    write_arrays(path, {'feature_ND': found.feature_ND, 'label_N': found.label_N})
  return found


def read_cache(path: pathlib.Path) -> dict[str, np.ndarray] | None:
  """Reads a cache file: returns a dict with the arrays `feature_ND` and `label_N`.

  The result is None if the file is missing or damaged.
  """
  if not path.exists():
    return None
  try:
    arrays = read_arrays(path)
    return {name: arrays[name] for name in ('feature_ND', 'label_N')}
  except (ValueError, KeyError) as error:
    log.warning('The features are computed again, because their cache file is damaged: %s', error)
    return None


def traced(exp: Experiment, params: dict) -> str:
  """Returns JAX's version and the traced program of `extract` as text, for the cache key.

  The program is traced for one image on one device. If an edit of any source file changes how
  features are computed from uint8 images, this text also changes.
  """
  shape = (1, *exp.task.stored_size, exp.task.channels)
  arguments = {'image': jax.ShapeDtypeStruct(shape, np.uint8)}, jax.tree.map(abstract, params)
  lowered = jax.jit(functools.partial(extract, exp)).lower(*arguments)
  return f'{jax.__version__} {lowered.as_text()}'


def abstract(array: jax.Array | np.ndarray) -> jax.ShapeDtypeStruct:
  """Returns the shape and type of an array, which is enough to trace a function."""
  return jax.ShapeDtypeStruct(array.shape, array.dtype)


def key(exp: Experiment, params: dict, examples: Split) -> str:
  """Returns a hash of everything that the features depend on, as 32 hexadecimal digits."""
  # Skip attributes of the head, Flax's own attributes, and `learned_grid`, which only serves to
  # check the image size.
  skip = ('num_classes', 'examples', 'learned_grid', 'parent', 'name')
  fields = [f.name for f in dataclasses.fields(exp.model) if f.name not in skip]
  model = {name: str(getattr(exp.model, name)) for name in fields}
  about = (traced(exp, params), model, sorted(exp.normalize.keywords.items()))
  digest = hashlib.sha256(repr(about).encode())
  backbone = {name: leaves for name, leaves in params.items() if name != 'head'}
  leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(backbone))
  for path, array in itertools.chain(leaves, examples.content()):
    text = f'{path} {array.shape} {array.dtype}'  # the path of a file can contain invalid UTF-8
    digest.update(text.encode(errors='surrogateescape'))
    digest.update(np.ascontiguousarray(array).data)
  return digest.hexdigest()[:32]
