"""Defines `--mode=eval`."""

import signal

from vit_jax.cli.flags import CLUSTER, CONFIG, STEP, WORKDIR, Mode, request_of
from vit_jax.names import one_line


def run_eval(args) -> None:
  from vit_jax.distributed import is_first, joined
  from vit_jax.evaluation import evaluate_checkpoint

  with joined(args.coordinator, args.num_processes, args.process_id):
    # JAX intercepts SIGTERM, so that training can save a checkpoint. Evaluation ends at once.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    result = evaluate_checkpoint(request_of(args))
    if is_first():
      classes = result.pop('per_class', {})
      print(', '.join(f'{name} {value:.9g}' for name, value in result.items()))
      for name, row in classes.items():  # only if images can have several labels
        print(
          f'{one_line(name)}: average precision {row["average_precision"]:.4f}, F1 '
          f'{row["f1"]:.4f} at probability {row["threshold"]:g}, {row["support"]:,} images'
        )


MODE = Mode(
  'measures the accuracy of a checkpoint on the test split',
  '--workdir=runs/digits --step=last',
  (WORKDIR, STEP, CONFIG, *CLUSTER),
  run_eval,
)
