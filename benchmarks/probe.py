"""Compares the epoch times of a linear probe with cached features and without them.

    python -m benchmarks.probe

One variant computes the features once and trains on them. The other variant runs the backbone in
every step. The model is `tiny` for 32x32 pixels, with random weights. The images are random, in
batches of 512, and the training step is the one of `main.py`. Both variants run in one process, in
turns, on the same examples. Compilation is not timed. The results are written to
`results/probe.json`. The file also has the time to compute and save the features once, and to hash
the weights and the images for the name of the cache file.
"""

import argparse
from collections.abc import Callable
import dataclasses
import os
import pathlib
import statistics
import sys
import tempfile
import time

import jax
import numpy as np

from benchmarks import arguments, collect
from vit_jax import cli, opening
from vit_jax.data import batching
from vit_jax.data.memory import Examples
from vit_jax.distributed import devices, sharding
from vit_jax.evaluation import features
from vit_jax.optim import plan as plan_lib
from vit_jax.training import probe, state
from vit_jax.training.step import make_train_step
from vit_jax.workdir import writer

EXAMPLES = 8192
ROUNDS = 7


def settings():
  """Returns the config of both variants."""
  config = cli.load_file('configs/linear_probe.py:tiny,cifar10')
  config.data.source, config.data.train_split, config.data.val_split = 'synthetic', 'train', ''
  config.sweep = ()
  return config


def seconds(run: Callable[[], object]) -> float:
  """Returns the seconds until the device has finished a call."""
  began = time.perf_counter()
  jax.block_until_ready(run())
  return time.perf_counter() - began


def make_epoch(exp, training, mesh) -> Callable[[], object]:
  """Compiles the train step; returns a function that trains one more epoch."""
  config = exp.config
  fresh = state.init_state(exp, training, mesh)
  train_state = fresh.replace(params=sharding.replicate(mesh, training.params))
  batches = batching.train_batches(
    training.train, config.batch_size, config.seed, 0, sharding.batch_sharding(mesh)
  )
  step = make_train_step(exp, training, mesh)
  states = [step(train_state, next(batches))[0]]

  def epoch():
    for _ in range(len(training.train) // config.batch_size):
      states[0], _ = step(states[0], next(batches))
    return states

  return epoch


def measure(config, examples: int, rounds: int) -> dict:
  """Returns the median epoch time of both variants, their ratio, and the time for the features."""
  devices.start_up()
  mesh = devices.make_mesh(config.batch_size)
  exp, training = opening.from_config(config)
  random, shape = np.random.RandomState(0), (examples, *training.train.image_NHWC.shape[1:])
  many = Examples(
    random.randint(0, 256, shape, np.uint8), random.randint(0, 10, examples).astype(np.int32)
  )
  training = plan_lib.plan_training(config, many, None, training.test, training.params)
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    weights = probe.initial_params(exp, training, folder)
    training = dataclasses.replace(training, params=weights)
    params = sharding.replicate(mesh, weights)
    step = features.make_feature_step(exp, mesh)
    once = Examples(many.image_NHWC[:1], many.label_N[:1])
    features.compute_features(step, params, once, config.eval_batch_size, mesh)  # compiles the step
    cost = seconds(
      lambda: features.cached_features(exp, step, params, many, mesh, folder).feature_ND
    )
    on_features = probe.on_features(exp, training, mesh, folder)
  epochs = {
    'frozen': make_epoch(exp, training, mesh),
    'cached': make_epoch(*on_features, mesh),
  }
  times = {name: [] for name in epochs}
  for _ in range(rounds):
    for name, epoch in epochs.items():
      times[name].append(seconds(epoch))
  medians = {name: statistics.median(values) for name, values in times.items()}
  return {
    'model': config.model.variant,
    'image_size': list(config.data.image_size),
    'batch_size': config.batch_size,
    'examples': examples,
    'epoch_seconds': medians,
    'rounds': times,
    'times_as_fast': medians['frozen'] / medians['cached'],
    'features_once_seconds': cost,
  }


def parse(argv: list[str]) -> argparse.Namespace:
  """Parses `--help` and refuses other arguments."""
  return arguments.Parser(__spec__, __doc__).parse_args(argv)


def main(argv: list[str]) -> None:
  parse(argv)
  load = os.getloadavg()[0]  # load of other programs on this machine
  result = measure(settings(), EXAMPLES, ROUNDS)
  result |= {'load_before': load} | collect.circumstances()
  writer.write_json(collect.RESULTS / 'probe.json', result)
  print({key: value for key, value in result.items() if key != 'rounds'})


if __name__ == '__main__':
  main(sys.argv[1:])
