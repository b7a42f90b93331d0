"""Matrix products, activation functions and LayerNorm, computed so that they are fast on CPUs.

Decisions:
  * Every product is two-dimensional, `[N, I] x [I, O]`, with N rows, I inputs and O outputs. On
    CPUs, the gradient of a batched product takes about four times as long as the gradient of a
    two-dimensional product.
  * On CPUs, LayerNorm has a custom gradient, and computes means and sums as products with constant
    vectors. This saves time if rows are short, as in QK-norm. results/notes.md has the step times.
"""

from collections.abc import Callable
import functools

import jax
from jax.experimental.layout import Layout, with_layout_constraint
import jax.numpy as jnp

from vit_jax.distributed import target

# Maximum number of outputs for which `matmul` transposes the kernel. With more outputs, transposing
# costs more time than it saves.
NARROW = 256


def matmul(x_NI: jax.Array, kernel_IO: jax.Array) -> jax.Array:
  """Returns `x W`, `[N, O]`, computed so that the gradient is also fast on CPUs.

  Let dy be the gradient of the output. Then `x^T dy` is the gradient of the kernel. XLA's CPU
  backend computes `dy^T x` up to twice as fast as `x^T dy`. This holds if the kernel has few
  outputs, and more inputs than outputs. Transposing the kernel twice makes XLA compute `dy^T x`.
  The barrier stops XLA from cancelling the two transpositions.
  """
  if target().platform != 'cpu':
    return x_NI @ kernel_IO
  if wants_stored(x_NI.dtype):
    return with_stored_transposes(x_NI, kernel_IO)
  inputs, outputs = kernel_IO.shape
  if outputs < inputs and outputs <= NARROW:
    return x_NI @ jax.lax.optimization_barrier(kernel_IO.T).T
  return x_NI @ kernel_IO


@jax.custom_vjp
def with_stored_transposes(x_NI: jax.Array, kernel_IO: jax.Array) -> jax.Array:
  """Returns `x W`, `[N, O]`. Its gradients are products with copies of `x^T` and of `W^T`.

  `stored_transpose` makes the copies. `wants_stored` says when the copies save time.
  """
  return x_NI @ kernel_IO


def product_forward(x_NI, kernel_IO):
  """Forward pass of `with_stored_transposes`: returns `x W`, and x and W for the backward pass."""
  return x_NI @ kernel_IO, (x_NI, kernel_IO)


def product_backward(saved, dy_NO):
  """Backward pass of `with_stored_transposes`: returns the gradients of x and W."""
  x_NI, kernel_IO = saved
  return dy_NO @ stored_transpose(kernel_IO), stored_transpose(x_NI) @ dy_NO


with_stored_transposes.defvjp(product_forward, product_backward)


def wants_stored(dtype: jnp.dtype) -> bool:
  """Returns whether `stored_transpose` makes products of transposed arrays of this type faster.

  From JAX 0.12 on, XLA's CPU backend multiplies bfloat16 with fast instructions such as AMX, but
  only if no operand is a transposed view.
  """
  return dtype == jnp.bfloat16 and jax.__version_info__ >= (0, 12)


def stored_transpose(x: jax.Array) -> jax.Array:
  """Swaps the last two axes of an array, and stores the result in row-major order."""
  return with_layout_constraint(jnp.swapaxes(x, -1, -2), Layout(tuple(range(x.ndim))))


def activate(function: Callable, x: jax.Array) -> jax.Array:
  """Returns `function(x)` for an elementwise activation function, in the type of x.

  For every single operation in bfloat16, XLA's CPU backend converts the arguments to float32 and
  the result to bfloat16. So on CPUs, the whole function is computed in float32, and only its result
  is converted. The backward pass computes it again, so that no float32 values have to be stored.
  """
  if target().platform != 'cpu' or x.dtype == jnp.float32:
    return function(x)
  return jax.checkpoint(lambda x: function(x.astype(jnp.float32)).astype(x.dtype))(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x_NI: jax.Array, scale_I: jax.Array, bias_I: jax.Array, epsilon: float) -> jax.Array:
  """Returns `z * scale + bias`; z is `x_NI` with each row normalised to mean 0 and variance 1.

  This is LayerNorm (Ba et al. 2016, 1607.06450, equation 4) for CPUs. All values are computed in
  float32, which is also the type of the result. `epsilon` is added to the variance. Scale and bias
  must have the same type. The gradient supports reverse mode only, like that of
  `attention.with_gradient`.
  """
  return layer_norm_forward(x_NI, scale_I, bias_I, epsilon)[0]


def layer_norm_forward(x_NI, scale_I, bias_I, epsilon):
  """Forward pass of `layer_norm`: returns the result, and arrays for the backward pass."""
  mean_N1 = row_means(x_NI)
  inverse_N1 = jax.lax.rsqrt(row_means((x_NI - mean_N1) ** 2) + epsilon)
  y_NI = (x_NI - mean_N1) * inverse_N1 * scale_I + bias_I
  return y_NI, (x_NI, mean_N1, inverse_N1, scale_I)


def layer_norm_backward(epsilon, saved, dy_NI):
  """Backward pass of `layer_norm`: returns the gradients of x, of the scale and of the bias.

  Let z be a row x, normalised to mean 0 and variance 1, and dz the gradient of z. Let s be
  `sqrt(variance of x + epsilon)`. The gradient of x is `(dz - mean(dz) - z mean(z dz)) / s`.
  """
  x_NI, mean_N1, inverse_N1, scale_I = saved
  z_NI = (x_NI - mean_N1) * inverse_N1
  dz_NI = dy_NI * scale_I
  dx_NI = inverse_N1 * (dz_NI - row_means(dz_NI) - z_NI * row_means(z_NI * dz_NI))
  dscale_I, dbias_I = column_sums(z_NI * dy_NI), column_sums(dy_NI)
  return dx_NI.astype(x_NI.dtype), dscale_I.astype(scale_I.dtype), dbias_I.astype(scale_I.dtype)


layer_norm.defvjp(layer_norm_forward, layer_norm_backward)


def row_means(x_NI: jax.Array) -> jax.Array:
  """Returns the mean of each row, float32 `[N, 1]`."""
  inputs = x_NI.shape[1]
  return (x_NI.astype(jnp.float32) @ jnp.full(inputs, 1 / inputs, jnp.float32))[:, None]


def column_sums(x_NI: jax.Array) -> jax.Array:
  """Returns the sum of each column, float32 `[I]`."""
  return jnp.ones(x_NI.shape[0], jnp.float32) @ x_NI.astype(jnp.float32)
