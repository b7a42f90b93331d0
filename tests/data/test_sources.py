"""Checks every source on real files: folder layouts, splits, formats and broken files."""

import collections
import concurrent.futures
import errno
import fcntl
import functools
import hashlib
import io
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
import types

import numpy as np
from PIL import Image, ImageOps
import pytest

from tests.conftest import DATA, ROOT
from vit_jax import limits, progress
from vit_jax.data import image as image_lib
from vit_jax.data import loading, memory, sources, splits, stream, tfds
from vit_jax.data.folder import Files
from vit_jax.data.source import Source, unlabelled

SIZES = {'train': 100, 'test': 20}


@pytest.mark.parametrize('spec, pieces', [
    ('train', [('train', 0, 100)]),
    ('train[:98%]', [('train', 0, 98)]),
    ('train[98%:]', [('train', 98, 100)]),
    ('test+train[:5]', [('test', 0, 20), ('train', 0, 5)]),
    ('train[-3:]', [('train', 97, 100)]),
    (' train[:5] + test ', [('train', 0, 5), ('test', 0, 20)]),
])  # fmt: skip
def test_split_notation(spec, pieces):
  assert splits.resolve(spec, SIZES) == pieces


def test_each_part_of_a_split_has_its_own_unit():
  positions = {'train': np.arange(100) / 100}
  found = splits.resolve('train[:10]+train[50%:]', SIZES, positions)
  assert found == [('train', 0, 10), ('train', 50, 100)]


@pytest.mark.parametrize('spec, message', [
    ('tran', 'Did you mean train'), ('train[5', 'train\\[5'), ('train[5:5]', 'no examples'),
    ('train[:101]', '101'), ('train[:60]+train[50:]', 'twice'), ('', 'split'),
])  # fmt: skip
def test_bad_splits_are_refused(spec, message):
  with pytest.raises(ValueError, match=message):
    splits.resolve(spec, SIZES)


def test_overlap():
  one = lambda spec: splits.resolve(spec, SIZES)
  assert splits.overlap(one('train'), one('train[98%:]'))
  assert not splits.overlap(one('train[:98%]'), one('train[98%:]+test'))


def test_digits_are_stratified():
  source = sources.open_source('digits', '', (8, 8))
  train, test = (memory.load_examples(source, split, (8, 8)) for split in SIZES)
  assert train.image_NHWC.shape == (1437, 8, 8, 1) and len(test) == 360
  both = np.concatenate([train.image_NHWC, test.image_NHWC]).reshape(1797, -1)
  assert both.max() == 255
  share = np.bincount(test.label_N) / np.bincount(np.concatenate([train.label_N, test.label_N]))
  np.testing.assert_allclose(share, 0.2, atol=0.005)


def test_digits_are_divided_as_in_every_version():
  """Otherwise, weights of an earlier version would be tested with their training images."""
  source = sources.open_source('digits', '', (8, 8))
  first = [[name for name, _, _ in source.read(split, np.arange(4))] for split in SIZES]
  want = [1346, 295, 257, 385], [1496, 188, 705, 820]
  assert first == [[f'digits/{i}' for i in numbers] for numbers in want]


def test_no_generated_test_image_is_a_training_image():
  source = sources.open_source('synthetic', '', (8, 8))
  images = [memory.load_examples(source, split, (8, 8)).image_NHWC for split in SIZES]
  assert len({image_HWC.tobytes() for image_HWC in np.concatenate(images)}) == 1024 + 256


def test_digit_levels_are_rounded_to_the_nearest_byte():
  train = memory.load_examples(sources.open_source('digits', '', (8, 8)), 'train', (8, 8))
  nearest = [(255 * level + 8) // 16 for level in range(17)]
  np.testing.assert_array_equal(np.unique(train.image_NHWC), nearest)


def make_folder(root, layout, count=12, size=(10, 8)):
  """Makes `count` images in each folder of `layout`, all different."""
  draw = np.random.RandomState(0)
  for folder in layout:
    (root / folder).mkdir(parents=True)
    for i in range(count):
      suffix = ('.png', '.PNG', '.jpg', '.JPEG', '.webp', '.bmp')[i % 6]
      pixels = draw.randint(0, 256, (*size, 3)).astype(np.uint8)
      Image.fromarray(pixels).save(root / folder / f'{i}{suffix}')
    (root / folder / 'notes.txt').write_text('not an image')


def load(root, split='train', size=(32, 32), **arguments):
  source = sources.open_source(f'folder:{root}', '', size)
  return source, memory.load_examples(source, split, size, **arguments)


@pytest.mark.parametrize('held_out', ['test', 'val', 'valid', 'validation'])
def test_a_folder_with_splits(tmp_path, held_out):
  make_folder(tmp_path, [f'{s}/{c}' for s in ('train', held_out) for c in ('cat', 'dog', 'ant')])
  source, train = load(tmp_path, size=(10, 8))
  assert source.class_names == ('ant', 'cat', 'dog')
  assert source.sizes == {'train': 36, 'test': 36}
  assert train.image_NHWC.shape == (36, 10, 8, 3)
  assert collections.Counter(train.label_N.tolist()) == {0: 12, 1: 12, 2: 12}
  assert len(set(train.label_N[:12].tolist())) == 3  # the classes are mixed


def test_the_first_of_two_test_folders_becomes_the_test_split(tmp_path):
  counts = {'train': 5, 'test': 2, 'val': 3}
  touch(tmp_path, [f'{s}/{c}/{i}.jpg' for s, n in counts.items() for c in 'ab' for i in range(n)])
  assert sources.open_source(f'folder:{tmp_path}', '', (4, 4)).sizes == {
    'train': 10, 'test': 4, 'val': 6
  }  # fmt: skip
  (test,) = members(tmp_path, 'test')
  assert {file.partition('/')[0] for file in test} == {'test'}


def touch(root, names):
  """Creates empty files, because a source checks only file names."""
  for name in names:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).touch()


def members(root, *specs):
  """Returns the files of each split, as paths relative to the root."""
  source = sources.open_source(f'folder:{root}', '', (4, 4))
  read = lambda spec: [source.read(name, range(a, b)) for name, a, b in source.pieces(spec)]
  paths = [[file for part in read(spec) for _, file, _ in part] for spec in specs]
  return [{str(file.relative_to(root)) for file in found} for found in paths]


@pytest.mark.parametrize('layout', ['', 'train/'])
def test_files_keep_their_split_when_other_files_change(tmp_path, layout):
  specs = 'train', 'test', 'train[:90%]', 'train[90%:]', 'test[:50%]'
  touch(tmp_path, [f'{layout}{c}/{c}{i}.jpg' for c in 'ab' for i in range(60)])
  before = members(tmp_path, *specs)
  assert all(before) and not before[0] & before[1] and not before[2] & before[3]
  assert before[0] == before[2] | before[3]
  files = sorted(set.union(*before))
  for file in files[::7]:
    (tmp_path / file).unlink()
  touch(tmp_path, [f'{layout}{c}/new{i}.jpg' for c in 'abc' for i in range(9)])
  moved = f'{layout}b/a1.jpg'  # to another class
  (tmp_path / layout / 'a' / 'a1.jpg').rename(tmp_path / moved)
  for was, now in zip(before, members(tmp_path, *specs)):
    old = {file for file in now if 'new' not in file}
    assert {file.replace(moved, f'{layout}a/a1.jpg') for file in old} == was - set(files[::7])


