"""Tests that exports run elsewhere: in new processes, most of them without this package."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from PIL import ExifTags, Image, ImageOps
import pytest
from scipy import special
import yaml

from tests.conftest import DATA, ROOT, call, error, init_params, run_model, small_config
import vit_jax
from vit_jax import evaluation, experiment, opening
from vit_jax.data import image as image_lib
from vit_jax.inference import card, exporting, measuring, prediction
from vit_jax.model import VARIANTS
from vit_jax.weights import onnx_program, program, reader
from vit_jax.weights.formats import Preprocessing, Pretrained
from vit_jax.weights.usage import prepare_lines
from vit_jax.workdir import Calibration, Task, save_calibration

ONNX = 'needs requirements-onnx.txt'
PROGRAMS = ('stablehlo', 'onnx')

BLOCK = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path=None, target=None):
    if name.split('.')[0] in BLOCKED:
      raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
"""
OURS = {'vit_jax', 'main', 'flax', 'optax', 'orbax', 'ml_collections', 'clu', 'safetensors'}


def run(code, folder, blocked=()):
  """Runs Python code in a new process in a folder, with some packages blocked; returns stdout."""
  paths = [p for p in os.environ.get('PYTHONPATH', '').split(os.pathsep) if p]
  if not blocked:
    paths.append(str(ROOT))
  head = f'import sys; sys.path += {paths}\nBLOCKED = {set(blocked)}\n{BLOCK}'
  command = [
    sys.executable,
    '-I',
    '-c',
    f'{head}\n{code}',
  ]  # -I: ignores the current folder and PYTHONPATH
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'HF_HUB_OFFLINE': '1'}
  done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done.stdout


def needs(format):
  """Skips the test if the package of a format is missing."""
  if format == 'onnx':
    pytest.importorskip('jax2onnx', reason=ONNX)


def outputs(format, folder, image_BHWC):
  """Runs a program on images and returns its outputs."""
  if format == 'stablehlo':
    data = bytearray((folder / 'model.stablehlo').read_bytes())
    return np.asarray(jax.export.deserialize(data).call(image_BHWC))
  session = pytest.importorskip('onnxruntime').InferenceSession(folder / 'model.onnx')
  return session.run(None, {'image': image_BHWC})[0]


def normalized(image_BHWC, p):
  """Normalises images with NumPy."""
  pixels = image_BHWC / 255
  return ((pixels - np.array(p.mean)) / np.array(p.std)).astype(np.float32)


def images(p, channels, count=3):
  shape = (count, *(p.stored_size or p.size), channels)
  return np.random.RandomState(1).randint(0, 256, shape, np.uint8)


def random_model(image_shape=(8, 8, 3), **fields):
  """Returns a model and its parameters, all of them random."""
  sizes = dict(width=16, depth=2, num_heads=2, mlp_dim=32, patch_size=(4, 4))
  model = vit_jax.make(None, 5, **sizes | fields)
  params = init_params(model, jnp.zeros((1, *image_shape)))
  keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(params)))
  noise = jax.tree.unflatten(jax.tree.structure(params), list(keys))
  add = lambda x, key: np.asarray(x + 0.3 * jax.random.normal(key, x.shape))
  return model, jax.tree.map(add, params, noise)


MODELS = {
  'class token, learned': dict(pool='cls', activation='gelu'),
  'GAP, sincos': dict(pool='gap', position='sincos', norm_after_pool=True),
  'MAP, rope': dict(pool='map', position='rope', num_registers=2, qk_norm=True, layer_scale=0.5),
  'hybrid': dict(resnet=(), resnet_width=32, representation_size=7, activation='quick_gelu'),
  'no head': dict(num_classes=None, pool='gap', pre_norm=True),
}


