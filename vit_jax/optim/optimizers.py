"""Optimizers, built from optax.

Decisions:
  * Weight decay is decoupled and multiplied by the learning rate. Weight decay applies to kernels
    and to the factors of LoRA, not to biases, norms, positions, or class and register tokens.
  * Frozen parameters are removed from the tree that an optimizer sees. Therefore, frozen parameters
    have no gradient and no optimizer state, and are not part of the norm for gradient clipping.
"""

import jax
import optax

from vit_jax.model import ADAPTERS, first_layer, last_layer
from vit_jax.names import accepted, choose
from vit_jax.optim import schedules
from vit_jax.optim.muon import block_matrices, orthogonalized
from vit_jax.optim.objectives import objective_params


def adamw(
  schedule: schedules.Schedule,
  weight_decay: float,
  b1: float,
  b2: float,
  moment_dtype: str = 'float32',
  **_,
):
  """Returns the AdamW optimizer (Loshchilov and Hutter, 1711.05101).

  The ViT paper calls its optimizer "Adam" (2010.11929, Table 3). However, the code of the ViT paper
  uses AdamW: the weight decay is decoupled from the gradient, and multiplied by the learning rate.

  Args:
    schedule: learning rate of each step.
    weight_decay: factor of the weight decay, multiplied by the learning rate.
    b1: decay of the first moment.
    b2: decay of the second moment.
    moment_dtype: type of the first moment, one of `MOMENT_DTYPES`.
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
  """Returns the optimizer SGD with momentum; weight decay is added after the momentum."""
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
  """Returns an optimizer: Muon (Jordan et al. 2024) for kernels in blocks, AdamW for other params.

  The orthogonal update is scaled to the size of AdamW's update (Liu et al. 2025, 2502.16982,
  Section 2.2), so Muon and AdamW use the same learning rate. Both use Nesterov momentum here.
  The `update` of this optimizer has two more arguments (see `orthogonalized`).

  Args:
    schedule: learning rate of each step.
    weight_decay: factor of the weight decay, multiplied by the learning rate.
    b1: decay of AdamW's first moment.
    b2: decay of AdamW's second moment.
    momentum: decay of Muon's momentum.
    moment_dtype: type of Muon's momentum and AdamW's first moment, one of `MOMENT_DTYPES`.
  """
  momenta = optax.contrib.muon(
    -1.0,  # the sign and the learning rate are applied after the weight decay
    ns_steps=0,  # `orthogonalized` replaces the Newton-Schulz iterations of optax
    beta=momentum,
    mu_dtype=moment_dtype,
    adam_b1=b1,
    adam_b2=b2,
    muon_weight_dimension_numbers=block_matrices,
  )
  return optax.chain(
    orthogonalized(momenta),
    # Weight decay is a separate step. Inside optax's Muon, it would either skip the embedding and
    # the head, or also apply to all biases.
    optax.add_decayed_weights(weight_decay, mask=is_matrix),
    optax.scale_by_learning_rate(schedule),
  )


OPTIMIZERS = {'adamw': adamw, 'muon': muon, 'sgd': sgd}

# bfloat16 halves the memory of the first moment (Zhai et al. 2021, 2106.04560, Section 3.4).
MOMENT_DTYPES = ('float32', 'bfloat16')

FREEZE = {  # `(top-level name of a parameter) -> whether it keeps its initial value`
  '': lambda name: False,
  'backbone': lambda name: name != 'head',
}


def split_frozen(params: dict, freeze: str, adapt: str = '') -> tuple[dict, dict]:
  """Returns the trained parameters and the frozen parameters, as two dicts.

  Args:
    params: parameters of a model and of its adapter.
    freeze: key of `FREEZE`.
    adapt: name of the adapter. If it is not empty, only the adapter, the head and the parameters
      that the objective has added are trained.
  """
  keeps = choose('freeze', freeze, FREEZE)
  if adapt:
    keeps = lambda name: name not in ('head', adapt, *objective_params())
  trained = {name: leaves for name, leaves in params.items() if not keeps(name)}
  return trained, {name: leaves for name, leaves in params.items() if keeps(name)}


def scale_by_layer(decay: float) -> optax.GradientTransformation:
  """Returns a transformation that multiplies each update by `decay ** (depth + 1 - layer)`.

  Here `depth` is the number of blocks. Layer 0 has the parameters of `first_layer`, layer i + 1 is
  block i, and layer depth + 1 has the parameters of `last_layer` and those that the objective has
  added. Parameters of an adapter belong to the adapted layer.

  This is the layer-wise learning-rate decay that BEiT (Bao et al. 2021, 2106.08254) and MAE (He et
  al. 2021, 2111.06377) use for fine-tuning. Layer decay comes after the optimizer and therefore
  also scales the weight decay.
  """

  def scaled(updates):
    depth = sum(name.startswith('block_') for name in updates)

    def scale(name):
      if name in (*last_layer(), *objective_params()):
        return 1.0
      if name in first_layer():
        return decay ** (depth + 1)
      kind, _, i = name.rpartition('_')
      assert kind == 'block', (
        f'The layer of parameter {name} is unknown. List the name in the params of the Pool or '
        'Position that creates the parameter.'
      )
      return decay ** (depth - int(i))

    def layer(name, leaves):
      return scaled(leaves) if name in ADAPTERS else jax.tree.map(lambda x: scale(name) * x, leaves)

    return {name: layer(name, leaves) for name, leaves in updates.items()}

  return optax.stateless(lambda updates, _: scaled(updates))


def is_matrix(params) -> dict:
  """Returns a tree like `params` that is True for kernels and for the factors of LoRA."""
  matrices = ('kernel', 'a', 'b')
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in matrices, params)


def make_optimizer(
  name: str, schedule: schedules.Schedule, clip: float, layer_decay: float = 1.0, **arguments
) -> optax.GradientTransformationExtraArgs:
  """Returns the optimizer `name`, preceded by gradient clipping and followed by layer decay.

  Args:
    name: key of `OPTIMIZERS`.
    schedule: learning rate of each step.
    clip: maximum norm of the whole gradient; 0 for no clipping.
    layer_decay: ratio of a layer's learning rate to the next layer's learning rate; 1: equal rates.
    **arguments: other keys `optimizer.<key>` of the config. Keys that the function of the optimizer
      does not accept are ignored.
  """
  function = choose('optimizer.name', name, OPTIMIZERS)
  parts = [function(schedule, **accepted(function, arguments))]
  if clip:
    parts.insert(0, optax.clip_by_global_norm(clip))
  if layer_decay != 1:
    parts.append(scale_by_layer(layer_decay))
  return optax.with_extra_args_support(optax.chain(*parts) if len(parts) > 1 else parts[0])
