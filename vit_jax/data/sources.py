"""Opens the datasets that `data.source` can name; `SOURCES` lists the kinds."""

import dataclasses
import os
import pathlib

import numpy as np

from vit_jax.data import folder as folder_lib
from vit_jax.data import tfds
from vit_jax.data.source import Source
from vit_jax.names import choose, local


def open_source(spec: str, data_dir: str, image_size: tuple[int, int]) -> Source:
  """Opens the source `tfds:<name>`, `folder:<path>`, `digits` or `synthetic`.

  Raises:
    ValueError: an unknown kind, or a source that cannot be read; the message gives a remedy.
  """
  kind, _, argument = spec.partition(':')
  if kind not in SOURCES and ('/' in kind or folder_root(kind, data_dir).is_dir()):
    raise ValueError(f'data.source={spec!r}: write folder:{spec} to read a folder of images.')
  source = choose('data.source', kind, SOURCES)(argument, data_dir, image_size)
  return dataclasses.replace(source, spec=spec)


def look_up_source(spec: str, data_dir: str, image_size: tuple[int, int]) -> Source | None:
  """Opens a source like `open_source`, but never prepares data, and accepts missing data.

  Returns:
    The source. If the data of a TFDS dataset is missing, `sizes` is empty. None if the folder of a
    `folder:<path>` source is missing.
  """
  kind, _, name = spec.partition(':')
  if kind == 'folder' and not (name and folder_root(name, data_dir).is_dir()):
    return None
  if kind != 'tfds':
    return open_source(spec, data_dir, image_size)
  root = tfds.data_root(name, data_dir)
  found = [tfds.find_builder(name, directory) for directory in (root, root / tfds.CONVERTED)]
  if not any(found):
    tfds.check_known(name)
  return tfds.tfds_source(name, max(filter(None, found), key=lambda one: len(one.info.splits)))


def digits(argument: str, data_dir: str, image_size: tuple[int, int]) -> Source:
  """Returns scikit-learn's 1,797 handwritten digits, 8x8 grey.

  The test split is always the same 360 images, stratified by class.
  """
  del argument, data_dir, image_size
  from sklearn import datasets, model_selection

  bunch = datasets.load_digits()
  image_NHWC = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
  train, test = model_selection.train_test_split(
    np.arange(len(bunch.target)), test_size=360, stratify=bunch.target, random_state=0
  )
  members = {'train': train, 'test': test}

  def read(split, indices):
    for i in members[split][indices]:
      yield f'digits/{i}', image_NHWC[i], int(bunch.target[i])

  return Source({'train': 1437, 'test': 360}, tuple('0123456789'), 1, read)


def synthetic(argument: str, data_dir: str, image_size: tuple[int, int]) -> Source:
  """Returns generated images for quick tests: ten classes, each a fixed pattern plus noise."""
  del argument, data_dir
  shape = (*image_size, 3)
  patterns = np.random.RandomState(0).randint(64, 192, (10, *shape))
  sizes = {'train': 1024, 'test': 256}

  def read(split, indices):
    for i in indices:
      noise = np.random.RandomState([list(sizes).index(split), i]).randint(-63, 64, shape)
      yield f'synthetic/{split}/{i}', (patterns[i % 10] + noise).astype(np.uint8), i % 10

  return Source(sizes, tuple(f'pattern {i}' for i in range(10)), 3, read)


def open_images(path: str, data_dir: str, image_size: tuple[int, int]) -> Source:
  """Opens a folder of images with one folder per class; `folder.open_folder` defines its splits.

  A relative path starts at `data_dir`.
  """
  del image_size
  root = folder_root(path, data_dir)
  if not path:
    raise ValueError("data.source: 'folder:' has no path. Write folder:<path of the images>.")
  if not root.is_dir():
    raise ValueError(f'data.source: no folder at {str(root)!r}. Write folder:<path of the images>.')
  found = folder_lib.open_folder(root)
  files = found.files

  def read(split, indices):
    top, path_N, label_N = files[split].top, files[split].path_N, files[split].label_N
    for i in indices:
      file = top / os.fsdecode(bytes(path_N[i]))
      yield str(file), file, int(label_N[i])

  return Source(
    {name: len(part) for name, part in files.items()},
    found.class_names,
    3,
    read,
    files['train'].fingerprint(),
    files,
    warnings=found.warnings,
  )


def folder_root(path: str, data_dir: str) -> pathlib.Path:
  """Returns the path of an image folder; a relative path starts at `data_dir`."""
  return local(data_dir) / local(path)


SOURCES = {
  'tfds': tfds.open_tfds,
  'folder': open_images,
  'digits': digits,
  'synthetic': synthetic,
}
