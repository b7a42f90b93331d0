"""Masked autoencoding: a model learns from images without labels, by filling in hidden patches.

Source: He et al. 2021 (MAE), 2111.06377, Section 3. Details that the paper omits follow its code.

Decisions:
  * The blocks of the model process only the patches that are not hidden (Section 3, "MAE encoder").
    So a training step costs a fraction of a supervised step.
  * The decoder gets the seen patches first, then the unseen patches. The decoder of the paper gets
    all patches in the order of the image. Both orders give equal results, because each token
    contains its position embedding, and attention does not depend on the order.
  * The decoder's parameters are stored next to the model's parameters, as the entry `decoder`.
    Checkpoints contain the decoder, because a resumed run, the evaluation and figures of filled-in
    patches need it. All other uses of the trained model omit the decoder.
  * An image's mask depends only on the random key and on the image's number `example`. In training,
    `example` is the position in the batch. In evaluation, it is the index in the evaluated split.

Letters in array names: S counts seen patches, U unseen (hidden) patches, P the values of a patch,
and T the tokens of the encoder's output.
"""

import functools
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from vit_jax.model import POOLS, Block, Dense, Encoder, cut, sincos, without_pool

ENTRY = 'decoder'  # name of the decoder's entry in the parameters


class Decoder(nn.Module):
  """Predicts the pixels of hidden patches (MAE paper: Section 3, "MAE decoder"; Appendix A.1).

  Attributes:
    block: settings of an encoder block.
    width: D, size of a token in the decoder.
    depth: number of blocks.
    values: P, number of values in a patch: pixels times channels.
    whole: (down, across), the grid of patches that defines the positions. For images with another
      grid, the positions are stretched. None: the grid of the images defines the positions.
  """

  block: Block
  width: int
  depth: int
  values: int
  whole: tuple[int, int] | None = None

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, seen_BS: jax.Array, unseen_BU: jax.Array, grid: tuple[int, int]
  ) -> jax.Array:
    """Returns the predicted values of the unseen patches, `[B, U, values]`, in float32.

    Args:
      x_BTD: output of the encoder: the prefix tokens (e.g. the class token), then the seen patches.
      seen_BS: index of each seen patch in the image, counted row by row.
      unseen_BU: index of each unseen patch.
      grid: number of patches (down, across).
    """
    dtype, before = self.block.dtype, x_BTD.shape[1] - seen_BS.shape[1]
    x_BTD = Dense((self.width,), dtype=dtype, name='embedding')(x_BTD)
    hidden_11D = self.param('hidden', nn.initializers.normal(0.02), (1, 1, self.width))
    hidden_BUD = jnp.broadcast_to(hidden_11D.astype(dtype), (*unseen_BU.shape, self.width))
    position_ND = jnp.asarray(sincos(*grid, self.width, self.whole)[0], dtype)
    place_BN = jnp.concatenate([seen_BS, unseen_BU], axis=1)
    patch_BND = jnp.concatenate([x_BTD[:, before:], hidden_BUD], axis=1) + position_ND[place_BN]
    x_BTD = jnp.concatenate([x_BTD[:, :before], patch_BND], axis=1)
    x_BTD = Encoder(self.block, self.depth, name='encoder')(x_BTD)
    # Only unseen patches are predicted, because the loss does not use the seen ones.
    return Dense((self.values,), name='pixels')(x_BTD[:, before + seen_BS.shape[1] :])


class Filled(NamedTuple):
  """Predictions of a masked autoencoder for the unseen (hidden) patches of a batch.

  Attributes:
    predicted_BUP: predicted values of the unseen patches, `[B, U, P]`.
    target_BUP: true values of the unseen patches, with each patch scaled to mean 0 and variance 1.
    unseen_BU: index of each unseen patch in the image, counted row by row.
  """

  predicted_BUP: jax.Array
  target_BUP: jax.Array
  unseen_BU: jax.Array

  @property
  def loss_B(self) -> jax.Array:
    """Mean squared error over the unseen patches of each image, `[B]` (MAE paper, Section 3)."""
    return ((self.predicted_BUP - self.target_BUP) ** 2).mean(axis=(1, 2))