def test_a_fifth_of_a_plain_folder_is_held_out_and_slices_are_even(tmp_path):
  touch(tmp_path, [f'{c}/{c}{i}.jpg' for c in 'ab' for i in range(1000)])
  specs = 'test', 'train', *(f'train[{i}%:{i + 20}%]' for i in range(0, 100, 20)), 'train[99.5%:]'
  count = [len(found) for found in members(tmp_path, *specs)]
  assert count[0] == pytest.approx(400, abs=50) and count[0] + count[1] == 2000
  assert count[2:7] == pytest.approx([320] * 5, abs=50) and sum(count[2:7]) == count[1]
  assert 0 < count[7] < 20


def test_percentages_divide_the_held_out_files_evenly(tmp_path):
  touch(tmp_path, [f'{c}/{c}{i}.jpg' for c in 'ab' for i in range(1000)])
  half, rest, whole = map(len, members(tmp_path, 'test[:50%]', 'test[50%:]', 'test'))
  assert half + rest == whole and half == pytest.approx(rest, abs=60)


def test_images_with_the_same_name_fall_into_the_same_percentage(tmp_path):
  folders = [f'{split}/{c}' for split in ('train', 'test') for c in 'ab']
  touch(tmp_path, [f'{inside}/{i}.jpg' for inside in folders for i in range(40)])
  for percent in range(7, 97, 9):
    ones, others = members(tmp_path, f'train[:{percent}%]', f'train[{percent}%:]')
    assert len(ones) + len(others) == 80
    of = lambda files: {file.rpartition('/')[2] for file in files}
    assert not of(ones) & of(others)


def test_files_are_ordered_by_the_hash_of_their_names(tmp_path):
  """A run must resume in the same order; files in subfolders are included."""
  make_folder(tmp_path, ['train/a', 'train/b', 'train/b/deep/er', 'test/a', 'test/b'], count=6)
  os.symlink(tmp_path / 'train' / 'a' / '0.png', tmp_path / 'train' / 'b' / 'link.JPG')
  (tmp_path / 'train' / 'a' / os.fsdecode(b'na\xefve.jpg')).write_bytes(b'')
  (tmp_path / 'train' / 'a' / 'folder.png').mkdir()
  root = tmp_path / 'train'
  files = [file for file in root.rglob('*') if file.is_file()]
  files = [file for file in files if image_lib.has_image_name(file.name)]
  below = lambda file: os.fsencode(pathlib.PurePath(*file.relative_to(root).parts[1:])).lower()
  digest = lambda file: (hashlib.sha256(below(file)).digest(), file.relative_to(root).parts[0])
  source = sources.open_source(f'folder:{tmp_path}', '', (4, 4))
  assert source.sizes == {'train': 20, 'test': 12}
  read = list(source.read('train', range(20)))
  assert [name for name, _, _ in read] == list(map(str, sorted(files, key=digest)))
  assert [label for name, _, label in read] == ['/train/b/' in name for name, _, _ in read]
  assert all(str(file) == name and '/test/' not in name for name, file, _ in read)
  assert all('/test/' in name for name, _, _ in source.read('test', range(12)))


def test_classes_without_test_images_are_named(tmp_path):
  touch(tmp_path, [f'{c}/{c}{i}.jpg' for c in 'ab' for i in range(40)] + ['c/a0.jpg'])
  assert 'a/a0.jpg' in members(tmp_path, 'train')[0]
  source = sources.open_source(f'folder:{tmp_path}', '', (4, 4))
  assert [w for w in source.warnings if 'no test images for class c,' in w]


def test_test_folder_without_labels_is_refused_with_a_remedy(tmp_path):
  touch(tmp_path, [f'train/{c}/{c}{i}.jpg' for c in 'ab' for i in range(9)] + ['test/1.jpg'])
  rename = 'If the images in test/ have no labels, rename this folder'
  with pytest.raises(ValueError, match=f'no test images. Test images must be in .*{rename}'):
    sources.open_source(f'folder:{tmp_path}', '', (4, 4))
  touch(tmp_path, ['test/unknown/1.jpg'])
  with pytest.raises(ValueError, match=f"unknown 'unknown'. Valid: a, b. {rename}"):
    sources.open_source(f'folder:{tmp_path}', '', (4, 4))
  (tmp_path / 'test').rename(tmp_path / 'unlabelled')
  source = sources.open_source(f'folder:{tmp_path}', '', (4, 4))
  assert source.sizes['test'] and 'folders not used: unlabelled' in source.warnings[-1]


def test_folder_without_held_out_images_is_refused(tmp_path):
  touch(tmp_path, ['a/a0.jpg', 'b/b1.jpg'])
  with pytest.raises(ValueError, match='no test images.*Add images, or divide them'):
    sources.open_source(f'folder:{tmp_path}', '', (4, 4))
  held_out = next(f'{i}.jpg' for i in range(99) if splits.hash_name(f'{i}.jpg') / 2**64 < 0.2)
  touch(tmp_path, [f'c/{held_out}'])
  with pytest.raises(ValueError, match='all images of class c are held out'):
    sources.open_source(f'folder:{tmp_path}', '', (4, 4))


@pytest.mark.parametrize('kind', ['folder', 'images', 'labels'])
def test_names_that_classes_share_are_the_reason_for_an_uneven_split(tmp_path, kind):
  """Of the names 00000.png to 00029.png, the hash holds out only 00023.png."""

  def opened(count):
    touch(tmp_path / 'photos', [f'{c}/{i:05}.png' for i in range(count) for c in 'ab'])
    names = sorted(f'{p.parent.name}/{p.name}' for p in (tmp_path / 'photos').rglob('*.png'))
    table = '\n'.join(['path,label', *(f'{name},{name[0]}' for name in names)])
    (tmp_path / 'photos' / 'all.csv').write_text(table)
    path = tmp_path / 'photos' / ('all.csv' if kind == 'labels' else '')
    return sources.open_source(f'{kind}:{path}', '', (4, 4))

  with pytest.raises(ValueError, match='(no test images|split .test.).* 20 different names.*Give'):
    opened(20)
  assert [w for w in opened(30).warnings if 'holds out 3% of the images' in w and ' 30 diff' in w]
  touch(tmp_path / 'photos', [f'{c}/{c}{i}.png' for i in range(300) for c in 'ab'])
  assert not [w for w in opened(30).warnings if 'holds out' in w]


