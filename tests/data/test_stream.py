"""Checks streamed examples: order, pixels, random crops, workers, processes and bad images."""

import concurrent.futures
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import PIL
from PIL import Image
import pytest

from tests.conftest import DATA, ROOT, assert_equal, small_config
from vit_jax import config as config_lib
from vit_jax import limits, opening
from vit_jax.augment import crops
from vit_jax.data import batching, loading, memory, sources, tfds
from vit_jax.data import image as image_lib
from vit_jax.data import stream as stream_lib
from vit_jax.data.memory import Examples
from vit_jax.data.source import Source
from vit_jax.data.stream import Stream
from vit_jax.distributed import devices, sharding
from vit_jax.evaluation import exact, features
from vit_jax.figures import subject as subject_lib
from vit_jax.training import resume, trainer
from vit_jax.training.loop import Run
from vit_jax.workdir import stored, writer

CROP = {'min_area': 0.05, 'max_aspect': 4 / 3}
IDS = 23


def numbered(split, indices):
  """Yields images that contain their own number, which is also their label."""
  draw = np.random.RandomState(0).randint(0, 256, (IDS, 12, 10, 3)).astype(np.uint8)
  for i in indices:
    image_HWC = draw[i].copy()
    image_HWC[0, 0] = i
    yield f'{split}/{i}', image_HWC, i


def bad_ones(bad, split, indices):
  """Yields the images of `numbered`; the images in `bad` have a label without a class."""
  for name, image_HWC, i in numbered(split, indices):
    yield name, image_HWC, IDS + 1 if i in bad else i


def open_numbered(read=numbered, split='train', **arguments):
  source = Source({'train': IDS}, tuple(map(str, range(IDS))), 3, read)
  arguments = {'size': (12, 10), 'fit': image_lib.fit_image} | arguments
  return stream_lib.open_stream(source, split, **arguments)


def take(stream, count, batch_size=4, seed=3, start=0):
  """Returns the first batches as NumPy arrays."""
  over_batch = sharding.batch_sharding(devices.make_mesh(batch_size))
  batches = batching.train_batches(stream, batch_size, seed, start, over_batch)
  found = [jax.tree.map(np.array, batch) for batch in itertools.islice(batches, count)]
  batches.close()
  return found


def same(ones, others):
  for one, other in zip(ones, others, strict=True):
    assert one.keys() == other.keys()
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  """Folder of JPEGs of several sizes, in three classes, with train/ and test/."""
  root, draw = tmp_path_factory.mktemp('photos'), np.random.RandomState(0)
  for split, count in (('train', 20), ('test', 7)):
    for name in ('ant', 'cat', 'dog'):
      (root / split / name).mkdir(parents=True)
      for i in range(count):
        smooth(draw, *draw.randint(20, 60, 2)).save(root / split / name / f'{i}.jpg', quality=90)
  return root


def smooth(draw, height, width):
  coarse = Image.fromarray(draw.randint(0, 256, (5, 5, 3)).astype(np.uint8))
  return coarse.resize((int(width), int(height)), Image.Resampling.BICUBIC)


def photo_config(photos, **overrides):
  settings = {'data.source': f'folder:{photos}', 'data.cache': 'stream', 'batch_size': '8'}
  settings |= {'augment.resized_crop.min_area': '0.05', 'eval_batch_size': '10'}
  return small_config(**settings | overrides)


def test_stream_has_the_same_order_as_memory():
  stream = open_numbered()
  images = np.stack([image_HWC for _, image_HWC, _ in numbered('train', range(IDS))])
  loaded = Examples(images, np.arange(IDS, dtype=np.int32))
  same(take(stream, 9), take(loaded, 9))


def test_parts_of_a_split_are_read_from_their_first_example():
  stream = open_numbered(split='train[3:5]+train[-2:]')
  found = stream.rows([3, 0, 2, 1])['label']
  np.testing.assert_array_equal(found, [IDS - 1, 3, IDS - 2, 4])


@pytest.mark.slow
def test_batches_do_not_depend_on_threads_workers_or_start_step(photos):
  source = sources.open_source(f'folder:{photos}', '', (16, 16))
  arguments = {'size': (16, 16), 'fit': image_lib.fit_image, 'crop': CROP}
  open_photos = functools.partial(stream_lib.open_stream, source, 'train', **arguments)
  whole = take(open_photos(), 6, batch_size=40)  # each batch has three parts
  assert len({batch['image'].tobytes() for batch in whole}) == 6
  same(take(open_photos(threads=3), 6, batch_size=40), whole)
  for workers in (2, 4):
    same(take(open_photos(workers=workers, threads=2), 6, batch_size=40), whole)
  for start in range(1, 6):
    same(take(open_photos(), 6 - start, batch_size=40, start=start), whole[start:])


@pytest.mark.slow
def test_evaluation_batches_do_not_depend_on_workers():
  over_batch = sharding.batch_sharding(devices.make_mesh(8))
  ones, others = (
    [jax.device_get(batch) for batch in batching.eval_batches(stream, 8, over_batch)]
    for stream in (open_numbered(), open_numbered(workers=2))  # three parts in total
  )
  same(others, ones)
  assert not multiprocessing.active_children()


@pytest.mark.parametrize('cores, workers, threads, want', [
    (8, 0, None, 8), (8, 1, None, 8), (8, 3, None, 2), (2, 4, None, 1), (64, 2, None, 16),
    (8, 3, 5, 5),
])  # fmt: skip
def test_the_processes_share_the_cores_if_no_threads_are_given(
  monkeypatch, cores, workers, threads, want
):
  monkeypatch.setattr(stream_lib, 'num_cores', lambda: cores)
  reading = loading.Reading('stream', image_lib.fit_image, workers=workers, threads=threads)
  found = loading.open_split(reading, open_numbered().source, 'train', (12, 10))
  assert (found.workers, found.threads) == (workers, want)


@pytest.mark.parametrize('processes', [1, 2, 4])
def test_any_number_of_processes_makes_the_same_sequence(processes):
  stream, plan = open_numbered(crop=CROP), batching.train_plan(IDS, 8, seed=3, start=2)
  whole = take(stream, 5, batch_size=8, start=2)
  for number, batch in enumerate(whole):
    rows = np.split(np.arange(8), processes)  # rows on the devices of each process
    shares = [stream_lib.read_part(stream, plan, [own], number) for own in rows]
    same([stream_lib.join_parts(shares)], [batch])