def test_positions_for_larger_images_are_resized_to_the_preprocessing(tmp_path, caplog):
  shutil.copytree(DATA / 'hf_dinov2', tmp_path / 'in')  # its positions are for 28 pixels
  small = dict(size={'shortest_edge': 16}, crop_size={'height': 14, 'width': 14}, resample=3)
  small |= dict(image_processor_type='BitImageProcessor', do_resize=True, do_center_crop=True)
  small |= dict(do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_rescale=True)
  (tmp_path / 'in/preprocessor_config.json').write_text(json.dumps(small))
  exporting.export(tmp_path / 'in', 'hf', tmp_path / 'out')
  assert 'for 4x4 patches are resized (bilinear) to 2x2 patches' in caplog.text
  caplog.clear()
  exporting.export(tmp_path / 'out', 'hf', tmp_path / 'again')  # now the sizes agree
  assert not caplog.records
  written = json.loads((tmp_path / 'out/preprocessor_config.json').read_text())
  assert written['crop_size'] == small['crop_size'] and written['size'] == small['size']
  loaded, image_BHWC = vit_jax.load(tmp_path / 'out'), np.ones((1, 14, 14, 3), np.float32)
  exp, params = opening.from_init(str(tmp_path / 'in'), {})
  assert exp.image_shape == (14, 14, 3) and loaded.preprocessing.size == (14, 14)
  wanted = run_model(exp.model, params, image_BHWC)
  np.testing.assert_array_equal(run_model(loaded.model, loaded.params, image_BHWC), wanted)


