"""Compares exports in lower precisions with the float32 model, and checks what their cards say."""

import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from tests.conftest import call, error, init_params, run_model, small_config
import vit_jax
from vit_jax import evaluation, opening
from vit_jax.data import open_source
from vit_jax.distributed import portable
from vit_jax.inference import exporting, measuring
from vit_jax.opening import Request
from vit_jax.weights import FORMATS, Preprocessing
from vit_jax.workdir import Calibration

P = Preprocessing((8, 8), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
MODELS = {
  'class token': dict(pool='cls', activation='gelu'),
  'MAP': dict(pool='map', position='rope', num_registers=2, qk_norm=True, layer_scale=0.5),
  'hybrid': dict(resnet=(), resnet_width=32, representation_size=7),
  'cosine': dict(pool='gap', cosine=True),
}


def random_model(**fields):
  """Returns a model, and parameters that are all random."""
  sizes = dict(width=32, depth=2, num_heads=2, mlp_dim=64, patch_size=(4, 4))
  model = vit_jax.make(None, 5, **sizes | fields)
  draw = np.random.RandomState(0).normal
  params = init_params(model, jnp.zeros((1, 8, 8, 3)))
  return model, jax.tree.map(lambda x: np.asarray(x + 0.2 * draw(size=x.shape), np.float32), params)


def images(count=64):
  return np.random.RandomState(1).randint(0, 256, (count, 8, 8, 3), np.uint8)


def logits_of(model, params, image_BHWC):
  pixels = (image_BHWC / 255 - np.array(P.mean)) / np.array(P.std)
  return np.asarray(run_model(model, params, pixels.astype(np.float32)), np.float32)


def needs_onnx():
  pytest.importorskip('jax2onnx', reason='needs requirements-onnx.txt')
  return pytest.importorskip('onnx')


@pytest.mark.slow
@pytest.mark.slow_after_first
@pytest.mark.parametrize('name', MODELS)
def test_a_bfloat16_program_computes_as_the_model_in_bfloat16(name, tmp_path):
  model, params = random_model(**MODELS[name])
  vit_jax.save(model, params, tmp_path, format='stablehlo', preprocessing=P, precision='bfloat16')
  found = FORMATS['stablehlo'].opens(tmp_path)(images())
  exact = logits_of(model, params, images())
  with portable():  # exported programs have the kernels for all devices
    want = logits_of(model.clone(dtype=jnp.bfloat16), params, images())
  error, own = (np.abs(x - exact).mean() for x in (want, found))
  assert found.dtype == np.float32 and error > 1e-4
  # Programs may keep intermediate values in float32, so the results are not equal bit for bit.
  assert np.abs(found - want).mean() < error and own < 1.5 * error
  assert json.loads((tmp_path / 'model.json').read_text())['precision'] == 'bfloat16'


@pytest.mark.slow
def test_a_bfloat16_program_has_half_the_size(tmp_path):
  model, params = random_model(width=256, mlp_dim=1024)
  params, sizes = jax.tree.map(jnp.asarray, params), {}
  for precision in ('float32', 'bfloat16'):
    vit_jax.save(model, params, tmp_path / precision, format='stablehlo', precision=precision)
    sizes[precision] = measuring.folder_size(tmp_path / precision)
  assert sizes['bfloat16'] < 0.53 * sizes['float32']


@pytest.mark.slow
def test_int8_weights_have_7_bits(tmp_path):
  onnx = needs_onnx()
  model, params = random_model(**MODELS['class token'])
  facts = dict(format='onnx', preprocessing=P, precision='int8', images=images())
  vit_jax.save(model, params, tmp_path, **facts)
  tensors = onnx.load(tmp_path / 'model.onnx').graph.initializer
  arrays = [onnx.numpy_helper.to_array(t) for t in tensors if t.data_type == onnx.TensorProto.INT8]
  largest = [np.abs(array.astype(int)).max() for array in arrays if array.ndim > 1]
  # On CPUs without VNNI instructions, the sum of two products must fit into 16 bits.
  assert largest and 60 <= max(largest) <= 64 and 2 * 255 * max(largest) < 2**15


@pytest.mark.slow
@pytest.mark.slow_after_first
@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('precision, most', [('fp16', 0.01), ('int8', 0.15)])
def test_lower_precisions_of_onnx_are_near_the_model(name, precision, most, tmp_path):
  needs_onnx()
  model, params = random_model(**MODELS[name])
  facts = dict(format='onnx', preprocessing=P, precision=precision, images=images())
  vit_jax.save(model, params, tmp_path, **facts)
  want = logits_of(model, params, images())
  run = FORMATS['onnx'].opens(tmp_path)
  for batch in (1, 7, 64):
    found = run(images()[:batch])
    assert found.dtype == np.float32 and found.shape == (batch, 5)
    error = np.abs(found - want[:batch]).max() / np.abs(want).max()
    assert 0 < error < most


@pytest.mark.slow
def test_int8_weights_are_the_rounded_weights_of_each_output(tmp_path):
  onnx = needs_onnx()
  model, params = random_model()
  vit_jax.save(
    model, params, tmp_path, format='onnx', preprocessing=P, precision='int8', images=images()
  )
  graph = onnx.load(tmp_path / 'model.onnx').graph
  arrays = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer}
  found = []
  for node in graph.node:
    if node.op_type == 'DequantizeLinear' and node.input[0] in arrays:
      value, scale, zero = (arrays[name] for name in node.input)
      if value.dtype == np.int8 and value.ndim == 2:
        assert scale.shape == (value.shape[1],) and not zero.any()  # one scale for each output
        found.append((value * scale, scale))
  kernel = params['block_0']['mlp']['up']['kernel']
  (own,) = [item for item in found if item[0].shape == kernel.shape
            and np.abs(item[0] - kernel).max() < 0.05]  # fmt: skip
  assert (np.abs(own[0] - kernel) <= own[1] / 2 + 1e-6).all()
  kinds = [value.dtype for value in arrays.values() if value.ndim == 2 and value.size > 500]
  assert kinds and {*kinds} == {np.dtype(np.int8)}


