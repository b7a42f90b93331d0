"""Checks that the tables list all parameters that positions, pools and MLPs create."""

import jax
import jax.numpy as jnp

from vit_jax.model.adapters import ADAPTED
from vit_jax.model.vit import ViT, first_layer, last_layer


def check_parameters(model: ViT, image_shape: tuple[int, int, int]) -> None:
  """Checks that `POSITIONS`, `POOLS` and `ADAPTED` list the parameters that these parts create.

  Raises:
    ValueError: the model does not fit the images. Or a position embedding or pooling creates a
      parameter that its registry entry does not list. Or `ADAPTED` lacks a layer of the MLP.
  """
  model = model.clone(depth=1)  # all blocks have the same parameters
  image_BHWC = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  shapes = lambda model: jax.eval_shape(model.init, jax.random.key(0), image_BHWC)['params']
  params, listed = shapes(model), {*first_layer(), *last_layer()}
  mlp = params['block_0']['mlp']
  layers = [name for name in mlp if 'kernel' in mlp[name] and name not in ADAPTED]
  if layers:
    raise ValueError(
      f'model.mlp={model.mlp} creates layers that no table lists: {", ".join(layers)}. Add them to '
      'ADAPTED of vit_jax.model, with the number of axes of their inputs: 1.'
    )
  unlisted = [n for n in params if n not in listed and not n.startswith('block_')]
  if not unlisted:
    return
  before = shapes(model.clone(pool='none', class_token=model.has_class))
  if of_position := [name for name in unlisted if name in before]:
    kind, given, entry = 'position', of_position, 'params={...} of the Position in POSITIONS'
  else:
    kind, given, entry = 'pool', unlisted, 'params=(...) of the Pool in POOLS'
  name = getattr(model, kind)
  raise ValueError(
    f'model.{kind}={name} creates parameters that its registry entry lacks: {", ".join(given)}. '
    f'Add them to {entry}[{name!r}].'
  )
