"""Benchmarks compare equal models, count the computed operations, and have valid commands."""

import dataclasses
import importlib.util
import io
import math
import pathlib
import re
import shlex

import jax
import numpy as np
from PIL import Image
import pytest

from benchmarks import hlo, memory, photos, speed, works, zoo
from benchmarks import input as input_lib
from benchmarks.plain_linen import PlainViT
from vit_jax.augment import pipeline
from vit_jax.data import sources, splits
from vit_jax.model import variants

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROGRAMS = sorted(
  path.stem
  for path in (ROOT / 'benchmarks').glob('*.py')
  if 'def parse(' in path.read_text(encoding='utf-8')
)
WORKS = [works.dry(work) for work in works.WORKS['cpu']]
TRAIN, INFERENCE = WORKS[0], WORKS[1]
CLS = next(work for work in WORKS if work.name == 'B/16 inference')  # tiny has no class token


def ours(work):
  """Returns this project's model, perturbed parameters and a batch of images."""
  size = works.sizes(work)
  image_BHWC = np.random.RandomState(0).normal(size=(4, *(size['image_size'],) * 2, 3))
  image_BHWC = image_BHWC.astype(np.float32)
  names = ('width', 'depth', 'num_heads', 'mlp_dim', 'pool', 'activation', 'patch_size')
  model = variants.make('Ti/16', works.NUM_CLASSES, **{name: size[name] for name in names})
  params = model.init(jax.random.key(0), image_BHWC)['params']
  draw = np.random.RandomState(1).normal
  return model, jax.tree.map(lambda x: x + 0.1 * draw(size=x.shape), params), image_BHWC


def plain_names(params):
  """Renames our parameters to the names of `PlainViT`."""
  plain = {name: params[name] for name in ('norm', 'head', 'pos_embedding', 'embedding')}
  plain |= {'cls': params['cls']} if 'cls' in params else {}
  for name in [name for name in params if name.startswith('block_')]:
    block, i = params[name], name.removeprefix('block_')
    for norm in ('attention_norm', 'mlp_norm'):
      plain[f'{norm}_{i}'] = block[norm]
    plain[f'attention_{i}'] = block['attention']
    plain[f'up_{i}'], plain[f'down_{i}'] = block['mlp']['up'], block['mlp']['down']
  return plain


@pytest.mark.slow
@pytest.mark.parametrize('work', [INFERENCE, CLS], ids=['tiny', 'B/16'])
def test_plain_linen_computes_the_same_function(work):
  model, params, image_BHWC = ours(work)
  got = PlainViT(**works.sizes(work)).apply({'params': plain_names(params)}, image_BHWC)
  np.testing.assert_allclose(got, model.apply({'params': params}, image_BHWC), atol=2e-5)


@pytest.mark.parametrize('work', [
    pytest.param(INFERENCE, id='tiny'), pytest.param(CLS, id='B/16', marks=pytest.mark.slow),
])  # fmt: skip
def test_the_pytorch_model_computes_the_same_function(work):
  torch = pytest.importorskip('torch', reason='requirements-peers.txt is not installed')
  from benchmarks.torch_vit import TorchViT

  model, params, image_BHWC = ours(work)
  twin = TorchViT(**works.sizes(work))
  width = works.sizes(work)['width']
  put = lambda name, value: state.__setitem__(name, torch.from_numpy(np.array(value, np.float32)))
  state = {}

  def linear(name, layers, inputs):  # concatenates several layers into one
    kernels = [np.reshape(layer['kernel'], (inputs, -1)) for layer in layers]
    put(f'{name}.weight', np.concatenate(kernels, axis=1).T)
    put(f'{name}.bias', np.concatenate([np.ravel(layer['bias']) for layer in layers]))

  def norm(name, layer):
    put(f'{name}.weight', layer['scale'])
    put(f'{name}.bias', layer['bias'])

  for name in ('cls', 'pos_embedding'):
    if name in params:
      put(name, params[name])
  linear('embedding', [params['embedding']], math.prod(params['embedding']['kernel'].shape[:3]))
  linear('head', [params['head']], width)
  norm('norm', params['norm'])
  for i in range(works.sizes(work)['depth']):
    block = params[f'block_{i}']
    attention, mlp = block['attention'], block['mlp']
    for name in ('attention_norm', 'mlp_norm'):
      norm(f'blocks.{i}.{name}', block[name])
    linear(f'blocks.{i}.qkv', [attention[name] for name in ('query', 'key', 'value')], width)
    linear(f'blocks.{i}.out', [attention['out']], math.prod(attention['out']['kernel'].shape[:2]))
    linear(f'blocks.{i}.up', [mlp['up']], width)
    linear(f'blocks.{i}.down', [mlp['down']], mlp['down']['kernel'].shape[0])
  twin.load_state_dict(state)
  got = twin(torch.from_numpy(image_BHWC.transpose(0, 3, 1, 2).copy())).detach().numpy()
  np.testing.assert_allclose(got, model.apply({'params': params}, image_BHWC), atol=2e-5)