@pytest.mark.slow
@pytest.mark.slow_after_first
@pytest.mark.parametrize('format', PROGRAMS)
@pytest.mark.parametrize('name', MODELS)
def test_programs_give_the_outputs_of_the_model(format, name, tmp_path):
  needs(format)
  fields = dict(MODELS[name])
  if 'num_classes' in fields:
    model, params = random_model(**{k: v for k, v in fields.items() if k != 'num_classes'})
    model, params = model.clone(num_classes=None), {k: v for k, v in params.items() if k != 'head'}
  else:
    model, params = random_model(**fields)
  p = Preprocessing((8, 8), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
  vit_jax.save(model, params, tmp_path, format=format, preprocessing=p)
  image_BHWC = images(p, 3)
  want = run_model(model, params, normalized(image_BHWC, p))
  for batch in (1, 3):  # any number of images
    found = outputs(format, tmp_path, image_BHWC[:batch])
    assert found.dtype == np.float32
    atol = (1e-5 if format == 'stablehlo' else 1e-4) * max(1, np.abs(want).max())
    np.testing.assert_allclose(found, want[:batch], atol=atol)


FIXTURES = ('paper_token', 'timm_map')


@pytest.mark.slow
@pytest.mark.slow_after_first
@pytest.mark.parametrize('format', PROGRAMS)
@pytest.mark.parametrize('name', FIXTURES)
def test_programs_of_published_weights_give_the_original_outputs(format, name, tmp_path):
  needs(format)
  path = DATA / name / 'weights.npz'
  exporting.export(path if path.exists() else DATA / name, format, tmp_path / 'out')
  loaded = vit_jax.load(path if path.exists() else DATA / name)
  image_BHWC = images(loaded.preprocessing, 3)
  want = run_model(loaded.model, loaded.params, normalized(image_BHWC, loaded.preprocessing))
  np.testing.assert_allclose(outputs(format, tmp_path / 'out', image_BHWC), want, atol=1e-4)


def snippet(folder):
  """Returns the Python code in a model card."""
  return re.search(r'```python\n(.*?)```', (folder / 'README.md').read_text(), re.DOTALL)[1]


def save_image(folder, size):
  """Writes `image.png`, a JPEG that EXIF rotates to (height, width); returns the rotated image."""
  pixels = np.random.RandomState(2).randint(0, 256, (size[1], size[0], 3), np.uint8)
  exif = Image.Exif()
  exif[ExifTags.Base.Orientation] = 6  # viewers rotate it by 90 degrees
  Image.fromarray(pixels).save(folder / 'image.png', 'JPEG', exif=exif)
  seen = image_lib.decode_image((folder / 'image.png').read_bytes(), 'image.png')
  assert seen.size == (size[1], size[0])
  return seen


@pytest.mark.slow
@pytest.mark.parametrize('format', PROGRAMS)
def test_a_program_runs_elsewhere_with_the_code_of_its_card(format, trained, tmp_path):
  needs(format)
  workdir, _ = trained
  exporting.export(workdir, format, tmp_path / 'out')
  loaded = vit_jax.load(workdir)
  p = loaded.preprocessing
  file = save_image(tmp_path / 'out', (20, 30))
  pixels = image_lib.fit_image(file, p.size, p.interpolation, p.crop, p.stretch)
  want_L = run_model(loaded.model, loaded.params, normalized(pixels[None], p))[0]
  code = snippet(tmp_path / 'out') + "np.save('out.npy', output)"
  printed = run(code, tmp_path / 'out', OURS | ({'jax'} if format == 'onnx' else set()))
  assert printed.strip() == loaded.class_names[want_L.argmax()]
  atol = 1e-5 if format == 'stablehlo' else 1e-4
  np.testing.assert_allclose(np.load(tmp_path / 'out' / 'out.npy'), want_L, atol=atol)
  about = json.loads((tmp_path / 'out' / 'model.json').read_text())
  assert about['input']['shape'] == ['b', 8, 8, 3] and about['output']['shape'] == ['b', 10]
  assert about['class_names'] == list(loaded.class_names)


@pytest.mark.parametrize('fields', [
    {'crop': 0.8}, {'crop': 0.8, 'stretch': True}, {'stretch': True, 'interpolation': 'bilinear'},
])  # fmt: skip
def test_cards_resize_files_as_the_weights_require(fields, tmp_path):
  p = Preprocessing((8, 12), **fields)
  file = save_image(tmp_path, (31, 40))
  variables = {'Image': Image, 'ImageOps': ImageOps}
  with contextlib.chdir(tmp_path):
    exec(prepare_lines(p, 3, p.size), variables)
  want = image_lib.fit_image(file, p.size, p.interpolation, p.crop, p.stretch)
  assert np.array_equal(np.asarray(variables['image']), want)


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P', 'L', 'I;16', 'CMYK', '1'])
def test_cards_open_files_of_any_mode_as_predict_does(mode, channels, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  pixels = np.random.RandomState(0).randint(0, 256, (9, 7, 4), np.uint8)
  if mode == 'I;16':
    image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 250)
  else:
    image = Image.fromarray(pixels).convert(mode)
  options = {'transparency': 3} if mode == 'P' else {}
  image.save('image.png', 'JPEG' if mode == 'CMYK' else 'PNG', **options)
  variables = {'Image': Image, 'ImageOps': ImageOps}
  exec(prepare_lines(Preprocessing((4, 4)), channels, (4, 4)), variables)
  decoded = image_lib.decode_image(pathlib.Path('image.png').read_bytes(), 'image.png', channels)
  want = image_lib.fit_image(decoded, (4, 4))
  np.testing.assert_array_equal(np.asarray(variables['image']).reshape(want.shape), want)


def run_card(folder, seen, pixels_BHWC, blocked=()):
  """Runs a card's code, asserts that its variable `seen` is these pixels, returns the output."""
  code = f"{snippet(folder)}\nimport numpy as np; np.save('seen.npy', {seen})"
  printed = run(code, folder, blocked)
  np.testing.assert_allclose(np.load(folder / 'seen.npy').squeeze(), pixels_BHWC[0], atol=1e-5)
  return printed.strip()


@pytest.mark.slow
def test_npz_card_runs(trained, tmp_path):
  workdir, _ = trained
  exporting.export(workdir, 'npz', tmp_path / 'npz')
  file = save_image(tmp_path / 'npz', (8, 8))
  loaded = vit_jax.load(workdir)
  pixels = normalized(np.asarray(file)[None], loaded.preprocessing)
  best = run_model(loaded.model, loaded.params, pixels)[0].argmax()
  assert int(run_card(tmp_path / 'npz', 'pixels', pixels)) == best
  assert f'{best} pattern {best}' in (tmp_path / 'npz' / 'README.md').read_text()


@pytest.mark.slow
def test_hugging_face_card_runs(tmp_path):
  pytest.importorskip('transformers', reason='needs requirements-peers.txt')
  loaded = vit_jax.load(DATA / 'hf_classifier')
  exporting.export(DATA / 'hf_classifier', 'hf', tmp_path)
  file = save_image(tmp_path, loaded.preprocessing.size)
  pixels = normalized(np.asarray(file)[None], loaded.preprocessing)
  best = run_model(loaded.model, loaded.params, pixels)[0].argmax()
  names = loaded.class_names or [f'LABEL_{i}' for i in range(loaded.model.num_classes)]
  seen = "inputs['pixel_values'].permute(0, 2, 3, 1)"
  assert run_card(tmp_path, seen, pixels, OURS - {'safetensors'}) == names[best]
  front = yaml.safe_load((tmp_path / 'README.md').read_text().split('---')[1])
  assert front['library_name'] == 'transformers' and 'license' not in front


def test_timm_card_runs(trained, tmp_path):
  pytest.importorskip('timm', reason='needs timm, with torchvision', exc_type=ImportError)
  workdir, _ = trained
  exporting.export(workdir, 'timm', tmp_path)
  file = save_image(tmp_path, (8, 8))
  loaded = vit_jax.load(workdir)
  pixels = normalized(np.asarray(file)[None], loaded.preprocessing)
  best = run_model(loaded.model, loaded.params, pixels)[0].argmax()
  seen = 'transform(image).permute(1, 2, 0)'
  assert run_card(tmp_path, seen, pixels, OURS - {'safetensors'}) == f'pattern {best}'


def test_a_card_lists_the_known_facts(trained, tmp_path):
  workdir, result = trained
  exporting.export(workdir, 'stablehlo', tmp_path / 'out')
  text = (tmp_path / 'out' / 'README.md').read_text()
  for fact in (
    f'{result["test_accuracy"]:.2%} on the 256 images of `test`',
    f'| parameters | {result["params"]:,} |',
    '`synthetic`, split `train`: 1,024 images',
    'random weights',
    'these weights are from step 32',
    'pool `gap`',
    '| license | not chosen yet |',
  ):
    assert fact in text
  exporting.export(workdir / 'checkpoints' / '16', 'stablehlo', tmp_path / 'earlier')
  earlier = (tmp_path / 'earlier' / 'README.md').read_text()
  assert '| accuracy | unknown |' in earlier and 'from step 16' in earlier
  exporting.export(DATA / 'paper_token' / 'weights.npz', 'npz', tmp_path / 'paper')
  paper = (tmp_path / 'paper' / 'README.md').read_text()
  assert '| trained on | unknown |' in paper and str(DATA) not in paper
  assert 'read from `weights.npz`' in paper and '5 classes; their names are unknown' in paper


@pytest.mark.parametrize('step, text', [
    (32, '60.00% on the 1,234 images of `test`'), (16, '40.00% on the 1,234 images of `test`'),
    (8, 'unknown'),
])  # fmt: skip
def test_a_card_gives_the_accuracy_of_its_own_checkpoint(trained, step, text):
  result = {
    'config': {'data': {'eval_split': 'test'}}, 'examples': 1234, 'steps': 32,
    'test_accuracy': 0.6, 'best': {'step': 16, 'val_accuracy': 0.9, 'test_accuracy': 0.4},
  }  # fmt: skip
  loaded = vit_jax.load(trained[0])
  loaded = dataclasses.replace(loaded, run={**loaded.run, 'step': step})
  assert f'| accuracy | {text} |' in card.write_card('npz', loaded, 'run', result)


@pytest.mark.parametrize('changed, text', [
    ({}, 'epochs planned, with batch size 32; these weights are from step 32 |'),
    ({'freeze': 'backbone'}, 'from step 32; only the head was trained |'),
    ({'adapt': 'lora'}, 'from step 32; only the head and an adapter (lora) were trained |'),
    ({'classifier': 'ridge'}, 'no steps: the head was computed from the features of these images'),
])  # fmt: skip
def test_a_card_says_what_was_trained(trained, changed, text):
  loaded = vit_jax.load(trained[0])
  run = {**loaded.run, 'config': {**loaded.run['config'], **changed}}
  assert text in card.write_card('npz', dataclasses.replace(loaded, run=run), 'run')


def test_a_card_compares_size_latency_and_accuracy(trained):
  found = {
    'float32': measuring.Measured(2_500_000, 0.0123, 0.9),
    'int8': measuring.Measured(1_200_000, 0.004, 0.875),
  }
  compared = measuring.Comparison(found, '2 cores', '100 images of `test`', 512)
  text = card.write_card('onnx', vit_jax.load(trained[0]), 'run', None, compared)
  for line in (
    '| precision | int8, calibrated on 512 images |',
    '| accuracy | 87.50% on the 100 images of `test` |',
    '| float32 | 2.50 MB | 12.3 ms | 90.00% |',
    '| int8 | 1.20 MB | 4 ms | 87.50% |',
  ):
    assert line in text


@pytest.mark.parametrize('fields, text', [
    ({'crop': 0.875}, '8x12 pixels, RGB; files are cropped to fit, keeping the central 0.875 of '
     'the shorter side, with bicubic interpolation'),
    ({'crop': 0.5, 'stretch': True}, '8x12 pixels, RGB; files are stretched to fit, keeping the '
     'central 0.5 of each side, with bicubic interpolation'),
    ({'stored_size': (4, 6), 'interpolation': 'box'}, '4x6, enlarged to 8x12 pixels, RGB; files '
     'are cropped to fit, with box interpolation'),
])  # fmt: skip
def test_a_card_says_how_files_become_images(fields, text):
  assert card.images(Preprocessing((8, 12), **fields), 3) == text
  assert 'pixels, grey;' in card.images(Preprocessing((8, 12), **fields), 1)


@pytest.mark.parametrize('variant', VARIANTS)
def test_each_variant_is_recognised_by_its_sizes(variant):
  assert card.name_of(vit_jax.make(f'{variant}/32', 10)) == f'{variant}/32'


def test_a_card_contains_no_folder_names(trained):
  loaded = vit_jax.load(trained[0])
  config = {**loaded.run['config'], 'init': '/home/zoe/secret/base.npz'}
  config['data'] = {**config['data'], 'source': 'folder:/home/zoe/photos'}
  loaded = dataclasses.replace(loaded, run={**loaded.run, 'config': config})
  for source in ('~/zoe/runs/best', '/home/zoe/runs/best'):
    text = card.write_card('stablehlo', loaded, source)
    assert 'the weights `base.npz`' in text and '`folder:photos`, split' in text
    assert 'zoe' not in text


@pytest.mark.slow
def test_a_program_is_independent_of_the_machine_that_writes_it(tmp_path, monkeypatch):
  model, params = random_model(
    width=48, num_heads=4
  )  # narrow enough for the CPU's special matrix product
  files = []
  for name in ('cpu', 'gpu'):
    monkeypatch.setattr(jax, 'default_backend', lambda name=name: name)
    vit_jax.save(model, params, tmp_path / name, format='stablehlo')
    data = bytearray((tmp_path / name / 'model.stablehlo').read_bytes())
    exported = jax.export.deserialize(data)
    assert exported.platforms == ('cpu', 'cuda', 'tpu')
    text = exported.mlir_module()
    assert 'optimization_barrier' not in text
    products = re.findall(r'stablehlo\.(?:dot_general|convolution).*', text)
    assert products and all(line.count('HIGHEST') == 2 for line in products)  # both factors
    files.append(data)
  assert files[0] == files[1]
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  assert size < len(files[0]) < size + 50_000


@pytest.mark.slow
def test_exported_programs_compute_in_float32_from_the_stored_size(tmp_path):
  config = small_config(**{
      'epochs': '0', 'data.source': 'digits', 'data.image_size': '16', 'model.dtype': 'bfloat16',
      'model.patch_size': '4', 'data.mean': '0.3', 'data.std': '0.4',
      'data.cache': 'memory', 'data.stretch': 'true',  # small squares are stored unstretched
  })  # fmt: skip
  vit_jax.train(config, tmp_path / 'run')
  model, params = vit_jax.load(tmp_path / 'run')
  kernel = params['head']['kernel']  # initialised to zero
  kernel += np.random.RandomState(0).normal(size=kernel.shape)
  exp, _ = opening.from_init(str(tmp_path / 'run' / 'checkpoints' / '0'), {})
  assert exp.task.stored_size == (8, 8) and exp.image_shape == (16, 16, 1)  # as in the run
  p = reader.read_weights(tmp_path / 'run').preprocessing
  assert p.stored_size == (8, 8) and p.size == (16, 16) and (p.crop, p.stretch) == (1, False)
  vit_jax.save(
    model.clone(dtype=jnp.bfloat16), params, tmp_path / 'out', format='stablehlo', preprocessing=p
  )
  image_BHWC = images(p, 1)
  larger = jax.image.resize(image_BHWC / np.float32(255), (3, 16, 16, 1), 'cubic')
  want = run_model(model, params, (larger - 0.3) / np.float32(0.4))
  found = outputs('stablehlo', tmp_path / 'out', image_BHWC)
  np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())


