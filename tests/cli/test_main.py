"""The command line runs every mode and gives a clear error for every mistake."""

import csv
import dataclasses
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc

import jax
import numpy as np
from PIL import Image
import pytest

from tests.conftest import ROOT, call, error, small_config
import vit_jax
from vit_jax import bucket, cli, limits, opening, storage
from vit_jax import config as config_lib
from vit_jax.check import check
from vit_jax.cli.flags import STEP, split_paths
from vit_jax.cli.parsing import parse_flags
from vit_jax.data import BadImage, read_file
from vit_jax.evaluation import exact, files, forward
from vit_jax.inference import prediction
from vit_jax.keys import KEYS
from vit_jax.training import trainer
from vit_jax.weights import reader

CONFIG = '--config=configs/digits.py'
MAKE = 'from vit_jax.config import default_config\ndef get_config():\n  config = default_config()\n'


def test_train_starts_from_a_config_and_resumes_from_the_workdir(capsys, tmp_path):
  overrides = [
    '--config.data.source=synthetic',
    '--config.data.image_size',
    '8,8',
    '--config.epochs=0.05',
    '--config.eval_every=0',
    '--config.model.depth=1',
  ]
  code, out, _ = call(capsys, CONFIG, f'--workdir={tmp_path}', *overrides)
  assert not code and 'Test accuracy' in out and str(tmp_path) in out
  code, again, _ = call(capsys, f'--workdir={tmp_path}')
  assert not code and again == out  # the run is finished
  code, out, _ = call(capsys, f'--workdir={tmp_path}', '--config.epochs=0.1')
  assert not code and 'after 6 steps' in out


