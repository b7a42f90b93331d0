"""What training changes, and how it begins."""

import flax.struct
import jax
import jax.numpy as jnp
import optax

from vit_jax.distributed import layout
from vit_jax.model import ViT
from vit_jax.optim import split_frozen


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


def init_state(
  model: ViT,
  optimizer: optax.GradientTransformation,
  image_shape: tuple[int, int, int],
  seed: int,
  keep_ema: bool,
  mesh: jax.sharding.Mesh,
  freeze: str = '',
) -> TrainState:
  """The state before the first step, made where it stays; none for what `freeze` keeps."""

  def init():
    params = init_params(model, image_shape, seed)
    ema = params if keep_ema else None
    opt_state = optimizer.init(split_frozen(params, freeze)[0])
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, ema)

  return jax.jit(init, out_shardings=layout(mesh, jax.eval_shape(init)))()
