"""One HTML page that holds a run's numbers, config and pictures, and needs nothing else.

Decisions:
  * No script, no font, no link out: it opens from a disk, in a mail, in ten years.
  * All text goes through `html.escape`: names of classes, files and runs are other people's.
  * Pictures have a white ground of their own, so that they look the same on a dark page.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import html
import pathlib

from vit_jax import storage

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --soft: #5a5a5a; --ground: #fff; --line: #ddd; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --soft: #a8a8a8; --ground: #161616; --line: #3a3a3a; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground);
  max-width: 52rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin-bottom: 0; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
h1 + p, figcaption, th { color: var(--soft); }
h1 + p { margin-top: 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
td, th { text-align: left; vertical-align: top; padding: .25rem 1rem .25rem 0; font-weight: normal;
  border-bottom: 1px solid var(--line); }
code { font-size: .85rem; }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; background: #fff;
  border-radius: 4px; box-sizing: border-box; padding: .5rem; }
figcaption { font-size: .9rem; margin-top: .5rem; }
summary { cursor: pointer; margin: .75rem 0; }
"""


@dataclasses.dataclass(frozen=True)
class Picture:
  """A PNG file, with what it is called and one or two sentences on what it shows."""

  path: pathlib.Path
  title: str
  caption: str


@dataclasses.dataclass(frozen=True)
class Report:
  """What the page holds.

  Attributes:
    title: of the page.
    subtitle: under it.
    numbers: what the run gave, by name.
    changed: keys of the config with their value and the default.
    unchanged: keys of the config that are at their default.
    pictures: in their order; the files are put into the page.
    left_out: titles of pictures that could not be drawn, and why.
  """

  title: str
  subtitle: str
  numbers: Mapping[str, str]
  changed: Sequence[tuple[str, object, object]]
  unchanged: Mapping[str, object]
  pictures: Sequence[Picture]
  left_out: Mapping[str, str]


def write_report(path: pathlib.Path, report: Report) -> None:
  """Writes the page as an HTML file; it is whole or not there."""
  parts = [
    f'<h1>{escape(report.title)}</h1><p>{escape(report.subtitle)}</p>',
    section('Numbers', html_table(report.numbers.items())),
    section('Config', config_tables(report.changed, report.unchanged)),
    *(section(picture.title, figure(picture)) for picture in report.pictures),
    section('Left out', html_table(report.left_out.items())) if report.left_out else '',
  ]
  storage.replace(
    path,
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{escape(report.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n'
    + '\n'.join(filter(None, parts))
    + '\n</body>\n</html>\n',
  )


def section(title: str, body: str) -> str:
  """A part of the page under a heading."""
  return f'<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>'


def figure(picture: Picture) -> str:
  """A picture and its caption; the file's bytes are in the page."""
  data = base64.b64encode(picture.path.read_bytes()).decode()
  return (
    f'<figure><img src="data:image/png;base64,{data}" alt="{escape(picture.title)}">'
    f'<figcaption>{escape(picture.caption)}</figcaption></figure>'
  )


def config_tables(changed: list[tuple], unchanged: dict[str, object]) -> str:
  """What differs from the defaults, and behind a fold all that does not."""
  code = lambda x: f'<code>{escape(x)}</code>'
  rows = [(code(key), code(value), code(default)) for key, value, default in changed]
  rest = [(code(key), code(value)) for key, value in unchanged.items()]
  shown = cells([('key', 'value', 'default')], 'th') + cells(rows)
  folded = f'<table>{cells(rest)}</table>'
  return (
    f'<table>{shown}</table>\n<details><summary>{len(rest)} keys at their default</summary>\n'
    f'{folded}</details>'
  )


def html_table(rows: Iterable[tuple[str, str]]) -> str:
  """Names and values."""
  return f'<table>{cells((escape(name), escape(value)) for name, value in rows)}</table>'


def cells(rows: Iterable[tuple[str, ...]], tag: str = 'td') -> str:
  """Rows of a table; what is given is HTML."""
  line = lambda row: ''.join(f'<{tag}>{cell}</{tag}>' for cell in row)
  return '\n'.join(f'<tr>{line(row)}</tr>' for row in rows)


def escape(text: object) -> str:
  """Text as HTML shows it, inside an attribute too."""
  return html.escape(str(text), quote=True)
