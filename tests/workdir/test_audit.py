"""Checks the warnings about a data set before training."""

import logging
import os

import numpy as np
from PIL import Image

from vit_jax.config import default_config
from vit_jax.data import image, sources
from vit_jax.workdir import audit


def make(root, counts):
  """Makes `counts[folder]` different PNG files in each folder."""
  draw = np.random.RandomState(0)
  for folder, count in counts.items():
    (root / folder).mkdir(parents=True)
    for i in range(count):
      pixels = draw.randint(0, 256, (4, 4, 3)).astype(np.uint8)
      Image.fromarray(pixels).save(root / folder / f'{folder.replace("/", "_")}{i}.png')


def found(root, splits=('train', 'test'), streamed=False, skipped=False):
  source = sources.open_source(f'folder:{root}', '', (4, 4))
  return list(audit.audit(source, splits, streamed, skipped))


COUNTS = {'train/cat': 12, 'train/dog': 3, 'train/ant': 9, 'test/cat': 3, 'test/dog': 3}
COUNTS |= {'train/bee': 10}  # just enough


def test_small_classes_are_named_with_their_size(tmp_path):
  make(tmp_path, COUNTS)
  (warning,) = found(tmp_path)
  assert warning == 'train: 2 of 4 classes have fewer than 10 images: dog 3, ant 9.'


def test_only_the_used_part_of_a_split_counts(tmp_path):
  make(tmp_path, {'train/cat': 40, 'train/dog': 40, 'test/cat': 1, 'test/dog': 1})
  assert not found(tmp_path)
  assert 'train[:15%]: 2 of 2 classes' in found(tmp_path, ('train[:15%]', 'test'))[0]


def test_copies_across_splits_are_named(tmp_path):
  make(tmp_path, {'train/cat': 12, 'train/dog': 12, 'test/cat': 3, 'test/dog': 3, 'val/dog': 4})
  (tmp_path / 'val/cat').mkdir()
  original = tmp_path / 'train/cat/train_cat3.png'
  for copy in ('test/dog/other.png', 'val/cat/more.png'):
    (tmp_path / copy).write_bytes(original.read_bytes())
  (tmp_path / 'train/dog/inside.png').write_bytes(original.read_bytes())
  train_test, train_val, test_val = found(tmp_path, ('train', 'test', 'val'))
  assert train_test.startswith('1 images of test are exact copies of images of train:')
  assert f'{tmp_path}/test/dog/other.png = ' in train_test
  assert 'of val are exact copies of images of train' in train_val
  assert 'of val are exact copies of images of test' in test_val


def test_a_file_in_two_splits_is_not_a_copy_of_itself(tmp_path, monkeypatch):
  make(tmp_path, {'cat': 12, 'dog': 12})
  # Even if some training images are copies of others, evaluation leaves out all of them.
  (tmp_path / 'dog/dog0.png').write_bytes((tmp_path / 'cat/cat1.png').read_bytes())
  source = sources.open_source(f'folder:{tmp_path}', '', (4, 4))
  monkeypatch.setattr(audit, 'MOST_FILES', source.sizes['train'])  # each file counts once
  monkeypatch.setattr(audit, 'MOST_BYTES', 0)  # no file is read
  assert not [w for w in found(tmp_path, ('train', 'train[:50%]')) if 'fewer than 10' not in w]


def test_a_copy_is_reported_only_if_its_name_is_not_recognised(tmp_path):
  make(tmp_path, {'train/cat': 12, 'train/dog': 12, 'test/cat': 3, 'test/dog': 3})
  same = (tmp_path / 'train/cat/train_cat5.png').read_bytes()
  (tmp_path / 'test/cat/train_cat5.png').write_bytes(same)  # its content is recognised, too
  for link in ('test/cat/train_cat3.png', 'test/dog/train_cat3.png'):  # evaluation leaves them out
    (tmp_path / link).symlink_to(tmp_path / 'train/cat/train_cat3.png')
  os.link(tmp_path / 'train/dog/train_dog1.png', tmp_path / 'test/dog/train_dog1.png')
  assert not found(tmp_path)
  (tmp_path / 'test/dog/other.png').symlink_to(tmp_path / 'train/cat/train_cat3.png')
  (warning,) = found(tmp_path)
  assert warning.startswith('1 images of test are exact copies of images of train: ')
  assert f'{tmp_path}/test/dog/other.png = {tmp_path}/train/cat/train_cat3.png' in warning


