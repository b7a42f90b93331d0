"""Tests the ImageNet recipes against published numbers, ReaL labels, and other test sets."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from configs import imagenet
from tests.conftest import DATA, small_config
from vit_jax import cli, opening
from vit_jax.check import check
from vit_jax.data import loading, memory, sources, tfds
from vit_jax.data.source import Source
from vit_jax.evaluation import exact, real
from vit_jax.experiment import assemble
from vit_jax.optim import plan as plan_lib
from vit_jax.training import trainer
from vit_jax.weights import pretrained
from vit_jax.workdir import Task

TRAIN = {'imagenet2012': 1_268_355, 'imagenet21k': 14_058_000}  # images in 99% of the train split

# Epochs, batch, learning rate, decay, dropout, clip, schedule, and the resulting number of steps.
PAPERS = {
  's16,plain': (90, 1024, 1e-3, 0.1, 0.0, 1.0, 'cosine', 111_477),
  'b16,paper': (300, 4096, 3e-3, 0.3, 0.1, 1.0, 'cosine', 92_897),
  'l16,i21k': (90, 4096, 1e-3, 0.03, 0.1, 0.0, 'linear', 308_892),
  'b16,medium2': (300, 4096, 1e-3, 0.1, 0.0, 1.0, 'cosine', 92_897),
}


@pytest.mark.parametrize('variant', PAPERS)
def test_a_recipe_has_the_values_of_its_paper(variant):
  config = imagenet.get_config(variant)
  epochs, batch, rate, decay, dropout, clip, schedule, steps = PAPERS[variant]
  optimizer, model = config.optimizer, config.model
  assert (config.epochs, config.batch_size, config.schedule.name) == (epochs, batch, schedule)
  assert (optimizer.name, optimizer.b1, optimizer.b2) == ('adamw', 0.9, 0.999)
  assert (optimizer.lr, optimizer.weight_decay, optimizer.clip) == (rate, decay, clip)
  assert (model.dropout, model.stochastic_depth, model.attention_dropout) == (dropout, 0, 0)
  assert config.augment.resized_crop.min_area == 0.05 and config.augment.flip.probability == 0.5
  assert tuple(config.data.image_size) == (224, 224) and round(224 / config.data.crop) == 256
  examples = TRAIN['imagenet21k' if 'i21k' in variant else 'imagenet2012']
  assert plan_lib.num_steps(config, examples) == steps
  assert plan_lib.warmup_steps(config, examples, steps) == 10_000


# (mixup p, RandAugment (n, m)) from AugReg, Section 3; `plain` uses light2.
AUGREG = {
  'light1': (0, (2, 0)), 'light2': (0.2, (2, 10)), 'medium1': (0.2, (2, 15)),
  'medium2': (0.5, (2, 15)), 'strong1': (0.5, (2, 20)), 'strong2': (0.8, (2, 20)),
  'plain': (0.2, (2, 10)),
}  # fmt: skip


@pytest.mark.parametrize('name', AUGREG)
def test_augmentation_has_the_values_of_augreg(name):
  config = imagenet.get_config(f's16,{name}')
  check(config)
  drawn, mix = config.augment.rand_augment, config.augment.mix
  mixup, (layers, magnitude) = AUGREG[name]
  assert (drawn.num_layers, drawn.magnitude, drawn.space) == (layers, magnitude, 'big_vision')
  assert (drawn.probability, drawn.mstd) == (1, 0)
  assert mix.probability == bool(mixup) and (mix.mixup_alpha, mix.cutmix_alpha)[:2] == (
    mixup or 0.8,
    0 if mixup else 1,
  )


@pytest.mark.parametrize('spec, min_area', [
    ('imagenet.py:s16', 0.05), ('imagenet.py:b16,strong2', 0.05),
    ('finetune.py:b16,imagenet2012', 0.05), ('linear_probe.py:b16,imagenet2012', None),
])  # fmt: skip
def test_imagenet_is_streamed_and_cropped_from_its_files(spec, min_area):
  config = cli.load_file(f'configs/{spec}')
  source = Source({'train': 1_281_167}, ('a', 'b'), 3, None)
  reading = assemble(config, Task(source.class_names, (224, 224), 3)).reading
  cache = loading.decide_cache(reading, source, ['train'], (224, 224), lambda: None)
  reading = dataclasses.replace(reading, cache=cache)
  split = loading.open_split(reading, source, 'train', (224, 224), to_train=True)
  assert len(split) == 1_281_167 and split.size == (224, 224)
  assert (split.crop or {}).get('min_area') == min_area


@pytest.mark.slow
def test_weight_decay_matches_big_vision():
  """big_vision's decay per step is `wd` (1e-4), times the schedule, but not times the rate."""
  recipe = plan_lib.training_recipe(imagenet.get_config('s16'), TRAIN['imagenet2012'])
  params = {'head': {'kernel': jnp.full((2, 3), 2.0), 'bias': jnp.full(3, 2.0)}}
  optimizer = recipe['optimizer']
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zeros, optimizer.init(params), params)
  first = 1 / 10_000  # the schedule's value at the first step
  np.testing.assert_allclose(updates['head']['kernel'], -1e-4 * first * 2.0, rtol=1e-5)
  np.testing.assert_array_equal(updates['head']['bias'], 0)


