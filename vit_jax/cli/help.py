"""Builds the pages that `--help`, `--mode=X --help`, `--help_config` and `--print_config` print."""

import argparse
from collections.abc import Iterator
import os
import sys
import textwrap

from vit_jax.cli.flags import given_config
from vit_jax.cli.modes import MODES
from vit_jax.cli.parsing import GENERAL, SWITCHES
from vit_jax.config import as_text, default_config, flatten, override_all
from vit_jax.keys import KEYS

WIDTH = 100
MANY = 1e6  # upper limits this high only catch mistakes, so `valid` does not show them

OVERRIDES = (
  '--config.<key>=<value> overrides a key of the config. For keys that are true or false,\n'
  '--config.<key> sets true and --noconfig.<key> sets false.'
)


def page_of(args: argparse.Namespace) -> str | None:
  """Returns the requested help page; None if no help was requested."""
  if args.help:
    return mode_page(args.mode) if '--mode' in args.given else overview()
  return config_page() if args.help_config else None


def program() -> str:
  """Returns the command that started this program: `vit-jax` or `python main.py`."""
  name = os.path.basename(sys.argv[0])
  return 'vit-jax' if name.startswith('vit-jax') else 'python main.py'


def columns(rows: dict[str, str]) -> str:
  """Formats {name: text} as a table with two aligned columns, and wraps long texts."""
  width = max(map(len, rows)) + 4
  lines = []
  for name, text in rows.items():
    wrapped = textwrap.wrap(text, WIDTH - width) or ['']
    lines += [f'  {name:{width - 2}}{wrapped[0]}', *(' ' * width + line for line in wrapped[1:])]
  return '\n'.join(lines)


def overview() -> str:
  """Returns the page with all modes and the flags that every mode accepts."""
  general = {f'--{flag.name}=<{flag.name}>': flag.help for flag in GENERAL}
  general |= {f'--{name}': text for name, text in SWITCHES.items()}
  return '\n\n'.join((
    f'usage: {program()} [--mode=<mode>] [flags] [--config.<key>=<value> ...]',
    'Trains, fine-tunes, evaluates, visualizes and exports Vision Transformers.',
    'modes:\n' + columns({name: mode.summary for name, mode in MODES.items()}),
    'flags of every mode:\n' + columns(general),
    OVERRIDES,
    'examples:\n' + '\n'.join(f'  {example(name)}' for name in MODES),
  ))  # fmt: skip


def example(name: str, start: str = '') -> str:
  """Returns a typical command of the mode `name`.

  The command begins with the text `start` or, if the text is empty, with the result of `program`.
  """
  mode = '' if name == 'train' else f' --mode={name}'
  return f'{start or program()}{mode} {MODES[name].example}'


def mode_page(name: str) -> str:
  """Returns the page with the flags of a mode and an example."""
  rows = {}
  for flag in MODES[name].flags:
    default = f' (default: {flag.default})' if flag.default not in ('', None) else ''
    rows[f'--{flag.name}=<{flag.name}>'] = flag.help + default
  takes_config = '--config=<config>' in rows or MODES[name].overrides
  return '\n\n'.join((
    f'usage: {program()} --mode={name} [flags]',
    f'--mode={name} {MODES[name].summary}.',
    'flags:\n' + columns(rows),
    *[OVERRIDES + ' --help_config lists all keys.'] * takes_config,
    f'example:\n  {example(name)}',
  ))  # fmt: skip


def valid(name: str) -> str:
  """Returns text that describes the valid values of a config key.

  The text is empty if every value of the key's type is valid.
  """
  from vit_jax.check import choices  # imported here, because it imports JAX

  if names := choices(name):
    return ', '.join(choice or "''" for choice in names)
  if KEYS[name].range is None:
    return ''
  low, high = KEYS[name].range
  return f'{low:.15g} to {high:.15g}' if high < MANY else f'at least {low:.15g}'


def describe_keys() -> Iterator[tuple[str, str, str, str, str]]:
  """Yields five texts for each config key: name, default, type and unit, valid values, meaning."""
  for name, key in KEYS.items():
    default = f'{key.default:g}' if key.kind is float and key.default else as_text(key.default)
    kind = f'{key.kind.__name__}, {key.unit}' if key.unit else key.kind.__name__
    yield name, default or "''", kind, valid(name), key.help


def config_page() -> str:
  """Returns the page with every config key."""
  lines = [OVERRIDES, '']
  for name, default, kind, values, text in describe_keys():
    about = f'{kind}: {values}' if values else kind
    lines += [f'{name} = {default}  ({about})']
    lines += [textwrap.fill(text, WIDTH, initial_indent='    ', subsequent_indent='    ')]
  return '\n'.join(lines)


def config_text(args: argparse.Namespace) -> str:
  """Returns the text of `--print_config`: the complete config, one line `key=value` per key.

  The config comes from `--config` or, without this flag, from `--workdir`. If the command has
  neither flag, the default config is used. In all cases, overrides are applied.

  Raises:
    ValueError: the config is not valid.
  """
  from vit_jax.check import check  # imported here, because it imports JAX

  config = given_config(args)
  if config is None and args.workdir:
    from vit_jax.training import saved_config

    config = saved_config(args.workdir, args.overrides)
  config = config or override_all(default_config(), args.overrides)
  check(config)
  values = flatten(config)
  return '\n'.join(f'{key}={as_text(values[key])}' for key in KEYS)
