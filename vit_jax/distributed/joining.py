"""How several processes become one program, and how each leaves it.

Decisions:
  * All processes run the same program, and find each other through JAX's own distributed runtime.
  * A process that fails leaves without waiting for the others. JAX's coordination service ends
    those within `LOST` seconds, and names it.
  * Process 0 holds that service, and JAX aborts the others at once where it ends. So it leaves last
    where all fail alike.
"""

from collections.abc import Iterator
import contextlib
import importlib.util
import os
import re
import socket
import sys
import threading
import time
import traceback
import warnings

import jax

from vit_jax.distributed import cluster

SOON = 5.0  # seconds until a process says that it waits for the others
JOIN = 300  # seconds that a process waits for the others to start
PARTING = 2.0  # seconds that process 0 stays longer, if all processes fail alike
LOST = 30  # seconds without a sign of life after which a process counts as dead
MAX_PORT = 65535
AGAIN = 'start all again with the same commands, and the run resumes from its last checkpoint.'
ALONE = 'To run in this process alone, give --num_processes=1.'
# What Slurm, Open MPI, an indexed job of Kubernetes or a person sets in each process; a TPU has
# libtpu. Kubernetes sets KUBERNETES_SERVICE_HOST in lone pods, too.
LAUNCHERS = (
  'SLURM_STEP_NODELIST', 'OMPI_COMM_WORLD_SIZE', 'JOB_COMPLETION_INDEX',
  'JAX_COORDINATOR_ADDRESS',
)  # fmt: skip


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
  if some:
    check_arguments(*given)
  if num_processes == 1 or not (some or in_cluster()):
    return
  try:
    with (
      warnings.catch_warnings(action='ignore'),  # of clusters that it can't look into
      waiting(f'{num_processes} processes at {coordinator}' if some else 'all processes'),
    ):
      jax.distributed.initialize(
        *given, initialization_timeout=JOIN + LOST, heartbeat_timeout_seconds=LOST
      )
  except ValueError as error:
    if some:
      raise ValueError(f'--coordinator={coordinator}: {error}') from error
    return  # no cluster that JAX knows
  except Exception as error:  # the runtime's, and those of each kind of cluster
    raise ValueError(f'The processes did not come together: {error}. {ALONE}') from error
  # Said now: where one dies, the others hang in an exchange until JAX's own thread aborts them.
  say(f'One of several processes. If JAX aborts it because another one died, {AGAIN}')
  cluster.asked_to_stop()  # so that a notice before the first step is for a later call


def check_arguments(
  coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
  """Raises ValueError for arguments of `join` that do not go together, or can't be used here."""
  alone = num_processes == 1 and process_id in (None, 0)
  whole = None not in (coordinator, num_processes, process_id)
  if not alone and not (whole and 0 <= process_id < num_processes):
    raise ValueError(
      '--coordinator=<host>:<port>, --num_processes=<n> and --process_id=<0 to n-1> go together, '
      f'got {coordinator}, {num_processes}, {process_id}.'
    )
  if coordinator is None:
    return
  found = re.fullmatch(r'.+:(\d+)', coordinator)
  if not found or not 1 <= int(found[1]) <= MAX_PORT:
    raise ValueError(
      f'--coordinator={coordinator}: expected <host>:<port>, as in 10.0.0.1:8476, with a '
      f'port from 1 to {MAX_PORT}.'
    )
  if not alone and process_id == 0 and (reason := why_not_free(int(found[1]))):
    raise ValueError(
      f'--coordinator={coordinator}: process 0 can not listen on port {found[1]} of this machine '
      f'({reason}). Give all processes another port.'
    )


def why_not_free(port: int) -> str | None:
  """Why this machine can't listen on a port; None where it can."""
  both = socket.has_dualstack_ipv6()  # JAX listens on all addresses of both kinds
  with socket.socket(socket.AF_INET6 if both else socket.AF_INET) as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # left over from a run before
    if both:
      probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    try:
      probe.bind(('', port))
    except OSError as error:
      return error.strerror
  return None


def say(text: str) -> None:
  """Prints a line of this process, the first or not."""
  print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
  """Says soon what is waited for, and ends this process after `JOIN`: JAX would abort it."""

  def give_up():
    say(f'error: {what} did not come together in {JOIN} s. Start all within that time. {ALONE}')
    os._exit(2)

  timers = [
    threading.Timer(SOON, say, (f'Waiting for {what} ({JOIN} s at most) ...',)),
    threading.Timer(JOIN, give_up),
  ]
  for timer in timers:
    timer.daemon = True
    timer.start()
  try:
    yield
  finally:
    for timer in timers:
      timer.cancel()


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
  runtime = isinstance(error, jax.errors.JaxRuntimeError)
  if runtime or 'Gloo' in str(error):  # which sends between CPUs
    names = ', which JAX names within a minute' if runtime else ''
    say(f'Perhaps another process died{names}: {AGAIN}')
  if runtime:
    time.sleep(LOST + 5)  # JAX ends this process then
  sys.stdout.flush()
  sys.stderr.flush()
  if cluster.is_first():
    time.sleep(PARTING)
  os._exit(130 if isinstance(error, KeyboardInterrupt) else 2)
