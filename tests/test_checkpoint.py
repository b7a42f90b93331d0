"""Checkpoints open without this package, on another number of devices."""

import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from vit_jax import checkpoint

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_the_readmes_three_lines_restore_anywhere(trained, tmp_path):
  workdir, _ = trained
  readme = (ROOT / 'README.md').read_text()
  lines = re.search(r'```python\n(import orbax.*?)```', readme, re.DOTALL).group(1)
  assert len([line for line in lines.splitlines() if line]) == 3
  step, params, _ = checkpoint.load(workdir)
  lines = re.sub(r"'[^']*/params'", repr(f'{workdir}/checkpoints/{step}/params'), lines)
  script = lines + (
    "\nimport jax, numpy, sys; assert jax.device_count() == 1 and 'vit_jax' not in sys.modules"
    f'\nnumpy.save({str(tmp_path / "kernel.npy")!r}, params["head"]["kernel"])'
  )
  subprocess.run([sys.executable, '-c', script], cwd=tmp_path, check=True)
  np.testing.assert_array_equal(np.load(tmp_path / 'kernel.npy'), params['head']['kernel'])
  assert jax.device_count() == 2  # and it was written from two


def test_a_workdir_without_a_checkpoint_is_refused(tmp_path):
  with pytest.raises(ValueError, match='no checkpoint'):
    checkpoint.load(tmp_path)
  assert not list(tmp_path.iterdir())
