"""Creates models by their published names, `make('B/16', num_classes=10)`, and checks models."""

import dataclasses

import jax
import jax.numpy as jnp

from vit_jax.model import resnet
from vit_jax.model.adapters import ADAPTED
from vit_jax.model.attention import ATTENTION
from vit_jax.model.encoder import REMAT
from vit_jax.model.layers import ACTIVATIONS, MLPS
from vit_jax.model.patching import as_size
from vit_jax.model.pooling import POOLS
from vit_jax.model.positions import POSITION_PREFIXES, POSITIONS
from vit_jax.model.vit import ViT, first_layer, last_layer
from vit_jax.names import check_positive, choose, pair

# Sources: paper, Table 1; for g and G, Zhai et al. 2021 (2106.04560), Table 2; for Ti and S,
# Touvron et al. 2020 (2012.12877), Table 1. The last three sizes are this project's own, for
# 32x32 images.
VARIANTS = {
  'Ti': dict(width=192, depth=12, num_heads=3, mlp_dim=768),
  'S': dict(width=384, depth=12, num_heads=6, mlp_dim=1536),
  'B': dict(width=768, depth=12, num_heads=12, mlp_dim=3072),
  'L': dict(width=1024, depth=24, num_heads=16, mlp_dim=4096),
  'H': dict(width=1280, depth=32, num_heads=16, mlp_dim=5120),
  'g': dict(width=1408, depth=40, num_heads=16, mlp_dim=6144),
  'G': dict(width=1664, depth=48, num_heads=16, mlp_dim=8192),
  'tiny': dict(width=48, depth=4, num_heads=4, mlp_dim=192, patch_size=4),
  'small': dict(width=256, depth=7, num_heads=4, mlp_dim=512, patch_size=4),
  'wide': dict(width=512, depth=8, num_heads=12, mlp_dim=3072, patch_size=4, head_dim=64),
}
# Hybrids (paper, Section 3.1): a ResNet's stages, then a ViT on its feature map. The patch size is
# in pixels of the image, not of the feature map. Published hybrids: R50+B/16, R50+L/32, R26+B/32,
# R26+S/32, R+Ti/32. R+Ti/32 was published under the name R+Ti/16. Its stem reduces the image by a
# factor of 4. A patch is 8x8 positions of the feature map, which are 32x32 pixels of the image.
VARIANTS |= {
  'R50+B': VARIANTS['B'] | dict(resnet=(3, 4, 9)),
  'R50+L': VARIANTS['L'] | dict(resnet=(3, 4, 6, 3)),
  'R26+B': VARIANTS['B'] | dict(resnet=(2, 2, 2, 2)),
  'R26+S': VARIANTS['S'] | dict(resnet=(2, 2, 2, 2)),
  'R+Ti': VARIANTS['Ti'] | dict(resnet=()),
}

SIZES = ('patch_size', 'width', 'depth', 'num_heads', 'mlp_dim')
ATTRIBUTES = tuple(f.name for f in dataclasses.fields(ViT) if f.name not in ('parent', 'name'))


def attributes(model: ViT) -> dict:
  """Returns the attributes of a model; `ViT(**attributes)` creates the same model."""
  return {name: getattr(model, name) for name in ATTRIBUTES}


def variant_of(model: ViT) -> str | None:
  """Returns the variant that has the sizes of a model, such as `B/16`; None if there is none."""
  height, width = pair(model.patch_size)
  own = attributes(model) | {'patch_size': height}
  for name, fields in VARIANTS.items():
    sizes = {'patch_size': height, 'head_dim': None, 'resnet': None} | fields
    if height == width and all(own[key] == value for key, value in sizes.items()):
      return name if 'patch_size' in fields else f'{name}/{height}'
  return None


