"""Defines `Source`, a dataset whose examples can be read by split and index.

Decisions:
  * A split such as `train[:90%]` is resolved to index ranges before anything is decoded. So every
    source understands this notation of TFDS, and only the requested examples are read.
  * The examples of a source can be read in any order. A source can be sent to worker processes, so
    its function `read` holds names and paths, but no open files.
  * For sources with image files, a percentage of a split is a range of hash positions
    (`folder.py`). For other sources, a percentage is a fraction of the number of examples.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
import dataclasses
import errno
import pathlib
import stat
from typing import NoReturn

import numpy as np

from vit_jax.bucket import Listed, contents, is_remote
from vit_jax.data import folder as folder_lib
from vit_jax.data import image as image_lib
from vit_jax.data import splits

# (name, image, label). The name is for messages. The image is the path of a file, the content of a
# file, or a uint8 array of pixels. The label is a class index, or multi-hot: uint8 `[L]` with a 1
# for each label.
Example = tuple[str, pathlib.Path | bytes | np.ndarray, int | np.ndarray]

# Errors of the machine or the file system. The file can be intact, so it must not be skipped.
MACHINE = (
  errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ENOTCONN,
  errno.ETIMEDOUT,
)  # fmt: skip
READ_AHEAD = 1024  # maximum number of encoded examples held at once


@dataclasses.dataclass(frozen=True)
class Source:
  """A dataset whose examples can be read by split and index.

  Attributes:
    sizes: number of examples in each whole split.
    class_names: name of the class of each label; empty if the dataset has no labels.
    channels: number of channels of the images, 1 (grey) or 3 (RGB).
    read: `(split, indices) -> iterator of (name, image, label)`, as described at `Example`. An
      image can be an encoded file, which the function `pixels` decodes.
    fingerprint: hash of the file names and labels in the training split; empty for datasets
      without a list of files.
    files: {split: listed files} for the kinds `folder`, `images` and `labels` of `data.source`;
      empty for other kinds.
    left_out: {split: bool `[N]`}, True for each file of the split that must not be read.
    warnings: messages for the user about the data.
    spec: the value of `data.source` that `open_source` opened.
    multi_label: True: labels are multi-hot, so an image can have several labels or none.
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
  multi_label: bool = False

  @property
  def label_shape(self) -> tuple[int, ...]:
    """Shape of an image's label: () for a class index, (L,) for a multi-hot label."""
    return (len(self.class_names),) if self.multi_label else ()

  @property
  def label_type(self) -> type[np.integer]:
    """NumPy type of label arrays: uint8 for multi-hot labels, else int32."""
    return np.uint8 if self.multi_label else np.int32

  def pieces(self, split: str) -> list[splits.Piece]:
    """Returns the ranges of examples that make up a split, without the files in `left_out`.

    A range is (name of a whole split, start, stop). `split` is in TFDS notation.

    Raises:
      ValueError: invalid notation, an unknown split name, or no examples.
    """
    positions = {name: files.position_N for name, files in self.files.items()}
    pieces = splits.resolve(split, self.sizes, positions)
    return splits.remove(pieces, self.left_out)


def identity(source: Source, examples: Mapping[str, Sized | None]) -> dict[str, int | str]:
  """Returns properties of a data set that must be equal in all processes.

  They are the numbers of examples in opened splits, and fingerprints of the held-out files.
  """
  sizes = {name: len(split) for name, split in examples.items() if split is not None}
  held_out = {name: files for name, files in source.files.items() if name != 'train'}
  return sizes | {f'files of {name}': files.fingerprint() for name, files in held_out.items()}


def multi_hot(source: Source) -> Source:
  """Returns the source with multi-hot labels, for models that can predict several labels."""
  if source.multi_label:
    return source
  eye_LL = np.eye(len(source.class_names), dtype=np.uint8)

  def read(split, indices):
    for name, image, label in source.read(split, indices):
      yield name, image, eye_LL[label]

  files = {
    name: dataclasses.replace(part, label_N=eye_LL[part.label_N])
    for name, part in source.files.items()
  }
  return dataclasses.replace(source, read=read, files=files, multi_label=True)


def unlabelled(source: Source) -> Source:
  """Returns the source without its class names, and with 0 as the label of every example."""
  if not source.class_names:
    return source

  def read(split, indices):
    for name, image, _ in source.read(split, indices):
      yield name, image, 0

  files = {
    name: dataclasses.replace(part, label_N=np.zeros(len(part), np.int32))
    for name, part in source.files.items()
  }
  return dataclasses.replace(source, class_names=(), read=read, files=files, multi_label=False)


