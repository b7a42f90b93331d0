"""Compares the precisions of exported programs: file size, latency and accuracy.

    python -m benchmarks.precision folder:cifar10 runs/precision

The benchmark trains `configs/cifar10.py:tiny` for 3 epochs in the workdir `runs/precision`, unless
this run is already finished. Then it exports the run in every precision of ONNX and StableHLO, and
measures each exported program on all test images. It also exports a B/16 with random weights, and
measures only its file size and latency. The results are written to `results/precision.json`. Run
the benchmark on an idle machine, because other programs change the latency.
"""

import argparse
import dataclasses
from importlib import metadata
import os
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import arguments, collect
from vit_jax import opening
from vit_jax.distributed import start_up
from vit_jax.experiment import Experiment
from vit_jax.inference import exporting, measuring
from vit_jax.model import make
from vit_jax.opening import Request
from vit_jax.weights import FORMATS, Preprocessing, Program, adapt, read_weights
from vit_jax.workdir import writer

CONFIG = 'configs/cifar10.py:tiny'
EPOCHS = 3
LARGE = 'B/16'
PACKAGES = ('onnxruntime', 'onnx', 'jax2onnx', 'jaxlib')


def rows(program: Program, exp: Experiment | None) -> dict[str, dict]:
  """Measures a program in each format and precision, and returns the measurements."""
  found = {}
  for format, entry in FORMATS.items():
    if not entry.is_program:
      continue
    with tempfile.TemporaryDirectory() as scratch:
      names = exporting.EXACT, *entry.precisions
      folders = {name: pathlib.Path(scratch) / name for name in names}
      for folder in folders.values():
        folder.mkdir()
      exact = folders[exporting.EXACT]
      entry.save(program, exact)
      for name, precision in entry.precisions.items():
        precision.convert(program, exact, folders[name])
      compared = measuring.compare(program, entry.opens, folders, exp)
    found[format] = {
      name: {
        'megabytes': one.size / 1e6,
        'milliseconds': 1000 * one.seconds,
        'accuracy': one.quality,
      }
      for name, one in compared.found.items()
    }
  return found


def large() -> Program:
  """Returns a B/16 with random weights for images of 224 pixels, and random images."""
  model = make(LARGE, 1000)
  init = jax.jit(lambda key: model.init(key, jnp.zeros((1, 224, 224, 3)))['params'])
  params = jax.device_get(init(jax.random.key(0)))
  images = np.random.RandomState(0).randint(0, 256, (8, 224, 224, 3), np.uint8)
  return Program(model, params, Preprocessing((224, 224)), None, image_NHWC=images)


def parse(argv: list[str]) -> argparse.Namespace:
  parser = arguments.Parser(__spec__, __doc__)
  parser.add_argument('source', help='data.source of CIFAR-10, such as folder:cifar10')
  parser.add_argument('workdir', type=pathlib.Path, help='workdir of the run')
  return parser.parse_args(argv)


def main(argv: list[str]) -> None:
  args = parse(argv)
  overrides = {'epochs': EPOCHS, 'data.source': args.source}
  if not collect.train(CONFIG, overrides, args.workdir):
    raise SystemExit(f'{args.workdir}: the run failed. Fix the cause, then repeat the command.')
  load = os.getloadavg()[0]  # load of other programs on this machine
  start_up()
  exp, _, step = opening.open_model(Request(args.workdir, step='last'))
  program = exporting.program_of(adapt(read_weights(args.workdir, 'last')))
  images = measuring.calibration_images(args.workdir, exp)
  program = dataclasses.replace(program, image_NHWC=images)
  result = {
    'recipe': collect.command(CONFIG, {'epochs': EPOCHS}),
    'step': step,
    'calibration_images': len(images),
    'test_images': writer.read_json(args.workdir / 'result.json')['examples'],
    'load_before': load,
  }
  result |= collect.circumstances() | {name: metadata.version(name) for name in PACKAGES}
  for name, own, data in (('tiny', program, exp), (LARGE, large(), None)):
    result[name] = rows(own, data)
    writer.write_json(collect.RESULTS / 'precision.json', result)
    print(name, result[name])


if __name__ == '__main__':
  main(sys.argv[1:])