def fill_in(exp, params: dict, batch: dict, key: jax.Array, train: bool = False) -> Filled:
  """Hides random patches of each image, and returns predicted and true pixels as `Filled`.

  Args:
    exp: the `Experiment`.
    params: parameters of the model and of the decoder.
    batch: `image` `[B, H, W, C]` uint8, and `example` `[B]`, a number that selects each image's
      mask.
    key: random key of the masks and of dropout.
    train: whether to apply dropout.

  Raises:
    ValueError: images keep their aspect ratio, or the decoder does not fit the config.
  """
  check_decoder(exp, params)
  image_BHWC, example_B = exp.normalize(batch['image']), batch['example']
  mask_key, dropout_key = jax.random.split(key)
  patch_BNP = normalized(as_patches(image_BHWC, exp.model.patch_size))
  count = patch_BNP.shape[1]
  seen_BS, unseen_BU = draw_masks(
    mask_key, example_B, count, num_unseen(count, exp.config.masked.share)
  )
  x_BTD = without_pool(exp.model).apply(
    {'params': params},
    image_BHWC,
    train=train,
    example_B=example_B,
    seen_BS=seen_BS,
    rngs={'dropout': dropout_key},
  )
  with jax.named_scope(ENTRY):  # `training/tracing.py` counts this scope as a module
    predicted_BUP = make_decoder(exp).apply(
      {'params': params[ENTRY]}, x_BTD, seen_BS, unseen_BU, patch_grid(exp)
    )
  return Filled(predicted_BUP, take(patch_BNP, unseen_BU), unseen_BU)


def init_decoder(exp, key: jax.Array) -> dict:
  """Returns `{'decoder': parameters}` with random initial parameters of the decoder.

  Raises:
    ValueError: the model or `masked.share` does not fit a masked autoencoder.
  """
  check_trains_all(exp)
  count = patch_grid(exp)[0] * patch_grid(exp)[1]
  unseen = num_unseen(count, exp.config.masked.share)
  seen_BS, unseen_BU = draw_masks(key, jnp.arange(1), count, unseen)
  tokens = exp.model.num_prefix + count - unseen
  x_BTD = jnp.zeros((1, tokens, exp.model.width))
  return {ENTRY: make_decoder(exp).init(key, x_BTD, seen_BS, unseen_BU, patch_grid(exp))['params']}


def make_decoder(exp) -> Decoder:
  """Returns the `Decoder` that the experiment's config describes."""
  keys, model = exp.config.masked, exp.model
  width, heads, (p, q) = keys.decoder_width, keys.decoder_heads, model.patch_size
  block = Block(
    heads,
    width // heads,
    4 * width,
    activation=model.activation,
    norm_epsilon=model.norm_epsilon,
    dtype=model.dtype,
    attention=model.attention,
  )
  values = p * q * exp.task.channels
  return Decoder(block, width, keys.decoder_depth, values, model.position_grid)


def patch_grid(exp) -> tuple[int, int]:
  """Returns the number of patches (down, across) in an image of the experiment."""
  height, width, _ = exp.image_shape
  p, q = exp.model.patch_size
  return height // p, width // q


def check_decoder(exp, params: dict) -> None:
  """Raises ValueError if images keep their aspect ratio, or the decoder does not fit the config."""
  if exp.pack is not None:
    raise ValueError('A masked autoencoder needs images of one size. Remove --max_patches.')
  wanted = jax.eval_shape(functools.partial(init_decoder, exp), jax.random.key(0))[ENTRY]
  if jax.tree.map(jnp.shape, wanted) != jax.tree.map(jnp.shape, params[ENTRY]):
    keys, (p, q) = exp.config.masked, exp.model.patch_size
    shown = ', '.join(f'masked.{key}={keys[key]}' for key in sorted(keys) if key != 'share')
    raise ValueError(
      f'model.patch_size={p}x{q}, {shown}: these values do not fit the decoder of this run, and '
      'cannot be changed after training. Remove the changed keys.'
    )


