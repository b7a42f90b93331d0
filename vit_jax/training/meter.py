"""Averages training metrics between two log lines, and measures speed and utilisation."""

from collections.abc import Iterator
import contextlib
import math
import time

import jax

from vit_jax.distributed import peak_tflops
from vit_jax.evaluation import summarize
from vit_jax.training.compiling import Compiled

FUSED = (
  " The run uses cuDNN's kernel for attention. To repeat the step without this kernel, resume with "
  '--config.model.attention=plain.'
)


class Meter:
  """Averages training metrics between two log lines, and measures the time spent on training."""

  def __init__(self, mesh: jax.sharding.Mesh, dtype: str):
    """Creates a meter for training on the devices of `mesh` with the compute type `dtype`."""
    device, self._devices = mesh.local_devices[0], mesh.size
    self._memory_stats = device.memory_stats
    self._peak = peak_tflops(device) if dtype == 'bfloat16' else None
    self._newest = None  # step, metrics and compiled step that `flush` has not read yet
    self._reset()

  def _reset(self) -> None:
    self._flops = 0
    self._scores, self._seconds, self._waited, self._learning_rate = [], 0.0, 0.0, 0.0
    self._bad = []
    self._started = time.perf_counter()

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Context manager that does not count the time of its block, e.g. an evaluation."""
    self._seconds += time.perf_counter() - self._started
    yield
    self._started = time.perf_counter()

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Context manager that counts the time of its block as waiting for the next batch."""
    began = time.perf_counter()
    yield
    self._waited += time.perf_counter() - began

  def add(self, step: int, metrics: dict, compiled: Compiled) -> None:
    """Adds the metrics of a step, and flushes the step before.

    Call it after the step has started, so that the device does not wait for the host.

    Args:
      step: number of the step.
      metrics: metrics that the step returned.
      compiled: the compiled step, which gives the number of FLOPs.
    """
    self.flush()
    self._newest = step, metrics, compiled

  def flush(self) -> None:
    """Waits until the device has computed the metrics of the newest step, and checks them.

    Raises:
      FloatingPointError: the loss or the gradient is not finite.
    """
    if self._newest is None:
      return
    (step, metrics, compiled), self._newest = self._newest, None
    metrics = jax.device_get(metrics)
    loss = summarize([metrics['score']])['loss']
    for name, value in (('loss', loss), ('gradient norm', metrics['grad_norm'])):
      if not math.isfinite(value):
        raise FloatingPointError(
          f'The {name} of step {step} is {value}: training diverged. Earlier checkpoints are still '
          'valid. Try a smaller optimizer.lr or a longer schedule.warmup.'
          + (FUSED if compiled.fused else '')
        )
    self._scores.append(metrics['score'])
    self._flops += compiled.flops
    self._bad += [metrics['bad_images']] if 'bad_images' in metrics else []
    self._learning_rate = float(metrics['learning_rate'])

  def read(self) -> dict[str, float]:
    """Returns the metrics of the steps since the last call, and resets the meter.

    Call it outside of `paused`. Scores are means over these steps, and `examples` and `bad_images`
    are counts. `learning_rate` and `memory_gib` (of one device) are the latest values.
    `images_per_second` counts only the time of training, not the time of evaluations. `data_wait`
    is the fraction of training time in which the loop waited for the next batch. `mfu` is the
    FLOP/s of training, as a fraction of the devices' peak FLOP/s (Chowdhery et al. 2022,
    2204.02311, Appendix B).
    """
    self.flush()
    self._seconds += time.perf_counter() - self._started
    values = summarize(self._scores)
    values['images_per_second'] = round(values['examples'] / self._seconds, 1)
    values['data_wait'] = round(self._waited / self._seconds, 4)
    values['learning_rate'] = self._learning_rate
    values |= self._utilisation()
    if stats := self._memory_stats():
      values['memory_gib'] = round(stats['bytes_in_use'] / 2**30, 3)
    if self._bad:
      values['bad_images'] = int(sum(self._bad))
    self._reset()
    return values

  def _utilisation(self) -> dict[str, float]:
    """Returns `tflops_per_device`, and `mfu` if the device's peak speed for `dtype` is known."""
    tflops = self._flops / self._seconds / self._devices / 1e12
    found = {'tflops_per_device': float(f'{tflops:.4g}')} if tflops else {}
    return found | ({'mfu': round(tflops / self._peak, 4)} if tflops and self._peak else {})