SHARE = """
import hashlib, json, sys
import jax, numpy as np
from vit_jax.data import batching, image, sources, stream
from vit_jax.distributed import devices, joining, sharding

_, number, port, folder, crop = sys.argv
with joining.joined(f'127.0.0.1:{port}', 2, int(number)):
  source = sources.open_source(f'folder:{folder}', '', (16, 16))
  examples = stream.open_stream(
    source, 'train', size=(16, 16), fit=image.fit_image, crop=json.loads(crop)
  )
  over_batch = sharding.batch_sharding(devices.make_mesh(8))
  batches = batching.train_batches(examples, 8, 3, 5, over_batch)
  for step in range(5, 9):
    for shard in next(batches)['image'].addressable_shards:
      for row, image_HWC in enumerate(np.asarray(shard.data), shard.index[0].start):
        print(json.dumps([step, row, hashlib.sha256(image_HWC).hexdigest()]))
  batches.close()
"""


@pytest.mark.slow
def test_two_real_processes_make_the_batches_of_a_single_process(photos):
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = str(free.getsockname()[1])
  environment = os.environ | {'PYTHONPATH': os.pathsep.join([str(ROOT), *sys.path])}
  arguments = [port, str(photos), json.dumps(CROP)]
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', SHARE, str(number), *arguments],
      env=environment, stdout=subprocess.PIPE, text=True,
    )
    for number in range(2)
  ]  # fmt: skip
  shares = [list(map(json.loads, p.communicate(timeout=120)[0].splitlines())) for p in processes]
  source = sources.open_source(f'folder:{photos}', '', (16, 16))
  stream = stream_lib.open_stream(
    source, 'train', size=(16, 16), fit=image_lib.fit_image, crop=CROP
  )
  wanted = [
    [step, row, hashlib.sha256(image_HWC).hexdigest()]
    for step, batch in enumerate(take(stream, 4, batch_size=8, start=5), 5)
    for row, image_HWC in enumerate(batch['image'])
  ]
  assert len(shares[0]) == len(shares[1]) == 16  # each process has made its own half
  assert sorted(shares[0] + shares[1]) == wanted


def test_process_decodes_only_the_rows_of_its_own_devices():
  over_batch = sharding.batch_sharding(devices.make_mesh(8))

  class Other:  # its first device belongs to another process
    def addressable_devices_indices_map(self, shape):
      return dict(list(over_batch.devices_indices_map(shape).items())[1:])

  np.testing.assert_array_equal(sharding.local_rows(over_batch, 8), np.arange(8))
  np.testing.assert_array_equal(sharding.local_rows(Other(), 8), np.arange(4, 8))


def test_padding_of_an_evaluation_is_decoded_once():
  fitted = []

  def fit(image, size):
    fitted.append(image)
    return image_lib.fit_image(image, size)

  over_batch = sharding.batch_sharding(devices.make_mesh(16))
  stream = open_numbered(split='train[:5]', fit=fit)
  (batch,) = batching.eval_batches(stream, 16, over_batch)
  assert len(fitted) == 5
  assert batch['image'][:, 0, 0, 0].tolist() == [0, 1, 2, 3] + 12 * [4]
  assert batch['mask'].tolist() == 5 * [1] + 11 * [0]


def test_every_epoch_holds_every_example_once():
  label = np.concatenate([b['label'] for b in take(open_numbered(), 3 * IDS, batch_size=5)])
  epochs = label[: len(label) // IDS * IDS].reshape(-1, IDS)
  np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(range(IDS), (len(epochs), 1)))
  assert len({tuple(epoch) for epoch in epochs}) == len(epochs) > 10


def test_crops_depend_only_on_position_and_seed():
  ones, others = (take(open_numbered(crop=CROP), 2 * IDS, seed=s, batch_size=2) for s in (3, 4))
  label, pixels = (np.concatenate([b[name] for b in ones]) for name in ('label', 'image'))
  assert (
    len({image_HWC.tobytes() for image_HWC in pixels[label == 7]}) == 4
  )  # one crop in each of four epochs
  assert not np.array_equal(stream_lib.draw_uniform(3, 5), stream_lib.draw_uniform(5, 3))
  assert any((a['image'] != b['image']).any() for a, b in zip(ones, others))
  draws = np.stack([stream_lib.draw_uniform(0, i) for i in range(4000)])
  np.testing.assert_allclose(draws.mean(0), 0.5, atol=0.02)
  np.testing.assert_allclose(np.corrcoef(draws.T), np.eye(4), atol=0.06)


def test_each_seed_draws_different_crops_at_every_position():
  draws = np.stack([[stream_lib.draw_uniform(seed, i) for i in range(500)] for seed in range(8)])
  assert len(np.unique(draws)) == draws.size  # 53 random bits each


def test_a_position_has_the_same_random_numbers_in_every_version():
  """A run that is resumed with a newer version must go on with the same crops."""
  want = 0.08910064623458391, 0.33189185276481004, 0.16520897668188295, 0.37185566243647006
  assert stream_lib.draw_uniform(seed=3, position=5).tolist() == list(want)


def test_no_epoch_repeats_the_crops_of_another():
  one = open_numbered(split='train[:1]', crop=CROP)  # each batch is an epoch
  crops = {batch['image'].tobytes() for batch in take(one, 24, batch_size=1)}
  assert len(crops) > 12  # some round to the whole image


@pytest.mark.slow
def test_random_parts_have_the_distribution_of_the_device_crops():
  height, width, count = 30, 50, 3000
  draw = np.random.RandomState(0).rand(count, 4)
  boxes = np.array([image_lib.random_part(u, height, width, **CROP) for u in draw])
  left, top, right, bottom = boxes.T
  assert (boxes >= 0).all() and (right <= width + 1e-9).all() and (bottom <= height + 1e-9).all()
  keys = jax.random.split(jax.random.key(0), count)
  rectangle = lambda key: crops.rectangle(key, height, width, CROP['min_area'], 1.0, 4 / 3)
  high, wide = np.asarray(jax.vmap(rectangle)(keys)).T
  quantiles = np.linspace(0.02, 0.98, 25)
  for ours, theirs in (((right - left) * (bottom - top), high * wide), (right - left, wide)):
    scale = np.ptp(theirs)
    difference = np.quantile(ours, quantiles) - np.quantile(theirs, quantiles)
    assert abs(difference).max() < 0.04 * scale
  area = (right - left) * (bottom - top) / (height * width)
  np.testing.assert_allclose(area, 0.05 + 0.95 * draw[:, 0], rtol=1e-6)
  free = np.stack([height - (bottom - top), width - (right - left)])
  shares = (np.stack([top, left]) / np.maximum(free, 1e-9))[:, (free > 1).all(0)]
  np.testing.assert_allclose(
    np.corrcoef(shares), np.eye(2), atol=0.08
  )  # row and column are independent


