"""The command line: `python main.py` in a checkout, `vit-jax` where the package is installed.

Each mode has a file with its flags, an example and a function. `MODES` lists all modes. An
extension adds its own mode with `MODES['mine'] = Mode(...)`.
"""

from vit_jax.cli.command import keep_compiled, main, start
from vit_jax.cli.config_file import load_file
from vit_jax.cli.flags import Flag, Mode, request_of
from vit_jax.cli.modes import MODES

__all__ = ['MODES', 'Flag', 'Mode', 'keep_compiled', 'load_file', 'main', 'request_of', 'start']
