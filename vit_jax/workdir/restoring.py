"""Restores the training state of a checkpoint onto devices. Writes nothing.

Decisions:
  * If all processes can access the checkpoint, each process verifies the checksums of some files.
    Each process then reads only the shards of its own devices. If some processes cannot access the
    checkpoint, process 0 reads the whole state and sends it to the other processes.
"""

import pathlib
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from vit_jax.distributed import from_all, from_first, place, together
from vit_jax.workdir import digests, items, stored


def restore_state(
  workdir: pathlib.Path, step: int, like, shared: bool | None = None
) -> tuple[object, dict]:
  """Restores the training state of a checkpoint, and its item `config` (`checkpoint.py`).

  Args:
    workdir: folder of the run.
    step: step of the checkpoint.
    like: a state of arrays, or of `jax.ShapeDtypeStruct`, with the wanted shapes, types and
      shardings. Values are not used.
    shared: whether all processes can access the workdir; None if the function should find out.

  Returns:
    The state, placed on devices like `like`, and the item `config`.

  Raises:
    Damaged: the checkpoint is damaged.
    ValueError: another process has found that the checkpoint is damaged.
  """
  checkpoint = stored.directory(workdir) / str(step)
  config = stored.restore_item(workdir, step, 'config')
  if is_visible(checkpoint) if shared is None else shared:
    share = jax.process_index(), jax.process_count()
    together(lambda: digests.compare_files(checkpoint, share=share))
    return together(lambda: read_state(checkpoint, like)), config

  def read():
    digests.compare_files(checkpoint)
    blank = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    return jax.tree.leaves(read_state(checkpoint, blank))

  leaves = from_first(read)
  return place(jax.tree.unflatten(jax.tree.structure(like), leaves), like), config


def is_visible(checkpoint: pathlib.Path) -> bool:
  """Returns whether all processes can access the same checkpoint. Writes nothing."""
  file = checkpoint / digests.FILE
  found = from_all(zlib.crc32(file.read_bytes()) if file.exists() else None)
  return found == found[:1] * len(found) and (len(found) == 1 or found[0] is not None)


def read_state(checkpoint: pathlib.Path, like):
  """Returns the state of a checkpoint without comparing checksums; `like` as in `restore_state`.

  If `like` has shardings, all processes must call this function. If `like` has NumPy arrays, only
  process 0 calls it.
  """
  found = {}
  with items.condemning(checkpoint):
    for item, part in {'params': like.params, 'state': rest(like)}.items():
      alone = {} if holds_shards(part) else {'multiprocessing_options': items.ALONE}
      with ocp.Checkpointer(ocp.StandardCheckpointHandler(**alone), **alone) as checkpointer:
        args = ocp.args.StandardRestore(described(part))
        found[item] = checkpointer.restore(checkpoint / item, args=args)
  return like.replace(params=found['params'], **found['state'])


def holds_shards(tree) -> bool:
  """Returns whether a tree has shardings; a tree without shardings has NumPy arrays."""
  return any(hasattr(x, 'sharding') for x in jax.tree.leaves(tree))


def rest(state) -> dict:
  """Returns the parts of a training state that the item `state` holds: all except `params`."""
  return {'step': state.step, 'opt_state': state.opt_state, 'ema': state.ema}


def described(tree):
  """Replaces JAX arrays by their shapes, types and shardings; NumPy arrays stay unchanged."""
  about = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  return jax.tree.map(lambda x: about(x) if hasattr(x, 'sharding') else x, tree)