@pytest.mark.parametrize('variant, message', [
    ('s15', 'model'), ('tiny', 'model'), ('s16,medium', 'medium1'), ('s16,plain,adamw', 'recipe'),
])  # fmt: skip
def test_an_unknown_recipe_is_refused(variant, message):
  with pytest.raises(ValueError, match=message):
    imagenet.get_config(variant)


CLASSES = [f'n0144{i:04d}' for i in range(6)]


def make_images(root, names, seed):
  """Writes files of noise with these names, spread over the classes."""
  draw = np.random.RandomState(seed)
  for i, name in enumerate(names):
    folder = root / CLASSES[i % len(CLASSES)]
    folder.mkdir(parents=True, exist_ok=True)
    pixels = draw.randint(0, 256, (9, 12, 3)).astype(np.uint8)
    pixels[..., i % 3] //= 2
    Image.fromarray(pixels).save(folder / f'{name}.png')


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  """Trains on images, and writes `real.json`; test images are named as in ImageNet."""
  root = tmp_path_factory.mktemp('imagenet')
  make_images(root / 'data' / 'train', range(48), seed=0)
  numbers = np.random.RandomState(1).permutation(40)[:30] + 1
  make_images(root / 'data' / 'val', [f'ILSVRC2012_val_{n:08d}' for n in numbers], seed=1)
  draw = np.random.RandomState(2)
  labels = [draw.permutation(6)[: draw.randint(4)].tolist() for _ in range(40)]
  (root / 'real.json').write_text(json.dumps(labels))
  overrides = {'data.source': f'folder:{root}/data', 'epochs': '8', 'batch_size': '16'}
  trainer.train(small_config(**overrides), root / 'run')
  return root


def predictions(workdir, source):
  """Returns {path: class} as predicted by the model from `vit_jax.load`."""
  model, params = pretrained.load(workdir)
  exp = opening.from_workdir(workdir)[0]
  names = [name for name, _, _ in source.read('test', range(source.sizes['test']))]
  images = memory.load_examples(source, 'test', (8, 8), fit=exp.fit).image_NHWC
  logits = jax.jit(model.apply)({'params': params}, images / np.float32(127.5) - 1)
  return dict(zip(names, np.asarray(logits.argmax(1)).tolist()))


@pytest.mark.slow
@pytest.mark.parametrize('cache, split', [('memory', 'test'), ('stream', 'test[40%:]')])
def test_real_accuracy_is_computed_as_by_its_authors(photos, cache, split):
  path = photos / 'real.json'
  overrides = {'data.cache': cache, 'data.real_labels': str(path), 'data.eval_split': split}
  found = exact.evaluate(photos / 'run', overrides | {'eval_batch_size': '7'})
  source = sources.open_source(f'folder:{photos}/data', '', (8, 8))
  ((_, start, _),) = source.pieces(split)
  assert (start > 0) == ('40' in split)
  predicted = list(predictions(photos / 'run', source).items())[start:]
  labels = json.loads(path.read_text())
  labels = {f'ILSVRC2012_val_{i + 1:08d}.png': label for i, label in enumerate(labels)}
  of = lambda name: labels[name.rpartition('/')[2]]
  correct = [n in of(name) for name, n in predicted if of(name)]
  assert found['real_accuracy'] == pytest.approx(np.mean(correct))
  assert found['real_examples'] == len(correct) < len(predicted) == found['examples']
  own = np.mean([CLASSES[n] in name for name, n in predicted])
  assert found['accuracy'] == pytest.approx(own) != found['real_accuracy']


