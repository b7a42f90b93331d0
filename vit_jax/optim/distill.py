"""Distillation: a student also learns from the predictions of a trained teacher.

Decisions:
  * The teacher sees the augmented and mixed images of the student (Beyer et al. 2021, 2106.05237).
    On the device, these images are resized and normalised as the teacher expects.
  * A kind of distillation is a loss `(logits_BL, teacher_BL, ...) -> loss_B`. The config key
    `distill.<name>` is passed as the argument `<name>` if the loss has an argument of this name.
  * With a distillation token (`pool=distilled`), the class head learns only from the labels, and
    the distillation head only from the teacher. In other models, one head learns from the labels
    and from the teacher.
"""

from collections.abc import Callable, Mapping
import dataclasses

import jax
import jax.numpy as jnp
import optax

from vit_jax.model import Dense, ViT


def soft(logits_BL: jax.Array, teacher_BL: jax.Array, temperature: float) -> jax.Array:
  """Returns `T^2 KL(teacher || student)` of each image, `[B]`.

  The logits of student and teacher are divided by the temperature T before the softmax. The factor
  T^2 keeps the size of the gradient about the same when T changes (Hinton et al. 2015, 1503.02531,
  Section 2).

  Args:
    logits_BL: logits of the student.
    teacher_BL: logits of the teacher.
    temperature: T.
  """
  student_BL, target_BL = (
    jax.nn.log_softmax(x.astype(jnp.float32) / temperature) for x in (logits_BL, teacher_BL)
  )
  return temperature**2 * optax.losses.kl_divergence_with_log_targets(student_BL, target_BL)


def hard(logits_BL: jax.Array, teacher_BL: jax.Array) -> jax.Array:
  """Returns the cross-entropy `[B]` with the teacher's most likely class as the label.

  This is equation 3 of Touvron et al. 2020, 2012.12877, without label smoothing, as in the paper.

  Args:
    logits_BL: logits of the student.
    teacher_BL: logits of the teacher.
  """
  return optax.softmax_cross_entropy_with_integer_labels(logits_BL, teacher_BL.argmax(axis=-1))


DISTILLATIONS = {'soft': soft, 'hard': hard}


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A trained model from which a student learns.

  Attributes:
    model: the teacher's model.
    params: parameters of the teacher's model, as NumPy arrays.
    normalize: maps uint8 images of any size to inputs of the teacher's model.
    distillation: function from `DISTILLATIONS` with the values of its config keys filled in. It
      maps the logits of student and teacher to a loss `[B]`.
    weight: weight w of the distillation loss, from 0 to 1; the label loss has the weight 1 - w.
    cached: whether the teacher's features are computed once for each training image, before
      training, and stored. Caching is possible only without augmentation and without
      `data.skip_bad_images`. Batches then contain the logits as `teacher`, `[B, L]`.
    digest: SHA-256 of the parameters.
  """

  model: ViT
  params: dict
  normalize: Callable[[jax.Array], jax.Array]
  distillation: Callable[[jax.Array, jax.Array], jax.Array]
  weight: float
  cached: bool
  digest: str

  def logits(self, params: dict, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Returns the teacher's logits `[B, L]` for a batch.

    Args:
      params: dict whose entry `teacher` has the teacher's parameters.
      batch: if there is an entry `teacher`, it contains cached logits, which are returned. Without
        this entry, the teacher is applied to the entry `image`, uint8 `[B, H, W, C]`.
    """
    if 'teacher' in batch:
      return batch['teacher']
    image_BHWC = self.normalize(batch['image'])
    with jax.named_scope('teacher'):  # `training/tracing.py` counts this scope as a module
      return self.model.apply({'params': params['teacher']}, image_BHWC)

  def loss(self, loss_B: jax.Array, logits_BL: jax.Array, teacher_BL: jax.Array) -> jax.Array:
    """Returns the student's loss `[B]`: the weighted mean of label loss and distillation loss.

    Args:
      loss_B: loss of the labels.
      logits_BL: logits of the student, from the head that learns from the teacher.
      teacher_BL: logits of the teacher.
    """
    return (1 - self.weight) * loss_B + self.weight * self.distillation(logits_BL, teacher_BL)


def split_head(feature_BD: jax.Array, head: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
  """Returns the logits of the class head and the logits of the distillation head, each `[B, L]`.

  The model stores the two heads as one linear layer, which computes the mean of their logits. The
  kernel of this layer stacks the kernels of both heads, each multiplied by 0.5. The rows for the
  class token come first, then the rows for the distillation token. Both heads have the same bias.

  Args:
    feature_BD: class token and distillation token, concatenated on the last axis.
    head: `kernel` `[D, L]` and `bias` `[L]` of the stored linear layer.
  """
  bias_L, kernels = head['bias'], jnp.split(2 * head['kernel'], 2)
  dense = Dense(bias_L.shape, name='head')
  return tuple(
    dense.apply({'params': {'kernel': kernel, 'bias': bias_L}}, x_BD)
    for kernel, x_BD in zip(kernels, jnp.split(feature_BD, 2, axis=-1))
  )
