"""From words of the command line to the flags of a mode and the overrides of its config."""

import argparse
from collections.abc import Iterator, Sequence
import pathlib
import re

from vit_jax.cli.flags import Flag
from vit_jax.cli.modes import MODES
from vit_jax.config import is_switch
from vit_jax.names import local

GENERAL = (  # flags of every mode
  Flag('mode', 'one of the modes', default='train'),
  Flag('import', 'modules to import first, comma-separated: they register what configs name'),
)
SWITCHES = {  # flags without a value, which print something and exit
  'help': 'this page, or the flags of --mode=<mode>',
  'help_config': 'every config key with its default, unit and meaning',
  'print_config': 'the config of --config or --workdir, with its overrides',
}


def new_parser() -> argparse.ArgumentParser:
  """A parser of the flags that every mode takes."""
  parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  for flag in GENERAL:
    parser.add_argument(f'--{flag.name}', default=flag.default, help=flag.help)
  for name, text in SWITCHES.items():
    names = ['-h', '--help'] if name == 'help' else [f'--{name}']
    parser.add_argument(*names, action='store_true', help=text)
  return parser


def parse_general(argv: Sequence[str]) -> argparse.Namespace:
  """The flags that every mode takes, before the extensions that know the others are imported."""
  args, _ = new_parser().parse_known_args(argv)
  args.extensions = [name.strip() for name in getattr(args, 'import').split(',') if name.strip()]
  args.given = given(argv)
  return args


def given(argv: Sequence[str]) -> set[str]:
  """The flags that have a value on the command line, or stand alone."""
  parts = (word.partition('=') for word in argv)
  return {flag for flag, equals, value in parts if value or not equals}


def parse_flags(argv: Sequence[str], mode: str) -> argparse.Namespace:
  """All flags, `given`, and `overrides` as `read_overrides` gives them.

  Flags of other modes are read too, for `check_flags` to refuse.

  Raises:
    ValueError: a flag that the mode does not take, or a URL in place of a path.
    SystemExit: an unknown flag, or a value of another type.
  """
  parser, paths = new_parser(), set()
  for flag in flags_of(mode):
    kind = str if flag.type is pathlib.Path else flag.type
    parser.add_argument(f'--{flag.name}', type=kind, default=flag.default)
    paths |= {flag.name} if flag.type is pathlib.Path else set()
  args, rest = parser.parse_known_args(argv)
  try:
    args.overrides = read_overrides(rest)
  except ValueError as error:
    parser.error(str(error))
  args.given = given(argv) | ({'--config'} if args.overrides else set())
  check_flags(args)
  for name in paths:  # an unset variable of the shell leaves an empty one
    setattr(args, name, local(text) if (text := getattr(args, name)) else None)
  return args


def flags_of(mode: str) -> Iterator[Flag]:
  """The flags of a mode, then those that only other modes take."""
  names = set()
  for entry in (MODES[mode], *MODES.values()):
    for flag in entry.flags:
      if flag.name not in names:
        names.add(flag.name)
        yield flag


def read_overrides(words: Sequence[str]) -> dict[str, str]:
  """The overrides `{key: text}` that words of the command line make.

  They are `--config.key=text`, `--config.key text`, and of a key that is true or false also
  `--config.key` and `--noconfig.key`.

  Raises:
    ValueError: another flag, or one whose value is missing or not wanted.
  """
  overrides, words = {}, list(words)
  while words:
    word = words.pop(0)
    found = re.fullmatch(r'--(no)?config\.([^=]+)(=.*)?', word, re.DOTALL)
    if not found:
      raise ValueError(f'unknown argument {word}; config keys are given as --config.<key>=<value>')
    negated, key, text = found.groups()
    if negated and (text or not is_switch(key)):
      raise ValueError(f'{word}: --no is for keys that are true or false, without a value')
    if negated:
      overrides[key] = 'false'
    elif text:
      overrides[key] = text[1:]
    elif words and not words[0].startswith('--'):
      overrides[key] = words.pop(0)
    elif is_switch(key):
      overrides[key] = 'true'
    else:
      raise ValueError(f'{word} needs a value')
  return overrides


def check_flags(args: argparse.Namespace) -> None:
  """Raises ValueError for a flag that the mode would pass over, or that excludes another."""
  for flag in flags_of(args.mode):
    modes = [name for name, mode in MODES.items() if flag.name in {f.name for f in mode.flags}]
    if f'--{flag.name}' in args.given and args.mode not in modes:
      hint = '; training takes --config.init' if flag.name == 'init' else ''
      raise ValueError(
        f'--{flag.name} is for {", ".join(modes)}, not for --mode={args.mode}{hint}.'
      )
  if args.init and (args.workdir or args.config):
    raise ValueError('--init is for weights as they are: leave --workdir and --config out.')
  if args.init and args.step:
    raise ValueError('--step chooses a checkpoint of a --workdir: leave it out with --init.')


def check_required(args: argparse.Namespace) -> None:
  """Raises ValueError for a missing flag that the mode needs."""
  for flag in MODES[args.mode].flags:
    if flag.required and not getattr(args, flag.name) and not args.init:
      raise ValueError(f'--{flag.name} is missing: {flag.help}.')
