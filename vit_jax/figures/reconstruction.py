"""Draws the patches of an image that a masked autoencoder sees, and the patches it predicts."""

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np

from vit_jax.experiment import Experiment
from vit_jax.figures import canvas
from vit_jax.optim import as_images, as_patches, evaluation_key, fill_in, statistics

GREY = 128  # grey level of patches that are hidden from the model


def reconstruct(exp: Experiment, params: dict, image_BHWC: np.ndarray) -> np.ndarray:
  """Returns three versions of each image, uint8 `[3, B, H, W, C]`, for `draw_reconstruction`.

  The first version is the original. In the second, the hidden patches are grey. In the third, the
  hidden patches are replaced by the model's predictions. The model predicts normalised patches,
  with mean 0 and variance 1. Therefore each predicted patch is scaled to the mean and the standard
  deviation of the true patch, which the model does not know.

  Args:
    exp: experiment of a run with `objective=masked`.
    params: parameters of the model and its decoder.
    image_BHWC: uint8 images at the size of the model's input.
  """
  mean, std = (np.array(exp.config.data[name]) for name in ('mean', 'std'))

  @jax.jit
  def fill(params):
    batch = {'image': image_BHWC, 'example': jnp.arange(len(image_BHWC))}
    filled = fill_in(exp, params, batch, evaluation_key())
    patch_BNP = as_patches(exp.normalize(image_BHWC), exp.model.patch_size)
    unseen = jnp.arange(len(image_BHWC))[:, None], filled.unseen_BU
    mean_BN1, std_BN1 = statistics(patch_BNP)
    guess_BUP = filled.predicted_BUP * std_BN1[unseen] + mean_BN1[unseen]
    hidden_BNP = jnp.zeros(patch_BNP.shape, bool).at[unseen].set(True)
    found = hidden_BNP, patch_BNP.at[unseen].set(guess_BUP)
    return [as_images(x, exp.model.patch_size, exp.image_shape) for x in found]

  hidden_BHWC, filled_BHWC = map(np.asarray, fill(params))
  guess_BHWC = np.round(255 * np.clip(filled_BHWC * std + mean, 0, 1)).astype(np.uint8)
  seen_BHWC = np.where(hidden_BHWC, np.uint8(GREY), image_BHWC)
  return np.stack([image_BHWC, seen_BHWC, np.where(hidden_BHWC, guess_BHWC, image_BHWC)])


@canvas.styled
def draw_reconstruction(image_RBHWC: np.ndarray) -> Figure:
  """Draws three rows: the original images, the seen patches only, and the filled-in images.

  Args:
    image_RBHWC: the three versions of B images, from `reconstruct`.
  """
  _, count, height, width, _ = image_RBHWC.shape
  columns = max(count, 4)
  tile = (canvas.WIDTH - 0.6) / columns
  figure = Figure((canvas.WIDTH, 3 * tile * height / width + 0.3), layout='constrained')
  axes = figure.subplots(3, columns, squeeze=False)
  for axis in axes.ravel():
    canvas.bare(axis)
  for row, label, images in zip(axes, ('image', 'seen', 'filled in'), image_RBHWC):
    row[0].set_ylabel(label)
    for axis, image in zip(row, images):
      canvas.show_image(axis, image)
    for axis in row[count:]:
      axis.set_visible(False)
  return figure
