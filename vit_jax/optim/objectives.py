"""`OBJECTIVES`: the objectives of training, by the value of the config key `objective`.

The functions of an objective get the `Experiment` as the argument `exp`. This argument has no type
annotation, because the module that defines `Experiment` imports the module `objectives`. Other
packages can add an entry:

    OBJECTIVES['mine'] = Objective(my_loss, my_rows)

Decisions:
  * An objective sees augmented images. It returns one loss for each example, so a batch can be
    divided among devices and micro-batches in any way.
  * An objective can add parameters that users of the trained model do not need, such as a decoder.
    Added parameters are stored next to the model's own entries, such as `embedding` and `head`. The
    field `params` lists the names of the added entries.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math

import jax
import jax.numpy as jnp

from vit_jax.augment import partner
from vit_jax.model import POOLS
from vit_jax.optim import masked
from vit_jax.optim.class_weights import weighted
from vit_jax.optim.distill import split_head


def own_sequence(exp) -> list[tuple[int, int, int]]:
  """Returns the number of tokens, the number of heads and the head size in the model's blocks."""
  model = exp.model
  tokens = model.num_prefix + math.prod(masked.patch_grid(exp))
  return [(tokens, model.num_heads, model.head_size)]


def masked_sequences(exp) -> list[tuple[int, int, int]]:
  """Returns the entries of the model, which sees visible patches only, and of its decoder."""
  keys, [(tokens, heads, size)] = exp.config.masked, own_sequence(exp)
  hidden = masked.num_unseen(math.prod(masked.patch_grid(exp)), keys.share)
  decoder = tokens, keys.decoder_heads, keys.decoder_width // keys.decoder_heads
  return [(tokens - hidden, heads, size), decoder]


@dataclasses.dataclass(frozen=True)
class Objective:
  """The loss that a training run minimises, and the outputs that an evaluation needs.

  Attributes:
    loss: `(exp, params, batch, key) -> loss_B, logits_BL`, for a training step. The batch has the
      augmented images `image`, uint8, and their labels `label`. `example` is the position of each
      image in the batch. If images are mixed in pairs, `own` is the weight of each image in its
      mix. If the step runs a teacher, `params['teacher']` has its parameters. The training
      accuracy is computed from the logits, which are None if `labels` is False.
    rows: `(exp, params, batch) -> {'loss': loss_B, 'logits': logits_BL}`, for evaluation. If
      `labels` is False, the result has no logits. In the batch, `example` is the index of an image
      in its split.
    init: `(exp, key) -> dict` returns initial values of parameters that only this objective has,
      such as a decoder.
    params: names of the parameters that only this objective has; the keys of `init`'s result.
    labels: whether the objective needs labels. If False, the model has no head, the classes of the
      data are ignored, and evaluation reports only the loss.
    sequences: `(exp) -> [(tokens, heads, head size), ...]` returns what attention computes in
      training: one entry for each stack of blocks, the longest sequence last.
  """

  loss: Callable[..., tuple[jax.Array, jax.Array | None]]
  rows: Callable[..., dict[str, jax.Array]]
  init: Callable[..., dict] = lambda exp, key: {}
  params: tuple[str, ...] = ()
  labels: bool = True
  sequences: Callable[..., list[tuple[int, int, int]]] = own_sequence


def supervised(exp, params: dict, batch: dict, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the label loss `[B]` and the logits `[B, L]` of a batch; see `Objective.loss`."""
  logits_BL = exp.logits(params, batch, key)
  return label_loss(exp, logits_BL, batch), logits_BL


def label_loss(exp, logits_BL: jax.Array, batch: dict) -> jax.Array:
  """Returns the label loss of each image, `[B]`, with class weights.

  The loss of a mix of two images is the mean of the losses of both labels, weighted by `own`.
  """
  loss, label_B = weighted(exp.loss, exp.weight_L), batch['label']
  loss_B = loss(logits_BL, label_B)
  if not exp.mixes:
    return loss_B
  own_B = batch['own']
  return own_B * loss_B + (1 - own_B) * loss(logits_BL, partner(label_B))


def distilled(exp, params: dict, batch: dict, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the combined loss of labels and teacher, `[B]`, and the logits `[B, L]`.

  The logits are the mean of the logits of the class head and of the distillation head. Without
  `exp.teacher`, the loss uses only labels. For example, the FLOPs of a run in a workdir
  are counted without loading the teacher.
  """
  if exp.teacher is None:
    return supervised(exp, params, batch, key)
  logits_BL, taught_BL = heads(exp, params, batch, key)
  loss_B = label_loss(exp, logits_BL, batch)
  loss_B = exp.teacher.loss(loss_B, taught_BL, exp.teacher.logits(params, batch))
  return loss_B, (logits_BL + taught_BL) / 2


def heads(exp, params: dict, batch: dict, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns two arrays of logits `[B, L]`: one learns from the labels, the other from the teacher.

  The two arrays differ only if there is a teacher and the model has a distillation token.
  """
  if not (exp.teacher and POOLS[exp.model.pool].distills):
    logits_BL = exp.logits(params, batch, key)
    return logits_BL, logits_BL
  body = dataclasses.replace(exp, model=exp.model.clone(num_classes=None))
  return split_head(body.logits(params, batch, key), params['head'])


def classified(exp, params: dict, batch: dict) -> dict[str, jax.Array]:
  """Returns `logits` `[B, L]` and the unweighted `loss` `[B]` for the labels, for evaluation."""
  logits_BL = exp.logits(params, batch).astype(jnp.float32)
  return {'logits': logits_BL, 'loss': exp.loss(logits_BL, batch['label'])}


def reconstructed(exp, params: dict, batch: dict, key: jax.Array) -> tuple[jax.Array, None]:
  """Returns the mean squared error of the hidden patches, `[B]`, and None instead of logits."""
  return masked.fill_in(exp, params, batch, key, train=True).loss_B, None


def reconstructed_rows(exp, params: dict, batch: dict) -> dict[str, jax.Array]:
  """Returns the mean squared error of the hidden patches as `loss`, `[B]`, for evaluation.

  The mask of an image depends only on the index of the image in its split.
  """
  key = masked.evaluation_key()
  return {'loss': masked.fill_in(exp, params, batch, key).loss_B}


OBJECTIVES = {
  'supervised': Objective(supervised, classified),
  'distilled': Objective(distilled, classified),
  'masked': Objective(
    reconstructed,
    reconstructed_rows,
    masked.init_decoder,
    params=(masked.ENTRY,),
    labels=False,
    sequences=masked_sequences,
  ),
}


def objective_of(config: Mapping) -> Objective:
  """Returns the objective of a config.

  If the key `objective` is None, the objective is `distilled` in a run with a teacher, and
  `supervised` in any other run.
  """
  chosen = 'distilled' if config['distill']['teacher'] else 'supervised'
  return OBJECTIVES[config.get('objective') or chosen]


def objective_params() -> tuple[str, ...]:
  """Returns the names of the parameters that objectives add to the model, such as `decoder`."""
  return tuple(name for entry in OBJECTIVES.values() for name in entry.params)


def without_objective(params: dict) -> dict:
  """Returns `params` without the parameters that an objective has added (`objective_params`)."""
  return {name: leaves for name, leaves in params.items() if name not in objective_params()}
