"""What a config costs before it runs: parameters, floating-point operations, memory, steps.

All of it comes from shapes: nothing is computed or compiled, and no parameter exists.
"""

from collections import Counter
import dataclasses

from clu import parameter_overview
import jax

from vit_jax import experiment
from vit_jax.distributed import shares
from vit_jax.experiment import Experiment
from vit_jax.inference.card import name_of
from vit_jax.inference.tracing import OTHER, activations, module_of, of_stages, work
from vit_jax.model import first_layer, last_layer
from vit_jax.optim import LATER_PEAK, Training, split_frozen, training_recipe, warmup_steps
from vit_jax.training import init_state
from vit_jax.weights import flatten_params

MANY = 10**9  # examples, where their number is unknown: the optimizer's state hangs on none


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
    (
      *notes,
      *(f'After step {n:,}, a cycle of {LATER_PEAK:g} times the learning rate.' for n in cycles),
    ),
  )


def size_of(tree) -> int:
  """Bytes of all arrays."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def place(name: str) -> tuple[int, str]:
  """Sort key of a row: the place of its top-level module, then its name."""
  order = (*first_layer(), 'block_*', *last_layer(), OTHER)
  return order.index(name.partition('/')[0]), name


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
    f'{name_of(exp.model)}, images of {height}x{width}x{channels}, '
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
