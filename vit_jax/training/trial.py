"""Tries cuDNN's attention on the GPU of a run before the run relies on it.

cuDNN's backward pass has returned NaN on Hopper GPUs in other projects. Therefore, a run with
`model.attention=auto` first compares the results of cuDNN's kernel with the results of the kernel
`plain` in float32. The comparison includes attention logits with extreme values. Then the run
chooses one of the two kernels.

Decisions:
  * A run chooses the kernel only once. Its checkpoints contain the choice, so a resumed run uses
    the same kernel.
  * Process 0 chooses the kernel for all processes.
"""

from collections.abc import Mapping
import dataclasses
import functools
import itertools
import logging
import time

import jax
import jax.numpy as jnp

from vit_jax.distributed import from_first, target
from vit_jax.experiment import Experiment
from vit_jax.limits import is_full
from vit_jax.model import flash, flash_obstacle, plain
from vit_jax.optim import Training
from vit_jax.training.compiling import attention_shapes, estimated, resumed
from vit_jax.training.step import compiler_options

log = logging.getLogger(__name__)

# Test inputs, as pairs (factor, constant). Queries and keys are multiplied by the factor. Then the
# constant is added to the queries and subtracted from the keys. With the third pair, the logsumexp
# of the logits of each query is far below -88, where exp underflows in float32.
INPUTS = {'usual logits': (1, 0), 'large logits': (8, 0), 'very negative logits': (0.1, 4)}
TOLERANCE = 16 * 2.0**-8  # 16 rounding errors of bfloat16
REPEATS = 10  # timed calls of each kernel


def prepared(
  exp: Experiment, training: Training, mesh: jax.sharding.Mesh, saved: Mapping
) -> Experiment:
  """Returns the experiment with the attention kernel and the memory plan of the run.

  A run chooses the kernel and the memory plan only once. The choices in the newest checkpoint are
  used again. Without a checkpoint, this function chooses the kernel, and `fit_step` later chooses
  the plan.

  Args:
    exp: experiment to train.
    training: data, steps and optimizer of the run.
    mesh: mesh of the devices.
    saved: JSON of the newest checkpoint; empty without a checkpoint.
  """
  return choose_attention(resumed(exp, saved), training, mesh, saved.get('attention'))


def choose_attention(
  exp: Experiment, training: Training, mesh: jax.sharding.Mesh, earlier: str | None
) -> Experiment:
  """Returns the experiment with the attention kernel that the run uses.

  Args:
    exp: experiment to train.
    training: data and steps of the run. cuDNN is tried at each image size in `training.stages` and
      each patch size.
    mesh: mesh of the devices.
    earlier: choice in the run's newest checkpoint; None without a checkpoint.

  Raises:
    ValueError: `model.attention=cudnn`, and cuDNN cannot run on these devices.
  """
  model, asked = exp.model, exp.model.attention
  obstacle = flash_obstacle(target(mesh), model.dtype, model.head_size)
  if asked == 'cudnn' and obstacle:
    raise ValueError(
      f'model.attention=cudnn: cuDNN cannot compute this attention, because {obstacle}. '
      'Set model.attention=auto.'
    )
  if asked != 'auto':
    return exp
  can_try = lambda head_size: not flash_obstacle(target(mesh), model.dtype, head_size)
  if not any(can_try(size) for *_, size in exp.objective.sequences(exp)):
    return exp
  # Training with attention dropout needs `plain`. Evaluation does not drop, so with `auto` it would
  # use cuDNN's kernel without a trial.
  choice = 'plain' if model.attention_dropout else earlier
  if choice not in ('cudnn', 'plain'):
    # The trial also runs `plain`, which needs more memory than cuDNN. So the shapes of the trial
    # come from a plan with which `plain` is estimated to fit.
    smaller = estimated(
      dataclasses.replace(exp, model=model.clone(attention='plain')), training, mesh
    )
    stages = itertools.product((size for _, size in training.stages), reversed(exp.patch_sizes))
    shapes = [shape for both in stages for shape in attention_shapes(smaller.at(*both), mesh)]
    shapes = [shape for shape in shapes if can_try(shape[-1])]
    choice = from_first(lambda: decide(shapes, model.dtype, exp.config.deterministic))
  return dataclasses.replace(exp, model=model.clone(attention=choice))


