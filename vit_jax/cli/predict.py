"""Defines `--mode=predict`: predicts classes of image files, or writes their features."""

import dataclasses
import logging

from vit_jax import storage
from vit_jax.cli.flags import CLASSES, IMAGES, MAX_PATCHES, OUT, WEIGHTS, Flag, Mode, request_of
from vit_jax.names import one_line

log = logging.getLogger(__name__)


def run_predict(args) -> int:
  from vit_jax.inference import predict_files, print_predictions

  if args.features:
    return write_features(args)
  if args.out:
    raise ValueError(
      '--out is for --features=pooled or tokens. Predictions are printed, not written to a file: '
      'remove --out, and redirect the output, e.g. with --format=csv > predictions.csv.'
    )
  found = predict_files(request_of(args), args.images or [], args.topk)
  return report_errors(print_predictions(found, args.format or 'table'))


def write_features(args) -> int:
  """Writes features of the images to an npz file, and returns the exit code."""
  from vit_jax.inference import features
  from vit_jax.weights import write_arrays

  if args.given & {'--format', '--topk', '--classes'}:
    raise ValueError(
      '--features cannot be combined with --format, --topk or --classes. Remove these flags.'
    )
  if not args.out or args.out.suffix != '.npz':
    raise ValueError(f'--features={args.features} needs --out, an npz file to write, e.g. out.npz.')
  if args.out.exists():
    raise ValueError(f'--out: {args.out} already exists and is not overwritten. Give a new name.')
  storage.check_folder(args.out.parent)
  arrays, errors = features(request_of(args), args.images or [], args.features)
  write_arrays(args.out, arrays)
  shape = list(arrays['feature'].shape)
  print(f'{args.out} has the arrays `path` and `feature`. The shape of `feature` is {shape}.')
  return report_errors(errors)


def report_errors(errors: list[str]) -> int:
  """Logs errors of image files, and returns the exit code: 1 if there are errors, else 0."""
  for error in errors:
    log.error('%s', one_line(error))
  return 1 if errors else 0


MODE = Mode(
  'predicts the classes of image files, or writes their features',
  '--workdir=runs/digits --images=a.png,folder/ --topk=3',
  (
    *WEIGHTS,
    CLASSES,
    IMAGES,
    MAX_PATCHES,
    Flag(
      'topk',
      'number of classes to print for each image; default: 5, or every label that reaches its '
      'threshold if an image can have several labels',
      int,
      None,
    ),
    Flag('format', 'output format: table, json or csv; default: table'),
    Flag('features', 'features to write instead of predicting classes: pooled or tokens'),
    dataclasses.replace(OUT, help='with --features: npz file to write'),
  ),
  run_predict,
)
