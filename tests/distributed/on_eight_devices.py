"""Runs models on eight CPU devices and prints JSON; test_layouts.py starts it as a process."""

import json
import pathlib
import sys

import jax
import numpy as np

from tests.conftest import small_config
from vit_jax import experiment, opening
from vit_jax.data import batching
from vit_jax.distributed import sharding
from vit_jax.evaluation import exact, scoring
from vit_jax.training import state
from vit_jax.training.step import make_train_step
from vit_jax.workdir import checkpoint

MESHES = {
  'replicated': {'data': 8},
  'fsdp': {'data': 1, 'fsdp': 8},
  'fsdp_tensor': {'data': 2, 'fsdp': 2, 'tensor': 2},
}
COUNTS = (1, 2, 4, 8)
STEPS = 4


def build(mesh: dict[str, int], **overrides: str):
  """Returns (experiment, training, mesh) of a model large enough to be split."""
  sizes = {f'mesh.{axis}': str(size) for axis, size in mesh.items()}
  overrides = {
    'model.width': '64', 'model.depth': '1', 'model.num_heads': '4', 'model.mlp_dim': '256',
    'model.pool': 'map', 'batch_size': '64', 'ema': '0.9', 'model.dropout': '0.1',
  } | sizes | overrides  # fmt: skip
  exp, training = opening.from_config(small_config(**overrides))
  return exp, training, experiment.mesh_for(exp.config)


def begin(exp, training, mesh):
  """Returns the state before the first step."""
  return state.init_state(exp, training, mesh)


def run(mesh: dict[str, int], **overrides: str) -> dict:
  """Trains a few steps; returns losses, scores and the bytes that a device held."""
  exp, training, mesh = build(mesh, **overrides)
  now = begin(exp, training, mesh)
  arrays = jax.tree.leaves((now.params, now.opt_state, now.ema))
  held = sum(x.addressable_shards[0].data.nbytes for x in arrays)
  small = sum(x.nbytes for x in arrays if x.size < sharding.SPLIT_FROM)
  batches = batching.train_batches(training.train, 64, 0, 0, sharding.batch_sharding(mesh))
  step = make_train_step(exp, training, mesh)
  before, losses = [x.sharding for x in arrays], []
  for _ in range(STEPS):
    now, metrics = step(now, next(batches))
    losses.append(scoring.summarize([metrics['score']])['loss'])
  after = [x.sharding for x in jax.tree.leaves((now.params, now.opt_state, now.ema))]
  eval_step = exact.make_eval_step(exp, mesh)
  return {
    'losses': losses,
    'scores': exact.score_split(eval_step, now.ema, training.test, 100, mesh),
    'held': held,
    'all': sum(x.nbytes for x in arrays),
    'small': small,
    'stays': all(a.is_equivalent_to(b, x.ndim) for a, b, x in zip(after, before, arrays)),
  }


def restore_everywhere(folder: pathlib.Path) -> list[str]:
  """Returns the layouts that did not restore the checkpoints of others."""
  layouts = [{'data': n} for n in COUNTS] + [{'data': 1, 'fsdp': n} for n in COUNTS[1:]]
  built = [build(layout, seed=str(i)) for i, layout in enumerate(layouts)]  # other weights in each
  states, wrong = [begin(*parts) for parts in built], []
  shapes = [state.state_shapes(*parts) for parts in built]
  for i, ((exp, _, _), wrote) in enumerate(zip(built, states)):
    with checkpoint.Checkpoints(folder / str(i)) as checkpoints:
      checkpoints.save(wrote, exp.saved() | {'seconds': 0.0})
    host = jax.device_get(wrote)
    for j, like in enumerate(shapes):
      with checkpoint.Checkpoints(folder / str(i)) as checkpoints:
        now, _ = checkpoints.restore(like)
      same = jax.tree.map(np.array_equal, jax.device_get(now), host)
      lies = jax.tree.map(lambda a, b: a.sharding == b.sharding, now, states[j])
      if not jax.tree.all((same, lies)):
        wrong.append(f'{layouts[i]} on {layouts[j]}')
  return wrong


if __name__ == '__main__':
  jax.config.update('jax_num_cpu_devices', 8)  # conftest makes two
  found = {name: run(mesh) for name, mesh in MESHES.items()}
  found['parts'] = run(MESHES['fsdp_tensor'], micro_batches='4')
  found['wrong'] = restore_everywhere(pathlib.Path(sys.argv[1]))
  print(json.dumps(found))
