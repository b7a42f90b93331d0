"""Compiles the train step for TPU pods, on any x86 machine, and writes what it takes there.

    python3.12 -m venv pods && pods/bin/pip install -r requirements.txt 'libtpu==0.0.50.*'
    JAX_PLATFORMS=cpu pods/bin/python -m benchmarks.pods     # rows of PODS that are not there yet
    JAX_PLATFORMS=cpu pods/bin/python -m benchmarks.pods g/14 v5e:16x16     # these

The TPU's own compiler gives memory and FLOPs of a chip, and the program with its collectives:
`results/pods.json`. libtpu is kept out of the ordinary environment: with it JAX looks for a TPU.
Takes minutes a row.
"""

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

from benchmarks import collect
from vit_jax import backend, experiment, sharding, state, trainer, writer
from vit_jax import config as config_lib

BATCH, CLASSES, SIZE, EXAMPLES = 4096, 1000, 224, 1_281_167  # ImageNet, in the paper's batches
PATH = collect.RESULTS / 'pods.json'

# Model, pod, chips along data, fsdp and tensor, and what is computed again.
PODS = [
  ('B/16', 'v5e:16x16', (256, 1, 1), 'none'),
  ('B/16', 'v5e:16x16', (1, 256, 1), 'none'),
  ('B/16', 'v5e:16x16', (64, 1, 4), 'none'),
  ('L/16', 'v5e:16x16', (1, 256, 1), 'none'),
  ('g/14', 'v5e:16x16', (1, 256, 1), 'none'),
  ('g/14', 'v5e:16x16', (1, 64, 4), 'none'),
  ('g/14', 'v6e:16x16', (1, 256, 1), 'none'),
  ('g/14', 'v5p:8x8x8', (8, 64, 1), 'none'),
]
COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 'f32': 4, 's32': 4, 'u32': 4}


def settings(variant: str, sizes: tuple[int, int, int], remat: str):
  """The config of such a run: bfloat16, AdamW."""
  config = config_lib.default_config()
  config.model.variant, config.model.dtype, config.model.remat = variant, 'bfloat16', remat
  config.data.image_size, config.batch_size = (SIZE, SIZE), BATCH
  config.mesh.data, config.mesh.fsdp, config.mesh.tensor = sizes
  return config


def compile_step(variant: str, pod: str, sizes: tuple[int, int, int], remat: str):
  """The very step that `main.py` takes, compiled for a pod that is not there."""
  config = settings(variant, sizes, remat)
  topology = topologies.get_topology_desc(platform='tpu', topology_name=pod)
  devices = np.array(topology.devices[: math.prod(sizes)]).reshape(sizes)
  mesh = Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
  classes = tuple(f'class {i}' for i in range(CLASSES))
  exp = experiment.assemble(config, experiment.Task(classes, (SIZE, SIZE), 3, EXAMPLES))
  training = experiment.Training(
    None, None, None, params=None, **experiment.recipe(config, EXAMPLES)
  )
  begin = lambda: state.init_state(
    exp.model, training.optimizer, exp.image_shape, 0, False, sharding.make_mesh()
  )

  def abstract(shape, dtype, where):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

  shapes = jax.eval_shape(begin)
  now = jax.tree.map(
    lambda x, where: abstract(x.shape, x.dtype, where), shapes, sharding.layout(mesh, shapes)
  )
  over_batch = sharding.over_batch(mesh)
  batch = {
    'image': abstract((BATCH, SIZE, SIZE, 3), 'uint8', over_batch),
    'label': abstract((BATCH,), 'int32', over_batch),
  }
  with backend.portable():  # the kernels that a TPU gets
    return trainer.make_train_step(exp, training, mesh).lower(now, batch).compile()


def collectives(text: str) -> dict[str, dict[str, int]]:
  """How often a step talks, by kind, and how many bytes a chip has of it afterwards."""
  found, sizes = Counter(), Counter()
  for line in text.splitlines():
    match = re.search(r'= (.+?) (' + '|'.join(COLLECTIVES) + r')(-start)?\(', line)
    if not match:
      continue
    shapes, kind, started = match.groups()
    arrays = re.findall(r'(\w+)\[([\d,]*)\]', shapes)
    size = [BYTES.get(t, 4) * math.prod(int(n) for n in s.split(',') if n) for t, s in arrays]
    found[kind] += 1
    sizes[kind] += max(size) if started else sum(size)
  return {kind: {'count': found[kind], 'bytes': sizes[kind]} for kind in found}


def row(variant: str, pod: str, sizes: tuple[int, int, int], remat: str) -> dict:
  """What a step takes on each chip."""
  began = time.perf_counter()
  compiled = compile_step(variant, pod, sizes, remat)
  memory = compiled.memory_analysis()
  return {
    'model': variant,
    'pod': pod,
    'mesh': dict(zip(sharding.AXES, sizes)),
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


def main(*only: str) -> None:
  rows = (writer.read_json(PATH) or {'rows': []})['rows']
  key = lambda r: (r['model'], r['pod'], tuple(r['mesh'].values()), r['remat'])
  done = {key(r): r for r in rows}
  for pod in PODS:
    wanted = not only or pod[: len(only)] == only
    if not wanted or pod in done:
      continue
    done[pod] = row(*pod)
    writer.write_json(PATH, {'rows': [done[p] for p in PODS if p in done]})
    print(pod, {name: done[pod][name] for name in ('peak_bytes', 'flops', 'collectives')})


if __name__ == '__main__':
  main(*sys.argv[1:])
