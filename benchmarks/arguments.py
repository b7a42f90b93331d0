"""Argument parser of the benchmarks: `--help` prints the docstring; each error is one line."""

import argparse
import re


class Parser(argparse.ArgumentParser):
  """Argument parser for a module of this package, which runs as `python -m <module>`."""

  def __init__(self, spec, doc: str):
    """Creates a parser from the module's `__spec__` and docstring."""
    super().__init__(
      prog=f'python -m {spec.name}',
      description=doc,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )

  def error(self, message: str):
    """Prints the error in one line and exits with code 2."""
    self.exit(2, f'error: {message}. For usage, run {self.prog} --help.\n')


def count(text: str) -> int:
  """Parses an integer that is at least 0.

  Raises:
    argparse.ArgumentTypeError: the text is not such an integer.
  """
  if not text.isdecimal():
    raise argparse.ArgumentTypeError(f'expected an integer that is at least 0, got {text!r}')
  return int(text)


def overrides(parser: Parser, rest: list[str]) -> dict[str, str]:
  """Returns `{key: text}` of the flags `--config.<key>=<text>`; any other flag is an error."""
  found = {}
  for flag in rest:
    parts = re.fullmatch(r'--config\.([^=]+)=(.*)', flag)
    if not parts:
      parser.error(f'unknown flag {flag}; set config keys with --config.<key>=<value>')
    found[parts[1]] = parts[2]
  return found
