"""How much memory there is, and what to say when it runs out."""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import re

import jax

LESS = {  # what takes less memory
  'Training': (
    'Raise micro_batches or set model.remat=full, which a run may change when it resumes; or start '
    'another run with a smaller batch_size or data.image_size, or with model.dtype=bfloat16.'
  ),
  'Reading images': 'Set data.cache=stream, a smaller split, or a smaller data.image_size.',
  'Evaluation': 'Set a smaller eval_batch_size.',
  'Feature extraction': 'Set a smaller eval_batch_size, or model.dtype=bfloat16.',
}
ANY = 'Set a smaller data.image_size, or model.dtype=bfloat16.'


class OutOfMemory(MemoryError):
  """Memory of the host or of a device ran out; the message says which keys to change."""


@contextlib.contextmanager
def memory_for(what: str) -> Iterator[None]:
  """Turns every kind of error that means too little memory, or threads, into `OutOfMemory`.

  Also a decorator. Within several of these the innermost decides what is said.

  Args:
    what: is done; a key of `LESS`, or anything else.
  """
  try:
    yield
  except OutOfMemory:
    raise
  except (MemoryError, RuntimeError) as error:
    if str(error) == "can't start new thread":  # Python's, which knows no more
      raise OutOfMemory(
        f'{what} can start no more threads. Raise what limits this process: `ulimit -u` for the '
        "user's threads, `ulimit -v` for memory."
      ) from error
    if isinstance(error, RuntimeError) and not is_full(error):
      raise
    reason = (str(error).removeprefix('RESOURCE_EXHAUSTED: ').splitlines() or [''])[0][:200]
    in_gb = lambda found: f'{int(found[1]) / 1e9:,.1f} GB'
    reason = re.sub(r'(\d{8,}) bytes', in_gb, reason).rstrip('.') or 'no details'
    raise OutOfMemory(f'{what} ran out of memory ({reason}). {LESS.get(what, ANY)}') from error


def is_full(error: RuntimeError) -> bool:
  """Whether JAX raised it because the memory of a device, or of the host, ran out."""
  return isinstance(error, jax.errors.JaxRuntimeError) and 'RESOURCE_EXHAUSTED' in str(error)


def limit(root: pathlib.Path = pathlib.Path('/')) -> int:
  """Bytes of memory that this process may use: the machine's, or less where a cgroup sets a limit.

  Containers and batch systems set it, for a group of processes or for a group above that one.

  Args:
    root: of the files that tell.
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
    # Within a container the path may be the host's, of which only the top is seen.
    for folder in (own, *own.parents[: len(own.parts) - len(top.parts)]):
      file = folder / name
      text = file.read_text(encoding='utf-8').strip() if file.exists() else 'max'
      limits += [int(text)] if text != 'max' else []
  return min(limits)
