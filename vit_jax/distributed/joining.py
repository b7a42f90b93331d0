"""Joins several processes into one program, and ends them when one fails.

Decisions:
  * All processes run the same program, and find each other through JAX's own distributed runtime.
  * A process that fails exits without waiting for the other processes. JAX's coordination service
    ends the other processes within `LOST` seconds, and names the failed process.
  * Process 0 runs the coordination service, and JAX aborts the other processes as soon as process 0
    exits. After an error, process 0 therefore waits for `PARTING` seconds, so that other processes
    with the same error can exit by themselves.
  * Several processes do not use the default folder for compiled programs, because hosts rarely
    share it.
"""

from collections.abc import Iterator
import contextlib
import importlib.util
import logging
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
from vit_jax.storage import NoMistake, compiled_folder

log = logging.getLogger(__name__)

SOON = 5.0  # seconds after which a process reports that other processes are missing
JOIN = 300  # maximum seconds to wait for the other processes to start
PARTING = 2.0  # seconds that process 0 waits after an error, so that the others exit first
LOST = 30  # seconds without a heartbeat after which a process counts as dead
MAX_PORT = 65535
NO_ADDRESS = 'Retry failed'  # text of JAX's error if Kubernetes has no address for process 0
AGAIN = 'start all processes again with the same commands to resume from the last checkpoint.'
ALONE = 'To run only this process, use --num_processes=1.'
# Environment variables that Slurm, Open MPI, an indexed Kubernetes job or the user sets in each
# process. None of them is set on TPUs, so `in_cluster` looks for libtpu. The list does not contain
# KUBERNETES_SERVICE_HOST, because Kubernetes also sets it in single pods.
LAUNCHERS = (
  'SLURM_STEP_NODELIST', 'OMPI_COMM_WORLD_SIZE', 'JOB_COMPLETION_INDEX',
  'JAX_COORDINATOR_ADDRESS',
)  # fmt: skip


