"""Scaled dot-product attention (paper, Appendix A, equations 5 to 8) and its kernels.

`attention` chooses the kernel from its arguments and the backend:

  * `plain` computes the attention weights, which can be inspected, and leaves the rest to XLA.
  * `with_gradient` runs on a CPU. It computes the same output with a custom gradient, which makes
    two fewer passes over the weights. In its array layout, tokens are contiguous, both for its own
    passes and for XLA's matrix products.
  * `flash` is cuDNN's flash attention (Dao et al. 2022, 2205.14135). It never stores the weights.
    It runs on NVIDIA GPUs in half precision.

Exported programs use `plain` for every backend (see `backend.portable`).

The softmax runs in float32 for every compute type. Queries, keys and values have the layout
`[B, N, K, E]`. Q is the number of queries where it can differ from N, the number of tokens.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

from vit_jax.distributed import is_ampere, target_backend


def attention(
  query_BQKE: jax.Array,
  key_BNKE: jax.Array,
  value_BNKE: jax.Array,
  keep_BKQN: jax.Array | None = None,
  rate: float = 0.0,
  inspect: Callable[[jax.Array], object] | None = None,
) -> jax.Array:
  """Returns the output of multi-head attention, `[B, Q, K, E]`.

  Args:
    query_BQKE: queries; the number of keys can be different (the MAP head has one query).
    key_BNKE: keys.
    value_BNKE: values.
    keep_BKQN: mask of the weights that dropout keeps; None keeps all. Kept weights are divided by
      `1 - rate`.
    rate: dropout rate.
    inspect: function to call with the weights before dropout, `[B, K, Q, N]`; None for no call.
  """
  if inspect:
    inspect(attention_weights(query_BQKE, key_BNKE))
    return plain(query_BQKE, key_BNKE, value_BNKE, keep_BKQN, rate)
  target = target_backend()
  if target == 'cpu':
    return with_gradient(query_BQKE, key_BNKE, value_BNKE, keep_BKQN, rate)
  if target and keep_BKQN is None and flash_runs(query_BQKE, key_BNKE):
    return flash(query_BQKE, key_BNKE, value_BNKE)
  return plain(query_BQKE, key_BNKE, value_BNKE, keep_BKQN, rate)


def flash_runs(query_BQKE: jax.Array, key_BNKE: jax.Array) -> bool:
  """Returns whether cuDNN supports these arrays on this GPU.

  cuDNN needs self-attention in half precision, a head size that is a multiple of 8 and at most 128,
  and an Ampere GPU or newer.
  """
  half, size = query_BQKE.dtype in (jnp.bfloat16, jnp.float16), query_BQKE.shape[-1]
  fits = size % 8 == 0 and size <= 128 and query_BQKE.shape == key_BNKE.shape
  return half and fits and is_ampere()


def flash(query_BNKE: jax.Array, key_BNKE: jax.Array, value_BNKE: jax.Array) -> jax.Array:
  """Returns the values averaged by the attention weights, computed by cuDNN: `[B, N, K, E]`.

  cuDNN has no gradient for an odd number of tokens, such as 196 patches and a class token. In this
  case, one masked token is added and its output is cut off. Output and gradient stay the same.
  """
  attend = functools.partial(jax.nn.dot_product_attention, implementation='cudnn')
  batch, tokens = query_BNKE.shape[:2]
  if tokens % 2 == 0:
    return attend(query_BNKE, key_BNKE, value_BNKE)
  padding = ((0, 0), (0, 1), (0, 0), (0, 0))
  padded = (jnp.pad(x, padding) for x in (query_BNKE, key_BNKE, value_BNKE))
  tokens_B = jnp.full(batch, tokens, jnp.int32)
  y_BNKE = attend(*padded, query_seq_lengths=tokens_B, key_value_seq_lengths=tokens_B)
  return y_BNKE[:, :tokens]


def attention_weights(query_BQKE: jax.Array, key_BNKE: jax.Array) -> jax.Array:
  """Returns the softmax of `q k^T / sqrt(E)` over the keys, `[B, K, Q, N]`; each row sums to 1."""
  query_BKQE = jnp.swapaxes(query_BQKE * query_BQKE.shape[-1] ** -0.5, 1, 2)
  key_BKNE = jnp.swapaxes(key_BNKE, 1, 2)
  logits_BKQN = jnp.einsum(
    'BKQE,BKNE->BKQN', query_BKQE, key_BKNE, preferred_element_type=jnp.float32
  )
  return jax.nn.softmax(logits_BKQN).astype(query_BQKE.dtype)


def plain(
  query_BQKE: jax.Array,
  key_BNKE: jax.Array,
  value_BNKE: jax.Array,
  keep_BKQN: jax.Array | None,
  rate: float,
) -> jax.Array:
  """Returns the values averaged by the attention weights, `[B, Q, K, E]`."""
  weights_BKQN = drop(attention_weights(query_BQKE, key_BNKE), keep_BKQN, rate)
  value_BKNE = jnp.swapaxes(value_BNKE, 1, 2)
  return jnp.swapaxes(jnp.einsum('BKQN,BKNE->BKQE', weights_BKQN, value_BKNE), 1, 2)


# Without differentiation, `with_gradient` runs `plain`, which is faster because it saves nothing
# for a backward pass. A custom gradient supports reverse mode only, so `jax.jvp` needs `plain`.
with_gradient = jax.custom_vjp(plain, nondiff_argnums=(4,))


def forward(query_BQKE, key_BNKE, value_BNKE, keep_BKQN, rate):
  """Returns the output and the arrays that `backward` needs, such as the unnormalised weights."""
  scale = query_BQKE.shape[-1] ** -0.5
  query_BKEQ, key_BKEN, value_BKEN = map(heads_first, (query_BQKE * scale, key_BNKE, value_BNKE))
  logits_BKNQ = jnp.einsum(
    'BKEQ,BKEN->BKNQ', query_BKEQ, key_BKEN, preferred_element_type=jnp.float32
  )
  weights_BKNQ = jnp.exp(logits_BKNQ - logits_BKNQ.max(axis=2, keepdims=True))
  total_BK1Q = weights_BKNQ.sum(axis=2, keepdims=True)
  weights_BKNQ = weights_BKNQ.astype(query_BQKE.dtype)
  keep_BKNQ = None if keep_BKQN is None else jnp.swapaxes(keep_BKQN, 2, 3)
  y_BKEQ = jnp.einsum('BKEN,BKNQ->BKEQ', value_BKEN, drop(weights_BKNQ, keep_BKNQ, rate))
  y_BKEQ = (y_BKEQ / total_BK1Q).astype(query_BQKE.dtype)
  saved = query_BKEQ, key_BKEN, value_BKEN, keep_BKNQ, weights_BKNQ, total_BK1Q, y_BKEQ
  return tokens_first(y_BKEQ), saved


def backward(rate, saved, dy_BQKE):
  """Returns the gradients of queries, keys and values.

  The gradient of the softmax needs `sum_n w dw`. This sum equals `sum_e y dy`, which has E
  terms instead of N.
  """
  query_BKEQ, key_BKEN, value_BKEN, keep_BKNQ, weights_BKNQ, total_BK1Q, y_BKEQ = saved
  dtype = dy_BQKE.dtype
  dy_BKEQ = (heads_first(dy_BQKE) / total_BK1Q).astype(dtype)
  dvalue_BKEN = jnp.einsum('BKEQ,BKNQ->BKEN', dy_BKEQ, drop(weights_BKNQ, keep_BKNQ, rate))
  dweights_BKNQ = jnp.einsum(
    'BKEQ,BKEN->BKNQ', dy_BKEQ, value_BKEN, preferred_element_type=jnp.float32
  )
  product_BKEQ = dy_BKEQ.astype(jnp.float32) * y_BKEQ
  inner_BK1Q = product_BKEQ.sum(axis=2, keepdims=True)
  dlogits_BKNQ = weights_BKNQ * (drop(dweights_BKNQ, keep_BKNQ, rate) - inner_BK1Q)
  dlogits_BKNQ = dlogits_BKNQ.astype(dtype)
  dquery_BKEQ = jnp.einsum('BKEN,BKNQ->BKEQ', key_BKEN, dlogits_BKNQ)
  dkey_BKEN = jnp.einsum('BKEQ,BKNQ->BKEN', query_BKEQ, dlogits_BKNQ)
  scale = query_BKEQ.shape[2] ** -0.5
  return (*map(tokens_first, (dquery_BKEQ * scale, dkey_BKEN, dvalue_BKEN)), None)


with_gradient.defvjp(forward, backward)


def heads_first(x_BNKE: jax.Array) -> jax.Array:
  """Returns the array in the layout `[B, K, E, N]`."""
  return x_BNKE.transpose(0, 2, 3, 1)


def tokens_first(x_BKEN: jax.Array) -> jax.Array:
  """Returns the array in the layout `[B, N, K, E]`."""
  return x_BKEN.transpose(0, 3, 1, 2)


def drop(weights: jax.Array, keep: jax.Array | None, rate: float) -> jax.Array:
  """Applies dropout with a given mask; None keeps all weights."""
  return weights if keep is None else jnp.where(keep, weights / (1 - rate), 0).astype(weights.dtype)
