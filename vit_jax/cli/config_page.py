"""Prints the config reference: python -m vit_jax.cli.config_page > docs/config.md"""

from vit_jax.cli.help import describe_keys

HEAD = """# Config keys

Override a key with `--config.<key>=<value>`. This page is generated from `vit_jax/keys.py`; update
it with `python -m vit_jax.cli.config_page > docs/config.md`.

A default of None in `model.*` means: taken from the `init` weights if given, else from
`model.variant`, else the default of `ViT`."""


def config_markdown() -> str:
  """Returns the text of `docs/config.md`."""
  lines, last = [HEAD], None
  for name, default, kind, values, text in describe_keys():
    section = name.partition('.')[0] if '.' in name else 'Run'
    if section != last:
      lines += ['', f'## {section}', '', '| key | default | type, unit | valid | meaning |']
      lines += ['| --- | --- | --- | --- | --- |']
      last = section
    lines += [f'| `{name}` | `{default}` | {kind} | {values} | {text} |']
  return '\n'.join(lines)


if __name__ == '__main__':
  print(config_markdown())
