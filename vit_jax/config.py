"""Creates, overrides, saves and compares configs; `keys.py` has the table of all keys.

A config file in `configs/` starts from `default_config()` and changes some keys. `experiment.py`
builds the model and its functions from a config. Packages such as `model` and `data` do not import
this module; their functions get the values of keys as arguments.
"""

import ast
import collections
from collections.abc import Iterator, Mapping, Sequence
import contextlib
import copy
import difflib
import importlib
import json
import logging
import sys
import traceback

from ml_collections import ConfigDict, config_dict

from vit_jax.keys import KEYS

log = logging.getLogger(__name__)

# {old key: new key}. A release that renames a key adds an entry, so that old configs still load.
RENAMED: dict[str, str] = {}


def default_config() -> ConfigDict:
  """Returns a locked config with every key of `KEYS` at its default: a ViT for 32x32 images."""
  tree = {}
  for name, key in KEYS.items():
    *sections, leaf = name.split('.')
    section = tree
    for part in sections:
      section = section.setdefault(part, {})
    section[leaf] = config_dict.placeholder(key.kind) if key.default is None else key.default
  return ConfigDict(tree).lock()


imports: tuple[str, ...] = ()  # modules that `--import` has imported; checkpoints store these names

TRUE, FALSE = ('true', 't', '1'), ('false', 'f', '0')  # spellings that absl accepts


def unset(config: Mapping) -> set[str]:
  """Returns the unset keys that later get a value from `init`, from the data or from the run.

  A key is unset if its value is None. The key `data.cache` is unset if its value is `auto`.
  """
  keys = {name for name, key in KEYS.items() if key.open or name.startswith('model.')}
  values = flatten(config)
  left = {key for key in keys | {'data.mean', 'data.std', 'loss.name'} if values[key] is None}
  return left | ({'data.cache'} if values['data.cache'] == 'auto' else set())


def is_switch(key: str) -> bool:
  """Returns whether `key` is the name of a Boolean config key."""
  return key in KEYS and KEYS[key].kind is bool


def unknown(key: str) -> str:
  """Returns the error message for an unknown key, with similar valid keys."""
  named = collections.defaultdict(list)  # {name that the user may mean: keys with this name}
  for name in KEYS:
    section, _, leaf = name.rpartition('.')
    for words in {name, leaf}:
      named[words].append(name)
    if section:
      named[section] = [section]
  near = [name for name in named if name.startswith(key + '.')]
  near = near or named.get(key.rpartition('.')[2])
  if not near:
    close = difflib.get_close_matches(key, named, n=3)
    near = list(dict.fromkeys(name for words in close for name in named[words]))
  return f'{key}: unknown key.{hint(near)}'


def hint(near: Sequence[str]) -> str:
  """Returns a text like " Did you mean a or b?" for the names in `near`; empty without names."""
  return f' Did you mean {" or ".join(near)}?' if near else ''


def override(config: ConfigDict, key: str, text: object) -> None:
  """Sets a config key to a value; a text is converted to the type of the key.

  Raises:
    ValueError: the key is unknown (the message gives similar keys), or the value has a wrong type.
  """
  key = RENAMED.get(key, key)
  if key not in KEYS:
    raise ValueError(f'--config.{unknown(key)}')
  kind, default = KEYS[key].kind, KEYS[key].default
  try:
    value = parse(str(text), kind, optional=default is None or KEYS[key].open)
  except (ValueError, SyntaxError):
    example = {int: '8', float: '0.1', bool: 'true', tuple: '0.1,0.2'}[kind]
    example = ','.join(map(str, default)) if kind is tuple and default else example
    raise ValueError(
      f'--config.{key}: got {text!r}, expected {kind.__name__}, e.g. {example}.'
    ) from None
  section, _, leaf = key.rpartition('.')
  holder = config[section] if section else config
  with holder.unlocked():
    holder[leaf] = value


def override_all(config: ConfigDict, overrides: Mapping[str, object]) -> ConfigDict:
  """Sets several keys, each as `override` does, and returns the config."""
  for key, text in overrides.items():
    override(config, key, text)
  return config


def parse(text: str, kind: type, optional: bool = False):
  """Converts text to a value of the type `kind`.

  A tuple may be written as `32,32`, `(32, 32)` or `32`, and an int also as `1e3`.

  Args:
    text: the text.
    kind: type of the value.
    optional: whether the text `None` gives the value None.

  Raises:
    ValueError: the text is not a value of this type. Malformed tuples can raise SyntaxError.
  """
  if optional and (text == 'None' or (kind is not str and text == 'none')):
    return None  # for a str key `none` is a valid name: model.position=none
  if kind is bool:
    if text.lower() not in (*TRUE, *FALSE):
      raise ValueError(text)
    return text.lower() in TRUE
  if kind is int and not text.strip().lstrip('+-').isdecimal():
    number = float(text)
    if not number.is_integer():
      raise ValueError(text)
    return int(number)
  if kind is tuple:
    value = ast.literal_eval(text)
    value = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not all(isinstance(item, (int, float)) for item in value):
      raise ValueError(text)
    return value
  return kind(text)


