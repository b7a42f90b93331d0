"""`--mode=predict`: classes of image files, or with `--features` their features."""

import dataclasses
import logging

from vit_jax import storage
from vit_jax.cli.flags import IMAGES, OUT, WEIGHTS, Flag, Mode, request_of

log = logging.getLogger(__name__)


def run_predict(args) -> int:
  from vit_jax.inference import predict_files, print_predictions

  if args.features:
    return write_features(args)
  if args.out:
    raise ValueError('--out is for --features=pooled or tokens; predictions are printed.')
  found = predict_files(request_of(args), args.images or [], args.topk)
  return report_errors(print_predictions(found, args.format or 'table'))


def write_features(args) -> int:
  """What the mode does with `--features`."""
  from vit_jax.inference import features
  from vit_jax.weights import write_arrays

  if args.given & {'--format', '--topk'}:
    raise ValueError('--features writes arrays: leave --format and --topk out.')
  if not args.out or args.out.suffix != '.npz':
    raise ValueError(f'--features={args.features} needs --out, a file to write, e.g. out.npz.')
  if args.out.exists():
    raise ValueError(f'--out: {args.out} is there already, and is not replaced.')
  storage.check_folder(args.out.parent)
  arrays, errors = features(request_of(args), args.images or [], args.features)
  write_arrays(args.out, arrays)
  print(f'{args.out}: path and feature, {list(arrays["feature"].shape)}')
  return report_errors(errors)


def report_errors(errors: list[str]) -> int:
  """Names the files that could not be read; the exit code."""
  for error in errors:
    log.error('%s', error)
  return 1 if errors else 0


MODE = Mode(
  'predicts the classes of image files, or writes their features',
  '--workdir=runs/digits --images=a.png,folder/ --topk=3',
  (
    *WEIGHTS,
    IMAGES,
    Flag('topk', 'classes per image', int, 5),
    Flag('format', 'table, json or csv; default: table'),
    Flag('features', 'write features instead: pooled or tokens'),
    dataclasses.replace(OUT, help='with --features: npz file to write'),
  ),
  run_predict,
)
