"""Writes a self-contained HTML page with the numbers, config and figures of a run.

Decisions:
  * The page has no scripts, fonts or external links. So it can be opened from a disk or an e-mail
    without a network, and will still open in ten years.
  * `html.escape` escapes all text, because names of classes, files and runs are not trusted.
  * Figures have a white background, because their black text would be unreadable on a dark page.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import html
import pathlib

from vit_jax import storage

SHOWN = 20  # number of classes in the visible table; the other classes are in a folded table

# Tells a report apart from other files with the name `report.html`.
SIGNATURE = '<meta name="generator" content="vit_jax">'

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
  """A figure in the report: a PNG file, its title, and a caption of one to three sentences."""

  path: pathlib.Path
  title: str
  caption: str


@dataclasses.dataclass(frozen=True)
class Report:
  """Contents of the report, an HTML page.

  Attributes:
    title: title of the page.
    subtitle: line below the title.
    numbers: results of the run, as `{name: text}`.
    changed: `(key, value, default)` of the config keys that differ from the default.
    unchanged: `{key: value}` of the config keys that have their default value.
    pictures: figures, in the order of the page. The page embeds their PNG files.
    left_out: `{title: reason}` of the skipped figures.
    classes: `(class, precision, recall, F1, images)` of each class, as text. If it is empty, the
      page has no table of classes.
  """

  title: str
  subtitle: str
  numbers: Mapping[str, str]
  changed: Sequence[tuple[str, object, object]]
  unchanged: Mapping[str, object]
  pictures: Sequence[Picture]
  left_out: Mapping[str, str]
  classes: Sequence[tuple[str, ...]] = ()


def write_report(path: pathlib.Path, report: Report) -> None:
  """Writes a report as an HTML file; an existing file is replaced atomically."""
  parts = [
    f'<h1>{escape(report.title)}</h1><p>{escape(report.subtitle)}</p>',
    section('Numbers', html_table(report.numbers.items())),
    section('Classes', class_table(report.classes)) if report.classes else '',
    section('Config', config_tables(report.changed, report.unchanged)),
    *(section(picture.title, figure(picture)) for picture in report.pictures),
    section('Skipped figures', html_table(report.left_out.items())) if report.left_out else '',
  ]
  storage.replace(
    path,
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    f'{SIGNATURE}\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{escape(report.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n'
    + '\n'.join(filter(None, parts))
    + '\n</body>\n</html>\n',
  )


def section(title: str, body: str) -> str:
  """Returns the HTML of a section with the heading `title`; `body` must already be HTML."""
  return f'<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>'


def figure(picture: Picture) -> str:
  """Returns the HTML of a figure with its caption; the HTML embeds the PNG file."""
  data = base64.b64encode(picture.path.read_bytes()).decode()
  return (
    f'<figure><img src="data:image/png;base64,{data}" alt="{escape(picture.title)}">'
    f'<figcaption>{escape(picture.caption)}</figcaption></figure>'
  )


def config_tables(changed: list[tuple], unchanged: dict[str, object]) -> str:
  """Returns the HTML of a table of changed config keys, and of a folded table of all other keys.

  Args:
    changed: `(key, value, default)` of each config key that differs from its default.
    unchanged: `{key: value}` of the config keys that have their default value.
  """
  code = lambda x: f'<code>{escape(x)}</code>'
  rows = [(code(key), code(value), code(default)) for key, value, default in changed]
  rest = [(code(key), code(value)) for key, value in unchanged.items()]
  shown = cells([('key', 'value', 'default')], 'th') + cells(rows)
  folded = f'<table>{cells(rest)}</table>'
  return (
    f'<table>{shown}</table>\n<details><summary>{len(rest)} keys at their default</summary>\n'
    f'{folded}</details>'
  )


def class_table(classes: Sequence[tuple[str, ...]]) -> str:
  """Returns the HTML of a table of the first `SHOWN` classes, and of a folded table of the others.

  Args:
    classes: `(class, precision, recall, F1, images)` of each class, as text.
  """
  head = ('class', 'precision', 'recall', 'F1', 'images')
  rows = [tuple(map(escape, row)) for row in classes]
  shown = f'<table>{cells([head], "th")}{cells(rows[:SHOWN])}</table>'
  if len(rows) <= SHOWN:
    return shown
  folded = f'<table>{cells([head], "th")}{cells(rows[SHOWN:])}</table>'
  return f'{shown}\n<details><summary>{len(rows) - SHOWN:,} more</summary>\n{folded}</details>'


def html_table(rows: Iterable[tuple[str, str]]) -> str:
  """Returns the HTML of a table with two columns; `rows` are `(name, value)` in plain text."""
  return f'<table>{cells((escape(name), escape(value)) for name, value in rows)}</table>'


def cells(rows: Iterable[tuple[str, ...]], tag: str = 'td') -> str:
  """Returns the HTML of table rows.

  Args:
    rows: the cells of each row, which must already be HTML.
    tag: HTML tag of the cells, `td` or `th`.
  """
  line = lambda row: ''.join(f'<{tag}>{cell}</{tag}>' for cell in row)
  return '\n'.join(f'<tr>{line(row)}</tr>' for row in rows)


def escape(text: object) -> str:
  """Converts a value to text, and escapes the text for HTML and for HTML attributes."""
  return html.escape(str(text), quote=True)
