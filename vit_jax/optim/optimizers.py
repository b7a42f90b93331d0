"""Optimizers, from optax.

Weight decay is decoupled, scaled by the learning rate, and touches kernels only: not
biases, norms, positions, or class and register tokens. What is frozen is no part of the tree
that an optimizer sees: it has no gradient, no state and no share in the norm clipped by.
"""

import jax
import optax

from vit_jax.model import first_layer, last_layer
from vit_jax.names import choose
from vit_jax.optim import schedules


def adamw(
  schedule: schedules.Schedule,
  weight_decay: float,
  b1: float,
  b2: float,
  moment_dtype: str = 'float32',
  **_,
):
  """AdamW (Loshchilov and Hutter, 1711.05101).

  The Adam of the paper's Table 3 as well: its code, too, decoupled the weight decay and scaled it
  by the learning rate.
  """
  return optax.adamw(
    schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=is_matrix, mu_dtype=moment_dtype
  )


def sgd(
  schedule: schedules.Schedule,
  weight_decay: float,
  momentum: float,
  moment_dtype: str = 'float32',
  **_,
):
  """SGD with momentum, weight decay outside of it."""
  return optax.chain(
    optax.trace(momentum, accumulator_dtype=moment_dtype),
    optax.add_decayed_weights(weight_decay, mask=is_matrix),
    optax.scale_by_learning_rate(schedule),
  )


def muon(
  schedule: schedules.Schedule,
  weight_decay: float,
  b1: float,
  b2: float,
  momentum: float,
  moment_dtype: str = 'float32',
  **_,
):
  """Muon on the matrices of the blocks (Jordan et al. 2024), AdamW on all else.

  The orthogonal update is scaled to the size of AdamW's (Liu et al. 2025, 2502.16982, Section
  2.2), so that both take the same learning rate.
  """
  return optax.chain(
    # Its own weight decay would leave out the embedding and the head, or decay every bias as well.
    optax.contrib.muon(
      -1.0,  # the sign and the learning rate follow the decay
      beta=momentum,
      mu_dtype=moment_dtype,
      adam_b1=b1,
      adam_b2=b2,
      muon_weight_dimension_numbers=block_matrices,
      consistent_rms=0.2,
    ),
    optax.add_decayed_weights(weight_decay, mask=is_matrix),
    optax.scale_by_learning_rate(schedule),
  )


def block_matrices(params: dict) -> dict:
  """Which axes of each kernel of a block are its inputs and outputs; None for all else."""

  def axes(path, x):
    if not path[0].key.startswith('block_') or path[-1].key != 'kernel':
      return None
    inputs = x.ndim - 1 if path[-2].key == 'out' else 1  # heads are inputs of `out` alone
    return optax.contrib.MuonDimensionNumbers(tuple(range(inputs)), tuple(range(inputs, x.ndim)))

  return jax.tree_util.tree_map_with_path(axes, params)


OPTIMIZERS = {'adamw': adamw, 'muon': muon, 'sgd': sgd}

MOMENT_DTYPES = ('float32', 'bfloat16')  # Zhai et al. 2021 (2106.04560), 3.4: half the memory

FREEZE = {  # whether a top-level parameter keeps the value that it began with
  '': lambda name: False,
  'backbone': lambda name: name != 'head',
}


def split_frozen(params: dict, freeze: str) -> tuple[dict, dict]:
  """The parameters that are trained, and those that `freeze`, of `FREEZE`, keeps."""
  keeps = choose('freeze', freeze, FREEZE)
  trained = {name: leaves for name, leaves in params.items() if not keeps(name)}
  return trained, {name: leaves for name, leaves in params.items() if keeps(name)}


def scale_by_layer(decay: float) -> optax.GradientTransformation:
  """Multiplies each update by `decay ** (depth + 1 - layer)`; block i is layer i + 1.

  Layer 0 is `first_layer`, layer depth + 1 is `last_layer`.

  Layer-wise learning-rate decay as BEiT (Bao et al. 2021, 2106.08254) and MAE (He et al. 2021,
  2111.06377) fine-tune with it. Behind an optimizer it scales the weight decay as well.
  """

  def update(updates, _):
    depth = sum(name.startswith('block_') for name in updates)

    def scale(name):
      if name in last_layer():
        return 1.0
      if name in first_layer():
        return decay ** (depth + 1)
      kind, _, i = name.rpartition('_')
      assert kind == 'block', f'Which layer is {name}? Name it in its Pool or Position.'
      return decay ** (depth - int(i))

    return {
      name: jax.tree.map(lambda x, name=name: scale(name) * x, leaves)
      for name, leaves in updates.items()
    }

  return optax.stateless(update)


def is_matrix(params) -> dict:
  """True for the leaves named `kernel`."""
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == 'kernel', params)


def make_optimizer(
  name: str, schedule: schedules.Schedule, clip: float, layer_decay: float = 1.0, **arguments
) -> optax.GradientTransformation:
  """The optimizer `name` of `OPTIMIZERS`, behind clipping by the global norm."""
  parts = [choose('optimizer.name', name, OPTIMIZERS)(schedule, **arguments)]
  if clip:
    parts.insert(0, optax.clip_by_global_norm(clip))
  if layer_decay != 1:
    parts.append(scale_by_layer(layer_decay))
  return optax.chain(*parts) if len(parts) > 1 else parts[0]