def test_wrong_export_flags_are_refused_and_write_nothing(capsys, trained, tmp_path, monkeypatch):
  workdir, _ = trained
  (tmp_path / 'file').write_text('')
  (tmp_path / 'empty' / 'checkpoints').mkdir(parents=True)
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'README.md').write_text('My own.')
  monkeypatch.setitem(sys.modules, 'jax2onnx', None)
  flags = ['--mode=export', f'--workdir={workdir}', f'--out={tmp_path}/out']
  for argv, message in (
    ([*flags, '--format=onx'], 'Did you mean onnx'),
    ([*flags, '--format=tflite'], 'Valid: hf, npz, onnx, stablehlo, timm'),
    ([*flags, '--format=onnx'], 'pip install --no-deps -r requirements-onnx.txt'),
    ([*flags[:2], '--format=stablehlo'], 'and --out'),
    ([*flags, '--format=stablehlo', f'--out={tmp_path}/file'], 'is a file, not a folder'),
    ([*flags, '--format=stablehlo', f'--out={tmp_path}/mine'], 'already exists'),
    ([*flags, '--format=stablehlo', f'--workdir={tmp_path}/empty'], 'no checkpoint'),
  ):
    assert message in error(capsys, *argv)
  assert not list((tmp_path / 'out').glob('*')) and len(list((tmp_path / 'mine').iterdir())) == 1
  code, out, _ = call(capsys, *flags, '--format=stablehlo')
  assert not code and [pathlib.Path(line).name for line in out.split()] == [
    'README.md', 'model.json', 'model.stablehlo',
  ]  # fmt: skip
  assert not call(capsys, *flags, '--format=stablehlo')[0]  # replaces an earlier export
  assert 'already holds model.stablehlo' in error(capsys, *flags, '--format=timm')
  monkeypatch.setattr(program, 'LIMIT', 2**24)
  assert 'smaller than 2 GiB' in error(capsys, *flags, '--format=stablehlo')


