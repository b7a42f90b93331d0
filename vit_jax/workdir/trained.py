"""The files and splits that weights were trained on: what no test may count.

Decisions:
  * A file is known by the hash of its name below its class's folder (`folder.py`), so that it is
    known in another split, another class and another folder, too.
  * A name that held-out files of the same data have as well identifies no image: often both parts
    count from 0001.jpg. Files of such names are known by the hash of their content.
  * Copies of an image under another name are not found.
  * Sources without files (digits, TFDS) are known by `data.source` and the split, wherever they
    lie. A test that shares examples with such a split is refused.
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
from vit_jax.data import Files, Source, num_examples, overlap
from vit_jax.workdir import stored

log = logging.getLogger(__name__)

NONE = np.zeros(0, np.uint64)


@dataclasses.dataclass(frozen=True)
class TrainingFiles:
  """What training files are known by, uint64 hashes of names and of content, and the splits.

  Attributes:
    own_N: of a run's own training files.
    inherited_N: of those of the runs that its weights come from.
    shared_N: hashes of the names whose files are known by their content.
    own_splits: `(data.source, split)` that the run itself is trained on.
    inherited_splits: of the runs that its weights come from.
  """

  own_N: np.ndarray = dataclasses.field(default_factory=lambda: NONE)
  inherited_N: np.ndarray = dataclasses.field(default_factory=lambda: NONE)
  shared_N: np.ndarray = dataclasses.field(default_factory=lambda: NONE)
  own_splits: tuple[tuple[str, str], ...] = ()
  inherited_splits: tuple[tuple[str, str], ...] = ()

  @property
  def all_N(self) -> np.ndarray:
    """Both, each hash once."""
    return np.union1d(self.own_N, self.inherited_N)

  @property
  def all_splits(self) -> tuple[tuple[str, str], ...]:
    """Both, each split once."""
    return tuple(dict.fromkeys(self.own_splits + self.inherited_splits))

  def before(self) -> 'TrainingFiles':
    """Those of earlier runs alone."""
    return dataclasses.replace(self, own_N=NONE, own_splits=())

  def item(self) -> dict[str, np.ndarray]:
    """The item of a checkpoint. A zero leads each array, because orbax saves no empty one."""
    hashes = {field: value for field, value in vars(self).items() if field.endswith('_N')}
    return {field: np.append(np.uint64(0), value) for field, value in hashes.items()}

  @classmethod
  def load(cls, saved: Mapping) -> 'TrainingFiles | None':
    """From what a checkpoint holds; None where a folder was trained on and its names not kept."""
    if saved['names'] is None and saved['task'].get('fingerprint'):
      return None
    own = trained_splits(saved['config'])
    inherited = tuple(map(tuple, saved.get('inherited_splits', ())))
    hashes = {field: value[1:] for field, value in (saved['names'] or {}).items()}
    return cls(**hashes, own_splits=own, inherited_splits=inherited)


def training_files_of(workdir: pathlib.Path) -> TrainingFiles | None:
  """`TrainingFiles.load` of a workdir's newest checkpoint; none where there is no checkpoint."""
  step = stored.latest_step(workdir)
  if step is None:
    return TrainingFiles()
  about = stored.restore_item(workdir, step, 'config')
  return TrainingFiles.load(about | {'names': stored.restore_item(workdir, step, 'names')})


def trained_splits(config: Mapping) -> tuple[tuple[str, str], ...]:
  """`(data.source, split)` of what a run of this config is trained on."""
  data = config['data']
  # The last run of a sweep trains on the held-out split, too.
  names = [data['train_split'], *[data['val_split']] * bool(config.get('sweep'))]
  return tuple((data['source'], name) for name in names)


def find_training_files(source: Source, config: Mapping, earlier: TrainingFiles) -> TrainingFiles:
  """What a run of this config is trained on, after what earlier runs were."""
  own_splits = trained_splits(config)
  known = hash_training_files(source, [split for _, split in own_splits], earlier)
  return dataclasses.replace(known, own_splits=own_splits, inherited_splits=earlier.all_splits)


def hash_training_files(
  source: Source, trained_on: Sequence[str], earlier: TrainingFiles
) -> TrainingFiles:
  """What the files in some splits of a source are known by, after those of earlier runs."""
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
      '%d of %d names of training files are names of held-out files, too: files of these names are '
      'compared by their content.',
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
  """64 bits of the SHA-256 of each of these files' bytes; 0 where a file can't be read."""

  def of_one(index):
    try:
      path = files.top / os.fsdecode(bytes(files.path_N[index]))
      return int.from_bytes(hashlib.sha256(path.read_bytes()).digest()[:8], 'big')
    except OSError:  # it is named when it is decoded
      return 0

  with concurrent.futures.ThreadPoolExecutor() as pool:
    hashes = progress.bar(pool.map(of_one, index_N), 'Comparing', 'image', len(index_N))
    return np.array(list(hashes), np.uint64)


def known(files: Files, names: TrainingFiles) -> np.ndarray:
  """Which of the files were trained on, bool `[N]`."""
  found_N = np.isin(files.hash_N, names.all_N)
  index_N = np.flatnonzero(~found_N & np.isin(files.hash_N, names.shared_N))
  if len(index_N):
    found_N[index_N] = np.isin(content(files, index_N), names.all_N)
  return found_N


def check_untrained(source: Source, split: str, names: TrainingFiles) -> None:
  """Raises ValueError where a test shares examples with a split that was trained on.

  Files are left to `leave_out_trained`.
  """
  for spec, trained_on in () if source.files else names.all_splits:
    if spec == source.spec and overlap(source.pieces(split), source.pieces(trained_on)):
      raise ValueError(
        f'Split {split!r} shares examples with {trained_on!r} of {spec}, which the weights were '
        'trained on, so it is no test. Choose another data.eval_split.'
      )


def leave_out_trained(source: Source, split: str, names: TrainingFiles) -> tuple[Source, int]:
  """The source without the files of a split that were trained on, and their number.

  Raises:
    ValueError: they are all of it.
  """
  pieces = source.pieces(split)
  inside = {name for name, _, _ in pieces} & set(source.files)
  masks = {name: known(source.files[name], names) for name in inside}
  source = dataclasses.replace(source, left_out=masks)
  before = num_examples(pieces)
  number = before - num_examples(source.pieces(split))
  if number == before:
    raise ValueError(
      f'Split {split!r}: the weights were trained on all {before:,} images, going by the names or '
      'the content of their files, so they are no test. Choose another split, or another folder.'
    )
  if number:
    log.warning(
      '%s: %d of %d images are left out: the weights were trained on them, going by the names or '
      'the content of their files.',
      split,
      number,
      before,
    )
  return source, number