@pytest.mark.slow
def test_fp16_keeps_layer_norm_in_one_operator(tmp_path):
  """The operator computes its statistics in float32: squares would exceed the range of fp16."""
  onnx = needs_onnx()
  model, params = random_model()
  large = 3000 * np.random.RandomState(2).choice([-1, 1], params['pos_embedding'].shape)
  params = params | {'pos_embedding': large.astype(np.float32)}
  vit_jax.save(model, params, tmp_path, format='onnx', preprocessing=P, precision='fp16')
  nodes = onnx.load(tmp_path / 'model.onnx').graph.node
  norms = [node for node in nodes if node.op_type == 'LayerNormalization']
  assert len(norms) == 2 * model.depth + 1
  kinds = [item.i for node in norms for item in node.attribute if item.name == 'stash_type']
  assert {*kinds} <= {onnx.TensorProto.FLOAT}  # which is also the default
  found = FORMATS['onnx'].opens(tmp_path)(images())
  want = logits_of(model, params, images())
  assert np.abs(found - want).max() < 0.05 * np.abs(want).max()


@pytest.mark.slow
@pytest.mark.parametrize('precision', ['fp16', 'int8'])  # both are converted from float32
def test_onnx_files_are_for_the_documented_version_of_onnxruntime(precision, tmp_path):
  onnx = needs_onnx()
  facts = dict(format='onnx', preprocessing=P, images=images())
  vit_jax.save(*random_model(depth=1), tmp_path, precision=precision, **facts)
  found = onnx.load(tmp_path / 'model.onnx')
  versions = {item.domain: item.version for item in found.opset_import}
  assert versions[''] == 20 and found.ir_version <= 10  # onnxruntime 1.18 reads up to 21 and 10


