"""Draws the figures of a run or of published weights: `figures/*.png` and `report.html`.

Decisions:
  * A figure whose data is missing is skipped. The report gives the reason.
"""

from collections.abc import Iterable
import logging
import pathlib

import jax

from vit_jax import config as config_lib
from vit_jax import progress, storage
from vit_jax.figures.canvas import save_figure
from vit_jax.figures.maps import Missing
from vit_jax.figures.pictures import PICTURES, Subject, grid
from vit_jax.figures.report import Picture, Report, write_report
from vit_jax.figures.subject import collect
from vit_jax.opening import Request
from vit_jax.workdir import read_json

log = logging.getLogger(__name__)


def visualize(
  request: Request,
  images: str | Iterable[str | pathlib.Path] | None = None,
  out: pathlib.Path | None = None,
) -> list[pathlib.Path]:
  """Draws every figure whose data is available and returns the files, with the report last.

  Args:
    request: a training run, finished or not, or published weights.
    images: paths of image files and folders to draw; None for a few test images of the run.
    out: output folder; the workdir by default.

  Raises:
    ValueError: there is nothing to draw, the output folder cannot be used, no image can be read,
      or the config contradicts the weights.
  """
  workdir = request.workdir
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
      path.unlink(missing_ok=True)  # an earlier call may have drawn it
      continue
    save_figure(figure, path)
    drawn.append(Picture(path, title, caption))
  page = out / 'report.html'
  changed, unchanged = config_differences(subject, workdir)
  facts = numbers(subject, workdir)
  about = (request.name, describe(subject), facts, changed, unchanged, drawn, left_out)
  write_report(page, Report(*about))
  return [picture.path for picture in drawn] + [page]


def describe(subject: Subject) -> str:
  """Returns one line that describes the model."""
  if isinstance(subject.exp, Missing):
    return 'Vision Transformer, no checkpoint yet'
  model, (height, width, _) = subject.exp.model, subject.exp.image_shape
  h, w = grid(subject.exp)
  return (
    f'Vision Transformer, {model.depth} blocks of width {model.width}, {model.num_heads} heads, '
    f'for images of {height} x {width} pixels in {h} x {w} patches'
  )


RESULT = {  # key in `result.json`: (name in the report, format)
  'test_accuracy': ('test accuracy', '{:.2%}'),
  'test_loss': ('test loss', '{:.4f} nats'),
  'examples': ('test images', '{:,}'),
  'steps': ('training steps', '{:,}'),
  'seconds': ('seconds, including compilation', '{:,.0f}'),
}


def numbers(subject: Subject, workdir: pathlib.Path | None) -> dict[str, str]:
  """Returns the run's results as text; for an unfinished run, the latest metrics."""
  found = {}
  lines = [] if isinstance(subject.lines, Missing) else subject.lines
  last = lines[-1]['step'] if lines else 0
  tested = [line for line in lines if line['split'] == 'test' and 'accuracy' in line]
  result = (read_json(workdir / 'result.json') if workdir else None) or {}
  result = {key: value for key, value in result.items() if isinstance(value, (int, float))}
  if result.get('steps', -1) >= last:  # otherwise training was resumed after this result
    known = [(result[key], *text) for key, text in RESULT.items() if key in result]
    found = {name: form.format(value) for value, name, form in known}
  elif lines:
    found['training steps'] = f'{last:,}, not finished'
    if tested:
      found['test accuracy'] = f'{tested[-1]["accuracy"]:.2%} after step {tested[-1]["step"]:,}'
  if subject.step is not None:
    found['checkpoint shown'] = f'step {subject.step:,}'
  if not isinstance(subject.params, Missing):
    classes = len(subject.exp.task.class_names)
    found['parameters'] = f'{sum(leaf.size for leaf in jax.tree.leaves(subject.params)):,}'
    found['classes'] = f'{classes:,}' if classes else 'none: the weights have no head'
  return found


def config_differences(
  subject: Subject, workdir: pathlib.Path | None
) -> tuple[list[tuple[str, object, object]], dict[str, object]]:
  """Returns the config keys whose values differ from the default, and the unchanged keys.

  Returns:
    A list of `(key, value, default)` for the changed keys, and `{key: value}` of the others.
  """
  default = config_lib.flatten(config_lib.default_config())
  if not isinstance(subject.exp, Missing):
    config = config_lib.flatten(subject.exp.config)
  else:
    config = config_lib.flatten(read_json(workdir / 'config.json') or {})
  changed = [
    (key, value, default.get(key)) for key, value in config.items() if value != default.get(key)
  ]
  return changed, {key: value for key, value in config.items() if value == default.get(key)}