def pixels(
  source: Source, example: Example, size: tuple[int, int] | None, fit: image_lib.Fit
) -> np.ndarray:
  """Decodes the image of an example, and scales it with `fit`: uint8 `[H, W, C]`.

  `size` is the (height, width) of the result; None: `fit` chooses the size.

  Raises:
    image.BadImage: the image cannot be decoded, or the source has no class for its label.
  """
  name, encoded, label = example
  check_label(source, name, label)
  if isinstance(encoded, np.ndarray):
    return image_lib.refit(encoded, size, fit)
  return fit(image_lib.decode_image(as_bytes(encoded), name, source.channels), size)


def own_size(example: Example) -> tuple[int, int]:
  """Returns the (height, width) of an example's image, usually without decoding pixels.

  EXIF rotation is taken into account. A PNG file is decoded if its header has no EXIF data, because
  this data can follow the pixels.

  Raises:
    image.BadImage: the header cannot be read, or such a PNG file cannot be decoded.
  """
  name, encoded, _ = example
  if isinstance(encoded, np.ndarray):
    return encoded.shape[:2]
  return image_lib.upright_size(as_bytes(encoded), name)


def read_pieces(
  source: Source, pieces: Iterable[tuple[str, int, int]]
) -> Iterator[Iterator[Example]]:
  """Reads the ranges `pieces`, (split, start, stop), in chunks of `READ_AHEAD` examples.

  Yields an iterator of examples for each chunk. The last chunk of each range can be shorter.
  """
  for split, start, stop in pieces:
    for first in range(start, stop, READ_AHEAD):
      yield fetched(source.read(split, range(first, min(first + READ_AHEAD, stop))))


def first_size(source: Source, split: str) -> tuple[int, int] | None:
  """Returns the (height, width) of a split's first image; None if the size cannot be read."""
  name, start, _ = source.pieces(split)[0]
  (example,) = source.read(name, [start])
  try:
    return own_size(example)
  except image_lib.BadImage:
    return None


def stop_at(error: image_lib.BadImage) -> NoReturn:
  """Raises a BadImage with the message of `error`, and with advice to repair or skip the file."""
  raise image_lib.BadImage(
    f'{error} Repair the file, or skip bad images: --config.data.skip_bad_images=True.'
  ) from error


def check_label(source: Source, name: str, label: int | np.ndarray) -> None:
  """Raises BadImage if the source has no class for `label`; the message gives `name`."""
  if source.multi_label or not source.class_names:
    return
  if not 0 <= label < len(source.class_names):
    raise image_lib.BadImage(
      f'{name}: label {label} is not one of the {len(source.class_names)} classes, 0 to '
      f'{len(source.class_names) - 1}.'
    )


def as_bytes(encoded: pathlib.Path | bytes) -> bytes:
  """Returns the content of an image file, given its path or the content itself."""
  return encoded if isinstance(encoded, bytes) else read_file(encoded)


def read_file(path: pathlib.Path) -> bytes:
  """Returns the bytes of a file.

  Raises:
    image.BadImage: the file cannot be read.
    OSError: the reason is not the file, but the machine (`MACHINE`).
  """
  if is_remote(path):
    try:
      return path.read_bytes()
    except FileNotFoundError as error:
      raise image_lib.BadImage(f'{path}: there is no such object.') from error
  try:
    if not stat.S_ISREG(path.stat().st_mode):  # reading from a pipe might never end
      raise image_lib.BadImage(f'{path}: not a regular file.')
    return path.read_bytes()
  except OSError as error:
    if error.errno in MACHINE:
      reason = f'{error.strerror}. The file can be intact. Check the disk and `ulimit -n`'
      raise OSError(error.errno, reason, str(path)) from error
    raise image_lib.BadImage(f'{path}: {error.strerror}.') from error


def fetched(examples: Iterable[Example]) -> Iterator[Example]:
  """Yields the examples; replaces each path in a bucket with the content of the file.

  Up to `READ_AHEAD` files are requested together. The path of a missing file is not replaced, so
  the error is raised later, when the file is decoded.
  """
  for chunk in chunks(examples, READ_AHEAD):
    remote = [encoded for _, encoded, _ in chunk if isinstance(encoded, Listed)]
    found = iter(contents(remote))
    for name, encoded, label in chunk:
      content = next(found) if isinstance(encoded, Listed) else encoded
      yield name, encoded if isinstance(content, Exception) else content, label


def chunks(items: Iterable, size: int) -> Iterator[list]:
  """Yields the items in lists of length `size`, then a shorter, possibly empty list of the rest."""
  chunk = []
  for item in items:
    chunk.append(item)
    if len(chunk) == size:
      yield chunk
      chunk = []
  yield chunk
