"""What a config costs before it runs: parameters, floating-point operations, memory, steps.

All of it comes from shapes: nothing is computed or compiled, and no parameter exists.

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
import dataclasses
import math

from clu import parameter_overview
import jax
from jax.extend import core
import jax.numpy as jnp
from ml_collections import ConfigDict

from vit_jax import config as config_lib
from vit_jax import experiment, inherit, opening
from vit_jax.check import check
from vit_jax.data import Source, look_up_source, num_examples
from vit_jax.distributed import portable, shares
from vit_jax.experiment import Experiment, Task, assemble
from vit_jax.inference import card
from vit_jax.model import first_layer, last_layer
from vit_jax.names import pair
from vit_jax.opening import Request
from vit_jax.optim import (
  LATER_PEAK,
  Stages,
  Training,
  split_frozen,
  training_recipe,
  warmup_steps,
)
from vit_jax.training import init_state, loss_fn, saved_config
from vit_jax.weights import flatten_params
from vit_jax.workdir import latest_step, newest_config

ASSUMED = tuple(f'class {i}' for i in range(1000))  # where the data does not tell
MANY = 10**9  # examples, where their number is unknown: the optimizer's state hangs on none
ALIASES = ('reshape', 'squeeze', 'expand_dims')  # the same numbers under another shape
OTHER = 'other'  # what no module does: pooling, the loss, adding positions


@dataclasses.dataclass(frozen=True)
class Part:
  """A module, and what it costs; of the blocks all together.

  Attributes:
    module: its name, `block_*/mlp` for those of all blocks.
    parameters: how many.
    gflops: of the forward pass for an image, 10^9.
    activations_mib: kept of an image for the backward pass, MiB.
  """

  module: str
  parameters: int
  gflops: float
  activations_mib: float


@dataclasses.dataclass(frozen=True)
class Summary:
  """What a config costs.

  Attributes:
    exp: what it is of.
    parts: by module, in the order of the parameters, and their sum.
    train_flops: of a training step for an image.
    run_flops: of the whole run; None where the number of examples is unknown.
    state_bytes: of `params`, `gradients`, `optimizer` and `averages`.
    devices: that share a batch here.
    at_once: images whose activations a device holds at once.
    activation_bytes: of these.
    steps: of the run; None where the number of examples is unknown.
    warmup: those of the warm-up.
    notes: what was assumed.
  """

  exp: Experiment
  parts: tuple[Part, ...]
  train_flops: int
  run_flops: int | None
  state_bytes: dict[str, int]
  devices: int
  at_once: int
  activation_bytes: int
  steps: int | None
  warmup: int | None
  notes: tuple[str, ...]


def summary_of(request: Request) -> Summary:
  """The summary of a config, of the run in a workdir, or of published weights.

  Raises:
    ValueError: a config that can't be, or none of the three.
  """
  config, workdir, init = request.config, request.workdir, request.init
  if not (config or workdir or init):
    raise ValueError('--mode=inspect needs --config, the --workdir of a run, or --init.')
  if init:
    asked = config_lib.override_all(config_lib.default_config(), request.overrides)
  else:
    asked = config or saved_config(workdir, request.overrides)
  check(asked)
  if init or (workdir and latest_step(workdir) is not None):
    exp, *_ = opening.open_model(request)
    notes, cycles = ('Training is that of the default config and of --config.<key>.',), ()
    if not init:
      cycles = tuple(newest_config(workdir).get('cycles', ()))
      notes = tuple(
        f'After step {end:,}, a cycle of {LATER_PEAK:g} times the learning rate.' for end in cycles
      )
    return measure(exp, exp.task.train_examples or None, notes, cycles)
  exp, examples, notes = summary_of_config(asked)
  return measure(exp, examples, notes)


def summary_of_config(config: ConfigDict) -> tuple[Experiment, int | None, tuple[str, ...]]:
  """The experiment, the number of training examples, and what was assumed.

  Neither downloads nor prepares data, nor reads an image.

  Raises:
    ValueError: a model that can't be, or a source that is unknown.
  """
  data, examples, notes = config.data, None, ()
  source = look_up_source(data.source, data.dir, pair(data.image_size))
  if source is None:
    source = Source({}, ASSUMED, 3, None)
    notes = (f'{data.source} is not there: {len(ASSUMED):,} classes of RGB images are assumed.',)
  if source.sizes:
    examples = num_examples(source.pieces(data.train_split))
  if config.init:
    config, *_ = inherit.open_init(config, source)
  task = Task(source.class_names, pair(data.image_size), source.channels)
  return assemble(config, task), examples, notes


def measure(
  exp: Experiment,
  examples: int | None,
  notes: tuple[str, ...] = (),
  cycles: tuple[int, ...] = (),
) -> Summary:
  """What an experiment costs.

  Args:
    exp: the experiment.
    examples: in the training split; None where that is unknown.
    notes: what was assumed.
    cycles: as in `plan.Training`.

  Raises:
    ValueError: a batch that can't be divided over this machine's devices.
  """
  config, mesh = exp.config, experiment.mesh_for(exp.config)
  recipe = training_recipe(config, examples or MANY, cycles)
  steps = recipe['steps'] if examples else None
  warmup = warmup_steps(config, examples, (*cycles, steps)[0]) if examples else None
  training = Training(None, None, None, params=None, **recipe)
  shapes = jax.eval_shape(lambda: init_state(exp, training, mesh))
  flops, train_flops = work(exp, shapes.params)
  one = of_stages(exp, recipe['stages'], shapes.params, train_flops)
  run_flops = config.batch_size * one if examples else None
  kept, parameters = activations(exp, shapes.params), Counter()
  for name, leaf in flatten_params(shapes.params).items():
    parameters[module_of(name, shapes.params)] += leaf.size
  names = sorted({*parameters, *flops, *kept}, key=place)
  parts = [Part(n, parameters[n], flops[n] / 1e9, kept[n] / 2**20) for n in names]
  total = Part('total', parameters.total(), flops.total() / 1e9, kept.total() / 2**20)
  divided = config.micro_batches or exp.micro_batches(mesh, config.batch_size)
  at_once = config.batch_size // shares(mesh) // divided
  return Summary(
    exp,
    (*parts, total),
    train_flops,
    run_flops,
    {
      'params': size_of(shapes.params),
      'gradients': size_of(split_frozen(shapes.params, config.freeze)[0]),
      'optimizer': size_of(shapes.opt_state),
      'averages': size_of(shapes.ema),
    },
    mesh.size,
    at_once,
    round(at_once * kept.total()),
    steps,
    warmup,
    notes,
  )


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


def size_of(tree) -> int:
  """Bytes of all arrays."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


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


