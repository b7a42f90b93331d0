"""Sweeps and the table of results, on runs of a few seconds."""

import json

import numpy as np
import pytest

from benchmarks import collect, masked, minutes, recipes, speedrun, sweep
from vit_jax import cli
from vit_jax import config as config_lib
from vit_jax.inference.summary import summary_of
from vit_jax.opening import Request

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
    ('pflops', '0', 'expected a number above 0'),
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


@pytest.mark.long
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


def test_a_sweep_without_labels_is_refused(capsys):
  with pytest.raises(SystemExit):
    sweep.parse(['--config=configs/mae.py:tiny,cifar10', '--grid={"ema": [0]}', '--out=o'])
  assert 'objective=masked has no accuracy' in capsys.readouterr().err


def test_a_sweep_with_pflops_sets_the_epochs_itself(capsys):
  flags = ['--config=configs/digits.py', '--grid={"ema": [0]}', '--out=o', '--pflops=1']
  with pytest.raises(SystemExit):
    sweep.parse([*flags, '--config.epochs=2'])
  assert 'remove --config.epochs' in capsys.readouterr().err


def test_a_sweep_does_not_use_the_test_images_by_default():
  args = sweep.parse(['--config=configs/digits.py', '--grid={"ema": [0]}', '--out=o'])
  held_out = {'train_split': 'train[:90%]', 'val_split': '', 'eval_split': 'train[90%:]'}
  assert args.overrides == {f'data.{name}': split for name, split in held_out.items()}


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