@pytest.fixture(scope='module')
def calibrated(trained, tmp_path_factory):
  """A copy of a run whose last checkpoint has the temperature 2.5, and predictions of its images.

  The predictions are `{class: probability}` for each of the run's example images.
  """
  workdir = shutil.copytree(trained[0], tmp_path_factory.mktemp('calibrated') / 'run')
  save_calibration(workdir, 32, Calibration(2.5, examples=99))
  found = prediction.predict(workdir, [workdir / 'examples'], topk=10)
  rows = [{p['class']: p['probability'] for p in row['predictions']} for row in found]
  return workdir, rows


def opened(workdir):
  """Returns the example images of a run, uint8 `[N, H, W, C]`."""
  exp = opening.from_workdir(workdir)[0]
  files = sorted((workdir / 'examples').iterdir())
  return exp, np.stack([evaluation.read_image(file, exp) for file in files])


def test_predict_divides_the_logits_by_the_temperature(calibrated):
  workdir, rows = calibrated
  exp, image_BHWC = opened(workdir)
  _, params, _ = opening.from_workdir(workdir)
  logits_BL = np.asarray(run_model(exp.model, params, exp.normalize(image_BHWC)), np.float64)
  want_BL = special.softmax(logits_BL / 2.5, axis=1)
  assert np.abs(want_BL - special.softmax(logits_BL, axis=1)).max() > 0.01
  for row, want_L in zip(rows, want_BL):
    np.testing.assert_allclose([row[n] for n in exp.task.class_names], want_L, rtol=1e-4)
  again = prediction.predict(None, [workdir / 'examples'], topk=10, init=str(workdir))
  for row, found in zip(rows, again):
    assert {p['class']: p['probability'] for p in found['predictions']} == pytest.approx(row)


