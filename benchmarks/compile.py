"""Compiles the training step of `main.py` for GPUs and TPUs that this machine does not have.

    python -m benchmarks.compile --lower=cuda --config=configs/cifar10.py:b16 --batch=256

This command lowers a step for CUDA (or TPU, with `--lower=tpu`). It takes seconds, and needs only
JAX for CPUs. It prints one line of JSON with `tokens`, `dtype` and `kernels`. `kernels` maps the
name of each custom call to its number of calls.

    make compilers
    .compilers/bin/pip install --no-deps 'libtpu==0.0.50.*'
    export JAX_PLATFORMS=cpu
    .compilers/bin/python -m benchmarks.compile --config=configs/imagenet.py:b16 --target=h200 \\
        --devices=8 --batch=2048
    .compilers/bin/python -m benchmarks.compile --check  # compiles two rows again and compares
    .compilers/bin/python -m benchmarks.compile          # compiles the rows that have no result yet

These commands compile steps with the compilers of the hardware, on any x86 machine. The last
command compiles the steps in `ROWS` and adds each result to `results/compiled.json`. A row takes
between 15 seconds and some minutes. JAX must be 0.12 or later to read `h200.txtpb`, and the CUDA
wheels must have the same version as JAX. The wheels are in a separate environment, because JAX
would look for the hardware if it found them in the usual environment.
"""

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import math
import pathlib
import re
import sys
import time
from unittest import mock

import jax
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from benchmarks import arguments, collect, hlo
from vit_jax import cli
from vit_jax import config as config_lib
from vit_jax.distributed import Target, compiled_for, needed_bytes, sharding
from vit_jax.distributed import devices as devices_lib
from vit_jax.experiment import Experiment, assemble
from vit_jax.names import pair
from vit_jax.optim import plan as plan_lib
from vit_jax.optim.plan import Training
from vit_jax.training import state
from vit_jax.training.compiling import fit_step, plan_of
from vit_jax.training.step import make_train_step
from vit_jax.workdir import Task, writer

PATH = collect.RESULTS / 'compiled.json'
H200 = pathlib.Path(__file__).with_name('h200.txtpb')  # XLA's description of the GPU
GIB = {'h200': 141e9 / 2**30, 'v5e': 16, 'v5p': 95, 'v6e': 32}  # memory of a device
# Targets of `--lower`: Hopper, and any TPU.
LOWERED = {'cuda': Target('cuda', 9.0), 'tpu': Target('tpu')}
SAME_MEMORY = 0.02  # relative difference that `--check` accepts
DATASETS = {'tfds:cifar10': (10, 50_000), 'tfds:cifar100': (100, 50_000)}
DATASETS |= {'tfds:imagenet2012': (1000, 1_281_167)}  # classes and training images


@dataclasses.dataclass(frozen=True)
class Row:
  """A training step to compile.

  Attributes:
    config: config file with its variant, and overrides as on the command line.
    target: `h200`, or a TPU topology such as `v5e:16x16`.
    devices: number of devices.
    batch: images per step, on all devices together; 0 for the batch size of the config.
  """

  config: str
  target: str
  devices: int
  batch: int = 0


# Flags that are tried, in this order, if a row does not fit into memory.
REMEDIES = tuple(f'--config.micro_batches={n}' for n in (2, 4, 8))
REMEDIES += ('--config.model.remat=full', '--config.model.remat=full --config.micro_batches=4')