def test_unreadable_files_are_counted_and_named_if_images_are_streamed(tmp_path):
  make(tmp_path, {'train/cat': 12, 'train/dog': 12, 'test/cat': 3, 'test/dog': 3})
  (tmp_path / 'train/dog/empty.png').touch()
  (tmp_path / 'test/cat/text.jpg').write_text('not an image')
  assert not found(tmp_path)
  (warning,) = found(tmp_path, streamed=True)
  assert warning.startswith('2 of 32 files are not readable images: ')
  assert 'dog/empty.png' in warning and 'cat/text.jpg' in warning
  assert warning.endswith('or skip them: --config.data.skip_bad_images=True.')
  (warning,) = found(tmp_path, streamed=True, skipped=True)
  assert warning.endswith('. They are skipped (data.skip_bad_images=True).')


def test_files_that_decoding_refuses_are_reported_whatever_their_extension(tmp_path):
  make(tmp_path, {'train/cat': 12, 'train/dog': 12, 'test/cat': 3, 'test/dog': 3})
  for kind in ('GIF', 'TIFF', 'PPM'):
    Image.new('RGB', (4, 4)).save(tmp_path / f'train/dog/{kind}.jpg', kind)
  Image.new('RGB', (4, 4)).save(tmp_path / 'train/cat/png.jpg', 'PNG')  # decoding accepts it
  (warning,) = found(tmp_path, streamed=True)
  assert warning.startswith('3 of 34 files are not readable images: ') and 'GIF.jpg' in warning
  for file in (tmp_path / 'train').rglob('*.jpg'):
    try:
      image.decode_image(file.read_bytes(), file)
    except image.BadImage:
      assert str(file) in warning
    else:
      assert str(file) not in warning


def test_a_pipe_among_the_images_is_reported_and_not_opened(tmp_path):
  make(tmp_path, {'train/cat': 12, 'train/dog': 12, 'test/cat': 3, 'test/dog': 3})
  os.mkfifo(tmp_path / 'train/dog/pipe.jpg')  # opening it would wait for a writer
  (warning,) = found(tmp_path, streamed=True)
  assert warning.startswith('1 of 31 files are not readable images: ') and 'pipe.jpg' in warning


def test_expensive_searches_are_skipped_and_reported(tmp_path, monkeypatch):
  make(tmp_path, {'train/cat': 12, 'train/dog': 12, 'test/cat': 3, 'test/dog': 3})
  (tmp_path / 'test/dog/other.png').write_bytes(
    (tmp_path / 'train/cat/train_cat3.png').read_bytes()
  )
  with monkeypatch.context() as patched:
    patched.setattr(audit, 'MOST_BYTES', 10)
    assert 'could be copies. They were not compared' in found(tmp_path)[0]
  monkeypatch.setattr(audit, 'MOST_FILES', 10)
  (warning,) = found(tmp_path)
  assert warning.endswith('more than 10 files, so splits were not searched for copies.')
  (warning,) = found(tmp_path, streamed=True)
  assert warning.endswith('were not searched for copies or unreadable images.')


def test_a_missing_file_is_left_to_the_decoder(tmp_path):
  make(tmp_path, {'train/cat': 12, 'train/dog': 12, 'test/cat': 3, 'test/dog': 3})
  (tmp_path / 'test/dog/gone.png').symlink_to(tmp_path / 'nowhere.png')
  assert not found(tmp_path)


def test_sources_without_files_have_no_warnings(tmp_path, caplog):
  with caplog.at_level(logging.WARNING):
    settings = default_config().data
    audit.report_mistakes(sources.open_source('digits', '', (8, 8)), ('train', 'test'), settings)
    assert not caplog.records
    make(tmp_path, COUNTS)
    audit.report_mistakes(
      sources.open_source(f'folder:{tmp_path}', '', (4, 4)), ('train', 'test'), settings
    )
  assert 'dog 3, ant 9' in caplog.text
