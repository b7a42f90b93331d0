"""Describes the data that weights were trained on, so that no test uses training examples.

Decisions:
  * The name of a file is the path after the class folder, e.g. `a/1.jpg` for `train/cat/a/1.jpg`.
    The hash of this name identifies the file in any split, class or folder.
  * A training file and a held-out file can have the same name, e.g. if the files of each split are
    numbered from 0001.jpg. Files with such names are identified by the hash of their content.
  * Copies of an image under a different name are not found.
  * Data sets without files (digits, TFDS) are identified by `data.source` alone, not by `data.dir`.
    `audit.check_untrained` compares their splits.
"""

from collections.abc import Mapping, Sequence
import concurrent.futures
import dataclasses
import hashlib
import logging
import os
import pathlib

import numpy as np

from vit_jax import progress
from vit_jax.data import Files, Source, num_examples
from vit_jax.workdir import stored

log = logging.getLogger(__name__)

NONE = np.zeros(0, np.uint64)  # no hashes


@dataclasses.dataclass(frozen=True)
class Task:
  """Properties of the training data; every checkpoint stores them.

  Attributes:
    class_names: name of each class; empty for weights without a head, and for runs without labels.
    stored_size: (height, width) of the images that the host passes to the devices; None if images
      keep their aspect ratio.
    channels: 1 (grey) or 3 (RGB).
    train_examples: number of training examples. The order of the examples depends on this number.
    fingerprint: hash of the file paths and labels in the split `train`; empty if unknown.
    multi_label: whether an image can have any number of labels, from none to all classes.
  """

  class_names: tuple[str, ...]
  stored_size: tuple[int, int] | None
  channels: int
  train_examples: int = 0
  fingerprint: str = ''
  multi_label: bool = False

  @classmethod
  def load(cls, saved: dict) -> 'Task':
    """Restores a task from the key `task` of the JSON in a checkpoint (its item `config`)."""
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})


@dataclasses.dataclass(frozen=True)
class TrainingFiles:
  """The files and splits that weights were trained on, with a uint64 hash for each file.

  Attributes:
    own_N: hashes of the run's own training files, computed from the name or the content of a file.
    inherited_N: hashes of the files that the `init` weights and the teacher were trained on.
    shared_N: hashes of file names that occur both among the training files and among the held-out
      files. Such a name can stand for two files, so files with these names are compared by content.
    own_splits: `(data.source, split)` pairs that the run itself is trained on.
    inherited_splits: `(data.source, split)` pairs that the `init` weights and the teacher were
      trained on.
  """

  own_N: np.ndarray = dataclasses.field(default_factory=lambda: NONE)
  inherited_N: np.ndarray = dataclasses.field(default_factory=lambda: NONE)
  shared_N: np.ndarray = dataclasses.field(default_factory=lambda: NONE)
  own_splits: tuple[tuple[str, str], ...] = ()
  inherited_splits: tuple[tuple[str, str], ...] = ()

  @property
  def all_N(self) -> np.ndarray:
    """Own and inherited hashes, without duplicates."""
    return np.union1d(self.own_N, self.inherited_N)

  @property
  def all_splits(self) -> tuple[tuple[str, str], ...]:
    """Own and inherited splits, without duplicates."""
    return tuple(dict.fromkeys(self.own_splits + self.inherited_splits))

  def own(self) -> 'TrainingFiles':
    """Returns a copy with only the files and splits of the run itself."""
    return dataclasses.replace(self, inherited_N=NONE, inherited_splits=())

  def before(self) -> 'TrainingFiles':
    """Returns a copy with the files and splits of `init` and teacher only, not the run's own."""
    return dataclasses.replace(self, own_N=NONE, own_splits=())

  def with_inherited(self, other: 'TrainingFiles') -> 'TrainingFiles':
    """Returns a copy that also inherits all files and splits of `other`."""
    return dataclasses.replace(
      self,
      inherited_N=np.union1d(self.inherited_N, other.all_N),
      shared_N=np.union1d(self.shared_N, other.shared_N),
      inherited_splits=tuple(dict.fromkeys(self.inherited_splits + other.all_splits)),
    )

  def item(self) -> dict[str, np.ndarray]:
    """Returns the hashes of the files as a dict of uint64 arrays, the item `names` of a checkpoint.

    Each array begins with an extra 0, because orbax cannot save empty arrays.
    """
    hashes = {field: value for field, value in vars(self).items() if field.endswith('_N')}
    return {field: np.append(np.uint64(0), value) for field, value in hashes.items()}

  @classmethod
  def load(cls, saved: Mapping) -> 'TrainingFiles | None':
    """Restores the training files that a checkpoint has recorded.

    Returns None if the run trained on an image folder, but did not record the files.

    Args:
      saved: the JSON of the checkpoint (its item `config`), plus a key `names` with the dict that
        `item` has returned. The value of `names` is None if the checkpoint has no such dict.
    """
    if saved['names'] is None and saved['task'].get('fingerprint'):
      return None
    own = trained_splits(saved['config'])
    inherited = tuple(map(tuple, saved.get('inherited_splits', ())))
    hashes = {field: value[1:] for field, value in (saved['names'] or {}).items()}
    return cls(**hashes, own_splits=own, inherited_splits=inherited)


