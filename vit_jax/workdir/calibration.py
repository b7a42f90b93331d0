"""Stores the calibration of each checkpoint in `<workdir>/calibration.json`.

A calibration defines how logits become probabilities. The file maps the step of a checkpoint to
its calibration, because a temperature is valid only for one set of weights.
"""

from collections.abc import Mapping
import dataclasses
import logging
import math
import pathlib

from vit_jax.distributed import from_first, is_first
from vit_jax.workdir.writer import read_json, write_json

log = logging.getLogger(__name__)

NAME = 'calibration.json'


@dataclasses.dataclass(frozen=True)
class Calibration:
  """Settings that turn logits into probabilities, fitted on the validation split.

  Attributes:
    temperature: the logits are divided by this number (Guo et al. 2017, 1706.04599, Section 4.2).
    thresholds: for each class, the smallest probability at which the class is predicted; None for
      models that predict exactly one class.
    examples: number of validation examples; 0 if nothing was fitted.
    sigmoid: True if each image has one label, but the probability of a class is the sigmoid of its
      logit instead of a softmax. This is so in zero-shot classification with SigLIP.
  """

  temperature: float = 1.0
  thresholds: tuple[float, ...] | None = None
  examples: int = 0
  sigmoid: bool = False

  @classmethod
  def load(cls, saved: Mapping | None) -> 'Calibration':
    """Creates a calibration from the key `calibration` of a dict that `load_checkpoint` returns.

    The default calibration is returned if `saved` is None or has no calibration.
    """
    fields = (saved or {}).get('calibration') or {}
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})

  def with_thresholds(self, classes: int) -> 'Calibration':
    """Returns the calibration, or thresholds of 0.5 if none were fitted for this many classes."""
    if len(self.thresholds or ()) == classes:
      return self
    return Calibration(thresholds=(0.5,) * classes)


def find_calibration(workdir: pathlib.Path, step: int, classes: int) -> dict | None:
  """Returns the fields of a checkpoint's `Calibration`; None if no valid one is stored.

  Args:
    workdir: folder of the run.
    step: step of the checkpoint.
    classes: number of classes, which must also be the number of thresholds.
  """
  fields = (read_json(workdir / NAME) or {}).get(str(step))
  if fields is None:
    return None
  known = {field.name for field in dataclasses.fields(Calibration)}
  wrong = 'is damaged'
  if isinstance(fields, dict) and fields.keys() <= known and valid(fields):
    thresholds = fields.get('thresholds')
    if thresholds is None or len(thresholds) == classes:
      return fields
    wrong = f'has {len(thresholds)} thresholds for {classes} classes'
  log.warning(
    '%s: the entry of step %d %s, so it is not used. Run --mode=eval to fit the calibration again.',
    workdir / NAME,
    step,
    wrong,
  )
  return None


def valid(fields: dict) -> bool:
  """Returns whether `temperature` is positive and `thresholds` is None or a list of numbers."""
  number = lambda value: type(value) in (int, float) and math.isfinite(value)
  value, thresholds = fields.get('temperature'), fields.get('thresholds')
  right = thresholds is None or (isinstance(thresholds, list) and all(map(number, thresholds)))
  return right and number(value) and value > 0


def save_calibration(workdir: pathlib.Path, step: int, calibration: Calibration) -> None:
  """Writes the calibration of a checkpoint; only process 0 writes.

  Raises:
    storage.Unwritten: the file cannot be written.
  """
  if is_first():
    entries = read_json(workdir / NAME) or {}
    write_json(workdir / NAME, entries | {str(step): dataclasses.asdict(calibration)})


def forget_calibrations(workdir: pathlib.Path, start: int) -> None:
  """Deletes the calibrations of steps after `start`, because these steps will be trained again."""

  def forget():
    kept = read_json(workdir / NAME)
    if kept is None:
      return
    entries = {k: v for k, v in kept.items() if k.isdecimal() and int(k) <= start}
    if entries != kept:
      write_json(workdir / NAME, entries)

  from_first(forget)
