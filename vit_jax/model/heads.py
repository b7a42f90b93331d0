"""The k-NN head, which classifies by the nearest training images, and `head_logits` for all heads.

The k-NN head is the weighted classifier of Wu et al. 2018 (1805.01978, Section 3.4). Its constants
come from the paper and the code of DINO (Caron et al. 2021, 2104.14294, Section 4.1). To classify
an image, the head finds the 20 training images with the highest cosine similarity. Each of them
votes for its own class. A vote has the weight exp(similarity / 0.07).

Decisions:
  * The stored features and labels are parameters, so checkpoints, inference and exported
    programs need no extra code. Features and labels are float32, like all parameters.
  * Logits are logarithms of the votes, so the softmax of the logits is the fraction of the votes
    that each class gets.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp

from vit_jax.model.layers import Dense

NEIGHBOURS = 20
TEMPERATURE = 0.07
# Lower bound for the votes of a class, so that their logarithm is finite. The nearest training
# image has the vote 1.
LOWEST = 1e-12


class KnnHead(nn.Module):
  """The k-NN classifier: features `[B, D]` to logits `[B, L]`.

  Attributes:
    num_classes: L, number of classes.
    examples: M, number of stored training images, including padding rows.
  """

  num_classes: int
  examples: int

  @nn.compact
  def __call__(self, x_BD: jax.Array) -> jax.Array:
    zeros = nn.initializers.zeros
    feature_MD = self.param('feature', zeros, (self.examples, x_BD.shape[-1]))
    label_M = self.param('label', zeros, (self.examples,))
    return knn_logits(x_BD, feature_MD, label_M, self.num_classes)


def knn_logits(
  x_BD: jax.Array, feature_MD: jax.Array, label_M: jax.Array, num_classes: int
) -> jax.Array:
  """Returns the logits `[B, L]` of the k-NN classifier: the logarithm of the votes for each class.

  All votes are divided by the vote of the nearest training image. This division does not change the
  softmax of the logits.

  Args:
    x_BD: features of the images to classify.
    feature_MD: features of the training images, scaled to length 1.
    label_M: class of each training image. The class -1 marks a row of padding, which has no vote.
    num_classes: L, number of classes.
  """
  similarity_BM = jnp.matmul(
    unit(x_BD.astype(jnp.float32)), feature_MD.T, precision=jax.lax.Precision.HIGHEST
  )
  similarity_BM = jnp.where(label_M < 0, -2.0, similarity_BM)
  best_BK, index_BK = jax.lax.top_k(similarity_BM, min(NEIGHBOURS, len(label_M)))
  weight_BK = jnp.exp((best_BK - best_BK[:, :1]) / TEMPERATURE)
  voted_BKL = jax.nn.one_hot(jnp.take(label_M, index_BK).astype(jnp.int32), num_classes)
  vote_BL = (weight_BK[..., None] * voted_BKL).sum(axis=1)
  return jnp.log(jnp.maximum(vote_BL, LOWEST))


def head_logits(model: nn.Module, head: dict, feature_BD: jax.Array) -> jax.Array:
  """Returns the logits `[B, L]` that the head of a model computes from features `[B, D]`.

  Args:
    model: a `ViT` with a head.
    head: parameters of the head.
    feature_BD: inputs of the head. If `model.cosine` is True, each row must have length 1.
  """
  if model.examples is not None:
    return knn_logits(feature_BD, head['feature'], head['label'], model.num_classes)
  return Dense((model.num_classes,)).apply({'params': head}, feature_BD)


def unit(x_ND: jax.Array) -> jax.Array:
  """Scales vectors to length 1, so that their inner products are cosine similarities."""
  # The exporter to ONNX turns a sum of squares into ReduceL2, an operator that onnxruntime cannot
  # prepare for int8. With `vecdot`, this operator does not appear.
  square_N = jnp.vecdot(x_ND, x_ND, precision=jax.lax.Precision.HIGHEST)
  length_N1 = jnp.sqrt(square_N)[..., None]
  return x_ND / jnp.maximum(length_N1, 1e-12)