@pytest.mark.slow
def test_values_beyond_the_range_of_fp16_are_refused(tmp_path):
  needs_onnx()
  model, params = random_model()
  sign_D = np.random.RandomState(2).choice([-1, 1], model.width)
  large = lambda x: np.broadcast_to(6e4 * sign_D, x.shape).astype(np.float32)
  embedding = params['embedding'] | {'bias': large(params['embedding']['bias'])}
  # Each value is within the range, but their sum is not.
  params = params | {'pos_embedding': large(params['pos_embedding']), 'embedding': embedding}
  with pytest.raises(ValueError, match='fp16: the outputs are not finite'):
    vit_jax.save(model, params, tmp_path, format='onnx', preprocessing=P, precision='fp16')
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_smaller_export_replaces_a_larger_one_and_nothing_else(tmp_path):
  needs_onnx()
  model, params = random_model(width=576, depth=1)  # arrays of more than 1 MB
  facts = dict(format='onnx', preprocessing=P, images=images())
  vit_jax.save(model, params, tmp_path, **facts)
  (tmp_path / 'notes.data').write_text('mine')
  assert (tmp_path / 'model.onnx.data').exists()
  want = FORMATS['onnx'].opens(tmp_path)(images())
  vit_jax.save(model, params, tmp_path, precision='int8', **facts)
  assert sorted(file.name for file in tmp_path.iterdir()) == [
    'model.json', 'model.onnx', 'notes.data'
  ]  # fmt: skip
  found = FORMATS['onnx'].opens(tmp_path)(images())
  assert np.corrcoef(found.ravel(), want.ravel())[0, 1] > 0.95


def card(folder):
  """Returns the first table of a card, and its comparison: `{precision: (size, latency, ...)}`."""
  text = (folder / 'README.md').read_text(encoding='utf-8')
  rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in text.splitlines()
          if line.startswith('|')]  # fmt: skip
  return {row[0]: row[1] for row in rows if len(row) == 2}, {
    row[0]: row[1:] for row in rows if len(row) == 4 and row[0] != '---'
  }


def accuracies(format, folder, workdir, split='test'):
  """Returns the accuracy of a program on a split, computed with NumPy."""
  test = evaluation.load_split(opening.open_model(Request(workdir))[0], split)
  return (FORMATS[format].opens(folder)(test.image_NHWC).argmax(axis=1) == test.label_N).mean()


@pytest.mark.slow
@pytest.mark.parametrize(
  'format, precision', [('stablehlo', 'bfloat16'), ('onnx', 'fp16'), ('onnx', 'int8')]
)
def test_the_card_compares_the_export_with_float32(trained, format, precision, tmp_path, capsys):
  if format == 'onnx':
    needs_onnx()
  workdir, result = trained
  out = tmp_path / 'out'
  flags = f'--workdir={workdir}', f'--format={format}', f'--precision={precision}', f'--out={out}'
  code, printed, err = call(capsys, '--mode=export', *flags)
  assert not code, err
  assert f'{out}/model.{format}' in printed and len(printed.split()) == 3
  facts, compared = card(out)
  own = accuracies(format, out, workdir)
  assert list(compared) == ['precision', 'float32', precision]
  assert compared['precision'][-1] == 'accuracy on the 256 images of `test`'
  assert compared['float32'][-1] == f'{result["test_accuracy"]:.2%}'
  measured = float(compared[precision][-1].removesuffix('%')) / 100
  assert measured == pytest.approx(own, abs=1.1 / 256)  # other batches are rounded differently
  assert facts['accuracy'] == f'{measured:.2%} on the 256 images of `test`'
  size = measuring.folder_size(out) - (out / 'README.md').stat().st_size
  assert compared[precision][0] == f'{size / 1e6:,.2f} MB'
  assert all(float(row[1].removesuffix(' ms')) > 0 for row in list(compared.values())[1:])
  calibrated = ', calibrated on 512 images' if precision == 'int8' else ''
  assert facts['precision'] == precision + calibrated
  assert json.loads((out / 'model.json').read_text())['precision'] == precision


@pytest.mark.slow
def test_an_export_without_its_data_says_so(tmp_path, caplog):
  vit_jax.train(small_config(epochs='0'), tmp_path / 'run')
  config = {'data.source': 'folder:/nowhere/photos'}
  exporting.export(tmp_path / 'run', 'stablehlo', tmp_path / 'out', 'last', 'bfloat16', config)
  facts, compared = card(tmp_path / 'out')
  assert facts['accuracy'] == 'unknown' and compared['bfloat16'][-1] == 'unknown'
  assert compared['precision'][-1] == 'accuracy: not measured'  # a card shows no local path
  assert 'nowhere' not in (tmp_path / 'out' / 'README.md').read_text()
  assert 'The accuracy of this export is not measured' in caplog.text


