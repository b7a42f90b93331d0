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

from vit_jax.randaugment import BITS, ONE, rand_augment, trivial_augment

PAD_MODES = ('reflect', 'constant')


def pad_crop(key_B: jax.Array, image_BHWC: jax.Array, padding: int, mode: str) -> jax.Array:
  """Adds a border of `padding` pixels and crops the old size at a random place.

  `mode` is `reflect`, or `constant` for a black border.
  """
  border = ((0, 0), (padding, padding), (padding, padding), (0, 0))
  padded_BHWC = jnp.pad(image_BHWC, border, mode=mode)

  def crop(key, image_HWC):
    y, x = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return jax.lax.dynamic_slice(image_HWC, (y, x, 0), image_BHWC.shape[1:])

  return jax.vmap(crop)(key_B, padded_BHWC)


def flip(key_B: jax.Array, image_BHWC: jax.Array, probability: float) -> jax.Array:
  """Mirrors left to right with the probability given."""
  mirror_B = jax.vmap(lambda key: jax.random.bernoulli(key, probability))(key_B)
  return jnp.where(mirror_B[:, None, None, None], image_BHWC[:, :, ::-1], image_BHWC)


def resized_crop(
  key_B: jax.Array, image_BHWC: jax.Array, min_area: float, max_aspect: float
) -> jax.Array:
  """Enlarges a random part to the old size, bilinearly (Szegedy et al. 2014, 1409.4842, Section 6).

  Args:
    key_B: of each example.
    image_BHWC: uint8.
    min_area: of the part, as a share of the image's; it is uniform from there to all of it.
    max_aspect: of width to height and of height to width, as far as the area allows.
  """
  height, width, _ = image_BHWC.shape[1:]

  def crop(key, image_HWC):
    size_key, place_key = jax.random.split(key)
    size = rectangle(size_key, height, width, min_area, 1.0, max_aspect)
    corner = jax.random.uniform(place_key, (2,)) * (jnp.array([height, width]) - size)
    scale = jnp.array([height, width]) / size
    return jax.image.scale_and_translate(
      image_HWC, image_HWC.shape, (0, 1), scale, -corner * scale, 'linear'
    )

  new_BHWC = jax.vmap(crop)(key_B, image_BHWC.astype(jnp.float32))
  return jnp.clip(jnp.round(new_BHWC), 0, 255).astype(jnp.uint8)


def rectangle(
  key: jax.Array, height: int, width: int, min_area: float, max_area: float, max_aspect: float
) -> jax.Array:
  """Height and width, in pixels, of a random part of an image.

  Its share of the image's area is uniform. The logarithm of its aspect ratio is so too, within
  what fits into the image: where others draw again until all fits, only the shape gives way.
  """
  area_key, aspect_key = jax.random.split(key)
  area = jax.random.uniform(area_key, (), minval=min_area, maxval=max_area)
  whole, most = jnp.log(width / height), jnp.log(max_aspect)
  tallest, widest = jnp.clip(jnp.stack([-most, most]), whole + jnp.log(area), whole - jnp.log(area))
  aspect = jnp.exp(jax.random.uniform(aspect_key, (), minval=tallest, maxval=widest))
  pixels = area * height * width
  size = jnp.sqrt(jnp.stack([pixels / aspect, pixels * aspect]))
  return jnp.minimum(size, jnp.array([height, width]))  # which rounding may overstep


def erasing(
  key_B: jax.Array,
  image_BHWC: jax.Array,
  probability: float,
  min_area: float,
  max_area: float,
  max_aspect: float,
) -> jax.Array:
  """Noise in the place of a rectangle (Zhong et al. 2017, 1708.04896): any level in every pixel.

  Args:
    key_B: of each example.
    image_BHWC: uint8, of four channels at most.
    probability: of an image losing a part.
    min_area: of the part, as a share of the image's; it is uniform.
    max_area: likewise.
    max_aspect: of width to height and of height to width, as far as the area allows.
  """
  height, width, channels = image_BHWC.shape[1:]

  def erase(key, image_HWC):
    happens_key, size_key, place_key, noise_key = jax.random.split(key, 4)
    size = rectangle(size_key, height, width, min_area, max_area, max_aspect)
    high, wide = jnp.round(size).astype(jnp.int32)
    y, x = jax.random.uniform(place_key, (2,))
    top = (y * (height - high + 1)).astype(jnp.int32)
    left = (x * (width - wide + 1)).astype(jnp.int32)
    inside_HW1 = box((height, width), top, top + high, left, left + wide)
    happens = jax.random.bernoulli(happens_key, probability)
    # A byte of one number for each channel: a number for each would take ten times as long.
    bits_HW1 = jax.random.bits(noise_key, (height, width, 1), jnp.uint32)
    noise_HWC = bits_HW1 >> (8 * jnp.arange(channels, dtype=jnp.uint32)) & 255
    return jnp.where(happens & inside_HW1, noise_HWC.astype(jnp.uint8), image_HWC)

  return jax.vmap(erase)(key_B, image_BHWC)


