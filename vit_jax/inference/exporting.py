"""Exports weights in the formats of other libraries, or as self-contained programs."""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import logging
import pathlib
import tempfile

import numpy as np

from vit_jax import inherit, storage
from vit_jax.bucket import is_remote, to_path
from vit_jax.inference import card, measuring
from vit_jax.model import ViT
from vit_jax.names import choose
from vit_jax.weights import (
  FORMATS,
  Adaptation,
  Format,
  Preprocessing,
  Pretrained,
  Program,
  Weights,
  adapt,
  check_params,
  flatten_params,
  load_json,
  read_weights,
  square_grid,
)
from vit_jax.workdir import Calibration

log = logging.getLogger(__name__)

MANY = 10_000_000  # exports with more parameters are announced in the log
EXACT = 'float32'  # the precision that every format has; the other precisions are approximate


def export(
  path: str | pathlib.Path,
  format: str,
  out: pathlib.Path,
  step: str = 'last',
  precision: str = EXACT,
  overrides: Mapping[str, str] | None = None,
  zero_shot: pathlib.Path | None = None,
) -> list[pathlib.Path]:
  """Reads the weights at `path`, and writes them and a model card into the folder `out`.

  If the precision is not float32, the written program is compared with the float32 program: size,
  latency and, if there are test images, accuracy. The model card reports the comparison.

  Args:
    path: a workdir, a file, a folder or a name on the Hub; anything that `vit_jax.load` reads.
    format: one of `FORMATS`.
    out: output folder, created if it is missing. An earlier export in this folder is replaced,
      including its model card.
    step: which checkpoint of a workdir to export, `best`, `last` or a number. Empty: the checkpoint
      with the best validation accuracy, or the last checkpoint if no accuracy was measured.
    precision: `float32`, or one of the format's `precisions`.
    overrides: config keys, which must be in `measuring.READ`, and their values as text. For
      example, set `data.dir` if the images have been moved since training.
    zero_shot: npz file with text embeddings of the classes, for weights of CLIP or SigLIP.

  Returns:
    The paths of all files in the output folder, sorted.

  Raises:
    ValueError: the weights cannot be read, or the format cannot hold them. Or the format lacks the
      precision, or sample images for the precision are missing. Or the output folder is not
      writable, or contains files that an export must not replace.
  """
  entry, overrides = choose('format', format, FORMATS), overrides or {}
  check_precision(format, precision)
  measuring.check_overrides(overrides, precision != EXACT)
  storage.check_folder(out)
  check_card(out, entry)
  found = read_weights(path, step)
  loaded = adapt(found, expected_grid(found))
  if zero_shot:
    loaded = inherit.with_classes(loaded, inherit.open_classes(zero_shot))
  count = sum(leaf.size for leaf in flatten_params(loaded.params).values())
  if count > MANY:
    log.info('Writing %s parameters as %s ...', f'{count:,}', format)
  program, data = program_of(loaded), None
  if precision != EXACT:
    data = measuring.open_experiment(path, step, overrides, zero_shot)
    if entry.precisions[precision].calibrates:
      program = dataclasses.replace(program, image_NHWC=measuring.calibration_images(path, data))
  with delivered(out, entry) as folder, tempfile.TemporaryDirectory() as scratch:
    folders = write(entry, program, precision, folder, pathlib.Path(scratch))
    compared = measuring.compare(program, entry.opens, folders, data) if len(folders) > 1 else None
    text = card.write_card(format, loaded, str(path), result(found.origin), compared)
    (folder / card.NAME).write_text(text, encoding='utf-8', errors='backslashreplace')
  return sorted(out.iterdir())


