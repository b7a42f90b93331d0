"""Values that a config leaves open depend on the training images; given values never change."""

import dataclasses
import tracemalloc

import numpy as np
import pytest

from configs import cifar10
from tests.conftest import call
from vit_jax import cli, sizing
from vit_jax import config as config_lib
from vit_jax.data import Source, num_examples
from vit_jax.data.folder import Files
from vit_jax.experiment import Task, assemble
from vit_jax.optim import num_steps, plan, warmup_steps

FINETUNE = 'configs/finetune.py:b16,folder'


def photos(count, size=(300, 400), classes=3, **more):
  """Returns a folder-like source with `count` training images at evenly spaced positions."""
  files = {}
  for name, n in {'train': count, 'test': 12, **more}.items():
    hash_N = (np.arange(n, dtype=np.float64) / n * 2**64).astype(np.uint64)
    files[name] = Files(None, np.zeros(n, 'S1'), np.arange(n, dtype=np.int32) % classes, hash_N)
  read = lambda split, indices: (('', np.zeros((*size, 3), np.uint8), 0) for _ in indices)
  names = tuple(f'class {i}' for i in range(classes))
  return Source({k: len(v) for k, v in files.items()}, names, 3, read, files=files)


def chosen(spec, source, **overrides):
  return sizing.choose_open(config_lib.override_all(cli.load_file(spec), overrides), source)


def test_an_empty_validation_folder_is_not_the_validation_split():
  config = chosen(FINETUNE, photos(300, val=0))
  assert config.data.train_split == 'train[:90%]' and config.data.val_split == 'train[90%:]'
  assert chosen(FINETUNE, photos(300, val=9)).data.val_split == 'val'


