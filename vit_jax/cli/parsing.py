"""Parses the command line into the flags of a mode and the overrides of its config."""

import argparse
from collections.abc import Iterator, Sequence
import pathlib
import re

from vit_jax.bucket import to_path
from vit_jax.cli.flags import INIT, Flag
from vit_jax.cli.modes import MODES
from vit_jax.config import is_switch

GENERAL = (  # flags of every mode
  Flag('mode', 'name of the mode; default: train', default='train'),
  Flag(
    'import',
    'comma-separated Python modules to import first, e.g. to add losses, config keys or modes',
  ),
)
SWITCHES = {  # flags without a value; they print a page and exit
  'help': 'print all modes; with --mode=<mode>, print the flags of this mode',
  'help_config': 'print every config key with its default, unit and meaning',
  'print_config': 'print the config of --config or --workdir, with the --config.<key> overrides',
}


def new_parser() -> argparse.ArgumentParser:
  """Returns a parser for the flags that every mode accepts."""
  parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  for flag in GENERAL:
    parser.add_argument(f'--{flag.name}', default=flag.default, help=flag.help)
  for name, text in SWITCHES.items():
    names = ['-h', '--help'] if name == 'help' else [f'--{name}']
    parser.add_argument(*names, action='store_true', help=text)
  return parser


def parse_general(argv: Sequence[str]) -> argparse.Namespace:
  """Parses the flags that every mode accepts.

  Other flags are ignored here, because they can belong to a mode of an extension that is not
  imported yet. The result has two more attributes: `extensions`, the list of modules in `--import`,
  and `given`, the names of the flags in `argv`.
  """
  args, _ = new_parser().parse_known_args(argv)
  args.extensions = [name.strip() for name in getattr(args, 'import').split(',') if name.strip()]
  args.given = given(argv)
  return args


def given(argv: Sequence[str]) -> set[str]:
  """Returns the names of the flags in `argv`, such as `--mode`.

  A flag with an empty value, such as `--mode=`, is ignored.
  """
  parts = (word.partition('=') for word in argv)
  return {flag for flag, equals, value in parts if value or not equals}


def parse_flags(argv: Sequence[str], mode: str) -> argparse.Namespace:
  """Parses all flags of a mode.

  Flags of other modes are also parsed, so that `check_flags` can reject them. The result has two
  more attributes: `given`, the names of the flags in `argv`, and `overrides`, the config overrides
  as `{key: text}`.

  Raises:
    ValueError: a flag belongs to another mode, or two flags exclude each other. Or a path is an
      unsupported URL, or is in a bucket that cannot be used.
    OSError: a path is in a bucket that does not answer.
    SystemExit: a flag is unknown, or its value has the wrong type.
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
  needs_config = args.overrides and not MODES[mode].overrides
  args.given = given(argv) | ({'--config'} if needs_config else set())
  check_flags(args)
  for name in paths:  # an unset shell variable gives an empty path
    setattr(args, name, to_path(text) if (text := getattr(args, name)) else None)
  return args


def flags_of(mode: str) -> Iterator[Flag]:
  """Yields the flags of a mode, then the flags that only other modes accept."""
  names = set()
  for entry in (MODES[mode], *MODES.values()):
    for flag in entry.flags:
      if flag.name not in names:
        names.add(flag.name)
        yield flag


def read_overrides(words: Sequence[str]) -> dict[str, str]:
  """Returns the config overrides in arguments of the command line: `{key: text}`.

  Valid forms are `--config.key=text` and `--config.key text`. For keys that are true or false,
  `--config.key` and `--noconfig.key` are also valid.

  Raises:
    ValueError: an argument is not an override, or a value is missing. Or `--noconfig.key` has a
      value, or is used for a key that is not true or false.
  """
  overrides, words = {}, list(words)
  while words:
    word = words.pop(0)
    found = re.fullmatch(r'--(no)?config\.([^=]+)(=.*)?', word, re.DOTALL)
    if not found:
      raise ValueError(f'unknown argument {word}. Set config keys with --config.<key>=<value>')
    negated, key, text = found.groups()
    if negated and (text or not is_switch(key)):
      raise ValueError(
        f'{word}: --noconfig.<key> takes no value, and works only for keys that are true or false'
      )
    if negated:
      overrides[key] = 'false'
    elif text:
      overrides[key] = text[1:]
    elif words and not words[0].startswith('--'):
      overrides[key] = words.pop(0)
    elif is_switch(key):
      overrides[key] = 'true'
    else:
      raise ValueError(f'{word} needs a value: {word}=<value>')
  return overrides


def check_flags(args: argparse.Namespace) -> None:
  """Raises ValueError if a flag belongs to another mode, or if two flags exclude each other."""
  for flag in flags_of(args.mode):
    modes = [name for name, mode in MODES.items() if flag.name in {f.name for f in mode.flags}]
    if f'--{flag.name}' in args.given and args.mode not in modes:
      hint = 'For training, use --config.init.' if flag.name == 'init' else 'Remove this flag.'
      raise ValueError(
        f'--{flag.name} is for {", ".join(modes)}, not for --mode={args.mode}. {hint}'
      )
  if args.init and (args.workdir or args.config):
    raise ValueError(
      '--init cannot be combined with --workdir or --config=<file>. Remove --init or the other '
      'flags.'
    )
  if args.init and args.step:
    raise ValueError(
      '--step chooses a checkpoint of --workdir and cannot be used with --init. Remove --step, or '
      'pass --init=<workdir>/checkpoints/<step>.'
    )


def check_required(args: argparse.Namespace) -> None:
  """Raises ValueError if both a required flag of the mode and `--init` are missing."""
  flags = MODES[args.mode].flags
  for flag in flags:
    if flag.required and not getattr(args, flag.name) and not args.init:
      other = f' Or give --init: {INIT.help}.' if flag.name == 'workdir' and INIT in flags else ''
      raise ValueError(f'--{flag.name} is required: {flag.help}.{other}')
