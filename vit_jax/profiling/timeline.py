"""Divides the time of recorded steps among the operations that ran.

Decisions:
  * At each moment, the time is divided equally among the running operations, so that the times of
    all operations add up to the total time.
  * A collective gets time only while no other operation runs, because a collective that runs during
    another operation does not make the step longer.
  * A container, such as a loop, only runs other operations. So the rules above ignore it, and it
    gets time only while no other operation runs.
  * Waiting for a batch gets time only while no operation runs.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
import dataclasses
import pathlib

from jax.profiler import ProfileData

from vit_jax.profiling.operations import COLLECTIVES, CONTAINERS, Operation

WAIT = 'wait for the next batch'  # names of annotations in the trace
STEPS = 'recorded steps'
IDLE = 'idle'


@dataclasses.dataclass(frozen=True)
class Span:
  """An event of a trace; `begin` and `end` are in nanoseconds."""

  name: str
  begin: float
  end: float


@dataclasses.dataclass(frozen=True)
class Trace:
  """Events of the recorded training steps.

  Attributes:
    operations: the operations that ran on the devices.
    waits: spans in which the host waited for a batch.
    whole: span from the beginning of the first step to the end of the last step.
  """

  operations: list[Span]
  waits: list[Span]
  whole: Span


def read_trace(file: pathlib.Path) -> Trace:
  """Returns the events in a file `*.xplane.pb` of `jax.profiler`.

  On GPUs and TPUs, only operations of the first device are returned. On a CPU, operations of all
  devices are returned, because the devices share the cores.
  """
  planes = {plane.name: plane for plane in ProfileData.from_file(str(file)).planes}
  host = list(spans(planes['/host:CPU']))
  devices = sorted(name for name in planes if name.startswith('/device:'))
  on_devices = [list(spans(planes[name])) for name in devices]
  of = lambda pairs, wanted: [span for name, span in pairs if name == wanted]
  ran = next((found for pairs in on_devices if (found := of(pairs, 'operation'))), None)
  return Trace(ran or of(host, 'operation'), of(host, WAIT), of(host, STEPS)[0])


def spans(plane) -> Iterator[tuple[str, Span]]:
  """Yields a pair (kind, span) for each event in a plane of a trace.

  The kind is `operation` for operations of a compiled program. For all other events, the kind is
  the name of the event.
  """
  for line in plane.lines:
    for event in line.events:
      operation = dict(event.stats).get('hlo_op')
      if operation is None and line.name == 'XLA Ops':  # on a TPU, the name is the whole HLO line
        operation = event.name.split(' ')[0].lstrip('%')
      kind, name = ('operation', operation) if operation else (event.name, event.name)
      yield kind, Span(name, event.start_ns, event.end_ns)


def divide(trace: Trace, known: Mapping[str, Operation]) -> Counter:
  """Returns `{name: nanoseconds}` for each operation, for `WAIT` and for `IDLE`.

  `WAIT` stands for waiting for the next batch, and `IDLE` for time in which nothing ran. The sum of
  all values is the time of all recorded steps.

  Args:
    trace: events of the recorded steps.
    known: operations of the compiled step, by name.
  """
  changes = [(trace.whole.end, False, '')]
  for span in (*trace.operations, *trace.waits):
    begin, end = max(span.begin, trace.whole.begin), min(span.end, trace.whole.end)
    if begin < end:
      changes += [(begin, True, span.name), (end, False, span.name)]
  totals, running, now = Counter(), Counter(), trace.whole.begin
  for time, begins, name in sorted(changes):
    if time > now:
      first = defaultdict(list)
      for active in running:
        first[rank(active, known)].append(active)
      names = first[min(first)] if first else [IDLE]
      for active in names:
        totals[active] += (time - now) / len(names)
      now = time
    running[name] += 1 if begins else -1
    if running[name] <= 0:
      del running[name]
  return totals


def rank(name: str, known: Mapping[str, Operation]) -> int:
  """Returns the rank of an operation or of `WAIT`, from 0 (first) to 3.

  If several operations run at the same time, the time is divided equally among those with the
  smallest rank. The others get none of it.
  """
  if name == WAIT:
    return 3
  opcode = known[name].opcode if name in known else ''
  if opcode in CONTAINERS:
    return 2
  return 1 if opcode.startswith(COLLECTIVES) else 0
