"""Lists the files of a dataset in a bucket once, and represents the files as path objects.

Decisions:
  * Listing a million objects takes minutes. So a run stores its lists of files in its workdir
    (`kept_lists`). A resumed run reads the lists from the workdir (`keeping_lists`).
  * Reading many small files one after the other is slow. So `objects.contents` reads them in
    parallel.
"""

from collections.abc import Iterator
import contextlib
import gzip
import hashlib
import json
import os
import pathlib

from vit_jax.bucket import objects

_kept: list[pathlib.Path] = []  # the folder with cache files; empty outside of `keeping_lists`


class Tree:
  """The names and sizes of all files below a folder of a bucket."""

  def __init__(self, sizes: dict[str, int]):
    """Creates the tree from `sizes`: {file name relative to the folder: size in bytes}."""
    self.sizes, self.inside = sizes, {'': {}}  # {folder: {name of a child: whether it is a folder}}
    for name in sizes:
      folder, _, child = name.rpartition('/')
      self.inside.setdefault(folder, {})[child] = False
    for folder in list(self.inside):
      while folder:
        above, _, child = folder.rpartition('/')
        self.inside.setdefault(above, {})[child] = True
        folder = above


_trees: dict[str, Tree] = {}  # {path of a listed folder: tree}


class Listed:
  """A path in a bucket, with the methods of `pathlib.Path` for reading.

  The path is in a folder whose files were listed before. `iterdir` and `is_file` use this list.

  Pickling the path drops the list of files. So after unpickling, the path can be used to read a
  file, but not to list a folder.
  """

  def __init__(self, top: str, inside: str = '', tree: Tree | None = None):
    self._top, self._inside, self._tree = top, inside, tree

  def __reduce__(self):
    return Listed, (self._top, self._inside)

  def __fspath__(self) -> str:
    return f'{self._top}/{self._inside}' if self._inside else self._top

  __str__ = __fspath__

  def __truediv__(self, name: str) -> 'Listed':
    return Listed(self._top, f'{self._inside}/{name}' if self._inside else name, self._tree)

  @property
  def name(self) -> str:
    return str(self).rpartition('/')[2]

  def is_dir(self) -> bool:
    return bool(self._tree.inside.get(self._inside))

  def is_file(self) -> bool:
    return self._inside in self._tree.sizes

  def is_symlink(self) -> bool:
    return False

  def iterdir(self) -> Iterator['Listed']:
    return (self / name for name in self._tree.inside.get(self._inside, ()))

  def walk(self) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yields (path, [], names of the files) for this folder and for all folders below it.

    In contrast to `os.walk`, the second element, the list of subfolders, is always empty.
    """
    children = self._tree.inside.get(self._inside, {})
    yield str(self), [], [name for name, is_folder in children.items() if not is_folder]
    for name, is_folder in children.items():
      if is_folder:
        yield from (self / name).walk()

  def read_bytes(self) -> bytes:
    """Returns the content of the object; raises FileNotFoundError if it does not exist."""
    (found,) = objects.contents([self])
    if isinstance(found, Exception):
      raise found
    return found


def listed_folder(path: os.PathLike) -> Listed:
  """Returns a folder in a bucket as a `Listed` path; lists the folder only at the first call."""
  name = os.fspath(path)
  if name not in _trees:
    _trees[name] = load_tree(name)
  return Listed(name, tree=_trees[name])


def load_tree(name: str) -> Tree:
  """Returns the files below the folder `name`, as listed in a cache file or by the bucket.

  The cache file is in the folder that was passed to `keeping_lists`. If the cache file is missing
  or damaged, the bucket lists the files.
  """
  for folder in _kept:
    with contextlib.suppress(OSError, ValueError, EOFError):  # not cached yet, or damaged
      found = json.loads(gzip.decompress((folder / file_of(name)).read_bytes()))
      if found['path'] == name:
        return Tree(found['sizes'])
  return Tree(objects.list_below(name))


def file_of(name: str) -> str:
  """Returns the name of the cache file that stores the list of files below the folder `name`."""
  return f'{hashlib.sha256(name.encode()).hexdigest()[:16]}.json.gz'


@contextlib.contextmanager
def keeping_lists(folder: pathlib.Path) -> Iterator[None]:
  """Context manager in which `listed_folder` reads lists of files from cache files in `folder`.

  If a folder has no cache file, the bucket lists its files. New cache files are not written here:
  the caller must write them, with the content that `kept_lists` returns.
  """
  _trees.clear()
  _kept.append(folder)
  try:
    yield
  finally:
    _kept.remove(folder)


def kept_lists() -> dict[str, bytes]:
  """Returns a dict `{file name: content}` with one cache file for each listed folder.

  It includes only the folders that were listed since `keeping_lists` was last entered.
  """
  return {
    file_of(name): gzip.compress(json.dumps({'path': name, 'sizes': tree.sizes}).encode(), mtime=0)
    for name, tree in _trees.items()
  }
