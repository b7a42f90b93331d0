"""Reads, writes, lists, moves and deletes objects in buckets."""

from collections.abc import Iterator, Sequence
import contextlib
import os
import pathlib
import shutil
import tempfile

from vit_jax.bucket import client
from vit_jax.bucket.errors import is_passing
from vit_jax.bucket.paths import is_remote

AT_ONCE = 64  # maximum number of objects that are read at the same time


def put(file: pathlib.Path, path: os.PathLike) -> None:
  """Uploads a local file as one object. Readers never see a partly written object."""
  client.filesystem().put_file(str(file), os.fspath(path))


def delete_all(path: pathlib.Path) -> None:
  """Deletes a local folder or, in a bucket, the object with this path and all objects below it.

  A path that does not exist is ignored.
  """
  if not is_remote(path):
    shutil.rmtree(path, ignore_errors=True)
    return
  with contextlib.suppress(FileNotFoundError):
    client.filesystem().rm(os.fspath(path), recursive=True)


def move(path: pathlib.Path, target: pathlib.Path) -> None:
  """Moves a local folder, or a folder within a bucket.

  In a bucket, the original objects are deleted after all objects have been copied.
  """
  if not is_remote(path):
    target.parent.mkdir(exist_ok=True)
    shutil.move(path, target)  # copies between two disks, where `rename` fails
    return
  client.filesystem().copy(f'{path}/', f'{target}/', recursive=True)
  delete_all(path)


def list_below(path: os.PathLike) -> dict[str, int]:
  """Returns {name: size in bytes} of all objects below a path in a bucket, sorted by name.

  The names are relative to the path.
  """
  found = client.filesystem().find(os.fspath(path), detail=True)
  top = os.fspath(path).removeprefix('gs://').rstrip('/') + '/'
  named = ((name.removeprefix(top), about['size']) for name, about in found.items())
  return {name: size for name, size in sorted(named) if not name.endswith('/') and name}


def contents(paths: Sequence[os.PathLike]) -> list[bytes | Exception]:
  """Reads objects in parallel, and returns a list with the content or the error of each object.

  The list has the order of `paths`. The error of a missing object is a FileNotFoundError.

  Raises:
    OSError: the bucket does not answer. This temporary error is raised, not put into the list.
  """
  if not paths:
    return []
  names = [os.fspath(path).removeprefix('gs://') for path in paths]
  found = client.filesystem().cat(names, on_error='return', batch_size=AT_ONCE)
  for error in found.values():
    if isinstance(error, Exception) and is_passing(error):
      raise error
  return [found[name] for name in names]


@contextlib.contextmanager
def downloaded(path: os.PathLike) -> Iterator[pathlib.Path]:
  """Context manager that downloads an object, or all objects below a path.

  The context manager yields the path of a local copy, and deletes the copy at the end. If `path` is
  already local, nothing is downloaded, and `path` itself is yielded.
  """
  if not is_remote(path):
    yield path
    return
  with tempfile.TemporaryDirectory(prefix='vit_jax_') as scratch:
    copy = pathlib.Path(scratch) / pathlib.PurePosixPath(os.fspath(path)).name
    client.filesystem().get(os.fspath(path), str(copy), recursive=True)
    yield copy
