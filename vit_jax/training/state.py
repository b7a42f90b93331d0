"""What training changes, and where it begins."""

import logging

from clu import parameter_overview
import flax.struct
import jax
import jax.numpy as jnp
import optax

from vit_jax.distributed import layout, place
from vit_jax.experiment import Experiment
from vit_jax.model import ViT
from vit_jax.optim import Training, split_frozen
from vit_jax.workdir import DETAILS, Checkpoints

log = logging.getLogger(__name__)


@flax.struct.dataclass
class TrainState:
  """Attributes:

  step: updates done, int32.
  params: the model's parameters, float32.
  opt_state: the optimizer's.
  ema: exponential moving average of the parameters; None where none is kept.
  """

  step: jax.Array
  params: dict
  opt_state: optax.OptState
  ema: dict | None

  @property
  def eval_params(self) -> dict:
    """The weights to evaluate: the averaged ones where they are kept."""
    return self.params if self.ema is None else self.ema


def init_params(model: ViT, image_shape: tuple[int, int, int], seed: int) -> dict:
  """Random parameters for images `(H, W, C)`; a function of the seed."""
  image_BHWC = jnp.zeros((1, *image_shape))
  return model.init(jax.random.key(seed), image_BHWC)['params']


def init_state(exp: Experiment, training: Training, mesh: jax.sharding.Mesh) -> TrainState:
  """The state before the first step, made where it stays.

  Optimizers keep nothing of what `freeze` keeps.
  """
  config = exp.config

  def init():
    params = init_params(exp.model, exp.image_shape, config.seed)
    opt_state = training.optimizer.init(split_frozen(params, config.freeze)[0])
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, params if config.ema else None)

  return jax.jit(init, out_shardings=layout(mesh, jax.eval_shape(init)))()


def start_state(
  exp: Experiment, training: Training, mesh: jax.sharding.Mesh, checkpoints: Checkpoints
) -> tuple[TrainState, float]:
  """The newest checkpoint's state, else that of the weights of `init`, else a random one.

  Returns:
    The state, and the seconds that the run has taken before.
  """
  fresh = init_state(exp, training, mesh)
  if checkpoints.latest() is not None:
    leaves, saved = checkpoints.restore(fresh)
    restored = place(jax.tree.unflatten(jax.tree.structure(fresh), leaves), fresh)
    log.info('Going on from step %d.', restored.step)
    return restored, saved['seconds']
  overview = parameter_overview.get_parameter_overview(fresh.params, include_stats=False)
  DETAILS.info('%s', overview)
  if training.params is None:
    return fresh, 0.0
  weights = place(training.params, fresh.params)
  ema = jax.tree.map(jnp.copy, weights) if exp.config.ema else None
  return fresh.replace(params=weights, ema=ema), 0.0
