"""Applies a model to image files.

Threads decode the next image files while the devices compute.
"""

from collections.abc import Callable, Iterator
import concurrent.futures
import pathlib

import jax
import numpy as np

from vit_jax.data import BadImage, decode_image, read_file
from vit_jax.distributed import batch_sharding, concatenate, inference_mesh, replicate
from vit_jax.experiment import Experiment

Function = Callable[[jax.Array, dict], jax.Array]

BATCH = 64  # maximum number of image files per batch


def map_files(
  exp: Experiment, params: dict, files: list[pathlib.Path], function: Function
) -> Iterator[tuple[pathlib.Path, np.ndarray | str]]:
  """Yields each file with the result of `function` for its image, or with an error message.

  Args:
    exp: the experiment that defines the preprocessing.
    params: parameters of the experiment's model.
    files: image files, at least one.
    function: maps `(image_BHWC, params)` to an array with one row per image. `image_BHWC` contains
      uint8 images. If images keep their aspect ratio (`exp.pack`), `image_BHWC` is
      a `Padded` batch instead.

  Yields:
    `(file, row)` for each file, in order. `row` is the row of the function's result for this image,
    or an error message if the file cannot be read as an image.
  """
  batch_size = min(len(files), BATCH)
  mesh = inference_mesh(batch_size)
  batch_size = -(-batch_size // mesh.size) * mesh.size
  params = replicate(mesh, params)
  step = make_inference_step(exp, mesh, function)
  size, stack = exp.task.stored_size or exp.model.patch_size, exp.pack or np.stack
  blank = np.zeros((*size, exp.task.channels), np.uint8)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    chunks = [files[start : start + BATCH] for start in range(0, len(files), BATCH)]
    submit = lambda chunk: [pool.submit(read_image, file, exp) for file in chunk]
    reading = submit(chunks[0])
    for chunk, following in zip(chunks, [*chunks[1:], []]):
      images = [future.result() for future in reading]
      reading = submit(following)  # decoded while the devices compute
      good = [row for row in images if isinstance(row, np.ndarray)]
      values = iter(())
      if good:
        image_BHWC = stack(good + [blank] * (batch_size - len(good)))
        image_BHWC = jax.device_put(image_BHWC, batch_sharding(mesh))
        values = iter(np.asarray(step(image_BHWC, params)))
      for file, row in zip(chunk, images):
        yield file, row if isinstance(row, str) else next(values)


def probabilities(exp: Experiment) -> Function:
  """Returns a function `(image_BHWC, params) -> probability_BL` that classifies uint8 images."""
  return lambda image_BHWC, params: exp.probabilities(params, image_BHWC)


def make_inference_step(exp: Experiment, mesh: jax.sharding.Mesh, function: Function) -> Function:
  """Compiles `function` so that each device of the mesh processes a part of the batch.

  `map_files` describes the arguments and the result of `function`.
  """

  return exp.fitted(lambda parts: jax.jit(concatenate(function, mesh, parts)), mesh)


def read_image(file: pathlib.Path, exp: Experiment) -> np.ndarray | str:
  """Reads an image and resizes it for the model: returns uint8 `[H, W, C]`.

  If the file cannot be read as an image, the function returns an error message instead.
  """
  try:
    decoded = decode_image(read_file(file), file, exp.task.channels)
  except BadImage as error:
    return str(error)
  return exp.fit(decoded, exp.task.stored_size)
