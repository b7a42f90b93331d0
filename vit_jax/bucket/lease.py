"""Provides locks in a bucket: objects that only one process can create, and that expire.

Decisions:
  * An object store does not notice when the owner of a lock dies, so it cannot release the lock.
    The owner therefore writes the lock object again every `HEARTBEAT` seconds. If the object has
    not changed for `EXPIRES` seconds, the owner counts as dead, and another process can take the
    lock over.
  * A waiting process only checks whether the generation (version number) of the object changes, and
    measures time with its own clock. So the clocks of different hosts need not agree.
  * Every write names the generation that it replaces. The bucket refuses the write if the object
    has a different generation. So only one of several processes can take over an expired lock. A
    suspended process that has lost its lock notices this at its next write.
  * A waiting process on the host of the owner checks whether the owner is still running. If not, it
    takes the lock over at once.
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
    host: host on which the process runs, as `this_host` returns it.
    pid: process ID.
    started: start time of the process, as the function `started` returns it.
    nonce: random text that no other `Owner` has.
  """

  host: str
  pid: int
  started: str
  nonce: str

  @classmethod
  def this(cls) -> 'Owner':
    """Returns an `Owner` that stands for the current process, with a new nonce."""
    return cls(this_host(), os.getpid(), started(os.getpid()), uuid.uuid4().hex)

  @classmethod
  def read(cls, content: bytes) -> 'Owner':
    """Parses the content of a lock object; damaged content gives the host `unknown`."""
    try:
      return cls(**{key: json.loads(content)[key] for key in ('host', 'pid', 'started', 'nonce')})
    except (ValueError, TypeError, KeyError):
      return cls('unknown', 0, '', '')

  def is_dead(self) -> bool:
    """Returns whether the process is known to have ended; False if it is on another host."""
    return self.host == this_host() and started(self.pid) != self.started

  def is_alive(self) -> bool:
    """Returns whether the process is known to be running; False if it is on another host."""
    return self.host == this_host() and started(self.pid) == self.started


def this_host() -> str:
  """Returns a text that identifies the system in which a process ID is unique.

  The text joins the host name, the boot ID of the kernel and the PID namespace. Two processes with
  the same text can identify each other by their process IDs. On systems without `/proc`, the text
  is only the host name.
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

  The text is empty if the process does not exist or is a zombie. It is `running` if the process
  exists, but the system has no `/proc`.
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
  """Returns the time of a monotonic clock in seconds, including suspended time if possible."""
  clock = getattr(time, 'CLOCK_BOOTTIME', time.CLOCK_MONOTONIC)
  return time.clock_gettime(clock)


class Lease:
  """Context manager that holds the lock of a folder in a bucket."""

  def __init__(self, folder: pathlib.Path):
    """Prepares the lock of `folder`, without accessing the bucket.

    Entering the context acquires the lock. If the last owner ended without removing its lock, the
    new owner may have to wait about a minute (`EXPIRES`).
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
        f'did not renew it for {EXPIRES:.0f} seconds. This run stops and writes nothing more.'
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
    """Writes the lock object if its generation is `generation` (0: if it does not exist).

    Returns whether this process owns the lock now.
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
