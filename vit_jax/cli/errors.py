"""Prints the errors that end the program."""

import errno
import os
import pathlib
import re
import sys

from vit_jax.bucket import NoAnswer, is_remote, why_refused
from vit_jax.storage import exit_code


def report(error: Exception) -> int:
  """Prints to stderr an error that ends the program, and returns the exit code."""
  print(f'error: {describe(error)}', file=sys.stderr)
  return exit_code(error)


def describe(error: Exception) -> str:
  """Returns the message of an error; adds a remedy to some messages of Python, JAX and gcsfs."""
  if isinstance(error, OSError) and error.filename and error.errno in (errno.EACCES, errno.EPERM):
    return (
      f'{error.filename}: {error.strerror}. Give this user the permissions to use this '
      'path, or choose another path.'
    )
  if isinstance(error, IsADirectoryError) and error.filename:
    return f'{error.filename} is a folder, but must be a file. Give a file, or rename the folder.'
  if is_from_bucket(error):
    return f'A request to a bucket failed: {why_refused(error)} Repeat the command later.'
  flag = re.search(r'JAX flag (jax_\w+)', str(error))
  if flag and (value := os.environ.get(flag[1].upper())) is not None:
    return (
      f'{flag[1].upper()}={value} in the environment: JAX rejects this value. Change or unset the '
      'variable.'
    )
  return str(error)


def is_from_bucket(error: Exception) -> bool:
  """Returns whether an error was raised by a request to a bucket.

  The errors of gcsfs and its dependencies have no common base class. So the function checks which
  package defines the error's class.
  """
  libraries = 'gcsfs', 'aiohttp', 'google'
  return isinstance(error, NoAnswer) or type(error).__module__.partition('.')[0] in libraries


def what_was_saved(workdir: pathlib.Path | None) -> str:
  """Returns a sentence for the user: from which step an interrupted run resumes.

  The result is empty if training had not begun, or if the workdir is in a bucket.
  """
  if workdir is None or 'vit_jax.workdir' not in sys.modules:  # training has not begun
    return ''
  if is_remote(workdir):  # the bucket may not answer
    return ''
  from vit_jax.workdir import saved_steps

  for step in saved_steps(workdir):
    return f' The same command resumes from step {step}.'
  if (workdir / 'sweep').exists():
    return ' The same command continues to compare the learning rates.'
  return ' Nothing was saved yet: the same command starts from the beginning.'
