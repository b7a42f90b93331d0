"""Saves or restores a checkpoint in one of several processes; test_sharded.py starts it.

    python -m tests.workdir.sharded save <folder> <fsdp> <devices> <port> <processes> <number>

`restore` compares each number with the saved one. `full` saves, and process 1 cannot write.
`refused` saves, and process 1 fails before it starts to write. `damaged` restores a checkpoint that
must be found damaged. Each process prints one line.
"""

import errno
import os
import resource
import signal
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests.conftest import small_config
from vit_jax import bucket, experiment
from vit_jax.distributed import layout, place_params
from vit_jax.training.state import TrainState
from vit_jax.workdir import Checkpoints, TrainingFiles

LIMIT = 4096  # bytes of a file that process 1 can write, with `full`
FACTS = {'config': {'ema': 0.9}, 'task': {}, 'seconds': 1.5}


def arrays() -> TrainState:
  """Returns the state that is saved, as NumPy arrays with many different values, -0.0 and NaN."""
  draw = np.random.RandomState(0)
  many = lambda *shape: draw.randn(*shape).astype(np.float32)
  params = {'block': {'query': {'kernel': many(128, 4, 64)}}, 'head': {'bias': many(10)}}
  odd = jax.tree.map(np.negative, params) | {'odd': np.array([-0.0, np.nan, np.inf], np.float32)}
  mu = jax.tree.map(lambda x: x.astype(jax.numpy.bfloat16), params)
  return TrainState(np.int32(7), params, {'mu': mu, 'count': np.int32(7)}, odd)


def same_bits(array: jax.Array, whole: np.ndarray) -> bool:
  """Returns whether the parts that this process holds have exactly the bits of the whole array."""
  parts = ((np.asarray(shard.data), whole[shard.index]) for shard in array.addressable_shards)
  return array.dtype == whole.dtype and all(a.tobytes() == b.tobytes() for a, b in parts)


def refuse(*_, **__):
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def main(action, folder, fsdp, devices, port='', processes='1', number='0'):
  jax.config.update('jax_num_cpu_devices', int(devices))
  if int(processes) > 1:
    jax.distributed.initialize(f'127.0.0.1:{port}', int(processes), int(number))
  mesh = experiment.mesh_for(small_config(**{'mesh.fsdp': fsdp}))
  state, folder = place_params(mesh, arrays()), bucket.to_path(folder.replace('%', number))
  if action == 'full' and number == '1':
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
  if action == 'refused' and number == '1':
    ocp.CheckpointManager.save = refuse
  with Checkpoints(folder) as checkpoints:
    try:
      if action in ('save', 'full', 'refused'):
        checkpoints.save(state, FACTS | {'names': TrainingFiles().item()})
        checkpoints.wait()
        print('saved')
      else:
        found, config = checkpoints.restore(state)
        same = jax.tree.map(same_bits, found, arrays())
        lies = jax.tree.map(lambda x, wanted: x.sharding == wanted, found, layout(mesh, arrays()))
        print('same' if jax.tree.all((same, lies)) and config['seconds'] == 1.5 else 'different')
    except (ValueError, OSError) as error:
      print(f'{type(error).__name__}: {error}', flush=True)
  if action == 'refused':  # exits as `joining.leave` does, without waiting for the thread of orbax
    time.sleep(1 - int(number))  # process 0 exits last
    os._exit(0)


if __name__ == '__main__':
  main(*sys.argv[1:])
