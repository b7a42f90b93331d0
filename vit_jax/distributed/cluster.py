"""Several processes as one: what the first tells the others, and when all stop.

Decisions:
  * Only the first reads and writes the workdir, and tells the others what it found. So no file
    system need be shared, and what a pod writes are the files that a laptop writes.
"""

from collections.abc import Callable
import itertools
import json
import os
import signal
import threading

import jax
from jax.experimental import multihost_utils
import numpy as np

TRY_AGAIN = 75  # exit code: EX_TEMPFAIL of sysexits.h
ARRAY = '__array__'  # key of what stands for an array in JSON
ASKED = itertools.count(2**30)  # of the preemption service, by this process


class Preempted(Exception):
  """Training was asked to stop, and has saved what it had done."""


def asked_to_stop() -> bool:
  """Whether all processes are to stop now; each asks equally often.

  JAX has them stop at the call after the latest that any had made when the notice came, and tells
  calls by their numbers. They are not steps, with which a run may begin anywhere, and are larger
  than any, because orbax asks too, with its own.
  """
  return multihost_utils.reached_preemption_sync_point(next(ASKED))


def num_cores() -> int:
  """Cores that this process may run on."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def is_first() -> bool:
  """Whether this process is the one that reads, writes and reports."""
  return not jax.distributed.is_initialized() or jax.process_index() == 0


def from_first(function: Callable[[], object]) -> object:
  """What `function()` gives, or raises, in the first process: in all of them.

  Args:
    function: gives what JSON can hold, and NumPy arrays anywhere in it. In several processes
      tuples come back as lists.

  Raises:
    ValueError: which the function raised, or in the place of its OSError; in the other processes
      also in the place of any other error.
  """
  # Asking for the process count alone would start JAX, before `devices.start_up` may have run.
  if not jax.distributed.is_initialized() or jax.process_count() == 1:
    return function()
  arrays, text, failure = [], None, None
  if is_first():

    def marked(array):
      arrays.append(np.asarray(array))
      return {ARRAY: [list(arrays[-1].shape), str(arrays[-1].dtype)]}

    try:
      text = json.dumps({'value': function()}, default=marked)
    except (ValueError, OSError) as error:
      text = json.dumps({'error': str(error)})
    except Exception as error:  # the others wait for what it is
      text = json.dumps({'error': f'Process 0 failed: {type(error).__name__}: {error}'})
      failure = error
  text = broadcast(text and text.encode())
  waiting = iter(arrays)

  def filled(found):
    if ARRAY not in found:
      return found
    shape, dtype = found[ARRAY]
    array = next(waiting, None)
    flat = broadcast(None if array is None else np.ascontiguousarray(array).tobytes())
    return np.frombuffer(flat, jax.numpy.dtype(dtype)).reshape(shape)

  if failure:
    raise failure
  told = json.loads(text, object_hook=filled)
  if 'error' in told:
    raise ValueError(told['error'])
  return told['value']


def check_same(what: str, value: dict) -> None:
  """Raises ValueError, in every process, where one has another value than the first.

  Args:
    what: the values are, in a word.
    value: of this process: what JSON can hold.
  """
  first, *others = from_all(value)
  text = lambda found, key: json.dumps(found.get(key))  # in which NaN is NaN
  for i, other in enumerate(others, start=1):
    keys = [key for key in {**first, **other} if text(first, key) != text(other, key)]
    if keys:
      differences = '; '.join(f'{k}={other.get(k)!r} instead of {first.get(k)!r}' for k in keys)
      raise ValueError(
        f'The {what} of process {i} differs from that of process 0: {differences}. Start all '
        f'processes with the same {what}.'
      )


def from_all(value: object) -> list:
  """What JSON can hold, of each process, in every process."""
  data = json.dumps(value).encode()
  if not jax.distributed.is_initialized() or jax.process_count() == 1:
    return [json.loads(data)]
  size = multihost_utils.process_allgather(np.uint32(len(data))).max()
  rows = multihost_utils.process_allgather(np.frombuffer(data.ljust(int(size)), np.uint8))
  return [json.loads(row.tobytes()) for row in rows]


def broadcast(data: bytes | None) -> bytes:
  """The first process's bytes, in all; the others give None."""
  size = multihost_utils.broadcast_one_to_all(np.uint32(len(data or b'')))
  # As bytes, because the sum that this is made of would turn -0.0 into 0.0.
  flat = np.frombuffer(data, np.uint8) if is_first() else np.zeros(size, np.uint8)
  return np.asarray(multihost_utils.broadcast_one_to_all(flat)).tobytes()


def to_host(tree):
  """The arrays of a tree as NumPy, whole, in every process."""

  def whole(x):
    if x.is_fully_addressable or x.is_fully_replicated:
      return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(whole, tree)


class Preemption:
  """Listens for the notice that this job must end soon: SIGTERM. A context manager.

  In several processes JAX's preemption service listens, and lets all of them stop at the same
  step, whichever was told.
  """

  def __enter__(self):
    self._noticed, self._before = False, None
    alone = not jax.distributed.is_initialized()
    if alone and threading.current_thread() is threading.main_thread():
      self._before = signal.signal(signal.SIGTERM, self._notice)
    return self

  def __exit__(self, *_):
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def _notice(self, *_) -> None:
    self._noticed = True

  def is_due(self) -> bool:
    """Whether to save and stop after this step; to be asked after each one."""
    if jax.distributed.is_initialized():
      return asked_to_stop()
    return self._noticed