NO_DROPOUT = '--config.model.dropout=0'
FSDP = '--config.mesh.data=1 --config.mesh.fsdp=8'
OVER_HOSTS = '--config.mesh.data=4 --config.mesh.fsdp=8'
HALF = '--config.model.dtype=bfloat16'
ROWS = (
  Row('configs/cifar10.py:small', 'h200', 1),
  Row('configs/cifar10.py:wide', 'h200', 1),
  Row('configs/cifar10.py:deep', 'h200', 1),
  Row('configs/cifar10.py:b16', 'h200', 1),
  Row(f'configs/cifar10.py:b16 {NO_DROPOUT}', 'h200', 1),
  Row(f'configs/cifar10.py:b16 {NO_DROPOUT} --config.model.attention=plain', 'h200', 1),
  Row('configs/cifar10.py:l16', 'h200', 1),
  Row('configs/finetune.py:b16,cifar10', 'h200', 1),
  Row('configs/finetune.py:l16,cifar10', 'h200', 1),
  Row('configs/imagenet.py:s16', 'h200', 1),
  Row('configs/imagenet.py:b16', 'h200', 8, 2048),
  Row(f'configs/imagenet.py:b16 {NO_DROPOUT}', 'h200', 8, 2048),
  Row(f'configs/imagenet.py:b16 {NO_DROPOUT} {FSDP}', 'h200', 8, 2048),
  Row(f'configs/imagenet.py:l16 {NO_DROPOUT} {FSDP}', 'h200', 8, 2048),
  Row(f'configs/imagenet.py:l16 {FSDP}', 'h200', 8, 2048),
  Row('configs/imagenet.py:b16', 'h200', 32, 4096),
  Row(f'configs/imagenet.py:l16 {OVER_HOSTS}', 'h200', 32, 4096),
  Row(f'configs/imagenet.py:h14 {OVER_HOSTS}', 'h200', 32, 4096),
  Row(f'configs/cifar10.py:small {HALF}', 'v5e:2x2', 4),
  Row(f'configs/cifar10.py:wide {HALF}', 'v5e:2x2', 4),
  Row(f'configs/cifar10.py:deep {HALF}', 'v5e:2x2', 4),
  Row('configs/imagenet.py:s16', 'v5e:2x2', 4, 1024),
  Row('configs/imagenet.py:b16', 'v5e:16x16', 256),
  Row('configs/imagenet.py:l16', 'v5e:16x16', 256),
  Row('configs/imagenet.py:l16', 'v6e:16x16', 256),
  Row('configs/imagenet.py:h14 --config.mesh.data=32 --config.mesh.fsdp=16', 'v5p:8x8x8', 512),
)

CHECKED = ROWS[0], ROWS[4]  # `small`, and B/16 without dropout


def load(spec: str, batch: int) -> ConfigDict:
  """Returns the config of a row, with its overrides and batch size."""
  path, *flags = spec.split()
  config = cli.load_file(path)
  overrides = dict(flag.removeprefix('--config.').split('=', 1) for flag in flags)
  return config_lib.override_all(config, overrides | ({'batch_size': str(batch)} if batch else {}))


def build(config: ConfigDict) -> tuple[Experiment, Training]:
  """Returns the `Experiment` and the `Training` of a config, without reading any data."""
  classes, examples = DATASETS[config.data.source]
  task = Task(
    tuple(f'class {i}' for i in range(classes)), pair(config.data.image_size), 3, examples
  )
  recipe = plan_lib.training_recipe(config, examples)
  return assemble(config, task), Training(None, None, None, params=None, **recipe)


def shapes_of(exp: Experiment, training: Training) -> state.TrainState:
  """Returns the shapes of the state of a run."""
  return jax.eval_shape(lambda: state.init_state(exp, training, devices_lib.make_mesh()))


def trace_step(exp: Experiment, training: Training, mesh: Mesh) -> jax.stages.Traced:
  """Traces the training step of `main.py` for a mesh, whose devices need not exist."""

  def abstract(x, where):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  shapes = shapes_of(exp, training)
  size, where = exp.config.batch_size, sharding.batch_sharding(mesh)
  batch = {
    'image': jax.ShapeDtypeStruct((size, *exp.task.stored_size, 3), 'uint8', sharding=where),
    'label': jax.ShapeDtypeStruct((size,), 'int32', sharding=where),
  }
  placed = jax.tree.map(abstract, shapes, sharding.layout(mesh, shapes))
  return make_train_step(exp, training, mesh).trace(placed, batch)


