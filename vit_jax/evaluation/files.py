"""Finds image files, which the user gives as files, folders or glob patterns."""

from collections.abc import Iterable
import glob
import logging
import os
import pathlib

from vit_jax import progress
from vit_jax.bucket import local_only
from vit_jax.data import EXTENSIONS, has_image_name, is_searched

log = logging.getLogger(__name__)

PathLike = str | os.PathLike


def find_images(paths: PathLike | Iterable[PathLike]) -> list[pathlib.Path]:
  """Returns the image files that are given as paths of files, paths of folders or glob patterns.

  The order of `paths` is kept. A folder is replaced by the sorted list of all images in the folder
  and its subfolders. A pattern is replaced by the sorted list of all images that match. A path of a
  file is returned without a check that the file exists.

  Raises:
    ValueError: no path is given, a value is not a path, a folder contains no image, or no image
      matches a pattern.
  """
  if isinstance(paths, PathLike):
    paths = [paths]
  items = list(paths) if isinstance(paths, Iterable) else [paths]
  for wrong in (item for item in items if not isinstance(item, PathLike)):
    kind = type(wrong).__name__
    raise ValueError(f'images: expected a path or a list of paths, got a value of type {kind}.')
  if not items:
    raise ValueError('--images is empty: give a comma-separated list such as file.png,folder/.')
  found, kinds = [], ', '.join(EXTENSIONS)
  for path in (local_only('--images', item) for item in items):
    if os.path.isdir(path):
      inside = images_below(path)
      if not inside:
        raise ValueError(f'{path}: no images in this folder (looked for {kinds}).')
      found += inside
    elif not os.path.exists(path) and any(sign in str(path) for sign in '*?['):
      inside = [p for p in glob.iglob(pattern_of(path), recursive=True) if is_image(p)]
      if not inside:
        raise ValueError(f'{path}: no image matches this pattern (looked for {kinds}).')
      found += sorted(map(pathlib.Path, inside))
    else:
      found.append(path)
  return found


def pattern_of(path: pathlib.Path) -> str:
  """Returns the glob pattern of a path, with the names of existing folders taken literally."""
  folder = next(folder for folder in path.parents if folder.is_dir())
  return os.path.join(glob.escape(str(folder)), path.relative_to(folder))


def images_below(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns a sorted list of all image files in a folder and its subfolders.

  Links to folders are followed, as in training. Folders for which `is_searched` is False, such as
  hidden folders, are skipped. If folders cannot be read, they are skipped and a warning is logged.
  """
  errors, found = [], []
  with progress.announced(f'Listing the images in {folder} ...'):
    for top, folders, names in os.walk(folder, onerror=errors.append, followlinks=True):
      # `os.walk` enters only the folders that stay in this list.
      folders[:] = [name for name in folders if is_searched(pathlib.Path(top, name))]
      found += filter(is_image, (os.path.join(top, name) for name in names))
  found = sorted(map(pathlib.Path, found))
  if errors:
    log.warning(
      '%s: skipped %d folders that cannot be read. The first one is %s: %s.',
      folder,
      len(errors),
      errors[0].filename,
      errors[0].strerror,
    )
  return found


def is_image(path: str) -> bool:
  """Returns whether a path has the extension of an image, and is a file or a broken link.

  Broken links are included, so that the user sees an error when they are read.
  """
  dangling = os.path.islink(path) and not os.path.exists(path)
  return has_image_name(os.path.basename(path)) and (os.path.isfile(path) or dangling)
