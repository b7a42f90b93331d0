"""Tests that the notebook runs, has fresh outputs and uses only public names."""

import ast
import pathlib

import pytest

nbformat = pytest.importorskip('nbformat', reason='pip install -r requirements-demo.txt')
nbclient = pytest.importorskip('nbclient', reason='pip install -r requirements-demo.txt')

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def notebook():
  return nbformat.read(ROOT / 'notebooks' / 'walkthrough.ipynb', as_version=4)


@pytest.mark.long
def test_notebook_runs_and_removes_its_files(notebook, monkeypatch, tmp_path):
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  monkeypatch.setenv('TMPDIR', str(tmp_path))
  client = nbclient.NotebookClient(notebook, timeout=300)
  client.create_kernel_manager()
  client.km.shutdown_wait_time = 60.0  # a busy machine needs more than the default of 5 s to exit
  client.execute()  # raises an error if a cell does
  assert not list(tmp_path.iterdir())


def test_notebook_is_committed_with_its_outputs(notebook):
  cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
  assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
  outputs = [output for cell in cells for output in cell.outputs]
  assert not [output for output in outputs if output.output_type == 'error']
  assert sum('image/png' in output.get('data', {}) for output in outputs) == 6


def test_notebook_uses_only_public_names(notebook):
  code = [cell.source for cell in notebook.cells if cell.cell_type == 'code']
  lines = [line for cell in code for line in cell.splitlines() if not line.startswith('%')]
  for node in ast.walk(ast.parse('\n'.join(lines))):
    if isinstance(node, ast.Attribute):
      assert not node.attr.startswith('_'), node.attr
