"""Estimates the cost of a config before training: parameters, FLOPs, memory and steps.

All numbers are computed from the shapes of arrays. No model is compiled or run, and no parameters
are allocated.
"""

from collections import Counter
import dataclasses

from clu import parameter_overview
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vit_jax import experiment
from vit_jax.distributed import shares, size_on_device
from vit_jax.experiment import Experiment
from vit_jax.inference.card import name_of
from vit_jax.model import ADAPTERS, first_layer, last_layer
from vit_jax.optim import (
  LATER_PEAK,
  Training,
  objective_params,
  training_recipe,
  warmup_epochs,
  warmup_steps,
)
from vit_jax.training import (
  OTHER,
  TrainState,
  activations,
  estimated,
  forward_flops,
  module_of,
  of_stages,
  runs_teacher,
  state_shapes,
  work,
)
from vit_jax.weights import flatten_params

MANY = 10**9  # assumed if the number of examples is unknown; does not change the memory estimate


@dataclasses.dataclass(frozen=True)
class Part:
  """The cost of one module of a model, or the summed cost of the same module in all blocks.

  Attributes:
    module: name of the module; `block_*/mlp` stands for the MLPs of all blocks.
    parameters: number of parameters.
    gflops: FLOPs of the forward pass for one image, in units of 10^9.
    activations_mib: MiB of activations that are stored for the backward pass of one image.
  """

  module: str
  parameters: int
  gflops: float
  activations_mib: float


@dataclasses.dataclass(frozen=True)
class Summary:
  """The estimated cost of training with a config.

  Attributes:
    exp: the experiment.
    trained: number of parameters that are trained.
    parts: the cost of each module, in the order of the model, then the total.
    train_flops: FLOPs of a training step for one image, including the backward pass.
    teacher: cost of a forward pass of the teacher for one image; None if no step runs a teacher.
    run_flops: FLOPs of the whole run; None if the number of examples is unknown.
    state_bytes: `{part: bytes}` for the training state on each device. The parts are `params`,
      `gradients`, `optimizer`, `averages` (averaged weights) and `teacher`.
    devices: number of devices of this machine, among which a batch is divided.
    at_once: number of images whose activations a device holds at the same time.
    activation_bytes: bytes of the activations of `at_once` images.
    steps: number of training steps; None if the number of examples is unknown.
    warmup: number of warm-up steps of the first learning-rate cycle; None if the number of examples
      is unknown.
    notes: sentences about the assumptions behind these numbers. If the config gives a finished run
      more epochs, the notes also say when the learning rate warms up again.
  """

  exp: Experiment
  trained: int
  parts: tuple[Part, ...]
  train_flops: int
  teacher: Part | None
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
  """Estimates the cost of training an experiment on this machine.

  Args:
    exp: the experiment.
    examples: number of examples in the training split; None if it is unknown.
    notes: sentences about assumptions, for `Summary.notes`.
    cycles: last step of each earlier cycle of the learning rate. A finished run that gets more
      epochs begins a new cycle.

  Raises:
    ValueError: the batch cannot be divided among this machine's devices.
  """
  config, mesh = exp.config, experiment.mesh_for(exp.config)
  recipe = training_recipe(config, examples or MANY, cycles)
  steps = recipe['steps'] if examples else None
  warmup = warmup_steps(config, examples, cycles[0] if cycles else steps) if examples else None
  training = Training(None, None, None, params=None, **recipe)
  exp = estimated(exp, training, mesh)
  shapes = state_shapes(exp, training, mesh)
  flops, train_flops = work(exp, shapes.params)
  one = of_stages(exp, recipe['stages'], shapes.params, train_flops)
  run_flops = config.batch_size * one if examples else None
  longest = exp.at(patch_size=exp.patch_sizes[0])
  kept, parameters = activations(longest, shapes.params), Counter()
  for name, leaf in flatten_params(shapes.params).items():
    parameters[module_of(name, shapes.params)] += leaf.size
  names = sorted({*parameters, *flops, *kept}, key=place)
  trained, _ = exp.split(shapes.params)
  parts = [Part(n, parameters[n], flops[n] / 1e9, kept[n] / 2**20) for n in names]
  total = Part('total', parameters.total(), flops.total() / 1e9, kept.total() / 2**20)
  at_once = config.batch_size // shares(mesh) // longest.training_parts(mesh)
  return Summary(
    exp=exp,
    trained=sum(leaf.size for leaf in jax.tree.leaves(trained)),
    parts=(*parts, total),
    train_flops=train_flops,
    teacher=teacher_part(exp),
    run_flops=run_flops,
    state_bytes=state_bytes(exp, shapes, mesh),
    devices=mesh.size,
    at_once=at_once,
    activation_bytes=round(at_once * kept.total()),
    steps=steps,
    warmup=warmup,
    notes=(*notes, *patch_notes(exp), *cycle_notes(cycles)),
  )


def cycle_notes(cycles: tuple[int, ...]) -> list[str]:
  """Returns a note for each later cycle of the learning rate; `cycles` as in `measure`."""
  later = f'the learning rate warms up again, to {LATER_PEAK:g} times optimizer.lr.'
  return [f'After step {n:,}, {later}' for n in cycles]


def patch_notes(exp: Experiment) -> list[str]:
  """Returns a list with a note about randomly drawn patch sizes; empty for a single patch size."""
  sizes = ['x'.join(map(str, size)) for size in exp.patch_sizes]
  if len(sizes) == 1:
    return []
  return [
    f'Each training step draws one of the patch sizes {", ".join(sizes)}. The compute of a step is '
    f'the mean over these sizes. Activations are given for the patch size {sizes[0]}, and the '
    f'FLOPs of the forward pass for {"x".join(map(str, exp.model.patch_size))}.'
  ]


