"""Checks that evaluation never counts training images, even if the folder was changed."""

import json
import logging
import shutil
import zlib

import numpy as np
from PIL import Image
import pytest

from tests.conftest import small_config
from vit_jax import cli, evaluation, opening
from vit_jax.data import num_examples, sources, splits
from vit_jax.evaluation import data, exact, few_shot
from vit_jax.figures import subject as subject_lib
from vit_jax.training import trainer
from vit_jax.workdir import stored, trained

CLASSES = 'ant', 'cat'


def make_images(folder, names):
  """Saves an image of noise for each name."""
  folder.mkdir(parents=True, exist_ok=True)
  for name in names:
    draw = np.random.RandomState(zlib.crc32(f'{folder.name}/{name}'.encode()))
    Image.fromarray(draw.randint(0, 256, (8, 8, 3)).astype(np.uint8)).save(folder / f'{name}.png')


def config_of(folder, **overrides):
  """Returns the config of a run of a few steps on a folder."""
  settings = {'data.source': f'folder:{folder}', 'epochs': '2', 'batch_size': '16'}
  return small_config(**settings | {'eval_every': '0', 'checkpoint_every': '2'} | overrides)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """(folder, workdir) of a run on a plain folder."""
  root = tmp_path_factory.mktemp('trained')
  for name in CLASSES:
    make_images(root / 'photos' / name, [f'{name}{i}' for i in range(30)])
  trainer.train(config_of(root / 'photos'), root / 'run')
  return root / 'photos', root / 'run'


@pytest.fixture
def rearranged(run, tmp_path):
  """Copy of the images, split by hand: test/ has 7 training images and 3 new ones."""
  files = files_of(run[0], 'train')
  for i, file in enumerate(files):
    split = 'test' if i < 7 else 'train'
    (tmp_path / split / file.parent.name).mkdir(parents=True, exist_ok=True)
    shutil.copy(file, tmp_path / split / file.parent.name / file.name)
  make_images(tmp_path / 'test' / 'cat', ['new1', 'new2', 'new3'])
  return tmp_path


def files_of(folder, split):
  source = sources.open_source(f'folder:{folder}', '', (8, 8))
  return [file for _, file, _ in source.read(split, range(source.sizes[split]))]


def test_a_checkpoint_keeps_the_names_of_training_files(run):
  photos, workdir = run
  names = trained.training_files_of(workdir)
  wanted = [splits.hash_name(file.name) for file in files_of(photos, 'train')]
  np.testing.assert_array_equal(names.own_N, np.array(sorted(wanted), np.uint64))
  assert names.own_N.dtype == np.uint64 and not len(names.inherited_N)


@pytest.mark.slow_after_first
@pytest.mark.parametrize('cache', ['memory', 'stream'])
def test_training_images_are_left_out_of_the_test(run, rearranged, cache, caplog):
  flags = {'data.source': f'folder:{rearranged}', 'data.cache': cache}
  with caplog.at_level(logging.WARNING):
    result = exact.evaluate(run[1], flags)
  assert result['examples'] == 3 and result['left_out'] == 7
  assert 'test: 7 of 10 images are left out, because the weights were trained' in caplog.text
  source = evaluation.open_test(opening.from_workdir(run[1], flags)[0])[0]
  assert 'left_out' not in exact.evaluate(run[1], {})
  parts = [source.read(name, range(start, stop)) for name, start, stop in source.pieces('test')]
  names = {file.name for part in parts for _, file, _ in part}
  assert names == {'new1.png', 'new2.png', 'new3.png'}


def test_split_with_only_training_images_is_refused(run, capsys):
  flags = ['--mode=eval', f'--workdir={run[1]}', '--config.data.eval_split=train']
  assert cli.main(flags) == 2
  assert "error: Split 'train': the weights were trained on" in capsys.readouterr().err


