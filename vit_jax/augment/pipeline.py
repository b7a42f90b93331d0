"""Applies augmentation, mixing, resizing and normalisation to image batches on the device.

Decisions:
  * An augmentation is a pure function `(key_B, image_BHWC, **arguments) -> image_BHWC` on
    uint8 images. Each example has its own random key, so its augmentation does not depend on other
    examples.
  * The table `AUGMENTATIONS` defines the order of the augmentations. It also names, for each
    augmentation, the argument that can disable the augmentation. All augmentations are disabled by
    default.
  * Mixing comes last. The first and second example of the batch are a pair, the third and fourth
    are the next pair, and so on. The pairs are random, because the order of the data is random. If
    each device holds an even number of examples in each micro-batch, no pair is split between
    devices or micro-batches.
  * Every augmentation returns uint8 images, and so does mixing. Mixing therefore rounds its result,
    which changes channel values by less than 1 on the scale from 0 to 255.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vit_jax.augment import crops
from vit_jax.augment.mixing import mix
from vit_jax.augment.randaugment import rand_augment, trivial_augment
from vit_jax.model import Padded


class Augmentation(NamedTuple):
  """One augmentation, as an entry of the table `AUGMENTATIONS`.

  Attributes:
    function: `(key_B, image_BHWC, **arguments) -> image_BHWC`.
    switch: name of the argument that can disable the augmentation.
    off: the value of the argument `switch` that disables the augmentation.
    strong: whether the augmentation is disabled in the last part of a run. The config key
      `augment.off_for_last` gives the length of this part, as a fraction of the run.
  """

  function: Callable[..., jax.Array]
  switch: str
  off: float
  strong: bool

  def on(self, arguments: Mapping) -> bool:
    return arguments[self.switch] != self.off


# In order of application. Add new augmentations at the end, because the random draws of an
# augmentation depend on its position.
AUGMENTATIONS = {
  'pad_crop': Augmentation(crops.pad_crop, 'padding', 0, strong=False),
  'flip': Augmentation(crops.flip, 'probability', 0, strong=False),
  'resized_crop': Augmentation(crops.resized_crop, 'min_area', 1, strong=False),
  'rand_augment': Augmentation(rand_augment, 'num_layers', 0, strong=True),
  'trivial_augment': Augmentation(trivial_augment, 'probability', 0, strong=True),
  'erasing': Augmentation(crops.erasing, 'probability', 0, strong=True),
}
MIX_PLACE = 1000  # used as the position of `mix`, which is not in `AUGMENTATIONS`


def active(arguments: Mapping[str, Mapping]) -> list[str]:
  """Returns the names of the enabled augmentations in order of application.

  If mixing is enabled, `mix` is the last name. `arguments` maps the name of each augmentation, and
  the name `mix`, to keyword arguments.
  """
  names = [name for name, entry in AUGMENTATIONS.items() if entry.on(arguments[name])]
  return names + ['mix'] * mixes(arguments)


def mixes(arguments: Mapping[str, Mapping]) -> bool:
  """Returns whether mixup or cutmix is enabled; `arguments` is {name: keyword arguments}."""
  return arguments['mix']['probability'] != 0


def augment(
  key: jax.Array,
  example_B: jax.Array,
  image_BHWC: jax.Array,
  arguments: Mapping[str, Mapping],
  strong: bool | None = None,
) -> jax.Array:
  """Augments images with all enabled `AUGMENTATIONS`, but does not mix images.

  Args:
    key: random key of the training step.
    example_B: row number of each image in the global batch. The random draws depend on this number.
    image_BHWC: uint8 images; the result has the same shape and type.
    arguments: {name of an augmentation: its keyword arguments}. The arguments also decide which
      augmentations are enabled (`Augmentation.on`).
    strong: True: apply only strong augmentations (`Augmentation.strong`); False: apply only
      augmentations that are not strong; None: apply all augmentations.
  """
  for i, (name, entry) in enumerate(AUGMENTATIONS.items()):
    if strong in (None, entry.strong) and entry.on(arguments[name]):
      image_BHWC = entry.function(keys(key, i, example_B), image_BHWC, **arguments[name])
  return image_BHWC


def keys(key: jax.Array, place: int, example_B: jax.Array) -> jax.Array:
  """Returns one random key per example, for the augmentation at position `place`.

  `key` is the random key of the training step. `example_B` is the row number of each example in the
  global batch. `place` is a position in `AUGMENTATIONS`, or `MIX_PLACE` for mixing.
  """
  step_key = jax.random.fold_in(key, place)
  return jax.vmap(lambda example: jax.random.fold_in(step_key, example))(example_B)


def augment_and_mix(
  key: jax.Array,
  example_B: jax.Array,
  image_BHWC: jax.Array,
  arguments: Mapping[str, Mapping],
  early: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Augments and mixes the images of a micro-batch for a training step.

  Args:
    key: random key of the training step.
    example_B: row number of each image in the global batch. The two images of a pair that is mixed
      have neighbouring rows.
    image_BHWC: uint8 images.
    arguments: {name: keyword arguments} for each name in `AUGMENTATIONS`, and for `mix`.
    early: bool scalar, False in the last part of a run. False disables mixing and strong
      augmentations, and True enables them. None: the run never disables them.

  Returns:
    image_BHWC: the augmented uint8 images.
    own_B: weight of each image's own label, float. The label of the image that was mixed in has the
      weight `1 - own_B`.
  """

  def strongly(image_BHWC):
    image_BHWC = augment(key, example_B, image_BHWC, arguments, strong=True)
    if not mixes(arguments):
      return image_BHWC, jnp.ones(len(image_BHWC))
    return mix(keys(key, MIX_PLACE, example_B), image_BHWC, **arguments['mix'])

  image_BHWC = augment(key, example_B, image_BHWC, arguments, strong=False)
  if early is None:
    return strongly(image_BHWC)
  weakly = lambda image_BHWC: (image_BHWC, jnp.ones(len(image_BHWC)))
  return jax.lax.cond(early, strongly, weakly, image_BHWC)


def normalize(
  image_BHWC: jax.Array | Padded,
  size: tuple[int, int],
  mean: Sequence[float],
  std: Sequence[float],
) -> jax.Array | Padded:
  """Converts uint8 images to model inputs: float32, resized to `size` (bicubic), normalised.

  Normalisation scales pixels to [0, 1], subtracts `mean`, and divides by `std`. `Padded` images,
  which can have different shapes, are normalised but not resized.

  Args:
    image_BHWC: uint8 images, or `Padded` with uint8 patches.
    size: (height, width) of the model's input.
    mean: numbers to subtract, with pixels in [0, 1]: one for each channel, or one for all.
    std: numbers to divide by, with pixels in [0, 1]: one for each channel, or one for all.
  """
  if isinstance(image_BHWC, Padded):
    patch_BNpqC = image_BHWC.patch_BNpqC.astype(jnp.float32) / 255
    return image_BHWC.replace(patch_BNpqC=(patch_BNpqC - jnp.asarray(mean)) / jnp.asarray(std))
  batch, height, width, channels = image_BHWC.shape
  image_BHWC = image_BHWC.astype(jnp.float32) / 255
  if (height, width) != tuple(size):
    image_BHWC = jax.image.resize(image_BHWC, (batch, *size, channels), 'cubic')
  return (image_BHWC - jnp.asarray(mean)) / jnp.asarray(std)
