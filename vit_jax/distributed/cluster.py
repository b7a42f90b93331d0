"""Makes several processes act as one: they share values and stop at the same step.

Decisions:
  * Only process 0 reads and writes the small files of the workdir, such as logs. It sends their
    contents to the other processes, so no shared file system is needed. With a shared file system,
    every process reads and writes its own part of the arrays in checkpoints. Without one, only
    process 0 reads and writes these arrays.
"""

from collections.abc import Callable
import itertools
import json
import os
import pathlib
import signal
import struct
import threading
import uuid

import jax
from jax.experimental import multihost_utils
import numpy as np

from vit_jax.storage import TRY_AGAIN, exit_code, told

ARRAY = '__array__'  # key of the JSON object that stands for an array in a message
ASKED = itertools.count(1)  # numbers the calls of `asked_to_stop` in this process
PIECE = 2**30  # maximum bytes of one message, so that sizes and offsets fit into 32 bits
MISTAKES = (ValueError, OSError, FloatingPointError, MemoryError)  # only the user can fix these


class Preempted(Exception):
  """Raised if a stop signal ended a command early. Before this, training saves its progress."""


def asked_to_stop() -> bool:
  """Returns whether all processes must stop now, because one of them got a stop signal.

  Each process numbers its calls and JAX compares the numbers, so every process must call this
  function equally often. After a stop signal, all processes stop at the same call: the first one
  that no process has made yet. Other code must not call JAX's preemption service, so
  `manager.Manager` keeps orbax from calling the service.
  """
  return multihost_utils.reached_preemption_sync_point(next(ASKED))


