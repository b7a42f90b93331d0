"""Averages training metrics between two log lines, and measures speed."""

from collections.abc import Iterator
import contextlib
import math
import time

import jax

from vit_jax.evaluation import summarize


class Meter:
  """Averages training metrics between two log lines; its clock counts only training time."""

  def __init__(self):
    self._reset()

  def _reset(self) -> None:
    self._scores, self._seconds, self._waited, self._learning_rate = [], 0.0, 0.0, 0.0
    self._bad = []
    self._started = time.perf_counter()

  def pause(self) -> None:
    """Stops the clock, because something other than training follows."""
    self._seconds += time.perf_counter() - self._started

  def resume(self) -> None:
    """Starts the clock again, because training follows."""
    self._started = time.perf_counter()

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Counts the time inside the context as waiting for the next batch."""
    began = time.perf_counter()
    yield
    self._waited += time.perf_counter() - began

  def add(self, step: int, metrics: dict) -> None:
    """Adds the metrics of a step; waits until the device has computed them.

    Raises:
      FloatingPointError: the loss or the gradient is not finite.
    """
    metrics = jax.device_get(metrics)
    loss = summarize([metrics['score']])['loss']
    for name, value in (('loss', loss), ('gradient norm', metrics['grad_norm'])):
      if not math.isfinite(value):
        raise FloatingPointError(
          f'The {name} of step {step} is {value}: training diverged. Earlier checkpoints are still '
          'valid. Try a smaller optimizer.lr or a longer schedule.warmup.'
        )
    self._scores.append(metrics['score'])
    self._bad += [metrics['bad_images']] if 'bad_images' in metrics else []
    self._learning_rate = float(metrics['learning_rate'])

  def read(self) -> dict[str, float]:
    """Returns the means since the last call; the clock must be running.

    `data_wait` is the share of training time that the loop spent waiting for its next batch.
    """
    self.pause()
    values = summarize(self._scores)
    values['images_per_second'] = round(values['examples'] / self._seconds, 1)
    values['data_wait'] = round(self._waited / self._seconds, 4)
    values['learning_rate'] = self._learning_rate
    if self._bad:
      values['bad_images'] = int(sum(self._bad))
    self._reset()
    return values
