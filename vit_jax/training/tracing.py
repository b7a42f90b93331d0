"""Counts the FLOPs and activations of a model in the program that JAX traces.

Decisions:
  * Only the FLOPs of matrix products and convolutions are counted. A multiplication and an addition
    together are two FLOPs. Norms, softmax and GELU would add a few percent.
  * FLOPs are counted in the traced program, not computed with a formula, so every matrix product of
    the model is included. The FLOPs of a training step include the operations that `model.remat`
    repeats.
  * Activations are the arrays that the forward pass keeps for the backward pass. Each array is
    counted once. A compiled step keeps fewer arrays, because XLA recomputes the cheap ones. On a
    CPU, this saves a sixth of the bytes. However, XLA needs working memory, which is not counted.
"""

from collections import Counter
from collections.abc import Callable, Iterator
import dataclasses
import math
import re

import jax
from jax.extend import core
import jax.numpy as jnp

from vit_jax import experiment
from vit_jax.distributed import portable
from vit_jax.experiment import Experiment
from vit_jax.model import ViT
from vit_jax.optim import Stages
from vit_jax.training.step import loss_fn

ALIASES = ('reshape', 'squeeze', 'expand_dims')  # operations that only change the shape
OTHER = 'other'  # operations outside of modules: pooling, the loss, adding positions


def work(exp: Experiment, params: dict) -> tuple[Counter, int]:
  """Returns the FLOPs of each module in a forward pass, and the FLOPs of a training step.

  Both results are for one image. The FLOPs of a training step are the mean over the patch sizes of
  the run. The mean includes the FLOPs of the teacher if each step runs a teacher.
  """
  image = jax.ShapeDtypeStruct((1, *exp.image_shape), jnp.float32)
  return forward_flops(exp.model, params, image), drawn_flops(exp, exp.image_shape[:2], params)


def drawn_flops(exp: Experiment, size: tuple[int, int], params: dict) -> int:
  """Returns the FLOPs of a training step for one image of this size, averaged over patch sizes."""
  flops = [step_flops(exp.at(size, patch), params) for patch in exp.patch_sizes]
  return sum(flops) // len(flops)


def forward_flops(model: ViT, params: dict, image: jax.ShapeDtypeStruct) -> Counter:
  """Returns, for each module, the FLOPs of a forward pass for inputs of the shape of `image`."""
  with portable():  # uses no cuDNN kernel, because `products` cannot see inside it
    forward = jax.make_jaxpr(model.apply)({'params': params}, image)
  flops = Counter()
  for stack, count in products(forward.jaxpr):
    flops[module_of(stack, params)] += count
  return flops


def step_flops(exp: Experiment, params: dict) -> int:
  """Returns the FLOPs of a training step for one image, including the FLOPs of a teacher."""
  group = experiment.group(exp.config)
  split = with_teacher_params(exp, params)
  with portable():
    gradient = jax.make_jaxpr(jax.grad(loss(exp, group)))(*split, *batch(exp, group))
  names = split[0] | split[1]
  train = [n for stack, n in products(gradient.jaxpr) if module_of(stack, names) != OTHER]
  return sum(train) // group


def with_teacher_params(exp: Experiment, params: dict) -> tuple[dict, dict]:
  """Returns the trained and the frozen parameters, as a training step passes them to `loss_fn`.

  If each step runs a teacher, the frozen parameters also contain the parameters of the teacher,
  under the key `teacher`.
  """
  trained, frozen = exp.split(params)
  return trained, frozen | ({'teacher': exp.teacher.params} if runs_teacher(exp) else {})


def runs_teacher(exp: Experiment) -> bool:
  """Returns whether each training step runs a teacher."""
  return exp.teacher is not None and not exp.teacher.cached


def model_flops(exp: Experiment, params: dict) -> int:
  """Returns the FLOPs of a training step for one image, without recomputation by `model.remat`."""
  return step_flops(dataclasses.replace(exp, model=exp.model.clone(remat='none')), params)


def of_stages(exp: Experiment, stages: Stages, params: dict, train_flops: int) -> int:
  """Returns the FLOPs of a whole training run, divided by the batch size.

  Args:
    exp: experiment to train.
    stages: (last step, image size) of each stage of the run.
    params: parameters of the model.
    train_flops: FLOPs of a training step for one image of full size.
  """
  begins = (0, *(end for end, _ in stages))
  steps = [end - begin for begin, (end, _) in zip(begins, stages)]
  flops = {size: drawn_flops(exp, size, params) for _, size in stages[:-1]}
  flops[exp.image_shape[:2]] = train_flops
  return sum(n * flops[size] for n, (_, size) in zip(steps, stages))