def training_files_of(workdir: pathlib.Path) -> TrainingFiles | None:
  """Returns the files and splits that a run was trained on, read from its newest checkpoint.

  Without a checkpoint, the result has no files. The result is None if the run trained on an image
  folder, but did not record the files.
  """
  step = stored.latest_step(workdir)
  if step is None:
    return TrainingFiles()
  about = stored.restore_item(workdir, step, 'config')
  return TrainingFiles.load(about | {'names': stored.restore_item(workdir, step, 'names')})


def trained_splits(config: Mapping) -> tuple[tuple[str, str], ...]:
  """Returns the `(data.source, split)` pairs that a run with this config is trained on."""
  data = config['data']
  # The final run of a sweep also trains on the validation split.
  names = [data['train_split'], *[data['val_split']] * bool(config.get('sweep'))]
  return tuple((data['source'], name) for name in names)


def find_training_files(source: Source, config: Mapping, earlier: TrainingFiles) -> TrainingFiles:
  """Returns the files and splits that a run trains on or inherits from `earlier`.

  Args:
    source: dataset of the run.
    config: config of the run.
    earlier: training files and splits of the `init` weights and of the teacher.
  """
  own_splits = trained_splits(config)
  known = hash_training_files(source, [split for _, split in own_splits], earlier)
  return dataclasses.replace(known, own_splits=own_splits, inherited_splits=earlier.all_splits)


def hash_training_files(
  source: Source, trained_on: Sequence[str], earlier: TrainingFiles
) -> TrainingFiles:
  """Returns the hashes of the files in the splits `trained_on`, and the hashes in `earlier`.

  Args:
    source: dataset of the run.
    trained_on: the splits, in TFDS notation.
    earlier: training files of the `init` weights and of the teacher. The result has their hashes
      in `inherited_N`.
  """
  inside = {name: np.zeros(len(files), bool) for name, files in source.files.items()}
  if not inside:
    return TrainingFiles(NONE, earlier.all_N, earlier.shared_N)
  for split in trained_on:
    for name, start, stop in source.pieces(split):
      inside[name][start:stop] = True
  hashes = {name: files.hash_N for name, files in source.files.items()}
  found_N = np.unique(np.concatenate([hashes[name][mask] for name, mask in inside.items()]))
  others_N = np.concatenate([hashes[name][~mask] for name, mask in inside.items()])
  shared_N = found_N[np.isin(found_N, others_N)]
  own = [np.setdiff1d(found_N, shared_N)]
  if len(shared_N):
    log.info(
      '%d of %d names of training files are also names of held-out files. Files with '
      'these names are identified by their content.',
      len(shared_N),
      len(found_N),
    )
    own += [
      content(files, np.flatnonzero(inside[name] & np.isin(files.hash_N, shared_N)))
      for name, files in source.files.items()
    ]
  shared_N = np.union1d(shared_N, earlier.shared_N)
  return TrainingFiles(np.unique(np.concatenate(own)), earlier.all_N, shared_N)


def content(files: Files, index_N: np.ndarray) -> np.ndarray:
  """Returns a hash of the content of each file, uint64; 0 if the file cannot be read.

  The hash is the first 64 bits of the SHA-256. `index_N` selects the files.
  """

  def of_one(index):
    try:
      path = files.top / os.fsdecode(bytes(files.path_N[index]))
      return int.from_bytes(hashlib.sha256(path.read_bytes()).digest()[:8], 'big')
    except OSError:  # the error is reported when the file is decoded
      return 0

  with concurrent.futures.ThreadPoolExecutor() as pool:
    hashes = progress.bar(pool.map(of_one, index_N), 'Comparing', 'image', len(index_N))
    return np.array(list(hashes), np.uint64)


def known(files: Files, names: TrainingFiles) -> np.ndarray:
  """Returns a bool array `[N]` that is True for each file that weights were trained on.

  Args:
    files: N files.
    names: files that the weights were trained on.
  """
  found_N = np.isin(files.hash_N, names.all_N)
  index_N = np.flatnonzero(~found_N & np.isin(files.hash_N, names.shared_N))
  if len(index_N):
    found_N[index_N] = np.isin(content(files, index_N), names.all_N)
  return found_N


class NothingLeft(ValueError):
  """The weights were trained on all files of a split."""


def leave_out_trained(source: Source, split: str, names: TrainingFiles) -> tuple[Source, int]:
  """Returns the data set of a held-out split without files that the weights were trained on.

  Args:
    source: dataset of the test or the validation.
    split: the held-out split, in TFDS notation.
    names: files that the weights were trained on.

  Returns:
    The data set without these files, and the number of left-out files.

  Raises:
    NothingLeft: the weights were trained on all files of the split.
  """
  pieces = source.pieces(split)
  inside = {name for name, _, _ in pieces} & set(source.files)
  masks = {name: known(source.files[name], names) for name in inside}
  source = dataclasses.replace(source, left_out=masks)
  before = num_examples(pieces)
  number = before - num_examples(source.pieces(split))
  if number == before:
    raise NothingLeft(
      f'Split {split!r}: the weights were trained on all {before:,} images, judging by the names '
      'or the content of the files. Choose a different split or folder. If these images are '
      'different images that only have the names of training images, move the images of each class '
      'into a subfolder such as <class>/new/. This changes their names, because a name is the path '
      'below the class folder.'
    )
  if number:
    log.warning(
      '%s: %d of %d images are left out, because the weights were trained on these images, judging '
      'by file names or content.',
      split,
      number,
      before,
    )
  return source, number