def place(name: str) -> tuple[int, str]:
  """Sort key of a row: the place of its top-level module, then its name."""
  order = (*first_layer(), 'block_*', *last_layer(), OTHER)
  return order.index(name.partition('/')[0]), name


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


def as_text(summary: Summary) -> str:
  """The summary as text."""
  exp, config, total = summary.exp, summary.exp.config, summary.parts[-1]
  height, width, channels = exp.image_shape
  formats = {int: '{:,}', float: '{:.4g}', str: '{}'}
  table = parameter_overview.make_table(
    list(summary.parts), value_formatter=lambda value: formats[type(value)].format(value)
  )
  held = ', '.join(f'{name} {mib(size)}' for name, size in summary.state_bytes.items() if size)
  lines = [
    f'{card.name_of(exp.model)}, images of {height}x{width}x{channels}, '
    f'{len(exp.task.class_names):,} classes',
    table.replace('Gflops', 'GFLOPs').replace('Activations_mib', 'Activations MiB'),
    f'Forward {total.gflops:.4g} GFLOPs an image, a training step {summary.train_flops / 1e9:.4g}: '
    f'{summary.train_flops * config.batch_size / 1e12:.4g} TFLOPs for a batch of '
    f'{config.batch_size}.',
    f'State on each device: {held}.',
    f'Activations: {total.activations_mib:.4g} MiB an image; here {summary.devices} device(s) hold '
    f'those of {summary.at_once} images each at once, {mib(summary.activation_bytes)}: with the '
    f'state {mib(sum(summary.state_bytes.values()) + summary.activation_bytes)}.',
    *plan_text(summary),
    *(f'Note: {note}' for note in summary.notes),
  ]
  return '\n'.join(lines)


def mib(size: int) -> str:
  """Bytes as MiB."""
  return f'{size / 2**20:,.1f} MiB'


def plan_text(summary: Summary) -> list[str]:
  """How long the run is, and its learning rate."""
  config, steps = summary.exp.config, summary.steps
  if steps is None:
    return [f'Steps: {config.epochs:g} epochs; unknown until the data is there.']
  return [
    f'Steps: {steps:,} of {config.epochs:g} epochs, {summary.run_flops / 1e15:.4g} PFLOPs.',
    f'Learning rate: up to {config.optimizer.lr:g} in {summary.warmup:,} steps, then '
    f'{config.schedule.name}.',
  ]
