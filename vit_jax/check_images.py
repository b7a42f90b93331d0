"""Checks whether the images of a config fit its model."""

import itertools

from ml_collections import ConfigDict

from vit_jax.model import ViT
from vit_jax.optim import image_stages


def check_channels(config: ConfigDict, channels: int) -> None:
  """Raises ValueError if `data.mean` or `data.std` does not fit images with these channels."""
  for name in ('mean', 'std'):
    values = config.data[name]
    if len(values) not in (1, channels) or (name == 'std' and min(values) <= 0):
      counts = '1 value' if channels == 1 else f'1 or {channels} values'
      raise ValueError(
        f'data.{name}={values}: expected {counts}{" above 0" if name == "std" else ""}, because '
        f'the images have {channels} channel(s).'
      )


def check_stages(config: ConfigDict, model: ViT) -> None:
  """Raises ValueError if images of a size that training uses do not divide into its patches."""
  (p, q), stages = model.patch_size, image_stages(config, 0)
  for _, (height, width) in stages:
    if height % p or width % q:
      raise ValueError(
        f'progressive.sizes: images of {height}x{width} pixels do not divide into patches of '
        f'{p}x{q}.'
      )
  check_patch_sizes(config, model)


def check_patch_sizes(config: ConfigDict, model: ViT) -> None:
  """Raises ValueError if a step cannot use each of `patch_sizes`, or nothing would draw them."""
  sizes = config.patch_sizes
  if not sizes:
    return
  name = f'patch_sizes={tuple(sizes)}'
  if len(set(sizes)) < len(sizes) or not all(type(size) is int and size > 0 for size in sizes):
    raise ValueError(f'{name}: expected distinct positive numbers of pixels.')
  for size, (_, image) in itertools.product(sizes, image_stages(config, 0)):
    if any(n % size for n in image):
      raise ValueError(
        f'{name}: images of {image[0]}x{image[1]} pixels do not divide into patches of '
        f'{size}x{size}. Remove this patch size, or change data.image_size or progressive.sizes.'
      )
  for key in ('freeze', 'classifier'):
    if config[key]:
      raise ValueError(
        f'{name} cannot be combined with {key}={config[key]}, because the features are computed '
        'once, with one patch size. Remove one of them.'
      )
  if model.resnet is not None:
    raise ValueError(
      f'{name}: the patches of a hybrid come from the feature map of its stem, '
      f'model.resnet={model.resnet}, so they have only one size. Choose a model without a stem.'
    )
