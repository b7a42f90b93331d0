"""Defines `--mode=export`."""

from vit_jax.cli.flags import CLASSES, INIT, OUT, STEP, WORKDIR, Flag, Mode


def run_export(args) -> None:
  from vit_jax.inference import export

  if not args.format or not args.out:
    raise ValueError(
      '--mode=export needs --format (hf, timm, npz, stablehlo or onnx) and --out, a folder.'
    )
  step = 'last' if args.init else args.step
  path = args.init or args.workdir
  more = args.precision, args.overrides, args.classes
  for file in export(path, args.format, args.out, step, *more):
    print(file)


MODE = Mode(
  'exports weights (hf, timm, npz), or the model with its weights as a program (stablehlo, onnx)',
  '--workdir=runs/digits --format=timm --out=digits/',
  (
    WORKDIR,
    INIT,
    STEP,
    CLASSES,
    Flag('format', 'output format: hf, timm, npz, stablehlo or onnx'),
    Flag(
      'precision',
      'number format of the exported model: float32, for onnx also fp16 or int8, for stablehlo '
      'also bfloat16; the model card compares size, latency and accuracy with float32',
      default='float32',
    ),
    OUT,
  ),
  run_export,
  overrides=True,
)