def product_flops(jaxpr):
  """Returns the FLOPs of all matrix products, also nested ones; not of products with vectors."""
  total = 0
  for equation in jaxpr.eqns:
    ranks = [value.aval.ndim for value in equation.invars]
    if equation.primitive.name == 'dot_general' and min(ranks) > 1:
      (contracted, _), _ = equation.params['dimension_numbers']
      inputs = equation.invars[0].aval.shape
      depth = math.prod(inputs[axis] for axis in contracted)
      total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
    for value in jax.tree.leaves(list(equation.params.values())):
      inner = getattr(value, 'jaxpr', value)
      total += product_flops(inner) if hasattr(inner, 'eqns') else 0
  return total


@pytest.mark.slow_after_first
@pytest.mark.parametrize('work', [INFERENCE, CLS], ids=['tiny', 'B/16'])
def test_flops_match_the_matrix_products(work):
  model, params, image_BHWC = ours(work)
  forward = lambda params: model.apply({'params': params}, image_BHWC)
  gradient = jax.grad(lambda params: forward(params).sum())
  want = works.flops(**works.sizes(work))
  count = lambda function: product_flops(jax.make_jaxpr(function)(params).jaxpr) / len(image_BHWC)
  assert count(forward) == want['inference']
  assert count(gradient) == want['train']


@pytest.mark.slow
@pytest.mark.parametrize('work', [TRAIN, INFERENCE], ids=lambda work: work.mode)
def test_each_contestant_runs_in_its_own_process(work):
  work = dataclasses.replace(work, batch_size=64)
  contestant = speed.Contestant('vit_jax', work, works.sizes(work))
  assert contestant.about['first_step_seconds'] > 0 and 'jax' in contestant.about['versions']
  assert 0 < contestant.seconds(1) < 5
  assert contestant.stop() > 1e8  # peak memory in bytes; JAX alone needs more
  assert contestant.process.exitcode == 0


PACE = {'vit_jax': 0.1, 'vit_jax_input': 0.01, 'torch_eager': 0.2, 'torch_compiled': 0.05}


class Fake:
  """Stands in for a contestant; `PACE` has its seconds per step."""

  def __init__(self, name, work, size):
    self.name = name
    known = name in PACE
    self.about = {'first_step_seconds': 3.1, 'versions': {}} if known else {'skipped': 'absent'}

  def seconds(self, steps):
    return steps * PACE[self.name]

  def stop(self):
    return 5


@pytest.mark.slow
def test_ratios_are_our_speed_divided_by_theirs(monkeypatch):
  monkeypatch.setattr(speed, 'Contestant', Fake)
  result = speed.measure(TRAIN)
  ratio = result['ratio_to']
  assert ratio['torch_eager'] == pytest.approx(2) and ratio['torch_compiled'] == pytest.approx(0.5)
  assert result['skipped'] == {'plain_linen': 'absent'}
  ours = result['contestants']['vit_jax']
  assert ours['images_per_second'] == pytest.approx(TRAIN.batch_size / 0.1)
  assert ours['compile_seconds'] == pytest.approx(3.0) and len(ours['rounds']) == speed.ROUNDS


@pytest.mark.parametrize('work', works.WORKS['cpu'] + works.WORKS['gpu'], ids=lambda w: w.name)
def test_every_workload_has_enough_images(work):
  config, source = works.settings(work), sources.open_source('synthetic', '', (32, 32))
  [(_, start, stop)] = splits.resolve(config.data.train_split, source.sizes)
  assert 0 <= start < stop and config.epochs * (stop - start) >= work.batch_size


@pytest.mark.parametrize('work', works.WORKS['cpu'] + works.WORKS['gpu'], ids=lambda w: w.name)
def test_every_workload_trains_as_the_peers_do(work):
  config = works.settings(work)
  assert config.optimizer.name == 'adamw' and not config.optimizer.clip and not config.ema
  assert set(pipeline.active(config.augment)) <= {'pad_crop', 'flip'}


def test_a_missing_peer_is_skipped(monkeypatch, tmp_path):
  (tmp_path / 'timm.py').write_text("raise ModuleNotFoundError('no', name='timm')")
  monkeypatch.setenv('PYTHONPATH', str(tmp_path))
  assert speed.Contestant('timm_compiled', TRAIN, works.sizes(TRAIN)).about == {
    'skipped': 'not installed: timm'
  }


