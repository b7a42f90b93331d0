"""Reads and writes the files that a run keeps on disk."""

from vit_jax.workdir.audit import check_untrained, open_validation, report_mistakes
from vit_jax.workdir.calibration import Calibration, forget_calibrations, save_calibration
from vit_jax.workdir.checkpoint import Checkpoints, intact
from vit_jax.workdir.items import digest
from vit_jax.workdir.lock import discard, held
from vit_jax.workdir.restoring import restore_state
from vit_jax.workdir.stored import (
  latest_step,
  load_checkpoint,
  newest_config,
  restore_item,
  restore_weights,
  saved_steps,
  set_aside_damaged,
)
from vit_jax.workdir.trained import (
  Task,
  TrainingFiles,
  find_training_files,
  leave_out_trained,
  training_files_of,
)
from vit_jax.workdir.writer import DETAILS, Silent, Writer, read_json, read_metrics, write_json

__all__ = [
  'DETAILS',
  'Calibration',
  'Checkpoints',
  'Silent',
  'Task',
  'TrainingFiles',
  'Writer',
  'check_untrained',
  'digest',
  'discard',
  'find_training_files',
  'forget_calibrations',
  'held',
  'intact',
  'latest_step',
  'leave_out_trained',
  'load_checkpoint',
  'newest_config',
  'open_validation',
  'read_json',
  'read_metrics',
  'report_mistakes',
  'restore_item',
  'restore_state',
  'restore_weights',
  'save_calibration',
  'saved_steps',
  'set_aside_damaged',
  'training_files_of',
  'write_json',
]
