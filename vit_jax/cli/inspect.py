"""Defines `--mode=inspect`."""

import dataclasses

from vit_jax.cli.flags import CONFIG, INIT, WORKDIR, Mode, request_of


def run_inspect(args) -> None:
  from vit_jax.inference import as_text, summary_of

  print(as_text(summary_of(request_of(args))))


MODE = Mode(
  'prints the number of parameters, FLOPs, memory and steps of a run, without training',
  '--config=configs/cifar10.py:l16',
  (CONFIG, dataclasses.replace(WORKDIR, required=False), INIT),
  run_inspect,
)
