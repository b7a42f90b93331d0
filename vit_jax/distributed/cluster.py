"""Several processes as one: how they join, what the first tells the others, how they part.

Decisions:
  * All processes run the same program, and find each other through JAX's own distributed runtime.
  * Only the first reads and writes the workdir, and tells the others what it found. So no file
    system need be shared, and what a pod writes are the files that a laptop writes.
  * A process that fails leaves without waiting for the others. JAX's coordination service ends
    those within `LOST` seconds, and names it.
"""

from collections.abc import Callable, Iterator
import contextlib
import importlib.util
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings

import jax
from jax.experimental import multihost_utils
import numpy as np

JOIN = 300  # seconds that a process waits for the others to start
LOST = 30  # seconds without a sign of life after which a process counts as dead
TRY_AGAIN = 75  # exit code: EX_TEMPFAIL of sysexits.h
# What Slurm, Open MPI, an indexed job of Kubernetes or a person sets in each process; a TPU has
# libtpu. Kubernetes sets KUBERNETES_SERVICE_HOST in lone pods, too.
LAUNCHERS = (
  'SLURM_STEP_NODELIST', 'OMPI_COMM_WORLD_SIZE', 'JOB_COMPLETION_INDEX',
  'JAX_COORDINATOR_ADDRESS',
)  # fmt: skip
ARRAY = '__array__'  # key of what stands for an array in JSON
ASKED = itertools.count(2**30)  # of the preemption service, by this process


class Preempted(Exception):
  """Training was asked to stop, and has saved what it had done."""


@contextlib.contextmanager
def joined(
  coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Iterator[None]:
  """This process as one of several, or alone; `join` has the arguments.

  A process that fails ends here, where others would wait for it.
  """
  join(coordinator, num_processes, process_id)
  try:
    yield
  except (Exception, KeyboardInterrupt) as error:
    if not jax.distributed.is_initialized():
      raise
    leave(error)


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
  """Makes this process one of several; does nothing where it is alone.

  Without arguments JAX looks for Slurm, Open MPI, Kubernetes and TPU pods by itself.

  Args:
    coordinator: `host:port` of the first process.
    num_processes: of the whole; 1 to be alone whatever the surroundings.
    process_id: 0, 1, ...; that of the first is 0.

  Raises:
    ValueError: arguments that don't go together, or processes that don't come together.
  """
  given = coordinator, num_processes, process_id
  some = given != (None, None, None)
  if some and num_processes != 1 and (None in given or not 0 <= process_id < num_processes):
    raise ValueError(
      '--coordinator=<host>:<port>, --num_processes=<n> and --process_id=<0 to n-1> go together, '
      f'got {coordinator}, {num_processes}, {process_id}.'
    )
  if num_processes == 1 or not (some or in_cluster()):
    return
  if coordinator and not re.fullmatch(r'.+:\d+', coordinator):
    raise ValueError(f'--coordinator={coordinator}: expected <host>:<port>, as in 10.0.0.1:8476.')
  began = time.monotonic()
  try:
    with warnings.catch_warnings(action='ignore'):  # of clusters that it can't look into
      jax.distributed.initialize(
        *given, initialization_timeout=JOIN, heartbeat_timeout_seconds=LOST
      )
  except ValueError as error:
    if some:
      raise ValueError(f'--coordinator={coordinator}: {error}') from error
    return  # no cluster that JAX knows
  except Exception as error:  # the runtime's, and those of each kind of cluster
    raise ValueError(
      f'The processes did not come together in {time.monotonic() - began:.0f} s (all must start '
      f'within {JOIN} s): {error}. To run in this process alone, give --num_processes=1.'
    ) from error
  asked_to_stop()  # so that a notice before the first step is for a call that is yet to come


def in_cluster() -> bool:
  """Whether this may be one of several processes; JAX then looks closer."""
  return any(name in os.environ for name in LAUNCHERS) or bool(importlib.util.find_spec('libtpu'))


def leave(error: BaseException) -> None:
  """Ends this process, one of several, at once: an ordinary exit would wait for the others."""
  name = f'process {jax.process_index()} of {jax.process_count()}'
  if isinstance(error, KeyboardInterrupt):
    print(f'{name}: interrupted.', file=sys.stderr)
  elif isinstance(error, ValueError | OSError | FloatingPointError | MemoryError):
    print(f'error: {name}: {error}', file=sys.stderr)
  else:
    traceback.print_exception(error)
    print(f'error: {name} failed.', file=sys.stderr)
  if isinstance(error, jax.errors.JaxRuntimeError):
    print('If another process died, JAX names it within a minute.', file=sys.stderr, flush=True)
    time.sleep(LOST + 5)  # it ends this process then
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(130 if isinstance(error, KeyboardInterrupt) else 2)


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
  """Raises ValueError where this process has another value than the first: of JSON's kinds."""
  value = json.loads(json.dumps(value))
  first = from_first(lambda: value)
  text = lambda found, key: json.dumps(found.get(key))  # in which NaN is NaN
  keys = [key for key in {**first, **value} if text(first, key) != text(value, key)]
  if keys:
    differences = '; '.join(f'{k}: {first.get(k)!r} there, {value.get(k)!r} here' for k in keys)
    raise ValueError(f'The first process has another {what}: {differences}. Start all with one.')


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
