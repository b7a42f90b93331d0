"""What the device does to a batch of images: augmentation, enlargement, normalisation.

Decisions:
  * An augmentation is a pure function `(key_B, image_BHWC, **arguments) -> image_BHWC` on
    uint8 images with one key an example, so that a draw depends on the example alone.
  * `AUGMENTATIONS` gives their order, and the argument that turns each on. None is by default.
  * Mixing comes last. It pairs the example at position i of the batch with that at i XOR 1: the
    order of the data is random, and the two are on one device and in one micro-batch as long as
    those hold even numbers of examples.
  * Images stay uint8 throughout, mixed ones too: what is rounded off is less than a grey level.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vit_jax.augment import crops
from vit_jax.augment.mixing import mix
from vit_jax.augment.randaugment import rand_augment, trivial_augment


class Augmentation(NamedTuple):
  """One of the table.

  Attributes:
    function: `(key_B, image_BHWC, **arguments) -> image_BHWC`.
    switch: the argument that turns it off.
    off: the value that does.
    strong: whether it is left out at the end of a run, when `off_for_last` asks for that.
  """

  function: Callable[..., jax.Array]
  switch: str
  off: float
  strong: bool

  def on(self, arguments: Mapping) -> bool:
    return arguments[self.switch] != self.off


AUGMENTATIONS = {  # in their order; a new one goes to the end, because draws derive from its place
  'pad_crop': Augmentation(crops.pad_crop, 'padding', 0, strong=False),
  'flip': Augmentation(crops.flip, 'probability', 0, strong=False),
  'resized_crop': Augmentation(crops.resized_crop, 'min_area', 1, strong=False),
  'rand_augment': Augmentation(rand_augment, 'num_layers', 0, strong=True),
  'trivial_augment': Augmentation(trivial_augment, 'probability', 0, strong=True),
  'erasing': Augmentation(crops.erasing, 'probability', 0, strong=True),
}
MIX_PLACE = 1000  # of the draws of `mix`, beyond any of the table's


def active(arguments: Mapping[str, Mapping]) -> list[str]:
  """The names of what these arguments turn on, `mix` included."""
  names = [name for name, entry in AUGMENTATIONS.items() if entry.on(arguments[name])]
  return names + ['mix'] * mixes(arguments)


def mixes(arguments: Mapping[str, Mapping]) -> bool:
  """Whether examples are mixed with one another."""
  return arguments['mix']['probability'] != 0


def augment(
  key: jax.Array,
  example_B: jax.Array,
  image_BHWC: jax.Array,
  arguments: Mapping[str, Mapping],
  strong: bool | None = None,
) -> jax.Array:
  """Applies each of `AUGMENTATIONS` with its arguments; nothing that needs two examples.

  Args:
    key: of the step.
    example_B: positions in the global batch, which the draws derive from.
    image_BHWC: uint8.
    arguments: for each name its keyword arguments.
    strong: the strong ones only, or the others only; None for all.
  """
  for i, (name, entry) in enumerate(AUGMENTATIONS.items()):
    if strong in (None, entry.strong) and entry.on(arguments[name]):
      image_BHWC = entry.function(keys(key, i, example_B), image_BHWC, **arguments[name])
  return image_BHWC


def keys(key: jax.Array, place: int, example_B: jax.Array) -> jax.Array:
  """For each example the key of the augmentation at this place."""
  step_key = jax.random.fold_in(key, place)
  return jax.vmap(lambda example: jax.random.fold_in(step_key, example))(example_B)


def augment_and_mix(
  key: jax.Array,
  example_B: jax.Array,
  image_BHWC: jax.Array,
  arguments: Mapping[str, Mapping],
  early: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """What a training step sees of a micro-batch.

  Args:
    key: of the step.
    example_B: positions in the global batch; neighbours that mix stand beside each other.
    image_BHWC: uint8.
    arguments: for each of `AUGMENTATIONS` and for `mix` the keyword arguments.
    early: whether the step has strong augmentations; they are not even computed where it has
      not. None: all steps have them.

  Returns:
    image_BHWC, uint8, and own_B, each label's share in its own image; the rest is `partner`'s.
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
  image_BHWC: jax.Array, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
  """uint8 to what the model takes: float32, resized to `size` (bicubic), normalised."""
  batch, height, width, channels = image_BHWC.shape
  image_BHWC = image_BHWC.astype(jnp.float32) / 255
  if (height, width) != tuple(size):
    image_BHWC = jax.image.resize(image_BHWC, (batch, *size, channels), 'cubic')
  return (image_BHWC - jnp.asarray(mean)) / jnp.asarray(std)