@contextlib.contextmanager
def joined(
  coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Iterator[None]:
  """Context manager that runs its block as one of several processes, or alone.

  `join` documents the arguments. With several processes, `leave` ends a process whose block fails.
  """
  join(coordinator, num_processes, process_id)
  try:
    yield
  except (Exception, KeyboardInterrupt) as error:
    if not jax.distributed.is_initialized():
      raise
    leave(error)


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
  """Connects this process with the other processes; does nothing if this process runs alone.

  If all arguments are None, JAX detects Slurm, Open MPI, Kubernetes and TPU pods by itself.

  Args:
    coordinator: `host:port` of process 0.
    num_processes: total number of processes. With 1, this process runs alone, even in a cluster.
    process_id: number of this process: 0, 1, ...

  Raises:
    ValueError: the arguments are inconsistent, or JAX does not detect the other processes.
    NoMistake: the processes could not connect.
  """
  given = coordinator, num_processes, process_id
  some = given != (None, None, None)
  if some:
    check_arguments(*given)
  if num_processes == 1 or not (some or in_cluster()):
    return
  try:
    with (
      warnings.catch_warnings(action='ignore'),  # about clusters that JAX cannot inspect
      waiting(f'{num_processes} processes at {coordinator}' if some else 'the other processes'),
    ):
      initialize(*given)
  except ValueError as error:
    if some:
      raise ValueError(f'--coordinator={coordinator}: {error}') from error
    check_alone()  # JAX detected no cluster
    return
  except Exception as error:  # the runtime and each kind of cluster raise their own errors
    raise NoMistake(f'The processes could not connect: {error}. {ALONE}') from error
  # Printed in advance: if another process dies, this one can hang, and then JAX aborts it.
  say(f'If JAX aborts this process because another process died, {AGAIN}')
  forget_compiled()
  # JAX stops all processes at a call that none of them has made yet. This is call 1, so a stop
  # signal that arrives before the first step stops the processes at call 2 or later.
  cluster.asked_to_stop()


def initialize(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
  """Starts JAX's distributed runtime. In Kubernetes, waits until process 0's pod has an address.

  If the pod has no address, JAX raises an error after less than a minute. The error leaves JAX's
  state unchanged, so this function starts the runtime again. `waiting` ends a process that waits
  too long.
  """
  given = coordinator, num_processes, process_id
  while True:
    try:
      return jax.distributed.initialize(
        *given, initialization_timeout=JOIN + LOST, heartbeat_timeout_seconds=LOST
      )
    except RuntimeError as error:
      if NO_ADDRESS not in str(error):
        raise


def forget_compiled() -> None:
  """Stops the use of JAX's compilation cache in its default folder.

  Only process 0 writes to the cache. If the hosts do not share the folder, a resumed run would find
  the compiled step only in process 0. On GPUs, the other processes would then wait for the results
  of autotuning from process 0, without end. A folder that the user has set stays in use.
  """
  if jax.config.jax_compilation_cache_dir == compiled_folder():
    jax.config.update('jax_compilation_cache_dir', None)


def check_alone() -> None:
  """Raises ValueError if the environment names other processes that JAX does not detect.

  Without this error, each process would train alone. In an indexed Kubernetes job, the environment
  does not contain the number of pods, so the function only logs a warning.
  """
  for name in ('OMPI_COMM_WORLD_SIZE', 'JAX_COORDINATOR_ADDRESS'):
    value = os.environ.get(name) or '1'
    if value != '1':
      raise ValueError(
        f'{name}={value} in the environment announces other processes, but JAX does not detect '
        'them. Set '
        f'--coordinator=<host>:<port>, --num_processes=<n> and --process_id=<0 to n-1>. {ALONE}'
      )
  if 'JOB_COMPLETION_INDEX' in os.environ:
    log.warning(
      'This pod trains alone, because JAX needs the package `kubernetes` to find other pods. If '
      "this job has several pods, install the package: pip install 'jax[k8s]'."
    )


def check_arguments(
  coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
  """Raises ValueError if the arguments of `join` are inconsistent, or the port cannot be used."""
  alone = num_processes == 1 and process_id in (None, 0)
  whole = None not in (coordinator, num_processes, process_id)
  if not alone and not (whole and 0 <= process_id < num_processes):
    raise ValueError(
      '--coordinator=<host>:<port>, --num_processes=<n> and --process_id=<0 to n-1> must be given '
      f'together, got {coordinator}, {num_processes}, {process_id}.'
    )
  if coordinator is None:
    return
  found = re.fullmatch(r'.+:(\d+)', coordinator)
  if not found or not 1 <= int(found[1]) <= MAX_PORT:
    raise ValueError(
      f'--coordinator={coordinator}: expected <host>:<port>, e.g. 10.0.0.1:8476, with a '
      f'port from 1 to {MAX_PORT}.'
    )
  if not alone and process_id == 0 and (reason := why_not_free(int(found[1]))):
    raise ValueError(
      f'--coordinator={coordinator}: process 0 cannot listen on port {found[1]} of this machine '
      f'({reason}). Set a different port in the commands of all processes.'
    )


def why_not_free(port: int) -> str | None:
  """Returns the reason why this machine cannot listen on a port; None if it can."""
  both = socket.has_dualstack_ipv6()  # JAX listens on IPv4 and IPv6 addresses
  with socket.socket(socket.AF_INET6 if both else socket.AF_INET) as probe:
    # With this option, a port that a run has just stopped using counts as free.
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if both:
      probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    try:
      probe.bind(('', port))
    except OSError as error:
      return error.strerror
  return None


def say(text: str) -> None:
  """Prints a line to stderr, also in processes other than process 0."""
  print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
  """Context manager that limits the time in which its block waits for other processes.

  After `SOON` seconds, the context manager prints that this process waits for `what`. After `JOIN`
  seconds, it ends the process. Without the limit, JAX would also abort the process, but later.
  """

  def give_up():
    say(f'error: {what} did not connect within {JOIN} s. Start them all within this time. {ALONE}')
    os._exit(1)  # the launch scripts start all processes again

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
  """Returns whether the environment suggests that this process is one of several.

  If so, `join` lets JAX detect the other processes.
  """
  return any(name in os.environ for name in LAUNCHERS) or bool(importlib.util.find_spec('libtpu'))


def leave(error: BaseException) -> None:
  """Prints an error, and ends this process; an ordinary exit would wait for other processes."""
  name = f'process {jax.process_index()} of {jax.process_count()}'
  if isinstance(error, KeyboardInterrupt):
    print(f'{name}: interrupted.', file=sys.stderr)
  elif isinstance(error, cluster.MISTAKES):
    print(f'error: {name}: {error}', file=sys.stderr)
  else:
    traceback.print_exception(error)
    print(f'error: {name} failed.', file=sys.stderr)
  runtime = isinstance(error, jax.errors.JaxRuntimeError)
  if cluster.is_from_runtime(error):
    names = ' (JAX names it within a minute)' if runtime else ''
    say(f'Perhaps another process has died{names}. In this case, {AGAIN}')
  if runtime:
    time.sleep(LOST + 5)  # within this time JAX ends this process
  sys.stdout.flush()
  sys.stderr.flush()
  if cluster.is_first():
    time.sleep(PARTING)
  os._exit(130 if isinstance(error, KeyboardInterrupt) else cluster.code_after(error))
