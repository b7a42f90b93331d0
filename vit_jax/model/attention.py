"""Scaled dot-product attention (paper, Appendix A, equations 5 to 8) and its kernels.

`select_kernel` chooses one of these kernels, depending on the arrays and the devices:

  * `plain` computes the attention weights explicitly, with operations that XLA compiles.
  * `with_gradient` is for CPUs. It computes the same output as `plain`, but has a custom gradient.
    This gradient makes two fewer passes over the attention weights than JAX's own gradient of
    `plain`. The arrays of `with_gradient` have the tokens as the last axis, so that passes and
    matrix products access contiguous memory.
  * `flash` is cuDNN's flash attention (Dao et al. 2022, 2205.14135). It never stores the attention
    weights. It runs on NVIDIA GPUs in half precision.

`padded` is for sequences that are padded to one length. It runs on all devices, and `select_kernel`
never chooses it. An exported program always uses `plain`, because the device that will run the
program is not known (see `backend.portable`).

The softmax runs in float32 for every compute type. Queries, keys and values have the layout
`[B, N, K, E]`, for N tokens and K heads of size E. If there can be fewer queries than tokens, the
number of queries is called Q.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

from vit_jax.distributed import Target, target
from vit_jax.model.products import stored_transpose, wants_stored

# Values of `model.attention`. `cudnn` and `plain` each name a kernel. `auto` stands for the fastest
# kernel that the devices support.
ATTENTION = ('auto', 'cudnn', 'plain')

AMPERE = 8.0  # compute capability of the first GPUs that cuDNN's flash attention supports


def select_kernel(
  choice: str, query_BQKE: jax.Array, key_BNKE: jax.Array, drops: bool = False
) -> Callable:
  """Returns the attention kernel `(query, key, value, keep, rate) -> y_BQKE` for given arrays.

  The docstring of `plain` describes the arguments of a kernel. On a CPU, the kernel is
  `with_gradient` unless the choice is `plain`. On other devices, the choices `auto` and
  `cudnn` give the kernel `flash`. If `flash` cannot run, both choices give `plain`. For example,
  `flash` supports neither attention dropout nor attention pooling (`MapHead`) with its one query.

  Args:
    choice: one of `ATTENTION`.
    query_BQKE: queries, or a `jax.ShapeDtypeStruct` of the queries.
    key_BNKE: keys, or a `jax.ShapeDtypeStruct` of the keys.
    drops: whether dropout applies to the attention weights.
  """
  if choice == 'plain':
    return plain
  devices = target()
  if devices.platform == 'cpu':
    return with_gradient
  obstacle = flash_obstacle(devices, query_BQKE.dtype, query_BQKE.shape[-1])
  if obstacle or drops or query_BQKE.shape != key_BNKE.shape:
    return plain
  return flash


def flash_obstacle(devices: Target, dtype: jnp.dtype, head_size: int) -> str:
  """Returns the reason why cuDNN's flash attention cannot run; an empty text if it can.

  Args:
    devices: the devices that the program runs on.
    dtype: type of queries, keys and values.
    head_size: E, size of a head.
  """
  if devices.platform != 'cuda' or devices.capability < AMPERE:
    return 'the devices are not NVIDIA GPUs of the Ampere generation or later'
  if dtype not in (jnp.bfloat16, jnp.float16):
    return f'model.dtype={jnp.dtype(dtype).name} is not bfloat16'
  if head_size % 8 or head_size > 128:
    return f'the head size {head_size} is above 128, or is not a multiple of 8'
  return ''


def flash(
  query_BNKE: jax.Array,
  key_BNKE: jax.Array,
  value_BNKE: jax.Array,
  keep_BKNN: None = None,
  rate: float = 0.0,
) -> jax.Array:
  """Returns the values averaged by the attention weights, computed by cuDNN: `[B, N, K, E]`.

  cuDNN has no gradient for an odd number of tokens, such as 196 patches and a class token. In this
  case, this function adds a masked token, and cuts off the output for this token. The remaining
  output and the gradient are the same as without the token.

  Args:
    query_BNKE: queries.
    key_BNKE: keys.
    value_BNKE: values.
    keep_BKNN: must be None. This function has no dropout, because cuDNN cannot use given
      dropout masks.
    rate: not used.
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


