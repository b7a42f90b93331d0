"""Defines `--mode=visualize`."""

import dataclasses

from vit_jax.cli.flags import IMAGES, OUT, WEIGHTS, Mode, request_of


def run_visualize(args) -> None:
  from vit_jax.figures import visualize

  if args.init and not args.out:
    raise ValueError('--mode=visualize with --init needs --out: the output folder.')
  for path in visualize(request_of(args), args.images, args.out):
    print(path)


MODE = Mode(
  'writes a report with attention maps, filters, position embeddings and wrong predictions',
  '--init=ViT-B_16.npz --images=photos/ --out=look/',
  (
    *WEIGHTS,
    dataclasses.replace(IMAGES, help='images to show; default: test images of the run'),
    dataclasses.replace(OUT, help='output folder; default: the workdir'),
  ),
  run_visualize,
)
