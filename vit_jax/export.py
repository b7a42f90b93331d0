"""Trained or published weights, written for others: other code bases, or none."""

import logging
import pathlib

from vit_jax import card, output, pretrained
from vit_jax import weights as weights_lib
from vit_jax.names import choose

log = logging.getLogger(__name__)

MANY = 10_000_000  # parameters: with more, writing takes some seconds


def run(
  path: str | pathlib.Path, format: str, out: pathlib.Path, step: str = 'last'
) -> list[pathlib.Path]:
  """Writes the weights at `path` (all that `pretrained.load` reads) into the folder `out`.

  Args:
    path: a workdir, a file or a name on the Hub.
    format: one of `pretrained.FORMATS`.
    out: made where it is missing; an earlier export in it is replaced, its model card too.
    step: which checkpoint of a workdir, as in `checkpoint.preferred`.

  Returns:
    The files there.

  Raises:
    ValueError: weights that can't be read, or that the format can't hold, or a folder that can't
      be written into or has something else in it.
  """
  choose('format', format, pretrained.FORMATS)
  output.check_folder(out)
  check_card(out)
  found = pretrained.read(path, step)
  loaded = pretrained.adapt(found, tokens=False)
  count = sum(leaf.size for leaf in weights_lib.flatten(loaded.params).values())
  if count > MANY:
    log.info('Writing %s parameters as %s ...', f'{count:,}', format)
  pretrained.save(
    loaded.model,
    loaded.params,
    out,
    format=format,
    preprocessing=loaded.preprocessing,
    class_names=loaded.class_names,
    card=card.write(format, loaded, str(path), result(found.origin)),
  )
  return sorted(out.iterdir())


def check_card(out: pathlib.Path) -> None:
  """Raises ValueError where a folder has a README.md that is not of an export."""
  file = out / card.NAME
  if file.is_file() and card.SIGNATURE not in file.read_text(encoding='utf-8', errors='replace'):
    raise ValueError(
      f'{file} is there already, and no model card of an export: give another folder.'
    )


def result(origin: str) -> dict | None:
  """`result.json` of a workdir; None where there is none."""
  file = pathlib.Path(origin) / 'result.json'
  return weights_lib.read_json(file) if file.is_file() else None