def test_fingerprint_depends_on_names_and_labels_of_the_training_split(tmp_path):
  make_folder(tmp_path / 'one', ['train/a', 'train/b', 'test/a', 'test/b'], count=6)
  opened = lambda name: sources.open_source(f'folder:{name}', str(tmp_path), (4, 4)).fingerprint
  before = opened('one')
  assert re.fullmatch('[0-9a-f]{16}', before)
  shutil.copytree(tmp_path / 'one', tmp_path / 'two')
  (tmp_path / 'two' / 'test' / 'a' / '0.png').rename(tmp_path / 'two' / 'test' / 'a' / 'z.png')
  assert opened('two') == before
  train = tmp_path / 'one' / 'train'
  for old, new in [('a/0.png', 'a/z.png'), ('a/z.png', 'b/z.png'), ('b/z.png', 'a/0.png')]:
    (train / old).rename(train / new)
    assert (opened('one') == before) == (new == 'a/0.png')


def test_broken_link_is_named(tmp_path):
  make_folder(tmp_path, ['a', 'b'])
  os.symlink('/nonexistent', tmp_path / 'a' / 'x.jpg')
  with pytest.raises(image_lib.BadImage, match=r'a/x\.jpg: No such file'):
    load(tmp_path, 'train+test')
  _, examples = load(tmp_path, 'train+test', skip_bad_images=True)
  assert len(examples) == 24 and len(examples.skipped) == 1


def test_unreadable_folder_is_named(tmp_path, monkeypatch):
  make_folder(tmp_path, ['a', 'b', 'b/deep'])
  scan = os.scandir

  def scandir(path):
    if pathlib.Path(path).name == 'deep':
      raise OSError(errno.EIO, 'Input/output error', path)
    return scan(path)

  monkeypatch.setattr(os, 'scandir', scandir)
  with pytest.raises(ValueError, match='b/deep: Input/output error'):
    sources.open_source(f'folder:{tmp_path}', '', (4, 4))


def test_a_long_listing_is_announced(tmp_path, monkeypatch, caplog):
  make_folder(tmp_path, ['a', 'b'])
  monkeypatch.setattr(progress, 'SOON', 0.0)
  monkeypatch.setattr(image_lib, 'has_image_name', lambda name: not time.sleep(0.01))
  with caplog.at_level('INFO', logger='vit_jax'):
    sources.open_source(f'folder:{tmp_path}', '', (4, 4))
  assert f'Listing the images in {tmp_path} ...' in caplog.text


def test_common_size_is_found_if_all_images_share_a_smaller_size(tmp_path):
  make_folder(tmp_path, ['a', 'b'])  # of 10x8 pixels
  source = sources.open_source(f'folder:{tmp_path}', '', (16, 12))
  own_size = lambda *size: memory.common_size(source, 'train+test', size)
  assert own_size(16, 12) == own_size(10, 9) == (10, 8)
  assert own_size(10, 8) is own_size(9, 9) is own_size(16, 7) is None
  (tmp_path / 'a' / '0.png').write_bytes(b'of no size')
  assert own_size(16, 12) == (10, 8)


def test_images_of_several_sizes_have_no_common_size(tmp_path):
  make_folder(tmp_path, ['a', 'b'])
  turned = Image.Exif()
  turned[0x0112] = 6
  Image.new('RGB', (10, 8), 'red').save(tmp_path / 'a' / 'z.png', exif=turned)  # 10x8, upright
  source = sources.open_source(f'folder:{tmp_path}', '', (16, 12))
  assert memory.common_size(source, 'train+test', (16, 12)) == (10, 8)
  Image.new('RGB', (9, 7), 'red').save(tmp_path / 'a' / 'y.png')
  source = sources.open_source(f'folder:{tmp_path}', '', (16, 12))
  assert memory.common_size(source, 'train+test', (16, 12)) is None
  assert load(tmp_path, 'train+test', (16, 12))[1].image_NHWC.shape == (26, 16, 12, 3)


def test_image_modes_and_exif_rotation_are_handled(tmp_path):
  pixels = np.zeros((4, 6, 3), np.uint8)
  pixels[0] = 255
  upright = np.asarray(Image.fromarray(pixels))
  rotated = Image.fromarray(np.rot90(pixels, 1).copy())
  exif = Image.Exif()
  exif[0x0112] = 6  # shown turned clockwise
  rotated.save(tmp_path / 'exif.png', exif=exif)
  Image.fromarray(pixels).convert('CMYK').save(tmp_path / 'cmyk.jpg', quality=100, subsampling=0)
  Image.fromarray(pixels).convert('P').save(tmp_path / 'palette.png')
  Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / 'sixteen.png')
  clear = np.concatenate([pixels, np.full((4, 6, 1), 255, np.uint8)], axis=2)
  clear[0, :, 3] = 0
  clear[0, :, :3] = 0
  Image.fromarray(clear).save(tmp_path / 'clear.png')
  for file in tmp_path.iterdir():
    image = image_lib.decode_image(file.read_bytes(), file)
    assert image.mode == 'RGB'
    np.testing.assert_allclose(np.asarray(image).astype(int), upright, atol=8, err_msg=file.name)
  assert image_lib.decode_image((tmp_path / 'palette.png').read_bytes(), '', channels=1).mode == 'L'


@pytest.mark.parametrize('orientation', range(1, 9))
def test_header_size_is_the_size_of_the_upright_image(orientation):
  exif, file = Image.Exif(), io.BytesIO()
  exif[0x0112] = orientation
  Image.new('RGB', (10, 8)).save(file, 'PNG', exif=exif)
  height, width = image_lib.upright_size(file.getvalue(), 'a.png')
  assert (width, height) == image_lib.decode_image(file.getvalue(), 'a.png').size


def with_exif(suffix, exif):
  """Returns the bytes of an image of noise, 24x16 pixels, with the given EXIF data."""
  file, pixels = io.BytesIO(), np.random.RandomState(0).randint(0, 256, (16, 24, 3))
  quality = {} if suffix == 'png' else {'quality': 95, 'dpi': (72, 72)}
  Image.fromarray(pixels.astype(np.uint8)).save(file, suffix, exif=exif, **quality)
  return file.getvalue()


def decoded(encoded, shape):
  """Decodes a file with an upright image of the shape (height, width) in all ways."""
  whole = lambda height, width: (0, 0, width, height)
  assert image_lib.upright_size(encoded, 'a') == shape
  part_HWC = image_lib.decode_part(encoded, 'a', 3, whole, shape)
  return np.asarray(image_lib.decode_image(encoded, 'a')), part_HWC


@pytest.mark.parametrize('orientation', range(10))  # 0 and 9 have no meaning
@pytest.mark.parametrize('suffix', ['jpeg', 'png', 'webp'])
def test_images_are_turned_as_by_pillow(suffix, orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  encoded = with_exif(suffix, exif)
  wanted = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))))
  whole, part = decoded(encoded, wanted.shape[:2])
  np.testing.assert_array_equal(whole, wanted)
  assert np.abs(part.astype(int) - wanted).max() <= 4


@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
@pytest.mark.parametrize('suffix', ['jpeg', 'png', 'webp'])
@pytest.mark.parametrize('exif', [
    b'damaged', b'II+\0' + bytes(40), b'II*\0', b'MM\0*\xff\xff\xff\xff', b'II*\0\x08\0\0\0\x09',
    b'II*\0\x08\0\0\0\1\0\x12\1\0\0\1\0\0\0\6\0\0\0\0\0\0\0',  # an orientation of an unknown type
], ids=range(6))  # fmt: skip
def test_an_image_with_damaged_exif_data_is_upright(suffix, exif):
  encoded = with_exif(suffix, b'Exif\0\0' + exif)
  wanted = np.asarray(Image.open(io.BytesIO(encoded)).convert('RGB'))
  whole, part = decoded(encoded, (16, 24))
  np.testing.assert_array_equal(whole, wanted)
  assert np.abs(part.astype(int) - wanted).max() <= 4


