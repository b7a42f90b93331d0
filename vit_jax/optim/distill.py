"""Distillation: a student also learns from the predictions of a trained teacher.

Decisions:
  * The teacher sees the augmented and mixed images of the student (Beyer et al. 2021, 2106.05237).
    On the device, they are resized to the teacher's input size and normalised for the teacher.
  * A kind of distillation is a loss `(logits_BL, teacher_BL, ...) -> loss_B`. A config key
    `distill.<name>` is passed to it as the argument `<name>` if it has an argument of this name.
  * With a distillation token (`pool=distilled`), the class head learns only from the labels, and
    the distillation head only from the teacher. Other models have one head, which learns from both.
"""

from collections.abc import Callable, Mapping
import dataclasses

import jax
import jax.numpy as jnp
import optax

from vit_jax.model import Dense, ViT


def soft(logits_BL: jax.Array, teacher_BL: jax.Array, temperature: float) -> jax.Array:
  """Returns `T^2 KL(teacher || student)`, with both logits divided by the temperature T.

  The factor T^2 keeps the size of the gradient when T changes (Hinton et al. 2015, 1503.02531,
  Section 2). The gradient of the logits is T times the difference of the two softmaxes.
  """
  student_BL, target_BL = (
    jax.nn.log_softmax(x.astype(jnp.float32) / temperature) for x in (logits_BL, teacher_BL)
  )
  return temperature**2 * optax.losses.kl_divergence_with_log_targets(student_BL, target_BL)


def hard(logits_BL: jax.Array, teacher_BL: jax.Array) -> jax.Array:
  """Returns the cross-entropy with the teacher's decision (Touvron et al. 2020, 2012.12877, eq. 3).

  The decision has no label smoothing, as in the paper.
  """
  return optax.softmax_cross_entropy_with_integer_labels(logits_BL, teacher_BL.argmax(axis=-1))


DISTILLATIONS = {'soft': soft, 'hard': hard}


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A trained model from which a student learns.

  Attributes:
    model: the teacher's model.
    params: its parameters, as NumPy arrays.
    normalize: maps uint8 images of any size to inputs of the model.
    distillation: an entry of `DISTILLATIONS` with its keys bound.
    weight: share of the teacher's loss in the loss of the student.
    cached: whether the logits are computed once for each example, because nothing random changes
      an image. Batches then contain these logits as `teacher`, `[B, L]`.
    digest: hash of the parameters.
  """

  model: ViT
  params: dict
  normalize: Callable[[jax.Array], jax.Array]
  distillation: Callable[[jax.Array, jax.Array], jax.Array]
  weight: float
  cached: bool
  digest: str

  def logits(self, params: dict, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Returns the logits `[B, L]` for the uint8 images of a batch, unless the batch has them."""
    if 'teacher' in batch:
      return batch['teacher']
    image_BHWC = self.normalize(batch['image'])
    with jax.named_scope('teacher'):  # `training/tracing.py` counts this scope as a module
      return self.model.apply({'params': params['teacher']}, image_BHWC)

  def loss(self, loss_B: jax.Array, logits_BL: jax.Array, teacher_BL: jax.Array) -> jax.Array:
    """Returns the weighted mean of the label loss `loss_B` and the teacher's loss."""
    return (1 - self.weight) * loss_B + self.weight * self.distillation(logits_BL, teacher_BL)


def split_head(feature_BD: jax.Array, head: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
  """Returns the logits `[B, L]` of the class head and of the distillation head.

  The model has one head, which computes the mean of these logits. Its kernel therefore stacks
  the kernels of both heads, each multiplied by 0.5: first the rows for the class token, then those
  for the distillation token. Both heads have the same bias.

  Args:
    feature_BD: class token and distillation token, concatenated.
    head: kernel and bias of the model's head.
  """
  bias_L, kernels = head['bias'], jnp.split(2 * head['kernel'], 2)
  dense = Dense(bias_L.shape, name='head')
  return tuple(
    dense.apply({'params': {'kernel': kernel, 'bias': bias_L}}, x_BD)
    for kernel, x_BD in zip(kernels, jnp.split(feature_BD, 2, axis=-1))
  )
