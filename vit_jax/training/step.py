"""The train step: augment, forward, loss, gradient, update, metrics, moving average of weights.

Decisions:
  * Random keys are derived from the seed, the step and the example's position in the batch. So no
    key is stored, and the random numbers do not depend on the number of devices or micro-batches.
  * The objective of a step is an entry of `OBJECTIVES` in `optim/objectives.py`.
  * If mixup or cutmix mixes an image with a second image, training accuracy uses only the label of
    the first image. However, the second image can have the larger weight. So with mixup or cutmix,
    training accuracy says little about the model.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
import optax

from vit_jax.distributed import add_up, keep_layout, target
from vit_jax.evaluation import training_score
from vit_jax.experiment import Experiment
from vit_jax.optim import Training
from vit_jax.training.state import TrainState

TrainStep = Callable[[TrainState, dict, dict | None], tuple[TrainState, dict]]

DETERMINISTIC = {'xla_gpu_deterministic_ops': True}  # compiler option of XLA


def loss_fn(
  batch: dict, trained: dict, frozen: dict, key: jax.Array, early: jax.Array | None, exp: Experiment
):
  """Returns the loss and the metrics (from `training_score`) of a micro-batch.

  The loss is the summed loss of the images in the micro-batch, divided by the size of the whole
  batch. So the losses of all micro-batches add up to the mean loss of the batch.

  Args:
    batch: micro-batch with `image` (uint8 `[B, H, W, C]`) or `feature` (`[B, D]`), `label` (`[B]`,
      or multi-hot `[B, L]`) and `example` (`[B]`, positions of the images in the whole batch).
    trained: parameters that get a gradient.
    frozen: all other parameters. If the step runs a teacher, the key `teacher` has the parameters
      of the teacher.
    key: random key of the step.
    early: whether mixing and strong augmentations are on in this step. They can be off in the last
      part of a run (`augment.off_for_last`). None if no step turns them off.
    exp: experiment to train.
  """
  image_key, own_key = jax.random.split(key)
  if exp.sees_images:
    with jax.named_scope('augment'):
      image_BHWC, own_B = exp.augment_and_mix(
        image_key, batch['example'], batch['image'], early=early
      )
    batch = batch | {'image': image_BHWC, 'own': own_B}
  loss_B, logits_BL = exp.objective.loss(exp, trained | frozen, batch, own_key)
  score = training_score(logits_BL, batch['label'], loss_B)
  return loss_B.sum() / exp.config.batch_size, score


def train_step(
  state: TrainState,
  batch: dict,
  teacher: dict | None = None,
  *,
  exp: Experiment,
  training: Training,
  mesh: jax.sharding.Mesh,
) -> tuple[TrainState, dict]:
  """Updates the training state with a batch.

  Args:
    state: state before the step.
    batch: `image` (uint8 `[B, H, W, C]`) or `feature` (`[B, D]`), and `label`. Two keys are
      optional. `bad` (int32 `[B]`) has, for each row, the number of bad images that were skipped to
      find a good image. `teacher` (`[B, L]`) has the teacher's logits if they were computed before
      training.
    teacher: parameters of the teacher; None if no step runs a teacher.
    exp: experiment to train.
    training: data, steps and optimizer of the run.
    mesh: mesh of the devices.

  Returns:
    The new state and a dict of metrics: `score` (sums over the batch), `grad_norm` (before
    clipping) and `learning_rate` (of this step). If the batch has the key `bad`, the metrics also
    contain `bad_images`, the sum of `bad`.
  """
  config = exp.config
  key = jax.random.fold_in(jax.random.key(config.seed), state.step)
  batch = batch | {'example': jnp.arange(config.batch_size)}
  bad_B = batch.pop('bad', None)
  early = state.step < training.early_steps if training.early_steps < training.steps else None
  trained, frozen = exp.split(state.params)
  taught = {} if teacher is None else {'teacher': teacher}

  gradient = jax.grad(functools.partial(loss_fn, exp=exp), argnums=1, has_aux=True)
  parts = exp.training_parts(mesh)
  grads, score = add_up(gradient, mesh, parts)(batch, trained, frozen | taught, key, early)

  with jax.named_scope('optimizer'):
    updates, opt_state = training.optimizer.update(
      grads, state.opt_state, trained, mesh=mesh, dtype=exp.model.dtype
    )
    params = optax.apply_updates(trained, updates) | frozen
  metrics = {
    'score': score,
    'grad_norm': optax.tree.norm(grads),
    'learning_rate': training.schedule(state.step),
  }
  if bad_B is not None:
    metrics['bad_images'] = bad_B.sum()
  state = TrainState(state.step + 1, params, opt_state, averaged(state, params, exp))
  return keep_layout(mesh, state), metrics


def averaged(state: TrainState, params: dict, exp: Experiment) -> dict | None:
  """Returns the moving average of the parameters after a step; None without averaging.

  Args:
    state: state before the step.
    params: parameters after the step.
    exp: experiment to train.
  """
  if state.ema is None:
    return None
  average, constant = exp.split(state.ema)
  trained, _ = exp.split(params)
  # The decay is smaller in the first steps, so that a short run also forgets its initial weights.
  decay = jnp.minimum(exp.config.ema, (1 + state.step) / (10 + state.step))
  return optax.incremental_update(trained, average, 1 - decay) | constant


def make_train_step(exp: Experiment, training: Training, mesh: jax.sharding.Mesh) -> TrainStep:
  """Returns the jitted `train_step` of a run.

  Each call donates the arrays of the given state, so the caller cannot use them afterwards.
  """
  step = functools.partial(train_step, exp=exp, training=training, mesh=mesh)
  options = compiler_options(exp.config.deterministic, mesh)
  return jax.jit(step, donate_argnums=0, compiler_options=options)


def compiler_options(deterministic: bool, mesh: jax.sharding.Mesh | None = None) -> dict | None:
  """Returns the compiler options for the programs of a run; None if there are none.

  Args:
    deterministic: `deterministic` of the config.
    mesh: mesh of the devices; None for the devices of this process.
  """
  on_gpu = target(mesh).platform in ('cuda', 'rocm')
  return DETERMINISTIC if deterministic and on_gpu else None