def test_the_compilation_cache_follows_the_environment(monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', 'mine')
  cli.keep_compiled()
  assert os.environ['JAX_COMPILATION_CACHE_DIR'] == 'mine'
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
  cli.keep_compiled()
  assert os.environ['JAX_COMPILATION_CACHE_DIR'] == str(tmp_path / 'vit_jax' / 'compiled')
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
  monkeypatch.setenv('XDG_CACHE_HOME', '~nobody-has-this-name/cache')
  cli.keep_compiled()
  assert 'JAX_COMPILATION_CACHE_DIR' not in os.environ


def test_a_path_may_start_with_a_tilde_that_names_no_user(capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  error(capsys, '--mode=eval', '--workdir=~nobody-has-this-name')
  assert bucket.to_path('~nobody-has-this-name/a') == pathlib.Path('~nobody-has-this-name/a')


def test_eval_prints_the_accuracy_of_the_run(capsys, trained):
  workdir, result = trained
  code, out, _ = call(capsys, '--mode=eval', f'--workdir={workdir}', '--config.eval_batch_size=7')
  assert not code and 'examples 256' in out and f'accuracy {result["test_accuracy"]:.9g}' in out


@pytest.mark.slow
def test_eval_warns_about_keys_that_only_training_reads(capsys, trained):
  workdir, result = trained
  flags = ['--mode=eval', f'--workdir={workdir}', '--config.data.eval_split=test']
  code, _, err = call(capsys, *flags)
  assert not code and 'no effect' not in err
  keys = {'ema': '0', 'optimizer.lr': '1', 'micro_batches': '7', 'loss.class_weights': 'balanced'}
  code, out, err = call(capsys, *flags, *[f'--config.{key}={text}' for key, text in keys.items()])
  assert not code and f'accuracy {result["test_accuracy"]:.9g}' in out
  assert f'{", ".join(keys)}: no effect here, because only training reads' in err


@pytest.mark.parametrize('flags', [['eval'], ['fewshot'], ['fewshot', '--out=o']])
def test_weights_in_init_need_a_dataset(capsys, trained, flags):
  message = error(capsys, f'--mode={flags[0]}', *flags[1:], f'--init={trained[0]}')
  assert 'needs a dataset' in message and 'Or give a workdir instead of init' in message


def test_a_folder_in_the_place_of_a_file_is_named(capsys, tmp_path):
  (tmp_path / 'log.txt').mkdir()
  message = error(capsys, '--config=configs/digits.py', f'--workdir={tmp_path}')
  assert f'{tmp_path}/log.txt is a folder, but must be a file. Give' in message


def test_a_run_that_starts_from_its_own_workdir_is_refused(capsys, tmp_path):
  own = tmp_path / 'run'
  flags = [f'--workdir={own}', f'--config.init={own}', '--config=configs/digits.py']
  assert 'is the --workdir of this new run' in error(capsys, *flags)
  assert not own.exists()
  own.mkdir()
  (own / 'model.npz').touch()
  assert 'model.npz' in error(capsys, *flags)  # a folder with weights may become a workdir


def test_other_initial_weights_for_a_finished_run_are_refused(capsys, trained):
  message = error(capsys, '--mode=eval', f'--workdir={trained[0]}', '--config.init=other')
  assert '--config.init=other has no effect on the run' in message and 'use --init' in message


@pytest.mark.slow
def test_the_command_of_a_run_that_started_from_weights_also_evaluates_it(trained, tmp_path):
  config = small_config(init=str(trained[0]))
  trainer.train(config, tmp_path)
  request = opening.Request(tmp_path, overrides={'init': str(trained[0])}, config=config)
  assert opening.open_model(request)[2] == 32


@pytest.mark.parametrize('mode', [name for name in cli.MODES if STEP in cli.MODES[name].flags])
def test_each_mode_uses_the_requested_checkpoint(capsys, trained, tmp_path, monkeypatch, mode):
  if mode == 'serve':
    pytest.importorskip('gradio')
  asked = []

  def load(workdir, step='last', **_):
    asked.append(step)
    raise ValueError('enough')

  for module in (opening, reader):
    monkeypatch.setattr(module, 'load_checkpoint', load)
  more = {'predict': [f'--images={trained[0]}/examples'],
          'export': ['--format=npz', f'--out={tmp_path}']}  # fmt: skip
  flags = [f'--mode={mode}', f'--workdir={trained[0]}', *more.get(mode, [])]
  for step in ([], ['--step=16']):
    assert 'enough' in error(capsys, *flags, *step)
  assert asked == ['', '16']


def test_a_missing_checkpoint_is_rejected(capsys, trained):
  flags = ['--mode=eval', f'--workdir={trained[0]}']
  err = error(capsys, *flags, '--step=7')
  assert '--step=7' in err and 'the checkpoints 16, 32' in err
  assert 'has a validation accuracy. Use --step=last' in error(capsys, *flags, '--step=best')
  assert '--step is for eval, fewshot' in error(capsys, f'--workdir={trained[0]}', '--step=16')
  flags = ['--mode=predict', '--init=x.npz', '--images=a.png', '--step=16']
  assert 'cannot be used with --init. Remove --step' in error(capsys, *flags)


def test_predict_prints_the_top_classes_and_names_bad_files(capsys, trained, tmp_path):
  workdir, _ = trained
  Image.new('RGB', (50, 30), 'green').save(tmp_path / 'photo.JPG')
  (tmp_path / 'broken.png').write_bytes(b'no image')
  images = f'{tmp_path}/photo.JPG,{tmp_path}/broken.png,{workdir}/examples,{tmp_path}/absent.png'
  flags = ['--mode=predict', f'--workdir={workdir}', f'--images={images}', '--topk=3']
  code, out, err = call(capsys, *flags, '--format=json')
  rows = [json.loads(line) for line in out.splitlines()]
  assert code == 1 and len(rows) == 11
  assert 'not a readable image' in rows[1]['error'] and 'broken.png' in err
  assert 'No such file' in rows[10]['error']
  for row in rows[:1] + rows[2:10]:
    scores = [p['probability'] for p in row['predictions']]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True) and sum(scores) <= 1.001
  right = sum(
    f'_{r["predictions"][0]["class"].replace(" ", "-")}.' in r['file'] for r in rows[2:10]
  )
  assert right >= 3  # test images with their class in the name; chance: 1 of 10
  code, out, _ = call(capsys, '--mode=predict', f'--workdir={workdir}',
                      f'--images={tmp_path}/photo.JPG')  # fmt: skip
  assert code == 0 and '%  pattern' in out and len(out.splitlines()) == 6


def test_predict_writes_csv_for_a_file_pattern(capsys, trained):
  workdir, _ = trained
  flags = [f'--workdir={workdir}', f'--images={workdir}/examples/*_?*.png', '--topk=2']
  code, out, _ = call(capsys, '--mode=predict', *flags, '--format=csv')
  lines = list(csv.DictReader(io.StringIO(out)))
  assert code == 0 and len(lines) == 2 * 8 and lines[0].keys() == {
    'file', 'rank', 'class', 'probability',
  }  # fmt: skip
  assert [line['rank'] for line in lines[:2]] == ['1', '2']
  assert float(lines[0]['probability']) >= float(lines[1]['probability'])


def test_csv_has_a_line_for_an_image_without_a_label_but_not_for_a_broken_one(capsys):
  found = [
    {'file': 'a.png', 'predictions': []},
    {'file': 'b.png', 'error': 'b.png: broken'},
    {'file': 'c.png', 'predictions': [{'class': 'cat', 'probability': 0.75}]},
  ]
  assert prediction.print_predictions(found, 'csv') == ['b.png: broken']
  lines = capsys.readouterr().out.splitlines()
  assert lines == ['file,rank,class,probability', 'a.png,,,', 'c.png,1,cat,0.75']


def test_a_csv_header_is_printed_only_after_loading_the_weights(capsys, tmp_path):
  flags = [f'--init={tmp_path}', f'--images={tmp_path}/a.png', '--format=csv']
  code, out, _ = call(capsys, '--mode=predict', *flags)
  assert code == 2 and not out


def test_a_rejected_export_creates_no_folder(capsys, tmp_path):
  config = small_config(epochs='0')  # pool gap, which hf does not support
  vit_jax.train(config, tmp_path / 'run')
  flags = [f'--workdir={tmp_path}/run', '--format=hf', f'--out={tmp_path}/out']
  code, _, err = call(capsys, '--mode=export', *flags)
  assert code == 2 and 'cannot hold this model' in err
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('given, message', [
  (PermissionError(13, 'Permission denied', 'runs/x'), 'runs/x: Permission denied. Give this user'),
  (ValueError('Invalid value "two" for JAX flag jax_num_cpu_devices'), 'JAX_NUM_CPU_DEVICES=two '),
])  # fmt: skip
def test_an_error_names_the_remedy(capsys, monkeypatch, given, message):
  def fail(_):
    raise given

  monkeypatch.setenv('JAX_NUM_CPU_DEVICES', 'two')
  monkeypatch.setitem(cli.MODES, 'eval', dataclasses.replace(cli.MODES['eval'], run=fail))
  assert message in error(capsys, '--mode=eval', '--workdir=x')


def test_existing_paths_may_contain_commas(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'a,b.png').touch()
  assert split_paths('a,b.png') == ['a,b.png'] and split_paths('a, c.png,') == ['a', 'c.png']
  assert len(split_paths(','.join(['x.png'] * 100))) == 100  # longer than the longest file name
  assert split_paths('') == split_paths(' , ') == []
  monkeypatch.setenv('HOME', str(tmp_path))
  assert split_paths('~/a,b.png') == ['~/a,b.png'] and split_paths('~/c,d.png') == ['~/c', 'd.png']


def test_a_pipe_is_not_an_image(tmp_path):
  os.mkfifo(tmp_path / 'a.png')
  assert files.find_images([f'{tmp_path}/a.png']) == [tmp_path / 'a.png']
  with pytest.raises(BadImage, match='a.png: not a regular file'):
    read_file(tmp_path / 'a.png')


def test_a_folder_with_an_image_suffix_is_not_an_image(tmp_path):
  (tmp_path / 'a.png').mkdir()
  (tmp_path / 'a.png' / 'b.png').touch()
  assert files.find_images([str(tmp_path)]) == files.find_images([f'{tmp_path}/**/*.png'])
  assert files.find_images([str(tmp_path)]) == [tmp_path / 'a.png' / 'b.png']


@pytest.mark.slow_after_first
@pytest.mark.parametrize('kind', ['pooled', 'tokens'])
def test_features_are_written_for_all_readable_images(capsys, trained, tmp_path, kind, monkeypatch):
  monkeypatch.setattr(forward, 'BATCH', 3)  # several batches, the last one incomplete
  workdir, _ = trained
  (tmp_path / 'broken.png').write_bytes(b'no image')
  first = min((workdir / 'examples').iterdir())
  images = f'--images={first},{tmp_path}/broken.png,{workdir}/examples'
  flags = ['--mode=predict', f'--workdir={workdir}', images, f'--features={kind}']
  code, out, err = call(capsys, *flags, f'--out={tmp_path}/new/f.npz')
  arrays = np.load(tmp_path / 'new' / 'f.npz')
  shape = (9, 16) if kind == 'pooled' else (9, 4, 16)
  assert code == 1 and str(list(shape)) in out and 'broken.png' in err
  assert arrays['feature'].shape == shape and arrays['feature'].dtype == np.float32

  exp, params, _ = opening.from_workdir(workdir)
  files = [first, *sorted((workdir / 'examples').iterdir())]  # a file given twice appears twice
  assert list(arrays['path']) == [str(file) for file in files]
  image_BHWC = np.stack([np.asarray(Image.open(file)) for file in files])
  feature = arrays['feature'] if kind == 'pooled' else arrays['feature'].mean(axis=1)  # gap
  logits = feature @ params['head']['kernel'] + params['head']['bias']
  np.testing.assert_allclose(logits, exp.logits(params, {'image': image_BHWC}), atol=1e-5)


def test_features_are_stored_only_once_in_memory():
  rows = ((i, np.full(2**17, i, np.float32)) for i in range(20))
  tracemalloc.start()
  try:
    arrays, _ = prediction.stack(rows, 20)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert (arrays['feature'][:, 0] == range(20)).all()
  assert arrays['feature'].nbytes < peak < 1.2 * arrays['feature'].nbytes


@pytest.mark.parametrize('argv, message', [
    (['--mode=evaluate', '--workdir=x'], 'Did you mean eval'),
    ([CONFIG], '--workdir'),
    (['--workdir=x'], 'set --config'),
    (['--config=configs/digit.py', '--workdir=x'], 'Did you mean configs/digits.py'),
    (['--config=configs/cifar10.py:tinny', '--workdir=x'], 'Did you mean tiny'),
    (['--config=configs/digits.py:tiny', '--workdir=x'], 'takes no argument'),
    ([CONFIG, '--workdir=x', '--config.batchsize=3'], 'Did you mean batch_size'),
    ([CONFIG, '--workdir=x', '--config.variant=3'], 'Did you mean model.variant'),
    ([CONFIG, '--workdir=x', '--config.batch_size=many'], "'many', expected int"),
    ([CONFIG, '--workdir=x', '--config.data.image_size=big'], 'expected tuple, e.g. 32,32'),
    ([CONFIG, '--workdir=x', '--config.model.variant=Q/16'], 'Valid: B, G, H, L, R+Ti'),
    ([CONFIG, '--workdir=x', '--config.optimizer.name=adamv'], 'Did you mean adamw'),
    ([CONFIG, '--workdir=x', '--config.data.source=digit'], 'Did you mean digits'),
    ([CONFIG, '--workdir=x', '--config.epochs=-1'], 'epochs'),
    ([CONFIG, '--workdir=x', '--config.optimizer.lr=nan'], 'optimizer.lr must be a number'),
    ([CONFIG, '--workdir=x', '--config.model.layer_scale=nan'], 'model.layer_scale must be a'),
    ([CONFIG, '--workdir=x', '--config.ema=0.99999999'], 'from 0 to 0.9999999, got 0.99999999'),
    ([CONFIG, '--workdir=x', '--config.model.num_heads=5'], 'not divisible by model.num_heads=5'),
    ([CONFIG, '--workdir=x', '--config.model.patch_size=3'], '8x8 pixels'),
    (['--mode=eval', '--workdir=nowhere'], 'no checkpoint, because there is no such folder'),
    (['--mode=predict', '--workdir=nowhere', '--images=x.png'], 'no checkpoint'),
    (['--mode=predict', '--workdir=nowhere'], '--images'),
    (['--mode=predict', '--workdir=w', '--images=a', '--features=pooled'], 'needs --out'),
    (['--mode=predict', '--workdir=w', '--images=*.gone'], '*.gone: no image matches'),
    (['--mode=visualize', '--workdir=nowhere'], 'no metrics.jsonl and no checkpoint'),
    (['--mode=visualize', '--workdir=nowhere', '--images=x.png'], 'no checkpoint'),
    (['--mode=visualize', '--init=x.npz', '--images=x.png'], 'needs --out'),
    (['--mode=visualize', '--init=x.npz', '--out=nowhere'], 'Set --images'),
    (['--config=gs://bucket/digits.py', '--workdir=x'], 'must be a path on this machine'),
    ([CONFIG, '--workdir=x', '--config.data.source=folder:s3://bucket/x'], 'URLs of this'),
    ([CONFIG, '--workdir=x', '--config.data.source=folder:x', '--config.data.dir=s3://bucket'],
     's3://bucket: URLs'),
    ([CONFIG, '--workdir=x', '--config.data.source=tfds:mnist', '--config.data.dir=hdfs://bucket'],
     'hdfs://bucket: URLs'),
    (['--mode=predict', '--workdir=w', '--images=s3://a/b.png,b.png'], 's3://a/b.png is a URL'),
    (['--mode=inspect', '--init=/dev/null'], '/dev/null: expected an .npz file, a .safetensors'),
    (['--mode=export', '--init=https://host/x.npz', '--format=hf', '--out=x'], 'https://host'),
    (['--mode=inspect', '--workdir=s3://bucket/run'], 's3://bucket/run: URLs'),
    (['--mode=export', '--init=x.npz', '--format=hf', '--out=s3://bucket/run'], 'URLs'),
])  # fmt: skip
def test_mistakes_are_rejected_before_anything_is_written(capsys, argv, message, tmp_path):
  argv = [re.sub(r'--workdir=(?!.*:)', f'--workdir={tmp_path}/', a) for a in argv]
  assert message in error(capsys, *argv)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('kind', [str, pathlib.Path])
def test_a_url_is_rejected_as_workdir(tmp_path, monkeypatch, kind):
  monkeypatch.chdir(tmp_path)
  for train in (vit_jax.train, trainer.train):
    with pytest.raises(ValueError, match='URLs of this kind are not supported'):
      train(small_config(), kind('s3://bucket/run'))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('text, message', [
  ('def get_config(:', 'line 1: SyntaxError'),
  ('\nimport nothing_of_the_kind', 'line 2: ModuleNotFoundError'),
  ('x = 1', 'defines no function get_config'),
  ('def get_config(): pass', 'must return a ConfigDict'),
  (MAKE + '  config.model.widht = 3\n  return config',
   'broken.py, line 4: widht: unknown key. Did you mean model.width'),
  (MAKE + '  config.update(epoch=3)\n  return config', 'line 4: epoch: unknown key'),
  (MAKE + '  config.lr = config.optimiser.lr\n', 'line 4: optimiser: unknown key'),
  (MAKE + '  config.epochs = float("all")\n', "line 4: could not convert string to float: 'all'"),
  (MAKE + "  raise KeyError('epoch')", "line 4: KeyError: 'epoch'"),
  (MAKE + "  config.unlock()\n  config.epoch = 3\n  return config", 'Did you mean epochs'),
  (MAKE + '  import sys; sys.exit(0)', 'line 4: SystemExit: 0'),
  (MAKE + '  config.model = None\n  return config',
   'sets model to None, but model is a section. Set the keys of the section instead, e.g. '
   'model.variant'),
  (MAKE + '  config.ema = None\n  return config', 'ema must not be None. Its default is 0'),
  (MAKE + '  config.init = None\n  return config', 'init must not be None'),
  (MAKE + '  config.epochs = "3"\n  return config', 'TypeError'),
])  # fmt: skip
def test_broken_config_files_are_reported_with_their_line(capsys, text, message, tmp_path):
  (tmp_path / 'broken.py').write_text(text)
  said = error(capsys, f'--config={tmp_path}/broken.py', f'--workdir={tmp_path}/run')
  assert message in said and len(said) < 400


def test_a_config_file_in_the_home_folder_is_found(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'mine.py').write_text(MAKE + '  config.epochs = 7\n  return config')
  assert cli.load_file('~/mine.py').epochs == 7


def test_config_overrides_accept_the_syntax_of_absl():
  words = ['--config.deterministic', '--noconfig.data.stretch', '--config.model.qk_norm', 'f']
  words += ['--config.batch_size=1e2', '--config.init=', '--config.model.remat=a=b']
  overrides = parse_flags(words, 'train').overrides
  assert overrides == {
    'deterministic': 'true', 'data.stretch': 'false', 'model.qk_norm': 'f', 'batch_size': '1e2',
    'init': '', 'model.remat': 'a=b',
  }  # fmt: skip
  config = config_lib.override_all(config_lib.default_config(), overrides)
  assert (config.deterministic, config.data.stretch, config.model.qk_norm) == (True, False, False)
  assert config.batch_size == 100 and type(config.batch_size) is int


def test_a_negative_value_may_follow_its_key():
  overrides = parse_flags(['--config.mesh.data', '-1', '--config.epochs=2'], 'train').overrides
  assert overrides == {'mesh.data': '-1', 'epochs': '2'}


@pytest.mark.parametrize('argv, message', [
    (['--config.batch_size'], '--config.batch_size needs a value'),
    (['--config.epohcs', '--topk=3'], '--config.epohcs needs a value'),
    (['--noconfig.batch_size'], 'takes no value, and works only for keys that are true or false'),
    (['--noconfig.deterministic=true'], 'takes no value, and works only for keys'),
])  # fmt: skip
def test_config_overrides_without_a_value_are_rejected(capsys, argv, message):
  with pytest.raises(SystemExit, match='2'):
    cli.main(argv)
  assert message in capsys.readouterr().err


@pytest.mark.parametrize('text', ['1.5', 'nan', 'inf', '1e400'])
def test_an_int_key_rejects_fractions_and_infinity(text):
  with pytest.raises(ValueError, match='expected int'):
    config_lib.override(config_lib.default_config(), 'batch_size', text)


def test_keys_that_decide_the_result_may_not_change_when_a_run_resumes():
  parts = ('optimizer', 'schedule', 'augment', 'loss', 'distill', 'lora', 'masked', 'progressive')
  fixed = {name for name in KEYS if name.partition('.')[0] in parts}
  fixed |= {'seed', 'init', 'batch_size', 'ema', 'freeze', 'data.source', 'data.train_split'}
  fixed |= {name for name in KEYS if name.startswith('model.')} - {'model.remat', 'model.attention'}
  assert fixed <= KEYS.keys() and [name for name in fixed if KEYS[name].may_change] == []


def test_memory_keys_may_change_when_a_run_resumes():
  given = small_config(micro_batches='4', **{'model.remat': 'full'})
  config_lib.check_same_run(small_config(), given, 'run')  # as running out of memory advises
  with pytest.raises(ValueError, match="dtype: 'float32' in the workdir, 'bfloat16' given"):
    config_lib.check_same_run(small_config(), small_config(**{'model.dtype': 'bfloat16'}), 'run')


@pytest.mark.parametrize('axis', ['data', 'fsdp', 'tensor'])
@pytest.mark.parametrize('size', ['0', '-2'])
def test_a_mesh_axis_without_devices_is_refused(axis, size):
  with pytest.raises(ValueError, match=f'a positive number of devices or -1.*{axis}.: {size}'):
    check(small_config(**{f'mesh.{axis}': size}))


def test_flags_of_other_modes_and_other_configs_are_rejected(capsys, trained):
  workdir, _ = trained
  assert 'a different config' in error(capsys, '--mode=eval', CONFIG, f'--workdir={workdir}')
  assert '--config is for train' in error(capsys, '--mode=export', CONFIG, f'--workdir={workdir}')
  assert 'a different config' in error(capsys, '--mode=visualize', CONFIG, f'--workdir={workdir}')
  assert '--workdir is required' in error(capsys, CONFIG, '--workdir=')
  assert 'Or give --init: weights' in error(capsys, '--mode=predict', '--images=x')
  for bad in ('0', '-5'):
    flags = ['--mode=eval', f'--workdir={workdir}', f'--config.eval_batch_size={bad}']
    assert 'eval_batch_size must be from 1' in error(capsys, *flags)


@pytest.mark.parametrize('argv, message', [
    (['--images=a.png'], '--images is for predict, visualize, not for --mode=train'),
    (['--images=x='], '--images is for predict, visualize, not for --mode=train'),
    (['--mode=export', CONFIG], '--config is for train'),
    (['--mode=eval', '--topk', '3'], '--topk is for predict, not'),
    (['--mode=predict', '--images=a.png', '--port=7860'], '--port is for serve'),
    (['--mode=inspect', '--out=x'], '--out is for fewshot, predict, visualize, export'),
    (['--mode=visualize', '--format=csv'], '--format is for predict, export'),
    (['--mode=predict', '--images=a.png', '--out=x', '--format=csv'], '--out is for --features'),
    (['--mode=predict', '--images=a.png', '--out=x.npz', '--features=tokens', '--topk=5'],
     'cannot be combined with --format, --topk or --classes'),
    (['--mode=visualize', '--images=,'], '--images is empty'),
    (['--mode=predict', '--images=,'], '--images is empty'),
])  # fmt: skip
def test_flags_without_an_effect_are_rejected(capsys, trained, argv, message):
  assert message in error(capsys, f'--workdir={trained[0]}', *argv)


def test_flags_without_a_value_count_as_not_given():
  args = parse_flags(['--init=', '--step=', '--out=', '--workdir=runs'], 'train')
  assert args.given == {'--workdir'} and args.init == args.step == '' and args.out is None


@pytest.mark.parametrize('argv, inside', [
    (['--mode=predict', '--images=a.png', '--features=pooled'], 'f.npz'),
    (['--mode=visualize'], ''),
    (['--mode=export', '--format=npz'], ''),
])  # fmt: skip
def test_an_output_path_that_is_not_writable_is_rejected_first(
  capsys, tmp_path, argv, inside, monkeypatch
):
  argv = [*argv, f'--workdir={tmp_path}/nowhere']  # does not exist; checked later
  (tmp_path / 'file').touch()
  for place in ('file', 'file/in/it'):
    err = error(capsys, *argv, f'--out={tmp_path / place / inside}')
    assert f'{tmp_path}/file is a file, not a folder' in err and 'Errno' not in err
  monkeypatch.setattr(storage.os, 'access', lambda path, _: path != tmp_path)
  err = error(capsys, *argv, f'--out={tmp_path / "new" / "deep" / inside}')
  assert f'{tmp_path} is read-only' in err and not (tmp_path / 'new').exists()
  assert 'is a file, not a folder' in error(capsys, CONFIG, f'--workdir={tmp_path}/file/run')


@pytest.mark.parametrize('given, message', [
    (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9000000000 bytes.'),
     'Evaluation ran out of memory (Out of memory allocating 9.0 GB). Set a smaller eval_batch'),
    (MemoryError('Unable to allocate 7 GiB'), '(Unable to allocate 7 GiB)'),
    (MemoryError(), 'Evaluation ran out of memory'),
    (RuntimeError("can't start new thread"), 'Evaluation cannot start more threads. Raise'),
])  # fmt: skip
def test_out_of_memory_in_evaluation_names_the_keys_to_change(
  capsys, trained, monkeypatch, given, message
):
  def fail(*_):
    raise given

  monkeypatch.setattr(exact, 'make_eval_step', lambda *_: fail)
  code, _, err = call(capsys, '--mode=eval', f'--workdir={trained[0]}')
  assert code == 2 and message in err


def test_the_inner_activity_explains_why_memory_ran_out():
  with (
    pytest.raises(limits.OutOfMemory, match=r'^Evaluation ran out of memory \(7 GiB\). Set a'),
    limits.memory_for('--mode=train'),
    limits.memory_for('Evaluation'),
  ):
    raise MemoryError('7 GiB')
  with pytest.raises(RuntimeError, match='^another error$'), limits.memory_for('Evaluation'):
    raise RuntimeError('another error')


@pytest.mark.slow
def test_out_of_memory_in_training_names_the_keys_to_change(capsys, tmp_path):
  flags = ['data.image_size=512', 'model.patch_size=1', 'model.depth=1', 'model.width=8']
  flags = [f'--config.{flag}' for flag in (*flags, 'model.num_heads=1', 'model.mlp_dim=8')]
  code, _, err = call(
    capsys, CONFIG, f'--workdir={tmp_path}', *flags
  )  # attention would need a terabyte
  assert code == 2 and re.search(r'error: Training ran out of memory \(.* GB\)', err)
  assert all(key in err for key in ('batch_size', 'micro_batches', 'model.remat', 'image_size'))


def test_event_loops_that_fail_to_open_are_silent():
  script = (
    'import asyncio, resource; from vit_jax.cli import terminal\n'
    'terminal.set_up()\n'
    'async def work(): pass\n'
    'resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n'
    'try: asyncio.run(work())\n'
    'except OSError as error: print(error.strerror)'
  )
  command = [sys.executable, '-c', script]
  ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
  assert (ended.stdout, ended.stderr) == ('Too many open files\n', '')


def test_ctrl_c_exits_with_130_and_explains_how_to_resume(capsys, monkeypatch, trained, tmp_path):
  def stop(*_):
    raise KeyboardInterrupt

  for mode in ('train', 'eval'):
    monkeypatch.setitem(cli.MODES, mode, dataclasses.replace(cli.MODES[mode], run=stop))
    code, _, err = call(capsys, f'--mode={mode}', f'--workdir={trained[0]}')
    assert code == 130 and ('resumes from step 32.' in err) == (mode == 'train')
  assert 'Nothing was saved yet' in call(capsys, '--workdir=x')[2]
  (tmp_path / 'sweep').mkdir()
  assert 'continues to compare the learning rates' in call(capsys, f'--workdir={tmp_path}')[2]


def test_a_second_ctrl_c_exits_immediately():
  script = (
    'import atexit, runpy, sys, time, vit_jax.evaluation as evaluation\n'
    'wait = lambda word: (print(word, flush=True), time.sleep(60))\n'
    'evaluation.evaluate_checkpoint = lambda *_: wait("running")\n'
    'atexit.register(wait, "ending")\n'  # like orbax while it writes
    'sys.argv = ["main.py", "--mode=eval", "--workdir=x"]\n'
    'runpy.run_path("main.py", run_name="__main__")'
  )
  command = [sys.executable, '-c', script]
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
  process = subprocess.Popen(command, **pipes, cwd=ROOT)
  for line in (b'running\n', b'ending\n'):
    assert process.stdout.readline() == line
    process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=30)
  assert process.returncode == 130 and err.startswith(b'Interrupted') and b'Traceback' not in err


