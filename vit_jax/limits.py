"""Measures available memory and explains out-of-memory errors."""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import re

import jax

LESS = {  # {activity (the argument `what` of `memory_for`): remedy}
  'Training': (
    'Raise micro_batches or set model.remat=full, and repeat the command: the run resumes with '
    'the new values. Or start a new run with a smaller batch_size or data.image_size, or with '
    'model.dtype=bfloat16.'
  ),
  'Reading images': 'Set data.cache=stream, or use a smaller split or data.image_size.',
  'Decoding images': 'Use fewer data.threads or data.workers, or remove very large images.',
  'Evaluation': 'Set a smaller eval_batch_size.',
  'Feature extraction': 'Set a smaller eval_batch_size, or model.dtype=bfloat16.',
}
ANY = 'Set a smaller data.image_size or max_patches, or model.dtype=bfloat16.'


class OutOfMemory(MemoryError):
  """Error for exhausted memory of the host or a device; the message names keys to change."""


@contextlib.contextmanager
def memory_for(what: str) -> Iterator[None]:
  """Context manager that turns errors about a lack of memory or threads into `OutOfMemory`.

  The function also works as a decorator. In nested contexts, the innermost context sets the
  message.

  Args:
    what: name of the activity for the message. If `what` is a key of `LESS`, the message also gives
      the remedy `LESS[what]`.
  """
  try:
    yield
  except OutOfMemory:
    raise
  except (MemoryError, RuntimeError) as error:
    if str(error) == "can't start new thread":  # Python raises a RuntimeError with this text
      raise OutOfMemory(
        f'{what} cannot start more threads. Raise the limits of this process: `ulimit -u` for the '
        "user's threads, `ulimit -v` for memory."
      ) from error
    if isinstance(error, RuntimeError) and not is_full(error):
      raise
    reason = (str(error).removeprefix('RESOURCE_EXHAUSTED: ').splitlines() or [''])[0][:200]
    in_gb = lambda found: f'{int(found[1]) / 1e9:,.1f} GB'
    reason = re.sub(r'(\d{8,}) bytes', in_gb, reason).rstrip('.') or 'no details'
    raise OutOfMemory(f'{what} ran out of memory ({reason}). {LESS.get(what, ANY)}') from error


def is_full(error: RuntimeError) -> bool:
  """Returns whether JAX raised the error because device or host memory ran out."""
  return isinstance(error, jax.errors.JaxRuntimeError) and 'RESOURCE_EXHAUSTED' in str(error)


def gib(size: float) -> str:
  """Formats a number of bytes in GiB."""
  return f'{size / 2**30:.3g} GiB'


def limit(root: pathlib.Path = pathlib.Path('/')) -> int:
  """Returns the bytes of memory that this process can use.

  The result is the memory of the machine, or less if a container or a batch system sets a limit.
  Such limits are read from the cgroup of this process and from all parent cgroups.

  Args:
    root: folder that contains `proc` and `sys`.
  """
  limits = [os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')]
  groups = root / 'proc/self/cgroup'
  for line in groups.read_text(encoding='utf-8').splitlines() if groups.exists() else ():
    _, controllers, path = line.split(':', 2)
    if not controllers:
      top, name = root / 'sys/fs/cgroup', 'memory.max'
    elif 'memory' in controllers.split(','):
      top, name = root / 'sys/fs/cgroup/memory', 'memory.limit_in_bytes'
    else:
      continue
    own = top / path.lstrip('/')
    # A container may see the path of its cgroup on the host. Then only the top folder exists here.
    for folder in (own, *own.parents[: len(own.parts) - len(top.parts)]):
      file = folder / name
      text = file.read_text(encoding='utf-8').strip() if file.exists() else 'max'
      limits += [int(text)] if text != 'max' else []
  return min(limits)
