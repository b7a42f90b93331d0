"""The files that weights were trained on: what no test may count.

Decisions:
  * A file is known by the hash of its name below its class's folder (`folder.py`), so that it is
    known in another split, another class and another folder, too.
  * A name that held-out files of the same data have as well identifies no image and is not kept:
    where both parts count from 0001.jpg, these are different images.
  * Only names are compared. Copies of an image under another name are not found.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import logging
import pathlib

import numpy as np

from vit_jax import checkpoint, sources, splits

log = logging.getLogger(__name__)

NONE = np.zeros(0, np.uint64)


@dataclasses.dataclass(frozen=True)
class Names:
  """Hashes of names, uint64: of a run's own training files, and of those of the runs before it."""

  own_N: np.ndarray = dataclasses.field(default_factory=lambda: NONE)
  inherited_N: np.ndarray = dataclasses.field(default_factory=lambda: NONE)

  @property
  def all_N(self) -> np.ndarray:
    """Both, each hash once."""
    return np.union1d(self.own_N, self.inherited_N)

  def item(self) -> dict[str, np.ndarray]:
    """The item of a checkpoint. A zero leads each array, because orbax saves no empty one."""
    return {field: np.append(np.uint64(0), value) for field, value in vars(self).items()}

  @classmethod
  def load(cls, saved: Mapping) -> 'Names | None':
    """From what a checkpoint holds; None where a folder was trained on and its names not kept."""
    if saved['names'] is not None:
      return cls(**{field: value[1:] for field, value in saved['names'].items()})
    return None if saved['task'].get('fingerprint') else cls()


def of_run(workdir: pathlib.Path) -> Names | None:
  """As `Names.load`, of a workdir's newest checkpoint; none where there is no checkpoint."""
  step = checkpoint.latest_step(workdir)
  if step is None:
    return Names()
  about = checkpoint.restore_item(workdir, step, 'config')
  return Names.load(about | {'names': checkpoint.restore_item(workdir, step, 'names')})


def own_names(source: sources.Source, trained_on: Sequence[str]) -> np.ndarray:
  """The hashes of the names of all files in some splits of a source, sorted, each once."""
  inside = {name: np.zeros(len(files), bool) for name, files in source.files.items()}
  if not inside:
    return NONE
  for split in trained_on:
    for name, start, stop in source.pieces(split):
      inside[name][start:stop] = True
  hashes = {name: files.hash_N for name, files in source.files.items()}
  found_N = np.unique(np.concatenate([hashes[name][mask] for name, mask in inside.items()]))
  others_N = np.concatenate([hashes[name][~mask] for name, mask in inside.items()])
  shared_N = np.isin(found_N, others_N)
  if shared_N.any():
    log.info(
      '%d of %d names of training files are names of held-out files, too: they do not identify '
      'an image, and the checkpoint does not keep them.',
      shared_N.sum(),
      len(found_N),
    )
  return found_N[~shared_N]


def leave_out(
  source: sources.Source, split: str, hash_N: np.ndarray
) -> tuple[sources.Source, int]:
  """The source without the files of these names, and how many of a split they are.

  Raises:
    ValueError: they are all of it.
  """
  before = splits.length(source.pieces(split))
  source = dataclasses.replace(source, left_out=hash_N)
  number = before - splits.length(source.pieces(split))
  if number == before:
    raise ValueError(
      f'Split {split!r}: the weights were trained on files of the names of all {before:,} images, '
      'so they are no test. Choose another split, or another folder.'
    )
  if number:
    log.warning(
      '%s: %d of %d images are left out: the weights were trained on files of their names.',
      split,
      number,
      before,
    )
  return source, number