def mean_over_areas(image_HWC, size):
  """Returns the mean over the area of each pixel of a smaller image: exact anti-aliasing."""
  for axis, n in enumerate(size):
    many = np.moveaxis(image_HWC.repeat(n, axis), axis, 0)
    image_HWC = np.moveaxis(many.reshape(n, -1, *many.shape[1:]).mean(1), 0, axis)
  return image_HWC


@pytest.mark.parametrize('height, width', [(90, 60), (120, 96), (70, 90), (60, 96)])
def test_downscaling_is_anti_aliased_like_pillow(height, width):
  noise_HWC = np.random.RandomState(0).randint(0, 256, (height, width, 3)).astype(np.uint8)
  got = image_lib.scale_part(noise_HWC, (0, 0, width, height), (64, 48)).astype(float)
  pillow = Image.fromarray(noise_HWC)
  wanted = np.asarray(pillow.resize((48, 64), Image.Resampling.BILINEAR)).astype(float)
  aliased = np.asarray(pillow.resize((48, 64), Image.Resampling.NEAREST)).astype(float)
  assert got.std() == pytest.approx(wanted.std(), rel=0.12)
  assert abs(got - wanted).mean() < 0.2 * abs(aliased - wanted).mean()
  assert abs(got - wanted).mean(axis=2)[[0, -1]].mean() < 10  # at the edges, too


@pytest.mark.parametrize('height, width', [(160, 60), (300, 250)])
def test_strong_downscaling_averages_over_areas(height, width):
  noise_HWC = np.random.RandomState(0).randint(0, 256, (height, width, 3)).astype(np.uint8)
  got = image_lib.scale_part(noise_HWC, (0, 0, width, height), (64, 48))
  assert abs(got - mean_over_areas(noise_HWC, (64, 48))).max() <= 1


def test_each_axis_is_scaled_independently():
  noise_HWC = np.random.RandomState(0).randint(0, 256, (80, 20, 3)).astype(np.uint8)
  got = image_lib.scale_part(noise_HWC, (0, 0, 20, 80), (30, 60))
  shorter = mean_over_areas(noise_HWC, (30, 20))
  between = (np.arange(60) + 0.5) / 3 - 0.5  # the centres of pixels
  longer = lambda row_W: np.interp(between, np.arange(20), row_W)
  assert abs(got - np.apply_along_axis(longer, 1, shorter)).max() <= 2  # rounded twice


@pytest.mark.parametrize('height, width', [(20, 60), (60, 20)])
def test_a_part_in_the_last_corner_of_a_long_image_is_kept(height, width):
  noise_HWC = np.random.RandomState(0).randint(0, 256, (height, width, 3)).astype(np.uint8)
  part = image_lib.scale_part(noise_HWC, (width - 12, height - 8, width, height), (8, 12))
  np.testing.assert_array_equal(part, noise_HWC[-8:, -12:])


