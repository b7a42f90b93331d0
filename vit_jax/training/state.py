"""The state that training updates, and its initial value."""

from collections.abc import Callable
import logging

from clu import parameter_overview
import flax.struct
import jax
import jax.numpy as jnp
import optax

from vit_jax.distributed import layout, place
from vit_jax.experiment import Experiment
from vit_jax.model import ViT, adapted
from vit_jax.optim import Training
from vit_jax.workdir import DETAILS, Checkpoints

log = logging.getLogger(__name__)


@flax.struct.dataclass
class TrainState:
  """The state that a training step updates.

  Attributes:
    step: number of updates so far, int32.
    params: parameters of the model, of its adapter and of the objective, float32.
    opt_state: the optimizer's state.
    ema: exponential moving average of the parameters; None without averaging.
  """

  step: jax.Array
  params: dict
  opt_state: optax.OptState
  ema: dict | None

  @property
  def eval_params(self) -> dict:
    """The weights for evaluation: `ema` if the run averages its parameters, otherwise `params`."""
    return self.params if self.ema is None else self.ema


def init_params(model: ViT, image_shape: tuple[int, int, int], seed: int) -> dict:
  """Returns random parameters of a model for images of shape `image_shape`, (H, W, C)."""
  image_BHWC = jnp.zeros((1, *image_shape))
  return model.init(jax.random.key(seed), image_BHWC)['params']


def initializer(exp: Experiment, training: Training) -> Callable[[], TrainState]:
  """Returns a function, for `jax.jit`, that creates the state at step 0 with random parameters.

  The optimizer has no state for parameters that `freeze` or `adapt` keeps constant.
  """
  config = exp.config

  def init():
    params = init_params(exp.model, exp.image_shape, config.seed)
    key = jax.random.split(jax.random.key(config.seed))[1]
    params = adapted(params, key, config.adapt, config)
    params |= exp.objective.init(exp, jax.random.fold_in(key, 1))
    opt_state = training.optimizer.init(exp.split(params)[0])
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, params if config.ema else None)

  return init


def init_state(exp: Experiment, training: Training, mesh: jax.sharding.Mesh) -> TrainState:
  """Returns the state at step 0 with random parameters, created directly on the devices."""
  init = initializer(exp, training)
  return jax.jit(init, out_shardings=layout(mesh, jax.eval_shape(init)))()


def state_shapes(exp: Experiment, training: Training, mesh: jax.sharding.Mesh) -> TrainState:
  """Returns the shapes, types and shardings of the training state; allocates nothing on devices.

  The leaves of the result are `jax.ShapeDtypeStruct`.
  """
  shapes = jax.eval_shape(initializer(exp, training))
  described = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
  return jax.tree.map(described, shapes, layout(mesh, shapes))


def start_state(
  exp: Experiment, training: Training, mesh: jax.sharding.Mesh, checkpoints: Checkpoints
) -> tuple[TrainState, float]:
  """Returns the state from which training starts, and the seconds that earlier sessions took.

  The state comes from the newest checkpoint if there is one. Without a checkpoint, the parameters
  are the weights of `init`, or random if `init` is not set.
  """
  if checkpoints.latest() is not None:
    # The devices may not have enough memory for a second state, so `restore` gets only shapes.
    restored, saved = checkpoints.restore(state_shapes(exp, training, mesh))
    log.info('Resuming from step %d.', restored.step)
    return restored, saved['seconds']
  fresh = init_state(exp, training, mesh)
  overview = parameter_overview.get_parameter_overview(fresh.params, include_stats=False)
  DETAILS.info('%s', overview)
  if training.params is None:
    return fresh, 0.0
  given = training.params
  weights = fresh.params | place(given, {name: fresh.params[name] for name in given})
  ema = jax.tree.map(jnp.copy, weights) if exp.config.ema else None
  return fresh.replace(params=weights, ema=ema), 0.0
