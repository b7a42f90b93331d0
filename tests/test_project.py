"""Imports run one way, every config builds, the package is light."""

import ast
import pathlib
import subprocess
import sys

import pytest

from configs import finetune, imagenet
from vit_jax import config as config_lib
from vit_jax.check import check
from vit_jax.experiment import Task, assemble

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'vit_jax'

# A module imports only from the lines above its own.
LAYERS = (
  {'names', 'paths', 'backend', 'cluster', 'losses', 'output', 'prepare', 'resnet'},
  {'limits', 'events', 'draw', 'image', 'sharding', 'progress', 'attention', 'matmul'},
  {'timm_names', 'positions', 'splits', 'writer', 'randaugment'},
  {'vit', 'augment', 'optim', 'config', 'folder'},
  {'sources', 'state', 'weights', 'maps'},
  {'memory', 'real'},
  {'stream'},
  {'data', 'checkpoint', 'format_npz', 'format_hf', 'format_timm', 'format_program'},
  {'pretrained', 'report', 'trained'},
  {'check', 'inherit', 'card'},
  {'experiment', 'export'},
  {'evaluate', 'features', 'pictures'},
  {'trainer', 'predict', 'serve', 'fewshot'},
  {'probe', 'summary', 'visualize'},
)
LEAVES = set().union(*LAYERS[:7])


def imports(path):
  """What a file imports: (modules of vit_jax, other modules)."""
  ours, others = set(), set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module == 'vit_jax':
      ours |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module.startswith('vit_jax.'):
      ours.add(node.module.split('.')[1])
    elif isinstance(node, ast.ImportFrom):
      others.add(node.module.split('.')[0])
    elif isinstance(node, ast.Import):
      others |= {alias.name.split('.')[0] for alias in node.names}
  return ours, others


@pytest.mark.parametrize('path', sorted(PACKAGE.glob('*.py')), ids=lambda p: p.stem)
def test_imports_run_one_way(path):
  if path.stem == '__init__':
    return
  level = next(i for i, layer in enumerate(LAYERS) if path.stem in layer)
  ours, others = imports(path)
  below = set().union(*LAYERS[:level])
  assert ours <= below, f'{path.stem} imports {ours - below} from its own level or above'
  assert path.stem == 'prepare' or 'tensorflow' not in others
  if path.stem in LEAVES - {'config'}:
    assert 'ml_collections' not in others  # a config is read above


@pytest.mark.parametrize('folder', ['.', 'vit_jax', 'configs', 'benchmarks'])
def test_text_files_are_utf_8_wherever_they_are_opened(folder):
  """Without an encoding Python takes the locale's, which may lack the letters of a class name."""
  for path in sorted((ROOT / folder).glob('*.py')):
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
      if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
        name = getattr(node.func, 'id', getattr(node.func, 'attr', ''))
        words = {word.arg for word in node.keywords}
        modes = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        text = name in ('read_text', 'write_text')
        text = text or (name == 'open' and {'w', 'a', 'r'} & {*modes})
        assert not text or 'encoding' in words, f'{path}:{node.lineno}'


def test_a_model_needs_only_the_light_dependencies():
  heavy = ['clu', 'tensorboardX', 'tensorflow_datasets', 'sklearn', 'matplotlib', 'grain', 'cv2']
  script = (
    f'import sys; sys.modules.update(dict.fromkeys({heavy}))\n'
    "import vit_jax, jax, jax.numpy as jnp; model = vit_jax.make('B/16', num_classes=10)\n"
    'shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))\n'
    "assert shapes['params']['head']['kernel'].shape == (768, 10)\n"
    'from vit_jax.inference import predict'
  )
  subprocess.run([sys.executable, '-c', script], cwd=ROOT, check=True)


SPECS = ['digits.py', 'folder.py:small'] + [
  f'{name}.py:{variant}'
  for name in ('cifar10', 'cifar100')
  for variant in ('tiny', 'small', 'wide', 'deep', 'b16', 'l16')
]
SPECS += [
  f'{name}.py:{model},{dataset}'
  for name in ('finetune', 'linear_probe')
  for model, dataset in (
    *((model, 'cifar10') for model in finetune.MODELS),
    *(('s16', dataset) for dataset in finetune.DATASETS if dataset != 'cifar10'),
  )
]
SPECS += [f'finetune.py:{model},cifar10,adamw' for model in ('tiny', 'b16')]
SPECS += [f'imagenet.py:{model}' for model in imagenet.MODELS]
SPECS += [f'imagenet.py:s16,{recipe}' for recipe in imagenet.RECIPES]


@pytest.mark.parametrize('spec', SPECS)
def test_every_config_builds(spec):
  config = config_lib.load_file(f'{ROOT}/configs/{spec}')
  check(config)
  channels = 1 if spec == 'digits.py' else 3
  task = Task(('a', 'b'), (32, 32), channels)
  assert assemble(config, task).image_shape[-1] == channels
  assert config.log_every == 50


def test_every_config_file_is_tested():
  assert {p.name for p in (ROOT / 'configs').glob('*.py')} == {s.split(':')[0] for s in SPECS}
