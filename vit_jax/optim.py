"""Optimizers and learning-rate schedules, from optax.

Weight decay is decoupled, scaled by the learning rate, and touches kernels only: not
biases, norms, positions, or class and register tokens.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

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


def adamw(
  schedule: Schedule, weight_decay: float, b1: float, b2: float, moment_dtype: str = 'float32', **_
):
  """AdamW (Loshchilov and Hutter, 1711.05101)."""
  return optax.adamw(
    schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=is_matrix, mu_dtype=moment_dtype
  )


def sgd(
  schedule: Schedule, weight_decay: float, momentum: float, moment_dtype: str = 'float32', **_
):
  """SGD with momentum, weight decay outside of it."""
  return optax.chain(
    optax.trace(momentum, accumulator_dtype=moment_dtype),
    optax.add_decayed_weights(weight_decay, mask=is_matrix),
    optax.scale_by_learning_rate(schedule),
  )


OPTIMIZERS = {'adamw': adamw, 'sgd': sgd}

MOMENT_DTYPES = ('float32', 'bfloat16')  # Zhai et al. 2021 (2106.04560), 3.4: half the memory


def is_matrix(params) -> dict:
  """True for the leaves named `kernel`."""
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == 'kernel', params)


def make_optimizer(
  name: str, schedule: Schedule, clip: float, **arguments
) -> optax.GradientTransformation:
  """The optimizer `name` of `OPTIMIZERS`, behind clipping by the global norm."""
  optimizer = choose('optimizer.name', name, OPTIMIZERS)(schedule, **arguments)
  return optax.chain(optax.clip_by_global_norm(clip), optimizer) if clip else optimizer