SCORE = [
  lambda workdir, flags: exact.evaluate(workdir, flags),
  lambda workdir, flags: few_shot.fewshot(opening.Request(workdir, overrides=flags)),
  lambda workdir, flags: subject_lib.collect(opening.Request(workdir, overrides=flags), None),
  lambda workdir, flags: few_shot.fewshot(opening.Request(init=str(workdir), overrides=flags)),
]


@pytest.mark.parametrize('score', SCORE)
@pytest.mark.parametrize('split', ['train[:10%]', 'test+train[-1:]'])
def test_training_split_of_a_source_without_files_is_refused(request, score, split):
  workdir = request.getfixturevalue('trained')[0]
  flags = {'data.eval_split': split, 'data.train_split': 'train[20%:25%]', 'data.dir': 'moved'}
  flags |= {'data.source': 'synthetic', 'data.image_size': '8'}
  with pytest.raises(ValueError, match="shares examples with 'train' of synthetic. The weights"):
    score(workdir, flags)


def test_few_shot_refuses_to_test_on_its_shots(request):
  workdir = request.getfixturevalue('trained')[0]
  with pytest.raises(ValueError, match='training images would be used for testing'):
    few_shot.fewshot(opening.Request(workdir, overrides={'data.train_split': 'test[:90%]'}))


@pytest.mark.slow
def test_a_run_inherits_the_splits_of_its_init(request, tmp_path):
  workdir = request.getfixturevalue('trained')[0]
  parts = {'data.train_split': 'train[:50%]', 'data.eval_split': 'train[50%:]', 'epochs': '0'}
  with pytest.raises(ValueError, match="shares examples with 'train' of synthetic"):
    trainer.train(small_config(init=str(workdir), **parts), tmp_path / 'next')
  config = small_config(init=str(workdir), **parts | {'data.eval_split': 'test[:50]'})
  trainer.train(config, tmp_path / 'next')
  with pytest.raises(ValueError, match="shares examples with 'train' of synthetic"):
    exact.evaluate(tmp_path / 'next', {'data.eval_split': 'train[50%:]'})
  assert exact.evaluate(tmp_path / 'next', {'data.eval_split': 'test[50:]'})['examples'] == 206


@pytest.mark.parametrize('sweep', [(), ('0.1',)])
@pytest.mark.parametrize('known', ['train[60%:70%]', 'train[:50%]', ''])
def test_validation_on_training_examples_of_init_is_reported(monkeypatch, caplog, sweep, known):
  parts = {'data.train_split': 'train[:50%]', 'data.val_split': 'train[50%:]'}
  head = {'freeze': 'backbone', 'sweep': sweep[0]} if sweep else {}
  names = trained.TrainingFiles(own_splits=(('synthetic', known),) if known else ())
  monkeypatch.setattr(opening.inherit, 'open_teacher', lambda config, source: (None, names))
  exp, _ = opening.from_config(small_config(**parts, **head))
  message = f"data.val_split='train[50%:]': it shares examples with '{known}' of synthetic"
  assert (message in caplog.text) == (known == 'train[60%:70%]')
  assert ('data.val_split=' in caplog.text) == (known == 'train[60%:70%]')

  caplog.clear()
  saved = {'config': {'data': exp.config.data.to_dict(), 'sweep': ()}}
  monkeypatch.setattr(data, 'restore_item', lambda *_: saved)
  assert data.load_validation(exp, None, 1) is not None
  assert (message in caplog.text) == (known == 'train[60%:70%]')