def test_a_cut_png_without_exif_data_is_refused():
  encoded = with_exif('png', None)[:-200]
  for read in (image_lib.upright_size, image_lib.decode_image):
    with pytest.raises(image_lib.BadImage, match='a.png: not a readable image'):
      read(encoded, 'a.png')


def test_fit_covers_and_crops_the_centre():
  wide = np.zeros((8, 24, 3), np.uint8)
  wide[:, 8:16] = 200
  out = image_lib.fit_image(Image.fromarray(wide), (8, 8))
  assert out.shape == (8, 8, 3) and (out == 200).all()


def test_a_transparent_level_of_16_bit_grey_becomes_white():
  level = np.array([[0, 257 * 7, 257 * 7 + 1], [65535, 257 * 9, 257 * 7]], np.uint16)
  stream = io.BytesIO()
  Image.fromarray(level).save(stream, format='PNG', transparency=257 * 7)
  shown = np.asarray(image_lib.decode_image(stream.getvalue(), 'grey.png', channels=1))
  assert shown.tolist() == [[0, 255, 7], [255, 9, 255]]


def test_16_bit_grey_is_scaled_to_8_bits_exactly():
  grey, file = np.arange(256, dtype=np.uint16).reshape(16, 16), io.BytesIO()
  Image.fromarray(grey * 257).save(file, 'png')
  np.testing.assert_array_equal(image_lib.decode_image(file.getvalue(), '', channels=1), grey)


@pytest.mark.parametrize('stretch', [False, True])
def test_image_of_the_requested_size_is_cropped_too(stretch):
  image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (8, 8, 3)).astype(np.uint8))
  out = image_lib.fit_image(image, (8, 8), crop=0.5, stretch=stretch)
  centre = image.resize((8, 8), Image.Resampling.BICUBIC, box=(2, 2, 6, 6))
  np.testing.assert_array_equal(out, np.asarray(centre))


@pytest.mark.parametrize('stretch, box', [(False, (9, 4, 39, 28)), (True, (6, 4, 42, 28))])
@pytest.mark.parametrize('name', image_lib.INTERPOLATIONS)
def test_every_filter_scales_the_centre_like_pillows(name, stretch, box):
  image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (32, 48, 3)).astype(np.uint8))
  out = image_lib.fit_image(image, (8, 10), name, crop=0.75, stretch=stretch)
  want = image.resize((10, 8), Image.Resampling[name.upper()], box)
  np.testing.assert_array_equal(out, np.asarray(want))


def test_an_array_of_the_requested_size_is_cropped_like_a_file():
  source = sources.open_source('digits', '', (8, 8))
  fit = functools.partial(image_lib.fit_image, crop=0.5)
  whole, found = (
    memory.load_examples(source, 'test[:9]', (8, 8), fit=f).image_NHWC
    for f in (image_lib.fit_image, fit)
  )
  want = [fit(Image.fromarray(image_HWC[..., 0]), (8, 8)) for image_HWC in whole]
  np.testing.assert_array_equal(found, want)
  streamed = stream.open_stream(source, 'test', size=(8, 8), fit=fit)
  np.testing.assert_array_equal(streamed.some(range(9)).image_NHWC, want)


def test_labels_outside_of_the_classes_are_refused_or_skipped():
  """TFDS gives the label -1 to the images of a test split whose labels are secret."""
  labels = [0, 2, 1, -1, 1]

  def read(split, indices):
    for i in indices:
      yield str(i), np.full((4, 4, 3), i, np.uint8), labels[i]

  source = Source({'test': 5}, ('a', 'b'), 3, read)
  for split, label in (('test[1:3]', 2), ('test[2:4]', -1)):
    with pytest.raises(image_lib.BadImage, match=f'label {label} is not one of the 2 classes'):
      memory.load_examples(source, split, (4, 4))
  examples = memory.load_examples(source, 'test', (4, 4), skip_bad_images=True)
  assert examples.image_NHWC[:, 0, 0, 0].tolist() == [0, 2, 4]
  assert examples.label_N.tolist() == [0, 1, 1] and len(examples.skipped) == 2


