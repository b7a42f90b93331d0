"""Measures exported programs: size of the files, latency, and accuracy on the evaluation split.

Decisions:
  * The accuracy is computed as in `--mode=eval`, but the logits come from the exported program. So
    the accuracy includes the effect of the conversion.
  * A zero-shot program has the classes of its text embeddings (`--classes`). As in `--mode=eval`,
    its logits are first reduced to the classes of the data, in the order of the data.
  * The latency of a program is its median time for a batch of one image. The programs take turns,
    so that other work on the machine slows all programs equally. Each turn has several calls. The
    first call of a turn does not count, because threads of the previous program can still be busy.
"""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import logging
import os
import pathlib
import platform
import statistics
import time

import jax
import numpy as np

from vit_jax import opening
from vit_jax.data import Split, open_source, open_split
from vit_jax.distributed import inference_mesh
from vit_jax.evaluation import load_split, open_test, quality, score_examples
from vit_jax.experiment import Experiment
from vit_jax.names import choose
from vit_jax.opening import Request
from vit_jax.weights import Program, find_checkpoint

log = logging.getLogger(__name__)

Run = Callable[[np.ndarray], np.ndarray]  # uint8 `image_BHWC` to float32 `logits_BL`

# Config keys that an export reads, to load the images for calibration and measurement.
READ = (
  'data.source', 'data.dir', 'data.train_split', 'data.val_split', 'data.eval_split', 'data.cache',
  'data.skip_bad_images', 'data.threads', 'data.workers', 'eval_batch_size',
)  # fmt: skip
CALIBRATION = 512  # maximum number of sample images for measuring ranges of activations
PART = 32  # images that a program takes at a time, because it cannot divide a batch to fit memory
NOTABLE = 0.01  # a warning is logged if the accuracy (0 to 1) falls by more than this amount
TURNS, CALLS = 10, 10  # maximum number of turns of each program, and calls in a turn
LONGEST = 30.0  # seconds after which no new turn begins