def box(size: tuple[int, int], top, bottom, left, right) -> jax.Array:
  """Whether a pixel is in the rectangle, `[H, W, 1]`; bottom and right are beyond it."""
  y_H11, x_1W1 = jnp.arange(size[0])[:, None, None], jnp.arange(size[1])[None, :, None]
  return (y_H11 >= top) & (y_H11 < bottom) & (x_1W1 >= left) & (x_1W1 < right)


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
  'pad_crop': Augmentation(pad_crop, 'padding', 0, strong=False),
  'flip': Augmentation(flip, 'probability', 0, strong=False),
  'resized_crop': Augmentation(resized_crop, 'min_area', 1, strong=False),
  'rand_augment': Augmentation(rand_augment, 'num_layers', 0, strong=True),
  'trivial_augment': Augmentation(trivial_augment, 'probability', 0, strong=True),
  'erasing': Augmentation(erasing, 'probability', 0, strong=True),
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


def mix(
  key_B: jax.Array,
  image_BHWC: jax.Array,
  probability: float,
  mixup_alpha: float,
  cutmix_alpha: float,
  switch: float,
) -> tuple[jax.Array, jax.Array]:
  """Puts something of its `partner` into each image, by mixup or by cutmix.

  Mixup (Zhang et al. 2017, 1710.09412) takes a weighted mean; cutmix (Yun et al. 2019,
  1905.04899) a rectangle about a random pixel, cut off at the border. Every example draws for
  itself, so that its partner may come out unmixed.

  Args:
    key_B: of each example.
    image_BHWC: uint8; an even number of them.
    probability: of an image being mixed.
    mixup_alpha: of the Beta(alpha, alpha) that the own image's weight is drawn from; 0: no mixup.
    cutmix_alpha: the same for cutmix, before the rectangle is cut off; 0: no cutmix.
    switch: probability of cutmix where both are on.

  Returns:
    image_BHWC, uint8, and own_B: the weight, or the part of the area, that is the image's own.
  """
  height, width, _ = image_BHWC.shape[1:]
  both = jnp.logical_and(mixup_alpha > 0, cutmix_alpha > 0)
  cutmix_share = jnp.where(both, switch, jnp.where(cutmix_alpha > 0, 1.0, 0.0))

  def draw(key):
    """The own image's weight at each pixel, `[H, W, 1]` in units of 2^-16."""
    choice_key, weight_key, place_key = jax.random.split(key, 3)
    happens, cut = jax.random.uniform(choice_key, (2,)) < jnp.stack([probability, cutmix_share])
    alpha = jnp.where(cut, cutmix_alpha, mixup_alpha)
    own = jax.random.beta(weight_key, alpha, alpha)
    high, wide = (jnp.array([height, width]) * jnp.sqrt(1 - own)).astype(jnp.int32) // 2
    y, x = (jax.random.uniform(place_key, (2,)) * jnp.array([height, width])).astype(jnp.int32)
    outside_HW1 = ~box((height, width), y - high, y + high, x - wide, x + wide)
    own_HW1 = jnp.where(cut, ONE * outside_HW1, jnp.round(own * ONE).astype(jnp.int32))
    return jnp.where(happens, own_HW1, ONE), jnp.where(cut, outside_HW1.mean(), own), happens

  own_BHW1, own_B, happens_B = jax.vmap(draw)(key_B)
  one_BHWC, other_BHWC = (x.astype(jnp.int32) for x in (image_BHWC, partner(image_BHWC)))
  mixed_BHWC = other_BHWC + (own_BHW1 * (one_BHWC - other_BHWC) + ONE // 2 >> BITS)
  return mixed_BHWC.astype(jnp.uint8), jnp.where(happens_B, own_B, 1.0)


def partner(x_B: jax.Array) -> jax.Array:
  """What belongs to the example that each is mixed with: its neighbour."""
  assert len(x_B) % 2 == 0, f'{len(x_B)} examples have no partners'
  pairs = x_B.reshape(-1, 2, *x_B.shape[1:])
  return pairs[:, ::-1].reshape(x_B.shape)


def normalize(
  image_BHWC: jax.Array, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
  """uint8 to what the model takes: float32, resized to `size` (bicubic), normalised."""
  batch, height, width, channels = image_BHWC.shape
  image_BHWC = image_BHWC.astype(jnp.float32) / 255
  if (height, width) != tuple(size):
    image_BHWC = jax.image.resize(image_BHWC, (batch, *size, channels), 'cubic')
  return (image_BHWC - jnp.asarray(mean)) / jnp.asarray(std)