def decide(shapes: list[tuple[int, int, int, int]], dtype: jnp.dtype, deterministic: bool) -> str:
  """Returns `cudnn` if it is correct and not slower than `plain`, otherwise `plain`.

  Args:
    shapes: shapes `[B, N, K, E]` of the queries at each image and patch size of the run, for K
      heads of size E. The kernels are timed at the last shape, which is for full image size and the
      longest sequence.
    dtype: type of the computation.
    deterministic: if True, the kernels are not timed, because times vary, and `cudnn` is chosen if
      it is correct.
  """
  for shape in shapes:
    if wrong := first_difference(shape, dtype, deterministic):
      log.warning(
        'cuDNN does not compute attention correctly here (%s). Using model.attention=plain.', wrong
      )
      return 'plain'
  if deterministic:
    log.info('cuDNN computes attention correctly here. Using model.attention=cudnn.')
    return 'cudnn'
  kernels = {'cudnn': flash, 'plain': plain}
  seconds = {name: duration(kernel, shapes[-1], dtype) for name, kernel in kernels.items()}
  choice = min(seconds, key=seconds.get)
  log.info(
      'model.attention=cudnn is correct here and takes %.3g ms per block. model.attention=plain '
      'takes %.3g ms. Using model.attention=%s.', *(1e3 * s for s in seconds.values()), choice,
  )  # fmt: skip
  return choice


def first_difference(
  shape: tuple[int, int, int, int], dtype: jnp.dtype, deterministic: bool = False
) -> str:
  """Describes the first incorrect output or gradient of cuDNN; returns '' if all are correct.

  If cuDNN raises an error, the result has the shape and the first line of its message.

  Args:
    shape: shape `[B, N, K, E]` of queries, keys and values with K heads of size E.
    dtype: type of queries, keys and values.
    deterministic: whether to test cuDNN's deterministic algorithms, which such a run uses.
  """
  for name, (factor, offset) in INPUTS.items():
    given, where = draw(shape, dtype, factor, offset), f'shape {"x".join(map(str, shape))}'
    try:
      computed = jax.block_until_ready(value_and_gradients(flash, deterministic)(*given))
    except (RuntimeError, ValueError) as failure:
      if is_full(failure):
        raise
      return f'{where}: {(str(failure).splitlines() or [type(failure).__name__])[0]}'
    for part, error in errors(computed, reference(given)).items():
      if not error <= TOLERANCE:  # also if it is NaN
        what = part if part == 'output' else f'gradient of the {part}'
        return f'{what}, {name}, {where}: relative error {error:.2g}'
  return ''


def reference(given: list[jax.Array]) -> tuple[jax.Array, ...]:
  """Returns the output and the gradients of the kernel `plain` in float32.

  bfloat16 is not precise enough for a reference. In bfloat16, `plain` has an error of about 0.1 for
  large logits if the scale of the queries, `E ** -0.5`, is not a power of two. An example is H/14,
  where E = 80.
  """
  with jax.default_matmul_precision('highest'):
    return value_and_gradients(plain)(*(x.astype(jnp.float32) for x in given))


def errors(found: tuple[jax.Array, ...], wanted: tuple[jax.Array, ...]) -> dict[str, float]:
  """Returns `{name: error}` for the output and for the gradients of query, key and value.

  An error is the largest absolute difference. It is divided by the largest absolute expected value
  if this value is above 1. It is NaN if any value is NaN.

  Args:
    found: output and gradients of the tested kernel.
    wanted: expected output and gradients.
  """
  return {
    part: float(jnp.abs(got - want).max() / jnp.maximum(jnp.abs(want).max(), 1))
    for part, got, want in zip(('output', 'query', 'key', 'value'), found, wanted, strict=True)
  }


def draw(shape: tuple[int, int, int, int], dtype: jnp.dtype, factor: float, offset: float) -> list:
  """Returns random queries, keys, values and output gradient, all of the given shape.

  Queries and keys are multiplied by `factor`. Then `offset` is added to the queries and subtracted
  from the keys.
  """
  arrays = [jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 4)]
  query, key, value, dy = arrays
  return [x.astype(dtype) for x in (factor * query + offset, factor * key - offset, value, dy)]


@functools.cache
def value_and_gradients(kernel, deterministic: bool = False):
  """Returns a jitted function that runs an attention kernel forward and backward.

  The function is `(query, key, value, dy) -> (y, dquery, dkey, dvalue)`. `y` is the output of the
  kernel, and `dy` is the gradient of a loss with respect to `y`.

  Args:
    kernel: kernel of `vit_jax.model`.
    deterministic: whether to compile the function like the training step of a deterministic run.
  """

  def run(query, key, value, dy):
    y, pull = jax.vjp(lambda *qkv: kernel(*qkv, None, 0.0), query, key, value)
    return y, *pull(dy)

  return jax.jit(run, compiler_options=compiler_options(deterministic))


def duration(kernel, shape: tuple[int, int, int, int], dtype: jnp.dtype) -> float:
  """Returns how many seconds a compiled kernel takes on average for a forward and backward pass."""
  given, run = draw(shape, dtype, 1, 0), value_and_gradients(kernel)
  jax.block_until_ready(run(*given))
  began = time.perf_counter()
  for _ in range(REPEATS):
    found = run(*given)
  jax.block_until_ready(found)
  return (time.perf_counter() - began) / REPEATS