@dataclasses.dataclass(frozen=True)
class Measured:
  """Measurements of a program.

  Attributes:
    size: size in bytes of the program's files, without the model card.
    seconds: median time for a batch of one image.
    quality: accuracy, 0 to 1; if images can have several labels, the mean average precision. None
      if there are no test images.
  """

  size: int
  seconds: float
  quality: float | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Measurements of a program in several precisions, for the model card of an export.

  Attributes:
    found: `{name of the precision: measurements}`, float32 first, and the precision of
      the export last.
    machine: description of the machine on which the latency was measured.
    test: the images on which the quality was measured, as text; empty if it was not measured.
    calibrated: number of sample images on which ranges of activations were measured; 0 if the
      precision needs none.
  """

  found: Mapping[str, Measured]
  machine: str
  test: str
  calibrated: int


def check_overrides(overrides: Mapping[str, str], measures: bool) -> None:
  """Raises ValueError if a user overrides config keys that an export does not read.

  Args:
    overrides: config keys and their values as text.
    measures: whether this export reads images. An export in float32 reads no images and therefore
      no config keys.
  """
  for key in overrides:
    choose('--mode=export: config key', key, READ)
  if overrides and not measures:
    raise ValueError(
      f'--config.{next(iter(overrides))} has no effect: an export in float32 reads no images. '
      'Remove this flag, or choose a --precision such as fp16, which is measured on images.'
    )


def open_experiment(
  path: str | pathlib.Path,
  step: str,
  overrides: Mapping[str, str],
  zero_shot: pathlib.Path | None = None,
) -> Experiment | None:
  """Opens the experiment of exported weights, with the dataset of the sample and test images.

  If the weights come from a run, the run's config names the dataset. Published weights do not name
  a dataset, so `overrides` must set `data.source`. Without this override, the result is None.

  Args:
    path: anything that `vit_jax.load` reads.
    step: checkpoint of a workdir: `best`, `last` or a number. If empty, chosen as in `Request`.
    overrides: config keys and their values as text.
    zero_shot: npz file with text embeddings of the classes, as in `Request`.

  Raises:
    ValueError: the weights do not exist, or the overrides do not fit them.
  """
  if found := find_checkpoint(path, step):
    workdir, step = found
    return opening.open_model(Request(workdir, step=step, overrides=overrides), 'any')[0]
  if 'data.source' not in overrides:
    return None
  request = Request(init=str(path), overrides=overrides, zero_shot=zero_shot)
  if zero_shot:  # a dataset with other classes can still give sample images
    with contextlib.suppress(ValueError, OSError):
      return opening.open_model(request, 'data')[0]
  return opening.open_model(request, 'any')[0]


def calibration_images(path: str | pathlib.Path, exp: Experiment | None) -> np.ndarray:
  """Returns sample images, uint8 `[N, H, W, C]`, for the conversion to int8.

  The conversion measures the ranges of activations on these images. The images are spread evenly
  over the validation split, or over the training split if there is no validation split. The dataset
  can have other classes than the model, because the conversion does not use labels.

  Args:
    path: path of the weights, for messages.
    exp: experiment of the weights; None if their dataset is unknown.

  Raises:
    ValueError, OSError: the dataset is unknown or cannot be read, or its images have another number
      of channels than the model.
  """
  if exp is None:
    raise ValueError(
      f'{path}: the chosen --precision needs sample images, but the weights do not name their '
      'dataset. Set --config.data.source, e.g. folder:photos, or choose another --precision.'
    )
  data, size = exp.config.data, exp.task.stored_size
  source = open_source(data.source, data.dir, size)
  if source.channels != exp.task.channels:
    raise ValueError(
      f'The model takes images with {exp.task.channels} channels, but the images in {data.source} '
      f'have {source.channels}. Use a dataset whose images have {exp.task.channels} channel(s).'
    )
  split = data.val_split or data.train_split
  reading = dataclasses.replace(exp.reading, cache='stream')  # decodes only the chosen images
  images = open_split(reading, source, split, size)
  index_N = np.unique(np.linspace(0, len(images) - 1, CALIBRATION).astype(int))
  index_N = index_N[images.readable(index_N)]
  if not len(index_N):
    raise ValueError(f'{data.source}: none of the sampled images of {split} can be read.')
  log.info('Measuring ranges of activations on %d images of %s.', len(index_N), split)
  return images.some(index_N).image_NHWC


def compare(
  program: Program,
  opens: Callable[[pathlib.Path], Run],
  folders: Mapping[str, pathlib.Path],
  exp: Experiment | None,
) -> Comparison:
  """Measures size, latency and accuracy of a program in several precisions.

  A warning is logged if the accuracy of the exported program is more than `NOTABLE` below the
  accuracy in float32.

  Args:
    program: the program.
    opens: `(folder) -> run` opens the written program in a folder.
    folders: `{precision: folder}`, float32 first, and the precision of the export last.
    exp: experiment of the weights; None if their dataset is unknown.
  """
  runs = {name: opens(folder) for name, folder in folders.items()}
  seconds = measure_latency(runs, np.zeros(program.image_shape, np.uint8))
  try:
    scores, about = measure_qualities(program, runs, exp)
  except (ValueError, OSError) as error:  # its message can have local paths, and a card is public
    log.warning('The accuracy of this export is not measured: %s', error)
    scores, about = {}, ''
  found = {n: Measured(folder_size(folders[n]), seconds[n], scores.get(n)) for n in runs}
  count = 0 if program.image_NHWC is None else len(program.image_NHWC)
  return Comparison(found, machine(), about, count)


def measure_qualities(
  program: Program, runs: Mapping[str, Run], exp: Experiment | None
) -> tuple[dict[str, float], str]:
  """Measures each run on the evaluation split, without images that the weights were trained on.

  The arguments are those of `compare`. Returns `{name: result of measure_quality}`, and a text with
  the split and its number of images.

  Raises:
    ValueError, OSError: the dataset is unknown or cannot be read, or its classes are not the
      classes of the model.
  """
  if exp is None or not exp.task.class_names:
    raise ValueError('these weights have no test data or no classes.')
  split = exp.config.data.eval_split
  test = load_split(exp, split, open_test(exp)[0])
  chosen, about = choose_classes(program, exp, f'{len(test):,} images of `{split}`')
  scores = {}
  for name, run in runs.items():
    log.info('Measuring the accuracy of %s ...', name)
    scores[name] = measure_quality(exp, lambda x, run=run: run(x)[:, chosen], test)
  before, *_, after = scores.values()
  if before - after > NOTABLE:
    log.warning('%s: the accuracy falls from %.2f%% to %.2f%%.', name, 100 * before, 100 * after)
  return scores, about


def choose_classes(program: Program, exp: Experiment, about: str) -> tuple[list[int] | slice, str]:
  """Chooses the logits of a program that belong to the classes of the test images.

  `exp` has the classes of the test images, and `about` describes the images. Returns the indices of
  the chosen logits, and the text `about`. If the test images have fewer classes than the program,
  both numbers of classes are appended to `about`.
  """
  own, wanted = program.class_names, exp.task.class_names
  if own is None or own == wanted:
    return slice(None), about
  more = f' ({len(wanted)} of the {len(own)} classes)' if len(wanted) < len(own) else ''
  return [own.index(name) for name in wanted], about + more


def measure_quality(exp: Experiment, run: Run, test: Split) -> float:
  """Returns the accuracy of a program on the split `test`, 0 to 1.

  If images can have several labels, the result is the mean average precision.
  """

  def answer(batch, params):
    image_BHWC = np.asarray(batch['image'])
    parts = [run(image_BHWC[i : i + PART]) for i in range(0, len(image_BHWC), PART)]
    logits_BL = jax.numpy.concatenate(parts)
    rest = {name: array for name, array in batch.items() if name != 'image'}
    return rest | {'logits': logits_BL, 'loss': exp.loss(logits_BL, batch['label'])}

  size = exp.config.eval_batch_size
  return quality(score_examples(answer, {}, test, size, inference_mesh(size)).means())


def measure_latency(programs: Mapping[str, Run], image_HWC: np.ndarray) -> dict[str, float]:
  """Returns the median time in seconds that each program takes for a batch of one image.

  Args:
    programs: the programs by name.
    image_HWC: the image, uint8.
  """
  times, until = {name: [] for name in programs}, time.perf_counter() + LONGEST
  for turn in range(TURNS):
    if turn and time.perf_counter() > until:
      break
    for name, run in programs.items():
      for call in range(CALLS):
        start = time.perf_counter()
        run(image_HWC[None])
        if call:
          times[name].append(time.perf_counter() - start)
  return {name: statistics.median(values) for name, values in times.items()}


def folder_size(folder: pathlib.Path) -> int:
  """Returns the total size of the files in a folder, in bytes."""
  return sum(file.stat().st_size for file in folder.iterdir())


def machine() -> str:
  """Describes the processor of this machine, and its accelerators if JAX uses any, as text."""
  device = jax.devices()[0]
  more = '' if device.platform == 'cpu' else f', {jax.device_count()} x {device.device_kind}'
  return processor() + more


def processor() -> str:
  """Returns the number of cores and the name of the processor, as text."""
  model = platform.processor() or platform.machine()
  cpuinfo = pathlib.Path('/proc/cpuinfo')
  if cpuinfo.exists():
    lines = cpuinfo.read_text(encoding='utf-8').splitlines()
    names = [line for line in lines if line.startswith('model name')]
    model = names[0].split(':')[1].strip() if names else model
  return f'{os.cpu_count()} cores of {model}'
