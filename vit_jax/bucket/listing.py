"""Lists the files of a data set in a bucket once, and offers them as paths.

Decisions:
  * A listing of a million objects takes minutes. A run therefore keeps its lists in its workdir
    (`keeping_lists`), and reads them there when it resumes.
  * Many small files are slow one after the other, so `contents` reads them at the same time.
"""

from collections.abc import Iterator
import contextlib
import gzip
import hashlib
import json
import os
import pathlib

from vit_jax.bucket import objects

_kept: list[pathlib.Path] = []  # the folder of `keeping_lists`, if there is one


class Tree:
  """The names and sizes of all files below a folder of a bucket."""

  def __init__(self, sizes: dict[str, int]):
    """Takes {name relative to the folder: size in bytes}."""
    self.sizes, self.inside = sizes, {'': {}}  # {folder: {name of a child: whether it is a folder}}
    for name in sizes:
      folder, _, child = name.rpartition('/')
      self.inside.setdefault(folder, {})[child] = False
    for folder in list(self.inside):
      while folder:
        above, _, child = folder.rpartition('/')
        self.inside.setdefault(above, {})[child] = True
        folder = above


_trees: dict[str, Tree] = {}  # lists of folders by their paths


class Listed:
  """A path in a bucket below a listed folder, with the methods of `pathlib.Path` for reading.

  It can be sent to other processes; they get it without the list, and can only read the file.
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
    """Yields folder, folders and files of this folder and of all folders below, as `os.walk`."""
    below = f'{self._inside}/' if self._inside else ''
    for folder, children in self._tree.inside.items():
      if folder == self._inside or folder.startswith(below):
        names = [name for name, is_folder in children.items() if not is_folder]
        yield str(Listed(self._top, folder)), [], names

  def read_bytes(self) -> bytes:
    """Returns the content; raises FileNotFoundError if the object does not exist."""
    (found,) = objects.contents([self])
    if isinstance(found, Exception):
      raise found
    return found


def listed_folder(path: os.PathLike) -> Listed:
  """Returns a folder with the list of its files; each folder is listed once per process."""
  name = os.fspath(path)
  if name not in _trees:
    _trees[name] = load_tree(name)
  return Listed(name, tree=_trees[name])


def load_tree(name: str) -> Tree:
  """Returns the list of a folder: from a cache file, or else from the bucket."""
  for folder in _kept:
    with contextlib.suppress(OSError, ValueError, EOFError):  # not cached yet, or damaged
      found = json.loads(gzip.decompress((folder / file_of(name)).read_bytes()))
      if found['path'] == name:
        return Tree(found['sizes'])
  return Tree(objects.list_below(name))


def file_of(name: str) -> str:
  """Returns the name of the cache file for the list of a folder."""
  return f'{hashlib.sha256(name.encode()).hexdigest()[:16]}.json.gz'


@contextlib.contextmanager
def keeping_lists(folder: pathlib.Path) -> Iterator[None]:
  """Uses `folder` as the cache of folder lists; a list that is there is not requested again."""
  _trees.clear()
  _kept.append(folder)
  try:
    yield
  finally:
    _kept.remove(folder)


def kept_lists() -> dict[str, bytes]:
  """Returns the folder lists of this process as cache files, {file name: content}."""
  return {
    file_of(name): gzip.compress(json.dumps({'path': name, 'sizes': tree.sizes}).encode(), mtime=0)
    for name, tree in _trees.items()
  }
