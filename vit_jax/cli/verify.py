"""Defines `--mode=verify`."""

import logging

from vit_jax.cli.flags import CLUSTER, WORKDIR, Mode

log = logging.getLogger(__name__)


def run_verify(args) -> int | None:
  from vit_jax.distributed import Preempted, is_first, joined
  from vit_jax.profiling import verify
  from vit_jax.storage import TRY_AGAIN

  with joined(args.coordinator, args.num_processes, args.process_id):
    try:
      found = verify(args.workdir, args.overrides)
    except Preempted as error:
      log.info('%s', error)
      return TRY_AGAIN
    if is_first():
      print(found.text)
  return None if found.same else 1


MODE = Mode(
  'repeats the steps between the two newest checkpoints, and compares the result bit for bit with '
  'the newest checkpoint',
  '--workdir=runs/digits',
  (WORKDIR, *CLUSTER),
  run_verify,
  overrides=True,
)