@pytest.mark.slow
def test_a_damaged_test_image_leaves_the_accuracy_of_an_export_unknown(tmp_path, caplog):
  for name in 'abcdefgh':
    for label, value in (('dark', 20), ('light', 220)):
      (tmp_path / 'photos' / label).mkdir(parents=True, exist_ok=True)
      Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(
        tmp_path / 'photos' / label / f'{label}_{name}.png'
      )
  photos = {'data.source': f'folder:{tmp_path / "photos"}', 'data.cache': 'stream'}
  photos |= {'epochs': '0', 'batch_size': '4'}
  vit_jax.train(small_config(**photos), tmp_path / 'run')
  source = opening.open_model(Request(tmp_path / 'run'))[0].config.data.source
  held_out = open_source(source, '', (8, 8)).files['test']
  (held_out.top / held_out.path_N[0].decode()).write_bytes(b'damaged')
  exporting.export(tmp_path / 'run', 'stablehlo', tmp_path / 'out', 'last', 'bfloat16')
  assert card(tmp_path / 'out')[0]['accuracy'] == 'unknown'
  assert 'The accuracy of this export is not measured' in caplog.text


def test_a_program_is_measured_on_a_few_images_at_a_time(trained):
  exp = opening.open_model(Request(trained[0]))[0]
  test, sizes = evaluation.load_split(exp, 'test[:70]'), []

  def run(image_BHWC):
    sizes.append(len(image_BHWC))
    return np.eye(10, dtype=np.float32)[np.zeros(len(image_BHWC), int)]

  assert measuring.measure_quality(exp, run, test) == np.mean(test.label_N == 0)
  assert set(sizes) <= {measuring.PART, 100 % measuring.PART} and sum(sizes) == 100


@pytest.mark.slow
def test_weights_without_a_run_are_compared_without_an_accuracy(tmp_path):
  model, params = random_model()
  vit_jax.save(model, params, tmp_path / 'npz', format='npz', preprocessing=P)
  exporting.export(tmp_path / 'npz', 'stablehlo', tmp_path / 'out', precision='bfloat16')
  assert card(tmp_path / 'out')[1]['bfloat16'][-1] == 'unknown'
  with pytest.raises(ValueError, match='needs sample images.* Set --config.data.source'):
    exporting.export(tmp_path / 'npz', 'onnx', tmp_path / 'new', precision='int8')
  assert not (tmp_path / 'new').exists()


def runs_of(monkeypatch, **seconds):
  """Returns programs that take these seconds for the ten calls of each turn, and their calls."""
  now, calls = [0.0], dict.fromkeys(seconds, 0)
  clock = types.SimpleNamespace(perf_counter=lambda: now[0])
  monkeypatch.setattr(measuring, 'time', clock)

  def run(name, image_BHWC):
    assert image_BHWC.shape == (1, 8, 8, 3)
    now[0] += seconds[name][calls[name] % 10]
    calls[name] += 1

  return {name: functools.partial(run, name) for name in seconds}, calls


def test_the_latency_is_the_median_without_the_first_call_of_a_turn(monkeypatch):
  runs, calls = runs_of(monkeypatch, one=[1] + [0.002] * 5 + [0.009] * 4, other=[1] + [0.01] * 9)
  found = measuring.measure_latency(runs, np.zeros((8, 8, 3), np.uint8))
  assert found == pytest.approx({'one': 0.002, 'other': 0.01})
  assert calls == {'one': 100, 'other': 100}  # ten turns


@pytest.mark.parametrize('seconds, turns', [(0.9, 4), (40, 1)])
def test_slow_programs_get_fewer_turns_but_at_least_one(monkeypatch, seconds, turns):
  runs, calls = runs_of(monkeypatch, one=[seconds] * 10)
  measuring.measure_latency(runs, np.zeros((8, 8, 3), np.uint8))
  assert calls == {'one': 10 * turns}  # no turn begins after 30 seconds


