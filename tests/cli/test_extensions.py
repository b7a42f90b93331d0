"""Config keys and extensions from outside the package work like built-in ones."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT, error, small_config
from vit_jax import config as config_lib
from vit_jax import opening
from vit_jax.check import check
from vit_jax.cli.help import config_page
from vit_jax.keys import KEYS, Key
from vit_jax.model import POOLS
from vit_jax.training import resume, trainer


@pytest.fixture
def new_key(monkeypatch):
  entry = Key(0.5, 'strength of my augmentation', 'grey levels', range=(0, 2), may_change=True)
  monkeypatch.setitem(KEYS, 'augment.mine.strength', entry)


def test_a_new_key_has_a_default_an_override_a_range_and_help(new_key):
  config = config_lib.default_config()
  assert config.augment.mine.strength == 0.5
  with pytest.raises(AttributeError):
    config.augment.mine.strenght = 1.0  # locked
  config_lib.override(config, 'augment.mine.strength', '3')
  with pytest.raises(ValueError, match=r'augment.mine.strength must be from 0 to 2, got 3'):
    check(config)
  with pytest.raises(ValueError, match=r'Did you mean augment.mine.strength'):
    config_lib.override(config, 'augment.mine.strenght', '1')
  assert 'augment.mine.strength = 0.5  (float, grey levels: 0 to 2)' in config_page()


def test_a_new_key_is_saved_and_may_change_when_a_run_resumes(new_key, tmp_path):
  config = small_config(**{'epochs': '0.1', 'augment.mine.strength': '1'})
  saved = config_lib.from_dict(config_lib.to_dict(config))
  assert saved.augment.mine.strength == 1.0
  config_lib.check_same_run(saved, small_config(epochs='0.1'), tmp_path)


def test_a_key_of_an_unknown_type_is_refused():
  with pytest.raises(ValueError, match='set `kind` to'):
    Key(None, 'nothing')


EXTENSION = """
from vit_jax.cli import MODES, Mode
from vit_jax.keys import KEYS, Key

KEYS['mine.strength'] = Key(0.5, 'strength of mine')
MODES['mine'] = Mode('mine', '', (), lambda args: print('mine runs', args.overrides))
"""


@pytest.mark.slow
def test_import_adds_modes_and_keys_of_a_module_in_the_current_folder(tmp_path):
  (tmp_path / 'my_extension.py').write_text(EXTENSION)
  flags = ['--import=my_extension', '--mode=mine']
  command = [sys.executable, str(ROOT / 'main.py'), *flags]
  ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
  assert ended.stdout == 'mine runs {}\n', ended.stderr
  flags = ['--import=my_extension', '--print_config', '--config.mine.strength=2']
  command = [sys.executable, str(ROOT / 'main.py'), *flags]
  ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
  assert 'mine.strength=2.0' in ended.stdout.splitlines(), ended.stderr


@pytest.mark.parametrize('name, text, message', [
  ('gone_module', None, '--import=gone_module: no such module'),
  ('broken_one', 'import nothing_of_the_kind', 'broken_one.py, line 1: ModuleNotFoundError'),
  ('broken_two', '\nx = 1 / 0', 'broken_two.py, line 2: ZeroDivisionError'),
])  # fmt: skip
def test_a_failing_extension_is_named(capsys, tmp_path, monkeypatch, name, text, message):
  if text:
    (tmp_path / f'{name}.py').write_text(text)
  monkeypatch.syspath_prepend(tmp_path)
  assert message in error(capsys, f'--import={name}', '--mode=eval', '--workdir=x')


@pytest.mark.slow
def test_a_checkpoint_names_its_missing_import(capsys, tmp_path, monkeypatch):
  workdir = tmp_path / 'run'
  with monkeypatch.context() as with_extension:
    with_extension.setitem(POOLS, 'mine', POOLS['gap'])
    with_extension.setattr(config_lib, 'imports', ('my_pool',))
    trainer.train(small_config(**{'epochs': '0.1', 'model.pool': 'mine'}), workdir)
    assert resume.newest_config(workdir)['imports'] == ['my_pool']
  capsys.readouterr()
  message = 'was trained with --import=my_pool. Add this flag'
  for argv in ([], ['--mode=eval'], ['--mode=inspect']):
    err = error(capsys, f'--workdir={workdir}', *argv)
    assert message in err and "unknown 'mine'" in err
  flags = ['--mode=export', '--format=npz', f'--out={tmp_path}/out']
  assert message in error(capsys, f'--workdir={workdir}', *flags)
  assert 'my_pool' not in sys.modules  # modules named in a workdir are never imported
  with monkeypatch.context() as with_extension:
    with_extension.setitem(POOLS, 'mine', POOLS['gap'])
    assert opening.from_workdir(workdir)[0].config.model.pool == 'mine'
    assert message in capsys.readouterr().err  # a warning, because all names are known
    with_extension.setitem(sys.modules, 'my_pool', json)
    opening.from_workdir(workdir)
    assert message not in capsys.readouterr().err


def test_an_unknown_key_in_a_checkpoint_names_its_import(monkeypatch):
  with monkeypatch.context() as with_extension:
    with_extension.setitem(KEYS, 'mine.strength', Key(0.5, 'strength of mine'))
    saved = {'config': config_lib.to_dict(config_lib.default_config()), 'imports': ['my_keys']}
  with (
    pytest.raises(ValueError, match=r'lacks: mine.strength[^$]*--import=my_keys'),
    config_lib.naming_imports(saved),
  ):
    config_lib.from_dict(saved['config'])
