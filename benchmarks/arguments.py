"""The arguments of a benchmark: `--help` shows its docstring, a mistake is one line."""

import argparse


class Parser(argparse.ArgumentParser):
  """Of a module of this package, which is run as `python -m <module>`."""

  def __init__(self, spec, doc: str):
    """Takes the module's `__spec__` and docstring."""
    super().__init__(
      prog=f'python -m {spec.name}',
      description=doc,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )

  def error(self, message: str):
    """Ends the process with code 2."""
    self.exit(2, f'error: {message}; {self.prog} --help shows what it takes.\n')


def count(text: str) -> int:
  """A number that is not negative.

  Raises:
    argparse.ArgumentTypeError: something else.
  """
  if not text.isdecimal():
    raise argparse.ArgumentTypeError(f'expected a number that is not negative, got {text!r}')
  return int(text)