def make(variant: str | None, num_classes: int | None, **overrides: object) -> ViT:
  """Returns a model of a published size, e.g. `make('B/16', num_classes=10, pool='gap')`.

  Args:
    variant: a name in `VARIANTS`, followed by a slash and the patch size (`B/16`). The patch size
      is optional if the variant defines one. The variant may be None if the overrides give every
      size.
    num_classes: width of the head; None for no head.
    **overrides: any attribute of `ViT`; None keeps the variant's value.

  Raises:
    ValueError: the sizes do not fit together, or a name is unknown: the variant, an attribute, or
      the value of an attribute such as `pool`. If a name is unknown, the message lists valid names.
  """
  fields = {'num_classes': num_classes} | (variant_fields(variant) if variant else {})
  for key, value in overrides.items():
    choose('model', key, ATTRIBUTES)
    if value is not None:
      fields[key] = value
  missing = [name for name in SIZES if name not in fields]
  if missing:
    hint = f'Write e.g. {variant}/16' if missing == ['patch_size'] else 'Give a variant'
    raise ValueError(
      f'model.variant={variant!r} does not define {", ".join(missing)}. {hint}, or set these keys.'
    )
  if isinstance(fields['patch_size'], int):
    fields['patch_size'] = (fields['patch_size'],) * 2
  fields['dtype'] = jnp.dtype(fields.get('dtype', jnp.float32))
  model = ViT(**fields)
  check_model(model)
  return model


def variant_fields(variant: str) -> dict:
  """Returns the attributes of `ViT` that a variant such as `B/16` stands for.

  Raises:
    ValueError: the variant is unknown.
  """
  if not isinstance(variant, str):
    raise ValueError(f'model.variant: expected a name such as B/16, got {variant!r}.')
  name, _, patch = variant.partition('/')
  fields = dict(choose('model.variant', name, VARIANTS))
  if patch and not (patch.isascii() and patch.isdigit()):
    raise ValueError(
      f'model.variant={variant!r}: expected a name like B/16, with the patch size in pixels.'
    )
  size = patch or fields.get('patch_size')
  return fields | ({'patch_size': (int(size),) * 2} if size else {})


