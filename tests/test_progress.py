"""Long work is announced and shows a progress bar; short work is silent."""

import logging
import sys
import time

import pytest
import tqdm

from vit_jax import progress


def test_only_long_work_is_announced(caplog, monkeypatch):
  monkeypatch.setattr(progress, 'SOON', 0.05)
  caplog.set_level(logging.INFO)
  with progress.announced('Quick ...'):
    pass
  with progress.announced('Slow ...'):
    time.sleep(0.2)
  assert caplog.messages == ['Slow ...']


def test_a_bar_shows_progress_and_disappears(caplog, capsys, monkeypatch):
  tqdm.tqdm._instances.clear()  # bars of loops that other tests left early
  monkeypatch.setattr(progress, 'SOON', 0.05)
  monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
  caplog.set_level(logging.INFO)
  items = []
  for item in progress.bar(range(4), 'Slow', 'egg', total=4):
    items.append(item)
    time.sleep(0.2 if item == 0 else 0.12)
  shown = capsys.readouterr().err
  assert items == [0, 1, 2, 3] and caplog.messages == ['Slow ...']
  assert '2/4' in shown and 'egg' in shown and shown.endswith('\r')
  assert list(progress.bar(range(9), 'Quick', 'egg', total=9)) == list(range(9))
  assert not capsys.readouterr().err
  for item in progress.bar(range(2), 'Slow later', 'egg', total=2):
    time.sleep(0.2 * item)
  assert len(caplog.messages) == 1  # the bar is visible by then


@pytest.mark.parametrize('first', [True, False])
def test_only_process_0_shows_a_bar(capsys, monkeypatch, first):
  monkeypatch.setattr(progress, 'is_first', lambda: first)
  assert list(progress.counter(range(3), desc='Reading')) == [0, 1, 2]
  assert ('Reading' in capsys.readouterr().err) == first


@pytest.mark.slow
def test_a_log_file_gets_few_bar_updates(capsys, monkeypatch):
  monkeypatch.setattr(progress, 'SOON', 0)
  for screen in (True, False):
    monkeypatch.setattr(sys.stderr, 'isatty', lambda screen=screen: screen)
    for _ in progress.bar(range(8), 'Slow', 'egg', total=8):
      time.sleep(0.11)
    assert (capsys.readouterr().err.count('8 [') > 5) == screen
