"""Compiles the train step for TPU pods on any x86 machine, and records its memory and FLOPs.

    python3.12 -m venv pods && pods/bin/pip install -r requirements.txt 'libtpu==0.0.50.*'
    JAX_PLATFORMS=cpu pods/bin/python -m benchmarks.pods     # all rows of PODS without a result
    JAX_PLATFORMS=cpu pods/bin/python -m benchmarks.pods g/14 v5e:16x16     # only these rows

The TPU's own compiler reports memory and FLOPs per chip, and the program with its collectives.
These results are written to `results/pods.json`. Install libtpu only in a separate environment,
because JAX looks for a TPU when libtpu is installed. A row takes minutes.
"""

import argparse
from collections import Counter
import datetime
import importlib.metadata
import math
import re
import sys
import time

import jax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
import numpy as np

from benchmarks import arguments, collect
from vit_jax import config as config_lib
from vit_jax.distributed import backend, sharding
from vit_jax.distributed import devices as devices_lib
from vit_jax.experiment import Task, assemble
from vit_jax.optim import plan as plan_lib
from vit_jax.optim.plan import Training
from vit_jax.training import state
from vit_jax.training.step import make_train_step
from vit_jax.workdir import writer

BATCH, CLASSES, SIZE, EXAMPLES = 4096, 1000, 224, 1_281_167  # ImageNet, the paper's batch size
PATH = collect.RESULTS / 'pods.json'

# Each row: model, pod, chips along (data, fsdp, tensor), remat. With 256 shards, a matrix has too
# few rows for an all-gather, and the compiler sums padded arrays instead. 16 shards work well.
PODS = [
  ('B/16', 'v5e:16x16', (256, 1, 1), 'none'),
  ('B/16', 'v5e:16x16', (1, 256, 1), 'none'),
  ('B/16', 'v5e:16x16', (16, 16, 1), 'none'),
  ('B/16', 'v5e:16x16', (64, 1, 4), 'none'),
  ('L/16', 'v5e:16x16', (16, 16, 1), 'none'),
  ('g/14', 'v5e:16x16', (16, 16, 1), 'none'),
  ('g/14', 'v6e:16x16', (16, 16, 1), 'none'),
  ('g/14', 'v5p:8x8x8', (32, 16, 1), 'none'),
]
COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 'f32': 4, 's32': 4, 'u32': 4}


def settings(variant: str, sizes: tuple[int, int, int], remat: str):
  """Returns the config of the run: bfloat16 and AdamW."""
  config = config_lib.default_config()
  config.model.variant, config.model.dtype, config.model.remat = variant, 'bfloat16', remat
  config.data.image_size, config.batch_size = (SIZE, SIZE), BATCH
  config.mesh.data, config.mesh.fsdp, config.mesh.tensor = sizes
  return config


def compile_step(variant: str, pod: str, sizes: tuple[int, int, int], remat: str):
  """Compiles the training step of `main.py` for a pod, without the pod's hardware."""
  config = settings(variant, sizes, remat)
  topology = topologies.get_topology_desc(platform='tpu', topology_name=pod)
  devices = np.array(topology.devices[: math.prod(sizes)]).reshape(sizes)
  mesh = Mesh(devices, devices_lib.AXES, axis_types=(AxisType.Auto,) * 3)
  classes = tuple(f'class {i}' for i in range(CLASSES))
  exp = assemble(config, Task(classes, (SIZE, SIZE), 3, EXAMPLES))
  training = Training(None, None, None, params=None, **plan_lib.training_recipe(config, EXAMPLES))

  def abstract(shape, dtype, where):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

  shapes = jax.eval_shape(lambda: state.init_state(exp, training, devices_lib.make_mesh()))
  now = jax.tree.map(
    lambda x, where: abstract(x.shape, x.dtype, where), shapes, sharding.layout(mesh, shapes)
  )
  over_batch = sharding.batch_sharding(mesh)
  batch = {
    'image': abstract((BATCH, SIZE, SIZE, 3), 'uint8', over_batch),
    'label': abstract((BATCH,), 'int32', over_batch),
  }
  with backend.portable():  # selects the kernels that a TPU uses
    return make_train_step(exp, training, mesh).lower(now, batch).compile()


