"""Learning-rate schedules."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from vit_jax.names import choose

Schedule = Callable[[jax.Array], jax.Array]

# Learning rate after the warm-up, as a fraction of the peak. The argument is the fraction of the
# decay that is completed, from 0 to 1.
SCHEDULES = {
  'cosine': lambda fraction: (1 + jnp.cos(jnp.pi * fraction)) / 2,
  'linear': lambda fraction: 1 - fraction,
  'constant': jnp.ones_like,
}


def make_schedule(name: str, peak: float, steps: int, warmup: int) -> Schedule:
  """Returns a function that maps the step 0, 1, ... `steps - 1` to the learning rate.

  Args:
    name: one of `SCHEDULES`.
    peak: learning rate at the end of the warm-up.
    steps: number of steps, including the warm-up.
    warmup: number of steps of linear warm-up. The first step has the rate `peak / warmup`, because
      a step with a learning rate of 0 would be wasted.
  """
  decay = choose('schedule.name', name, SCHEDULES)

  def schedule(step):
    fraction = jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
    return peak * jnp.minimum((step + 1) / max(warmup, 1), decay(fraction))

  return schedule
