"""Reads kernels, collectives and estimated times in the text of a compiled program (HLO)."""

from collections import Counter
import math
import re

from vit_jax.profiling.operations import COLLECTIVES

BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 'f32': 4, 's32': 4, 'u32': 4}
V5E_CLOCK = 1.5e9  # cycles per second
PARTITIONING = ('Sharding', 'SPMDFullToShardShape', 'SPMDShardToFullShape')  # calls without code


def kernels(names: list[str]) -> dict[str, int]:
  """Counts the custom calls that run code."""
  return dict(sorted(Counter(name for name in names if name not in PARTITIONING).items()))


def group_size(line: str) -> int:
  """Returns how many chips take part in each group of a collective."""
  if named := re.search(r'replica_groups=mesh\[(.+?)\] \{(.*?)\}', line):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])  # a whole axis or a part of it
    return math.prod(int(part or sizes[name]) for name, part in axes)
  if counted := re.search(r'replica_groups=\[\d+,(\d+)\]', line):
    return int(counted[1])
  listed = re.search(r'replica_groups=\{\{([\d,]+)\}', line)
  return len(listed[1].split(',')) if listed else 2  # a permutation lists pairs


def collectives(text: str) -> list[dict]:
  """Returns the collectives of a step, by kind and by number of participating chips.

  Args:
    text: HLO of the compiled step.

  Returns:
    For each kind and group size, the number of operations, and the bytes of the whole arrays. For a
    reduce-scatter, these are its inputs; for an all-gather, its results.
  """
  operations, inside = {}, ''  # `inside` is the header of the computation that contains the line
  for line in text.splitlines():
    if not line.startswith(' '):
      inside = line
    match = re.search(r'= (.+?) (' + '|'.join(COLLECTIVES) + r')(-start)?\(', line)
    if not match:
      continue
    shapes, kind, started = match.groups()
    group, number = group_size(line), re.search(r'channel_id=(\d+)', line)
    arrays = re.findall(r'(\w+)\[([\d,]*)\]', shapes)
    size = sum(BYTES.get(t, 4) * math.prod(int(n) for n in s.split(',') if n) for t, s in arrays)
    if kind == 'reduce-scatter':
      size *= group
    elif kind == 'all-reduce' and inside.startswith('%all-reduce-scatter'):
      kind = 'reduce-scatter'  # the TPU's compiler writes it as an all-reduce
    elif kind == 'all-gather' and started:
      size = size * group // (group + 1)  # the result of all-gather-start includes its input
    # A collective that overlaps with other work appears several times with the same channel id.
    # Collectives that the compiler combined all have channel id 1.
    known = number and number[1] != '1'
    operations[number[1] if known else f'unknown {len(operations)}'] = kind, group, size
  counts, sizes = Counter(), Counter()
  for kind, group, size in operations.values():
    counts[kind, group] += 1
    sizes[kind, group] += size
  return [
    {'kind': kind, 'group': group, 'count': counts[kind, group], 'bytes': sizes[kind, group]}
    for kind, group in sorted(counts)
  ]


def modelled_seconds(text: str, target: str) -> float | None:
  """Returns the compiler's estimate of the time of a step on a v5e; None for other devices.

  The time is the sum of the estimated cycles of all operations, divided by the clock rate. It was
  not compared with a real TPU.
  """
  if not target.startswith('v5e:'):
    return None
  cycles = [int(n) for n in re.findall(r'"estimated_cycles":"(\d+)"', text)]
  return round(sum(cycles) / V5E_CLOCK, 5)