def as_text(value: object) -> str:
  """Formats a value so that `parse` reads it back."""
  if isinstance(value, (tuple, list)):
    return ','.join(map(str, value)) or '()'
  return str(value)


def flatten(config: Mapping, prefix: str = '') -> dict[str, object]:
  """Returns a flat dict `{key: value}` of a config, with dotted keys such as `data.source`.

  Tuples become lists, as in JSON. The text `prefix` is put in front of all keys.
  """
  flat = {}
  for name, value in config.items():
    if isinstance(value, (Mapping, ConfigDict)):
      flat |= flatten(value, f'{prefix}{name}.')
    else:
      flat[prefix + name] = list(value) if isinstance(value, tuple) else value
  return flat


def to_dict(config: ConfigDict) -> dict:
  """Converts a config to plain values that JSON can store."""
  return json.loads(config.to_json())


def from_dict(saved: Mapping) -> ConfigDict:
  """Restores a config from the result of `to_dict`; missing keys get their defaults.

  Old names of renamed keys are accepted.

  Raises:
    ValueError: this version does not know a key, or a value has the wrong type.
  """
  config = default_config()
  values = {RENAMED.get(key, key): value for key, value in flatten(saved).items()}
  unknown = sorted(values.keys() - KEYS.keys())
  if unknown:
    raise ValueError(
      f'The saved config has keys that this version lacks: {", ".join(unknown)}. Use the version '
      'of vit_jax that saved the config, or --import the module that adds these keys.'
    )
  try:
    for key, value in values.items():
      section, _, name = key.rpartition('.')
      holder = config[section] if section else config
      holder[name] = tuple(value) if isinstance(value, list) else value
  except TypeError as error:
    raise ValueError(f'The saved config does not fit this version: {error}') from error
  return config


def fill(config: ConfigDict, values: Mapping[str, object]) -> ConfigDict:
  """Returns a copy of the config, in which keys without a value (`unset`) are set from `values`."""
  config = copy.deepcopy(config)
  for key in unset(config) & set(values):
    section, _, name = key.rpartition('.')
    holder = config[section] if section else config
    holder[name] = values[key]
  return config


def check_same_run(
  saved: ConfigDict, given: ConfigDict, workdir: object, free: Sequence[str] = ()
) -> None:
  """Raises ValueError if the run in a workdir cannot be resumed with the given config.

  Args:
    saved: config that the run has saved.
    given: config to resume the run with.
    workdir: folder of the run, for the message.
    free: keys that are not compared.
  """
  before, now = flatten(saved), flatten(given)
  # Only keys with `may_change` may differ. `resume.add_cycle` checks `epochs`.
  may_change = [name for name, key in KEYS.items() if key.may_change]
  differences = [
    f'  {key}: {before[key]!r} in the workdir, {now[key]!r} given'
    for key in before
    if before[key] != now[key] and key not in {'epochs', *free, *may_change, *unset(given)}
  ]
  if differences:
    raise ValueError(
      f'{workdir} holds a run with a different config:\n' + '\n'.join(differences) + '\nGive the '
      'values of the workdir, or a new --workdir. These keys can always be changed: '
      + ', '.join(may_change)
      + '. For a finished run, you can also raise epochs.'
    )


def import_extensions(names: Sequence[str]) -> None:
  """Imports the modules that `--import` names; they can add config keys and registry entries.

  Raises:
    ValueError: Python cannot find a module, or a module raises an error. If a module raises an
      error, the message gives the file and the line of this error.
  """
  global imports
  for name in names:
    try:
      importlib.import_module(name)
    except Exception as error:  # a module may raise anything
      last = traceback.extract_tb(error.__traceback__)[-1]
      why = f'{last.filename}, line {last.lineno}: {type(error).__name__}: {error}'
      if isinstance(error, ModuleNotFoundError) and error.name == name.partition('.')[0]:
        why = 'no such module in this folder or on PYTHONPATH. Give its name without .py.'
      raise ValueError(f'--import={name}: {why}') from error
    imports = tuple(dict.fromkeys((*imports, name)))


@contextlib.contextmanager
def naming_imports(saved: Mapping) -> Iterator[None]:
  """Context manager that reports which `--import` modules of a run this process did not import.

  If the code in the context raises a ValueError, the names of the missing modules are added to the
  message of the error. If the code succeeds, a warning lists the names. The modules are never
  imported here, because a checkpoint must not decide which code is executed.

  Args:
    saved: JSON that a checkpoint of the run contains. The list `imports` names the modules.
  """
  missing = ','.join(name for name in saved.get('imports', ()) if name not in sys.modules)
  message = f'The run was trained with --import={missing}. Add this flag to the command.'
  try:
    yield
  except ValueError as error:
    if not missing:
      raise
    raise ValueError(f'{error}\n{message}') from error
  if missing:
    log.warning('%s', message)