@pytest.mark.parametrize('flags, step', [
    (('--workdir=run',), ''), (('--workdir=run', '--step=last'), 'last'),
    (('--init=run',), 'last'),  # as training starts from the last checkpoint of another run
])  # fmt: skip
def test_an_export_asks_for_the_best_checkpoint_by_default(capsys, monkeypatch, flags, step):
  asked = []
  monkeypatch.setattr('vit_jax.inference.export', lambda *args: asked.append(args[3]) or [])
  code, _, _ = call(capsys, '--mode=export', '--format=npz', '--out=out', *flags)
  assert not code and asked == [step]  # '' chooses the best checkpoint, if one is rated


def test_python_calls_take_numbers_and_refuse_two_models(calibrated):
  workdir, _ = calibrated
  files = [workdir / 'examples']
  by_text, by_number = (list(prediction.predict(workdir, files, step=n)) for n in ('32', 32))
  assert by_number == by_text
  result = evaluation.evaluate(workdir, {'eval_batch_size': 8, 'data.mean': 0.5}, step=32)
  assert result['step'] == 32
  for folder, init in ((workdir, workdir), (None, '')):
    with pytest.raises(ValueError, match='set exactly one of them'):
      prediction.predict(folder, files, init=init)


def test_serve_shows_the_probabilities_of_predict(calibrated):
  page = pytest.importorskip('vit_jax.inference.page', reason='needs requirements-demo.txt')
  workdir, rows = calibrated
  exp, params, _ = opening.from_workdir(workdir)
  viewer = page.Viewer(exp, params)
  for row, file in zip(rows, sorted((workdir / 'examples').iterdir())):
    assert viewer.guesses(viewer.open(file.read_bytes())) == pytest.approx(row, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('format', PROGRAMS)
def test_the_softmax_of_a_program_gives_the_probabilities_of_predict(calibrated, format, tmp_path):
  needs(format)
  workdir, rows = calibrated
  exp, image_BHWC = opened(workdir)
  exporting.export(workdir, format, tmp_path)
  found_BL = special.softmax(outputs(format, tmp_path, image_BHWC), axis=1)
  for row, found_L in zip(rows, found_BL):
    np.testing.assert_allclose(found_L, [row[n] for n in exp.task.class_names], rtol=1e-3)
  about = json.loads((tmp_path / 'model.json').read_text())
  assert about['output']['temperature'] == 2.5
  assert (
    '| temperature | 2.5, fitted on 99 validation images; already applied'
    in (tmp_path / 'README.md').read_text()
  )


def test_weight_formats_keep_the_weights_and_state_the_temperature(calibrated, tmp_path):
  workdir, _ = calibrated
  exporting.export(workdir, 'npz', tmp_path)
  jax.tree.map(
    np.testing.assert_array_equal, vit_jax.load(tmp_path).params, vit_jax.load(workdir).params
  )
  text = (tmp_path / 'README.md').read_text()
  assert '| temperature | 2.5, fitted on 99 validation images; divide the logits by this' in text


@pytest.mark.slow
def test_a_wrong_conversion_is_not_kept(tmp_path, monkeypatch):
  needs('onnx')
  model, params = random_model()
  monkeypatch.setattr(onnx_program, 'TOLERANCE', -1.0)
  with pytest.raises(ValueError, match='logits of the converted and the original model differ'):
    vit_jax.save(model, params, tmp_path, format='onnx')
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_conversion_is_compared_with_logits_in_full_precision(tmp_path, monkeypatch):
  """GPUs and TPUs have less precision by default, so they would refuse a correct conversion."""
  model, params = random_model()
  made = program.Program(model, params, Preprocessing((8, 8)), None)
  for name in ('jax2onnx', 'onnxruntime'):
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(to_onnx=lambda *_, **__: None))
  exact = np.asarray(made.function()(onnx_program.noise(made)))
  monkeypatch.setattr(onnx_program, 'open_onnx', lambda folder: lambda image_BHWC: exact)
  traced, apply = [], type(model).apply

  def watched(*args):
    traced.append(str(jax.make_jaxpr(functools.partial(apply, *args[:-1]))(args[-1])))
    return apply(*args)

  monkeypatch.setattr(type(model), 'apply', watched)
  onnx_program.save_onnx(made, tmp_path)
  (found,) = traced
  products = re.findall(r'= dot_general\[(.*?)\] ', found, re.DOTALL)
  assert products and all('Precision.HIGHEST' in product for product in products)


