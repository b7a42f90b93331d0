"""The commands of three documentation pages run in the order of the page, on small data."""

import json
import os
import shlex
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from tests.conftest import ROOT
from tests.test_docs import blocks, lines_of

pytestmark = pytest.mark.slow

SMALL = {  # words of a page: their replacement in the test
  '--config.epochs=20': '--config.epochs=1 --config.batch_size=16',
  'google/vit-base-patch16-224-in21k': 'tiny_timm',
  'py:b16,': 'py:tiny,',
  '--config.data.image_size=224': '--config.data.image_size=32',
  '--seeds=3': '--seeds=1 --config.epochs=2',
  '[1e-4, 3e-4, 1e-3]': '[1e-3]',
  '--config=configs/finetune': '--config.epochs=2 --config=configs/finetune',
  '--config=configs/mae': '--config.epochs=2 --config=configs/mae',
  '--config=configs/linear_probe': '--config.epochs=2 --config=configs/linear_probe',
}


def write_images(folder, classes, count):
  rng = np.random.default_rng(count)
  for name in classes:
    (folder / name).mkdir(parents=True)
    for i in range(count):
      pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
      Image.fromarray(pixels).save(folder / name / f'{folder.name}_{i}.png')


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  """Returns a folder with the data of all pages, in which the commands of the pages run."""
  home = tmp_path_factory.mktemp('pages')
  digits = [f'class_{i}' for i in range(10)]
  write_images(home / 'cifar10' / 'train', digits, 16)
  write_images(home / 'cifar10' / 'test', digits, 4)
  write_images(home / 'photos', ['cat', 'dog', 'horse'], 40)
  for name in ('configs', 'main.py'):
    (home / name).symlink_to(ROOT / name)
  return home


def run(home, command):
  """Runs a command of a page at a small size, and returns what it prints."""
  for words, shorter in SMALL.items():
    command = command.replace(words, shorter)
  words = shlex.split(command)
  assert words[0] == 'python', command
  program = [str(ROOT / 'main.py'), *words[2:]] if words[1] == 'main.py' else words[1:]
  environment = os.environ | {'PYTHONPATH': str(ROOT), 'HF_HUB_OFFLINE': '1'}
  done = subprocess.run(
    [sys.executable, *program], cwd=home, env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, f'{command}\n{done.stderr}'
  return done.stdout


def commands(page):
  """Returns the commands of a page, in the order of the page."""
  return [line for block in blocks(ROOT / 'docs' / page, 'sh') for line in lines_of(block)]


@pytest.fixture(scope='module')
def tutorial(home):
  """Returns the folder `home` after the commands of the tutorial, which create `runs/c10`."""
  for command in commands('tutorial.md'):
    if '--config=' not in command or 'folder:cifar10' in command:  # the others download CIFAR-10
      run(home, command)
  return home


def test_the_tutorial_runs(tutorial):
  home = tutorial
  result = json.loads((home / 'runs' / 'c10' / 'result.json').read_text())
  assert result['examples'] == 40 and (home / 'runs' / 'c10' / 'report.html').exists()


def test_the_fine_tuning_page_runs(tutorial):
  home = tutorial
  (home / 'new_photos').mkdir()
  Image.new('RGB', (40, 30), 'red').save(home / 'new_photos' / 'red.jpg')
  every = commands('finetune.md')
  first = next(i for i, command in enumerate(every) if '--format=timm' in command)
  run(home, every[first])  # weights of a small model, for all other commands
  for command in every[:first]:
    run(home, command)
  assert (home / 'photos_onnx' / 'model.onnx').exists()
  tuned = json.loads((home / 'runs' / 'photos' / 'result.json').read_text())
  probed = json.loads((home / 'runs' / 'probe' / 'result.json').read_text())
  assert 0 <= tuned['test_accuracy'] <= 1 and 0 <= probed['test_accuracy'] <= 1


@pytest.mark.long
def test_the_page_on_pretraining_runs(tutorial):
  for command in commands('pretraining.md'):
    if ':tiny,cifar10' not in command:  # downloads CIFAR-10
      run(tutorial, command)
  result = json.loads((tutorial / 'runs' / 'mae' / 'result.json').read_text())
  assert result['test_accuracy'] is None and result['test_loss'] > 0
  assert (tutorial / 'runs' / 'mae' / 'figures' / 'reconstruction.png').exists()
  assert (tutorial / 'exported' / 'model.stablehlo').exists()
