"""Defines `--mode=profile`."""

from vit_jax.cli.flags import CLUSTER, CONFIG, WORKDIR, Mode, given_config


def run_profile(args) -> None:
  from vit_jax.distributed import joined
  from vit_jax.profiling import as_table, profile
  from vit_jax.training import saved_config

  with joined(args.coordinator, args.num_processes, args.process_id):
    config = given_config(args) or saved_config(args.workdir, args.overrides)
    found = profile(config, args.workdir)
    if found:
      print(as_table(found))
      print(f'\nThe trace is in {args.workdir}/profile/.')


MODE = Mode(
  'records some training steps, and prints the time of each kind of operation',
  '--config=configs/cifar10.py:tiny --workdir=runs/tiny',
  (CONFIG, WORKDIR, *CLUSTER),
  run_profile,
)