def attention_weights(
  query_BQKE: jax.Array, key_BNKE: jax.Array, length_B: jax.Array | None = None
) -> jax.Array:
  """Returns the softmax of `q k^T / sqrt(E)` over the keys, `[B, K, Q, N]`; each row sums to 1.

  `length_B` is the number of keys of each example. All later keys are padding, and their weight is
  0. None: no padding.
  """
  query_BKQE = jnp.swapaxes(query_BQKE * query_BQKE.shape[-1] ** -0.5, 1, 2)
  key_BKNE = jnp.swapaxes(key_BNKE, 1, 2)
  logits_BKQN = jnp.einsum(
    'BKQE,BKNE->BKQN', query_BKQE, key_BKNE, preferred_element_type=jnp.float32
  )
  if length_B is not None:
    inside_BN = jnp.arange(key_BNKE.shape[1]) < length_B[:, None]
    logits_BKQN = jnp.where(inside_BN[:, None, None], logits_BKQN, -jnp.inf)
  return jax.nn.softmax(logits_BKQN).astype(query_BQKE.dtype)


def plain(
  query_BQKE: jax.Array,
  key_BNKE: jax.Array,
  value_BNKE: jax.Array,
  keep_BKQN: jax.Array | None,
  rate: float,
) -> jax.Array:
  """Returns the values averaged by the attention weights, `[B, Q, K, E]`.

  Args:
    query_BQKE: queries; there can be fewer queries than keys (the MAP head has one query).
    key_BNKE: keys.
    value_BNKE: values.
    keep_BKQN: bool mask, True for the weights that dropout keeps; None keeps all. Kept weights are
      divided by `1 - rate`.
    rate: dropout rate.
  """
  return mixed_values(drop(attention_weights(query_BQKE, key_BNKE), keep_BKQN, rate), value_BNKE)


def padded(
  query_BQKE: jax.Array, key_BNKE: jax.Array, value_BNKE: jax.Array, length_B: jax.Array
) -> jax.Array:
  """Returns the output of attention, `[B, Q, K, E]` with K heads, for padded sequences.

  `length_B` is the number of keys of each example. All later keys are padding, and their weight is
  0.
  """
  return mixed_values(attention_weights(query_BQKE, key_BNKE, length_B), value_BNKE)


def mixed_values(weights_BKQN: jax.Array, value_BNKE: jax.Array) -> jax.Array:
  """Returns the values averaged by the given attention weights, `[B, Q, K, E]`."""
  value_BKNE = jnp.swapaxes(value_BNKE, 1, 2)
  return jnp.swapaxes(jnp.einsum('BKQN,BKNE->BKQE', weights_BKQN, value_BKNE), 1, 2)


# Without differentiation, `with_gradient` runs `plain`, which is faster because it saves nothing
# for a backward pass. A custom gradient supports reverse mode only. For `jax.jvp`, trace the model
# in the context manager `portable`.
with_gradient = jax.custom_vjp(plain, nondiff_argnums=(4,))


def forward(query_BQKE, key_BNKE, value_BNKE, keep_BKQN, rate):
  """Forward pass of `with_gradient`: returns the output of `plain`, and arrays for `backward`.

  The arrays for `backward` include the attention weights before normalisation, which are
  `exp(logit - largest logit)`.
  """
  scale = query_BQKE.shape[-1] ** -0.5
  query_BKEQ, key_BKEN, value_BKEN = map(heads_first, (query_BQKE * scale, key_BNKE, value_BNKE))
  logits_BKNQ = over_heads(key_BKEN, query_BKEQ)
  weights_BKNQ = jnp.exp(logits_BKNQ - logits_BKNQ.max(axis=2, keepdims=True))
  total_BK1Q = weights_BKNQ.sum(axis=2, keepdims=True)
  weights_BKNQ = weights_BKNQ.astype(query_BQKE.dtype)
  keep_BKNQ = None if keep_BKQN is None else jnp.swapaxes(keep_BKQN, 2, 3)
  y_BKEQ = jnp.einsum('BKEN,BKNQ->BKEQ', value_BKEN, drop(weights_BKNQ, keep_BKNQ, rate))
  y_BKEQ = (y_BKEQ / total_BK1Q).astype(query_BQKE.dtype)
  saved = query_BKEQ, key_BKEN, value_BKEN, keep_BKNQ, weights_BKNQ, total_BK1Q, y_BKEQ
  return tokens_first(y_BKEQ), saved


