"""Prints the records of `benchmarks.gpu` as Markdown tables."""

from collections.abc import Iterable, Sequence
import pathlib

from benchmarks import speed
from vit_jax.workdir import writer

DECODING = {'ours': 'decoding in threads', 'ours_workers': 'decoding in processes'}


def tables(names: Iterable[str], results: pathlib.Path, work: pathlib.Path) -> str:
  """Returns a table of all slices (measurements of `make gpu`), and the tables of their results.

  Args:
    names: slices in order.
    results: folder of the records.
    work: folder of the workdirs. The results of unfinished training runs are read from it.
  """
  found = {name: writer.read_json(results / f'{name}.json') or {} for name in names}
  done = {name: one['result'] for name, one in found.items() if one.get('state') == 'finished'}
  lists = {kind: [one for one in done.values() if kind in one] for kind in ('works', 'kills')}
  parts = [
    states(found),
    *map(attention, [one for one in done.values() if 'dropout' in one]),
    *map(speed.table, together(lists['works'])),
    exact(lists['kills']) if lists['kills'] else '',
    accuracy(found, work),
    *map(images, [one for one in done.values() if 'training' in one]),
  ]
  return '\n\n'.join(part for part in parts if part)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
  """Returns a Markdown table."""
  lines = [head, ['---'] * len(head), *rows]
  return '\n'.join(f'| {" | ".join(map(str, cells))} |' for cells in lines)


def states(found: dict[str, dict]) -> str:
  """Returns the table of all slices."""
  return table(
    ('slice', 'state', 'seconds', 'machine or reason'),
    [
      (
        name,
        one.get('state', 'open'),
        one.get('seconds', ''),
        one.get('machine', one.get('reason', '')),
      )
      for name, one in found.items()
    ],
  )


def together(results: list[dict]) -> list[dict]:
  """Merges the results of `benchmarks.speed` that have the same peak speed.

  Peak speeds from data sheets are compared by value. All measured peak speeds count as equal,
  because they differ a little between runs. A merged result keeps the speed of its first result.
  """
  merged = {}
  for one in results:
    peak = one['peak_flops_per_second'] if 'data sheet' in one['peak_is'] else one['peak_is']
    merged.setdefault(peak, one | {'works': []})['works'].extend(one['works'])
  return list(merged.values())


def attention(result: dict) -> str:
  """Returns the table of attention kernels, with the largest error of outputs and gradients."""
  rows = []
  for row in result['rows']:
    errors = (max_error(row[kernel]['errors']) for kernel in ('fused', 'plain'))
    times = (f'{row[kernel]["milliseconds"]:.2f}' for kernel in ('fused', 'plain'))
    rows.append((row['tokens'], row['inputs'], *errors, *times))
  kernel, drops = result['kernel'], result['dropout']
  rows.append(
    (
      f'{drops["tokens"]}, dropout',
      f'kernel {drops["kernel"]}',
      '',
      f'{drops["error"]:.2g}',
      '',
      '',
    )
  )
  head = ('tokens', 'inputs', f'error {kernel}', 'error plain', f'ms {kernel}', 'ms plain')
  text = 'correct' if result['right'] else 'WRONG'
  limit = f'An error may be at most {result["tolerance"]}. With this limit, {kernel} is {text}.'
  return f'{table(head, rows)}\n\n{limit}'


def max_error(errors: dict[str, float]) -> str:
  """Returns the largest error, or NaN if one is NaN."""
  return f'{max(errors.values(), key=lambda error: (error != error, error)):.2g}'


def exact(results: list[dict]) -> str:
  """Returns the table of repeated and killed runs."""
  return table(
    ('dtype', 'attention', 'two runs are identical', 'killed runs that ended identically'),
    [
      (
        one['dtype'],
        one['attention'],
        one['same'],
        f'{one["resumed_exactly"]} of {len(one["kills"])}',
      )
      for one in results
    ],
  )


def accuracy(found: dict[str, dict], work: pathlib.Path) -> str:
  """Returns the table of training runs, with their progress if they are not finished."""
  rows = []
  for name, one in found.items():
    lines = writer.read_metrics(work / name / 'seed0')
    if not lines:
      continue
    last = {line['split']: line for line in lines}
    trained, tested = last.get('train', {}), last.get('test', {})
    rows.append((
        name, one.get('state', 'open'), f'{lines[-1]["step"]:,}',
        f'{tested["accuracy"]:.2%}' if 'accuracy' in tested else '',
        f'{trained["images_per_second"]:,.0f}' if trained else '',
        f'{trained["mfu"]:.1%}' if 'mfu' in trained else '',
        f'{trained["memory_gib"]:.1f} GiB' if 'memory_gib' in trained else '',
    ))  # fmt: skip
  head = ('run', 'state', 'steps', 'last test accuracy', 'images/s', 'MFU', 'memory')
  return table(head, rows) if rows else ''


def images(result: dict) -> str:
  """Returns the table with the rates of image decoding, and of training on these images."""
  rows = [
    (DECODING[name], f'{rate:,.0f}', f'{result["images_per_second_per_core"][name]:,.0f}', '')
    for name, rate in result['images_per_second'].items()
  ]
  training = result['training']
  rows.append(
    (
      f'training of {training["variant"]}',
      f'{training["images_per_second"]:,.0f}',
      '',
      f'{training["data_wait"]:.1%}',
    )
  )
  return table(('JPEGs', 'images/s', 'images per CPU second', 'waiting for data'), rows)
