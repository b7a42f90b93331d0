"""Runs the program with its command-line arguments, and returns its exit code.

Decisions:
  * Most help pages are printed without importing JAX, because the import takes seconds.
  * If the user made a mistake, the program prints `error: ...` instead of a traceback, and returns
    the exit code 2. The exit code 75 means that SIGTERM stopped training or `verify`, or that a
    bucket did not answer. The user can then repeat the command.
"""

import argparse
from collections.abc import Sequence
import os
import sys

from vit_jax.cli.errors import is_from_bucket, report, what_was_saved
from vit_jax.cli.flags import Mode
from vit_jax.cli.help import config_text, page_of
from vit_jax.cli.modes import MODES
from vit_jax.cli.parsing import check_required, parse_flags, parse_general
from vit_jax.cli.terminal import close_pipe, keep_compiled, set_up, show_log
from vit_jax.config import import_extensions
from vit_jax.names import choose

EXTRAS = {  # {install command: modules that only this command installs}
  "pip install '.[train]'": (
    'sklearn',
    'tensorboardX',
    'matplotlib',
    'tensorflow_datasets',
    'importlib_resources',
    'array_record',
    'grain',
    'cv2',
  ),
  'pip install -r requirements-demo.txt': ('gradio', 'fastapi', 'starlette', 'uvicorn'),
  'pip install --no-deps -r requirements-onnx.txt': ('jax2onnx', 'onnx', 'onnxruntime'),
}


def start() -> None:
  """Runs `main` with the command-line arguments of this process, and exits with the result."""
  set_up()
  sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int | None:
  """Runs a mode or prints a help page, and returns the exit code; None means 0.

  Args:
    argv: the command-line arguments, without the name of the program.
  """
  keep_compiled()
  show_log()
  mode, args = None, None
  try:
    args = parse_general(argv)
    if args.extensions:
      load_extensions(args.extensions)
    mode = choose('--mode', args.mode, MODES)
    page = page_of(args)
    if page is None:
      args = parse_flags(argv, args.mode)
      if not args.print_config:
        return run(mode, args)
      page = config_text(args)
    print(page)
    sys.stdout.flush()
  except BrokenPipeError:
    close_pipe()
    return 141  # the exit code that shells report after SIGPIPE
  except ModuleNotFoundError as error:
    install = install_for(error)
    if install is None:
      raise
    print(
      f'error: --mode={args.mode} needs {error.name}, which is not installed. Run: {install}.',
      file=sys.stderr,
    )
    return 2
  except (ValueError, OSError, FloatingPointError, MemoryError) as error:
    return report(error)
  except Exception as error:
    if not is_from_bucket(error):
      raise
    return report(error)
  except KeyboardInterrupt:
    workdir = getattr(args, 'workdir', None)  # None before the mode's flags are parsed
    saved = what_was_saved(workdir) if mode and mode.resumes else ''
    print(f'Interrupted.{saved}', file=sys.stderr)
    return 130
  return None


def run(mode: Mode, args: argparse.Namespace) -> int | None:
  """Runs a mode with its parsed flags, and returns its exit code; None means 0."""
  check_required(args)
  from vit_jax import limits
  from vit_jax.distributed import needed, start_up

  start_up()
  with needed(), limits.memory_for(f'--mode={args.mode}'):
    code = mode.run(args)
  sys.stdout.flush()
  return code


def load_extensions(names: Sequence[str]) -> None:
  """Imports the modules in `--import`; they can be in Python's path or the current folder."""
  from vit_jax.distributed import start_up

  start_up()  # must run before an extension starts JAX, e.g. by a query for devices
  sys.path.append(os.getcwd())
  import_extensions(names)


def install_for(error: ModuleNotFoundError) -> str | None:
  """Returns the command that installs the module whose import failed; None if not known."""
  top = (error.name or '').partition('.')[0]
  return next((command for command, modules in EXTRAS.items() if top in modules), None)