@contextlib.contextmanager
def without_cudnn():
  """Fakes the version of cuDNN, so that JAX can lower cuDNN's kernels where cuDNN is missing."""
  name = 'jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version'
  with mock.patch(name, lambda: 91000):
    yield


def lower(config: ConfigDict, platform: str) -> dict:
  """Lowers the training step for `cuda` or `tpu`.

  Returns the number of tokens, the data type, and the number of each kernel.
  """
  exp, training = build(config)
  with without_cudnn(), compiled_for(LOWERED[platform]):
    traced = trace_step(exp, training, devices_lib.make_mesh())
    text = traced.lower(lowering_platforms=(platform,)).as_text()
  grid = [n // patch for n, patch in zip(exp.image_shape, exp.model.patch_size)]
  return {
    'tokens': exp.model.num_prefix + math.prod(grid),
    'dtype': config.model.dtype,
    'kernels': hlo.kernels(re.findall(r'stablehlo\.custom_call @([\w$.]+)', text)),
  }


def describe(target: str, count: int) -> np.ndarray:
  """Returns JAX's descriptions of the target's devices. A host has 8 GPUs."""
  if target == 'h200':
    shape = f'{max(count // 8, 1)}x1x{min(count, 8)}'
    found = topologies.get_topology_desc(
      platform='cuda', target_config=H200.read_text(encoding='utf-8'), topology=shape
    )
  else:
    found = topologies.get_topology_desc(platform='tpu', topology_name=target)
  return np.array(found.devices[:count])


def arrange(config: ConfigDict, devices: np.ndarray) -> Mesh:
  """Returns the mesh of the config."""
  sizes = devices_lib.axis_sizes(dict(config.mesh), devices.size)
  if not sizes:
    raise ValueError(f'{devices.size} devices cannot form the mesh {dict(config.mesh)}.')
  return devices_lib.mesh_of(sizes, list(devices))


def flops(compiled: jax.stages.Compiled) -> float:
  """Returns XLA's count of the FLOPs of a step on each device, excluding cuDNN's kernels."""
  from jax._src.lib import _jax

  (module,) = compiled.runtime_executable().hlo_modules()
  return _jax.hlo_module_cost_analysis(jax.devices('cpu')[0].client, module)['flops']


def compile_row(row: Row) -> dict:
  """Compiles the step of a row; returns its kernels, collectives, memory and FLOPs on a device."""
  config = load(row.config, row.batch)
  exp, training = build(config)
  mesh = arrange(config, describe(row.target, row.devices))
  with without_cudnn():
    began = time.perf_counter()
    lower = lambda exp: trace_step(exp, training, mesh).lower()
    exp, compiled = fit_step(exp, lower, mesh, shapes_of(exp, training))
  seconds, text = time.perf_counter() - began, compiled.as_text()
  remat_lines = len(re.findall(r'^ .*%\S*\.remat', text, re.MULTILINE))
  peak = needed_bytes(compiled)
  room = config.device_memory or GIB[row.target.split(':')[0]]
  return dataclasses.asdict(row) | {
    'batch': config.batch_size,
    'mesh': dict(mesh.shape),
    'compile_seconds': round(seconds, 1),
    'kernels': hlo.kernels(re.findall(r'custom_call_target="([^"]+)"', text)),
    'collectives': hlo.collectives(text),
    'gib': round(peak / 2**30, 2),
    'gib_of_device': round(room, 1),
    'fits': peak / 2**30 < room and not remat_lines,  # without recomputation by XLA
    'remat_lines': remat_lines,
    'flops': flops(compiled),
    'modelled_seconds': hlo.modelled_seconds(text, row.target),
    **({'plan': str(plan_of(exp, mesh))} if exp.parts else {}),
    'jax': jax.__version__,
    'compiler': version_of(row.target),
    'date': datetime.date.today().isoformat(),
  }


def attempt(row: Row) -> dict:
  """Compiles a row. If the step does not fit into memory, also tries the flags in `REMEDIES`."""
  found = compile_or_refuse(row)
  if found['fits']:
    return found
  for remedy in REMEDIES:
    then = compile_or_refuse(dataclasses.replace(row, config=f'{row.config} {remedy}'))
    if then['fits']:
      return found | {'fits_with': remedy, 'gib_then': then['gib']}
  return found


def compile_or_refuse(row: Row) -> dict:
  """Works like `compile_row`, but also returns a result if the compiler runs out of memory."""
  try:
    return compile_row(row)
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return dataclasses.asdict(row) | {'fits': False, 'refused': str(error).splitlines()[0][:200]}


def version_of(target: str) -> str:
  """Returns the name and the version of the package that contains the compiler."""
  name = 'jax-cuda12-pjrt' if target == 'h200' else 'libtpu'
  return f'{name} {importlib.metadata.version(name)}'


def key_of(result: dict) -> tuple:
  """Returns the values that identify a row in `results/compiled.json`."""
  return result['config'], result['target'], result['devices']


def stored() -> dict[tuple, dict]:
  """Returns the results of `results/compiled.json`."""
  return {key_of(found): found for found in (writer.read_json(PATH) or {'rows': []})['rows']}


def check() -> list[str]:
  """Compiles the rows in `CHECKED`, and returns the differences from the stored results."""
  differ = []
  for row in CHECKED:
    found, before = compile_row(row), stored()[key_of(vars(row))]
    if found['kernels'] != before['kernels']:
      differ.append(f'{row.config}: kernels {before["kernels"]} became {found["kernels"]}.')
    if abs(found['gib'] / before['gib'] - 1) > SAME_MEMORY:
      differ.append(f'{row.config}: {before["gib"]} GiB became {found["gib"]} GiB.')
  return differ


def parse(argv: list[str]) -> argparse.Namespace:
  parser = arguments.Parser(__spec__, __doc__)
  parser.add_argument('--config', help='one text: config file with its variant, then overrides')
  parser.add_argument('--batch', type=arguments.count, default=0, help='images per step')
  parser.add_argument('--lower', choices=sorted(LOWERED), help='print kernels of the lowered step')
  parser.add_argument('--target', help='h200, or a TPU topology such as v5e:16x16')
  parser.add_argument('--devices', type=arguments.count, default=1, help='number of devices')
  parser.add_argument('--check', action='store_true', help='compile two rows again, and compare')
  args = parser.parse_args(argv)
  if (args.lower or args.target) and not args.config:
    parser.error('--lower and --target need --config, such as configs/cifar10.py:b16')
  if args.lower and args.target:
    parser.error('--lower runs without a compiler and takes no --target')
  if args.config and not (args.lower or args.target):
    parser.error('--config needs --lower=cuda, --lower=tpu or --target')
  if args.target and args.target.split(':')[0] not in GIB:
    tpus = ', '.join(sorted(GIB.keys() - {'h200'}))
    parser.error(
      f'--target={args.target}: expected h200, or a TPU and its topology, such as '
      f'v5e:2x2. TPUs: {tpus}.'
    )
  return args


def main(argv: list[str]) -> None:
  args = parse(argv)
  if args.lower:
    print(json.dumps(lower(load(args.config, args.batch), args.lower)))
    return
  if args.target:
    print(json.dumps(attempt(Row(args.config, args.target, args.devices, args.batch))))
    return
  if args.check:
    sys.exit('\n'.join(check()) or 0)
  done = stored()
  for row in ROWS:
    if key_of(vars(row)) in done:
      continue
    found = attempt(row)
    done[key_of(found)] = found
    writer.write_json(PATH, {'rows': [done[k] for r in ROWS if (k := key_of(vars(r))) in done]})
    print(row.config, row.target, found.get('gib'), 'GiB', found.get('kernels'), flush=True)


if __name__ == '__main__':
  main(sys.argv[1:])
