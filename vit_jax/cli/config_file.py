"""Loads config files: Python files with a function `get_config()` or `get_config(variant)`."""

from collections.abc import Iterator
import contextlib
import difflib
import importlib.machinery
import inspect
import pathlib
import re
import sys
import traceback
import types

from ml_collections import ConfigDict

from vit_jax.bucket import local_only
from vit_jax.config import flatten, hint, unknown
from vit_jax.keys import KEYS


def load_file(spec: str) -> ConfigDict:
  """Loads a config file, and returns the config that the file's function `get_config` creates.

  `spec` is `path/to/file.py` or `path/to/file.py:variant`. The variant is passed to `get_config`.

  Raises:
    ValueError: the file does not exist, has no function `get_config`, or raises an error. Or
      `get_config` does not return a ConfigDict, sets an unknown key, or gives a value to a section
      such as `data`. Or `spec` has a variant, but `get_config` takes no argument. The
      message names the file and, if the code of the file raised the error, the line.
  """
  path, _, variant = str(local_only('--config', spec)).partition(':')
  if not pathlib.Path(path).is_file():
    near = difflib.get_close_matches(path, map(str, pathlib.Path('configs').glob('*.py')), n=3)
    raise ValueError(f'--config: file {path!r} not found.{hint(near)}')
  with located(path), neighbours(path):
    get_config = run_file(path).get('get_config')
  if not callable(get_config):
    raise ValueError(f'--config: {path} defines no function get_config().')
  if variant and not inspect.signature(get_config).parameters:
    raise ValueError(
      f'--config: get_config() of {path} takes no argument, got {variant!r} after the colon. Give '
      'only the path.'
    )
  with located(path), neighbours(path):
    config = get_config(variant) if variant else get_config()
  if not isinstance(config, ConfigDict):
    raise ValueError(
      f'--config: get_config() of {path} must return a ConfigDict, but returned the type '
      f'{type(config).__name__}. Start from vit_jax.default_config().'
    )
  for key in flatten(config):
    if keys := [name for name in KEYS if name.startswith(f'{key}.')]:
      raise ValueError(
        f'--config: {path} sets {key} to {config[key]!r}, but {key} is a section. Set the keys of '
        f'the section instead, e.g. {keys[0]}.'
      )
    if key not in KEYS:
      raise ValueError(f'--config: {path} sets {unknown(key)}')
  return config


def run_file(path: str) -> dict[str, object]:
  """Runs a Python file, and returns its global variables: {name: value}."""
  loader = importlib.machinery.SourceFileLoader('experiment_config', path)
  module = types.ModuleType(loader.name)
  module.__file__ = path
  exec(loader.source_to_code(loader.get_data(path), path), module.__dict__)
  return module.__dict__


@contextlib.contextmanager
def neighbours(path: str) -> Iterator[None]:
  """Context manager in which the config file at `path` can import files from its own folder.

  For example, a file in `configs/` can contain `from configs import finetune`.
  """
  base = str(pathlib.Path(path).resolve().parent.parent)
  sys.path.append(base)  # searched last, so modules in this folder hide no others
  try:
    yield
  finally:
    sys.path.pop()


@contextlib.contextmanager
def located(path: str) -> Iterator[None]:
  """Context manager that converts errors of a config file to a ValueError with file and line."""
  try:
    yield
  except (Exception, SystemExit) as error:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
      lines.append(error.lineno)  # code with a syntax error never runs, so it has no frame
    line = f', line {lines[-1]}' if lines else ''
    raise ValueError(f'--config: {path}{line}: {explain(error)}') from error


def explain(error: BaseException) -> str:
  """Returns the message for an error of a config file; suggests keys if a key is unknown."""
  inner = next((cause for cause in error.args if isinstance(cause, KeyError)), error)
  # ml_collections reports an unknown key with this text, followed by a list of all valid keys.
  absent = re.match(r"""Key "(.+?)" does not exist|'(.+?)'(\n|$)""", str([*inner.args, ''][0]))
  if isinstance(inner, KeyError) and absent:
    return unknown(absent[1] or absent[2])
  return str(error) if isinstance(error, ValueError) else f'{type(error).__name__}: {error}'
