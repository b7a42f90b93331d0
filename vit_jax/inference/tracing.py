"""FLOPs and activations of a model, counted in what JAX traces of it.

Decisions:
  * FLOPs are those of matrix products and convolutions, a multiplication and an addition as two;
    norms, softmax and GELU are a few percent on top. They are counted in what JAX traced, so they
    are those of this model, and those of a step include what `model.remat` computes twice.
  * Activations are what differentiation keeps of an image for the backward pass, each array once.
    XLA keeps less where it computes a cheap part again (on a CPU a sixth less), and works in some
    memory besides.
"""

from collections import Counter
from collections.abc import Callable, Iterator
import math

import jax
from jax.extend import core
import jax.numpy as jnp

from vit_jax import experiment
from vit_jax.distributed import portable
from vit_jax.experiment import Experiment
from vit_jax.optim import Stages, split_frozen
from vit_jax.training import loss_fn

ALIASES = ('reshape', 'squeeze', 'expand_dims')  # the same numbers under another shape
OTHER = 'other'  # what no module does: pooling, the loss, adding positions


def work(exp: Experiment, params: dict) -> tuple[Counter, int]:
  """FLOPs for an image: of the forward pass by module, and of a training step."""
  group = experiment.group(exp.config)
  image = jax.ShapeDtypeStruct((1, *exp.image_shape), jnp.float32)
  split = split_frozen(params, exp.config.freeze)
  with portable():  # what a kernel does within is not seen from outside
    forward = jax.make_jaxpr(exp.model.apply)({'params': params}, image)
    gradient = jax.make_jaxpr(jax.grad(loss(exp, group)))(*split, *batch(exp, group))
  flops = Counter()
  for stack, count in products(forward.jaxpr):
    flops[module_of(stack, params)] += count
  train = [n for stack, n in products(gradient.jaxpr) if module_of(stack, params) != OTHER]
  return flops, sum(train) // group


def of_stages(exp: Experiment, stages: Stages, params: dict, train_flops: int) -> int:
  """FLOPs of training on one image a step, smaller ones first where the run has them."""
  begins = (0, *(end for end, _ in stages))
  steps = [end - begin for begin, (end, _) in zip(begins, stages)]
  flops = {size: work(exp.at(size), params)[1] for _, size in stages[:-1]}
  flops[exp.image_shape[:2]] = train_flops
  return sum(n * flops[size] for n, (_, size) in zip(steps, stages))


def activations(exp: Experiment, params: dict) -> Counter:
  """Bytes kept of an image for the backward pass, by module."""
  group = experiment.group(exp.config)

  def keep(trained, *others):
    function = lambda trained: loss(exp, group)(trained, *others)
    return jax.tree.leaves(jax.vjp(function, trained)[1])

  split = split_frozen(params, exp.config.freeze)
  jaxpr = jax.make_jaxpr(keep)(*split, *batch(exp, group)).jaxpr
  kept = Counter()
  for stack, size in residuals(jaxpr, jaxpr.invars[len(jax.tree.leaves(params)) :]):
    kept[module_of(stack, params)] += size / group
  return kept


def loss(exp: Experiment, count: int) -> Callable:
  """The loss of `count` examples, as a training step has it, by the parameters trained."""

  def function(trained, frozen, images, early, seed):
    example = images | {'example': jnp.arange(count)}
    return loss_fn(example, trained, frozen, jax.random.key(seed), early, exp)[0]

  return function


def batch(exp: Experiment, count: int) -> tuple:
  """Shapes of what the loss takes beside parameters."""
  shape = (count, *exp.task.stored_size, exp.task.channels)
  images = {
    'image': jax.ShapeDtypeStruct(shape, jnp.uint8),
    'label': jax.ShapeDtypeStruct((count,), jnp.int32),
  }
  early = jax.ShapeDtypeStruct((), jnp.bool) if exp.config.augment.off_for_last else None
  return images, early, jax.ShapeDtypeStruct((), jnp.uint32)


def module_of(stack: str, params: dict) -> str:
  """The row that a name belongs to: `jvp(ViT)/block_3/mlp/up` to `block_*/mlp`."""
  names = stack.split('/')
  for i, name in enumerate(names):
    if name.startswith('block_') and name in params:
      inside = names[i + 1] if names[i + 1 :] and names[i + 1] in params[name] else ''
      return f'block_*/{inside}'.rstrip('/')
    if name in params:
      return name
  return OTHER


def products(jaxpr, prefix: str = '') -> Iterator[tuple[str, int]]:
  """`(where, FLOPs)` of each matrix product and convolution, those of functions within too."""
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
  """Whether a parameter of an operation is a function that it calls."""
  return isinstance(value, (core.Jaxpr, core.ClosedJaxpr))


def residuals(jaxpr, of_batch: list) -> Iterator[tuple[str, int]]:
  """`(where, bytes)` of each array that a program gives and that depends on the batch.

  An array under two shapes is one.
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
