"""Compiles forward passes with as many micro-batches as the memory of the devices requires."""

from collections.abc import Callable
import logging

import jax

from vit_jax.distributed.devices import shares
from vit_jax.distributed.memory import first_fit
from vit_jax.distributed.sharding import size_on_device
from vit_jax.limits import OutOfMemory, gib, is_full

log = logging.getLogger(__name__)


class Fitted:
  """A function `(batch, params) -> result` that works through a batch in micro-batches.

  For each batch size, the function is compiled with the fastest number of micro-batches. If the
  compiled program exceeds the memory budget, larger numbers are tried.
  """

  def __init__(
    self,
    build: Callable[[int], Callable],
    mesh: jax.sharding.Mesh,
    best: Callable[[int], int],
    budget: float | None,
  ):
    """Creates the function; nothing is compiled yet.

    Args:
      build: maps a number of micro-batches per device to the jitted function.
      mesh: mesh of the devices.
      best: maps the number of rows of a batch to the fastest number of micro-batches per device.
      budget: maximum number of bytes that the function can use on each device; None: no limit.
    """
    self._build, self._mesh, self._best, self._budget = build, mesh, best, budget
    self._functions = {}  # by the number of rows of a batch

  def __call__(self, batch, params):
    rows = len(jax.tree.leaves(batch)[0])
    if rows in self._functions:
      return self._functions[rows](batch, params)
    counts = self._counts(rows)
    if self._budget is None:
      self._functions[rows] = self._build(counts[0])
      return self._functions[rows](batch, params)
    count, self._functions[rows] = self._fit(counts, batch, params)
    try:
      return jax.block_until_ready(self._functions[rows](batch, params))
    except RuntimeError as error:
      later = [n for n in counts if n >= 2 * count]
      if not is_full(error) or not later or jax.process_count() > 1:
        raise
    log.warning('Out of memory with %d micro-batches: trying %d.', count, later[0])
    _, self._functions[rows] = self._fit(later, batch, params)
    return self._functions[rows](batch, params)

  def _counts(self, rows: int) -> list[int]:
    """Returns the numbers of micro-batches to try for a batch of `rows` rows, the fastest first."""
    share, first = rows // shares(self._mesh), self._best(rows)
    return [first, *(n for n in range(first + 1, share + 1) if share % n == 0)]

  def _fit(self, counts: list[int], batch, params) -> tuple[int, Callable]:
    """Compiles the function with the first number in `counts` for which it fits into memory.

    Returns this number of micro-batches and the jitted function.

    Raises:
      limits.OutOfMemory: the function does not fit with any of the numbers that were tried.
    """
    budget, fixed, functions = self._budget, size_on_device(self._mesh, params), {}

    def lower(count):
      functions[count] = self._build(count)
      return functions[count].lower(batch, params)

    # The memory of one image is unknown at first. With factor=0, `first_fit` therefore starts with
    # the first number in `counts`, and computes the factor from the memory of this program.
    fit = first_fit(counts, lower, lambda count: (fixed, 1 / count), budget, factor=0.0)
    if fit.compiled is None:
      raise OutOfMemory(
        f'The model does not fit into memory: with {fit.plan} micro-batches, it needs '
        f'{gib(fit.size)} on each device, but the limit is {gib(budget)}. Lower data.image_size, '
        'set model.dtype=bfloat16 or, if this happened in an evaluation, lower eval_batch_size.'
      )
    if fit.attempts > 1:
      log.info(
        'A forward pass in %d micro-batches needs %s of the available %s.',
        fit.plan,
        gib(fit.size),
        gib(budget),
      )
    return fit.plan, functions[fit.plan]  # not compiled again: JAX caches the program