def test_ctrl_c_during_garbage_collection_is_not_lost():
  script = (
    'import signal, time\n'
    'from vit_jax.cli import terminal\n'
    'class Garbage:\n'
    '  def __del__(self):\n'
    '    signal.raise_signal(signal.SIGINT)\n'
    'terminal.set_up()\n'
    'try:\n'
    '  Garbage()\n'
    '  time.sleep(30)\n'
    'except KeyboardInterrupt:\n'
    '  print("interrupted")\n'
  )
  done = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, timeout=20)
  assert (done.returncode, done.stdout, done.stderr) == (0, b'interrupted\n', b'')


@pytest.mark.slow
@pytest.mark.parametrize('begun', [False, True])
def test_a_missing_device_is_named(trained, tmp_path, begun):
  if begun:
    shutil.copytree(trained[0] / 'checkpoints', tmp_path / 'run' / 'checkpoints')
  flags = [f'--workdir={tmp_path}/run', *([] if begun else [CONFIG])]
  command = [sys.executable, 'main.py', *flags]
  environment = os.environ | {'JAX_PLATFORMS': 'cuda'}
  ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
  if ended.returncode == 0:
    pytest.skip('there is a GPU')
  assert ended.returncode == 2 and 'Traceback' not in ended.stderr
  assert 'error: JAX_PLATFORMS=cuda: JAX finds no such device here' in ended.stderr
  assert 'damaged' not in ended.stderr and not (tmp_path / 'run' / 'damaged').exists()