def test_bad_images_raise_or_are_skipped(tmp_path):
  make_folder(tmp_path, ['a', 'b'])
  good = (tmp_path / 'a' / '0.png').read_bytes()
  (tmp_path / 'a' / 'cut.png').write_bytes(good[: len(good) // 2])
  (tmp_path / 'b' / 'empty.jpg').write_bytes(b'')
  message = r'(cut\.png|empty\.jpg): not a readable image .*Repair .* or .*skip_bad_images=True\.$'
  with pytest.raises(image_lib.BadImage, match=message):
    load(tmp_path, 'train+test')
  _, examples = load(tmp_path, 'train+test', skip_bad_images=True)
  assert len(examples) == 24 and len(examples.skipped) == 2
  assert sorted(message.split(':')[0].rpartition('/')[2] for message in examples.skipped) == [
      'cut.png', 'empty.jpg',
  ]  # fmt: skip


@pytest.mark.parametrize('failing, error', [
    ((pathlib.Path, 'read_bytes'), OSError(errno.EMFILE, os.strerror(errno.EMFILE), 'a/0.png')),
    ((pathlib.Path, 'read_bytes'), OSError(errno.EIO, os.strerror(errno.EIO), 'a/0.png')),
    ((pathlib.Path, 'read_bytes'), OSError(errno.ENOTCONN, 'not connected', 'a/0.png')),
    ((Image.Image, 'convert'), MemoryError()),
    ((Image.Image, 'getexif'), MemoryError()),
])  # fmt: skip
def test_no_image_is_skipped_if_memory_or_files_run_out(tmp_path, monkeypatch, failing, error):
  make_folder(tmp_path, ['train/a', 'train/b', 'test/a'], count=2)

  def fail(*arguments, **named):
    raise error

  monkeypatch.setattr(*failing, fail)
  with pytest.raises(type(error)) as caught:
    load(tmp_path, skip_bad_images=True)
  assert not isinstance(caught.value, image_lib.BadImage)
  if isinstance(error, MemoryError):
    assert str(caught.value).startswith('Reading images ran out of memory')


def test_skipped_images_are_named_in_a_warning(caplog):
  blank = np.zeros((2, 4, 4, 3), np.uint8)
  examples = memory.Examples(blank, np.zeros(2, np.int32), ('a.png: empty file.', 'b.png: cut.'))
  loading.report_split('val', examples)
  found = [record.getMessage() for record in caplog.records if record.levelname == 'WARNING']
  assert found == ['val: skipped 2 bad images:', '  a.png: empty file.', '  b.png: cut.']
  loading.report_split('test', None)  # a run without this split


@pytest.mark.parametrize('layout, message', [
    ([], '0 class folders'), (['a'], '1 class folders'), (['train/a', 'train/b', 'test/c'], "'c'"),
])  # fmt: skip
def test_bad_folders_are_refused(tmp_path, layout, message):
  make_folder(tmp_path, layout)
  with pytest.raises(ValueError, match=message):
    sources.open_source(f'folder:{tmp_path}', '', (4, 4))


def test_a_class_named_train_is_explained(tmp_path):
  touch(tmp_path, [f'{name}/{i}.jpg' for name in ('bus', 'car', 'train') for i in range(20)])
  for inside in ('none', 'steam'):
    (tmp_path / 'notes').mkdir(exist_ok=True)  # without images
    with pytest.raises(ValueError) as caught:
      sources.open_source(f'folder:{tmp_path}', '', (4, 4))
    message = str(caught.value)
    assert 'train/ was read as the training split' in message and f'({inside})' in message
    assert 'Folders next to it have images: bus, car. If train is a class, rename' in message
    assert 'labels:<csv>' in message
    touch(tmp_path, ['train/steam/20.jpg'])
  (tmp_path / 'train').rename(tmp_path / 'trains')
  shutil.rmtree(tmp_path / 'notes')
  assert sources.open_source(f'folder:{tmp_path}', '', (4, 4)).class_names == (
    'bus', 'car', 'trains',
  )  # fmt: skip


def test_a_training_split_with_too_few_classes_is_refused_as_such(tmp_path):
  touch(tmp_path, ['train/a/0.jpg', 'test/a/0.jpg'])
  (tmp_path / 'notes').mkdir()
  with pytest.raises(ValueError, match=r'found 1 class folders \(a\)'):
    sources.open_source(f'folder:{tmp_path}', '', (4, 4))


def test_files_other_than_images_are_counted_in_a_warning(tmp_path):
  images = [f'{s}/{c}/{i}.jpg' for s in ('train', 'test') for c in 'ab' for i in range(2)]
  others = ['a.gif', 'b.GIF', 'c.tif', 'd.heic', 'e', '.hidden.gif']
  others = [f'train/a/{name}' for name in others] + ['test/b/f.gif', 'held/a/0.jpg']
  touch(tmp_path, images + others)
  warnings = sources.open_source(f'folder:{tmp_path}', '', (4, 4)).warnings
  assert len(warnings) == 2
  assert '6 files are not used: 3 .gif, 1 .heic, 1 .tif, 1 without an extension.' in warnings[0]
  assert 'folders not used: held. Test images are read from the folders test, val' in warnings[1]


def test_images_outside_of_class_folders_are_named_in_warnings(tmp_path):
  touch(tmp_path, [f'{c}/{c}{i}.jpg' for c in 'ab' for i in range(20)] + ['1.jpg', '2.jpg'])
  (warning,) = sources.open_source(f'folder:{tmp_path}', '', (4, 4)).warnings
  assert warning.startswith(f'{tmp_path}: images not used: 1.jpg, 2.jpg. ')
  used = [f'{split}/{c}/0.jpg' for split in ('train', 'test') for c in 'ab']
  touch(tmp_path / 'new', [*used, '1.jpg', 'train/2.jpg', 'test/3.jpg', 'test/.4.jpg'])
  warnings = sources.open_source(f'folder:{tmp_path}/new', '', (4, 4)).warnings
  assert [text.partition('. ')[0] for text in warnings] == [
    f'{tmp_path}/new: images not used: 1.jpg',
    f'{tmp_path}/new/train: images not used: 2.jpg',
    f'{tmp_path}/new/test: images not used: 3.jpg',
  ]


def test_the_unicode_form_of_a_class_folder_does_not_matter(tmp_path):
  composed, decomposed = 'M\u00f6we', 'Mo\u0308we'  # a Mac may store the second form
  both = [f'train/{decomposed}/{i}.jpg' for i in range(3)] + [f'train/{composed}/3.jpg']
  touch(tmp_path, [*both, 'train/Mp/0.jpg', f'test/{composed}/0.jpg', 'test/Mp/0.jpg'])
  source = sources.open_source(f'folder:{tmp_path}', '', (4, 4))
  assert source.class_names == ('Mp', composed)
  labels = {os.fsdecode(path): label for path, label in zip(
    source.files['train'].path_N.tolist(), source.files['train'].label_N.tolist())}  # fmt: skip
  assert labels == {path.removeprefix('train/'): 1 for path in both} | {'Mp/0.jpg': 0}


@pytest.mark.parametrize('top', ['', 'train'])
def test_folders_that_are_no_classes_are_named_in_a_warning(tmp_path, top):
  splits = ('train', 'test') if top else ('',)
  for split in splits:
    touch(tmp_path / split, [f'{c}/{i}.jpg' for c in 'ab' for i in range(20)])
  touch(tmp_path / top, ['__MACOSX/0.jpg'])
  os.symlink('.', tmp_path / top / 'c')
  os.symlink(tmp_path, tmp_path / top / 'd')
  os.symlink('a', tmp_path / top / 'e')  # a link to another folder is a class
  source = sources.open_source(f'folder:{tmp_path}', '', (4, 4))
  assert source.class_names == ('a', 'b', 'e') and source.sizes['train'] <= 60
  wanted = f'{tmp_path / top}: folders not used: __MACOSX, c, d. Each of them is a link '
  assert any(warning.startswith(wanted) for warning in source.warnings), source.warnings


@pytest.mark.parametrize('kind', ['folder', 'images'])
def test_links_to_folders_are_followed_once(tmp_path, kind):
  root = tmp_path / 'photos'
  touch(root, [f'{c}/{c}{i}.jpg' for c in 'ab' for i in range(20)])
  touch(tmp_path, ['other/linked.jpg', 'other/.hidden/0.jpg', 'other/__MACOSX/0.jpg'])
  os.symlink(tmp_path / 'other', root / 'a' / 'link')
  os.symlink('..', root / 'a' / 'up')
  os.symlink(root / 'a', tmp_path / 'other' / 'back')  # a circle through two links
  source = sources.open_source(f'{kind}:{root}', '', (4, 4))
  paths = [path for split, n in source.sizes.items() for _, path, _ in source.read(split, range(n))]
  assert len(paths) == 41 and root / 'a' / 'link' / 'linked.jpg' in paths


@pytest.mark.parametrize('folders, named', [
    (['valid', 'validation'], True), (['test', 'val'], False), (['validation'], False),
])  # fmt: skip
def test_a_warning_tells_which_of_several_folders_is_the_test(tmp_path, folders, named):
  touch(tmp_path, [f'{s}/{c}/{i}.jpg' for s in ('train', *folders) for c in 'ab' for i in range(2)])
  warnings = sources.open_source(f'folder:{tmp_path}', '', (4, 4)).warnings
  message = f"{tmp_path}: valid/ is the split 'test', validation/ is the split 'validation'."
  assert warnings == ((message,) if named else ())


def test_a_jfif_file_is_an_image(tmp_path):
  make_folder(tmp_path, ['train/a', 'train/b', 'test/a', 'test/b'], count=2)
  Image.new('RGB', (4, 4)).save(tmp_path / 'train' / 'a' / 'x.jfif', 'jpeg')
  _, train = load(tmp_path)
  assert len(train) == 5


def test_class_without_a_test_folder_is_named(tmp_path):
  touch(tmp_path, ['train/a/0.jpg', 'train/b/0.jpg', 'test/a/0.jpg'])
  source = sources.open_source(f'folder:{tmp_path}', '', (4, 4))
  assert source.sizes == {'train': 2, 'test': 1}
  assert source.warnings == (
    f'{tmp_path}: no test images for class b, so the test covers only other classes.',
  )


def test_path_without_folder_prefix_is_refused_with_a_remedy(tmp_path):
  touch(tmp_path, ['a/0.jpg'])
  for spec, data_dir in ((str(tmp_path), ''), (tmp_path.name, str(tmp_path.parent))):
    with pytest.raises(ValueError, match=f'write folder:{spec} to read a folder of images'):
      sources.open_source(spec, data_dir, (4, 4))


def test_an_absent_or_empty_folder_is_refused(tmp_path):
  with pytest.raises(ValueError, match='no folder'):
    sources.open_source(f'folder:{tmp_path}/nothing', '', (4, 4))
  with pytest.raises(ValueError, match="'folder:' has no path. Write folder:<path"):
    sources.open_source('folder:', str(tmp_path), (4, 4))
  for name in 'ab':
    (tmp_path / name).mkdir()
  with pytest.raises(ValueError, match='no images for class a, b'):
    sources.open_source(f'folder:{tmp_path}', '', (4, 4))


@pytest.mark.filterwarnings('ignore:Corrupt EXIF', 'ignore::UserWarning')
def test_image_with_too_many_pixels_is_not_decoded(monkeypatch):
  encoded = io.BytesIO()
  Image.new('1', (300, 200)).save(encoded, 'png')
  assert image_lib.decode_image(encoded.getvalue(), 'a.png', max_pixels=60_000).size == (300, 200)
  monkeypatch.setattr(Image.Image, 'load', None)  # only the header is read
  with pytest.raises(image_lib.BadImage, match='a.png.*300x200 pixels, at most 59,999'):
    image_lib.decode_image(encoded.getvalue(), 'a.png', max_pixels=59_999)
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 29_999)
  with pytest.raises(image_lib.BadImage, match='a.png.*more than 59,998 pixels: make the image'):
    image_lib.decode_image(encoded.getvalue(), 'a.png')


def test_large_images_are_decoded_without_a_warning(tmp_path):
  Image.new('1', (30, 20)).save(tmp_path / 'a.png')
  program = 'import pathlib, sys; from PIL import Image; from vit_jax.data import decode_image; '
  program += 'Image.MAX_IMAGE_PIXELS = 599; '
  program += 'print(decode_image(pathlib.Path(sys.argv[1]).read_bytes(), "a").size)'
  command = [sys.executable, '-c', program, tmp_path / 'a.png']
  ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
  assert (ended.stdout, ended.stderr) == ('(30, 20)\n', '')


@pytest.mark.parametrize('encoded, kind', [
    (b'GIF89a', 'GIF'), (b'II*\0', 'TIFF'), (b'MM\0*', 'TIFF'), (b'\0\0\0\x18ftypheic', 'HEIC'),
])  # fmt: skip
def test_a_file_in_another_format_is_named(encoded, kind):
  with pytest.raises(image_lib.BadImage, match=rf'\(a {kind} file: convert it to JPEG or PNG\)'):
    image_lib.decode_image(encoded + bytes(40), 'photo.jpg')


@pytest.mark.parametrize('kind', ['folder', 'images'])
def test_a_workdir_in_a_folder_of_classes_is_refused(tmp_path, kind):
  (tmp_path / 'photos' / 'cat').mkdir(parents=True)
  for workdir in (tmp_path / 'photos', tmp_path / 'photos' / 'runs' / 'a'):
    with pytest.raises(ValueError, match='must not be in the image folder'):
      sources.check_apart(f'{kind}:photos', str(tmp_path), workdir)
  sources.check_apart(f'{kind}:photos', str(tmp_path), tmp_path / 'run')
  (tmp_path / 'photos' / 'train').mkdir()  # classes are in train/ and test/
  sources.check_apart(f'{kind}:photos', str(tmp_path), tmp_path / 'photos' / 'run')
  for inside in ('train/cat/run', 'test/run'):
    with pytest.raises(ValueError, match='must not be in the image folder'):
      sources.check_apart(f'{kind}:photos', str(tmp_path), tmp_path / 'photos' / inside)
  sources.check_apart('digits', '', tmp_path)


def test_corrupt_files_raise_only_bad_image(tmp_path):
  """Randomly changed bytes give an image, or a BadImage that names the file, and nothing else."""
  draw, refused = np.random.RandomState(0), 0
  for suffix in ('png', 'jpg', 'webp', 'bmp'):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = tmp_path / f'image.{suffix}'
    noise = Image.fromarray(draw.randint(0, 256, (12, 12, 3)).astype(np.uint8))
    noise.save(file, **({} if suffix == 'bmp' else {'exif': exif}))
    whole = file.read_bytes()
    for _ in range(60):
      broken = bytearray(whole)
      for position in draw.randint(0, len(whole), 4):
        broken[position] = draw.randint(256)
      try:
        image_lib.decode_image(bytes(broken), file)
      except image_lib.BadImage as error:
        refused += 1
        assert str(error).startswith(f'{file}: not a readable image (')
  assert refused > 10


def test_hidden_files_are_ignored(tmp_path):
  make_folder(tmp_path, ['a', 'b'])
  (tmp_path / 'a' / '._0.png').write_bytes(b'a resource file of macOS')
  (tmp_path / 'b' / 'x' / '.thumbnails').mkdir(parents=True)
  shutil.copy(tmp_path / 'b' / '0.png', tmp_path / 'b' / 'x' / '.thumbnails' / '9.png')
  _, examples = load(tmp_path, 'train+test')
  assert len(examples) == 24


def test_splits_that_together_fill_more_than_half_of_the_memory_are_refused(monkeypatch):
  source = Source({'train': 30, 'test': 20}, ('a', 'b'), 3, None)
  monkeypatch.setattr(limits, 'limit', lambda: 2 * 40 * 10 * 10 * 3)
  for names in (['train'], ['test'], ['train', 'test[:10]']):
    memory.check_memory(source, names, (10, 10))
  with pytest.raises(ValueError, match=r'^train, test: 50 images of 10x10 need .*train\[:10%\]'):
    memory.check_memory(source, ['train', 'test'], (10, 10))


def test_the_processes_on_one_host_share_its_memory(monkeypatch):
  source = Source({'train': 30, 'test': 20}, ('a', 'b'), 3, None)
  monkeypatch.setattr(limits, 'limit', lambda: 2 * 40 * 10 * 10 * 3)
  reading = loading.Reading('auto', image_lib.fit_image)
  assert loading.decide_cache(reading, source, ['train'], (10, 10)) == 'memory'
  monkeypatch.setattr(memory, 'from_all', lambda host: [host, 'another host', host])
  memory.check_memory(source, ['test'], (10, 10))
  with pytest.raises(ValueError, match='train: 30 images .* memory that each process can use'):
    memory.check_memory(source, ['train'], (10, 10))
  assert loading.decide_cache(reading, source, ['train'], (10, 10)) == 'stream'


def test_the_process_with_the_least_memory_decides_the_cache(monkeypatch):
  source = Source({'train': 30}, ('a', 'b'), 3, None)
  monkeypatch.setattr(memory, 'memory_share', lambda: 2 * 40 * 10 * 10 * 3)
  monkeypatch.setattr(loading, 'from_all', lambda share: [share, share / 2])
  reading = loading.Reading('auto', image_lib.fit_image)
  assert loading.decide_cache(reading, source, ['train'], (10, 10)) == 'stream'


def test_only_the_cores_of_this_process_decode(monkeypatch):
  monkeypatch.setattr(memory, 'num_cores', lambda: 1)
  threads = set()

  def fit(image, size):
    time.sleep(0.001)  # another thread would take the next image
    threads.add(threading.get_ident())
    return image_lib.fit_image(image, size)

  memory.load_examples(sources.open_source('digits', '', (8, 8)), 'test[:40]', (8, 8), fit=fit)
  assert len(threads) == 1


def test_a_fingerprint_of_many_labels_needs_little_memory():
  draw = np.random.RandomState(0)
  label_NL = (draw.rand(500, 2000) < 0.002).astype(np.uint8)
  paths = [f'{i}.jpg'.encode() for i in range(500)]
  files = Files(None, np.array(paths), label_NL, np.arange(500, dtype=np.uint64))
  digest = hashlib.sha256()
  for path, label_L in zip(paths, label_NL):
    digest.update(','.join(map(str, np.flatnonzero(label_L))).encode() + b' ' + path + b'\0')
  tracemalloc.start()
  assert files.fingerprint() == digest.hexdigest()[:16]
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < label_NL.nbytes  # as a list of numbers, the labels need 8 times as much


@pytest.mark.parametrize(
  ('groups', 'files', 'limit'),
  [
    ('', {}, 2**40),  # no cgroup: the limit is the machine's
    ('0::/', {'memory.max': '5000'}, 5000),
    ('0::/a/b', {'a/b/memory.max': 'max', 'a/memory.max': '7000', 'memory.max': '9000'}, 7000),
    ('0::/a/b', {'a/b/memory.max': '6000', 'a/memory.max': '7000'}, 6000),
    ('0::/host/path', {'memory.max': '5000'}, 5000),  # a container does not see this path
    ('0::/a', {'a/memory.max': 'max'}, 2**40),
    (
      '12:cpu,cpuacct:/job\n4:memory:/job/step\n0::/',
      {'memory/job/memory.limit_in_bytes': '8000', 'memory/memory.limit_in_bytes': f'{2**62}'},
      8000,
    ),
    ('4:memory:/docker/1', {'memory/memory.limit_in_bytes': '4000'}, 4000),
    ('4:cpuset:/job', {'memory/job/memory.limit_in_bytes': '8000'}, 2**40),  # not a memory group
  ],
)
def test_memory_limit_is_the_smallest_of_machine_and_cgroups(
  tmp_path, monkeypatch, groups, files, limit
):
  monkeypatch.setattr(os, 'sysconf', {'SC_PAGE_SIZE': 4096, 'SC_PHYS_PAGES': 2**28}.get)
  if groups:
    (tmp_path / 'proc/self').mkdir(parents=True)
    (tmp_path / 'proc/self/cgroup').write_text(f'{groups}\n')
  for name, text in files.items():
    (tmp_path / 'sys/fs/cgroup' / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / 'sys/fs/cgroup' / name).write_text(f'{text}\n')
  assert limits.limit(tmp_path) == limit


LOAD = """
import resource, sys
from vit_jax.data import memory, sources
source = sources.open_source('folder:' + sys.argv[1], '', (0, 0))
count = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
memory.load_examples(source, 'test', (256, 256), skip_bad_images=True)  # loads modules and decoders
before = count()
train = memory.load_examples(source, 'train', (256, 256), skip_bad_images=True)
print(train.image_NHWC.nbytes, len(train.skipped), count() - before)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='other systems use other units for ru_maxrss')
def test_loading_needs_little_more_memory_than_the_split(tmp_path):
  source = np.random.RandomState(0).randint(0, 256, (8, 8, 3)).astype(np.uint8)
  for split, count in (('train', 150), ('test', 2)):
    for name in ('a', 'b'):
      (tmp_path / split / name).mkdir(parents=True)
      for i in range(count):
        Image.fromarray(source + np.uint8(i)).resize((256, 256)).save(
          tmp_path / split / name / f'{i}.jpg'
        )
  for i in range(5):
    (tmp_path / 'train' / 'b' / f'{i}.jpg').write_bytes(b'bad')
  command = [sys.executable, '-c', LOAD, str(tmp_path)]
  environment = os.environ | {'PYTHONPATH': os.pathsep.join([str(ROOT), *sys.path])}
  out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
  size, skipped, grown = map(int, out.split())
  assert size == 295 * 256 * 256 * 3 and skipped == 5  # 58 MB
  assert grown < 1.2 * size


@pytest.mark.parametrize('spec, message', [
    ('digit', 'Did you mean digits'), ('tfds:', 'tfds:<name>'), ('tfds:cifr10', 'cifar10'),
    ('tfds:cifar10:9.9.9', '9.9.9, only: '), ('tfds:cifar10:x', 'expected a version such as'),
    ('', "unknown ''.* Valid: digits"), ('gs://b/photos', 'write folder:gs://b/photos to read'),
    ('gs://b/all.csv', 'write labels:gs://b/all.csv to read'),
])  # fmt: skip
def test_unknown_sources_are_refused(spec, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    sources.open_source(spec, str(tmp_path), (4, 4))
  if spec.startswith('tfds:'):
    with pytest.raises(ValueError, match=message):
      sources.look_up_source(spec, str(tmp_path), (4, 4))


def test_the_config_decides_the_folder_of_tfds_before_the_environment(monkeypatch, tmp_path):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'environment'))
  assert tfds.data_root('mnist', '') == tmp_path / 'environment'
  assert tfds.data_root('mnist', str(tmp_path / 'config')) == tmp_path / 'config'


def test_tfds_reads_array_record():
  source = sources.open_source('tfds:mini', str(DATA / 'tfds'), (8, 8))
  assert source.sizes == {'train': 6, 'test': 3} and source.class_names == ('left', 'right')
  check_mini(source)


def described(picture, kind):
  """Returns a TFDS builder whose dataset has these two features."""
  info = types.SimpleNamespace(
    supervised_keys=('picture', 'kind'),
    features={'image': None, 'label': None, 'picture': picture, 'kind': kind},
    splits={'train': types.SimpleNamespace(num_examples=5)},
  )
  return types.SimpleNamespace(info=info, data_path='nowhere')


def test_tfds_names_its_features_and_the_channels():
  from tensorflow_datasets import features

  kind = features.ClassLabel(names=['round', 'flat'])
  for channels in (1, 3):
    picture = features.Image(shape=(28, 28, channels))
    source = tfds.tfds_source('shapes', described(picture, kind))
    assert source.channels == channels and source.sizes == {'train': 5}
    assert source.class_names == ('round', 'flat')
  wrong = [described(picture, features.Scalar(np.int64)), described(features.Text(), kind)]
  for keys in (({'x': 'picture'}, 'kind'), ('picture', 'kind', 'weight')):
    wrong.append(described(picture, kind))
    wrong[-1].info.supervised_keys = keys
  for builder in wrong:
    with pytest.raises(ValueError, match='tfds:shapes: expected an image and a class label'):
      tfds.tfds_source('shapes', builder)


@pytest.mark.parametrize('how', ['missing', 'cut', 'empty'])
def test_missing_or_damaged_tfds_shard_is_reported(tmp_path, how):
  shutil.copytree(DATA / 'tfds', tmp_path, dirs_exist_ok=True)
  (shard,) = tmp_path.rglob('*train*array_record-*')
  data = shard.read_bytes()
  shard.write_bytes({'cut': data[: len(data) // 2]}.get(how, b''))
  if how == 'missing':
    shard.unlink()
  source = sources.open_source('tfds:mini', str(tmp_path), (8, 8))
  with pytest.raises(ValueError, match=r'mini/train: .*mini/1.0.0 cannot be read.*missing or'):
    memory.load_examples(source, 'train', (8, 8))
  assert len(memory.load_examples(source, 'test', (8, 8))) == 3


@pytest.mark.slow
def test_tfds_converts_tfrecord_in_a_child_process(tmp_path):
  pytest.importorskip('array_record')
  shutil.copytree(DATA / 'tfrecord', tmp_path, dirs_exist_ok=True)
  check_mini(sources.open_source('tfds:mini', str(tmp_path), (8, 8)))
  assert list(tmp_path.glob('array_record/mini/1.0.0/*array_record-*'))
  assert list(tmp_path.glob('mini/1.0.0/*tfrecord-*'))  # the user's own files are kept


def test_only_one_process_converts_a_tfds_dataset(tmp_path):
  target = tmp_path / 'array_record' / 'mini' / '1.0.0'
  target.mkdir(parents=True)
  (target / 'damaged').touch()
  arguments = DATA / 'tfrecord' / 'mini' / '1.0.0', target
  with open(target.with_name('1.0.0.lock'), 'wb') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with concurrent.futures.ThreadPoolExecutor() as pool:
      done = pool.submit(tfds.convert_to_array_record, *arguments)
      with pytest.raises(TimeoutError):
        done.result(timeout=0.3)
      (target / 'dataset_info.json').touch()  # the other process has finished
      fcntl.flock(lock, fcntl.LOCK_UN)
      done.result()
  assert {path.name for path in target.iterdir()} == {'damaged', 'dataset_info.json'}


def check_mini(source):
  train = memory.load_examples(source, 'train', (8, 8))
  assert train.image_NHWC.shape == (6, 8, 8, 3)
  for image, label in zip(train.image_NHWC, train.label_N):  # the side of the label is white
    assert (image[:, :4] == 255 * (label == 0)).all() and (image[:, 4:] == 255 * (label == 1)).all()
  assert set(train.label_N.tolist()) == {0, 1}


def put_images(top, names):
  for name in names:
    (top / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (4, 4)).save(top / name)


def test_a_tree_without_labels_holds_out_the_same_images_as_class_folders(tmp_path):
  put_images(tmp_path, [f'{name}/{i}.png' for name in ('cat', 'dog') for i in range(30)])
  ours, theirs = (
    sources.open_source(f'{kind}:{tmp_path}', '', (4, 4)) for kind in ('images', 'folder')
  )
  assert ours.class_names == () and ours.sizes == theirs.sizes
  for split in ('train', 'test'):
    first, second = (source.files[split] for source in (ours, theirs))
    np.testing.assert_array_equal(first.hash_N, second.hash_N)
    np.testing.assert_array_equal(first.path_N, second.path_N)
  assert {label for _, _, label in ours.read('train', range(10))} == {0}


def test_a_tree_may_be_flat_or_deep_and_have_its_own_test_folder(tmp_path):
  put_images(tmp_path, [f'{i}.png' for i in range(10)] + ['a/b/c/x.png', '.hidden/y.png'])
  (tmp_path / 'notes.txt').write_text('')
  source = sources.open_source(f'images:{tmp_path}', '', (4, 4))
  assert sum(source.sizes.values()) == 11
  assert '1 files are not used: 1 .txt' in source.warnings[0]
  put_images(tmp_path, ['train/x/1.png', 'train/2.png', 'val/3.png'])
  source = sources.open_source(f'images:{tmp_path}', '', (4, 4))
  assert source.sizes == {'train': 2, 'test': 1}
  put_images(tmp_path, ['test/4.png', 'test/.hidden/5.png', 'test/6.png'])
  source = sources.open_source(f'images:{tmp_path}', '', (4, 4))
  assert source.sizes == {'train': 2, 'test': 2, 'val': 1}


def test_a_tree_with_only_a_training_folder_holds_out_a_part_of_this_folder(tmp_path):
  put_images(tmp_path, [f'train/{c}/{i}.png' for c in 'ab' for i in range(30)] + ['more/0.png'])
  source = sources.open_source(f'images:{tmp_path}', '', (4, 4))
  folder = sources.open_source(f'folder:{tmp_path}', '', (4, 4))
  assert source.sizes == folder.sizes and sum(source.sizes.values()) == 60
  for split in source.sizes:
    np.testing.assert_array_equal(source.files[split].path_N, folder.files[split].path_N)


def test_what_a_tree_with_a_training_folder_does_not_use_is_named_in_warnings(tmp_path):
  put_images(tmp_path, ['train/1.png', 'val/2.png', 'unused/3.png', '4.png', '.hidden/5.png'])
  os.symlink('.', tmp_path / 'train' / 'loop')
  warnings = sources.open_source(f'images:{tmp_path}', '', (4, 4)).warnings
  assert [text.partition('.')[0] for text in warnings] == [
    f'{tmp_path}: images not used: 4',
    f'{tmp_path}/train: folders not used: loop',
    f'{tmp_path}: folders not used: unused',
  ]


def test_a_tree_without_images_is_refused(tmp_path):
  with pytest.raises(ValueError, match="no images for the split 'train'.* Add images"):
    sources.open_source(f'images:{tmp_path}', '', (4, 4))
  put_images(tmp_path, [f'train/{folder}/{i}.png' for folder in 'ab' for i in range(9)])
  (tmp_path / 'test').mkdir()
  with pytest.raises(ValueError, match="no images for the split 'test'.* Add images"):
    sources.open_source(f'images:{tmp_path}', '', (4, 4))
  with pytest.raises(ValueError, match="'images:' has no path"):
    sources.open_source('images:', '', (4, 4))


def test_labels_can_be_left_out_of_any_source():
  source = sources.open_source('digits', '', (8, 8))
  plain = unlabelled(source)
  assert plain.class_names == () and plain.sizes == source.sizes
  assert {label for _, _, label in plain.read('test', range(20))} == {0}