@pytest.mark.parametrize('after, warned', [(0.7, True), (0.795, False), (0.9, False)])
def test_a_loss_of_accuracy_is_warned_about(monkeypatch, tmp_path, caplog, after, warned):
  quality = {'float32': 0.8, 'int8': after}
  monkeypatch.setattr(measuring, 'measure_latency', lambda runs, _: dict.fromkeys(runs, 0.5))
  monkeypatch.setattr(measuring, 'open_test', lambda exp: (None, None))
  monkeypatch.setattr(measuring, 'load_split', lambda *_: range(9))
  monkeypatch.setattr(measuring, 'measure_quality', lambda exp, run, test: run(None)[0, 0])
  folders = {name: tmp_path / name for name in quality}
  for size, folder in enumerate(folders.values(), start=3):
    folder.mkdir()
    (folder / 'model.onnx').write_bytes(bytes(size))
  program = types.SimpleNamespace(image_shape=(8, 8, 3), image_NHWC=images(5), class_names=None)
  exp = types.SimpleNamespace(
    task=types.SimpleNamespace(class_names=('cat', 'dog')),
    config=vit_jax.default_config(),
  )
  found = measuring.compare(
    program, lambda folder: lambda _: np.full((1, 2), quality[folder.name]), folders, exp
  )
  measured = {'float32': measuring.Measured(3, 0.5, 0.8), 'int8': measuring.Measured(4, 0.5, after)}
  assert (found.found, found.test, found.calibrated) == (measured, '9 images of `test`', 5)
  assert ('int8: the accuracy falls from 80.00% to 70.00%.' in caplog.text) == warned


def test_calibration_images_are_spread_over_the_validation_split(tmp_path):
  splits = {'data.train_split': 'train[:400]', 'data.val_split': 'train[400:]'}
  exp = opening.from_config(small_config(**splits))[0]
  found = measuring.calibration_images('run', exp)
  val = evaluation.load_split(exp, 'train[400:]')
  assert len(found) == measuring.CALIBRATION and found.dtype == np.uint8
  assert np.array_equal(found[0], val.image_NHWC[0])
  assert np.array_equal(found[-1], val.image_NHWC[-1])
  exp = opening.from_config(small_config(**{'data.train_split': 'train[:40]'}))[0]
  train = evaluation.load_split(exp, 'train[:40]')
  assert np.array_equal(measuring.calibration_images('run', exp), train.image_NHWC)


@pytest.mark.parametrize('flags, message', [
    (('--format=onnx', '--precision=bfloat16'), "onnx: unknown 'bfloat16'."),
    (('--format=stablehlo', '--precision=int8'), "unknown 'int8'. Valid: bfloat16, float32."),
    (('--format=npz', '--precision=fp16'), "format npz: unknown 'fp16'. Valid: float32."),
    (('--format=onnx', '--config.data.source=digits'), 'an export in float32 reads no images'),
    (('--format=onnx', '--precision=int8', '--config.seed=1'), "config key: unknown 'seed'"),
    (('--format=onnx', '--precision=int8', '--config.data.source=digits'), 'digits have 1.'),
])  # fmt: skip
def test_wrong_precisions_and_keys_are_refused(flags, message, trained, capsys, tmp_path):
  found = error(capsys, '--mode=export', f'--workdir={trained[0]}', f'--out={tmp_path}/x', *flags)
  assert message in found
  assert not (tmp_path / 'x').exists()


def test_save_refuses_wrong_images_and_thresholds(tmp_path):
  model, params = random_model()
  save = lambda **more: vit_jax.save(
    model, params, tmp_path / 'out', format='onnx', preprocessing=P, **more
  )
  expected = r'Expected uint8 \[N, 8, 8, 3\], got '
  with pytest.raises(ValueError, match=f'{expected}none'):
    save(precision='int8')
  with pytest.raises(ValueError, match=rf'{expected}uint8 \[3, 4, 4, 3\]'):
    save(precision='int8', images=np.zeros((3, 4, 4, 3), np.uint8))
  with pytest.raises(ValueError, match=rf'{expected}float32 \[3, 8, 8, 3\]'):
    save(precision='int8', images=np.zeros((3, 8, 8, 3), np.float32))
  with pytest.raises(ValueError, match='got 2 thresholds for 5 classes'):
    save(calibration=Calibration(thresholds=(0.5, 0.5)))
  with pytest.raises(ValueError, match='Expected 5 thresholds, one per class, got 2'):
    evaluation.given_labels(np.zeros(5), (0.5, 0.5))
  assert not (tmp_path / 'out').exists()
