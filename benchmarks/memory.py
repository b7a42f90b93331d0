"""Finds the largest batch that fits in memory: `python -m benchmarks.speed --memory=16`.

The training step is compiled for the current backend, but is not run, so nothing is allocated. XLA
reports the memory that the step needs, including its state and its batch. The benchmark compares
this memory with the size that `--memory` gives in GiB.
"""

import functools
import itertools

from benchmarks import works

SIZES = ('b16', 'l16')
PLANS = (  # (remat, dtype of the first moment)
  ('none', 'float32'),
  ('dots', 'float32'),
  ('full', 'float32'),
  ('full', 'bfloat16'),
)
MULTIPLE = 8  # batch sizes are multiples of this number


def step_bytes(config, batch_size: int) -> int:
  """Returns the bytes that a train step needs on one device: state, batch and temporary arrays."""
  import jax
  import jax.numpy as jnp

  from vit_jax import opening
  from vit_jax.distributed import devices, needed_bytes
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
  return needed_bytes(step.lower(jax.eval_shape(init), batch).compile())


def largest_batch(config, budget: float) -> tuple[int, int]:
  """Returns the largest batch size whose step fits, and its bytes; (0, 0) if none fits.

  Batch sizes are multiples of `MULTIPLE`. The search keeps a size that fits and a larger size that
  does not fit. Because memory grows almost linearly with the batch size, the next size to compile
  is interpolated linearly between the two. The search ends when they are consecutive multiples.
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
    f'Largest training batch that fits into {gibibytes:g} GiB, with images of 224 pixels, in '
    f'bfloat16, compiled for the backend {jax.default_backend()}:'
  )
  print('| model | remat | first moment | batch | GiB |\n| --- | --- | --- | --- | --- |')
  for size, (remat, moment) in itertools.product(SIZES, PLANS):
    overrides = {'model.remat': remat, 'optimizer.moment_dtype': moment, 'micro_batches': '1'}
    work = works.Work(f'{works.CIFAR}:{size}', 'train', 8, 'bfloat16', (), (*overrides.items(),))
    batch, needs = largest_batch(works.settings(work), gibibytes * 2**30)
    print(f'| {size} | {remat} | {moment} | {batch} | {needs / 2**30:.2f} |', flush=True)


if __name__ == '__main__':
  raise SystemExit('error: run `python -m benchmarks.speed --memory=16` instead.')
