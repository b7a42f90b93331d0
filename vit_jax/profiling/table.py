"""Makes the table of `--mode=profile`: times of all kinds of operations, and longest operations."""

from collections import Counter
from collections.abc import Mapping
import dataclasses

from vit_jax.profiling.operations import CONTAINERS, KINDS, Operation, kind_of
from vit_jax.profiling.timeline import IDLE, WAIT

UNKNOWN = 'could not be attributed'
LONGEST = 10  # number of operations to list


@dataclasses.dataclass(frozen=True)
class Profile:
  """Time of a training step, divided among its operations.

  Attributes:
    step_ms: mean time of a step while the profiler records it, in milliseconds.
    unrecorded_ms: mean time of a step without the profiler, in milliseconds.
    steps: number of recorded steps.
    devices: number and platform of the devices, e.g. `2 cpu`.
    kinds: milliseconds per step for each kind of operation in `KINDS`, for waiting, for idle time
      and for time that could not be attributed. The sum of all values is about `step_ms`.
    longest: (label, kind, milliseconds per step) of the longest operations, the longest first.
  """

  step_ms: float
  unrecorded_ms: float
  steps: int
  devices: str
  kinds: dict[str, float]
  longest: list[tuple[str, str, float]]


def summarize_time(
  nanoseconds: Counter, known: Mapping[str, Operation], steps: int
) -> tuple[dict[str, float], list[tuple[str, str, float]]]:
  """Returns the fields `kinds` and `longest` of a `Profile`.

  Args:
    nanoseconds: time of each operation in all recorded steps, from `divide`.
    known: operations of the compiled step, by name.
    steps: number of recorded steps.
  """
  kinds = Counter(dict.fromkeys((*KINDS, WAIT, IDLE, UNKNOWN), 0.0))
  labels = Counter()
  for name, time in nanoseconds.items():
    kind = name if name in (WAIT, IDLE) else UNKNOWN
    if name in known and known[name].opcode not in CONTAINERS:
      kind = kind_of(known[name])
      labels[known[name].label, kind] += time / 1e6 / steps
    kinds[kind] += time / 1e6 / steps
  return dict(kinds), [(*names, time) for names, time in labels.most_common(LONGEST)]


def as_table(profile: Profile) -> str:
  """Returns a profile as text: the time of each kind of operation, then the longest operations."""
  share = lambda time: f'{time:10.3f} {time / profile.step_ms:8.1%}'
  longest = [f'{share(time)}  {label} ({kind})' for label, kind, time in profile.longest]
  return '\n'.join([
    f'A training step takes {profile.step_ms:.4g} ms while it is recorded, and '
    f'{profile.unrecorded_ms:.4g} ms otherwise.',
    f'Mean of {profile.steps} steps on {profile.devices} device(s):',
    '',
    '        ms    share  kind',
    *(f'{share(time)}  {kind}' for kind, time in profile.kinds.items()),
    f'{share(sum(profile.kinds.values()))}  sum',
    '',
    '        ms    share  longest operations',
    *longest,
  ])  # fmt: skip