@pytest.mark.parametrize('sweep', [(), ('0.1',)])
@pytest.mark.parametrize('known, kept', [('train[70%:]', '70%:'), ('train[90%:]', '70%:90%')])
def test_validation_keeps_its_files_only_if_init_knows_all_of_them(
  monkeypatch, tmp_path, caplog, sweep, known, kept
):
  for name in CLASSES:
    make_images(tmp_path / 'train' / name, [f'{name}{i}' for i in range(30)])
    make_images(tmp_path / 'test' / name, [f'new_{name}{i}' for i in range(5)])
  source = sources.open_source(f'folder:{tmp_path}', '', (8, 8))
  names = trained.hash_training_files(source, [known], trained.TrainingFiles())
  monkeypatch.setattr(opening.inherit, 'open_teacher', lambda config, source: (None, names))
  parts = {'data.train_split': 'train[:70%]', 'data.val_split': 'train[70%:]'}
  head = {'freeze': 'backbone', 'sweep': sweep[0]} if sweep else {}
  training = opening.from_config(config_of(tmp_path, **parts, **head))[1]
  assert len(training.val) == num_examples(source.pieces(f'train[{kept}]'))
  assert len(training.test) == 10
  message = 'were trained on all its images, so none is left out'
  assert (message in caplog.text) == (known == 'train[70%:]')
  parts = {'data.train_split': 'train[:70%]', 'data.eval_split': known}
  with pytest.raises(ValueError, match='were trained on all'):  # test files are never kept
    opening.from_config(config_of(tmp_path, **parts))


def test_splits_are_inherited_over_any_number_of_runs():
  first, second = ('synthetic', 'train[:5]'), ('digits', 'train[:9]')
  earlier = trained.TrainingFiles(own_splits=(second,), inherited_splits=(first,))
  source = sources.open_source('synthetic', '', (8, 8))
  found = trained.find_training_files(source, small_config(), earlier)
  assert found.own_splits == (('synthetic', 'train'),)
  assert set(found.inherited_splits) == {first, second}


def test_names_with_known_content_are_inherited_over_any_number_of_runs(tmp_path):
  for name in CLASSES:
    make_images(tmp_path / 'train' / name, [f'{name}{i}' for i in range(3)])
    make_images(tmp_path / 'test' / name, [f'{name}{i}' for i in range(2, 4)])  # one as in train
  source = sources.open_source(f'folder:{tmp_path}', '', (8, 8))
  earlier = trained.TrainingFiles(shared_N=np.array([5], np.uint64))
  found = trained.hash_training_files(source, ['train'], earlier)
  own = {splits.hash_name(f'{name}2.png') for name in CLASSES}
  assert set(found.shared_N.tolist()) == own | {5}


@pytest.mark.slow
def test_few_shot_and_pictures_leave_out_training_images(run, rearranged, tmp_path):
  flags = {'data.source': f'folder:{rearranged}'}
  exp, params, _ = opening.from_workdir(run[1], flags)
  result = few_shot.score_backbone(exp, params)
  assert result['examples'] == 3 and result['left_out'] == 7
  assert len(subject_lib.load_test(exp, flags)) == 3
  exp, _ = opening.from_init(str(run[1]), flags, classes='data')  # a workdir as weights
  assert evaluation.open_test(exp)[1] == 7


@pytest.mark.slow
def test_a_run_inherits_the_names_of_its_init(run, rearranged, tmp_path):
  config = config_of(rearranged, init=str(run[1]))
  result = trainer.train(config, tmp_path / 'next')
  assert result['examples'] == 3
  names, before = trained.training_files_of(tmp_path / 'next'), trained.training_files_of(run[1])
  np.testing.assert_array_equal(names.inherited_N, before.all_N)
  third = config_of(rearranged, init=str(tmp_path / 'next'), epochs='0')
  trainer.train(third, tmp_path / 'third')
  assert set(trained.training_files_of(tmp_path / 'third').inherited_N) >= set(before.own_N)


@pytest.mark.slow
def test_resumed_run_leaves_out_its_training_images(rearranged, tmp_path):
  config = config_of(rearranged)
  assert trainer.train(config, tmp_path / 'run')['examples'] == 10
  (tmp_path / 'run' / 'result.json').unlink()
  file = files_of(rearranged, 'train')[0]
  shutil.copy(file, rearranged / 'test' / file.parent.name / file.name)
  assert trainer.train(config, tmp_path / 'run')['examples'] == 10
  assert file.stem not in [path.stem for path in (tmp_path / 'run' / 'examples').iterdir()]


