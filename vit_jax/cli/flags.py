"""Defines the classes `Mode` and `Flag`, and the flags that several modes share."""

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
    name: name without the dashes.
    help: purpose, in one line.
    type: function that converts the text to a value. With `pathlib.Path`, the text can also be a
      path in a bucket (`gs://`).
    default: value if the flag is not given.
    required: whether the command must have this flag or the flag `--init`.
  """

  name: str
  help: str
  type: Callable[[str], object] = str
  default: object = ''
  required: bool = False


@dataclasses.dataclass(frozen=True)
class Mode:
  """A mode of the program, which is a value of the flag `--mode`.

  Attributes:
    summary: purpose of the mode, in one line; starts with a verb.
    example: flags of a typical command.
    flags: flags that the mode accepts besides the flags of every mode.
    run: function that runs the mode and returns the exit code, or None for 0. Its argument has an
      attribute for each flag, and the attribute `overrides` with the config overrides. The function
      also imports the modules whose import takes long.
    resumes: whether the same command, repeated by the user, resumes an interrupted run.
    overrides: whether the mode accepts `--config.<key>=<value>` although it has no flag `--config`.
  """

  summary: str
  example: str
  flags: tuple[Flag, ...]
  run: Callable[[argparse.Namespace], int | None]
  resumes: bool = False
  overrides: bool = False


def split_paths(text: str) -> list[str]:
  """Splits a comma-separated list of paths. An existing path that contains commas is not split."""
  if text and os.path.exists(os.path.expanduser(text)):
    return [text]
  return [path.strip() for path in text.split(',') if path.strip()]


WORKDIR = Flag('workdir', 'folder for checkpoints and logs', pathlib.Path, required=True)
CONFIG = Flag('config', 'config file: path/to/file.py[:<variant>]')
INIT = Flag('init', 'weights to use instead of a workdir: a file, folder or Hugging Face Hub name')
STEP = Flag(
  'step',
  'checkpoint: best (by validation accuracy), last, or a step number; default: best if there is a '
  'checkpoint with a validation accuracy, else last',
)
IMAGES = Flag('images', 'comma-separated image files, folders and patterns', split_paths, None)
MAX_PATCHES = Flag(
  'max_patches',
  'resize each image to at most this number of patches, and keep its aspect ratio; default: resize '
  'all images to data.image_size',
  int,
  None,
)
OUT = Flag('out', 'output folder', pathlib.Path)
CLASSES = Flag(
  'classes',
  'for CLIP or SigLIP weights in --init: npz file with a text embedding of each class; it has the '
  'arrays names, embeddings, logit_scale and, for SigLIP, logit_bias',
  pathlib.Path,
)
WEIGHTS = (WORKDIR, INIT, STEP, CONFIG)  # flags that choose the model, see `request_of`
CLUSTER = (
  Flag('coordinator', 'on several hosts: <host>:<port> of process 0', default=None),
  Flag(
    'num_processes',
    'on several hosts: number of processes; 1: run this process alone, even in Slurm',
    int,
    None,
  ),
  Flag('process_id', 'on several hosts: index of this process, 0 to num_processes - 1', int, None),
)


def given_config(args: argparse.Namespace) -> ConfigDict | None:
  """Returns the config of the file `--config`, after all overrides; None without `--config`."""
  return override_all(load_file(args.config), args.overrides) if args.config else None


def request_of(args: argparse.Namespace):
  """Returns the `opening.Request` for the model that the parsed flags describe.

  The request depends on the flags in `WEIGHTS`, on `CLASSES` and `MAX_PATCHES`, and on the config
  overrides. A flag that the mode does not accept has its default value.
  """
  from vit_jax.opening import Request

  return Request(
    args.workdir,
    args.init,
    args.step,
    args.overrides,
    given_config(args),
    args.classes,
    args.max_patches,
  )
