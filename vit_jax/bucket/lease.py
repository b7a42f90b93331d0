"""Provides locks in a bucket.

A lock is an object that only one process can create. It expires if its owner stops renewing it.

Decisions:
  * The owner of a lock writes the lock object again every `HEARTBEAT` seconds, because the bucket
    cannot detect that an owner has died. If the lock object has not changed for `EXPIRES` seconds,
    the lock has expired, and another process can take it over.
  * A process that waits for a lock checks whether the generation (version number) of the lock
    object changes, and measures time with its own clock. So the clocks of hosts need not agree.
  * Every write names the generation that it replaces, and the bucket refuses the write if the
    lock object has a different generation. So only one of several processes can take over an
    expired lock. A process that loses its lock while it is suspended gets an error at its next
    write.
  * If the owner runs on the host of the waiting process, the waiting process can check whether the
    owner is still running. If the owner has ended, the waiting process takes the lock over at once.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import socket
import threading
import time
import uuid

from vit_jax.bucket import client

HEARTBEAT = 20.0  # seconds between two writes of the lock object by its owner
EXPIRES = 60.0  # seconds without a write, after which another process can take the lock over
POLL = 2.0  # seconds between two checks of the lock by a waiting process
NAME = 'lock.json'

log = logging.getLogger(__name__)


class Lost(ValueError):
  """Raised if another process has taken over the lock of a workdir."""


@dataclasses.dataclass(frozen=True)
class Owner:
  """The process that owns a lock.

  Attributes:
    host: text from `this_host` that identifies the host on which the process runs.
    pid: process ID.
    started: start time of the process, in the form that the function `started` returns.
    nonce: random text that is different for each `Owner`.
  """

  host: str
  pid: int
  started: str
  nonce: str

  @classmethod
  def this(cls) -> 'Owner':
    """Returns an `Owner` that describes the current process, with a new nonce."""
    return cls(this_host(), os.getpid(), started(os.getpid()), uuid.uuid4().hex)

  @classmethod
  def read(cls, content: bytes) -> 'Owner':
    """Parses the content of a lock object; damaged content gives an owner on the host `unknown`."""
    try:
      return cls(**{key: json.loads(content)[key] for key in ('host', 'pid', 'started', 'nonce')})
    except (ValueError, TypeError, KeyError):
      return cls('unknown', 0, '', '')

  def is_dead(self) -> bool:
    """Returns True if the process was running on this host and has ended, else False."""
    return self.host == this_host() and started(self.pid) != self.started

  def is_alive(self) -> bool:
    """Returns True if the process is running on this host, else False."""
    return self.host == this_host() and started(self.pid) == self.started


def this_host() -> str:
  """Returns a text that identifies the host, its last boot and the PID namespace of this process.

  Two processes with the same text can identify each other by their process IDs. On systems without
  `/proc`, the text is only the host name.
  """
  parts = [socket.gethostname()]
  with contextlib.suppress(OSError):
    parts.append(
      pathlib.Path('/proc/sys/kernel/random/boot_id').read_text(encoding='utf-8').strip()
    )
  with contextlib.suppress(OSError):
    parts.append(os.readlink('/proc/self/ns/pid'))
  return ' '.join(parts)


def started(pid: int) -> str:
  """Returns the start time of a process as text, in clock ticks since the system booted.

  The result is empty if the process does not exist or is a zombie. On a system without `/proc`, the
  result is `running` if the process exists.
  """
  try:
    text = pathlib.Path(f'/proc/{pid}/stat').read_text(encoding='utf-8', errors='replace')
    state, *rest = text.rpartition(')')[2].split()  # the program's name can contain spaces
    return '' if state == 'Z' else rest[18]
  except OSError:
    pass
  try:  # systems without /proc
    os.kill(pid, 0)
    return 'running'
  except (ProcessLookupError, OverflowError):
    return ''
  except PermissionError:
    return 'running'


def uptime() -> float:
  """Returns the time of a monotonic clock, in seconds.

  If the system has such a clock, the clock also runs while the machine is suspended.
  """
  clock = getattr(time, 'CLOCK_BOOTTIME', time.CLOCK_MONOTONIC)
  return time.clock_gettime(clock)


class Lease:
  """Context manager that holds the lock of a folder in a bucket."""

  def __init__(self, folder: pathlib.Path):
    """Prepares the lock of `folder`, without accessing the bucket.

    The lock is acquired when the context is entered. If the last owner ended without removing the
    lock, acquiring it can take about a minute (`EXPIRES`).
    """
    self._folder, self._path, self._owner = folder, folder / NAME, Owner.this()
    self._generation, self._renewed, self._lost = 0, 0.0, False
    self._busy, self._end = threading.Lock(), threading.Event()

  def __enter__(self):
    """Acquires the lock, and starts a thread that renews it.

    Raises:
      ValueError: another process holds the lock.
    """
    self._take()
    threading.Thread(target=self._beat, daemon=True, name='heartbeat').start()
    return self

  def __exit__(self, *_):
    self._end.set()
    with self._busy, contextlib.suppress(Exception):  # on failure, the lock expires
      if not self._lost:
        client.delete_if(self._path, self._generation)

  def check(self) -> None:
    """Raises `Lost` if another process has taken over the lock.

    The owner must call this method before each write to the locked folder.
    """
    if not self._lost and uptime() > self._renewed + 2 * HEARTBEAT:
      self._renew()  # this process was suspended, or the bucket did not answer
    if self._lost:
      raise Lost(
        f'{self._folder}: another run has taken over the lock of this workdir, because this run '
        f'did not renew the lock for {EXPIRES:.0f} seconds. This run stops and writes nothing more.'
      )

  def _take(self):
    seen, end = None, 0.0
    while True:
      found = self._look()
      if found is None:
        generation = 0
      else:
        owner, generation = found
        if owner.is_alive() or (seen is not None and generation != seen):
          raise ValueError(
            f'{self._folder}: another run is writing here (process {owner.pid} on '
            f'{owner.host.split(" ")[0]}). Wait until it ends, or use a different --workdir.'
          )
        if seen is None and not owner.is_dead():
          seen, end = generation, uptime() + EXPIRES
          log.info(
            '%s is locked by process %d on %s. If that process does not renew its lock within %.0f '
            'seconds, this run takes the lock over ...',
            self._folder,
            owner.pid,
            owner.host.split(' ')[0],
            EXPIRES,
          )
        if not owner.is_dead() and uptime() < end:
          time.sleep(POLL)
          continue
      if self._write(generation):
        return
      seen = seen if seen is not None else -1  # another process wrote the lock first

  def _look(self) -> tuple[Owner, int] | None:
    """Returns the owner and the generation of the lock object; None if no lock object exists."""
    try:
      content, generation = client.get_with_generation(self._path)
    except FileNotFoundError:
      return None
    return Owner.read(content), generation

  def _write(self, generation: int) -> bool:
    """Writes the lock object if its generation is `generation`; 0 stands for no lock object.

    Returns whether this process now owns the lock.
    """
    content = json.dumps(dataclasses.asdict(self._owner) | {'time': time.time()}).encode()
    asked = uptime()
    try:
      self._generation = client.put_if(self._path, content, generation)
    except FileExistsError:
      # If the answer to a successful write is lost, gcsfs sends the write again. The bucket refuses
      # the second write, because the first one has changed the generation.
      found = self._look()
      if found is None or found[0].nonce != self._owner.nonce:
        return False
      self._generation = found[1]
    self._renewed = asked
    return True

  def _renew(self):
    with self._busy:
      if not self._end.is_set() and not self._lost:
        self._lost = not self._write(self._generation)

  def _beat(self):
    while not self._end.wait(HEARTBEAT):
      with contextlib.suppress(Exception):  # `check` tries again, and raises errors
        self._renew()
