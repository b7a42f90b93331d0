"""Calculates what training on TPU pods needs: mesh, memory, time per step, time per save, input.

    python -m benchmarks.on_paper                # 5 minutes; results/on_paper.json
    python -m benchmarks.on_paper --bucket=0.3   # GB/s that a host writes to a bucket

Nothing is trained or compiled, and no TPU is needed. `benchmarks/pods.py` has the calculation and
its assumptions. docs/benchmarks.md explains the numbers. The file has two parts:
  * `rows`: a row for each model, kind of chip and number of chips. A plan is a number of
    micro-batches with a value of `model.remat`. `fsdp` is the smallest power of two with which some
    plan fits into memory. The row has the fastest plan that fits. `own_plan` is the plan that
    `main.py` would choose.
  * `compared`: a check of the calculation on steps that the compiler for TPUs has compiled
    (`results/pods.json`). Each ratio is a calculated number divided by the compiler's number.
"""

import argparse
import dataclasses
import datetime
import math
import sys

import jax

from benchmarks import arguments, collect
from benchmarks.pods import (
  BATCH,
  CHIPS,
  HOST_LINK,
  PER_HOST,
  USED,
  choose,
  collectives,
  memory,
  mesh_of,
  save,
  sent,
  step,
  study,
)  # fmt: skip
from vit_jax.training.compiling import Plan
from vit_jax.workdir import writer

PATH = collect.RESULTS / 'on_paper.json'
MODELS = ('B/16', 'L/16', 'g/14', 'G/14')
COUNTS = (8, 64, 256, 1024)  # chips
# Mean bytes of a training image: size of ILSVRC2012_img_train.tar, divided by the number of images.
JPEG = 147_897_477_120 / 1_281_167
HEADER = (
  'model', 'chip', 'chips', 'fsdp', 'images per chip', 'plan', 'GiB per chip', 'step, ms',
  'save blocks, s', 'save takes, s', 'host, GB', 'input, MB/s',
)  # fmt: skip


def row(variant: str, name: str, count: int, bucket: float) -> dict:
  """Returns the row of a model on a number of chips."""
  model, chip = study(variant), CHIPS[name]
  mesh, plan, own = choose(model, chip, count)
  needed, seconds = memory(model, mesh, plan), step(model, chip, mesh, plan)
  images = PER_HOST * BATCH / count / seconds['overlapped']
  return {
    'model': variant,
    'parameters': sum(leaf.size for leaf in jax.tree.leaves(model.state.params)),
    'chip': name,
    'chips': count,
    'slices': math.ceil(count / chip.slice),
    'mesh': {'data': mesh.shape['data'], 'fsdp': mesh.shape['fsdp']},
    'images_per_chip': BATCH // count,
    **dataclasses.asdict(plan),
    'bytes_on_chip': {part: round(size) for part, size in needed.items()},
    'gib_on_chip': sum(needed.values()) / 2**30,
    'seconds_of_step': seconds,
    'own_plan': dataclasses.asdict(own) | {'seconds_of_step': step(model, chip, mesh, own)},
    'save': save(model, chip, mesh, bucket),
    'images_per_second_of_host': images,
    'input_bytes_per_second_of_host': images * JPEG,
  }


def compare(compiled: dict) -> dict:
  """Returns the ratios of calculated and compiled numbers for a row of `results/pods.json`."""
  model, sizes = study(compiled['model']), compiled['mesh']
  mesh, plan = mesh_of(sizes['data'], sizes['fsdp']), Plan(1, compiled['remat'])
  amount = lambda found: sum(sent(c['kind'], c['bytes'], c['group']) for c in found)
  needed = sum(memory(model, mesh, plan).values())
  return {name: compiled[name] for name in ('model', 'pod', 'mesh')} | {
    'gib_calculated': needed / 2**30,
    'gib_compiled': compiled['peak_bytes'] / 2**30,
    'memory_ratio': needed / compiled['peak_bytes'],
    'sent_ratio': amount(collectives(model, mesh, plan)) / amount(compiled['collectives']),
    'flops_ratio': BATCH // mesh.size * model.flops[plan.remat] / compiled['flops'],
  }


def table(result: dict) -> str:
  """Formats the rows as a Markdown table. `a / b` means: sharded save / gathered save."""
  lines = [HEADER, ['---'] * len(HEADER)]
  for row in result['rows']:
    saves, seconds = row['save'], row['seconds_of_step']
    both = lambda name, saves=saves: ' / '.join(
      f'{saves[way][name]:.2g}' if saves[way][name] < 10 else f'{saves[way][name]:.0f}'
      for way in ('sharded', 'gathered')
    )
    low, high = (1000 * seconds[name] for name in ('overlapped', 'one_after_the_other'))
    gathered = saves['gathered']
    lines.append([
      row['model'], row['chip'], f'{row["chips"]:,}', str(row['mesh']['fsdp']),
      str(row['images_per_chip']), f'{row["micro_batches"]} x {row["remat"]}',
      f'{row["gib_on_chip"]:.1f}', f'{low:,.0f} to {high:,.0f}',
      both('seconds_blocked'), both('seconds_written'),
      f'{gathered["host_gb"]:.0f} of {gathered["gb_of_host"]:.0f}'
      + ('' if gathered['fits_the_host'] else ': too much'),
      f'{row["input_bytes_per_second_of_host"] / 1e6:,.0f}',
    ])  # fmt: skip
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def positive(text: str) -> float:
  """Parses a number above 0.

  Raises:
    argparse.ArgumentTypeError: the text is not such a number.
  """
  try:
    value = float(text)
  except ValueError:
    value = math.nan
  if not 0 < value < math.inf:
    raise argparse.ArgumentTypeError(f'expected a number above 0, got {text!r}')
  return value


def parse(argv: list[str]) -> argparse.Namespace:
  parser = arguments.Parser(__spec__, __doc__)
  parser.add_argument(
    '--bucket', type=positive, default=1.0,
    help='GB/s that a host writes to a bucket; the default of 1 is an assumption',
  )  # fmt: skip
  return parser.parse_args(argv)


def main(argv: list[str]) -> None:
  args = parse(argv)
  rows = []
  for variant in MODELS:
    for name in CHIPS:
      rows += [row(variant, name, count, args.bucket * 1e9) for count in COUNTS]
    print(variant, flush=True)
  pods = (writer.read_json(collect.RESULTS / 'pods.json') or {'rows': []})['rows']
  result = {
    'date': datetime.date.today().isoformat(),
    'jax': jax.__version__,
    'assumed': {
      'share_of_peak': USED,
      'host_link_bytes_per_second': HOST_LINK,
      'bucket_bytes_per_second_of_host': args.bucket * 1e9,
      'bytes_of_image': round(JPEG),
      'batch_size': BATCH,
      'chips_per_host': PER_HOST,
    },
    'chips': {name: dataclasses.asdict(chip) for name, chip in CHIPS.items()},
    'rows': rows,
    'compared': [compare(found) for found in pods if found['mesh']['tensor'] == 1],
  }
  writer.write_json(PATH, result)
  print(table(result))


if __name__ == '__main__':
  main(sys.argv[1:])
