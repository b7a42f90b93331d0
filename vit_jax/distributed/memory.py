"""Compiles programs that fit into the memory of each device.

Decisions:
  * XLA's memory analysis of the compiled program decides whether a program fits. An estimate only
    decides which program is compiled first, so that one compilation is usually enough.
  * Process 0 decides for all processes, because the devices of different hosts can have different
    amounts of memory.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Generic, TypeVar

import jax
from jax.sharding import Mesh

from vit_jax.distributed.cluster import from_first
from vit_jax.limits import is_full

# Fraction of a device's memory that programs may use. The rest is for the workspace of cuDNN, and
# for gaps between allocations.
SHARE = 0.9
COMPILATIONS = 3  # maximum number of programs to compile until one fits
MARGIN = 1.1  # after a program did not fit, the raised `factor` is also multiplied by this

Plan = TypeVar('Plan')


@dataclasses.dataclass(frozen=True)
class Fit(Generic[Plan]):
  """Result of `first_fit`.

  Attributes:
    plan: the plan that fits; if no compiled plan fits, the last plan that was compiled.
    compiled: the compiled program; None if no compiled plan fits.
    size: bytes that the program needs on each device; infinite if the compiler reported that memory
      ran out.
    attempts: number of compilations.
  """

  plan: Plan
  compiled: jax.stages.Compiled | None
  size: float
  attempts: int


def first_fit(
  plans: Sequence[Plan],
  lower: Callable[[Plan], jax.stages.Lowered],
  need: Callable[[Plan], tuple[float, float]],
  budget: float,
  factor: float = 1.0,
) -> Fit[Plan]:
  """Compiles a program with the first plan that fits into the memory of each device.

  A plan is any value that changes how much memory the program needs, such as a number of
  micro-batches. The memory for a plan is first estimated, from `need` and `factor`. Plans whose
  estimate exceeds `budget` are skipped. If all are skipped, the last plan is compiled. If a
  compiled program does not fit, `factor` is raised so that the estimate is at least the measured
  memory. If the compiler itself ran out of memory, the program is assumed to need twice the budget.
  At most `COMPILATIONS` plans are compiled.

  Args:
    plans: plans from the fastest one to the one that needs the least memory.
    lower: lowers the program with a plan.
    need: maps a plan to the numbers `(fixed, varying)`. The estimate is
      `fixed + factor * varying` bytes on each device.
    budget: maximum number of bytes that the program can use on each device.
    factor: initial value of `factor`. With 0, only `fixed` counts in the first estimate.
  """
  for attempt in range(1, COMPILATIONS + 1):
    estimates = ((plan, *need(plan)) for plan in plans)
    fitting = (p for p, fixed, varying in estimates if fixed + factor * varying <= budget)
    plan = next(fitting, plans[-1])
    compiled, size = compiled_size(lower(plan))
    fits = size <= budget
    if from_first(lambda fits=fits: fits):
      return Fit(plan, compiled, size, attempt)
    plans = plans[plans.index(plan) + 1 :]
    if not plans:
      break
    fixed, varying = need(plan)
    size = size if compiled else 2 * budget  # the compiler gave no size, so this is a guess
    factor = MARGIN * max((size - fixed) / varying, factor)
  return Fit(plan, None, size if compiled else math.inf, attempt)


def compiled_size(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled | None, float]:
  """Returns a compiled program and its `needed_bytes`.

  Returns `(None, inf)` if the compiler itself reports that memory ran out.
  """
  try:
    compiled = lowered.compile()
  except RuntimeError as error:
    if not is_full(error):
      raise
    return None, math.inf
  return compiled, needed_bytes(compiled)


def needed_bytes(compiled: jax.stages.Compiled) -> int:
  """Returns how many bytes a compiled program, its arguments and its results need on each device.

  The workspace of cuDNN is not included.
  """
  memory = compiled.memory_analysis()
  held = memory.argument_size_in_bytes + memory.output_size_in_bytes
  return held - memory.alias_size_in_bytes + memory.temp_size_in_bytes


def memory_limit(mesh: Mesh) -> int | None:
  """Returns the bytes of memory that each device of a mesh can use; None if this is unknown.

  The first device of process 0 reports the number. CPUs and the devices of a topology description
  report no number.
  """

  def ask():
    try:
      return (mesh.local_devices[0].memory_stats() or {}).get('bytes_limit')
    except jax.errors.JaxRuntimeError:  # the device is from a topology description
      return None

  return from_first(ask)