def test_results_that_are_listed_keep_their_date_and_machine(monkeypatch, tmp_path):
  monkeypatch.setitem(recipes.RECIPES, 'digits', recipes.RECIPES['digits']._replace(seeds=1))
  monkeypatch.setattr(recipes, 'RUNS', tmp_path / 'runs')
  monkeypatch.setattr(collect, 'RESULTS', tmp_path)
  workdir = tmp_path / 'runs' / 'digits' / 'seed0'
  workdir.mkdir(parents=True)
  lines = [{'step': 1, 'split': split, 'loss': 1.0, 'accuracy': 0.5} for split in ('train', 'test')]
  (workdir / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  monkeypatch.setattr(collect, 'train', lambda *_: True)
  found = []
  for seconds, date in ((9.0, '2026-01-01'), (9.0, '2026-01-02'), (8.0, '2026-01-03')):
    config = {'seed': 0, 'init': '', 'data': {'source': 'synthetic', 'dir': ''}}
    result = {'test_accuracy': 0.5, 'test_loss': 1.0, 'seconds': seconds, 'config': config}
    (workdir / 'result.json').write_text(json.dumps(result))
    facts = {'machine': 'a', 'date': date}
    monkeypatch.setattr(collect, 'circumstances', lambda facts=facts: facts)
    recipes.main(['cpu', 'folder:none', 'digits'])
    found.append(json.loads((tmp_path / 'digits.json').read_text())['date'])
  assert found == ['2026-01-01', '2026-01-01', '2026-01-03']


def test_the_picture_shows_accuracy_by_minutes_of_training(monkeypatch, tmp_path):
  train = {'split': 'train', 'examples': 1200, 'images_per_second': 10.0}
  lines = [train, train, {'split': 'test', 'accuracy': 0.5}, train | {'images_per_second': 20.0}]
  lines += [{'split': 'val', 'accuracy': 0.1}, {'split': 'test', 'accuracy': 0.6}]
  assert minutes.by_minutes(lines) == ([4.0, 5.0], [0.5, 0.6])

  monkeypatch.setattr(collect, 'RESULTS', tmp_path)
  assert not any(map(recipes.is_drawn, recipes.RECIPES))
  run = {'config': {'epochs': 20.0}}
  result = {'machine': '2 cores of AMD EPYC', 'seeds': [0], 'runs': [run]}
  (tmp_path / 'cifar10_tiny').mkdir()
  (tmp_path / 'cifar10_tiny.json').write_text(json.dumps(result))
  (tmp_path / 'cifar10_tiny' / 'seed0.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  assert [name for name in recipes.RECIPES if recipes.is_drawn(name)] == ['cifar10_tiny']
  figure = minutes.draw_minutes(['cifar10_tiny'])
  (axis,) = figure.axes
  (line,) = axis.lines
  np.testing.assert_array_equal(line.get_xydata(), [(4.0, 0.5), (5.0, 0.6)])
  (legend,) = figure.legends
  assert [x.get_text() for x in legend.get_texts()] == ['tiny, 20 epochs: 60.0% (AMD EPYC)']


def test_a_grid_can_be_a_list_of_combinations():
  found = sweep.grid('[{"ema": [0, 0.9]}, {"model.width": [48], "epochs": [2]}]')
  assert found == [{'ema': '0'}, {'ema': '0.9'}, {'model.width': '48', 'epochs': '2'}]


@pytest.mark.slow
def test_combinations_of_equal_compute_get_their_epochs():
  flags = ['--config=configs/digits.py', '--out=o', '--pflops=1e-4']
  args = sweep.parse([*flags, '--grid=[{"model.depth": [2]}, {"model.depth": [4]}]'])
  few, many = (
    float(sweep.epochs_for(args.config, args.overrides | grid, 1e-4)) for grid in args.grid
  )
  assert 1.7 < few / many < 2.1  # each further block costs the same
  config = config_lib.override_all(
    cli.load_file('configs/digits.py'), args.overrides | args.grid[0] | {'epochs': str(few)}
  )
  assert summary_of(Request(config=config)).run_flops == pytest.approx(1e11, rel=0.02)


def finished(workdir, accuracy, speed, images=(640, 320)):
  """Writes the files of a run of 30 steps with 32 images; `speed` is in images per second."""
  workdir.mkdir(parents=True)
  result = {'test_accuracy': accuracy, 'steps': 30, 'params': 9, 'config': {'batch_size': 32}}
  (workdir / 'result.json').write_text(json.dumps(result))
  lines = [{'step': 0, 'split': 'train', 'examples': n, 'images_per_second': speed} for n in images]
  lines.append({'step': 30, 'split': 'test', 'accuracy': accuracy, 'examples': 99})
  (workdir / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  (workdir / 'log.txt').write_text('x] Compiled in 2.5 s for images\ny] Compiled in 0.5 s for')


def test_the_time_of_a_run_is_the_time_of_all_its_steps(tmp_path):
  finished(tmp_path / 'a', 0.9, 96.0)
  assert speedrun.training_seconds(tmp_path / 'a') == 10.0
  assert speedrun.compile_seconds(tmp_path / 'a') == 2.5
  finished(tmp_path / 'b', 0.9, 96.0, images=(640,))
  with pytest.raises(ValueError, match='counts 640 of 960 trained images'):
    speedrun.training_seconds(tmp_path / 'b')


def test_a_speed_run_is_logged_only_if_it_reaches_the_target_and_is_faster(
  monkeypatch, tmp_path, capsys
):
  monkeypatch.setattr(speedrun, 'LOG', tmp_path / 'speedrun.json')
  monkeypatch.setattr(speedrun, 'training_flops', lambda _: 2e14)
  monkeypatch.setenv('JAX_ENABLE_COMPILATION_CACHE', 'true')

  def run(name, speed, accuracies):
    def train(config, overrides, workdir):
      finished(workdir, accuracies[int(overrides['seed'])], speed)
      return True

    monkeypatch.setattr(collect, 'train', train)
    flags = ['--target=0.8', '--config=configs/digits.py', f'--out={tmp_path / name}']
    code = speedrun.main([*flags, '--by=me', f'--note={name}', '--config.checkpoint_every=0'])
    return code, capsys.readouterr().out

  assert run('first', 96, [0.79, 0.8, 0.81, 0.8, 0.8])[0] == 0
  assert 'not reached' in run('weak', 960, [0.79, 0.8, 0.8, 0.8, 0.8])[1]
  assert 'the record is 0.17 minutes' in run('slow', 90, [0.9] * 5)[1]
  assert run('fast', 192, [0.82] * 5)[0] == 0
  log = json.loads((tmp_path / 'speedrun.json').read_text())['records']
  assert [entry['note'] for entry in log] == ['first', 'fast']
  assert log[1]['seconds'] == 5 and log[1]['before_seconds'] == 10
  assert '0.17 (-50.0%)' in (tmp_path / 'speedrun.md').read_text().splitlines()[-1]


@pytest.mark.parametrize('flags, message', [
  (['--config.seed=3'], 'seed cannot be set'),
  (['--config.checkpoint_every=75'], 'multiple of log_every=50'),
  (['--target=80'], 'between 0 and 1'),
])  # fmt: skip
def test_an_attempt_is_checked_before_its_first_run(flags, message, tmp_path, capsys):
  good = ['--target=0.8', '--config=configs/digits.py', f'--out={tmp_path}', '--by=a', '--note=b']
  with pytest.raises(SystemExit, match='2'):
    speedrun.parse([*good, '--config.checkpoint_every=100', *flags])
  assert message in capsys.readouterr().err


def test_pretraining_and_fine_tuning_cost_as_much_as_training_from_scratch(
  monkeypatch, tmp_path, capsys
):
  """Records the commands of the comparison, and adds up what they cost."""
  price = lambda config, overrides: (0.5 if 'mae' in config else 1) * share(overrides)
  share = lambda overrides: {'train': 1, 'train[:10%]': 0.1, 'train[:1%]': 0.01}[
    overrides.get('data.train_split', 'train')
  ]
  cost, given = {}, {}

  def train(config, overrides, workdir):
    given[workdir.name] = overrides
    if 'epochs' in overrides:
      cost[workdir.name] = float(overrides['epochs']) * price(config, overrides)
    workdir.mkdir(parents=True)
    found = {'test_accuracy': None if 'mae' in config else 0.5, 'test_loss': 1.0, 'steps': 2}
    (workdir / 'result.json').write_text(json.dumps(found))
    return True

  monkeypatch.setattr(collect, 'train', train)
  monkeypatch.setattr(collect, 'RESULTS', tmp_path)
  monkeypatch.setattr(masked, 'pflops_of', lambda c, o: float(o['epochs']) * price(c, o))
  monkeypatch.setattr(masked, 'epochs_for', lambda c, o, pflops: str(pflops / price(c, o)))
  masked.main(['folder:a/c', 'folder:a/t', str(tmp_path / 'runs'), '--config.ema=0.5'])
  assert {cost[f'scratch_{label}'] for label in masked.LABELLED} == {20}
  for name in ('mae_cifar10', 'mae_tinyimagenet'):
    for label, split in masked.LABELLED.items():
      assert cost[name] == cost[f'{name}_{label}'] == 10
      assert given[f'{name}_{label}']['data.train_split'] == split
    for last in (*masked.LABELLED, 'probe'):
      assert given[f'{name}_{last}']['init'] == str(tmp_path / 'runs' / name)
  sources = {name for name, keys in given.items() if keys['data.source'] == 'folder:a/t'}
  assert sources == {'mae_tinyimagenet'} and all(keys['ema'] == '0.5' for keys in given.values())
  saved = json.loads((tmp_path / 'masked.json').read_text())
  assert saved['rows'].keys() == given.keys() and len(given) == 14
  assert 'init' not in given['random_probe'] and capsys.readouterr().out.count('50.00%') == 12
  recipe = saved['rows']['mae_tinyimagenet_10%']['recipe']
  assert '--config.data.source=folder:c ' in recipe and '--config.init=mae_tinyimagenet ' in recipe
  assert saved['total_pflops'] == 20 and str(tmp_path) not in json.dumps(saved)
