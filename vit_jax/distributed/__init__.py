"""Processes, devices, and the placement of arrays on devices."""

from vit_jax.distributed.backend import (
  Target,
  compiled_for,
  needed,
  portable,
  target,
)
from vit_jax.distributed.children import check_can_start, end_with_parent, unsignalled
from vit_jax.distributed.cluster import (
  TRY_AGAIN,
  Preempted,
  Preemption,
  check_same,
  from_first,
  is_first,
  num_cores,
  to_host,
)
from vit_jax.distributed.devices import few_devices, inference_mesh, make_mesh, shares, start_up
from vit_jax.distributed.joining import joined
from vit_jax.distributed.microbatch import add_up, concatenate, micro_batches
from vit_jax.distributed.peaks import peak_tflops
from vit_jax.distributed.sharding import (
  batch_sharding,
  gather,
  keep_layout,
  layout,
  local_rows,
  place,
  place_params,
  place_rows,
  replicate,
  replicated,
)

__all__ = [
  'TRY_AGAIN',
  'Preempted',
  'Preemption',
  'Target',
  'add_up',
  'batch_sharding',
  'check_can_start',
  'check_same',
  'compiled_for',
  'concatenate',
  'end_with_parent',
  'few_devices',
  'from_first',
  'gather',
  'inference_mesh',
  'is_first',
  'joined',
  'keep_layout',
  'layout',
  'local_rows',
  'make_mesh',
  'micro_batches',
  'needed',
  'num_cores',
  'peak_tflops',
  'place',
  'place_params',
  'place_rows',
  'portable',
  'replicate',
  'replicated',
  'shares',
  'start_up',
  'target',
  'to_host',
  'unsignalled',
]
