"""The stem of the paper's hybrids: a ResNet (BiT) with weight standardisation and GroupNorm.

The paper describes the hybrids in Section 3.1, "Hybrid architecture". Kolesnikov et al. 2019
(1912.11370) describe weight standardisation and GroupNorm. Parameters have the same names as in the
files with the paper's weights.
"""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp


def stem_stride(stages: tuple[int, ...]) -> int:
  """Returns the factor by which the stem reduces height and width.

  The root (a convolution and a max pool) reduces both by the factor 4. Each stage after the first
  stage reduces both by the factor 2.
  """
  return 4 * 2 ** max(len(stages) - 1, 0)


class StdConv(nn.Module):
  """A convolution without bias whose kernel is standardised (Qiao et al. 2019, 1903.10520).

  Attributes:
    features: number of output channels.
    size: height and width of the kernel.
    stride: factor by which height and width are reduced.
    dtype: type of the computation.
  """

  features: int
  size: int
  stride: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_BhwC: jax.Array) -> jax.Array:
    shape = (self.size, self.size, x_BhwC.shape[-1], self.features)
    kernel = self.param('kernel', nn.initializers.lecun_normal(), shape)
    kernel = kernel - kernel.mean(axis=(0, 1, 2))
    kernel = kernel / (kernel.std(axis=(0, 1, 2)) + 1e-5)
    return jax.lax.conv_general_dilated(
      x_BhwC.astype(self.dtype),
      kernel.astype(self.dtype),
      (self.stride, self.stride),
      'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )


class Unit(nn.Module):
  """A bottleneck: adds the output of 1x1, 3x3 and 1x1 convolutions to its input.

  If the output has another shape than the input, a 1x1 convolution projects the input first. The
  3x3 convolution has `features` channels, and the output has `4 * features`. `stride` is the factor
  by which height and width are reduced.
  """

  features: int
  stride: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_BhwC: jax.Array) -> jax.Array:
    def norm(name, x, **arguments):
      return nn.GroupNorm(dtype=self.dtype, name=name, **arguments)(x)

    residual, widened = x_BhwC, 4 * self.features
    if self.stride > 1 or x_BhwC.shape[-1] != widened:
      residual = StdConv(widened, 1, self.stride, self.dtype, name='conv_proj')(x_BhwC)
      residual = norm('gn_proj', residual)
    y = StdConv(self.features, 1, dtype=self.dtype, name='conv1')(x_BhwC)
    y = nn.relu(norm('gn1', y))
    y = StdConv(self.features, 3, self.stride, self.dtype, name='conv2')(y)
    y = nn.relu(norm('gn2', y))
    y = StdConv(widened, 1, dtype=self.dtype, name='conv3')(y)
    # The initial scale is zero, so an untrained unit adds zero to its (projected) input.
    y = norm('gn3', y, scale_init=nn.initializers.zeros)
    return nn.relu(residual + y)


class Stage(nn.Module):
  """A sequence of `units` bottlenecks (`Unit`) with the same number of channels.

  The first bottleneck reduces height and width by the factor `stride`.
  """

  units: int
  features: int
  stride: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_BhwC: jax.Array) -> jax.Array:
    for i in range(self.units):
      step = self.stride if i == 0 else 1
      x_BhwC = Unit(self.features, step, self.dtype, name=f'unit{i + 1}')(x_BhwC)
    return x_BhwC


class Stem(nn.Module):
  """The root block and the stages: `[B, H, W, C]` to `[B, H/s, W/s, C']`; s is `stem_stride`.

  Attributes:
    stages: number of units in each stage; an empty tuple means the root alone.
    width: number of channels of the root; stage i = 0, 1, ... has `4 * width * 2^i` channels.
  """

  stages: tuple[int, ...]
  width: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, image_BHWC: jax.Array) -> jax.Array:
    x = StdConv(self.width, 7, 2, self.dtype, name='conv_root')(image_BHWC)
    x = nn.relu(nn.GroupNorm(dtype=self.dtype, name='gn_root')(x))
    x = nn.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding='SAME')
    for i, units in enumerate(self.stages):
      step = 1 if i == 0 else 2
      x = Stage(units, self.width * 2**i, step, self.dtype, name=f'block{i + 1}')(x)
    return x
