"""Opens the dataset that the config key `data.source` names; `SOURCES` lists the valid kinds."""

import collections
from collections.abc import Iterator, Mapping
import dataclasses
import math
import os
import pathlib

import numpy as np

from vit_jax import progress
from vit_jax.bucket import is_remote, join_paths, listed_folder, to_path
from vit_jax.data import folder as folder_lib
from vit_jax.data import tfds
from vit_jax.data.image import EXTENSIONS, only_images
from vit_jax.data.labels import open_labels
from vit_jax.data.source import Source
from vit_jax.data.splits import TEST_NAMES, hash_name, repeated_names, test_splits
from vit_jax.names import choose


def open_source(spec: str, data_dir: str, image_size: tuple[int, int]) -> Source:
  """Opens the dataset of a `data.source` value, such as `tfds:cifar10` or `folder:photos`.

  Args:
    spec: value of `data.source`: `<kind>` or `<kind>:<argument>`. The kind is a key of `SOURCES`.
    data_dir: folder at which relative paths start. For the kind `tfds`: the folder of TFDS data.
    image_size: (height, width) of the generated images of the kind `synthetic`; else ignored.

  Raises:
    ValueError: an unknown kind, or a source that cannot be read; the message gives a remedy.
  """
  kind, _, argument = spec.partition(':')
  is_path = is_remote(spec) or '/' in kind or (kind and from_base(kind, data_dir).exists())
  if kind not in SOURCES and is_path:
    file = spec.endswith(('.csv', '.jsonl'))
    kind, content = ('labels', 'a file with labels') if file else ('folder', 'a folder of images')
    raise ValueError(f'data.source={spec!r}: write {kind}:{spec} to read {content}.')
  source = choose('data.source', kind, SOURCES)(argument, data_dir, image_size)
  return dataclasses.replace(source, spec=spec)


def look_up_source(spec: str, data_dir: str, image_size: tuple[int, int]) -> Source | None:
  """Opens a source like `open_source`, but accepts missing data, and never downloads TFDS data.

  Returns:
    The source. If the data of a TFDS dataset is missing, the source's attribute `sizes` is empty.
    If the folder or label file of a `folder:`, `images:` or `labels:` source is missing, the result
    is None.
  """
  kind, _, name = spec.partition(':')
  if kind in ('folder', 'images', 'labels') and not (name and from_base(name, data_dir).exists()):
    return None
  if kind != 'tfds':
    return open_source(spec, data_dir, image_size)
  root = tfds.data_root(name, data_dir)
  found = [tfds.find_builder(name, directory) for directory in tfds.data_folders(name, root)]
  if not any(found):
    tfds.refuse_name(name)
  return tfds.tfds_source(name, max(filter(None, found), key=lambda one: len(one.info.splits)))


