"""What to say of an error that ends the program."""

import errno
import os
import re


def describe(error: Exception) -> str:
  """The error as one message, with what to do where Python, or JAX, does not say it."""
  if isinstance(error, OSError) and error.filename and error.errno in (errno.EACCES, errno.EPERM):
    return (
      f'{error.filename}: {error.strerror}. Give this user the right to use it, or give another '
      'path.'
    )
  flag = re.search(r'JAX flag (jax_\w+)', str(error))
  if flag and (value := os.environ.get(flag[1].upper())) is not None:
    return f'{flag[1].upper()}={value} in the environment: JAX takes no such value. Correct it.'
  return str(error)
