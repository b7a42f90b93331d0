"""Defines `--mode=serve`."""

from vit_jax.cli.flags import CLASSES, WEIGHTS, Flag, Mode, request_of


def run_serve(args) -> None:
  from vit_jax.inference import serve

  serve(request_of(args), args.host, args.port)


MODE = Mode(
  'serves a web page for trying a model',
  '--workdir=runs/digits --port=7860',
  (
    *WEIGHTS,
    CLASSES,
    Flag('host', 'address to listen on; 0.0.0.0: accept other machines', default='127.0.0.1'),
    Flag('port', 'port to listen on; 0: any free port', int, 7860),
  ),
  run_serve,
)