def digits(argument: str, data_dir: str, image_size: tuple[int, int]) -> Source:
  """Returns a source of scikit-learn's 1,797 grey images of handwritten digits, 8x8 pixels.

  The test split is always the same 360 images, stratified by class. All arguments are ignored.
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
  """Returns a source of generated RGB images of the size `image_size`, for quick tests.

  The source has ten classes. Each image is the fixed pattern of its class plus noise.
  """
  del argument, data_dir
  shape = (*image_size, 3)
  patterns = np.random.RandomState(0).randint(0, 128, (10, *shape), np.uint8)
  sizes = {'train': 1024, 'test': 256}

  def read(split, indices):
    for i in indices:
      # Philox is faster than RandomState here, and its bits are the same in every NumPy version.
      key = np.array([list(sizes).index(split), i], np.uint64)
      bits = np.random.Philox(key=key).random_raw(math.ceil(math.prod(shape) / 8))
      noise = bits.view(np.uint8)[: math.prod(shape)].reshape(shape) >> 1  # 0 to 127
      yield f'synthetic/{split}/{i}', patterns[i % 10] + noise, i % 10

  return Source(sizes, tuple(f'pattern {i}' for i in range(10)), 3, read)


def open_images(path: str, data_dir: str, image_size: tuple[int, int]) -> Source:
  """Opens the folder `path`, which has a subfolder of images for each class.

  `folder.open_folder` describes the splits. If `path` is relative, it starts at `data_dir`.
  """
  del image_size
  return source_of(folder_lib.open_folder(existing('folder', path, data_dir)))


def open_unlabelled(path: str, data_dir: str, image_size: tuple[int, int]) -> Source:
  """Opens a folder of images without labels; the images can be in subfolders at any depth.

  If the folder has a subfolder `train/` and test folders (subfolders with names from `TEST_NAMES`),
  these subfolders are the splits. The first test folder becomes the split `test`; other test
  folders keep their names. If the folder lacks `train/` or test folders, a hash of each image's
  path decides whether the image is in the split `train` or `test`. The hash ignores the first
  folder in the path, such as a class folder. So the sources `images:` and `folder:` hold out the
  same images for testing. If `path` is relative, it starts at `data_dir`.
  """
  del image_size
  root = existing('images', path, data_dir)
  top, passed_over = root / 'train', collections.Counter()
  held_out = test_splits([name for name in TEST_NAMES if (root / name).is_dir()])
  if top.is_dir() and held_out:
    parts = {'train': 'train'} | held_out
    files = {name: list_tree(root / part, passed_over) for name, part in parts.items()}
  else:
    files = list_tree(top if top.is_dir() else root, passed_over).hold_out()
  for split, part in files.items():
    if not len(part):
      listed = np.concatenate([part.hash_N for part in files.values()])
      raise ValueError(
        f'{root}: no images for the split {split!r} (looked for {", ".join(EXTENSIONS)}). Without '
        f'train/ and test/, a hash of the file name selects about {folder_lib.HELD_OUT:.0%} of the '
        'images for testing. With few images, one of the splits can be empty. '
        f'{(part.by_hash and repeated_names(listed)) or "Add images"}.'
      )
  tops = {part.top for part in files.values()}
  unused = folder_lib.unused(root, tops, unread={root} - tops)
  warnings = *folder_lib.not_used(root, passed_over), *unused
  return source_of(folder_lib.Folder((), files, warnings))


def list_tree(top: pathlib.Path, passed_over: collections.Counter) -> folder_lib.Files:
  """Lists the images in `top` and in all folders below it; all labels are 0.

  Folders for which `folder.is_searched` is False are skipped. `passed_over` counts the files that
  are not images, `{extension: number of files}`.
  """
  with progress.announced(f'Listing the images in {top} ...'):
    names = [path.name for path in top.iterdir() if path.is_file()]
    found = [(hash_name(name), os.fsencode(name), 0) for name in only_images(names, passed_over)]
    for name in folder_lib.subfolders(top):
      for below in folder_lib.walk_images(top / name, passed_over):
        found.append((hash_name(below), os.fsencode(f'{name}/{below}'), 0))
  return folder_lib.as_files(top, found)


def check_apart(source: str, data_dir: str, workdir: pathlib.Path) -> None:
  """Raises ValueError if pictures in the workdir would be read as images of the dataset.

  This happens if the workdir is in the image folder of a source `folder:` or `images:`. If the
  image folder has a subfolder `train/`, only `train/` and the test folders matter. Paths in buckets
  are not checked.
  """
  kind, _, path = source.partition(':')
  root = from_base(path, data_dir)
  if kind not in ('folder', 'images') or is_remote(root) or is_remote(workdir):
    return
  split = (root / 'train').is_dir()
  tops = [root / name for name in ('train', *TEST_NAMES)] if split else [root]
  inside = [top for top in tops if workdir.resolve().is_relative_to(top.resolve())]
  if path and inside:
    raise ValueError(
      f'{workdir}: the workdir must not be in the image folder {inside[0]}, because the pictures '
      'in the workdir would become training data. Choose a --workdir outside of this folder.'
    )


def existing(kind: str, path: str, data_dir: str) -> pathlib.Path:
  """Returns the folder of the source `<kind>:<path>`; a relative path starts at `data_dir`.

  Raises:
    ValueError: `path` is empty, or is not the path of a folder.
  """
  root, hint = from_base(path, data_dir), f'Write {kind}:<path of the images>.'
  if not path:
    raise ValueError(f"data.source: '{kind}:' has no path. {hint}")
  root = listed_folder(root) if is_remote(root) else root
  if not root.is_dir():
    raise ValueError(
      f'data.source: no folder at {str(root)!r}. {hint} If a run needs images that were moved, '
      'link the old path to the new one: ln -s <new path> <old path>.'
    )
  return root


def open_labelled(path: str, data_dir: str, image_size: tuple[int, int]) -> Source:
  """Opens the images that a label file (CSV or JSONL) lists, with `labels.open_labels`.

  `path` is the path of the label file; a relative path starts at `data_dir`. In the label file,
  relative paths of images also start at `data_dir` or, if `data_dir` is empty, at the folder of the
  label file.
  """
  del image_size
  file = from_base(path, data_dir)
  if not path:
    raise ValueError("data.source: 'labels:' has no path. Write labels:<a .csv or .jsonl file>.")
  if not file.is_file():
    raise ValueError(f'data.source: no file at {str(file)!r}. Write labels:<path of the file>.')
  top = to_path(data_dir) if data_dir else file.parent
  return source_of(open_labels(file, listed_folder(top) if is_remote(top) else top))


def source_of(found: folder_lib.Folder) -> Source:
  """Returns a source that reads listed image files, such as the result of `open_folder`."""
  files = found.files

  def read(split, indices):
    top, path_N, label_N = files[split].top, files[split].path_N, files[split].label_N
    for i in indices:
      file = top / os.fsdecode(bytes(path_N[i]))
      yield str(file), file, label_N[i] if label_N.ndim == 2 else int(label_N[i])

  return Source(
    {name: len(part) for name, part in files.items()},
    found.class_names,
    3,
    read,
    files['train'].fingerprint(),
    files,
    warnings=(*found.warnings, *uneven_split(files)),
    multi_label=files['train'].label_N.ndim == 2,
  )


def uneven_split(files: Mapping[str, folder_lib.Files]) -> Iterator[str]:
  """Yields a warning if a hash holds out far from `HELD_OUT`, because files share names."""
  train, test = files['train'], files['test']
  share, wanted = len(test) / (len(test) + len(train)), folder_lib.HELD_OUT
  if not test.by_hash or wanted / 2 <= share <= 3 * wanted / 2:
    return
  if repeated := repeated_names(np.concatenate([train.hash_N, test.hash_N])):
    yield (
      f'{train.top}: a hash of the file names holds out {share:.0%} of the images as the split '
      f"'test', instead of about {wanted:.0%}. {repeated}."
    )


def from_base(path: str, data_dir: str) -> pathlib.Path:
  """Returns `path` with `~` expanded; a relative path starts at `data_dir`."""
  return join_paths(to_path(data_dir), to_path(path))


SOURCES = {
  'tfds': tfds.open_tfds,
  'folder': open_images,
  'images': open_unlabelled,
  'labels': open_labelled,
  'digits': digits,
  'synthetic': synthetic,
}