def expected_grid(found: Weights) -> Adaptation:
  """Returns the `Adaptation` that resizes position embeddings to the size of the preprocessing.

  In DINOv2, they are for larger images. `predict` also resizes them. If the preprocessing has no
  known size, the `Adaptation` resizes nothing.
  """
  size, model = found.preprocessing.size, ViT(**found.fields)
  to = Adaptation(tuple(n // p for n, p in zip(size, model.patch_size)) if np.any(size) else None)
  if model.position == 'learned' and to.grid and found.grid not in (None, to.grid):
    log.warning(
        'The position embeddings for %dx%d patches are resized (%s) to %dx%d patches, for the '
        'image size of the preprocessing. To keep them, use vit_jax.load and vit_jax.save.',
        *found.grid, to.resize, *to.grid,
    )  # fmt: skip
  return to


def check_precision(format: str, precision: str) -> None:
  """Raises ValueError if a format does not offer a precision."""
  choose(f'precision for the format {format}', precision, (EXACT, *FORMATS[format].precisions))


def program_of(loaded: Pretrained) -> Program:
  """Converts loaded weights to a `Program`, the input of `write`."""
  facts = loaded.preprocessing, loaded.class_names, loaded.calibration
  return Program(loaded.model, loaded.params, *facts)


def check_card(out: pathlib.Path, entry: Format) -> None:
  """Raises ValueError if a folder has a README.md or weights that were not written by an export.

  An earlier export is recognised by the text `card.SIGNATURE` in its README.md.
  """
  file = out / card.NAME
  if file.is_file() and card.SIGNATURE in file.read_bytes().decode('utf-8', 'replace'):
    return
  written = card.NAME, *entry.files, 'config.json', 'preprocessor_config.json', 'model.json'
  for found in [path for pattern in written for path in sorted(out.glob(pattern))]:
    raise ValueError(
      f'{found} already exists and was not written by an export. Choose a different folder.'
    )


def result(origin: str) -> dict | None:
  """Returns the contents of `result.json` in a workdir; None if the file does not exist."""
  file = to_path(origin) / 'result.json'
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
  precision: str = EXACT,
  images: np.ndarray | None = None,
) -> None:
  """Writes weights into a folder in one of `FORMATS`; `load` can read the formats hf, timm and npz.

  Args:
    model: the model.
    params: parameters of the model.
    folder: output folder, created if it is missing. Existing files with the same names are
      replaced only after all new files are complete.
    format: one of `FORMATS`.
    preprocessing: how images must be prepared. None: pixels are scaled to [-1, 1], and images are
      stretched to `image_size`; a warning says so.
    class_names: names of the classes, in the order of the logits; None to store no names.
    calibration: settings that turn logits into probabilities. Programs (StableHLO, ONNX) apply all
      settings; hf stores only whether there are thresholds. None: a temperature of 1.
    precision: `float32`, or one of the format's `precisions`.
    images: sample images, uint8 `[N, H, W, C]`. The conversion to `int8` measures the ranges of
      activations on these images. Other precisions do not use sample images.

  Raises:
    ValueError: the format cannot hold the model; the message lists the attributes that do not fit.
      Or the format lacks the precision, or sample images are missing or have the wrong shape.
  """
  entry = choose('format', format, FORMATS)
  check_precision(format, precision)
  if not isinstance(model, ViT):
    kind = type(model).__name__
    raise ValueError(
      f'save: expected (model, params, folder), got a value of type {kind} as the model.'
    )
  folder = to_path(folder)
  if preprocessing is None:
    preprocessing = Preprocessing(image_size(model, params), stretch=True)
    log.warning(
      'save: without preprocessing, the files say that images are stretched to %dx%d, and pixels '
      'scaled to [-1, 1]. For loaded weights, pass preprocessing=loaded.preprocessing.',
      *preprocessing.size,
    )
  check_params(model, params, preprocessing.size, 'save')
  facts = preprocessing, class_names, calibration or Calibration()
  program = Program(model, params, *facts, image_NHWC=images)
  program.check('save')
  if precision != EXACT and entry.precisions[precision].calibrates:
    program.check_images('save')
  storage.check_folder(folder)
  with delivered(folder, entry) as temporary, tempfile.TemporaryDirectory() as scratch:
    write(entry, program, precision, temporary, pathlib.Path(scratch))


def write(
  entry: Format, program: Program, precision: str, folder: pathlib.Path, scratch: pathlib.Path
) -> dict[str, pathlib.Path]:
  """Writes weights or a program in one format and precision.

  Args:
    entry: the format.
    program: model, weights and preprocessing.
    precision: `float32`, or one of the format's `precisions`.
    folder: output folder.
    scratch: empty folder for the float32 files from which a different precision is converted.

  Returns:
    `{precision: folder}` for each written precision, float32 first.
  """
  exact = folder if precision == EXACT else scratch
  if not entry.is_program:
    p = program
    labels = {'multi_label': p.calibration.thresholds is not None} if entry.holds_labels else {}
    entry.save(p.model, p.params, exact, p.preprocessing, p.class_names, **labels)
    return {EXACT: exact}
  entry.save(program, exact)
  if precision == EXACT:
    return {EXACT: exact}
  entry.precisions[precision].convert(program, exact, folder)
  return {EXACT: exact, precision: folder}


@contextlib.contextmanager
def delivered(folder: pathlib.Path, entry: Format) -> Iterator[pathlib.Path]:
  """Context manager that yields a temporary folder, and then moves its files into `folder`.

  Raises:
    ValueError: `folder` contains a run, or weights that are not an earlier export in this format.
  """
  check_free(folder, [file.name for pattern in entry.files for file in folder.glob(pattern)])
  if is_remote(folder):
    with tempfile.TemporaryDirectory() as temporary:
      yield pathlib.Path(temporary)
      files = sorted(pathlib.Path(temporary).iterdir())
      check_free(folder, [file.name for file in files])
      storage.upload(files, folder)
    return
  with storage.writing(folder), contextlib.ExitStack() as stack:
    if not folder.exists():
      folder.mkdir(parents=True)
      stack.callback(remove_empty, folder)
    temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix='.writing_', dir=folder))
    yield pathlib.Path(temporary)
    files = sorted(pathlib.Path(temporary).iterdir())
    check_free(folder, [file.name for file in files])
    for file in files:
      if file.suffix == '.onnx':  # an earlier export may have left a file of weights
        (folder / f'{file.name}.data').unlink(missing_ok=True)
      file.replace(folder / file.name)