@pytest.mark.slow
def test_files_with_names_in_both_splits_are_identified_by_content(tmp_path, caplog):
  for name in CLASSES:
    make_images(tmp_path / 'train' / name, range(30))
    make_images(tmp_path / 'test' / name, range(100, 110))  # renamed below
    for i, file in enumerate(sorted((tmp_path / 'test' / name).iterdir())):
      file.rename(file.with_name(f'{i}.png'))
  for i in range(3):
    shutil.copy(tmp_path / 'train' / 'ant' / f'{i}.png', tmp_path / 'test' / 'ant')
  config = config_of(tmp_path, epochs='0')
  with caplog.at_level(logging.INFO):
    assert trainer.train(config, tmp_path / 'run')['examples'] == 17
  assert '10 of 30 names of training files are also names of held-out files' in caplog.text
  with pytest.raises(ValueError, match='trained on all 60 images'):
    exact.evaluate(tmp_path / 'run', {'data.eval_split': 'train'})


def test_a_test_that_copies_the_training_images_is_refused(tmp_path):
  for split in ('train', 'test'):
    for name in CLASSES:
      make_images(tmp_path / split / name, range(10))
  with pytest.raises(ValueError, match='trained on all 20 images, judging by the names'):
    opening.from_config(config_of(tmp_path))


@pytest.mark.parametrize(
  'names',
  [
    ('Train', 'Test'),
    ('training', 'test'),
    ('cat', 'valid'),
    ('training_set', 'test_set'),
    ('seg_train', 'seg_test', 'seg_pred'),
    ('Train2017', 'val2017'),
  ],
)
def test_class_folders_named_like_splits_are_refused(tmp_path, names):
  for name in names:
    make_images(tmp_path / name, range(10))
  with pytest.raises(ValueError, match='found names of splits: .* Name the training split train/'):
    sources.open_source(f'folder:{tmp_path}', '', (8, 8))


def test_classes_with_a_word_like_a_split_are_accepted(tmp_path):
  for name in ('train_station', 'test_tube', 'training set'):
    make_images(tmp_path / name, range(30))
  source = sources.open_source(f'folder:{tmp_path}', '', (8, 8))
  assert source.class_names == ('test_tube', 'train_station', 'training set')


def test_case_and_unicode_form_of_a_name_do_not_matter():
  assert splits.hash_name('Bäume_1.JPG') == splits.hash_name('Ba\u0308ume_1.jpg')
  assert splits.hash_name('a/1.jpg') != splits.hash_name('b/1.jpg')


def test_sweep_also_keeps_the_names_of_its_validation_split(tmp_path):
  for name in CLASSES:
    make_images(tmp_path / name, [f'{name}{i}' for i in range(30)])
  parts = {'data.train_split': 'train[:70%]', 'data.val_split': 'train[70%:]'}
  config = config_of(tmp_path, freeze='backbone', sweep='0.1,', **parts)
  exp, training = opening.from_config(config)
  assert len(exp.names.own_N) == len(training.train) + len(training.val)
  _, again = opening.from_config(config, exp.config, seen=exp.names)  # its last run is resumed
  assert len(again.val) == len(training.val)
  exp, training = opening.from_config(config_of(tmp_path, **parts))
  assert len(exp.names.own_N) == len(training.train)


def test_run_of_version_0_1_0_can_be_evaluated_but_not_resumed(run, tmp_path, caplog):
  workdir = shutil.copytree(run[1], tmp_path / 'run')
  (workdir / 'result.json').unlink()
  for step in stored.saved_steps(workdir):
    saved = workdir / 'checkpoints' / str(step)
    shutil.rmtree(saved / 'names')
    (saved / 'digests.json').unlink()
    about = json.loads((saved / 'config' / 'metadata').read_text())
    del about['format']
    (saved / 'config' / 'metadata').write_text(json.dumps(about))
  with caplog.at_level(logging.WARNING):
    assert 'left_out' not in exact.evaluate(workdir, {})
  assert 'did not store the names of the training files' in caplog.text
  with pytest.raises(ValueError, match='this run of version 0.1.0 cannot be resumed'):
    trainer.train(config_of(run[0]), workdir)
