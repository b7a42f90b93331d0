"""Processes, devices, and the placement of arrays on devices."""

from vit_jax.distributed.agreement import Agreement
from vit_jax.distributed.backend import (
  Target,
  compiled_for,
  needed,
  portable,
  target,
)
from vit_jax.distributed.children import check_can_start, end_with_parent, unsignalled
from vit_jax.distributed.cluster import (
  Preempted,
  Preemption,
  check_same,
  from_all,
  from_first,
  is_first,
  is_shared,
  num_cores,
  to_host,
  together,
)
from vit_jax.distributed.devices import (
  few_devices,
  inference_mesh,
  make_mesh,
  shares,
  smallest_batch,
  splits,
  start_up,
)
from vit_jax.distributed.fitted import Fitted
from vit_jax.distributed.joining import joined
from vit_jax.distributed.memory import SHARE, first_fit, memory_limit, needed_bytes
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
  size_on_device,
)

__all__ = [
  'SHARE',
  'Agreement',
  'Fitted',
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
  'first_fit',
  'from_all',
  'from_first',
  'gather',
  'inference_mesh',
  'is_first',
  'is_shared',
  'joined',
  'keep_layout',
  'layout',
  'local_rows',
  'make_mesh',
  'memory_limit',
  'micro_batches',
  'needed',
  'needed_bytes',
  'num_cores',
  'peak_tflops',
  'place',
  'place_params',
  'place_rows',
  'portable',
  'replicate',
  'replicated',
  'shares',
  'size_on_device',
  'smallest_batch',
  'splits',
  'start_up',
  'target',
  'to_host',
  'together',
  'unsignalled',
]