def remove_empty(folder: pathlib.Path) -> None:
  """Removes a folder if it is empty."""
  with contextlib.suppress(OSError):
    folder.rmdir()


def check_free(folder: pathlib.Path, names: list[str]) -> None:
  """Raises ValueError if a folder contains a run, or weight files that the export does not replace.

  `names` are the names of the files that the export writes.
  """
  runs = [name for name in ('checkpoints', 'metrics.jsonl') if (folder / name).exists()]
  patterns = {pattern for entry in FORMATS.values() for pattern in entry.files}
  kept = {file.name for pattern in patterns for file in folder.glob(pattern)}
  replaced = {f'{name}{end}' for name in names for end in ('', '.data')}
  if others := runs + sorted(kept - replaced):
    held = ', '.join(others)
    raise ValueError(f'{folder} already holds {held}. Choose an empty folder.')


def image_size(model: ViT, params: dict) -> tuple[int, int]:
  """Returns the image size, (height, width) in pixels, that fits the learned position embeddings.

  The size follows from the model's `learned_grid`. If `learned_grid` is None, the grid is square.

  Raises:
    ValueError: there are no learned positions, or `learned_grid` is None and no square grid fits.
  """
  grid = model.learned_grid
  if grid is None and 'pos_embedding' in params:
    grid = square_grid(params['pos_embedding'].shape[1] - model.num_positions)
  if grid is None:
    raise ValueError(
      'The weights do not determine the image size, because they have no learned positions on a '
      f'square grid (model.position={model.position!r}). Pass preprocessing=...'
    )
  return grid[0] * model.patch_size[0], grid[1] * model.patch_size[1]
