"""Programs are compiled until one fits; here with stand-ins for compiled programs."""

import math
import types

import jax
import pytest

from vit_jax.distributed import first_fit, needed_bytes

FIXED, EACH = 100, 64  # bytes of a step, and of the activations of the whole batch
PARTS = (1, 2, 4, 8, 16, 32, 64)


class Lowered:
  """Compiles to a program that needs `size` bytes, or runs out of memory while compiling."""

  def __init__(self, size):
    self.size = size

  def compile(self):
    if self.size == math.inf:
      raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.')
    memory = dict.fromkeys(('argument', 'output', 'alias'), 5) | {'temp': self.size - 5}
    analysis = types.SimpleNamespace(**{f'{k}_size_in_bytes': v for k, v in memory.items()})
    return types.SimpleNamespace(memory_analysis=lambda: analysis)


def fit(budget, real, factor=1.0):
  """Returns the result for a step that needs `real(parts)` bytes."""
  need = lambda parts: (FIXED, EACH / parts)
  return first_fit(PARTS, lambda parts: Lowered(real(parts)), need, budget, factor)


def test_needed_bytes_are_the_arrays_that_a_program_reads_writes_and_holds():
  function = jax.jit(lambda x, y: (x @ x + y).sum())
  compiled = function.lower(*[jax.ShapeDtypeStruct((64, 64), 'float32')] * 2)
  assert 2 * 64 * 64 * 4 + 4 <= needed_bytes(compiled.compile()) <= 4 * 64 * 64 * 4 + 1024


@pytest.mark.parametrize('budget', range(101, 170, 4))
def test_one_compilation_is_enough_if_the_estimate_is_right(budget):
  found = fit(budget, lambda parts: FIXED + EACH / parts)
  assert found.attempts == 1 and found.size <= budget
  faster = [parts for parts in PARTS if parts < found.plan]
  assert all(FIXED + EACH / parts > budget for parts in faster)


@pytest.mark.parametrize('error', [0.5, 1.5, 3, 10])
@pytest.mark.parametrize('factor', [0.0, 1.0])
def test_a_wrong_estimate_is_corrected_by_the_measured_memory(error, factor):
  found = fit(120, lambda parts: FIXED + error * EACH / parts, factor)
  assert found.attempts <= 2 and found.compiled and found.size <= 120
  assert FIXED + 2.2 * error * EACH / found.plan > 120 or found.plan == 1 or error < 1


def test_three_compilations_are_the_most():
  found = fit(120, lambda parts: 1000)
  assert found.attempts <= 3 and found.compiled is None and found.size == 1000


def test_the_plan_with_the_least_memory_is_tried_if_the_estimate_refuses_all():
  found = fit(99, lambda parts: FIXED + EACH / parts)
  assert (found.plan, found.attempts, found.compiled) == (64, 1, None)


@pytest.mark.parametrize('factor', [0.0, 1.0])
def test_a_compiler_that_runs_out_of_memory_is_given_a_smaller_plan(factor):
  found = fit(150, lambda parts: math.inf if parts < 4 else 110, factor)
  assert found.plan >= 4 and found.size == 110


def test_other_errors_of_the_compiler_are_raised():
  class Broken(Lowered):
    def compile(self):
      raise jax.errors.JaxRuntimeError('INTERNAL: no')

  with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'):
    first_fit(PARTS, lambda _: Broken(1), lambda _: (0, 1), 10)
