"""Defines `--mode=export`."""

from vit_jax.cli.flags import CLASSES, INIT, OUT, STEP, WORKDIR, Flag, Mode


def run_export(args) -> None:
  from vit_jax.inference import export

  if not args.format or not args.out:
    raise ValueError(
      '--mode=export needs --format (hf, timm, npz, stablehlo or onnx) and --out, a folder.'
    )
  step = 'last' if args.init else args.step
  for path in export(args.init or args.workdir, args.format, args.out, step, args.classes):
    print(path)


MODE = Mode(
  'exports weights (hf, timm, npz), or the model with its weights as a program (stablehlo, onnx)',
  '--workdir=runs/digits --format=timm --out=digits/',
  (
    WORKDIR,
    INIT,
    STEP,
    CLASSES,
    Flag('format', 'output format: hf, timm, npz, stablehlo or onnx'),
    OUT,
  ),
  run_export,
)