def num_cores() -> int:
  """Returns the number of CPU cores on which the system lets this process run."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def is_first() -> bool:
  """Returns whether this is process 0, which writes all shared files except checkpoints."""
  return not jax.distributed.is_initialized() or jax.process_index() == 0


def code_after(error: BaseException) -> int:
  """Returns the exit code after an error in one of several processes.

  Code 2 means a user error, so the launch scripts end the job. After any other code, the scripts
  start all processes again. `TRY_AGAIN` means that a bucket did not answer. Code 1 means that
  another process was lost, that the processes could not connect, or that the program has a bug.
  """
  code = exit_code(error)
  mistake = isinstance(error, MISTAKES) and not is_from_runtime(error)
  return code if mistake or code == TRY_AGAIN else 1


def is_from_runtime(error: BaseException | None) -> bool:
  """Returns whether `error` can be a consequence of the end of another process.

  The result is False for a MemoryError, even if a `JaxRuntimeError` caused it.
  """
  while error is not None and not isinstance(error, MemoryError):
    # Gloo sends data between CPUs. A process that waits too long for another one raises
    # TimeoutError.
    if isinstance(error, jax.errors.JaxRuntimeError | TimeoutError) or 'Gloo' in str(error):
      return True
    error = error.__cause__
  return False


def from_first(function: Callable[[], object]) -> object:
  """Calls `function` in process 0, and returns its result or raises its error in all processes.

  Args:
    function: returns a value that consists of JSON types and NumPy arrays. With several processes,
      tuples in this value become lists.

  Raises:
    ValueError: the function raised a ValueError. With several processes, an OSError also becomes a
      ValueError. Process 0 raises any other error unchanged; the other processes then raise a
      ValueError.
  """
  # `process_count` is called last: it starts JAX, but `devices.start_up` may have to come first.
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
      text = json.dumps({'error': str(error), 'code': code_after(error)})
    except Exception as error:  # the other processes wait for the result
      said = f'Process 0 failed: {type(error).__name__}: {error}'
      text = json.dumps({'error': said, 'code': code_after(error)})
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
  answer = json.loads(text, object_hook=filled)
  if 'error' in answer:
    raise told(answer['error'], answer['code'])
  return answer['value']


def check_same(what: str, value: dict) -> None:
  """Raises ValueError in all processes if any process has a different value than process 0.

  Args:
    what: name of the value, for the message.
    value: the value of this process; must be serializable as JSON.
  """
  first, *others = from_all(value)
  text = lambda found, key: json.dumps(found.get(key))  # as text, NaN equals NaN
  for i, other in enumerate(others, start=1):
    keys = [key for key in {**first, **other} if text(first, key) != text(other, key)]
    if keys:
      differences = '; '.join(f'{k}={other.get(k)!r} instead of {first.get(k)!r}' for k in keys)
      raise ValueError(
        f'The {what} of process {i} differs from process 0: {differences}. Start all '
        f'processes with the same {what}.'
      )


def together(function: Callable[[], object]) -> object:
  """Calls `function`, and raises an error in every process if the function failed in one of them.

  All processes must call `together`. Each process gets the result of its own call.

  Raises:
    ValueError: the function raised a ValueError or OSError in another process. A process in which
      the function failed raises its own error.
  """
  found, failure = None, None
  try:
    found = function()
  except (ValueError, OSError) as error:
    failure = error
  failures = from_all(None if failure is None else [str(failure), code_after(failure)])
  if failure is not None:
    raise failure
  for i, failed in enumerate(failures):
    if failed is not None:
      text, code = failed
      raise told(f'Process {i} failed: {text}', code)
  return found


def is_shared(folder: pathlib.Path) -> bool:
  """Returns whether all processes see the same files in a folder.

  This is tested with a temporary file, so process 0 must be able to write to the folder.
  """
  if not jax.distributed.is_initialized() or jax.process_count() == 1:
    return True

  def write():
    nonce = uuid.uuid4().hex
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f'.{nonce}').write_bytes(nonce.encode())
    return nonce

  nonce = from_first(write)
  probe = folder / f'.{nonce}'
  try:
    seen = probe.read_bytes() == nonce.encode()
  except OSError:
    seen = False
  everywhere = all(from_all(seen))
  if is_first():
    probe.unlink()
  return everywhere


def from_all(value: object) -> list:
  """Returns a list with the `value` of each process, in the order of the processes.

  Each value must be serializable as JSON.
  """
  data = json.dumps(value).encode()
  if not jax.distributed.is_initialized() or jax.process_count() == 1:
    return [json.loads(data)]
  size = multihost_utils.process_allgather(np.uint32(len(data))).max()
  rows = multihost_utils.process_allgather(np.frombuffer(data.ljust(int(size)), np.uint8))
  return [json.loads(row.tobytes()) for row in rows]


def broadcast(data: bytes | None) -> bytes:
  """Returns, in every process, the `data` of process 0; the other processes pass None."""
  (size,) = struct.unpack('<Q', broadcast_piece(struct.pack('<Q', len(data or b'')), 8))
  starts = range(0, size, PIECE)
  pieces = [broadcast_piece(data and data[i : i + PIECE], min(PIECE, size - i)) for i in starts]
  return b''.join(pieces)


def broadcast_piece(data: bytes | None, size: int) -> bytes:
  """Returns, in every process, the `size` bytes that process 0 passes as `data`.

  Unlike in `broadcast`, every process must already know the size, which is at most `PIECE`.
  """
  # Sent as bytes, because the broadcast is a sum, which would turn -0.0 into 0.0.
  flat = np.frombuffer(data, np.uint8) if is_first() else np.zeros(size, np.uint8)
  return np.asarray(multihost_utils.broadcast_one_to_all(flat)).tobytes()


def to_host(tree):
  """Converts a tree of global JAX arrays to NumPy arrays, which are complete in every process."""

  def whole(x):
    if x.is_fully_addressable or x.is_fully_replicated:
      return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(whole, tree)


class Preemption:
  """Context manager that listens for SIGTERM, the notice that this job must end soon.

  With several processes, JAX's preemption service listens for the signal. The service makes all
  processes stop at the same step, even if only one process got the signal.

  If contexts are nested, a signal counts for all of them. For example, a sweep trains several runs
  in one outer context. If the signal comes in the last step of a run, this run ends as usual, but
  the sweep stops.
  """

  _depth, _noticed = 0, False  # shared by all contexts

  def __enter__(self):
    if not Preemption._depth:
      Preemption._noticed = False
    Preemption._depth += 1
    self._before = None
    alone = not jax.distributed.is_initialized()
    if alone and threading.current_thread() is threading.main_thread():
      self._before = signal.signal(signal.SIGTERM, self._notice)
    return self

  def __exit__(self, *_):
    Preemption._depth -= 1
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def _notice(self, *_) -> None:
    Preemption._noticed = True

  def is_due(self) -> bool:
    """Returns whether to save and stop after this step; call this method after every step."""
    if jax.distributed.is_initialized() and asked_to_stop():  # True only once per signal
      Preemption._noticed = True
    return Preemption._noticed
