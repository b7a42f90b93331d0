"""Applies augmentation, mixing, resizing and normalisation to image batches on the device.

Decisions:
  * An augmentation is a pure function `(key_B, image_BHWC, **arguments) -> image_BHWC` on
    uint8 images. Each example has its own key, so no draw depends on other examples.
  * `AUGMENTATIONS` defines the order of the augmentations, and which argument enables each of them.
    All augmentations are off by default.
  * Mixing comes last. The first and second example of the batch are a pair, the third and fourth
    are the next pair, and so on. These pairs are random because the order of the data is random. If
    every device and micro-batch holds an even number of examples, the two examples of a pair are
    always together.
  * Images stay uint8 throughout, also after mixing. The rounding error is below one grey level.
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
  """An entry of `AUGMENTATIONS`.

  Attributes:
    function: `(key_B, image_BHWC, **arguments) -> image_BHWC`.
    switch: name of the argument that can disable the augmentation.
    off: the augmentation is disabled if the argument `switch` has this value.
    strong: whether `augment.off_for_last` disables the augmentation at the end of a run.
  """

  function: Callable[..., jax.Array]
  switch: str
  off: float
  strong: bool

  def on(self, arguments: Mapping) -> bool:
    return arguments[self.switch] != self.off


AUGMENTATIONS = {  # in order of application; add new ones at the end: draws depend on the index
  'pad_crop': Augmentation(crops.pad_crop, 'padding', 0, strong=False),
  'flip': Augmentation(crops.flip, 'probability', 0, strong=False),
  'resized_crop': Augmentation(crops.resized_crop, 'min_area', 1, strong=False),
  'rand_augment': Augmentation(rand_augment, 'num_layers', 0, strong=True),
  'trivial_augment': Augmentation(trivial_augment, 'probability', 0, strong=True),
  'erasing': Augmentation(crops.erasing, 'probability', 0, strong=True),
}
MIX_PLACE = 1000  # index for the draws of `mix`, above any index in the table


def active(arguments: Mapping[str, Mapping]) -> list[str]:
  """Returns the names of the enabled augmentations in order of application, with `mix` last.

  `arguments` are the keyword arguments of each augmentation, by name.
  """
  names = [name for name, entry in AUGMENTATIONS.items() if entry.on(arguments[name])]
  return names + ['mix'] * mixes(arguments)


def mixes(arguments: Mapping[str, Mapping]) -> bool:
  """Returns whether the arguments, as in `active`, enable mixup or cutmix."""
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
    key: random key of the step.
    example_B: row number of each image in the global batch. The random draws depend on it.
    image_BHWC: uint8 images.
    arguments: keyword arguments of each augmentation, by name. They also disable augmentations.
    strong: True applies only the strong augmentations, False only the augmentations that are not
      strong, None all of them.
  """
  for i, (name, entry) in enumerate(AUGMENTATIONS.items()):
    if strong in (None, entry.strong) and entry.on(arguments[name]):
      image_BHWC = entry.function(keys(key, i, example_B), image_BHWC, **arguments[name])
  return image_BHWC


def keys(key: jax.Array, place: int, example_B: jax.Array) -> jax.Array:
  """Returns the random keys, one per example, of the augmentation with the index `place`.

  `key` is the random key of the step, `example_B` the row number of each example in the batch.
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
    key: random key of the step.
    example_B: row number of each image in the global batch. The two examples of a pair are next to
      each other.
    image_BHWC: uint8 images.
    arguments: keyword arguments of each of `AUGMENTATIONS` and of `mix`, by name.
    early: bool scalar: whether this step uses strong augmentations and mixing. If not, they are not
      computed. None if all steps of the run use them.

  Returns:
    image_BHWC: the augmented uint8 images.
    own_B: weight of each image's own label. The label of the partner has the weight `1 - own_B`.
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
    mean: mean of each channel, or one for all channels.
    std: standard deviation of each channel, or one for all channels.
  """
  if isinstance(image_BHWC, Padded):
    patch_BNpqC = image_BHWC.patch_BNpqC.astype(jnp.float32) / 255
    return image_BHWC.replace(patch_BNpqC=(patch_BNpqC - jnp.asarray(mean)) / jnp.asarray(std))
  batch, height, width, channels = image_BHWC.shape
  image_BHWC = image_BHWC.astype(jnp.float32) / 255
  if (height, width) != tuple(size):
    image_BHWC = jax.image.resize(image_BHWC, (batch, *size, channels), 'cubic')
  return (image_BHWC - jnp.asarray(mean)) / jnp.asarray(std)
