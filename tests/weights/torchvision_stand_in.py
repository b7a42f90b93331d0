"""Lets timm be imported without torchvision, which its models do not use.

Every name in every module of the stand-in is an empty class, and every attribute of such a class is
a text. This is enough for timm's imports, and for models, but not for images.
"""

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types


class Empty(type):
  """Class of classes whose unknown attributes are texts."""

  def __getattr__(cls, name):
    if name.startswith('__'):
      raise AttributeError(name)
    return f'{cls.__name__}.{name}'


class StandIn(types.ModuleType):
  """A module that has every name."""

  def __getattr__(self, name):
    if name.startswith('__'):
      raise AttributeError(name)
    setattr(self, name, Empty(name, (), {}))
    return getattr(self, name)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  """Finds torchvision and each of its submodules."""

  def find_spec(self, fullname, path=None, target=None):
    if fullname.partition('.')[0] != 'torchvision':
      return None
    return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

  def create_module(self, spec):
    return StandIn(spec.name)

  def exec_module(self, module):
    pass


@functools.cache
def import_timm():
  """Returns timm, imported with the stand-in if torchvision cannot be imported.

  Afterwards, torchvision is missing as before, so that other packages do not find the stand-in.

  Raises:
    ImportError: timm is not installed.
  """
  try:
    import torchvision  # noqa: F401
  except Exception:  # torchvision of another PyTorch raises many types of errors
    forget('torchvision', 'timm')
    sys.meta_path.insert(0, Finder())
  try:
    import timm
    import timm.models.eva
  finally:
    if isinstance(sys.meta_path[0], Finder):
      del sys.meta_path[0]
      forget('torchvision')
  return timm


def forget(*packages):
  """Removes the modules of these packages from the imported modules."""
  for name in [name for name in sys.modules if name.partition('.')[0] in packages]:
    del sys.modules[name]
