"""Exports trained or published weights for other code bases, or as self-contained programs."""

import contextlib
import logging
import pathlib
import tempfile

from vit_jax import inherit, storage
from vit_jax.inference import card
from vit_jax.model import ViT
from vit_jax.names import choose, local
from vit_jax.weights import (
  FORMATS,
  Preprocessing,
  adapt,
  check_params,
  flatten_params,
  load_json,
  read_weights,
  square_grid,
)
from vit_jax.workdir import Calibration

log = logging.getLogger(__name__)

MANY = 10_000_000  # number of parameters above which writing takes a few seconds


def export(
  path: str | pathlib.Path,
  format: str,
  out: pathlib.Path,
  step: str = 'last',
  zero_shot: pathlib.Path | None = None,
) -> list[pathlib.Path]:
  """Reads the weights at `path`, and writes them and a model card into the folder `out`.

  Args:
    path: a workdir, a file, a folder or a name on the Hub; anything that `vit_jax.load` reads.
    format: one of `FORMATS`.
    out: output folder, created if it is missing. An earlier export in this folder is replaced,
      including the model card.
    step: checkpoint of a workdir to export: `best`, `last`, a number, or '' to choose as `predict`
      does by default.
    zero_shot: npz file with text embeddings of the classes, for weights of CLIP or SigLIP.

  Returns:
    All files in the folder.

  Raises:
    ValueError: the weights cannot be read, the format cannot hold them, or the folder is not
      writable or holds other files that must be kept.
  """
  choose('format', format, FORMATS)
  storage.check_folder(out)
  check_card(out)
  found = read_weights(path, step)
  loaded = adapt(found)
  if zero_shot:
    loaded = inherit.with_classes(loaded, inherit.open_classes(zero_shot))
  count = sum(leaf.size for leaf in flatten_params(loaded.params).values())
  if count > MANY:
    log.info('Writing %s parameters as %s ...', f'{count:,}', format)
  save(
    loaded.model,
    loaded.params,
    out,
    format=format,
    preprocessing=loaded.preprocessing,
    class_names=loaded.class_names,
    calibration=loaded.calibration,
    card=card.write_card(format, loaded, str(path), result(found.origin)),
  )
  return sorted(out.iterdir())


def check_card(out: pathlib.Path) -> None:
  """Raises ValueError if a folder has a README.md that was not written by an export."""
  file = out / card.NAME
  if file.is_file() and card.SIGNATURE not in file.read_text(encoding='utf-8', errors='replace'):
    raise ValueError(
      f'{file} already exists and was not written by an export. Choose a different folder.'
    )


def result(origin: str) -> dict | None:
  """Reads `result.json` of a workdir; returns None if it does not exist."""
  file = pathlib.Path(origin) / 'result.json'
  return load_json(file) if file.is_file() else None


def save(
  model: ViT,
  params: dict,
  folder: str | pathlib.Path,
  *,
  format: str,
  preprocessing: Preprocessing | None = None,
  class_names: tuple[str, ...] | None = None,
  calibration: Calibration | None = None,
  card: str | None = None,
) -> None:
  """Writes weights into a folder in one of `FORMATS`; `load` can read the formats hf, timm and npz.

  Args:
    model: the model.
    params: parameters of the model.
    folder: output folder, created if it is missing; existing files of the same names are replaced
      only after all new files are complete.
    format: one of `FORMATS`.
    preprocessing: how images must be prepared. None for pixels in [-1, 1] and the image size that
      `image_size` returns.
    class_names: names of the classes, in the order of the logits; None to store no names.
    calibration: how logits become probabilities. The programs (StableHLO, ONNX) apply it, and the
      other formats cannot hold it. None for a temperature of 1.
    card: text of the `README.md`; None to write no such file.

  Raises:
    ValueError: the format cannot hold the model; the message lists the attributes that do not fit.
  """
  entry = choose('format', format, FORMATS)
  if not isinstance(model, ViT):
    kind = type(model).__name__
    raise ValueError(
      f'save: expected (model, params, folder), got a value of type {kind} as the model.'
    )
  folder = local(folder)
  preprocessing = preprocessing or Preprocessing(image_size(model, params), stretch=True)
  check_params(model, params, preprocessing.size, 'save')
  if class_names is not None and len(class_names) != model.num_classes:
    raise ValueError(
      f'save: got {len(class_names)} class names for {model.num_classes} classes: give one each.'
    )
  storage.check_folder(folder)
  with storage.writing(folder), contextlib.ExitStack() as stack:
    if not folder.exists():
      folder.mkdir(parents=True)
      stack.callback(remove_empty, folder)
    temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix='.writing_', dir=folder))
    last = (calibration or Calibration(),) if entry.is_program else ()
    entry.save(model, params, pathlib.Path(temporary), preprocessing, class_names, *last)
    if card is not None:
      (pathlib.Path(temporary) / 'README.md').write_text(
        card, encoding='utf-8', errors='backslashreplace'
      )
    files = sorted(pathlib.Path(temporary).iterdir())
    check_free(folder, [file.name for file in files])
    for file in files:
      file.replace(folder / file.name)


def remove_empty(folder: pathlib.Path) -> None:
  """Removes a folder if it is empty."""
  with contextlib.suppress(OSError):
    folder.rmdir()


def check_free(folder: pathlib.Path, names: list[str]) -> None:
  """Raises ValueError if a folder holds a run, or weights other than the files to be written."""
  runs = [name for name in ('checkpoints', 'metrics.jsonl') if (folder / name).exists()]
  patterns = {pattern for entry in FORMATS.values() for pattern in entry.files}
  kept = {file.name for pattern in patterns for file in folder.glob(pattern)}
  if others := runs + sorted(kept - set(names)):
    held = ', '.join(others)
    raise ValueError(f'{folder} already holds {held}. Choose another folder, or an empty one.')


def image_size(model: ViT, params: dict) -> tuple[int, int]:
  """Returns the size (height, width) in pixels of the images that learned positions are for.

  The size follows from the model's `learned_grid`. If this is None, a square image is assumed.

  Raises:
    ValueError: the positions are not learned, or their grid is unknown and not square.
  """
  if 'pos_embedding' not in params:
    raise ValueError(
      f'model.position={model.position!r} does not determine the image size. '
      'Pass the argument preprocessing, which contains the image size.'
    )
  grid = model.learned_grid or square_grid(params['pos_embedding'].shape[1] - model.num_positions)
  if grid is None:
    raise ValueError(
      'The position embeddings do not form a square grid. Pass the argument preprocessing, '
      'which contains the image size.'
    )
  return grid[0] * model.patch_size[0], grid[1] * model.patch_size[1]