@pytest.mark.parametrize('height, width, shrink', [(90, 70, 1), (208, 288, 2), (700, 520, 8)])
def test_part_of_a_jpeg_matches_its_pixels(tmp_path, height, width, shrink, monkeypatch):
  file, whole = tmp_path / 'a.jpg', smooth(np.random.RandomState(1), height, width)
  whole.save(file, quality=95, subsampling=0)
  box = (0.125 * width, 0.125 * height, 0.875 * width, 0.875 * height)
  cv2, shapes = image_lib.opencv(), []
  decode = cv2.imdecode
  monkeypatch.setattr(cv2, 'imdecode', lambda *a: shapes.append(decode(*a).shape) or decode(*a))
  got = image_lib.decode_part(file.read_bytes(), file, 3, lambda *_: box, (64, 48))
  assert shapes == [(-(-height // shrink), -(-width // shrink), 3)]
  wanted = mean_over_areas(np.asarray(whole.crop([round(edge) for edge in box])), (64, 48))
  assert abs(got - wanted).mean() < 2  # edges are rounded to pixels of the decoded size
  whole_box = image_lib.decode_part(
    file.read_bytes(), file, 3, lambda h, w: (0, 0, w, h), whole.size
  )
  assert whole_box.shape == (width, height, 3)


def test_a_part_of_an_incomplete_jpeg_is_refused(tmp_path):
  file = tmp_path / 'a.jpg'
  smooth(np.random.RandomState(1), 90, 70).save(file)
  encoded = file.read_bytes()
  with pytest.raises(image_lib.BadImage, match='a.jpg'):
    image_lib.decode_part(
      encoded[: len(encoded) // 2], file, 3, lambda h, w: (0, 0, w, h), (64, 48)
    )


def test_unusual_files_are_decoded_by_pillow(tmp_path):
  pixels, exif = smooth(np.random.RandomState(2), 40, 60), Image.Exif()
  exif[0x0112] = 6  # shown turned clockwise
  pixels.rotate(90, expand=True).save(tmp_path / 'turned.jpg', exif=exif, quality=95)
  pixels.convert('CMYK').save(tmp_path / 'cmyk.jpg', quality=95)
  pixels.convert('L').save(tmp_path / 'grey.jpg', quality=95)
  pixels.convert('P').save(tmp_path / 'palette.png')
  sixteen = np.asarray(pixels.convert('L')).astype(np.uint16) * 257
  Image.fromarray(sixteen).save(tmp_path / 'sixteen.png')
  whole = lambda height, width: (0, 0, width, height)
  for file in sorted(tmp_path.iterdir()):
    part_HWC = image_lib.decode_part(file.read_bytes(), file, 3, whole, (40, 60))
    wanted = np.asarray(image_lib.decode_image(file.read_bytes(), file))
    np.testing.assert_array_equal(part_HWC, wanted, err_msg=file.name)
  grey = image_lib.decode_part((tmp_path / 'cmyk.jpg').read_bytes(), '', 1, whole, (20, 30))
  assert grey.shape == (20, 30, 1)


def test_part_of_a_rotated_jpeg_comes_from_the_upright_image(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6  # shown turned clockwise
  stored = smooth(np.random.RandomState(3), 60, 40)
  stored.save(tmp_path / 'turned.jpg', exif=exif, quality=95, subsampling=0)
  encoded, shapes = (tmp_path / 'turned.jpg').read_bytes(), []
  choose = lambda *shape: shapes.append(shape) or (5, 4, 35, 24)
  got = image_lib.decode_part(encoded, '', 3, choose, (20, 30))
  upright = np.asarray(stored.rotate(-90, expand=True)).astype(int)
  assert shapes == [(40, 60)] and abs(got - upright[4:24, 5:35]).mean() < 2


@pytest.mark.slow
def test_evaluation_sees_the_same_pixels_in_memory_and_streamed(photos):
  mesh, (memory_, streamed) = (
    devices.make_mesh(),
    (
      opening.from_config(photo_config(photos, **{'data.cache': cache}))
      for cache in ('memory', 'stream')
    ),
  )
  blank = np.zeros((1, *memory_[0].image_shape), np.float32)
  params = memory_[0].model.init(jax.random.key(0), blank)['params']
  batches, scores = [], []
  for exp, training in (memory_, streamed):
    found = batching.eval_batches(training.test, 10, sharding.batch_sharding(mesh))
    batches.append([jax.device_get(batch) for batch in found])
    step = exact.make_eval_step(exp, mesh)
    scores.append(exact.score_split(step, params, training.test, 10, mesh))
  same(*batches)
  assert scores[0] == scores[1] and scores[0]['examples'] == 21


@pytest.mark.slow
def test_the_device_does_not_crop_again(photos):
  config_ = photo_config(photos, **{'augment.flip.probability': '0'})
  exp, training = opening.from_config(config_)
  assert exp.augments and training.train.crop == config_.augment.resized_crop.to_dict()
  assert training.test.crop is None
  pixels = np.random.RandomState(0).randint(0, 256, (4, 8, 8, 3)).astype(np.uint8)
  key, numbers = jax.random.key(0), np.arange(4)
  np.testing.assert_array_equal(exp.augment(key, numbers, pixels), pixels)
  config_.data.cache = 'memory'
  exp, _ = opening.from_config(config_)
  assert (np.asarray(exp.augment(key, numbers, pixels)) != pixels).any()


@pytest.mark.slow
def test_streamed_run_trains_resumes_and_logs_its_data_wait(photos, tmp_path):
  config_ = photo_config(photos, epochs='1', log_every='2', checkpoint_every='4')
  whole = trainer.train(config_, tmp_path / 'whole')
  lines = writer.read_metrics(tmp_path / 'whole')
  waits = [line['data_wait'] for line in lines if line['split'] == 'train']
  assert len(waits) == 4 and all(0 <= wait <= 1 for wait in waits)
  shutil.copytree(tmp_path / 'whole', tmp_path / 'again')
  shutil.rmtree(tmp_path / 'again' / 'checkpoints' / '8')
  (tmp_path / 'again' / 'result.json').unlink()
  config_.data.threads = 2
  again = trainer.train(config_, tmp_path / 'again')
  assert again['test_loss'] == whole['test_loss'] and again['steps'] == whole['steps'] == 8
  assert sorted(p.name for p in (tmp_path / 'whole' / 'examples').iterdir())


def test_content_of_a_stream_depends_on_how_images_are_scaled():
  contents = set()
  for fit in ({}, {'crop': 0.5}, {'interpolation': 'nearest'}, {'stretch': True}):
    stream = open_numbered(fit=functools.partial(image_lib.fit_image, **fit))
    contents.add(b''.join(array.tobytes() for _, array in stream.content()))
  assert len(contents) == 4


@pytest.mark.slow
def test_resume_refuses_renamed_files_but_accepts_a_moved_folder(photos, tmp_path):
  shutil.copytree(photos, tmp_path / 'photos')
  config_ = photo_config('photos', **{'data.dir': str(tmp_path), 'epochs': '0.25'})
  trainer.train(config_, tmp_path / 'run')
  ant = tmp_path / 'photos' / 'train' / 'ant'
  (ant / '3.jpg').rename(ant / 'other.jpg')
  config_.epochs = 0.5
  with pytest.raises(ValueError, match='changed since this run began .*their names or classes'):
    trainer.train(config_, tmp_path / 'run')
  (ant / 'other.jpg').rename(ant / '3.jpg')
  (tmp_path / 'elsewhere').mkdir()
  (tmp_path / 'photos').rename(tmp_path / 'elsewhere' / 'photos')
  config_.data.dir = str(tmp_path / 'elsewhere')
  assert trainer.train(config_, tmp_path / 'run')['steps'] == 4


def test_every_run_logs_its_data_wait(trained):
  lines = [line for line in writer.read_metrics(trained[0]) if line['split'] == 'train']
  assert all(0 < line['data_wait'] < 1 for line in lines)


def few(monkeypatch):
  """Simulates a machine whose memory is too small for any split."""
  monkeypatch.setattr(limits, 'limit', lambda: 2)


def test_splits_larger_than_memory_are_streamed(photos, monkeypatch, caplog):
  off = {'augment.resized_crop.min_area': '1'}
  config_ = photo_config(photos, **off, **{'data.cache': 'auto'})
  with caplog.at_level('INFO', logger='vit_jax'):
    exp, training = opening.from_config(config_)
  assert isinstance(training.train, Examples) and exp.config.data.cache == 'memory'
  assert 'auto selects memory: the splits train, test fit' in caplog.text
  few(monkeypatch)
  with caplog.at_level('INFO', logger='vit_jax'):
    exp, training = opening.from_config(config_)
  assert isinstance(training.train, Stream) and exp.config.data.cache == 'stream'
  assert 'auto selects stream: 81 images of 8x8 need 0.0 GB' in caplog.text  # train and test
  with pytest.raises(ValueError, match='data.cache=stream'):
    opening.from_config(photo_config(photos, **off, **{'data.cache': 'memory'}))
  monkeypatch.undo()  # a run that resumes on a larger machine keeps its cache
  exp, _ = opening.from_config(config_, saved=exp.config, seen=exp.names)
  assert exp.config.data.cache == 'stream'
  config_lib.check_same_run(exp.config, config_, 'here')
  few(monkeypatch)  # a run that began with `memory`, and streams since an earlier resume
  memory = photo_config(photos, **off, **{'data.cache': 'memory'})
  exp, _ = opening.from_config(memory, saved=exp.config, seen=exp.names)
  assert exp.config.data.cache == 'stream'
  with pytest.raises(ValueError, match='data.cache'):
    other = photo_config(photos, **off, **{'data.cache': 'memory'})
    config_lib.check_same_run(exp.config, other, 'here')


@pytest.mark.slow
@pytest.mark.slow_after_first
@pytest.mark.parametrize('how', ['auto', 'saved', 'stream'])
def test_a_run_in_memory_resumes_as_a_stream_bit_for_bit(photos, tmp_path, monkeypatch, how):
  settings = {'augment.resized_crop.min_area': '1', 'data.cache': 'auto', 'epochs': '1.07'}
  settings |= {'checkpoint_every': '4', 'log_every': '1'}
  whole = trainer.train(photo_config(photos, **settings), tmp_path / 'whole')
  assert whole['config']['data']['cache'] == 'memory' and whole['steps'] == 8

  def stop(self, step, *_):
    if step == 6:
      raise KeyboardInterrupt

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Run, 'log', stop)
    with pytest.raises(KeyboardInterrupt):
      trainer.train(photo_config(photos, **settings), tmp_path / 'cut')
  few(monkeypatch)
  if how == 'saved':
    config_ = resume.saved_config(tmp_path / 'cut', {})
  else:
    config_ = photo_config(photos, **settings | {'data.cache': how})
  result = trainer.train(config_, tmp_path / 'cut')
  assert result['config']['data']['cache'] == 'stream' and result['steps'] == 8
  for item in ('params', 'state'):
    a, b = (stored.restore_item(tmp_path / name, 8, item) for name in ('whole', 'cut'))
    assert_equal(a, b)


@pytest.mark.parametrize('before, given, why', [
  ('memory', 'stream', 'augment.resized_crop crops the original files'),
  ('stream', 'memory', 'augment.resized_crop crops the original files'),
])  # fmt: skip
def test_a_resumed_run_keeps_its_cache_if_batches_would_change(
  photos, monkeypatch, before, given, why
):
  exp, _ = opening.from_config(photo_config(photos, **{'data.cache': before}))
  for cache in ('auto', before):
    config_ = photo_config(photos, **{'data.cache': cache})
    again, _ = opening.from_config(config_, exp.config, seen=exp.names)
    assert again.config.data.cache == before
  message = f'data.cache={given}: this run began with data.cache={before}, .* because {why}'
  with pytest.raises(ValueError, match=message):
    config_ = photo_config(photos, **{'data.cache': given})
    opening.from_config(config_, exp.config, seen=exp.names)
  if before == 'memory':
    few(monkeypatch)
    with pytest.raises(ValueError, match='more than half of the'):
      opening.from_config(exp.config, exp.config, seen=exp.names)


CROPPED = {'augment.resized_crop.min_area': '0.3'}
DIGITS = {'data.source': 'digits', 'data.train_split': 'train[:40]', 'data.eval_split': 'test[:9]'}
ENLARGED = {'data.image_size': '64'}


@pytest.mark.slow
@pytest.mark.parametrize('name, overrides, cache', [
    ('photos', {}, 'memory'), ('photos', {'data.crop': '0.8'}, 'memory'),
    ('photos', {'augment.pad_crop.padding': '2'}, 'memory'), ('photos', CROPPED, 'stream'),
    ('photos', {'data.skip_bad_images': 'true'}, 'stream'),
    ('photos', ENLARGED, 'memory'),  # all are smaller, but of several sizes
    ('small', {}, 'memory'), ('small', {'data.crop': '0.8'}, 'memory'),
    ('small', ENLARGED, 'stream'),  # memory would augment them before enlarging them
    ('digits', {}, 'memory'), ('digits', {'data.image_size': '16'}, 'stream'),
    ('digits', {'data.image_size': '4'}, 'memory'), ('synthetic', {}, 'memory'),
])  # fmt: skip
def test_auto_selects_memory_only_if_batches_match_the_stream(
  photos, tmp_path, monkeypatch, name, overrides, cache
):
  if name == 'small':
    draw = np.random.RandomState(0)
    for i in range(24):
      file = tmp_path / 'photos' / 'ab'[i % 2] / f'{i}.png'
      file.parent.mkdir(parents=True, exist_ok=True)
      smooth(draw, 8, 8).save(file)
    overrides = {'data.source': f'folder:{tmp_path}/photos'} | overrides
  own = {'photos': {'data.source': f'folder:{photos}'}, 'digits': DIGITS}.get(name, {})
  settings = {'batch_size': '8', 'model.patch_size': '4'} | own | overrides
  config_ = small_config(**settings, **{'data.cache': 'auto'})
  exp, training = opening.from_config(config_)
  assert exp.config.data.cache == cache
  few(monkeypatch)
  streamed, streaming = opening.from_config(config_)
  assert streamed.config.data.cache == 'stream'
  assert streamed.task == exp.task
  same(take(streaming.train, 6, 8), take(training.train, 6, 8))
  over_batch = sharding.batch_sharding(devices.make_mesh(4))
  evaluated = lambda split: jax.device_get(list(batching.eval_batches(split, 4, over_batch)))
  same(evaluated(streaming.test), evaluated(training.test))
  images = take(training.train, 1, 8)[0]['image']
  seen = [e.normalize(e.augment(jax.random.key(0), np.arange(8), images)) for e in (exp, streamed)]
  np.testing.assert_array_equal(*seen)


def test_memory_keeps_small_images_and_the_device_enlarges_them(tmp_path):
  settings = DIGITS | {'data.image_size': '16', 'model.patch_size': '4', 'data.cache': 'memory'}
  exp, training = opening.from_config(small_config(**settings))
  assert exp.task.stored_size == training.train.size == training.test.size == (8, 8)
  assert exp.normalize(training.train.image_NHWC[:2]).shape == (2, 16, 16, 1)


@pytest.mark.parametrize('overrides', [
    {'data.crop': '0.8'}, {'data.interpolation': 'bilinear'},
    {'data.image_size': '16,24'}, {'data.image_size': '16,24', 'data.stretch': 'true'},
])  # fmt: skip
def test_small_images_in_memory_are_scaled_as_the_config_says(overrides):
  settings = DIGITS | {'data.image_size': '16', 'model.patch_size': '4'} | overrides
  exp, training = opening.from_config(small_config(**settings, **{'data.cache': 'memory'}))
  _, streaming = opening.from_config(small_config(**settings, **{'data.cache': 'stream'}))
  assert exp.task.stored_size == training.train.size == exp.image_shape[:2]
  some = streaming.test.some(range(9)).image_NHWC
  np.testing.assert_array_equal(training.test.image_NHWC, some)


def break_(file, how):
  whole = file.read_bytes()
  file.write_bytes({'empty': b'', 'cut': whole[: len(whole) // 2], 'text': b'not an image'}[how])


@pytest.mark.parametrize('how', ['empty', 'cut', 'text'])
@pytest.mark.parametrize('crop', [None, CROP])
def test_a_bad_file_is_named_or_replaced(photos, tmp_path, how, crop):
  shutil.copytree(photos, tmp_path / 'photos')
  source = sources.open_source(f'folder:{tmp_path}/photos', '', (8, 8))
  arguments = {'size': (8, 8), 'fit': image_lib.fit_image, 'crop': crop}
  good = take(stream_lib.open_stream(source, 'train', **arguments), 8, batch_size=8)
  names = [name for name, _, _ in source.read('train', range(60))]
  break_(tmp_path / 'photos' / names[41], how)
  message = f'{names[41]}: not a readable image .*Repair .* or .*skip_bad_images=True\\.'
  with pytest.raises(image_lib.BadImage, match=message):
    take(stream_lib.open_stream(source, 'train', **arguments), 8, batch_size=8)
  skipping = stream_lib.open_stream(source, 'train', skip_bad_images=True, **arguments)
  found = take(skipping, 8, batch_size=8)
  bad = np.concatenate([batch.pop('bad') for batch in found])
  place = np.flatnonzero(batching.train_plan(60, 8, 3, 0).examples(np.arange(64)) == 41)
  np.testing.assert_array_equal(np.flatnonzero(bad), place)
  batch, row = divmod(place[0], 8)
  _, _, label = next(source.read('train', [42]))
  assert found[batch]['label'][row] == label
  if crop is None:
    np.testing.assert_array_equal(found[batch]['image'][row], skipping.some([42]).image_NHWC[0])
  good[batch]['image'][row], good[batch]['label'][row] = found[batch]['image'][row], label
  same(found[: batch + 1], good[: batch + 1])


def test_a_label_without_a_class_is_named_or_replaced():
  read = functools.partial(bad_ones, {5, 6, IDS - 1})
  with pytest.raises(
    image_lib.BadImage, match=r'train/(5|6|22): label 24 is not one of the 23 classes'
  ):
    take(open_numbered(read), 8)
  found = take(open_numbered(read, skip_bad_images=True), IDS, batch_size=IDS)[0]
  order = batching.train_plan(IDS, IDS, 3, 0).examples(np.arange(IDS))
  instead = {5: (7, 2), 6: (7, 1), IDS - 1: (0, 1)}
  wanted = np.array([instead.get(i, (i, 0)) for i in order])
  np.testing.assert_array_equal(found['label'], wanted[:, 0])
  np.testing.assert_array_equal(found['bad'], wanted[:, 1])
  with pytest.raises(image_lib.BadImage, match='label 24') as found:  # all images are bad
    take(open_numbered(functools.partial(bad_ones, set(range(IDS))), skip_bad_images=True), 1)
  assert 'skip_bad_images' not in str(found.value)


def test_each_replaced_image_is_logged_once(caplog):
  stream_lib.WARNED.clear()
  bad = {5, 6, IDS - 1}
  take(open_numbered(functools.partial(bad_ones, bad), skip_bad_images=True), 3 * IDS)
  found = [record.getMessage() for record in caplog.records]
  for i in bad:
    assert found.count(f'train/{i}: label 24 is not one of the 23 classes, 0 to 22.') == 1


def test_threads_that_warn_at_the_same_time_log_once(caplog):
  stream_lib.WARNED.clear()
  ready = threading.Barrier(16)

  def warn(number):
    ready.wait()
    for i in range(200):
      stream_lib.warn(f'image {i} is bad')

  with concurrent.futures.ThreadPoolExecutor(16) as threads:
    list(threads.map(warn, range(16)))
  messages = [record.getMessage() for record in caplog.records]
  assert sorted(m for m in messages if m.startswith('image')) == sorted(
    f'image {i} is bad' for i in range(200)
  )


@pytest.mark.slow
def test_workers_log_replaced_images_too(capfd):
  read = functools.partial(bad_ones, {5})
  take(open_numbered(read, skip_bad_images=True, workers=1), IDS, batch_size=IDS)
  assert capfd.readouterr().err.count('train/5: label 24 is not one of the 23 classes') == 1


@pytest.mark.slow
def test_bad_images_are_left_out_of_evaluation_and_counted_in_training(photos, tmp_path):
  shutil.copytree(photos, tmp_path / 'photos')
  for file in ('train/ant/3.jpg', 'test/cat/2.jpg'):
    break_(tmp_path / 'photos' / file, 'cut')
  config_ = photo_config(tmp_path / 'photos', log_every='4', epochs='1.05')
  config_.data.skip_bad_images = True
  result = trainer.train(config_, tmp_path / 'run')
  assert result['examples'] == 20
  lines = [x for x in writer.read_metrics(tmp_path / 'run') if x['split'] == 'train']
  assert sum(line['bad_images'] for line in lines) in (1, 2)


@pytest.mark.slow_after_first
@pytest.mark.parametrize('overrides', [
  {'classifier': 'ridge', 'epochs': '0'},
  {'freeze': 'backbone'},
  {'freeze': 'backbone', 'sweep': '0.1', 'data.train_split': 'train[:70%]',
   'data.val_split': 'train[70%:]'},
])  # fmt: skip
def test_a_head_that_an_unreadable_image_stops_has_saved_its_config(
  photos, trained, tmp_path, overrides
):
  shutil.copytree(photos, tmp_path / 'photos')
  break_(tmp_path / 'photos' / 'train' / 'ant' / '3.jpg', 'cut')
  still = {'augment.resized_crop.min_area': '1', 'augment.flip.probability': '0'}
  config_ = photo_config(tmp_path / 'photos', init=str(trained[0]), **still | overrides)
  with pytest.raises(image_lib.BadImage, match='skip_bad_images=True'):
    trainer.train(config_, tmp_path / 'run')
  config_.data.skip_bad_images = True
  saved = resume.saved_config(tmp_path / 'run', {'data.skip_bad_images': 'true'})
  config_lib.check_same_run(saved, config_, 'here')
  result = trainer.train(saved, tmp_path / 'run')
  assert result['examples'] == 21


def test_content_of_a_stream_depends_on_the_labels():
  def renumbered(split, indices):
    for name, image_HWC, label in numbered(split, indices):
      yield name, image_HWC, (label + 1) % IDS

  before, after = (
    [(str(path), array.tobytes()) for path, array in open_numbered(read=read).content()]
    for read in (numbered, renumbered)
  )
  assert [i for i, (a, b) in enumerate(zip(before, after)) if a == b] == [0, 1]  # fit and code


def test_unreadable_file_changes_the_content_of_a_stream(photos, tmp_path):
  shutil.copytree(photos, tmp_path / 'photos')
  source = sources.open_source(f'folder:{tmp_path}/photos', '', (8, 8))
  strict, skipping = (
    stream_lib.open_stream(
      source, 'train', size=(8, 8), fit=image_lib.fit_image, skip_bad_images=skip
    )
    for skip in (False, True)
  )
  before = [array.tobytes() for _, array in skipping.content()]
  name, _, _ = next(source.read('train', [7]))
  pathlib.Path(name).unlink()
  after = [array.tobytes() for _, array in skipping.content()]
  assert [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b] == [2 + 7]
  with pytest.raises(image_lib.BadImage, match=f'{name}: No such file.*skip_bad_images=True'):
    list(strict.content())


@pytest.mark.slow
def test_features_and_pictures_skip_bad_images(photos, tmp_path):
  shutil.copytree(photos, tmp_path / 'photos')
  broken = tmp_path / 'photos' / 'test' / 'cat'
  for number in (2, 5):
    break_(broken / f'{number}.jpg', 'cut')
  found = {}
  for cache in ('memory', 'stream'):
    config_ = photo_config(tmp_path / 'photos', **{'data.cache': cache})
    config_.data.skip_bad_images = True
    exp, training = opening.from_config(config_)
    mesh, shape = devices.make_mesh(), (1, *exp.image_shape)
    params = exp.model.init(jax.random.key(0), np.zeros(shape, np.float32))['params']
    step = features.make_feature_step(exp, mesh)
    for _ in ('computed', 'read'):
      examples = features.cached_features(exp, step, params, training.test, mesh, tmp_path / cache)
      scores = subject_lib.answers(exp, params, training.test, mesh)
      found.setdefault(cache, []).append((examples, scores))
  assert len(list((tmp_path / 'stream').iterdir())) == 1
  for (examples, scores), (same_, same_scores) in zip(
    found['memory'], found['stream'], strict=True
  ):
    assert len(examples) == 19
    np.testing.assert_array_equal(same_.label_N, examples.label_N)
    np.testing.assert_allclose(same_.feature_ND, examples.feature_ND, atol=1e-6)
    np.testing.assert_array_equal(same_scores.label_N, examples.label_N)
    np.testing.assert_array_equal(same_scores.predicted_N, scores.predicted_N)
  shown = training.test.some(same_scores.index_N)
  loaded = memory.load_examples(training.test.source, 'test', (8, 8), skip_bad_images=True)
  np.testing.assert_array_equal(shown.image_NHWC, loaded.image_NHWC)


@pytest.mark.slow
def test_key_of_streamed_features_depends_on_the_decoding_code(photos, monkeypatch):
  exp, training = opening.from_config(photo_config(photos))
  params = jax.device_get(exp.model.init(jax.random.key(0), np.zeros((1, *exp.image_shape))))
  key = lambda: features.key(exp, params['params'], training.test)
  before = key()
  assert key() == before
  with monkeypatch.context() as other:
    other.setattr(PIL, '__version__', '0')
    assert key() != before
  monkeypatch.setattr(stream_lib.inspect, 'getsource', lambda module: f'# of {module.__name__}')
  assert key() != before


def resident():
  """Returns the bytes of memory that this process holds."""
  return int(pathlib.Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')


@pytest.mark.skipif(not pathlib.Path('/proc/self/statm').exists(), reason='needs /proc of Linux')
def test_streaming_does_not_use_more_and_more_memory(photos):
  source = sources.open_source(f'folder:{photos}', '', (128, 128))
  arguments = {'size': (128, 128), 'fit': image_lib.fit_image, 'crop': CROP, 'threads': 2}
  stream = stream_lib.open_stream(source, 'train', **arguments)
  over_batch = sharding.batch_sharding(devices.make_mesh(60))
  batches, held = batching.train_batches(stream, 60, 3, 0, over_batch), []
  for _ in range(45):  # each batch is an epoch of 3 MB
    next(batches)
    held.append(resident())
  batches.close()
  assert max(held[30:]) < 1.05 * max(held[:15])


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_run():
  over_batch = sharding.batch_sharding(devices.make_mesh(4))
  batches = batching.train_batches(open_numbered(workers=2), 4, 3, 0, over_batch)
  next(batches)
  multiprocessing.active_children()[0].kill()
  with pytest.raises(ValueError, match='A worker process that decodes images died.*code -9'):
    for _ in range(500):
      next(batches)
  assert not multiprocessing.active_children()


@pytest.mark.slow
def test_starting_worker_ignores_signals_to_the_job():
  def tell():
    while not (children := multiprocessing.active_children()):
      time.sleep(0.001)
    os.kill(children[0].pid, signal.SIGTERM)

  telling = threading.Thread(target=tell, daemon=True)
  telling.start()
  same(take(open_numbered(workers=1), 2), take(open_numbered(), 2))
  telling.join(1)
  assert not telling.is_alive()


@pytest.mark.slow
def test_script_without_main_guard_is_refused(tmp_path):
  script = """
from vit_jax.data import batching, image, sources, stream
from vit_jax.distributed import devices, sharding
source = sources.open_source('synthetic', '', (8, 8))
examples = stream.open_stream(source, 'train', size=(8, 8), fit=image.fit_image, workers=2)
next(batching.train_batches(examples, 8, 0, 0, sharding.batch_sharding(devices.make_mesh(8))))
"""
  (tmp_path / 'bare.py').write_text(script)
  environment = os.environ | {'PYTHONPATH': os.pathsep.join([str(ROOT), *sys.path])}
  command = [sys.executable, tmp_path / 'bare.py']
  result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
  assert result.returncode == 1
  assert "under `if __name__ == '__main__':`, or use data.workers=0" in result.stderr
  assert 'ValueError: A worker process that decodes images died' in result.stderr


@pytest.mark.slow
def test_workers_leave_nothing_behind(tmp_path):
  """Python would warn about resources that were not released when the process exits."""
  script = """
from vit_jax.data import batching, image, sources, stream
from vit_jax.distributed import devices, sharding
if __name__ == '__main__':
  source = sources.open_source('synthetic', '', (32, 32))
  examples = stream.open_stream(source, 'test[:45]', size=(32, 32), fit=image.fit_image, workers=2)
  over_batch = sharding.batch_sharding(devices.make_mesh(16))
  print(sum(1 for _ in batching.eval_batches(examples, 16, over_batch)))
"""
  (tmp_path / 'whole.py').write_text(script)
  environment = os.environ | {'PYTHONPATH': os.pathsep.join([str(ROOT), *sys.path])}
  command = [sys.executable, tmp_path / 'whole.py']
  result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
  assert result.stdout == '3\n' and 'resource_tracker' not in result.stderr


@pytest.mark.slow
def test_terminated_job_saves_and_leaves_no_worker(tmp_path):
  psutil = pytest.importorskip('psutil', reason='needed to list the workers of another process')
  settings = {
    'data.cache': 'stream', 'data.workers': '2', 'model.width': '16', 'model.depth': '1',
    'epochs': '1000', 'log_every': '1', 'eval_every': '0', 'checkpoint_every': '0',
  }  # fmt: skip
  flags = [f'--config.{key}={value}' for key, value in settings.items()]
  command = [sys.executable, 'main.py', '--config=tests/small.py', f'--workdir={tmp_path}/run']
  environment = os.environ | {'PYTHONPATH': os.pathsep.join([str(ROOT), *sys.path])}
  arguments = dict(cwd=ROOT, env=environment, start_new_session=True)
  with (tmp_path / 'log').open('w') as output:
    job = subprocess.Popen([*command, *flags], **arguments, stdout=output, stderr=output)
  try:
    until = time.monotonic() + 120
    metrics = tmp_path / 'run' / 'metrics.jsonl'
    while not (metrics.exists() and len(writer.read_metrics(tmp_path / 'run')) > 2):
      assert time.monotonic() < until and job.poll() is None, (tmp_path / 'log').read_text()
      time.sleep(0.05)
    workers = psutil.Process(job.pid).children(recursive=True)
    assert len([w for w in workers if 'spawn_main' in ' '.join(w.cmdline())]) == 2
    os.killpg(job.pid, signal.SIGTERM)  # the whole job at once
    assert job.wait(60) == 75, (tmp_path / 'log').read_text()
    assert not psutil.wait_procs(workers, timeout=10)[1]
  finally:
    job.kill()
  assert len(list((tmp_path / 'run' / 'checkpoints').iterdir())) == 1


def test_tfds_can_be_streamed(tmp_path):
  shutil.copytree(DATA / 'tfds', tmp_path, dirs_exist_ok=True)
  source = sources.open_source('tfds:mini', str(tmp_path), (8, 8))
  stream = stream_lib.open_stream(source, 'train', size=(8, 8), fit=image_lib.fit_image)
  loaded = memory.load_examples(source, 'train', (8, 8))
  same(take(stream, 4), take(loaded, 4))
  np.testing.assert_array_equal(stream.label_N, loaded.label_N)
  names = [name for name, _, _ in source.read('train', [4, 1, 1])]
  assert names == [f'tfds:mini/train/{i}' for i in (4, 1, 1)]
  tfds.open_records.cache_clear()  # cached records could still be read after the deletion
  next(tmp_path.rglob('*train*array_record-*')).unlink()
  with pytest.raises(ValueError, match='mini/train: .*shard is missing or damaged'):
    take(stream, 1)


def test_part_of_a_stream_matches_the_examples_in_memory(photos):
  source = sources.open_source(f'folder:{photos}', '', (8, 8))
  split, arguments = 'test+train[:5]', {'size': (8, 8), 'fit': image_lib.fit_image}
  stream = stream_lib.open_stream(source, split, **arguments)
  loaded = memory.load_examples(source, split, **arguments)
  assert len(stream) == len(loaded) == 26
  np.testing.assert_array_equal(stream.label_N, loaded.label_N)
  some, index = stream.some([25, 3, 21]), [25, 3, 21]
  np.testing.assert_array_equal(some.image_NHWC, loaded.image_NHWC[index])
  np.testing.assert_array_equal(some.label_N, loaded.label_N[index])
  both, whole = stream.joined(stream), loaded.joined(loaded)
  np.testing.assert_array_equal(both.some(range(52)).image_NHWC, whole.image_NHWC)
  assert [a.tobytes() for _, a in both.content()] != [a.tobytes() for _, a in stream.content()]


def test_opencvs_lack_of_memory_does_not_make_an_image_bad(monkeypatch, tmp_path):
  error = image_lib.opencv().error('Insufficient memory')
  error.code = -4

  def fail(*_):
    raise error

  monkeypatch.setattr(image_lib.opencv(), 'imdecode', fail)
  Image.new('RGB', (8, 8)).save(tmp_path / 'a.jpg')
  with pytest.raises(MemoryError, match='Insufficient memory'):
    image_lib.decode_part(
      (tmp_path / 'a.jpg').read_bytes(), '', 3, lambda *size: (0, 0, *size), (4, 4)
    )
