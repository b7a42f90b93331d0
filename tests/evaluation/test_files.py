"""Finding the image files that a user asks for."""

import errno
import os
import pathlib
import shutil

import numpy as np
import pytest

from vit_jax.evaluation import files


@pytest.fixture
def photos(tmp_path):
  for name in ('a/0.png', 'a/1.png', 'b/0.png', 'b/deep/0.png'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
  return tmp_path


def test_find_images_skips_unreadable_and_vanished_entries(photos, monkeypatch, caplog):
  scan, stat = os.scandir, os.stat

  def scandir(path):
    if pathlib.Path(path).name == 'deep':
      raise FileNotFoundError(errno.ENOENT, 'No such file or directory', str(path))
    return scan(path)

  def stat_of(path, **kwargs):
    if str(path).endswith('a/0.png'):
      raise PermissionError(errno.EACCES, 'Permission denied', str(path))
    return stat(path, **kwargs)

  monkeypatch.setattr(os, 'scandir', scandir)
  monkeypatch.setattr(os, 'stat', stat_of)
  assert files.find_images([str(photos)]) == [photos / 'a' / '1.png', photos / 'b' / '0.png']
  assert 'b/deep: No such file or directory' in caplog.text


def test_a_link_to_nothing_is_found_so_that_reading_it_fails(photos):
  (photos / 'a' / '2.png').symlink_to(photos / 'moved.png')
  (photos / 'a' / '3.png').mkdir()
  wanted = [photos / 'a' / name for name in ('0.png', '1.png', '2.png')]
  assert files.find_images(photos / 'a') == files.find_images(photos / 'a' / '*.png') == wanted


def test_hidden_files_are_skipped(photos):
  (photos / 'a' / '._0.png').touch()  # macOS writes such files beside the images
  wanted = [photos / 'a' / '0.png', photos / 'a' / '1.png']
  assert files.find_images(photos / 'a') == wanted


def test_hidden_folders_are_skipped(photos):
  (photos / 'a' / '.thumbnails').mkdir()
  shutil.copy(photos / 'a' / '0.png', photos / 'a' / '.thumbnails' / '0.png')
  assert files.find_images(photos / 'a') == [photos / 'a' / '0.png', photos / 'a' / '1.png']


def test_find_images_searches_all_folders_below_for_two_stars(photos):
  wanted = [photos / name for name in ('a/0.png', 'b/0.png', 'b/deep/0.png')]
  assert files.find_images(photos / '**' / '0.png') == wanted


def test_a_file_with_the_signs_of_a_pattern_in_its_name_is_found(photos):
  file = photos / 'a' / '[01].png'
  assert files.find_images(file) == [photos / 'a' / '0.png', photos / 'a' / '1.png']
  file.touch()
  assert files.find_images(file) == [file]


def test_a_pattern_can_be_in_a_folder_with_the_signs_of_a_pattern_in_its_name(photos, monkeypatch):
  folder = photos / 'a [01]'
  (photos / 'a').rename(folder)
  wanted = [folder / '0.png', folder / '1.png']
  assert files.find_images(folder / '*.png') == wanted
  assert files.find_images(photos / 'a ?[01]?]' / '*.png') == wanted
  monkeypatch.chdir(folder)
  assert files.find_images('?.png') == [pathlib.Path('0.png'), pathlib.Path('1.png')]


def test_find_images_follows_links_to_folders_but_no_loops(photos):
  links = photos / 'links'
  links.mkdir()
  (links / 'linked').symlink_to(photos / 'a')
  (links / 'loop').symlink_to(photos)
  assert files.find_images(links) == [links / 'linked' / '0.png', links / 'linked' / '1.png']


def test_find_images_accepts_one_path_or_many(photos):
  wanted = [photos / 'a' / '0.png', photos / 'a' / '1.png']
  for paths in (str(photos / 'a'), photos / 'a', [photos / 'a'], iter(wanted)):
    assert files.find_images(paths) == wanted
  assert files.find_images(str(wanted[0])) == wanted[:1]
  for wrong in (3, None, [3], np.zeros((2, 8, 8, 3), np.uint8)):
    with pytest.raises(ValueError, match='images: expected a path or a list of paths, got a'):
      files.find_images(wrong)
