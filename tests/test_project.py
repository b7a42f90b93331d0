"""Imports follow the layers, modules are small, every config builds, models import little."""

import ast
import collections
import importlib
import pathlib
import subprocess
import sys

import pytest

from configs import cifar10, finetune, imagenet
from vit_jax import cli
from vit_jax.check import check
from vit_jax.experiment import assemble
from vit_jax.sizing import choose_open
from vit_jax.workdir import Task

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'vit_jax'

# Packages and root modules, lowest first. Each imports only from lower layers, and from another
# package only names that its `__init__` lists.
LAYERS = (
  'names', 'bucket', 'storage', 'keys', 'config', 'limits', 'distributed', 'progress', 'model',
  'augment', 'data', 'optim', 'check', 'workdir', 'weights', 'inherit', 'experiment', 'sizing',
  'splitting', 'opening', 'evaluation', 'training', 'profiling', 'figures', 'inference', 'cli',
)  # fmt: skip


def name_of(path):
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


FILES = sorted(PACKAGE.rglob('*.py'))
MODULES = {name_of(path): path for path in FILES}
TREES = {name: ast.parse(path.read_text(encoding='utf-8')) for name, path in MODULES.items()}


def imported(name):
  """Returns all imports of a module: (modules of vit_jax, other top-level modules)."""
  ours, others = set(), set()
  for node in ast.walk(TREES[name]):
    if isinstance(node, ast.Import):
      others |= {alias.name.split('.')[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module.split('.')[0] != 'vit_jax':
      others.add(node.module.split('.')[0])
    elif isinstance(node, ast.ImportFrom):
      found = {f'{node.module}.{alias.name}' for alias in node.names} & MODULES.keys()
      ours |= found or {node.module}
  return ours - {'vit_jax'}, others


def package_of(name):
  """Returns `vit_jax.data` for `vit_jax.data.splits`; a root module is its own package."""
  return '.'.join(name.split('.')[:2])


@pytest.mark.parametrize('name', sorted(MODULES.keys() - {'vit_jax'}))
def test_modules_import_only_lower_layers(name):
  ours, others = imported(name)
  own = package_of(name)
  assert own.split('.')[1] in LAYERS, f'add {own} to LAYERS'
  below = {f'vit_jax.{layer}' for layer in LAYERS[: LAYERS.index(own.split('.')[1])]}
  for other in ours:
    assert package_of(other) in below | {own}, f'imports {other} from a higher layer'
    assert package_of(other) in (own, other), f'imports {other}, which its package does not list'
  assert name == 'vit_jax.data.tfds' or 'tensorflow' not in others


def test_imports_have_no_cycle():
  state = {}

  def visit(name, path):
    assert state.get(name) != 'open', ' -> '.join([*path, name])
    if name not in state:
      state[name] = 'open'
      for other in sorted(imported(name)[0]):
        visit(other, [*path, name])
      state[name] = 'done'

  for name in MODULES:
    if MODULES[name].name != '__init__.py':
      visit(name, [])


LONG = 'cli', 'weights'  # packages with a file for each mode, or a few for each format


def test_packages_and_modules_are_few_and_small():
  folders = collections.Counter(path.parent for path in FILES if path.name != '__init__.py')
  assert len(folders) - 1 <= 14
  assert {f.name: n for f, n in folders.items() if n > 12 and f.name not in LONG} == {}
  for path in FILES:
    lines = len(path.read_text(encoding='utf-8').splitlines())
    assert lines <= 300 or path.name == 'keys.py', f'{path} has {lines} lines'  # a table may grow


MANY_PARAMETERS = {  # function: reason
  'export': 'flags of the mode',
  'load': 'keywords of the public API',
  'rand_augment': 'its parameters are config keys',
  'save': 'keywords of the public API',
  'predict': 'keywords of the public API',
}


def test_functions_are_short_and_have_few_parameters():
  for name, tree in TREES.items():
    for node in ast.walk(tree):
      if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        lines, words = node.end_lineno - node.lineno + 1, node.args
        count = len([*words.posonlyargs, *words.args, *words.kwonlyargs])
        count -= bool(words.args) and words.args[0].arg in ('self', 'cls')
        assert lines <= 60, f'{name}.{node.name} has {lines} lines'
        assert count <= 6 or node.name in MANY_PARAMETERS, f'{name}.{node.name}: {count} parameters'


def test_modules_import_few_others_and_names_are_unique():
  homes = collections.defaultdict(set)
  for name, tree in TREES.items():
    found = imported(name)[0]
    rooms = {
      package_of(other) if package_of(other) != package_of(name) else other for other in found
    }
    assert len(rooms) <= 10 or MODULES[name].name == '__init__.py', (
      f'{name} imports {sorted(rooms)}'
    )
    for node in tree.body:
      if isinstance(node, ast.FunctionDef | ast.ClassDef):
        homes[node.name].add(name)
  twice = {name: found for name, found in homes.items() if len(found) > 1}
  assert len(twice) <= 15, twice


@pytest.mark.parametrize(
  'name', [name for name, path in MODULES.items() if path.name == '__init__.py']
)
def test_every_name_that_a_package_lists_exists(name):
  package = importlib.import_module(name)
  later = vars(package).get('_PUBLIC', ())  # imported on first use
  assert set(getattr(package, '__all__', ())) <= {*vars(package), *later}


@pytest.mark.parametrize('folder', ['.', 'vit_jax', 'configs', 'benchmarks'])
def test_text_files_are_opened_as_utf_8(folder):
  """Without an encoding, Python uses the locale, which may not support a class name."""
  for path in sorted((ROOT / folder).rglob('*.py') if folder != '.' else ROOT.glob('*.py')):
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
      if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
        name = getattr(node.func, 'id', getattr(node.func, 'attr', ''))
        words = {word.arg for word in node.keywords}
        modes = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        text = name in ('read_text', 'write_text')
        text = text or (name == 'open' and {'w', 'a', 'r'} & {*modes})
        assert not text or 'encoding' in words, f'{path}:{node.lineno}'


def test_a_model_needs_only_light_dependencies():
  heavy = ['tensorboardX', 'tensorflow_datasets', 'sklearn', 'matplotlib', 'grain', 'cv2']
  script = (
    f'import sys; sys.modules.update(dict.fromkeys({heavy}))\n'
    "import vit_jax, jax, jax.numpy as jnp; model = vit_jax.make('B/16', num_classes=10)\n"
    'shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))\n'
    "assert shapes['params']['head']['kernel'].shape == (768, 10)\n"
    'from vit_jax.inference import prediction'
  )
  subprocess.run([sys.executable, '-c', script], cwd=ROOT, check=True)


@pytest.mark.slow
def test_public_names_can_be_imported_in_several_threads_at_once():
  script = (
    'import concurrent.futures, vit_jax\n'
    'with concurrent.futures.ThreadPoolExecutor(10) as pool:\n'
    '  found = list(pool.map(lambda name: getattr(vit_jax, name), vit_jax.__all__))\n'
    'assert all(found)'
  )
  subprocess.run([sys.executable, '-c', script], cwd=ROOT, check=True)


SPECS = ['digits.py', 'folder.py:small'] + [
  f'{name}.py:{variant}' for name in ('cifar10', 'cifar100') for variant in cifar10.VARIANTS
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
SPECS += ['finetune.py:b16,folder,lora']
SPECS += [f'mae.py:{model},cifar10' for model in finetune.MODELS] + ['mae.py:b16,folder']
SPECS += [f'imagenet.py:{model}' for model in imagenet.MODELS]
SPECS += [f'imagenet.py:s16,{recipe}' for recipe in imagenet.RECIPES]


@pytest.mark.parametrize('spec', SPECS)
def test_every_config_builds(spec):
  config = cli.load_file(f'{ROOT}/configs/{spec}')
  check(config)
  config = choose_open(config, None)
  channels = 1 if spec == 'digits.py' else 3
  task = Task(('a', 'b'), (32, 32), channels)
  assert assemble(config, task).image_shape[-1] == channels
  assert config.log_every == 50


def test_every_config_file_is_tested():
  assert {p.name for p in (ROOT / 'configs').glob('*.py')} == {s.split(':')[0] for s in SPECS}
