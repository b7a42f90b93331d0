"""Estimates the time and memory of a training step and a save on TPU pods.

Nothing is trained or compiled, and no TPU is needed. The calculation uses known facts: the shapes
of the state, its layout on the devices (`sharding.layout`), the FLOPs of the traced step, and the
vendor's figures in `CHIPS`. In addition, it uses these assumptions:
  * `USED`, `HOST_LINK` and `COPIES`;
  * the activations that the compiler keeps (`vit_jax.training.compiling`);
  * the collectives (`collectives`), each in rings over all links of a chip.
"""

import dataclasses
import functools
import math

import jax
from jax.sharding import AbstractMesh, AxisType

from benchmarks.compile import GIB, build, shapes_of
from vit_jax import config as config_lib
from vit_jax.distributed import SHARE, Target, compiled_for, layout, size_on_device
from vit_jax.distributed.devices import AXES
from vit_jax.experiment import Experiment
from vit_jax.training import TrainState, compiling, tracing
from vit_jax.training.compiling import Plan

BATCH = 4096  # images per step on all chips, as in the paper's ImageNet recipes
IMAGES = {'data.source': 'tfds:imagenet2012', 'data.image_size': '224'}
TPU = Target('tpu')

USED = 0.5  # assumed share of the peak that a step's matrix products reach
# Bytes per second from a chip to its host: an assumed 10 GB/s. PCIe carries about 16 GB/s to a
# chip (https://jax-ml.github.io/scaling-book/tpus).
HOST_LINK = 10e9
PER_HOST = 4  # chips of a host (a virtual machine), in a slice of several hosts
COPIES = 2  # process 0 gathers the state (`to_host`), and orbax copies it before it writes


@dataclasses.dataclass(frozen=True)
class Chip:
  """Figures of a TPU and its host.

  Attributes:
    peak: bfloat16 operations per second.
    memory: bytes of a chip.
    link: bytes per second that a chip sends over all its links in one direction, within a slice.
    network: bytes per second that a chip sends over the data centre's network, between slices.
    slice: largest number of chips in a slice.
    host: bytes of memory of a host with `PER_HOST` chips.
  """

  peak: float
  memory: float
  link: float
  network: float
  slice: int
  host: float


