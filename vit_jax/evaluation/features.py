"""What a frozen backbone makes of each image, computed once.

Decisions:
  * Features are what the head takes: pooled, after the pre-logits layer where there is one, and
    float32, which holds what a bfloat16 backbone gives exactly.
  * A cache is found by a hash of all that features depend on: weights, preprocessing, the program
    that JAX makes of the backbone, and the pixels and labels themselves. Of streamed images it is
    the files and the code that decodes them. Whatever changes, another file is looked for.
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
from vit_jax.data import Examples, Split, eval_batches
from vit_jax.distributed import (
  batch_sharding,
  concatenate,
  from_first,
  is_first,
  replicated,
  to_host,
)
from vit_jax.experiment import Experiment
from vit_jax.weights import read_arrays, write_arrays

log = logging.getLogger(__name__)

FeatureStep = Callable[[dict[str, jax.Array], dict], jax.Array]


def make_feature_step(exp: Experiment, mesh: jax.sharding.Mesh) -> FeatureStep:
  """`(batch, params) -> feature_BD` of a batch of uint8 images, on every device."""

  def feature_step(batch, params):
    parts = exp.micro_batches(mesh, len(batch['mask']))
    return concatenate(functools.partial(extract, exp), mesh, parts)(batch, params)

  return jax.jit(feature_step, out_shardings=replicated(mesh))


def extract(exp: Experiment, batch: dict[str, jax.Array], params: dict) -> jax.Array:
  """The features `[B, D]` of a batch of uint8 images."""
  backbone = exp.model.clone(num_classes=None)
  feature_BD = backbone.apply({'params': params}, exp.normalize(batch['image']))
  return feature_BD.astype(jnp.float32)


@limits.memory_for('Feature extraction')
def compute(
  feature_step: FeatureStep,
  params: dict,
  examples: Split,
  batch_size: int,
  mesh: jax.sharding.Mesh,
) -> Examples:
  """The examples in their order, with features `[N, D]` in the place of images.

  Bad images that are to be skipped are left out.
  """
  batches = eval_batches(examples, batch_size, batch_sharding(mesh))
  count = math.ceil(len(examples) / batch_size)
  batches = progress.bar(batches, 'Computing features', 'batch', count)
  found = []
  for batch in batches:
    arrays = feature_step(batch, params), batch['label'], batch['mask']
    feature_BD, label_B, mask_B = to_host(arrays)
    found.append((feature_BD[mask_B > 0], label_B[mask_B > 0]))
  return Examples(*map(np.concatenate, zip(*found)))


def cached_features(
  exp: Experiment,
  feature_step: FeatureStep,
  params: dict,
  examples: Split,
  mesh: jax.sharding.Mesh,
  folder: pathlib.Path,
) -> Examples:
  """The examples with features in the place of images, read from `folder` or written there.

  Args:
    exp: whose backbone and preprocessing it is.
    feature_step: of the experiment.
    params: all of the model's, on the devices of the mesh.
    examples: uint8 images.
    mesh: of the devices.
    folder: of files `<key>.npz`.
  """
  path = folder / f'{key(exp, params, examples)}.npz'
  if (arrays := from_first(lambda: read_cache(path))) is not None:
    log.info('Features of %d examples from %s', len(arrays['label_N']), path)
    return Examples(arrays['feature_ND'], arrays['label_N'])
  log.info('Computing the features of %d examples ...', len(examples))
  found = compute(feature_step, params, examples, exp.config.eval_batch_size, mesh)
  if is_first():
    write_arrays(path, {'feature_ND': found.image_NHWC, 'label_N': found.label_N})
  return found


def read_cache(path: pathlib.Path) -> dict[str, np.ndarray] | None:
  """`feature_ND` and `label_N` of a file; None where there is none, or a damaged one."""
  if not path.exists():
    return None
  try:
    arrays = read_arrays(path)
    return {name: arrays[name] for name in ('feature_ND', 'label_N')}
  except (ValueError, KeyError) as error:
    log.warning('%s: its features are computed again.', error)
    return None


def traced(exp: Experiment, params: dict) -> str:
  """What `extract` computes of one image, on one device, and the version of JAX.

  Any change of its code shows here, whichever file it is in.
  """
  shape = (1, *exp.task.stored_size, exp.task.channels)
  arguments = {'image': jax.ShapeDtypeStruct(shape, np.uint8)}, jax.tree.map(abstract, params)
  lowered = jax.jit(functools.partial(extract, exp)).lower(*arguments)
  return f'{jax.__version__} {lowered.as_text()}'


def abstract(array: jax.Array | np.ndarray) -> jax.ShapeDtypeStruct:
  """Its shape and type, wherever it lies."""
  return jax.ShapeDtypeStruct(array.shape, array.dtype)


def key(exp: Experiment, params: dict, examples: Split) -> str:
  """A hash of all that the features depend on."""
  skip = ('num_classes', 'parent', 'name')  # the head, and what flax adds
  fields = [f.name for f in dataclasses.fields(exp.model) if f.name not in skip]
  model = {name: str(getattr(exp.model, name)) for name in fields}
  about = (traced(exp, params), model, sorted(exp.normalize.keywords.items()))
  digest = hashlib.sha256(repr(about).encode())
  backbone = {name: leaves for name, leaves in params.items() if name != 'head'}
  leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(backbone))
  for path, array in itertools.chain(leaves, examples.content()):
    digest.update(f'{path} {array.shape} {array.dtype}'.encode())
    digest.update(np.ascontiguousarray(array).data)
  return digest.hexdigest()[:32]
