"""A dataset whose examples can be read by split and index.

Decisions:
  * A split is resolved to index ranges before anything is decoded, so that every source
    speaks TFDS notation and only what is asked for is read.
  * A source is read by split and index, in any order, and may be sent to another process: what
    reads it holds names and paths, not open files.
  * A percentage of a folder's split is one of its files' positions (`folder.py`), of every other
    split one of its size.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import pathlib
from typing import NoReturn

import numpy as np

from vit_jax.data import folder as folder_lib
from vit_jax.data import image as image_lib
from vit_jax.data import splits

Example = tuple[str, pathlib.Path | bytes | np.ndarray, int]  # name; file, its bytes, pixels; label

READ_AHEAD = 1024  # examples that are held encoded


@dataclasses.dataclass(frozen=True)
class Source:
  """A dataset whose examples can be read by split and index.

  Attributes:
    sizes: number of examples in each whole split.
    class_names: name of each label.
    channels: 1 or 3.
    read: `(split, indices) -> iterator of (name, image, label)`, the image a file, its
      bytes or a uint8 array; not yet looked at, see `pixels`.
    fingerprint: of the training split's names and labels; empty where unknown.
    files: of a folder's splits; empty for other kinds.
    left_out: which files of a split are not given, bool `[N]` by the name of the split.
    warnings: what a person should know about the data.
    spec: the `data.source` that `open_source` opened.
  """

  sizes: dict[str, int]
  class_names: tuple[str, ...]
  channels: int
  read: Callable[[str, Sequence[int]], Iterator[Example]]
  fingerprint: str = ''
  files: Mapping[str, folder_lib.Files] = dataclasses.field(default_factory=dict)
  left_out: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  warnings: tuple[str, ...] = ()
  spec: str = ''

  def pieces(self, split: str) -> list[splits.Piece]:
    """The ranges of examples that a split names, without files that are left out.

    Raises:
      ValueError: bad notation, an unknown name, or no examples.
    """
    positions = {name: files.position_N for name, files in self.files.items()}
    pieces = splits.resolve(split, self.sizes, positions)
    return splits.remove(pieces, self.left_out)


def pixels(
  source: Source, example: Example, size: tuple[int, int], fit: image_lib.Fit
) -> np.ndarray:
  """The pixels of an example, fitted to `size`: `image_HWC`. An array of that size stays whole.

  Raises:
    image.BadImage: it can't be decoded, or has a label that the source has not.
  """
  name, encoded, label = example
  check_label(source, name, label)
  if isinstance(encoded, np.ndarray):
    return encoded if encoded.shape[:2] == size else image_lib.refit(encoded, size, fit)
  return fit(image_lib.decode_image(as_bytes(encoded), name, source.channels), size)


def own_size(example: Example) -> tuple[int, int]:
  """Height and width of an example, as its array or the header of its file says.

  Raises:
    image.BadImage: the header can't be read.
  """
  name, encoded, _ = example
  if isinstance(encoded, np.ndarray):
    return encoded.shape[:2]
  return image_lib.upright_size(as_bytes(encoded), name)


def read_pieces(
  source: Source, pieces: Iterable[tuple[str, int, int]]
) -> Iterator[Iterator[Example]]:
  """The examples of `splits.resolve`'s pieces in order, at most `READ_AHEAD` at once."""
  for split, start, stop in pieces:
    for first in range(start, stop, READ_AHEAD):
      yield source.read(split, range(first, min(first + READ_AHEAD, stop)))


def first_size(source: Source, split: str) -> tuple[int, int] | None:
  """(height, width) of a split's first image; None where it is bad."""
  name, start, _ = source.pieces(split)[0]
  (example,) = source.read(name, [start])
  try:
    return own_size(example)
  except image_lib.BadImage:
    return None


def stop_at(error: image_lib.BadImage) -> NoReturn:
  """Raises what a bad image raises where none is skipped, with what to do about it."""
  raise image_lib.BadImage(
    f'{error} Mend the file, or do without it: --config.data.skip_bad_images=True.'
  ) from error


def check_label(source: Source, name: str, label: int) -> None:
  """Raises BadImage for a label without a class."""
  if not 0 <= label < len(source.class_names):
    raise image_lib.BadImage(
      f'{name}: label {label} is none of the {len(source.class_names)} classes, 0 to '
      f'{len(source.class_names) - 1}.'
    )


def as_bytes(encoded: pathlib.Path | bytes) -> bytes:
  """The file that an example is."""
  return image_lib.read_file(encoded) if isinstance(encoded, pathlib.Path) else encoded


def chunks(items: Iterable, size: int) -> Iterator[list]:
  """Lists of at most `size` items."""
  chunk = []
  for item in items:
    chunk.append(item)
    if len(chunk) == size:
      yield chunk
      chunk = []
  yield chunk
