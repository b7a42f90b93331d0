"""What a mode is, its flags, and those that several modes share."""

import argparse
from collections.abc import Callable
import dataclasses
import os
import pathlib

from ml_collections import ConfigDict

from vit_jax.cli.config_file import load_file
from vit_jax.config import override_all


@dataclasses.dataclass(frozen=True)
class Flag:
  """A flag `--name=value`.

  Attributes:
    name: without the dashes.
    help: what it is for, in a line.
    type: turns its text into a value; `Path` also expands `~` and refuses URLs.
    default: its value where it is not given.
    required: whether the mode needs it, or `--init` instead.
  """

  name: str
  help: str
  type: Callable[[str], object] = str
  default: object = ''
  required: bool = False


@dataclasses.dataclass(frozen=True)
class Mode:
  """What `--mode` chooses.

  Attributes:
    summary: what it does, in a line.
    example: flags of a typical call.
    flags: that it takes; all others are refused.
    run: gets the flags as attributes, and the config's overrides as `overrides`; returns the exit
      code, None for 0. It imports what is slow to import.
    resumes: whether the same command continues an interrupted one.
  """

  summary: str
  example: str
  flags: tuple[Flag, ...]
  run: Callable[[argparse.Namespace], int | None]
  resumes: bool = False


def split_paths(text: str) -> list[str]:
  """The paths of a comma-separated list; an existing path may have commas itself."""
  if text and os.path.exists(os.path.expanduser(text)):
    return [text]
  return [path.strip() for path in text.split(',') if path.strip()]


WORKDIR = Flag('workdir', 'folder of checkpoints and logs', pathlib.Path, required=True)
CONFIG = Flag('config', 'config file: path/to/file.py[:<variant>]')
INIT = Flag(
  'init', 'weights instead of a workdir: a file, a folder or a name on the Hugging Face Hub'
)
STEP = Flag(
  'step', 'checkpoint: best (by validation accuracy), last or a number; default: best, else last'
)
IMAGES = Flag('images', 'image files, folders and patterns, comma-separated', split_paths, None)
OUT = Flag('out', 'folder to write into', pathlib.Path)
WEIGHTS = (WORKDIR, INIT, STEP, CONFIG)  # which model: `request_of` reads them
CLUSTER = (
  Flag('coordinator', 'several hosts: <host>:<port> of process 0', default=None),
  Flag('num_processes', 'several hosts: number of processes; 1: alone, also in Slurm', int, None),
  Flag('process_id', 'several hosts: 0 to num_processes - 1', int, None),
)


def given_config(args: argparse.Namespace) -> ConfigDict | None:
  """The config of `--config` with its overrides; None without `--config`."""
  return override_all(load_file(args.config), args.overrides) if args.config else None


def request_of(args: argparse.Namespace):
  """The `opening.Request` that the flags of `WEIGHTS` make."""
  from vit_jax.opening import Request

  return Request(args.workdir, args.init, args.step, args.overrides, given_config(args))