def test_without_real_labels_the_real_accuracy_is_not_reported(photos):
  assert not {'real_accuracy', 'real_examples'} & set(exact.evaluate(photos / 'run', {}))


@pytest.mark.parametrize('text, split, message', [
    ('[[0], ["1"]]', 'test', 'list of lists'), ('{', 'test', 'list of lists'),
    ('[1]', 'test', 'list of lists'), ('[[6]]', 'test', 'label 6, but the labels of the data'),
    ('[[-1]]', 'test', 'label -1, but the labels of the data'),
    ('[[0], []]', 'test', '00000002, but the data has '),
    (json.dumps([[0]] * 40), 'train', 'but the data has .*train/n0144'),
    (json.dumps([[]] * 40), 'test', 'no image of test'), (None, 'test', 'No such file'),
])  # fmt: skip
def test_invalid_real_labels_are_refused(photos, tmp_path, text, split, message):
  path = tmp_path / 'real.json'
  if text:
    path.write_text(text)
  source = sources.open_source(f'folder:{photos}/data', '', (8, 8))
  with pytest.raises(ValueError, match=message):
    real.load_real_labels(path, source, split)


def test_real_labels_are_refused_for_other_classes_than_imagenets(photos):
  source = Source({'test': 1}, ('cat', 'dog'), 3, None)
  with pytest.raises(ValueError, match='the data has the classes cat, dog'):
    real.load_real_labels(photos / 'real.json', source, 'test')


def test_real_labels_are_refused_for_another_class_order(photos):
  source = Source({'test': 1}, (*CLASSES[1:], CLASSES[0]), 3, None)
  with pytest.raises(ValueError, match=f'sorted by name.* classes {CLASSES[1]}'):
    real.load_real_labels(photos / 'real.json', source, 'test')


def test_real_labels_are_refused_if_bad_images_were_skipped(photos, tmp_path):
  bad = tmp_path / 'all' / 'val'
  make_images(tmp_path / 'all' / 'train', range(12), seed=0)
  make_images(bad, [f'ILSVRC2012_val_{n:08d}' for n in range(1, 13)], seed=1)
  next(bad.rglob('*.png')).write_bytes(b'')
  flags = {'data.source': f'folder:{tmp_path}/all', 'data.skip_bad_images': 'true'}
  flags |= {'data.real_labels': str(photos / 'real.json')}
  with pytest.raises(ValueError, match='1 of the 12 images.*data.cache=stream'):
    exact.evaluate(photos / 'run', flags)
  assert exact.evaluate(photos / 'run', flags | {'data.cache': 'stream'})['examples'] == 11


@pytest.mark.slow
def test_config_can_select_another_test_set_with_the_same_classes(photos, tmp_path):
  make_images(tmp_path / 'train', range(6), seed=3)
  make_images(tmp_path / 'test', [f'other{i}' for i in range(24)], seed=4)
  other = {'data.source': f'folder:{tmp_path}', 'data.eval_split': 'test'}
  found = exact.evaluate(photos / 'run', other)
  source = sources.open_source(f'folder:{tmp_path}', '', (8, 8))
  right = [CLASSES[n] in name for name, n in predictions(photos / 'run', source).items()]
  assert found['accuracy'] == pytest.approx(np.mean(right)) and found['examples'] == 24


def test_imagenet_and_imagenet_v2_have_the_same_classes_in_the_order_of_real(tmp_path):
  names = [
    tfds.find_builder(name, tmp_path).info.features['label'].names
    for name in ('imagenet2012', 'imagenet_v2/matched-frequency')
  ]
  assert names[0] == names[1] == sorted(names[0]) and len(names[0]) == 1000


def test_tfds_examples_have_the_names_of_their_files(monkeypatch):
  record = {'image': b'', 'label': 3, 'file_name': b'ILSVRC2012_val_00000007.JPEG'}
  records = types.SimpleNamespace(__getitems__=lambda indices: [record for _ in indices])
  monkeypatch.setattr(tfds, 'open_records', lambda *_: records)
  source = sources.open_source('tfds:mini', str(DATA / 'tfds'), (8, 8))
  ((name, _, label),) = source.read('test', [5])
  assert label == 3 and name == 'tfds:mini/test/5 (ILSVRC2012_val_00000007.JPEG)'
