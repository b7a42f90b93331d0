"""Draws all figures of a run or of published weights, and writes `figures/*.png` and `report.html`.

Decisions:
  * If the data for a figure is missing, the figure is skipped. The report gives the reason.
"""

from collections.abc import Iterable
import logging
import pathlib

from vit_jax import progress, storage
from vit_jax.figures import facts
from vit_jax.figures.canvas import save_figure
from vit_jax.figures.maps import Missing
from vit_jax.figures.pictures import PICTURES
from vit_jax.figures.report import SIGNATURE, Picture, Report, write_report
from vit_jax.figures.subject import collect
from vit_jax.opening import Request

log = logging.getLogger(__name__)


def visualize(
  request: Request,
  images: str | Iterable[str | pathlib.Path] | None = None,
  out: pathlib.Path | None = None,
) -> list[pathlib.Path]:
  """Draws every figure whose data is available, and writes a report with these figures.

  Args:
    request: which training run, finished or not, or which published weights to draw.
    images: images to draw: files, folders and patterns, as in `find_images`. None for a few test
      images of the run.
    out: output folder; None for the workdir of the request.

  Returns:
    The paths of the written files. The report is the last one.

  Raises:
    ValueError: there is nothing to draw, no image can be read, or the config contradicts the
      weights. The error is also raised if the output folder cannot be used, or has figures that
      `visualize` did not write.
  """
  workdir = request.workdir
  if out:
    check_own(out)
  out = out or workdir
  folder = out / 'figures'
  storage.check_folder(folder)
  subject = collect(request, images)
  folder.mkdir(parents=True, exist_ok=True)
  drawn, left_out = [], {}
  for name, (title, picture) in progress.bar(PICTURES.items(), 'Drawing', 'picture', len(PICTURES)):
    path = folder / f'{name}.png'
    try:
      figure, caption = picture(subject)
    except Missing as reason:
      log.info('Skipped %s: %s', path.name, reason)
      left_out[title] = str(reason)
      path.unlink(missing_ok=True)  # an earlier call may have drawn this figure
      continue
    save_figure(figure, path)
    drawn.append(Picture(path, title, caption))
  page = out / 'report.html'
  report = Report(
    request.name,
    facts.describe(subject),
    facts.numbers(subject, workdir),
    *facts.config_differences(subject, workdir),
    drawn,
    left_out,
    facts.class_rows(subject),
  )
  write_report(page, report)
  return [picture.path for picture in drawn] + [page]


def check_own(out: pathlib.Path) -> None:
  """Raises ValueError if a folder contains a report or figures that `visualize` has not written."""
  page = out / 'report.html'
  if page.is_file() and SIGNATURE in page.read_text(encoding='utf-8', errors='replace'):
    return
  for path in (page, *(out / 'figures' / f'{name}.png' for name in PICTURES)):
    if path.exists():
      raise ValueError(
        f'{path} already exists and was not written by --mode=visualize. Choose a different folder.'
      )
