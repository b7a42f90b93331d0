"""Writes the log files of a workdir in a bucket to a local folder, and uploads them whole.

Data cannot be appended to objects. So `metrics.jsonl`, `log.txt` and TensorBoard events are written
locally. A resumed run downloads them first.
"""

from collections.abc import Sequence
import contextlib
import pathlib
import tempfile

from vit_jax.bucket import objects


class Mirror:
  """Context manager for a local scratch folder; `upload` copies its files to a bucket."""

  def __init__(self, remote: pathlib.Path, names: Sequence[str]):
    """Creates the scratch folder, and downloads the named files of `remote` that exist into it."""
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
    """Uploads all files that changed since the last upload."""
    for file in sorted(self.folder.rglob('*')):
      about = file.stat()
      state = about.st_size, about.st_mtime_ns
      if file.is_file() and self._sent.get(file) != state:
        objects.put(file, self._remote / file.relative_to(self.folder))
        self._sent[file] = state