@pytest.mark.parametrize('count', [1, 99, 100, 101, 1234, 10**5])
def test_sampled_images_are_spread_evenly_and_need_little_memory(count):
  read = lambda split, indices: (('', np.zeros((1 + i, 2, 1), np.bool_), 0) for i in indices)
  source = Source({'train': count, 'more': 50}, ('a', 'b'), 3, read)
  split = 'train[:60%]+more[9:30]+train[70%:]' if count > 9 else 'train'
  every = [i for _, start, stop in source.pieces(split) for i in range(start, stop)]
  tracemalloc.start()
  found = sizing.sample_sizes(source, split)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert [height - 1 for height, _ in found] == every[:: -(-len(every) // sizing.SAMPLE)]
  assert peak < 10**6


@pytest.mark.parametrize(
  'spec',
  [
    FINETUNE,
    f'{FINETUNE},adamw',
    'configs/folder.py:small',
    'configs/folder.py:tiny',
    'configs/linear_probe.py:b16,folder',
  ],
)
@pytest.mark.parametrize('count', [30, 90, 240, 3000, 10**5])
def test_a_run_has_300_steps_and_no_batch_larger_than_the_training_split(spec, count):
  source = photos(count)
  config = chosen(spec, source)
  train = num_examples(source.pieces(config.data.train_split))
  assert num_steps(config, train) >= 300
  assert 2 <= config.batch_size <= min(train, config.recipe.batch_size)
  assert config.optimizer.lr == 0.1 or config.optimizer.lr == pytest.approx(
    config.recipe.lr
    * (config.batch_size / config.recipe.batch_size)
    ** (1 if config.optimizer.name == 'sgd' else 0.5)
  )
  share = config.recipe.warmup / config.recipe.epochs
  probe = config.freeze == 'backbone'  # has no warm-up
  assert config.schedule.warmup == pytest.approx(0 if probe else share * config.epochs)


@pytest.mark.parametrize('count, batch_size, steps', [
    (30, 16, 300), (90, 16, 300), (240, 16, 300), (3000, 128, 422), (10**5, 512, 3516),
])  # fmt: skip
def test_fine_tuning_makes_the_batch_smaller_before_it_adds_epochs(count, batch_size, steps):
  config = chosen(FINETUNE, photos(count))
  train = round(0.9 * count)
  assert (config.batch_size, num_steps(config, train)) == (batch_size, pytest.approx(steps, abs=2))
  assert warmup_steps(config, train, steps) == pytest.approx(steps / 20, abs=1)
  assert config.epochs == 20 or config.batch_size == 16


@pytest.mark.parametrize('count', [90, 3000, 10**5])
def test_a_run_saves_ten_checkpoints(count):
  config = chosen(FINETUNE, photos(count))
  steps = num_steps(config, round(0.9 * count))
  assert -(-steps // config.checkpoint_every) == 10


def test_given_values_are_never_changed():
  given = {
    'batch_size': '64', 'epochs': '3', 'schedule.warmup': '0.5', 'optimizer.lr': '7',
    'data.train_split': 'train[:50%]', 'data.val_split': '', 'checkpoint_every': '5',
    'data.image_size': '48', 'model.patch_size': '12',
  }  # fmt: skip
  for spec in (FINETUNE, 'configs/folder.py:small'):
    config = config_lib.override_all(cli.load_file(spec), given)
    assert config_lib.flatten(sizing.choose_open(config, photos(30))) == config_lib.flatten(config)


@pytest.mark.parametrize('key, value', [('batch_size', '4'), ('epochs', '2')])
def test_the_other_values_follow_a_given_one(key, value):
  config = chosen(FINETUNE, photos(240), **{key: value})
  assert config.batch_size == (4 if key == 'batch_size' else 16)
  assert config.epochs == (2 if key == 'epochs' else 20)  # 2 epochs: 27 steps, as asked


def test_a_config_without_open_values_stays_as_it_is():
  config = config_lib.default_config()
  assert config_lib.flatten(sizing.choose_open(config, photos(30))) == config_lib.flatten(config)


@pytest.mark.parametrize('size, wanted, patch', [
    ((8, 8), 32, 4), ((32, 32), 32, 4), ((63, 900), 32, 4), ((64, 64), 64, 8),
    ((130, 150), 128, 16), ((3000, 4000), 224, 16),
])  # fmt: skip
def test_the_image_size_follows_the_images(size, wanted, patch):
  config = chosen('configs/folder.py:small', photos(30, size))
  assert config.data.image_size == (wanted, wanted) and config.model.patch_size == (patch, patch)


def test_the_image_size_follows_the_median_of_images_from_the_whole_split():
  side_N, asked = np.repeat([40, 130, 3000], [400, 590, 10]), []  # their mean is 123

  def read(split, indices):
    asked.extend(indices)
    return (('', np.zeros((side_N[i], 5000, 3), np.uint8), 0) for i in indices)

  config = chosen('configs/folder.py:small', dataclasses.replace(photos(1000), read=read))
  assert config.data.image_size == (128, 128)
  assert len(asked) <= 100 and min(asked) < 10 and max(asked) >= 890  # train[:90%] has 900


def test_every_variant_trains_on_photos_of_any_size():
  for variant in cifar10.VARIANTS:
    config = chosen(f'configs/folder.py:{variant}', photos(30, (130, 130)))
    model = assemble(config, Task(('a', 'b', 'c'), config.data.image_size, 3)).model
    plan.check_stages(config, model)
    assert config.data.cache == 'auto'


def test_a_linear_probe_has_no_recipe():
  with pytest.raises(ValueError, match="'b16,folder,lora' must be <model>,<dataset>"):
    cli.load_file('configs/linear_probe.py:b16,folder,lora')


def test_the_image_size_is_a_multiple_of_a_given_patch():
  given = {'model.patch_size': '14'}
  config = chosen('configs/folder.py:small', photos(30, (130, 130)), **given)
  assert config.data.image_size == (126, 126) and config.model.patch_size == (14,)
  config = chosen('configs/folder.py:small', photos(30, (70, 70)), **{'model.variant': 'Ti/16'})
  assert config.data.image_size == (64, 64) and config.model.patch_size is None


@pytest.mark.parametrize('more, parts', [
    ({}, ('train[:90%]', 'train[90%:]')), ({'val': 5}, ('train', 'val')),
])  # fmt: skip
def test_a_validation_part_is_held_out(more, parts):
  data = chosen(FINETUNE, photos(60, **more)).data
  assert (data.train_split, data.val_split) == parts


def test_the_split_for_testing_is_not_the_validation_split():
  data = chosen(FINETUNE, photos(60, val=12), **{'data.eval_split': 'val'}).data
  assert (data.train_split, data.val_split) == ('train[:90%]', 'train[90%:]')


def test_a_given_training_split_keeps_the_validation_split_of_the_data(caplog):
  given = {'data.train_split': 'train'}
  data = chosen(FINETUNE, photos(60, val=5), **given).data
  assert (data.train_split, data.val_split) == ('train', 'val')
  assert 'no images are held out' not in caplog.text
  data = chosen(FINETUNE, photos(60), **given).data
  assert (data.train_split, data.val_split) == ('train', '')
  assert 'data.train_split=train is set, but data.val_split is None' in caplog.text


def test_nothing_is_held_out_if_a_class_would_have_no_training_image(caplog):
  source = photos(60)
  label_N = np.where(np.arange(60) < 54, 0, 1 + np.arange(60) % 2).astype(np.int32)
  files = source.files | {'train': dataclasses.replace(source.files['train'], label_N=label_N)}
  data = chosen(FINETUNE, dataclasses.replace(source, files=files)).data
  assert (data.train_split, data.val_split) == ('train', '')
  assert 'too few images' in caplog.text


def test_classes_with_few_held_out_images_are_named(caplog):
  source = photos(60)
  sizing.warn_of_few(chosen(FINETUNE, source), source)
  assert 'train[90%:] has fewer than 3 images of the classes class 0 (2), ' in caplog.text
  assert 'test: fewer' not in caplog.text  # 6 images for validation, 12 for testing


def test_the_batch_divides_over_devices_and_micro_batches():
  assert chosen(FINETUNE, photos(240), micro_batches='3').batch_size == 12
  # This config mixes pairs of images, so each device needs an even number of images.
  config = chosen('configs/folder.py:small', photos(240), **{'mesh.data': '2'})
  assert config.batch_size % 4 == 0


@pytest.mark.slow
def test_the_choice_is_printed_in_one_line_and_saved(tmp_path, capsys):
  from PIL import Image

  random = np.random.RandomState(0)
  for name, colour in (('dark', 40), ('light', 210)):
    (tmp_path / 'photos' / name).mkdir(parents=True)
    for i in range(20):
      pixels = np.clip(random.normal(colour, 20, (40, 36, 3)), 0, 255).astype(np.uint8)
      Image.fromarray(pixels).save(tmp_path / 'photos' / name / f'{name}{i}.png')
  argv = [
    '--config=configs/folder.py:tiny', f'--config.data.source=folder:{tmp_path}/photos',
    f'--workdir={tmp_path}/run', '--config.model.width=12', '--config.model.depth=1',
    '--config.model.num_heads=2', '--config.model.mlp_dim=12', '--config.epochs=1',
    '--config.augment.rand_augment.num_layers=0',
  ]  # fmt: skip
  code, _, err = call(capsys, *argv)
  (line,) = [text for text in err.splitlines() if text.startswith('Chosen for')]
  assert 'data.image_size=32,32' in line and 'batch_size=16' in line
  assert code is None
  code, out, _ = call(capsys, f'--workdir={tmp_path}/run', '--print_config')
  assert 'data.image_size=32,32\n' in out and 'batch_size=16\n' in out
  code, _, err = call(capsys, *argv)  # the config file leaves open what the run has chosen
  assert code is None and 'Chosen for' not in err
