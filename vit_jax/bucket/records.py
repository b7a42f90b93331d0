"""Keeps a run's log files in a local folder, and uploads them to the run's workdir in a bucket.

A program cannot append data to an object in a bucket. So a run writes `metrics.jsonl`, `log.txt`
and TensorBoard events to local files, and uploads whole files. A resumed run first downloads
`metrics.jsonl` and `log.txt`.
"""

from collections.abc import Sequence
import contextlib
import pathlib
import tempfile

from vit_jax.bucket import objects


class Mirror:
  """Context manager for a temporary local folder; `upload` copies its files to a bucket.

  The attribute `folder` is the path of the temporary folder. The folder is deleted at the end.
  """

  def __init__(self, remote: pathlib.Path, names: Sequence[str]):
    """Creates the temporary folder, and downloads the files `names` from `remote` into it.

    Files that do not exist in `remote` are skipped.
    """
    self._remote, self._sent = remote, {}
    self._scratch = tempfile.TemporaryDirectory(prefix='vit_jax_records_')
    self.folder = pathlib.Path(self._scratch.name)
    for name in names:
      with contextlib.suppress(FileNotFoundError):
        (self.folder / name).write_bytes((remote / name).read_bytes())

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._scratch.cleanup()

  def upload(self) -> None:
    """Uploads all files whose size or modification time has changed since their last upload."""
    for file in sorted(self.folder.rglob('*')):
      about = file.stat()
      state = about.st_size, about.st_mtime_ns
      if file.is_file() and self._sent.get(file) != state:
        objects.put(file, self._remote / file.relative_to(self.folder))
        self._sent[file] = state