@pytest.mark.slow
def test_class_names_with_line_breaks_stay_on_one_line(tmp_path, capsys):
  model, params = random_model(pool='cls')
  names = ('a\nb', 'c\r| d', 'é', 'f', 'g')
  loaded = Pretrained(model, params, Preprocessing((8, 8)), names, ())
  text = card.write_card('stablehlo', loaded, 'x\ny.npz')
  assert r'0 a\nb, 1 c\r| d, 2 é' in text and r'`x\ny.npz`' in text
  row = {'file': 'x\n.png', 'predictions': [{'class': 'a\nb', 'probability': 0.5}]}
  prediction.as_table([row])
  assert capsys.readouterr().out == 'x\\n.png\n   50.00%  a\\nb\n'


@pytest.mark.slow
def test_a_model_without_a_class_token_is_refused_with_its_config_key(tmp_path):
  model, params = random_model(pool='gap')
  with pytest.raises(ValueError, match='model.class_token=False: only True can be written'):
    vit_jax.save(model, params, tmp_path, format='hf')


@pytest.mark.parametrize('channels, counts', [(1, '1 value'), (3, '1 or 3 values')])
def test_a_std_of_zero_is_refused(channels, counts):
  config = small_config(**{'data.std': '0'})
  with pytest.raises(ValueError, match=rf'data.std=\(0,\): expected {counts} above 0'):
    experiment.assemble(config, Task(('a', 'b'), (8, 8), channels))
