"""Finds and draws the training images that are most similar to wrongly classified test images.

Decisions:
  * Images are compared by the cosine similarity of their features, the inputs of the head.
  * The nearest training images suggest why a test image was classified wrongly. If they have the
    predicted class, the test image's label is often doubtful, or the features cannot separate the
    true and the predicted class. If no training image is similar, the training data lacks images
    like the test image.
  * At most `AMONG` training images are compared, spread evenly over the training split. So the
    features of a larger split do not take longer to compute.
"""

from collections.abc import Sequence
import dataclasses

import jax
from matplotlib.figure import Figure
import numpy as np

from vit_jax.data import Examples, Split
from vit_jax.evaluation import compute_features, make_feature_step
from vit_jax.experiment import Experiment
from vit_jax.figures import canvas
from vit_jax.figures.maps import Missing
from vit_jax.model import unit

ROWS, NEAREST = 5, 5  # number of mistakes drawn, and of training images next to each mistake
AMONG = 10_000  # maximum number of training images compared
PART = 2000  # maximum number of training images in memory at a time


@dataclasses.dataclass(frozen=True)
class Neighbours:
  """For each of R test images, the K most similar training images, the most similar one first.

  Attributes:
    image_RKHWC: uint8 training images.
    label_RK: classes of the training images.
    similarity_RK: cosine similarity between the features of the test image and of the training
      image, -1 to 1.
    among: number of training images that each test image was compared with.
  """

  image_RKHWC: np.ndarray
  label_RK: np.ndarray
  similarity_RK: np.ndarray
  among: int


def find_neighbours(
  exp: Experiment, params: dict, test: Examples, train: Split, mesh: jax.sharding.Mesh
) -> Neighbours:
  """Returns, for each test image, the `NEAREST` training images with the most similar features.

  Args:
    exp: the experiment that defines the backbone and the preprocessing.
    params: parameters of the model, on the devices of the mesh.
    test: R test examples.
    train: training split.
    mesh: the devices.

  Raises:
    Missing: none of the training images can be read.
  """
  step, size = make_feature_step(exp, mesh), exp.config.eval_batch_size
  found = lambda examples: compute_features(step, params, examples, size, mesh).feature_ND
  test_RD, index_N = np.asarray(unit(found(test))), canvas.evenly(len(train), AMONG)
  images, labels, similarities, among = [], [], [], 0
  for start in range(0, len(index_N), PART):
    index = index_N[start : start + PART]
    index = index[train.readable(index)]
    if not len(index):
      continue
    part = train.some(index)
    similarity_RN = test_RD @ np.asarray(unit(found(part))).T
    best_RK = np.argsort(-similarity_RN, axis=1, kind='stable')[:, :NEAREST]
    images.append(part.image_NHWC[best_RK])
    labels.append(part.label_N[best_RK])
    similarities.append(np.take_along_axis(similarity_RN, best_RK, axis=1))
    among += len(part)
  if not images:
    raise Missing('none of the training images can be read.')
  parts = [np.concatenate(x, axis=1) for x in (images, labels, similarities)]
  best_RK = np.argsort(-parts[2], axis=1, kind='stable')[:, :NEAREST]
  row_R1 = np.arange(len(test_RD))[:, None]
  return Neighbours(*(x[row_R1, best_RK] for x in parts), among)


@canvas.styled
def draw_neighbours(
  image_RHWC: np.ndarray,
  titles: Sequence[tuple[str, str, str]],
  found: Neighbours,
  class_names: Sequence[str],
) -> Figure:
  """Draws one row for each mistake: the test image, then the nearest training images.

  Args:
    image_RHWC: uint8 test images that were classified wrongly.
    titles: for each mistake, the true class, the predicted class and the probability of the
      predicted class, as text.
    found: the nearest training images of these test images.
    class_names: name of each class.
  """
  rows, columns = found.label_RK.shape
  height, width = image_RHWC.shape[1:3]
  tile = canvas.WIDTH / (columns + 1.4)
  size = (canvas.WIDTH, rows * (min(tile * height / width, 2.0) + 0.5))
  figure = Figure(size, layout='constrained')
  axes = figure.subplots(rows, columns + 2, squeeze=False, width_ratios=[1, 0.1, *[1] * columns])
  for axis in axes.ravel():
    axis.set_axis_off()
  above = dict(xycoords='axes fraction', xytext=(0, 4), textcoords='offset points', ha='center')
  for row, image, (truth, guess, share) in zip(axes, image_RHWC, titles):
    canvas.show_image(row[0], image)
    row[0].set_title(f'true: {canvas.short(truth)}', size=8, pad=15)
    text = f'model: {canvas.short(guess, 11)}, {share}'
    row[0].annotate(text, (0.5, 1), size=8, color=canvas.ORANGE, **above)
  columns = zip(axes, titles, found.image_RKHWC, found.label_RK, found.similarity_RK)
  for row, (truth, guess, _), images, labels, similarities in columns:
    for axis, image, label, similarity in zip(row[2:], images, labels, similarities):
      name = class_names[label]
      colour = {truth: canvas.GREEN, guess: canvas.ORANGE}.get(name, canvas.GREY)
      canvas.show_image(axis, image)
      axis.set_title(canvas.short(name), size=8, pad=15, color=colour)
      axis.annotate(f'{similarity:.2f}', (0.5, 1), size=8, **above)
  return figure