# From https://cloud.google.com/tpu/docs/v5e and https://cloud.google.com/tpu/docs/v5p. The vendor
# gives the rate of the links for both directions together (400 and 1,200 GB/s). The network of a
# v5e pod has 6.4 Tbit/s for 256 chips; a v5p chip has 50 Gbit/s. The hosts are the machines
# `ct5lp-hightpu-4t` and `ct5p-hightpu-4t`.
CHIPS = {
  'v5e': Chip(197e12, GIB['v5e'] * 2**30, 200e9, 6.4e12 / 8 / 256, 256, 192e9),
  'v5p': Chip(459e12, GIB['v5p'] * 2**30, 600e9, 50e9 / 8, 8960, 448e9),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """Shapes, FLOPs and activations of a model. The object is hashed by its identity.

  Attributes:
    exp: the experiment.
    state: shapes of the training state.
    flops: FLOPs of a training step for one image, by `model.remat`.
    kept: estimated bytes of activations for one image, by `model.remat`.
  """

  exp: Experiment
  state: TrainState
  flops: dict[str, int]
  kept: dict[str, float]


def mesh_of(data: int, fsdp: int) -> AbstractMesh:
  """Returns an abstract mesh, which has axes and their sizes, but no devices."""
  return AbstractMesh((data, fsdp, 1), AXES, axis_types=(AxisType.Auto,) * 3)


def settings(variant: str) -> dict[str, str]:
  """Returns the overrides of the default config, for training in bfloat16.

  The default config has AdamW with float32 moments, and no averaged weights.
  """
  size = {'model.variant': variant, 'model.dtype': 'bfloat16', 'batch_size': str(BATCH)}
  return IMAGES | size


@functools.cache
def study(variant: str) -> Model:
  """Traces the training step of a model for one image. G/14 takes a minute."""
  exp, training = build(config_lib.override_all(config_lib.default_config(), settings(variant)))
  state = shapes_of(exp, training)
  plans = [Plan(1, remat) for remat in compiling.REMAT]
  with compiled_for(TPU):
    need = compiling.estimator(exp, mesh_of(1, 1), state)
    kept = {plan.remat: need(plan)[1] / BATCH for plan in plans}
  flops = {p.remat: tracing.step_flops(compiling.planned(exp, p), state.params) for p in plans}
  return Model(exp, state, flops, kept)


@functools.cache
def held(model: Model, mesh: AbstractMesh) -> tuple[int, int]:
  """Returns the bytes of the state on each chip, and the bytes of gradients and images."""
  image = math.prod((*model.exp.task.stored_size, model.exp.task.channels))
  gradients = size_on_device(mesh, model.state.params)
  return size_on_device(mesh, model.state), gradients + BATCH // mesh.size * image


def memory(model: Model, mesh: AbstractMesh, plan: Plan) -> dict[str, float]:
  """Returns the bytes of a step on each chip, as `compiling.estimator` estimates them.

  The state does not include the gradients. With micro-batches, a chip holds two sets of gradients:
  the sum so far, and the gradients of the newest micro-batch. The estimate then also counts the
  images twice.
  """
  state, others = held(model, mesh)
  return {
    'state': state,
    'gradients_and_images': others * (1 if plan.micro_batches == 1 else 2),
    'activations': BATCH // mesh.size // plan.micro_batches * model.kept[plan.remat],
  }


def collectives(model: Model, mesh: AbstractMesh, plan: Plan) -> list[dict]:
  """Returns the assumed collectives of a step, in the form of `results/pods.json`.

  Without `fsdp`, gradients are summed once, in float32. With `fsdp`, each micro-batch gathers the
  split weights in bfloat16 for the forward pass and again for the backward pass. It then sums the
  gradients of split weights in bfloat16, and the gradients of unsplit weights in float32.
  """
  params, data, fsdp = model.state.params, mesh.shape['data'], mesh.shape['fsdp']
  placed = zip(jax.tree.leaves(params), jax.tree.leaves(layout(mesh, params)), strict=True)
  split, whole = 0, 0  # numbers of parameters
  for leaf, where in placed:
    split, whole = (
      (split + leaf.size, whole) if 'fsdp' in where.spec else (split, whole + leaf.size)
    )
  parts = plan.micro_batches if fsdp > 1 else 1
  found = [
    ('all-gather', fsdp, 2 * 2 * split),
    ('reduce-scatter', fsdp, 2 * split),
    ('all-reduce', data, 2 * split // fsdp),
    ('all-reduce', data * fsdp, 4 * whole),
  ]
  return [{'kind': k, 'group': group, 'bytes': parts * size} for k, group, size in found if size]


def sent(kind: str, whole: float, group: int) -> float:
  """Returns the bytes that a chip sends for a collective among `group` chips in a ring.

  Args:
    kind: HLO name of the collective.
    whole: bytes of the whole array that is reduced or gathered.
    group: number of participating chips.
  """
  part = (group - 1) / group
  return whole * {'all-reduce': 2 * part, 'collective-permute': 1}.get(kind, part)


def seconds_sending(chip: Chip, mesh: AbstractMesh, found: list[dict]) -> float:
  """Returns the seconds that a chip needs to send all data of a step.

  If the pod has several slices, the mesh axis `data` extends over them. A sum over all chips then
  has three stages: within each slice, between slices, and within each slice again. Between slices,
  each chip sends only its share of the array.
  """
  slices, links, network = math.ceil(mesh.size / chip.slice), 0.0, 0.0
  for c in found:
    over = slices if c['kind'] == 'all-reduce' else 1  # `fsdp` stays within a slice
    inside = c['group'] // over
    links += sent(c['kind'], c['bytes'], inside)
    network += sent(c['kind'], c['bytes'] / inside, over)
  return links / chip.link + network / chip.network


def step(model: Model, chip: Chip, mesh: AbstractMesh, plan: Plan) -> dict[str, float]:
  """Returns the seconds of the parts of a step, and of the step with complete or no overlap."""
  products = BATCH // mesh.size * model.flops[plan.remat] / (USED * chip.peak)
  sending = seconds_sending(chip, mesh, collectives(model, mesh, plan))
  return {
    'products': products,
    'sending': sending,
    'overlapped': max(products, sending),
    'one_after_the_other': products + sending,
  }


def choose(model: Model, chip: Chip, count: int) -> tuple[AbstractMesh, Plan, Plan]:
  """Returns the mesh with the smallest `fsdp` that fits, and two plans for a run on this mesh.

  Both plans fit. The first is the fastest. The second is the one that a run would choose: the
  first one of `possible_plans` that fits.

  Raises:
    ValueError: the model does not fit.
  """
  for fsdp in (2**n for n in range(int(math.log2(min(count, chip.slice))) + 1)):
    mesh = mesh_of(count // fsdp, fsdp)
    with compiled_for(TPU):
      plans = compiling.possible_plans(model.exp, mesh)
    fitting = [p for p in plans if sum(memory(model, mesh, p).values()) <= SHARE * chip.memory]
    if fitting:
      seconds = lambda plan, mesh=mesh: step(model, chip, mesh, plan)['one_after_the_other']
      return mesh, min(fitting, key=seconds), fitting[0]
  raise ValueError(f'{model.exp.config.model.variant} does not fit on {count} chips.')


def copied(mesh: AbstractMesh, tree, chips: int) -> int:
  """Returns the bytes that the first `chips` chips copy to their host in a sharded save.

  If several chips hold the same part of an array, and their number divides an axis of this part,
  each of them copies an equal share. Otherwise, only the first chip copies it (orbax's default).
  """
  total = 0
  for leaf, where in zip(jax.tree.leaves(tree), jax.tree.leaves(layout(mesh, tree)), strict=True):
    part = where.shard_shape(leaf.shape)
    parts = leaf.size // math.prod(part)
    holders, size = mesh.size // parts, math.prod(part) * leaf.dtype.itemsize
    shared = any(n % holders == 0 for n in part)
    total += size * chips // holders if shared else size * min(chips, parts)
  return total


def save(model: Model, chip: Chip, mesh: AbstractMesh, bucket: float) -> dict[str, dict]:
  """Returns the seconds of a sharded save, and of a save for which all arrays are gathered.

  Args:
    model: the model.
    chip: figures of the chip.
    mesh: mesh of the chips.
    bucket: bytes per second that a host writes to a bucket.
  """
  whole = size_on_device(mesh_of(1, 1), model.state)
  host = COPIES * whole
  gathering = sent('all-gather', whole, mesh.shape['fsdp']) / chip.link
  return {
    'sharded': {
      'seconds_blocked': copied(mesh, model.state, 1) / HOST_LINK,
      'seconds_written': copied(mesh, model.state, PER_HOST) / bucket,
    },
    'gathered': {
      'seconds_blocked': gathering + whole / HOST_LINK,
      'seconds_written': whole / bucket,
      'host_gb': host / 1e9,
      'gb_of_host': chip.host / 1e9,
      'fits_the_host': host < chip.host,
    },
  }