def activations(exp: Experiment, params: dict) -> Counter:
  """Returns, for each module, how many bytes of activations the backward pass needs per image."""
  group = experiment.group(exp.config)

  def keep(trained, *others):
    function = lambda trained: loss(exp, group)(trained, *others)
    return jax.tree.leaves(jax.vjp(function, trained)[1])

  split = with_teacher_params(exp, params)
  jaxpr = jax.make_jaxpr(keep)(*split, *batch(exp, group)).jaxpr
  kept = Counter()
  for stack, size in residuals(jaxpr, jaxpr.invars[len(jax.tree.leaves(split)) :]):
    kept[module_of(stack, params)] += size / group
  return kept


def loss(exp: Experiment, count: int) -> Callable:
  """Returns the function `(trained, frozen, images, early, seed) -> loss` for `count` examples.

  The arguments are as in `loss_fn`, but `images` replaces `batch`, and `seed` replaces `key`.
  """

  def function(trained, frozen, images, early, seed):
    example = images | {'example': jnp.arange(count)}
    return loss_fn(example, trained, frozen, jax.random.key(seed), early, exp)[0]

  return function


def batch(exp: Experiment, count: int) -> tuple:
  """Returns the shapes of `images`, `early` and `seed`, which the function from `loss` takes."""
  shape = (count, *exp.task.stored_size, exp.task.channels)
  images = {
    'image': jax.ShapeDtypeStruct(shape, jnp.uint8),
    'label': jax.ShapeDtypeStruct((count,), jnp.int32),
  }
  if exp.teacher and exp.teacher.cached:
    images['teacher'] = jax.ShapeDtypeStruct((count, exp.model.num_classes), jnp.float32)
  early = jax.ShapeDtypeStruct((), jnp.bool) if exp.config.augment.off_for_last else None
  return images, early, jax.ShapeDtypeStruct((), jnp.uint32)


def module_of(stack: str, params: dict) -> str:
  """Returns the module that an operation belongs to, given the operation's name stack.

  For example, `jvp(ViT)/block_3/mlp/up` gives `block_*/mlp`, which stands for all blocks' MLPs. The
  result is `OTHER` for operations outside of the modules in `params`.
  """
  names = re.findall(r'[^/()]+', stack)
  for i, name in enumerate(names):
    if name.startswith('block_') and name in params:
      inside = names[i + 1] if names[i + 1 :] and names[i + 1] in params[name] else ''
      return f'block_*/{inside}'.rstrip('/')
    if name in params:
      return name
  return OTHER


def products(jaxpr, prefix: str = '') -> Iterator[tuple[str, int]]:
  """Yields `(name stack, FLOPs)` for each matrix product and convolution in a traced function.

  The name stack names the modules of an operation, e.g. `jvp(ViT)/block_3/mlp/up`. Nested functions
  are included. `prefix` is the name stack of the function itself.
  """
  for eqn in jaxpr.eqns:
    stack = f'{prefix}/{eqn.source_info.name_stack}'
    size = math.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      shape = eqn.invars[0].aval.shape
      yield stack, 2 * size * math.prod(shape[axis] for axis in contracted)
    elif eqn.primitive.name == 'conv_general_dilated':
      kernel, axes = eqn.invars[1].aval.shape, eqn.params['dimension_numbers'].rhs_spec
      yield stack, 2 * size * math.prod(kernel) // kernel[axes[0]]
    for inner in jax.tree.leaves(eqn.params, is_leaf=is_program):
      if is_program(inner):
        yield from products(getattr(inner, 'jaxpr', inner), stack)


def is_program(value: object) -> bool:
  """Returns whether the value is a traced function, e.g. the body of a loop."""
  return isinstance(value, (core.Jaxpr, core.ClosedJaxpr))


def residuals(jaxpr, of_batch: list) -> Iterator[tuple[str, int]]:
  """Yields `(name stack, bytes)` for the outputs of a traced function that depend on the batch.

  The name stack lists the modules that computed an output. If two outputs are the same array in
  different shapes, only one is yielded. `of_batch` lists the inputs that come from the batch.
  """
  made, source, seen = {}, {}, set()
  depends = set(of_batch)
  for eqn in jaxpr.eqns:
    inputs = [v for v in eqn.invars if not isinstance(v, core.Literal)]
    depends |= set(eqn.outvars) if depends & set(inputs) else set()
    made |= dict.fromkeys(eqn.outvars, eqn)
    if eqn.primitive.name in ALIASES:
      source[eqn.outvars[0]] = source.get(inputs[0], inputs[0])
  for var in jaxpr.outvars:
    if isinstance(var, core.Literal) or var not in depends:
      continue
    var = source.get(var, var)
    if var not in seen:
      seen.add(var)
      stack = str(made[var].source_info.name_stack) if var in made else ''
      yield stack, math.prod(var.aval.shape) * var.aval.dtype.itemsize