@pytest.mark.skipif(
  jax.__version_info__ < (0, 12), reason='the CPU backend of this JAX version undoes remat'
)
def test_remat_reduces_the_memory_of_a_step():
  need = {}
  for remat in ('none', 'full'):
    config = works.settings(TRAIN)
    config.model.depth, config.model.remat, config.micro_batches = 4, remat, 1
    need[remat] = memory.step_bytes(config, 64)
  assert need['full'] < 0.7 * need['none']


@pytest.mark.parametrize(('budget', 'batch'), [(1e9, 0), (2.2e9, 8), (5e9, 32), (5.1e9, 32)])
def test_the_largest_batch_was_compiled_and_fits(monkeypatch, budget, batch):
  tried = {}

  def step_bytes(config, size):  # almost linear in the batch size
    tried[size] = int(1e9 + 1.25e8 * size + 1e7 * (size % 16))
    return tried[size]

  monkeypatch.setattr(memory, 'step_bytes', step_bytes)
  found, needs = memory.largest_batch(None, budget)
  assert found == batch and needs == tried.get(batch, 0) <= budget
  assert tried[batch + memory.MULTIPLE] > budget


def test_the_table_has_a_row_for_each_workload():
  row = {
    'work': 'tiny train', 'batch_size': 8, 'flops_per_image': 4e6,
    'ratio_to': {'plain_linen': 2.5, 'vit_jax_input': 0.2},
    'contestants': {'vit_jax': {
      'images_per_second': 1234.5, 'peak_memory_bytes': 2**30, 'compile_seconds': 1.5,
    }},
  }  # fmt: skip
  lines = speed.table({'works': [row], 'peak_flops_per_second': 9.876e9}).splitlines()
  assert (
    lines[-1] == '| tiny train | 8 | 1,234.5 | plain linen 2.50 | 50% | 20.0% | 1.0 GiB | 1.5 s |'
  )


# Published numbers: the paper (Table 1), "Scaling Vision Transformers" (Table 2) and timm.
MILLIONS = {
    'Ti/16': '5.72', 'S/16': '22.05', 'S/32': '22.88', 'B/16': '86.57', 'B/32': '88.22',
    'L/16': '304.33', 'L/32': '306.54', 'H/14': '632.05', 'R26+S/32': '36.43',
    'R50+B/16': '98.66', 'R50+L/32': '328.99', 'R+Ti/32': '6.34',
    'vit_base_patch16_clip_224': '86.57',
}  # fmt: skip


@pytest.mark.slow
def test_models_have_the_published_parameter_counts():
  text = (zoo.ROOT / 'docs' / 'models.md').read_text()
  listed = dict(re.findall(r'^\| `(\S+)`.*? \| ([\d.]+) \|', text, re.MULTILINE))
  assert {name: listed[name] for name in MILLIONS} == MILLIONS
  for name in ('Ti/16', 'R26+S/32'):
    assert zoo.millions(zoo.parameters(variants.make(name, 1000))) == MILLIONS[name]
  name = 'vit_wee_patch16_reg1_gap_256'
  assert zoo.millions(zoo.parameters(zoo.timm_model(name))) == listed[name]
  assert set(variants.VARIANTS) <= {name.split('/')[0] for name in listed}


# Lines in the formats of the TPU compiler and of XLA's older printer.
HLO = """
%all-reduce-scatter.7 (input: bf16[64,8]) -> bf16[16,8] {
  %all-reduce.1 = bf16[64,8]{1,0} all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3}}, x
}

ENTRY %main {
  %all-gather.2 = f32[32,4]{1,0:T(8,128)} all-gather(%a), channel_id=5, replica_groups=[2,4]<=[8]
  %again = f32[32,4]{1,0} all-gather(%b), channel_id=5, replica_groups=[2,4]<=[8]
  %g = (bf16[4], bf16[8]) all-gather-start(%c), channel_id=6, replica_groups={{0,1},{2,3}}
  %s = (f32[], f32[3]) all-reduce(%d), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'a','b'}
  %many = (f32[5], f32[2]) all-reduce(%h), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}
  %part = f32[10]{0} all-reduce(%f), channel_id=8, replica_groups=mesh['axis_0'=8] {'axis_0':(1)4}
  %shares = f32[16]{0} reduce-scatter(%g), channel_id=9, replica_groups=[1,8]<=[8]
  %not-one = f32[16]{0} add(%all-gather.2, %all-reduce.9)
}
"""


