"""The train step: augment, forward, loss, gradient, update, metrics, average.

Decisions:
  * Randomness folds (seed, step) and then the example's position in the batch: no key is
    stored, and no draw depends on devices or micro-batches.
  * Accuracy counts an image that is mixed of two under its own label, even where more of it is of
    the other: with mixup and cutmix it says little.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
import optax

from vit_jax.augment import partner
from vit_jax.distributed import add_up, keep_layout
from vit_jax.evaluation import training_score
from vit_jax.experiment import Experiment
from vit_jax.optim import Training, split_frozen
from vit_jax.training.state import TrainState

TrainStep = Callable[[TrainState, dict], tuple[TrainState, dict]]

DETERMINISTIC = {'xla_gpu_deterministic_ops': True}  # XLA's name for it


def loss_fn(
  batch: dict, trained: dict, frozen: dict, key: jax.Array, early: jax.Array | None, exp: Experiment
):
  """A micro-batch's share of the mean loss of its batch, and the score of each of its examples.

  Args:
    batch: `image`, `label` and `example`.
    trained: the parameters that have a gradient.
    frozen: the others.
    key: of the step.
    early: whether the step has strong augmentations; None: all steps have them.
    exp: what is trained.
  """
  image_key, dropout_key = jax.random.split(key)
  example_B, label_B = batch['example'], batch['label']
  image_BHWC, own_B = exp.augment_and_mix(image_key, example_B, batch['image'], early=early)
  logits_BL = exp.logits(trained | frozen, batch | {'image': image_BHWC}, dropout_key)
  loss_B = exp.loss(logits_BL, label_B)
  if exp.mixes:
    loss_B = own_B * loss_B + (1 - own_B) * exp.loss(logits_BL, partner(label_B))
  return loss_B.sum() / exp.config.batch_size, training_score(logits_BL, label_B, loss_B)


def train_step(
  state: TrainState, batch: dict, exp: Experiment, training: Training, mesh: jax.sharding.Mesh
) -> tuple[TrainState, dict]:
  """The state after a batch, and its metrics.

  Returns:
    Among the metrics are `score` (sums over the batch), `grad_norm` (before clipping),
    `learning_rate` (the one applied) and, where the batch has `bad`, `bad_images`: their number.
  """
  config = exp.config
  key = jax.random.fold_in(jax.random.key(config.seed), state.step)
  batch = batch | {'example': jnp.arange(config.batch_size)}
  bad_B = batch.pop('bad', None)
  early = state.step < training.early_steps if training.early_steps < training.steps else None
  trained, frozen = split_frozen(state.params, config.freeze)

  gradient = jax.grad(functools.partial(loss_fn, exp=exp), argnums=1, has_aux=True)
  parts = config.micro_batches or exp.micro_batches(mesh, config.batch_size)
  grads, score = add_up(gradient, mesh, parts)(batch, trained, frozen, key, early)

  updates, opt_state = training.optimizer.update(grads, state.opt_state, trained)
  params = optax.apply_updates(trained, updates) | frozen
  metrics = {
    'score': score,
    'grad_norm': optax.global_norm(grads),
    'learning_rate': training.schedule(state.step),
  }
  if bad_B is not None:
    metrics['bad_images'] = bad_B.sum()
  state = TrainState(state.step + 1, params, opt_state, averaged(state, params, exp))
  return keep_layout(mesh, state), metrics


def averaged(state: TrainState, params: dict, exp: Experiment) -> dict | None:
  """The moving average after a step that has led to these parameters; None where none is kept."""
  if state.ema is None:
    return None
  average, constant = split_frozen(state.ema, exp.config.freeze)
  trained, _ = split_frozen(params, exp.config.freeze)
  # A short run, too, forgets the weights that it began with.
  decay = jnp.minimum(exp.config.ema, (1 + state.step) / (10 + state.step))
  return optax.incremental_update(trained, average, 1 - decay) | constant


def make_train_step(exp: Experiment, training: Training, mesh: jax.sharding.Mesh) -> TrainStep:
  """`train_step` of a run, jitted: `(state, batch) -> (state, metrics)`; the state is donated."""
  step = functools.partial(train_step, exp=exp, training=training, mesh=mesh)
  options = DETERMINISTIC if exp.config.deterministic and jax.default_backend() == 'gpu' else None
  return jax.jit(step, donate_argnums=0, compiler_options=options)
