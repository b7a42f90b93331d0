"""Defines `--mode=train`."""

import logging

from vit_jax.cli.flags import CLUSTER, CONFIG, WORKDIR, Mode, given_config

log = logging.getLogger(__name__)


def run_train(args) -> int | None:
  from vit_jax.distributed import Preempted, is_first, joined
  from vit_jax.storage import TRY_AGAIN
  from vit_jax.training import saved_config, train

  with joined(args.coordinator, args.num_processes, args.process_id):
    config = given_config(args) or saved_config(args.workdir, args.overrides)
    try:
      result = train(config, args.workdir)
    except Preempted as error:
      log.info('%s Run the same command to resume.', error)
      return TRY_AGAIN
    if is_first():
      name, value = 'accuracy', result['test_accuracy']
      if 'test_mean_average_precision' in result:  # images can have several labels
        name, value = 'mean average precision', result['test_mean_average_precision']
      shown = f'loss {result["test_loss"]:.4f}' if value is None else f'{name} {value:.2%}'
      print(
        f'Test {shown} on {result["examples"]} examples after '
        f'{result["steps"]} steps; all files are in {args.workdir}/ (checkpoints, metrics.jsonl, '
        'result.json, tensorboard, log.txt).'
      )
  return None


MODE = Mode(
  'trains a model in a workdir, or resumes the run in it',
  '--config=configs/digits.py --workdir=runs/digits',
  (CONFIG, WORKDIR, *CLUSTER),
  run_train,
  resumes=True,
)
