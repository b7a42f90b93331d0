"""Help, the printed config, and the command `vit-jax`."""

import contextlib
import importlib.metadata
import inspect
import logging
import os
import shlex
import subprocess
import sys
import tomllib

import jax
from ml_collections import ConfigDict
import numpy as np
import pytest

from tests.conftest import ROOT, call, error
import vit_jax
from vit_jax import cli
from vit_jax import config as config_lib
from vit_jax.check import REGISTRIES, choices
from vit_jax.cli import command, pages, terminal
from vit_jax.cli.flags import Flag
from vit_jax.cli.parsing import parse_flags
from vit_jax.inference import predict_files
from vit_jax.keys import KEYS
from vit_jax.model import POOLS


def test_help_lists_all_modes_and_the_flags_of_each_mode(capsys):
  _, out, _ = call(capsys, '--help')
  words = ' '.join(out.split())  # without line breaks
  assert all(f'{name} {mode.summary}' in words for name, mode in cli.MODES.items())
  for name, mode in cli.MODES.items():
    _, page, _ = call(capsys, f'--mode={name}', '--help')
    assert all(f'--{flag.name}=' in page and flag.help[:40] in page for flag in mode.flags)
    assert mode.example in page
    assert '--topk' not in page or name == 'predict'
  assert 'Did you mean eval' in error(capsys, '--mode=evaluate', '--help')


@pytest.mark.parametrize('name', cli.MODES)
def test_the_example_of_each_mode_is_valid(name):
  args = parse_flags([f'--mode={name}', *shlex.split(cli.MODES[name].example)], name)
  command.check_required(args)


def test_help_config_lists_every_key_with_default_unit_and_meaning(capsys):
  _, out, _ = call(capsys, '--help_config')
  lines = out.splitlines()
  assert 'log_every = 50  (int, steps: at least 0)' in lines
  assert 'optimizer.name = adamw  (str: adamw, muon, sgd)' in lines
  names = [line.partition(' = ')[0] for line in lines if ' = ' in line]
  assert names == list(KEYS) and all(key.help for key in KEYS.values())


def test_choices_follow_the_registries(monkeypatch):
  assert 'none' in POOLS and 'none' not in choices('model.pool')
  monkeypatch.setitem(POOLS, 'mine', POOLS['gap'])
  assert 'mine' in choices('model.pool')
  named = {key.choices for key in KEYS.values() if isinstance(key.choices, str)}
  assert named - {''} == REGISTRIES.keys()


@pytest.mark.parametrize('name', pages.PAGES)
def test_generated_pages_are_up_to_date(name, tmp_path):
  pages.main([str(tmp_path)])
  committed = (ROOT / 'docs' / name).read_text(encoding='utf-8')
  assert (tmp_path / name).read_text(encoding='utf-8') == committed, 'Run: make pages'


def test_the_printed_config_restores_the_same_config(capsys):
  flags = ['--config=configs/cifar10.py:tiny', '--config.data.mean=0.5,0.4,0.3']
  code, out, _ = call(capsys, *flags, '--config.init=a=b', '--print_config')
  assert not code and 'data.mean=0.5,0.4,0.3' in out and 'progressive.sizes=()' in out
  again = config_lib.default_config()
  config_lib.override_all(again, dict(line.split('=', 1) for line in out.splitlines()))
  wanted = cli.load_file(f'{ROOT}/configs/cifar10.py:tiny')
  config_lib.override_all(wanted, {'data.mean': '0.5,0.4,0.3', 'init': 'a=b'})
  assert config_lib.flatten(again) == config_lib.flatten(wanted)


def test_print_config_refuses_an_invalid_config(capsys):
  config = '--config=configs/cifar10.py:tiny'
  for flags, message in (
    (['--config.model.position=learn'], "model.position: unknown 'learn'. Did you mean learned?"),
    (['--config.data.crop=2'], 'data.crop must be from '),
    (['--config.augment.erasing.min_area=0.9'], 'must not exceed'),
  ):
    assert message in error(capsys, config, *flags, '--print_config')
    assert message in error(capsys, *flags, '--print_config')


@pytest.mark.slow
def test_print_config_works_for_a_workdir(capsys, trained):
  _, out, _ = call(capsys, '--print_config', f'--workdir={trained[0]}', '--config.log_every=7')
  assert 'data.source=synthetic' in out and 'log_every=7' in out


@pytest.mark.parametrize('first', [True, False])
def test_every_process_prints_its_warnings_but_only_process_0_the_rest(capsys, monkeypatch, first):
  monkeypatch.setattr('vit_jax.distributed.is_first', lambda: first)
  log = logging.Logger('mine')
  log.addHandler(terminal.Console(logging.INFO))
  log.info('Reading images.')
  log.warning('An image is damaged.')
  assert capsys.readouterr().err == 'Reading images.\n' * first + 'An image is damaged.\n'


def test_a_message_that_cannot_be_printed_does_not_stop_a_run(monkeypatch):
  log = logging.Logger('mine')
  log.addHandler(terminal.Console(logging.INFO))
  with open('/dev/full', 'w', encoding='utf-8', buffering=1) as full:
    monkeypatch.setattr(sys, 'stderr', full)
    log.info('Reading images.')
    monkeypatch.undo()
    with contextlib.suppress(OSError):
      full.close()  # tries to write the rest