def group_size(line: str) -> int:
  """Returns how many chips take part in each group of a collective."""
  if named := re.search(r'replica_groups=mesh\[(.+?)\] \{(.*?)\}', line):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])  # a whole axis or a part of it
    return math.prod(int(part or sizes[name]) for name, part in axes)
  if counted := re.search(r'replica_groups=\[\d+,(\d+)\]', line):
    return int(counted[1])
  listed = re.search(r'replica_groups=\{\{([\d,]+)\}', line)
  return len(listed[1].split(',')) if listed else 2  # a permutation lists pairs


def collectives(text: str) -> list[dict]:
  """Returns the collectives of a step, by kind and by number of participating chips.

  Args:
    text: HLO of the compiled step.

  Returns:
    For each kind and group size, the number of operations and the bytes of the whole arrays. These
    are the arrays before they are scattered, or after they are gathered.
  """
  operations, inside = {}, ''  # `inside` is the header of the computation that contains the line
  for line in text.splitlines():
    if not line.startswith(' '):
      inside = line
    match = re.search(r'= (.+?) (' + '|'.join(COLLECTIVES) + r')(-start)?\(', line)
    if not match:
      continue
    shapes, kind, started = match.groups()
    group, number = group_size(line), re.search(r'channel_id=(\d+)', line)
    arrays = re.findall(r'(\w+)\[([\d,]*)\]', shapes)
    size = sum(BYTES.get(t, 4) * math.prod(int(n) for n in s.split(',') if n) for t, s in arrays)
    if kind == 'reduce-scatter':
      size *= group
    elif kind == 'all-reduce' and inside.startswith('%all-reduce-scatter'):
      kind = 'reduce-scatter'  # the TPU's compiler writes it as an all-reduce
    elif kind == 'all-gather' and started:
      size = size * group // (group + 1)  # the result of a start includes its input
    # A collective that overlaps with other work appears several times with the same channel id.
    # Collectives that the compiler combined all have channel id 1.
    known = number and number[1] != '1'
    operations[number[1] if known else f'unknown {len(operations)}'] = kind, group, size
  counts, sizes = Counter(), Counter()
  for kind, group, size in operations.values():
    counts[kind, group] += 1
    sizes[kind, group] += size
  return [
    {'kind': kind, 'group': group, 'count': counts[kind, group], 'bytes': sizes[kind, group]}
    for kind, group in sorted(counts)
  ]


def row(variant: str, pod: str, sizes: tuple[int, int, int], remat: str) -> dict:
  """Returns the memory, FLOPs and collectives of a step on each chip."""
  began = time.perf_counter()
  compiled = compile_step(variant, pod, sizes, remat)
  memory = compiled.memory_analysis()
  return {
    'model': variant,
    'pod': pod,
    'mesh': dict(zip(devices_lib.AXES, sizes)),
    'remat': remat,
    'batch_size': BATCH,
    'arguments_bytes': memory.argument_size_in_bytes,
    'temporary_bytes': memory.temp_size_in_bytes,
    'peak_bytes': memory.argument_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes,
    'flops': compiled.cost_analysis()['flops'],
    'collectives': collectives(compiled.as_text()),
    'compile_seconds': round(time.perf_counter() - began, 1),
    'jax': jax.__version__,
    'libtpu': importlib.metadata.version('libtpu'),
    'date': datetime.date.today().isoformat(),
  }


def parse(argv: list[str]) -> argparse.Namespace:
  parser = arguments.Parser(__spec__, __doc__)
  parser.add_argument('model', nargs='?', help='model, such as g/14 (default: all)')
  parser.add_argument('pod', nargs='?', help='pod, such as v5e:16x16 (default: all)')
  args = parser.parse_args(argv)
  args.only = tuple(text for text in (args.model, args.pod) if text)
  rows = dict.fromkeys(row[:2] for row in PODS)
  if not any(row[: len(args.only)] == args.only for row in rows):
    names = ', '.join(' '.join(row) for row in rows)
    parser.error(f'no row for {" ".join(args.only)}; expected one of {names}')
  return args


def main(argv: list[str]) -> None:
  only = parse(argv).only
  rows = (writer.read_json(PATH) or {'rows': []})['rows']
  key = lambda r: (r['model'], r['pod'], tuple(r['mesh'].values()), r['remat'])
  done = {key(r): r for r in rows}
  for pod in PODS:
    wanted = pod[: len(only)] == only
    if not wanted or pod in done:
      continue
    done[pod] = row(*pod)
    writer.write_json(PATH, {'rows': [done[p] for p in PODS if p in done]})
    print(pod, {name: done[pod][name] for name in ('peak_bytes', 'flops', 'collectives')})


if __name__ == '__main__':
  main(sys.argv[1:])
