"""The command line: `python main.py` in a checkout, or `vit-jax` if the package is installed.

A mode is a value of the flag `--mode`, such as `train`. Each mode is defined in its own file: its
flags, an example command and the function to run. `MODES` lists all modes. A module that is
imported with `--import` can add a mode with `MODES['mine'] = Mode(...)`.
"""

from vit_jax.cli.command import main, start
from vit_jax.cli.config_file import load_file
from vit_jax.cli.flags import Flag, Mode, request_of
from vit_jax.cli.modes import MODES
from vit_jax.cli.terminal import keep_compiled

__all__ = ['MODES', 'Flag', 'Mode', 'keep_compiled', 'load_file', 'main', 'request_of', 'start']
