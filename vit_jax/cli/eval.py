"""Defines `--mode=eval`."""

import signal

from vit_jax.cli.flags import CLUSTER, CONFIG, STEP, WORKDIR, Mode, request_of


def run_eval(args) -> None:
  from vit_jax.distributed import is_first, joined
  from vit_jax.evaluation import evaluate_checkpoint

  with joined(args.coordinator, args.num_processes, args.process_id):
    # JAX intercepts SIGTERM, so that training can save a checkpoint. Evaluation ends at once.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    result = evaluate_checkpoint(request_of(args))
    if is_first():
      print(', '.join(f'{name} {value:.9g}' for name, value in result.items()))


MODE = Mode(
  'measures the accuracy of a checkpoint on the test split',
  '--workdir=runs/digits --step=last',
  (WORKDIR, STEP, CONFIG, *CLUSTER),
  run_eval,
)
