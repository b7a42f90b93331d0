"""Learning-rate schedules."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from vit_jax.names import choose

Schedule = Callable[[jax.Array], jax.Array]

# What remains of the peak after the warm-up, by the fraction of the decay that is done.
SCHEDULES = {
  'cosine': lambda fraction: (1 + jnp.cos(jnp.pi * fraction)) / 2,
  'linear': lambda fraction: 1 - fraction,
  'constant': jnp.ones_like,
}


def make_schedule(name: str, peak: float, steps: int, warmup: int) -> Schedule:
  """The learning rate of step 0, 1, ... `steps - 1`.

  Args:
    name: one of `SCHEDULES`.
    peak: the learning rate reached at the end of the warm-up.
    steps: length of the run.
    warmup: steps of linear warm-up, from `peak / warmup`, not from a wasted step at 0.
  """
  decay = choose('schedule.name', name, SCHEDULES)

  def schedule(step):
    fraction = jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
    return peak * jnp.minimum((step + 1) / max(warmup, 1), decay(fraction))

  return schedule
