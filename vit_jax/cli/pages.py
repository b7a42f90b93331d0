"""Writes the generated pages of the documentation: `python -m vit_jax.cli.pages docs`.

The page with all config keys is generated from `keys.KEYS`, and the page with all modes and flags
from `cli.MODES`.
"""

import html
import pathlib
import sys

from vit_jax.cli.flags import Flag
from vit_jax.cli.help import describe_keys, example
from vit_jax.cli.modes import MODES
from vit_jax.cli.parsing import GENERAL, SWITCHES

CONFIG_HEAD = """# Configuration

Override a key with `--config.<key>=<value>`. This page is generated from `vit_jax/keys.py`; update
it with `make pages`.

The table lists the defaults. A config file in `configs/` changes some of them: add `--print_config`
to a command to print the values that it would use.

For keys of the section `model`, the default None means that the value comes from the `init`
weights. Without `init`, the value comes from `model.variant` or, if the variant does not define it,
from the class `ViT`. The only exception is `model.remat`: the run chooses its value."""

COMMAND_HEAD = (
  """# Command line

Run `python main.py [--mode=<mode>] [flags] [--config.<key>=<value> ...]`. Where the package is
installed, you can write `vit-jax` instead of `python main.py`. This page is generated from
`vit_jax/cli`; update it with `make pages`.

Without `--mode`, the mode is `train`.

| exit code | meaning |
| --- | --- |
| 0 | success, or SIGTERM, SIGHUP or Ctrl-C stopped `serve` while it served the page |
| 1 | `predict` could not read an image, `verify` found a difference, another process died or did \
not connect, or the program has a bug |
| 2 | any other error, such as a wrong flag or unreadable data; the last line of the \
output explains it |
| 75 | SIGTERM stopped `train` or `verify`, or a bucket did not answer (in any mode); repeat the \
same command |
| 130 | Ctrl-C stopped the program in any mode, except `serve` while it served the page |
| 141 | the program that reads the output, such as `head`, has ended |
| 143 | SIGTERM stopped the program in a mode other than `train`, `verify` and `serve`, or before \
the mode began its work |"""
  ''
)


def config_markdown() -> str:
  """Returns the text of `docs/config.md`."""
  lines, last = [CONFIG_HEAD], None
  for name, default, kind, values, text in describe_keys():
    section = name.partition('.')[0] if '.' in name else 'Run'
    if section != last:
      lines += ['', f'## {section}', '', '| key | default | type, unit | valid | meaning |']
      lines += ['| --- | --- | --- | --- | --- |']
      last = section
    lines += [f'| `{name}` | `{default}` | {kind} | {values} | {text} |']
  return '\n'.join(lines) + '\n'


def flag_rows(flags: tuple[Flag, ...]) -> list[str]:
  """Returns the lines of a Markdown table of flags, with their defaults and meanings."""
  rows = ['| flag | default | meaning |', '| --- | --- | --- |']
  for flag in flags:
    default = f'`{flag.default}`' if flag.default not in ('', None) else ''
    rows += [f'| `--{flag.name}` | {default} | {html.escape(flag.help, quote=False)} |']
  return rows


def command_markdown() -> str:
  """Returns the text of `docs/cli.md`."""
  lines = [COMMAND_HEAD, '', '## Flags of every mode', '', *flag_rows(GENERAL)]
  lines += [f'| `--{name}` | | {html.escape(text)} |' for name, text in SWITCHES.items()]
  for name, mode in MODES.items():
    lines += ['', f'## {name}', '', f'`--mode={name}` {mode.summary}.', '']
    lines += ['```sh', example(name, 'python main.py'), '```', '', *flag_rows(mode.flags)]
  return '\n'.join(lines) + '\n'


PAGES = {'config.md': config_markdown, 'cli.md': command_markdown}


def main(argv: list[str]) -> None:
  """Writes all pages into a folder, whose path is the only element of `argv`."""
  (folder,) = argv
  for name, text in PAGES.items():
    (pathlib.Path(folder) / name).write_text(text(), encoding='utf-8')


if __name__ == '__main__':
  main(sys.argv[1:])