def stretched(model: ViT, size: tuple[int, int], patch_size: tuple[int, int]) -> ViT:
  """Returns a model that uses the same parameters for images and patches of other sizes.

  The new model stretches positions to the grid of each image, and resizes the patch embedding.

  Args:
    model: the model.
    size: (height, width) of the images that the parameters of `model` are for.
    patch_size: (height, width) of the new patches.

  Raises:
    ValueError: the model is a hybrid, and the patch size differs from the model's.
  """
  grid = tuple(n // patch for n, patch in zip(size, model.patch_size))
  stored = model.embedding_size or model.patch_size
  found = model.clone(
    position_grid=model.position_grid or grid,
    patch_size=patch_size,
    embedding_size=None if patch_size == stored else stored,
  )
  check_model(found)
  return found


def check_model(model: ViT) -> None:
  """Raises ValueError if the model's sizes or choices are invalid."""
  for name, table in (
    ('pool', POOLS),
    ('position', POSITIONS),
    ('position_prefix', POSITION_PREFIXES),
    ('remat', REMAT),
    ('mlp', MLPS),
    ('activation', ACTIVATIONS),
    ('attention', ATTENTION),
  ):
    choose(f'model.{name}', getattr(model, name), table)
  check_sizes(model)
  check_patches(model)
  check_pool(model)
  POSITIONS[model.position].check(model)
  for name in ('dropout', 'attention_dropout', 'stochastic_depth'):
    if not 0 <= getattr(model, name) < 1:
      raise ValueError(f'model.{name} must be in [0, 1), got {getattr(model, name)}.')


def check_sizes(model: ViT) -> None:
  """Raises ValueError if a size is not positive, or num_heads does not divide the width."""
  sizes = ('width', 'depth', 'num_heads', 'mlp_dim', 'head_dim')
  for name in (*sizes, 'representation_size', 'projection'):
    if getattr(model, name) is not None:
      check_positive(f'model.{name}', getattr(model, name))
  if model.num_classes is not None:
    check_positive('num_classes', model.num_classes)
  if model.head_dim is None and model.width % model.num_heads:
    raise ValueError(
      f'model.width={model.width} is not divisible by model.num_heads={model.num_heads}. '
      'Change one of them, or set model.head_dim, the size of a head.'
    )


def check_patches(model: ViT) -> None:
  """Raises ValueError if the patch size, a grid of patches or the stem is invalid."""
  for name in ('patch_size', 'position_grid', 'rope_grid'):
    value = getattr(model, name)
    if value is not None and (len(value) != 2 or not all(type(n) is int and n > 0 for n in value)):
      raise ValueError(f'model.{name} must be two positive integers, got {value}.')
  if model.resnet is None:
    return
  if model.embedding_size not in (None, model.patch_size):
    raise ValueError(
      f'model.patch_size={model.patch_size}: the weights are for patches of '
      f'{as_size(model.embedding_size)} pixels. The patches of a hybrid (model.resnet) cannot be '
      'resized. Use the patch size of the weights.'
    )
  wrong_width = model.resnet_width < 1 or model.resnet_width % 32
  if any(type(n) is not int or n < 1 for n in model.resnet) or wrong_width:
    raise ValueError(
      f'model.resnet={model.resnet}, model.resnet_width={model.resnet_width}: expected a positive '
      'number of units for each stage, and a width that is a positive multiple of 32.'
    )
  stride = resnet.stem_stride(model.resnet)
  if any(size % stride for size in model.patch_size):
    raise ValueError(
      f'model.patch_size={model.patch_size} must be a multiple of {stride}, because the stem '
      f'model.resnet={model.resnet} reduces the image by this factor.'
    )


def check_pool(model: ViT) -> None:
  """Raises ValueError if the pool does not fit the tokens or the head of the model."""
  pool = POOLS[model.pool]
  if pool.class_token and not model.has_class:
    raise ValueError(
      f'model.pool={model.pool} reads the class token, but model.class_token is False. Set '
      'model.class_token=True or choose another pool.'
    )
  if pool.distills and model.cosine:
    raise ValueError(
      f'model.pool={model.pool} has two heads, each with its own input, so model.cosine is not '
      'supported. Set model.cosine=False or choose another pool.'
    )
  if model.num_registers < 0:
    raise ValueError(f'model.num_registers must not be negative, got {model.num_registers}.')
  if model.num_registers < pool.registers:
    raise ValueError(
      f'model.pool={model.pool} needs {pool.registers} register(s), got {model.num_registers}. Set '
      'model.num_registers.'
    )


def check_parameters(model: ViT, image_shape: tuple[int, int, int]) -> None:
  """Checks that `POSITIONS`, `POOLS` and `ADAPTED` list the parameters that a model creates.

  Other packages can add position embeddings, pools and MLPs, and can forget to list a parameter.

  Args:
    model: the model.
    image_shape: (H, W, C) of an input image.

  Raises:
    ValueError: the model does not fit the images, or a parameter is not listed. `POSITIONS` and
      `POOLS` must list the parameters of their entries. `ADAPTED` must list the layers of the MLP.
  """
  # All blocks have the same parameters. cuDNN is not tested yet.
  model = model.clone(depth=1, attention='plain')
  image_BHWC = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  shapes = lambda model: jax.eval_shape(model.init, jax.random.key(0), image_BHWC)['params']
  params, listed = shapes(model), {*first_layer(), *last_layer()}
  mlp = params['block_0']['mlp']
  layers = [name for name in mlp if 'kernel' in mlp[name] and name not in ADAPTED]
  if layers:
    raise ValueError(
      f'model.mlp={model.mlp} creates layers that are missing in vit_jax.model.ADAPTED: '
      f'{", ".join(layers)}. Add an entry {{name: n}} for each layer, where n is the '
      'number of input axes of its kernel (1 for an ordinary linear layer).'
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
