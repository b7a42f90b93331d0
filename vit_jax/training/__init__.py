"""The train step, the loop around it, and how a run resumes."""

from vit_jax.training.closed_form import classifier_config
from vit_jax.training.compiling import compile_step, estimated
from vit_jax.training.loop import Run, devices_of
from vit_jax.training.resume import (
  add_cycle,
  check_in_all_processes,
  check_same_data,
  check_same_teacher,
  saved_config,
)
from vit_jax.training.state import TrainState, init_state, state_shapes
from vit_jax.training.tracing import (
  OTHER,
  activations,
  forward_flops,
  module_of,
  of_stages,
  runs_teacher,
  work,
)
from vit_jax.training.trainer import train
from vit_jax.training.trial import prepared

__all__ = [
  'OTHER',
  'Run',
  'TrainState',
  'activations',
  'add_cycle',
  'check_in_all_processes',
  'check_same_data',
  'check_same_teacher',
  'classifier_config',
  'compile_step',
  'devices_of',
  'estimated',
  'forward_flops',
  'init_state',
  'module_of',
  'of_stages',
  'prepared',
  'runs_teacher',
  'saved_config',
  'state_shapes',
  'train',
  'work',
]