def test_collectives_are_counted_once_with_their_bytes():
  found = {(c['kind'], c['group']): (c['count'], c['bytes']) for c in hlo.collectives(HLO)}
  assert found == {
    ('reduce-scatter', 4): (1, 64 * 8 * 2),
    ('all-gather', 4): (1, 32 * 4 * 4),
    ('all-gather', 2): (1, 8 * 2),
    ('all-reduce', 8): (1, 4 * 4),
    ('all-reduce', 4): (2, 10 * 4 + 7 * 4),
    ('reduce-scatter', 8): (1, 16 * 4 * 8),
  }


@pytest.mark.parametrize('name', input_lib.DECODERS)
def test_all_decoders_give_the_same_pixels(name):
  needs, decode = input_lib.DECODERS[name]
  if importlib.util.find_spec(needs) is None:
    pytest.skip(f'{needs} is not installed')
  coarse = np.random.RandomState(0).randint(0, 256, (6, 6, 3)).astype(np.uint8)
  whole = Image.fromarray(coarse).resize((900, 700), Image.Resampling.BICUBIC)
  encoded = io.BytesIO()
  whole.save(encoded, 'jpeg', quality=95)
  for box in ((100, 50, 820, 640), (300, 200, 460, 370)):  # the crop is reduced, then enlarged
    got = decode(encoded.getvalue(), lambda *_, box=box: box).astype(int)
    wanted = whole.resize(input_lib.SIZE[::-1], Image.Resampling.BILINEAR, box)
    assert abs(got - np.asarray(wanted)).mean() < 2


def test_photos_have_the_size_of_real_photographs(tmp_path, monkeypatch):
  monkeypatch.setattr(photos, 'CLASSES', 2)
  monkeypatch.setattr(photos, 'CANVAS', 512)
  photos.make(tmp_path, 12)
  files = sorted(tmp_path.rglob('*.jpg'))
  pixels = [math.prod(Image.open(file).size) for file in files]
  assert len(files) == 12 and 100_000 < np.mean(pixels) < 200_000
  assert 0.4 < sum(file.stat().st_size for file in files) / sum(pixels) < 0.7


def program(name):
  return importlib.import_module(f'benchmarks.{name}')


def test_every_program_parses_its_arguments():
  """A program that ignores a mistyped flag would start minutes of work."""
  files = {path.stem: path.read_text(encoding='utf-8') for path in ROOT.glob('benchmarks/*.py')}
  run = {name for name, text in files.items() if "if __name__ == '__main__'" in text}
  assert run - {'memory'} == set(PROGRAMS)  # `memory` only names another command


@pytest.mark.parametrize('name', PROGRAMS)
def test_a_benchmark_has_help_and_rejects_unknown_flags(name, capsys):
  with pytest.raises(SystemExit, match='0'):
    program(name).parse(['--help'])
  assert f'python -m benchmarks.{name}' in capsys.readouterr().out
  with pytest.raises(SystemExit, match='2'):
    program(name).parse(['--nonsense'])
  err = capsys.readouterr().err
  assert err.startswith('error: ') and err.count('\n') == 1, err


def documented():
  """Yields `(name, arguments)` of every command in the docs, build files and docstrings."""
  files = [ROOT / 'README.md', ROOT / 'Makefile', ROOT / '.ci/run', *ROOT.glob('benchmarks/*.py')]
  for path in files:
    text = path.read_text(encoding='utf-8').replace('\\\\\n', '').replace('\\\n', '')
    for name, words in re.findall(r'-m benchmarks\.(\w+)(.*)', text):
      words = words.split('`')[0].split('  #')[0].split(' # ')[0]
      words = words.replace('$*', 'cpu').replace('$(DATA)', 'folder:cifar10')
      words = words.replace('$(MINUTES)', '30')
      yield name, tuple(shlex.split(words.removesuffix("'")))


@pytest.mark.parametrize(('name', 'words'), sorted({*documented()}))
def test_documented_commands_are_valid(name, words, tmp_path, monkeypatch):
  mentioned = ('adaptation', 'recipes', 'speedrun', 'transfer')
  if words == () and name in mentioned:  # only mentioned in a text
    return
  monkeypatch.chdir(tmp_path)
  for run in ('digits0', 'digits1', 'digits2', 'tin', 'teacher'):
    (tmp_path / 'runs' / run).mkdir(parents=True)
    (tmp_path / 'runs' / run / 'result.json').write_text('{}')
  given = {'streamed': ['folder/train'], 'adaptation': ['cifar10/train', 'cifar10/test']}
  for folder in given.get(name, ()):
    (tmp_path / folder).mkdir(parents=True)
  if name in ('sweep', 'speedrun'):
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    (tmp_path / 'benchmarks').symlink_to(ROOT / 'benchmarks')
  program(name).parse(list(words))