def check_trains_all(exp) -> None:
  """Raises ValueError if masked autoencoding cannot train all parameters of the model.

  This function also refuses models with a convolutional stem and patches with a single value.
  """
  model, (p, q) = exp.model, exp.model.patch_size
  if model.resnet is not None:
    raise ValueError(
      'objective=masked needs a model without a stem: the stem (model.resnet) would let the model '
      'see pixels of hidden patches.'
    )
  untrained = [f'model.pool={model.pool}'] if POOLS[model.pool].params else []
  for name in ('representation_size', 'projection'):
    untrained += [f'model.{name}={value}'] if (value := getattr(model, name)) is not None else []
  if untrained:
    raise ValueError(
      f'objective=masked does not train the layers that these keys add after the blocks: '
      f'{", ".join(untrained)}. So weight decay would only shrink their weights. Set '
      'model.pool=gap, and model.representation_size and model.projection to None.'
    )
  if p * q * exp.task.channels < 2:
    raise ValueError(
      'objective=masked normalises the values of each patch, so a patch needs two values or more. '
      'Set a larger model.patch_size.'
    )


def num_unseen(count: int, share: float) -> int:
  """Returns the number of patches to hide; `int(count * (1 - share))` patches stay visible.

  Args:
    count: number of patches in an image.
    share: fraction of the patches to hide, from 0 to 1.

  Raises:
    ValueError: no patch would be hidden, or no patch would stay visible.
  """
  seen = int(count * (1 - share) + 1e-9)
  if not 0 < seen < count:
    raise ValueError(
      f'masked.share={share:g} would leave {seen} of {count} patches of an image visible. Choose a '
      'value that leaves at least one patch hidden and one patch visible, e.g. 0.75.'
    )
  return count - seen


def draw_masks(
  key: jax.Array, example_B: jax.Array, count: int, unseen: int
) -> tuple[jax.Array, jax.Array]:
  """Draws which patches of each image to hide, and returns `seen_BS` and `unseen_BU`.

  Args:
    key: random key.
    example_B: index of each image. Equal indices give equal masks.
    count: number of patches in an image.
    unseen: U, number of patches to hide.

  Returns:
    Indices of the visible patches `[B, S]`, and of the hidden patches `[B, U]`.
  """

  def draw(example):
    return jax.random.permutation(jax.random.fold_in(key, example), count)

  order_BN = jax.vmap(draw)(example_B)
  return order_BN[:, unseen:], order_BN[:, :unseen]


def as_patches(image_BHWC: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Returns the values of each patch, `[B, N, P]`; P runs over rows, columns and channels.

  `size` is the (height, width) of a patch in pixels.
  """
  patch_BhwpqC = cut(image_BHWC, size)
  batch, h, w, *_ = patch_BhwpqC.shape
  return patch_BhwpqC.reshape(batch, h * w, -1)


def as_images(
  patch_BNP: jax.Array, size: tuple[int, int], shape: tuple[int, int, int]
) -> jax.Array:
  """Undoes `as_patches`: joins patches to images `[B, H, W, C]`.

  Args:
    patch_BNP: values of each patch.
    size: (height, width) of a patch in pixels.
    shape: (H, W, C) of an image.
  """
  (height, width, channels), (p, q) = shape, size
  x = patch_BNP.reshape(-1, height // p, width // q, p, q, channels)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, height, width, channels)


def statistics(patch_BNP: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns mean and standard deviation of each patch, `[B, N, 1]` each.

  As in the code of the MAE paper, the variance is unbiased, and 1e-6 is added to it.
  """
  mean_BN1 = patch_BNP.mean(axis=-1, keepdims=True)
  return mean_BN1, jnp.sqrt(patch_BNP.var(axis=-1, keepdims=True, ddof=1) + 1e-6)


def normalized(patch_BNP: jax.Array) -> jax.Array:
  """Scales each patch to mean 0, variance 1 (MAE paper, Section 3, "Reconstruction target")."""
  mean_BN1, std_BN1 = statistics(patch_BNP)
  return (patch_BNP - mean_BN1) / std_BN1


def take(patch_BNP: jax.Array, index_BU: jax.Array) -> jax.Array:
  """Returns the patches `[B, U, P]` at the indices `index_BU`."""
  return jnp.take_along_axis(patch_BNP, index_BU[..., None], axis=1)


def evaluation_key() -> jax.Array:
  """Returns the random key that draws the masks in evaluation; it is the same for all runs."""
  return jax.random.fold_in(jax.random.key(0), 2**32 - 1)  # training folds in the step
