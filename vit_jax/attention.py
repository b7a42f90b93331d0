"""Scaled dot-product attention (paper, Appendix A, equations 5 to 8).

The softmax runs in float32 whatever the compute type. Queries, keys and values come in
the layout `[B, N, K, E]`; the products run in `[B, K, N, E]`, which XLA's CPU backend
computes about twice as fast.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def attention_weights(query_BNKE: jax.Array, key_BNKE: jax.Array) -> jax.Array:
  """Softmax of `q k^T / sqrt(E)` over the keys: `attention_BKNN`, each row sums to 1."""
  scale = query_BNKE.shape[-1] ** -0.5
  query_BKNE = jnp.swapaxes(query_BNKE * scale, 1, 2)
  key_BKNE = jnp.swapaxes(key_BNKE, 1, 2)
  logits_BKNN = jnp.einsum(
    'BKQE,BKNE->BKQN', query_BKNE, key_BKNE, preferred_element_type=jnp.float32
  )
  return jax.nn.softmax(logits_BKNN).astype(query_BNKE.dtype)


def attend(attention_BKNN: jax.Array, value_BNKE: jax.Array) -> jax.Array:
  """The values averaged by the weights: `[B, N, K, E]`."""
  value_BKNE = jnp.swapaxes(value_BNKE, 1, 2)
  return jnp.swapaxes(jnp.einsum('BKQN,BKNE->BKQE', attention_BKNN, value_BKNE), 1, 2)


def attention(
  query_BNKE: jax.Array,
  key_BNKE: jax.Array,
  value_BNKE: jax.Array,
  dropout: Callable[[jax.Array], jax.Array] | None = None,
  inspect: Callable[[jax.Array], object] | None = None,
) -> jax.Array:
  """Multi-head attention, `[B, N, K, E]`.

  Args:
    query_BNKE: queries; their number may differ from the keys' (the MAP head has one).
    key_BNKE: keys.
    value_BNKE: values.
    dropout: applied to the weights `attention_BKNN`.
    inspect: called with the weights before dropout.
  """
  attention_BKNN = attention_weights(query_BNKE, key_BNKE)
  if inspect:
    inspect(attention_BKNN)
  if dropout:
    attention_BKNN = dropout(attention_BKNN)
  return attend(attention_BKNN, value_BNKE)
