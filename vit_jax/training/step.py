"""The train step.

Decisions:
  * Randomness folds (seed, step) and then the example's position in the batch: no key is
    stored, and no draw depends on devices or micro-batches.
  * Accuracy counts an image that is mixed of two under its own label, even where more of it is of
    the other: with mixup and cutmix it says little.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from vit_jax.distributed import add_up, keep_layout
from vit_jax.evaluation import training_score
from vit_jax.experiment import Experiment
from vit_jax.optim import Training, split_frozen
from vit_jax.training import state

TrainStep = Callable[[state.TrainState, dict], tuple[state.TrainState, dict]]

DETERMINISTIC = {'xla_gpu_deterministic_ops': True}  # XLA's name for it


def make_train_step(exp: Experiment, training: Training, mesh: jax.sharding.Mesh) -> TrainStep:
  """The jitted step `(state, batch) -> (state, metrics)`; the state's buffers are donated.

  The metrics are `score` (sums over the batch), `grad_norm` (before clipping),
  `learning_rate` (the one applied) and, where the batch has `bad`, `bad_images`: their number.
  """
  config = exp.config
  parts = config.micro_batches or exp.micro_batches(mesh, config.batch_size)

  def loss_fn(trained, frozen, part, key, early):
    loss_B, logits_BL = exp.training_loss(trained | frozen, part, key, early)
    score = training_score(logits_BL, part['label'], loss_B)
    return loss_B.sum() / config.batch_size, score

  def gradient(part, trained, frozen, key, early):
    """A micro-batch's share of the gradient of the mean loss, and its metrics."""
    grads, score = jax.grad(loss_fn, has_aux=True)(trained, frozen, part, key, early)
    return keep_layout(mesh, grads), score

  gradients = add_up(gradient, mesh, parts)

  def train_step(old, batch):
    key = jax.random.fold_in(jax.random.key(config.seed), old.step)
    batch = batch | {'example': jnp.arange(config.batch_size)}
    bad_B = batch.pop('bad', None)
    trained, frozen = split_frozen(old.params, config.freeze)
    early = old.step < training.early_steps if training.early_steps < training.steps else None
    grads, score = gradients(batch, trained, frozen, key, early)
    updates, opt_state = training.optimizer.update(grads, old.opt_state, trained)
    trained = optax.apply_updates(trained, updates)
    ema = old.ema
    if ema is not None:
      average, constant = split_frozen(ema, config.freeze)
      # A short run, too, forgets the weights that it began with.
      decay = jnp.minimum(config.ema, (1 + old.step) / (10 + old.step))
      ema = optax.incremental_update(trained, average, 1 - decay) | constant
    metrics = {
      'score': score,
      'grad_norm': optax.global_norm(grads),
      'learning_rate': training.schedule(old.step),
    }
    if bad_B is not None:
      metrics['bad_images'] = bad_B.sum()
    new = state.TrainState(old.step + 1, trained | frozen, opt_state, ema)
    return keep_layout(mesh, new), metrics

  options = DETERMINISTIC if config.deterministic and jax.default_backend() == 'gpu' else None
  return jax.jit(train_step, donate_argnums=0, compiler_options=options)