def backward(rate, saved, dy_BQKE):
  """Backward pass of `with_gradient`: returns the gradients of queries, keys, values and mask.

  `saved` are the arrays from `forward`, and `dy_BQKE` is the gradient of the output. The gradient
  of the dropout mask is None.

  Let w be the attention weights, and dw their gradient. Let y be the output of attention, and dy
  its gradient. The gradient of the softmax needs `sum_n w dw`, a sum over N tokens. This sum equals
  `sum_e y dy`, which has only E terms.
  """
  query_BKEQ, key_BKEN, value_BKEN, keep_BKNQ, weights_BKNQ, total_BK1Q, y_BKEQ = saved
  dtype = dy_BQKE.dtype
  dy_BKEQ = (heads_first(dy_BQKE) / total_BK1Q).astype(dtype)
  dvalue_BKEN = jnp.einsum('BKEQ,BKNQ->BKEN', dy_BKEQ, drop(weights_BKNQ, keep_BKNQ, rate))
  dweights_BKNQ = over_heads(value_BKEN, dy_BKEQ)
  product_BKEQ = dy_BKEQ.astype(jnp.float32) * y_BKEQ
  inner_BK1Q = product_BKEQ.sum(axis=2, keepdims=True)
  dlogits_BKNQ = weights_BKNQ * (drop(dweights_BKNQ, keep_BKNQ, rate) - inner_BK1Q)
  dlogits_BKNQ = dlogits_BKNQ.astype(dtype)
  dquery_BKEQ = jnp.einsum('BKEN,BKNQ->BKEQ', key_BKEN, dlogits_BKNQ)
  dkey_BKEN = jnp.einsum('BKEQ,BKNQ->BKEN', query_BKEQ, dlogits_BKNQ)
  scale = query_BKEQ.shape[2] ** -0.5
  return (*map(tokens_first, (dquery_BKEQ * scale, dkey_BKEN, dvalue_BKEN)), None)


with_gradient.defvjp(forward, backward)


def over_heads(left_BKEN: jax.Array, right_BKEQ: jax.Array) -> jax.Array:
  """Returns, for each head, the inner products of left and right tokens: float32 `[B, K, N, Q]`.

  Each product is a sum over E, the size of a head.
  """
  sums = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  if wants_stored(left_BKEN.dtype):
    return sums('BKNE,BKEQ->BKNQ', stored_transpose(left_BKEN), right_BKEQ)
  return sums('BKEN,BKEQ->BKNQ', left_BKEN, right_BKEQ)


def heads_first(x_BNKE: jax.Array) -> jax.Array:
  """Transposes an array from `[B, N, K, E]` to `[B, K, E, N]`."""
  return x_BNKE.transpose(0, 2, 3, 1)


def tokens_first(x_BKEN: jax.Array) -> jax.Array:
  """Transposes an array from `[B, K, E, N]` to `[B, N, K, E]`."""
  return x_BKEN.transpose(0, 3, 1, 2)


def drop(weights: jax.Array, keep: jax.Array | None, rate: float) -> jax.Array:
  """Returns attention weights after dropout with the mask `keep`; None keeps all weights.

  Kept weights are divided by `1 - rate`, and the others are set to 0.
  """
  return weights if keep is None else jnp.where(keep, weights / (1 - rate), 0).astype(weights.dtype)