def test_characters_that_the_terminal_lacks_are_escaped(tmp_path):
  letters = 'K\u00e4fer \u732b'
  script = (
    'import runpy, sys; from vit_jax import inference\n'
    f'inference.summary_of, inference.as_text = lambda *_: None, lambda _: {letters!a}\n'
    'sys.argv = ["main.py", "--mode=inspect"]\n'
    'runpy.run_path("main.py", run_name="__main__")'
  )
  environment = os.environ | {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
  ended = subprocess.run(
    [sys.executable, '-c', script], capture_output=True, text=True, env=environment, cwd=ROOT
  )
  assert ended.stdout == 'K\\xe4fer \\u732b\n', ended.stderr


def test_closed_streams_become_the_null_device(tmp_path):
  script = (
    'import os, pathlib, sys; from vit_jax import cli\n'
    'def mode(_):\n'
    '  number = os.open("kept", os.O_WRONLY | os.O_CREAT)\n'
    '  os.write(1, b"library output")\n'
    '  text = sys.stdin.read(), sys.stdout.isatty(), sys.stderr.isatty(), number > 2\n'
    '  pathlib.Path("found").write_text(repr(text))\n'
    'cli.MODES["mine"] = cli.Mode("", "", (), mode)\n'
    'sys.argv = ["main.py", "--mode=mine"]\n'
    'cli.start()'
  )
  command = [sys.executable, '-c', script]
  closed = subprocess.run(
    ['bash', '-c', '"$@" <&- >&- 2>&-', '-', *command],
    cwd=tmp_path,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
  )
  assert closed.returncode == 0
  assert (tmp_path / 'found').read_text() == "('', False, False, True)"
  assert (tmp_path / 'kept').read_text() == ''


@pytest.mark.slow_after_first
@pytest.mark.parametrize('where, code, said', [
  ('>&-', 0, ''),
  ('>/dev/full', 2, 'error: Cannot write to standard output (No space left on device). Free'),
])  # fmt: skip
def test_unwritable_output_gives_at_most_one_clear_error(where, code, said):
  script = (
    'from vit_jax import cli; import sys\n'
    'many = lambda _: [print("line", sys.stdout.isatty()) for _ in range(2)] and 0\n'
    'cli.MODES["many"] = cli.Mode("", "", (), many)\n'
    'sys.argv = ["main.py", "--mode=many"]; cli.start()'
  )
  command = f"{sys.executable} -c '{script}' {where}"
  ended = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
  assert ended.returncode == code and ended.stderr.startswith(said)
  assert len(ended.stderr.splitlines()) == bool(said)


@pytest.mark.slow_after_first
@pytest.mark.parametrize('flush', [True, False])
def test_a_closed_output_pipe_ends_quietly(flush):
  script = (
    'import sys\nfrom vit_jax import cli\n'
    f'many = lambda _: [print("line", flush={flush}) for _ in range(50_000)] and 0\n'
    'cli.MODES["many"] = cli.Mode("", "", (), many)\n'
    'sys.exit(cli.main(["--mode=many"]))'
  )
  process = subprocess.Popen(
    [sys.executable, '-c', script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
  )
  assert process.stdout.readline() == b'line\n'
  process.stdout.close()
  assert process.stderr.read() == b'' and process.wait() == 141


def test_an_unknown_flag_is_rejected(capsys):
  with pytest.raises(SystemExit, match='2'):
    cli.main(['--confg=x'])
  assert 'unknown argument --confg' in capsys.readouterr().err


def test_an_override_that_contradicts_the_checkpoint_is_rejected(capsys, trained):
  workdir, _ = trained
  err = error(capsys, '--mode=eval', f'--workdir={workdir}', '--config.model.depth=3')
  assert 'block_2/attention/key/bias: missing in the weights' in err
  err = error(capsys, '--mode=eval', f'--workdir={workdir}', '--config.data.source=digits')
  assert 'the model has 10 classes (pattern 0' in err


def test_a_config_survives_a_json_round_trip():
  config = small_config(**{'model.patch_size': '4,2', 'model.layer_scale': '1'})
  again = config_lib.from_dict(json.loads(json.dumps(config_lib.to_dict(config))))
  assert config_lib.flatten(again) == config_lib.flatten(config)
  assert again.model.patch_size == (4, 2) and isinstance(again.data.image_size, tuple)
  config_lib.override(again, 'model.layer_scale', 'none')
  assert again.model.layer_scale is None


def test_none_is_a_valid_name_and_not_a_missing_value():
  config = config_lib.override_all(
    config_lib.default_config(), {'model.position': 'none', 'model.depth': 'none'}
  )
  assert config.model.position == 'none' and config.model.depth is None
  assert config_lib.override_all(config, {'model.position': 'None'}).model.position is None


def test_fill_copies_the_config():
  config = config_lib.default_config()
  filled = config_lib.fill(config, {'model.depth': 3, 'data.mean': (0.1,), 'optimizer.lr': 9.0})
  assert (filled.model.depth, filled.data.mean, filled.optimizer.lr) == (3, (0.1,), 1e-3)
  assert config.model.depth is None and config.data.mean is None


def test_renamed_keys_are_translated(monkeypatch):
  monkeypatch.setitem(config_lib.RENAMED, 'model.registers', 'model.num_registers')
  monkeypatch.setitem(config_lib.RENAMED, 'rate', 'optimizer.lr')
  saved = config_lib.to_dict(small_config(**{'model.registers': '3', 'rate': '0.5'}))
  saved['model']['registers'] = saved['model'].pop('num_registers')
  saved['rate'] = saved['optimizer'].pop('lr')
  config = config_lib.from_dict(saved)
  assert config.model.num_registers == 3 and config.optimizer.lr == 0.5
  assert 'registers' not in config.model and 'rate' not in config


def test_a_config_of_an_older_version_loads():
  saved = config_lib.to_dict(small_config())
  del saved['augment']
  assert config_lib.from_dict(saved).augment.flip.probability == 0.0
  with pytest.raises(ValueError, match='lacks: model.flux'):
    config_lib.from_dict({'model': {'flux': 1}})