@pytest.mark.parametrize('flags', [['--help'], ['--mode=predict', '--help']])
def test_help_does_not_import_jax(flags):
  script = (
    f'import sys\nfrom vit_jax import cli\ncli.main({flags})\nassert "jax" not in sys.modules'
  )
  subprocess.run([sys.executable, '-c', script], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_the_command_runs_in_any_folder_with_any_config_file(tmp_path):
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['project']
  entry = importlib.metadata.EntryPoint('vit-jax', project['scripts']['vit-jax'], 'console_scripts')
  assert entry.load() is cli.start
  # Only the package is importable, as after installation. Config files may be anywhere.
  (tmp_path / 'installed').mkdir()
  (tmp_path / 'installed' / 'vit_jax').symlink_to(ROOT / 'vit_jax')
  (tmp_path / 'copy').mkdir()
  (tmp_path / 'copy' / 'configs').symlink_to(ROOT / 'configs')
  script = f'import sys; sys.argv[0] = "vit-jax"; from {entry.module} import start; start()'

  def run(*flags):
    return subprocess.run(
      [sys.executable, '-c', script, *flags],
      cwd=tmp_path,
      env=os.environ | {'PYTHONPATH': str(tmp_path / 'installed')},
      capture_output=True,
      text=True,
    )

  assert run('--help').stdout.startswith('usage: vit-jax ')
  ended = run(f'--config={tmp_path}/copy/configs/folder.py:small', '--print_config')
  assert 'data.source=folder:' in ended.stdout, ended.stderr


@pytest.mark.parametrize('module, install', [
  ('sklearn', "pip install '.[train]'"),
  ('gradio.themes', 'pip install -r requirements-demo.txt'),
  ('fastapi', 'pip install -r requirements-demo.txt'),  # serve imports it before gradio
])  # fmt: skip
def test_a_missing_extra_is_named_in_one_sentence(capsys, monkeypatch, module, install):
  def run_mine(args):
    raise ModuleNotFoundError(f'No module named {module!r}', name=module)

  flags = (Flag('workdir', 'a folder'),)
  monkeypatch.setitem(cli.MODES, 'mine', cli.Mode('', '', flags, run_mine))
  said = error(capsys, '--mode=mine', '--workdir=x')
  assert said == f'error: --mode=mine needs {module}, which is not installed. Run: {install}.\n'


def test_a_missing_module_outside_the_extras_shows_a_traceback(monkeypatch):
  def run_mine(args):
    raise ModuleNotFoundError('No module named own', name='own')

  monkeypatch.setitem(cli.MODES, 'mine', cli.Mode('', '', (), run_mine))
  with pytest.raises(ModuleNotFoundError):
    cli.main(['--mode=mine'])


def test_the_modules_of_extra_train_are_known():
  text = (ROOT / 'pyproject.toml').read_text(encoding='utf-8')
  extra = tomllib.loads(text)['project']['optional-dependencies']['train']
  known = {name for modules in command.EXTRAS.values() for name in modules}
  provided = importlib.metadata.packages_distributions()
  for requirement in extra:
    name = requirement.split('>')[0].lower()
    modules = [top for top, owners in provided.items() if name in {o.lower() for o in owners}]
    assert not modules or known & set(modules), requirement


@pytest.mark.slow
def test_evaluate_and_predict_from_python(trained):
  workdir, result = trained
  found = vit_jax.evaluate(str(workdir), {'data.eval_split': 'test[:70]'}, step='16')
  assert (found['step'], found['examples']) == (16, 70)
  assert vit_jax.evaluate(workdir)['accuracy'] == result['test_accuracy']
  image = min((workdir / 'examples').iterdir())
  (row,) = vit_jax.predict(str(workdir), str(image), topk=2)
  assert row['file'] == str(image) and len(row['predictions']) == 2
  assert inspect.isgeneratorfunction(predict_files)


@pytest.mark.parametrize('call_of, message', [
    (lambda run: next(vit_jax.predict(run, 'x.png', topk=0)),
     'topk must be a positive integer, got 0'),
    (lambda run: next(vit_jax.predict(run, 'x.png', topk='3')),
     "topk must be a positive integer, got '3'"),
    (lambda run: vit_jax.load(run, num_classes='3'),
     "num_classes must be a positive integer, got '3'"),
    (lambda run: vit_jax.make(16, num_classes=3), 'model.variant: expected a name .*B/16, got 16'),
    (lambda run: vit_jax.make('B/16', num_classes=-3),
     'num_classes must be a positive integer, got -3'),
    (lambda run: vit_jax.make('B/16', num_classes='3'), "num_classes .* got '3'"),
    (lambda run: vit_jax.make('B/16', 3, depth='2'), "model.depth .* integer, got '2'"),
    (lambda run: vit_jax.train({}, run), 'config: expected .*default_config.* type dict'),
    (lambda run: vit_jax.train(ConfigDict(), run), 'config: the key seed is missing'),
    (lambda run: vit_jax.save({}, vit_jax.make('tiny', 3), run, format='npz'),
     r'save: expected \(model, params, folder\), got a value of type dict as the model'),
    (lambda run: vit_jax.make('tiny', 3).init(jax.random.key(0), np.zeros((8, 8, 3))),
     r'images: expected the shape \[B, H, W, C\], got \(8, 8, 3\)'),
])  # fmt: skip
def test_wrong_arguments_from_python_give_one_plain_message(call_of, message, trained):
  with pytest.raises(ValueError, match=message):
    call_of(trained[0])


@pytest.mark.slow
def test_the_package_gives_figures_without_an_import():
  code = 'import vit_jax; print(vit_jax.figures.rollout.__name__)'
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert done.stdout == 'rollout\n', done.stderr
