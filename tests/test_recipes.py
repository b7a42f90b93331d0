"""Sweeps and the table of results, on runs of a few seconds."""

import json

import pytest

from benchmarks import collect, recipes, sweep
from vit_jax import cli

TINY = [
    '--config.data.source=synthetic', '--config.data.image_size=8', '--config.epochs=0.2',
    '--config.batch_size=32', '--config.model.depth=1', '--config.model.patch_size=4',
    '--config.data.train_split=train[:50%]', '--config.data.eval_split=train[50%:]',
]  # fmt: skip


@pytest.fixture
def one_process(monkeypatch):
  """Trains in this process, without starting Python and JAX for each run."""

  def train(config, overrides, workdir):
    flags = [f'--config.{key}={value}' for key, value in overrides.items()]
    return not cli.main([f'--config={config}', f'--workdir={workdir}', *flags])

  monkeypatch.setattr(collect, 'train', train)


def test_a_grid_contains_all_combinations():
  found = sweep.grid('{"optimizer.lr": [0.1, 1e-3], "optimizer.name": ["sgd"], "ema": [0]}')
  assert [c['optimizer.lr'] for c in found] == ['0.1', '0.001'] and len(found) == 2
  assert found[0] == {'optimizer.lr': '0.1', 'optimizer.name': 'sgd', 'ema': '0'}
  sizes = sweep.grid('{"data.image_size": [[8, 8]], "model.qk_norm": [true, null]}')
  assert sizes[1] == {'data.image_size': '[8, 8]', 'model.qk_norm': 'None'}
  assert sizes[0]['model.qk_norm'] == 'true'


def test_a_sweep_is_checked_before_its_first_run(monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(collect, 'train', lambda *_: pytest.fail('a run started'))
  (tmp_path / 'file').write_text('')
  good = {'config': 'configs/digits.py', 'out': tmp_path, 'grid': '{"ema": [0, 0.9]}'}
  for flag, text, message in (
    ('config', 'configs/none.py', 'none.py'),
    ('grid', '{"ema": [0], "optimizer.rate": [1]}', 'optimizer.rate'),
    ('grid', '{"ema": [0, 2]}', 'ema must be'),
    ('grid', '{"seed": [0, 1]}', '--seeds=<n>'),
    ('seeds', '0', '--seeds=0'),
    ('out', tmp_path / 'file' / 'x', 'is a file'),
    ('config.epochs', '-1', 'epochs must be'),
  ):
    with pytest.raises(SystemExit, match='2'):
      sweep.main([f'--{name}={value}' for name, value in (good | {flag: text}).items()])
    err = capsys.readouterr().err
    assert message in err and err.count('\n') == 1, err


def test_a_sweep_of_failed_runs_has_no_accuracy_and_fails(monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(collect, 'train', lambda *_: False)
  flags = ['--config=configs/digits.py', f'--out={tmp_path}', '--grid={"ema": [0]}']
  assert sweep.main(flags) == 1
  assert capsys.readouterr().out == 'no accuracy (0 runs, 1 failed)  ema=0\n'
  assert json.loads((tmp_path / 'sweep.json').read_text())['rows'][0]['mean'] is None


@pytest.mark.parametrize('text', ['{"a": 1}', '{"a": []}', '[1]', '{a: [1]}'])
def test_an_invalid_grid_is_rejected(text, capsys):
  with pytest.raises(SystemExit):
    sweep.main(['--config=configs/digits.py', '--out=x', f'--grid={text}'])
  assert text in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_ranks_resumes_and_survives_a_failed_run(one_process, tmp_path, capsys):
  flags = ['--config=configs/cifar10.py:tiny', f'--out={tmp_path}', *TINY]
  grid = '{"optimizer.lr": [0.003, 1e30]}'  # the second rate diverges
  assert sweep.main([*flags, f'--grid={grid}']) == 1
  first = json.loads((tmp_path / 'sweep.json').read_text())
  assert [row['failed'] for row in first['rows']] == [0, 1]
  result = tmp_path / 'optimizer.lr=0.003' / 'seed0' / 'result.json'
  stamp = result.stat().st_mtime_ns
  assert sweep.main([*flags, '--grid={"optimizer.lr": [0.003]}', '--seeds=2']) == 0
  rows = json.loads((tmp_path / 'sweep.json').read_text())['rows']
  assert result.stat().st_mtime_ns == stamp and len(rows[0]['accuracies']) == 2
  assert rows[0]['mean'] == sum(rows[0]['accuracies']) / 2
  assert '± ' in capsys.readouterr().out.splitlines()[-1]


def test_a_sweep_does_not_use_the_test_images_by_default():
  args = sweep.parse(['--config=configs/digits.py', '--grid={"ema": [0]}', '--out=o'])
  assert args.overrides == {'data.train_split': 'train[:90%]', 'data.eval_split': 'train[90%:]'}


@pytest.mark.slow
def test_the_table_has_a_row_for_each_recipe(one_process, monkeypatch, tmp_path, capsys):
  digits = recipes.RECIPES['digits']._replace(overrides={'epochs': 0.1, 'model.depth': 1}, seeds=2)
  monkeypatch.setitem(recipes.RECIPES, 'digits', digits)
  monkeypatch.setattr(recipes, 'RUNS', tmp_path / 'runs')
  monkeypatch.setattr(collect, 'RESULTS', tmp_path)
  recipes.main(['cpu', 'folder:none', 'digits'])
  table = (tmp_path / 'README.md').read_text().splitlines()
  rows = [line for line in table if line.startswith('| `')]
  assert len(rows) == len(recipes.RECIPES) and capsys.readouterr().out.splitlines()[-1] == rows[0]
  assert '(2 seeds)' in rows[0] and all('| open |' in row for row in rows[1:])
  assert {path.name for path in (tmp_path / 'digits').iterdir()} == {
    'seed0.jsonl', 'seed1.jsonl', 'curves.png',
  }  # fmt: skip
  saved = json.loads((tmp_path / 'digits.json').read_text())
  mean = sum(run['test_accuracy'] for run in saved['runs']) / 2
  assert saved['test_accuracy_mean'] == pytest.approx(mean)
  with pytest.raises(SystemExit, match='2'):
    recipes.main(['gpu', 'folder:none', 'digits'])
  assert 'no recipe digits for a gpu; expected one of cifar10_small' in capsys.readouterr().err
