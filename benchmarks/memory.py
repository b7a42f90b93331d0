"""The largest batch that fits: `python -m benchmarks.speed --memory=16`.

The train step is compiled ahead for the backend at hand, and nothing is allocated: what XLA
says that the step needs, with its state and batch, is compared with the budget.
"""

import functools
import itertools

from benchmarks import works

SIZES = ('b16', 'l16')
PLANS = (  # remat, type of the first moment
  ('none', 'float32'),
  ('dots', 'float32'),
  ('full', 'float32'),
  ('full', 'bfloat16'),
)
MULTIPLE = 8  # of the batch sizes tried


def step_bytes(config, batch_size: int) -> int:
  """Bytes of a train step on one device: state, batch and what is computed in between."""
  import jax
  import jax.numpy as jnp

  from vit_jax import opening
  from vit_jax.distributed import devices
  from vit_jax.training import state
  from vit_jax.training.step import make_train_step

  config = config.copy_and_resolve_references()
  config.batch_size = batch_size
  mesh = devices.make_mesh()
  exp, training = opening.from_config(config)
  init = lambda: state.init_state(exp, training, mesh)
  batch = {
    'image': jax.ShapeDtypeStruct((batch_size, *exp.image_shape), jnp.uint8),
    'label': jax.ShapeDtypeStruct((batch_size,), jnp.int32),
  }
  step = make_train_step(exp, training, mesh)
  plan = step.lower(jax.eval_shape(init), batch).compile().memory_analysis()
  held = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
  return held + plan.temp_size_in_bytes


def largest_batch(config, budget: float) -> tuple[int, int]:
  """The largest multiple of `MULTIPLE` whose step fits, and its bytes; (0, 0) if none does.

  Memory grows almost in a straight line with the batch: a line through a size that fits and
  one that does not says where to try next, until they are neighbours. Both were compiled.
  """
  need = functools.cache(lambda n: step_bytes(config, n * MULTIPLE))
  if need(1) > budget:
    return 0, 0
  fits, over = 1, 2
  while need(over) <= budget:
    each = (need(over) - need(fits)) / (over - fits)
    fits, over = over, over + 1 + int((budget - need(over)) / each)
  while over - fits > 1:
    each = (need(over) - need(fits)) / (over - fits)
    guess = min(fits + max(int((budget - need(fits)) / each), 1), over - 1)
    fits, over = (guess, over) if need(guess) <= budget else (fits, guess)
  return fits * MULTIPLE, need(fits)


def show(gibibytes: float) -> None:
  """Prints a row for each size and plan."""
  import jax

  print(
    f'Largest training batch in {gibibytes:g} GiB, 224 pixels, bfloat16 compute, as compiled for '
    f'this {jax.default_backend()}:'
  )
  print('| model | remat | first moment | batch | GiB |\n| --- | --- | --- | --- | --- |')
  for size, (remat, moment) in itertools.product(SIZES, PLANS):
    overrides = {'model.remat': remat, 'optimizer.moment_dtype': moment, 'micro_batches': '1'}
    work = works.Work(f'{works.CIFAR}:{size}', 'train', 8, 'bfloat16', (), (*overrides.items(),))
    batch, needs = largest_batch(works.settings(work), gibibytes * 2**30)
    print(f'| {size} | {remat} | {moment} | {batch} | {needs / 2**30:.2f} |', flush=True)


if __name__ == '__main__':
  raise SystemExit('error: `python -m benchmarks.speed --memory=16` measures this.')
