"""Compiles a training step that fits into memory, by choosing micro-batches and `model.remat`.

A device can split its part of a batch into micro-batches, and add up their gradients. `model.remat`
decides which activations the forward pass does not store. The backward pass computes these
activations again. A `Plan` has the number of micro-batches and the value of `model.remat`.

Decisions:
  * More micro-batches are tried before more recomputation, because micro-batches cost almost no
    time.
  * Checkpoints contain the chosen plan, so that a resumed run computes the same steps, bit for bit,
    as a run that was not interrupted.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import logging
import math
import time

from clu import platform
import jax

from vit_jax import progress
from vit_jax.distributed import compiled_for, first_fit, shares, size_on_device, target
from vit_jax.experiment import Experiment, group
from vit_jax.limits import OutOfMemory, gib
from vit_jax.model import REMAT, flash, select_kernel
from vit_jax.optim import Training
from vit_jax.training.state import TrainState, state_shapes
from vit_jax.training.step import TrainStep, make_train_step
from vit_jax.training.tracing import activations, model_flops, runs_teacher

log = logging.getLogger(__name__)

# `tracing.py` counts activations. XLA keeps this fraction of them. The others are cheap to compute,
# so XLA computes them again. On a GPU, the measured fraction is 0.49 to 0.63, for the training
# steps in results/compiled.json that fit on one device.
KEPT, KEPT_ON_CPU = 0.65, 0.85


@dataclasses.dataclass(frozen=True)
class Plan:
  """How a training step saves memory.

  Attributes:
    micro_batches: number of micro-batches into which each device splits its part of the batch.
    remat: value of `model.remat`, one of `REMAT`.
  """

  micro_batches: int
  remat: str

  def __str__(self) -> str:
    return f'micro_batches={self.micro_batches} with model.remat={self.remat}'


def plan_of(exp: Experiment, mesh: jax.sharding.Mesh) -> Plan:
  """Returns the `Plan` that an experiment uses now."""
  return Plan(exp.training_parts(mesh), exp.model.remat)


def planned(exp: Experiment, plan: Plan) -> Experiment:
  """Returns a copy of `exp` with this plan; `model.remat` of the config, if set, has priority."""
  remat = exp.config.model.remat or plan.remat
  return dataclasses.replace(exp, parts=plan.micro_batches, model=exp.model.clone(remat=remat))


def resumed(exp: Experiment, saved: Mapping) -> Experiment:
  """Returns the experiment with the plan of a checkpoint, or `exp` if the checkpoint has no plan.

  `saved` is the item `config` of the checkpoint.
  """
  plan = saved.get('plan')
  return planned(exp, Plan(**plan)) if plan else exp


def possible_plans(exp: Experiment, mesh: jax.sharding.Mesh) -> list[Plan]:
  """Returns the plans that the config allows; the first is fastest, the last needs least memory."""
  config, rows = exp.config, exp.config.batch_size // shares(mesh)
  together = group(config) if rows % 2 == 0 else 1  # a pair for mixup stays in one micro-batch
  first = exp.micro_batches(mesh, config.batch_size, backward=True)
  counts = [n for n in range(first, rows + 1) if rows % n == 0 and rows // n % together == 0]
  counts = [config.micro_batches] if config.micro_batches else counts
  remats = [config.model.remat] if config.model.remat else list(REMAT)
  return [Plan(count, remat) for remat in remats for count in counts]


def estimator(
  exp: Experiment, mesh: jax.sharding.Mesh, state: TrainState
) -> Callable[[Plan], tuple[float, float]]:
  """Returns a function `(plan) -> (fixed, varying)` that estimates the memory of a training step.

  `fixed` and `varying` are bytes on each device. `varying` is the estimate for the activations of
  one micro-batch, and `fixed` is the estimate for everything else.

  Args:
    exp: the experiment.
    mesh: mesh of the devices.
    state: training state, or its shapes.
  """
  rows, image = exp.config.batch_size // shares(mesh), (*exp.task.stored_size, exp.task.channels)
  trained, _ = exp.split(state.params)
  held = size_on_device(mesh, state)
  held += size_on_device(mesh, exp.teacher.params) if runs_teacher(exp) else 0
  summed = size_on_device(mesh, trained) + rows * math.prod(image)

  @functools.cache
  def kept(remat):
    with compiled_for(target(mesh)):  # the device decides which attention kernel is counted
      return activations(planned(exp, Plan(1, remat)), state.params).total()

  share = KEPT_ON_CPU if target(mesh).platform == 'cpu' else KEPT

  def need(plan):
    # With micro-batches, memory holds the summed gradients and the gradients of one micro-batch.
    copies = 1 if plan.micro_batches == 1 else 2
    # With recomputation, the backward pass also holds all activations of the current block.
    block = 0 if plan.remat == 'none' else kept('none') / exp.model.depth
    each = share * (kept(plan.remat) + block)
    return held + copies * summed, rows // plan.micro_batches * each

  return need


def estimated(exp: Experiment, training: Training, mesh: jax.sharding.Mesh) -> Experiment:
  """Returns the experiment with the fastest plan whose estimated memory is within the limit.

  Nothing is compiled. If no plan fits, the result has the plan that needs the least memory. The
  experiment is returned unchanged if it already has a plan, or if no memory limit is known.
  """
  budget = exp.budget(mesh)
  if budget is None or exp.parts:
    return exp
  longest = exp.at(patch_size=exp.patch_sizes[0])
  need = estimator(longest, mesh, state_shapes(exp, training, mesh))
  plans = possible_plans(longest, mesh)
  return planned(exp, next((plan for plan in plans if sum(need(plan)) <= budget), plans[-1]))


def fit_step(
  exp: Experiment,
  lower: Callable[[Experiment], jax.stages.Lowered],
  mesh: jax.sharding.Mesh,
  state: TrainState,
) -> tuple[Experiment, jax.stages.Compiled]:
  """Compiles a training step that fits into the memory of each device.

  The current plan of `exp` is compiled without a check of its memory in three cases. Either no
  memory limit is known, or only one plan is possible, or batches contain features, not images.

  Args:
    exp: the experiment. If it already has a plan, no faster plan is tried.
    lower: function that traces and lowers the training step of an experiment.
    mesh: mesh of the devices.
    state: training state, or its shapes.

  Returns:
    The experiment with the plan that fits, and the compiled step.

  Raises:
    limits.OutOfMemory: none of the compiled plans fits; the message names the plan that needs the
      least memory.
  """
  budget, plans = exp.budget(mesh), possible_plans(exp, mesh)
  if exp.parts and plan_of(exp, mesh) not in plans:  # it was made for other devices
    exp = dataclasses.replace(exp, parts=None)
  if budget is None or len(plans) == 1 or not exp.sees_images:
    return exp, lower(exp).compile()
  need, own, factor = estimator(exp, mesh, state), plan_of(exp, mesh), 1.0
  if exp.parts and own in plans:
    plans, factor = plans[plans.index(own) :], 0.0
  fit = first_fit(plans, lambda plan: lower(planned(exp, plan)), need, budget, factor)
  if fit.compiled is None:
    raise OutOfMemory(
      f'Training does not fit into memory. Of the plans tried, {fit.plan} needs the least memory: '
      f'{gib(fit.size)} on each device, but the limit is {gib(budget)}. Parameters and '
      f'optimizer state alone take {gib(size_on_device(mesh, state))}. Lower data.image_size, '
      'choose a smaller model.variant, set model.dtype=bfloat16 or freeze=backbone, or use more '
      'devices with mesh.fsdp=-1.'
    )
  log.info(
      '%s: a training step needs %s of memory on each device, with a limit of %s (compiled %d '
      'time(s)).',
      fit.plan, gib(fit.size), gib(budget), fit.attempts,
  )  # fmt: skip
  return planned(exp, fit.plan), fit.compiled


def halved(exp: Experiment, mesh: jax.sharding.Mesh) -> Experiment | None:
  """Returns the experiment with a plan that needs less memory; None if there is no such plan.

  If possible, the new plan has micro-batches of at most half the size. If not, the plan has
  the next value in `REMAT`, with which the forward pass stores fewer activations.
  """
  plans, own = possible_plans(exp, mesh), plan_of(exp, mesh)
  later = plans[plans.index(own) + 1 :] if own in plans else []
  smaller = [p for p in later if p.remat != own.remat or p.micro_batches >= 2 * own.micro_batches]
  return planned(exp, smaller[0]) if smaller else None


def attention_shapes(exp: Experiment, mesh: jax.sharding.Mesh) -> list[tuple[int, int, int, int]]:
  """Returns the shapes of the queries that one device computes for a micro-batch: `[B, N, K, E]`.

  B is the number of images, N the number of tokens, K the number of heads, and E the head size. The
  shapes are in the order of `Objective.sequences`.
  """
  batch = exp.config.batch_size // shares(mesh) // exp.training_parts(mesh)
  together = mesh.shape['tensor']
  return [  # if `tensor` does not divide the heads, a device computes all (`sharding.partition`)
    (batch, tokens, heads if heads % together else heads // together, size)
    for tokens, heads, size in exp.objective.sequences(exp)
  ]


def uses_flash(exp: Experiment, mesh: jax.sharding.Mesh) -> bool:
  """Returns whether blocks that the objective trains compute attention with cuDNN's kernel."""
  drops = bool(exp.model.attention_dropout)
  queries = [jax.ShapeDtypeStruct(s, exp.model.dtype) for s in attention_shapes(exp, mesh)]
  with compiled_for(target(mesh)):
    return any(select_kernel(exp.model.attention, x, x, drops) is flash for x in queries)


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A compiled training step.

  Attributes:
    step: the compiled function.
    flops: FLOPs of a step on all devices together, without the operations that `model.remat`
      repeats; 0 if batches contain features instead of images.
    fused: whether the step computes attention with cuDNN's kernel.
    exp: the experiment, with the plan that fits into memory.
  """

  step: TrainStep
  flops: int
  fused: bool
  exp: Experiment


def compile_step(
  exp: Experiment, training: Training, mesh: jax.sharding.Mesh, state: TrainState, batch: dict
) -> Compiled:
  """Compiles a training step that fits into memory.

  The step is compiled before training, so that the measured speed excludes the time to compile.

  Args:
    exp: experiment to train.
    training: data, steps and optimizer of the run.
    mesh: mesh of the devices.
    state: training state, or its shapes.
    batch: a batch, or its shapes.

  Raises:
    limits.OutOfMemory: the step needs too much memory with each plan that was compiled.
  """
  began = time.perf_counter()
  with progress.announced('Compiling the training step ...'):
    lower = lambda exp: make_train_step(exp, training, mesh).lower(state, batch, training.teacher)
    exp, step = fit_step(exp, lower, mesh, state)
  flops = exp.config.batch_size * model_flops(exp, state.params) if exp.sees_images else 0
  devices = f'{mesh.size} {target(mesh).platform} device(s)'
  if mesh.shape['data'] < mesh.size:
    devices += f' ({", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())})'
  height, width, _ = exp.image_shape
  log.info(
      'Compiled in %.1f s for images of %dx%d and patches of %dx%d; training %d steps on %s.',
      time.perf_counter() - began, height, width, *exp.model.patch_size, training.steps, devices,
  )  # fmt: skip
  platform.work_unit().set_notes(f'{exp.config.model.variant} on {devices}')
  return Compiled(step, flops, exp.sees_images and uses_flash(exp, mesh), exp)
