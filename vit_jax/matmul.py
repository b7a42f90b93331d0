"""The product that dense layers are made of."""

import jax

from vit_jax import backend

NARROW = 256  # outputs; of more, transposing the kernel costs what the gradient gains


def matmul(x_NI: jax.Array, kernel_IO: jax.Array) -> jax.Array:
  """`x W`, `[N, O]`, arranged so that its gradient is fast too.

  For a kernel of few outputs and more inputs, XLA's CPU backend takes `dy^T x` up to twice as
  fast as the `x^T dy` that differentiation asks for. Given the kernel transposed, it takes the
  first; the barrier keeps it from simplifying the two transpositions away.
  """
  inputs, outputs = kernel_IO.shape
  if outputs < inputs and outputs <= NARROW and backend.target() == 'cpu':
    return x_NI @ jax.lax.optimization_barrier(kernel_IO.T).T
  return x_NI @ kernel_IO