def state_bytes(exp: Experiment, shapes: TrainState, mesh: Mesh) -> dict[str, int]:
  """Returns `{part: bytes}` for the parts of the training state that each device holds.

  `Summary.state_bytes` lists the names of the parts.

  Args:
    exp: the experiment.
    shapes: the training state, with shapes instead of arrays.
    mesh: the devices.
  """
  trees = {
    'params': shapes.params,
    'gradients': exp.split(shapes.params)[0],
    'optimizer': shapes.opt_state,
    'averages': shapes.ema,
    'teacher': exp.teacher.params if runs_teacher(exp) else None,
  }
  return {name: size_on_device(mesh, tree) for name, tree in trees.items()}


def teacher_part(exp: Experiment) -> Part | None:
  """Returns the cost of a forward pass of the teacher; None if no training step runs a teacher."""
  if not runs_teacher(exp):
    return None
  teacher = exp.teacher
  shape = (1, *teacher.normalize.keywords['size'], exp.task.channels)
  flops = forward_flops(teacher.model, teacher.params, jax.ShapeDtypeStruct(shape, jnp.float32))
  count = sum(leaf.size for leaf in jax.tree.leaves(teacher.params))
  return Part('teacher', count, flops.total() / 1e9, 0.0)


def place(name: str) -> tuple[int, str]:
  """Returns a key that sorts module names: by their order in the model, then by name."""
  order = (*first_layer(), 'block_*', *last_layer(), *ADAPTERS, *objective_params(), OTHER)
  return order.index(name.partition('/')[0]), name


def as_text(summary: Summary) -> str:
  """Formats a summary as several lines of text, as `--mode=inspect` prints it."""
  exp, config, total = summary.exp, summary.exp.config, summary.parts[-1]
  height, width, channels = exp.image_shape
  formats = {int: '{:,}', float: '{:.4g}', str: '{}'}
  table = parameter_overview.make_table(
    list(summary.parts), value_formatter=lambda value: formats[type(value)].format(value)
  )
  held = ', '.join(f'{name} {mib(size)}' for name, size in summary.state_bytes.items() if size)
  lines = [
    f'{name_of(exp.model)}, images of {height}x{width}x{channels}, '
    + (f'{len(exp.task.class_names):,} classes' if exp.task.class_names else 'no labels'),
    table.replace('Gflops', 'GFLOPs').replace('Activations_mib', 'Activations MiB'),
    f'Trained parameters: {summary.trained:,} of {total.parameters:,}.',
    f'Compute per image: {total.gflops:.4g} GFLOPs for the forward pass, '
    f'{summary.train_flops / 1e9:.4g} GFLOPs for a training step.',
    f'Compute per training step: {summary.train_flops * config.batch_size / 1e12:.4g} TFLOPs for a '
    f'batch of {config.batch_size}.',
    *teacher_text(summary),
    f'State on each device: {held}.',
    f'Activations: {total.activations_mib:.4g} MiB per image. On this machine, each of '
    f'{summary.devices} device(s) holds the activations of {summary.at_once} images at a time: '
    f'{mib(summary.activation_bytes)}.',
    'State and activations on each device: '
    f'{mib(sum(summary.state_bytes.values()) + summary.activation_bytes)}.',
    *memory_text(summary),
    *plan_text(summary),
    *(f'Note: {note}' for note in summary.notes),
  ]
  return '\n'.join(lines)


def teacher_text(summary: Summary) -> list[str]:
  """Returns a list with one line about the teacher; empty if the config names no teacher."""
  teacher, part = summary.exp.teacher, summary.teacher
  if not summary.exp.config.distill.teacher:
    return []
  if teacher is None:
    return ['Teacher: not included in these numbers.']
  if part is None:
    return ['Teacher: its logits are computed once per image, because images are not augmented.']
  return [
    f'Teacher: {name_of(teacher.model)} with {part.parameters:,} parameters. A training step '
    f'includes its forward pass, {part.gflops:.4g} GFLOPs per image.'
  ]


def mib(size: int) -> str:
  """Formats a number of bytes in MiB."""
  return f'{size / 2**20:,.1f} MiB'


def memory_text(summary: Summary) -> list[str]:
  """Returns a list with one line about the settings with which a training step fits into memory.

  The settings are the number of micro-batches and `model.remat` (recomputation of activations). If
  no memory limit is known, the list is empty.
  """
  exp = summary.exp
  if not exp.parts:
    return []
  return [
    f'A step probably fits into memory with micro_batches={exp.parts} and '
    f'model.remat={exp.model.remat}. Training chooses the final values after compilation, because '
    'a compiled step stores fewer activations than estimated above.'
  ]


def plan_text(summary: Summary) -> list[str]:
  """Returns two lines: one about the number of steps, and one about the learning rate."""
  config, steps = summary.exp.config, summary.steps
  if steps is None:
    length = f'Steps: unknown without the data; the run has {config.epochs:g} epochs.'
    warmup, unit = warmup_epochs(config), 'epochs'
  else:
    flops = f'{summary.run_flops / 1e15:.4g} PFLOPs in all'
    length = f'Steps: {steps:,} in {config.epochs:g} epochs, {flops}.'
    warmup, unit = summary.warmup, 'steps'
  rate = f'{config.optimizer.lr:g}'
  begin = f'warm-up to {rate} in {warmup:,g} {unit}' if warmup else f'{rate}, no warm-up'
  return [length, f'Learning rate: {begin}, then {config.schedule.name}.']
