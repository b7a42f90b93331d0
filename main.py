"""Trains, evaluates, predicts with, draws, converts and sizes up Vision Transformers.

    python main.py --config=configs/digits.py --workdir=runs/digits
    python main.py --mode=eval --workdir=runs/digits [--step=best|last|<number>]
    python main.py --mode=fewshot --workdir=runs/digits
    python main.py --mode=predict --workdir=runs/digits --images=a.png,folder/
    python main.py --mode=predict --init=ViT-B_16.npz --images=a.png      # published weights
    python main.py --mode=fewshot --init=ViT-B_16.npz --config.data.source=folder:photos
    python main.py --mode=visualize --workdir=runs/digits [--images=a.png,folder/]
    python main.py --mode=serve --workdir=runs/digits --port=7860
    python main.py --mode=export --workdir=runs/digits --format=timm --out=digits/
    python main.py --mode=export --workdir=runs/digits --format=stablehlo --out=program/
    python main.py --mode=inspect --config=configs/cifar10.py:l16      # what it would cost

Any key of the config is overridden by --config.<key>=<value>; one that is true or false also by
--config.<key> and --noconfig.<key>.
"""

import argparse
import codecs
import logging
import os
import pathlib
import re
import signal
import sys

from vit_jax.names import choose
from vit_jax.storage import local

log = logging.getLogger('vit_jax')


def given_config(args, overrides):
  """The config of `--config` with its overrides; None without `--config`."""
  from vit_jax import config as config_lib

  if not args.config:
    return None
  return config_lib.override_all(config_lib.load_file(args.config), overrides)


def paths(text):
  """The paths of a comma-separated list; one that is there as it is, commas and all, is whole."""
  if text and os.path.exists(os.path.expanduser(text)):
    return [text]
  return [path.strip() for path in text.split(',') if path.strip()]


def train(args, overrides):
  from vit_jax.distributed import cluster
  from vit_jax.training import resume, trainer

  with cluster.joined(args.coordinator, args.num_processes, args.process_id):
    config = given_config(args, overrides) or resume.saved_config(args.workdir, overrides)
    try:
      result = trainer.train(config, args.workdir)
    except cluster.Preempted as error:
      log.info('%s The same command goes on.', error)
      return cluster.TRY_AGAIN
    if cluster.is_first():
      print(
        f'Test accuracy {result["test_accuracy"]:.2%} on {result["examples"]} examples after '
        f'{result["steps"]} steps; everything is in {args.workdir}/ (checkpoints, metrics.jsonl, '
        'result.json, tensorboard, log.txt).'
      )


def evaluate(args, overrides):
  from vit_jax.distributed import cluster
  from vit_jax.evaluation import exact

  with cluster.joined(args.coordinator, args.num_processes, args.process_id):
    # JAX would keep it for whoever asks for it, as training does.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    result = exact.evaluate(args.workdir, overrides, given_config(args, overrides), args.step)
    if cluster.is_first():
      print(', '.join(f'{name} {value:.9g}' for name, value in result.items()))


def fewshot(args, overrides):
  from vit_jax.evaluation import few_shot

  config = given_config(args, overrides)
  result = few_shot.fewshot(args.workdir, overrides, config, args.init, args.step)
  for shots, score in result['shots'].items():
    seeds = len(score['accuracy'])
    print(f'{shots:>2} shots: {score["mean"]:.2%} ± {score["std"]:.2%} over {seeds} seeds')


def predict(args, overrides):
  from vit_jax.inference import prediction

  if args.features:
    return features(args, overrides)
  if args.out:
    raise ValueError('--out is for --features=pooled or tokens; predictions are printed.')
  images, config = args.images or [], given_config(args, overrides)
  found = prediction.predict(
    args.workdir, images, args.topk, overrides, config, args.init, args.step
  )
  return finish(prediction.print_predictions(found, args.format or 'table'))


def features(args, overrides):
  """What --mode=predict does with --features."""
  from vit_jax import storage
  from vit_jax.inference import prediction
  from vit_jax.weights import npz

  if args.given & {'--format', '--topk'}:
    raise ValueError('--features writes arrays: leave --format and --topk out.')
  if not args.out or args.out.suffix != '.npz':
    raise ValueError(f'--features={args.features} needs --out, a file to write, e.g. out.npz.')
  if args.out.exists():
    raise ValueError(f'--out: {args.out} is there already, and is not replaced.')
  storage.check_folder(args.out.parent)
  images, config = args.images or [], given_config(args, overrides)
  arrays, errors = prediction.features(
    args.workdir, images, args.features, overrides, config, args.init, args.step
  )
  npz.write_arrays(args.out, arrays)
  print(f'{args.out}: path and feature, {list(arrays["feature"].shape)}')
  return finish(errors)


def finish(errors):
  """Names the files that could not be read; the exit code."""
  for error in errors:
    log.error('%s', error)
  return 1 if errors else 0


def visualize(args, overrides):
  from vit_jax.figures import gallery

  if args.init and not args.out:
    raise ValueError('--mode=visualize of --init needs --out, the folder to write into.')
  config = given_config(args, overrides)
  for path in gallery.visualize(
    args.workdir, args.images, overrides, config, args.init, args.out, args.step
  ):
    print(path)


def serve(args, overrides):
  try:
    from vit_jax.inference import server
  except ModuleNotFoundError as error:
    raise ValueError(
      f'--mode=serve needs {error.name}: pip install -r requirements-demo.txt'
    ) from error
  config = given_config(args, overrides)
  server.serve(args.workdir, args.host, args.port, overrides, config, args.init, args.step)


def export(args, overrides):
  from vit_jax.inference import exporting

  if not args.format or not args.out:
    raise ValueError(
      '--mode=export needs --format (hf, timm, npz, stablehlo or onnx) and --out, a folder.'
    )
  step = 'last' if args.init else args.step
  for path in exporting.export(args.init or args.workdir, args.format, args.out, step):
    print(path)


def inspect(args, overrides):
  from vit_jax.inference import cost

  config = given_config(args, overrides)
  print(cost.as_text(cost.summary_of(config, args.workdir, args.init, overrides)))


MODES = {
  'train': train,
  'eval': evaluate,
  'fewshot': fewshot,
  'predict': predict,
  'visualize': visualize,
  'export': export,
  'serve': serve,
  'inspect': inspect,
}
TAKEN_BY = {  # but --workdir, which all modes take
  '--config': [mode for mode in MODES if mode != 'export'],
  '--init': ('fewshot', 'predict', 'visualize', 'export', 'serve', 'inspect'),
  '--step': ('eval', 'fewshot', 'predict', 'visualize', 'export', 'serve'),
  '--images': ('predict', 'visualize'),
  '--topk': ('predict',),
  '--features': ('predict',),
  '--format': ('predict', 'export'),
  '--out': ('predict', 'visualize', 'export'),
  '--host': ('serve',),
  '--port': ('serve',),
  '--coordinator': ('train', 'eval'),
  '--num_processes': ('train', 'eval'),
  '--process_id': ('train', 'eval'),
}


class Console(logging.Handler):
  """Prints above the progress bar, not through it."""

  def emit(self, record):
    from tqdm import tqdm

    from vit_jax.distributed import cluster

    if cluster.is_first() or record.levelno >= logging.WARNING:
      tqdm.write(self.format(record), file=sys.stderr)


def parse(argv):
  """The flags, and the overrides of the config as `read_overrides` gives them.

  Among the flags is `given`, the names of those that stand on the command line.
  """
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument('--mode', default='train', help=', '.join(MODES))
  parser.add_argument('--config', default='', help='configs/<experiment>.py[:<variant>]')
  parser.add_argument('--workdir', default='', help='checkpoints and records')
  parser.add_argument(
    '--step', default='', help='checkpoint: best (by validation accuracy), last or a number'
  )
  parser.add_argument(
    '--init', default='', help='weights in the place of a workdir: any file, or a Hub name'
  )
  parser.add_argument(
    '--format',
    default='',
    help='predict: table, json or csv; export: hf, timm, npz, stablehlo, onnx',
  )
  parser.add_argument(
    '--out', default='', help='export, visualize: a folder to write; features: a file'
  )
  parser.add_argument(
    '--images', type=paths, help='predict, visualize: files and folders, comma-separated'
  )
  parser.add_argument('--topk', type=int, default=5, help='predict: classes shown for each image')
  parser.add_argument('--features', default='', help='predict: pooled or tokens, into --out')
  parser.add_argument('--host', default='127.0.0.1', help='serve: 0.0.0.0 for other machines')
  parser.add_argument('--port', type=int, default=7860, help='serve')
  parser.add_argument(
    '--coordinator', help='train, eval on several hosts: <host>:<port> of the first process'
  )
  parser.add_argument('--num_processes', type=int, help='in all; 1: alone, whatever Slurm says')
  parser.add_argument('--process_id', type=int, help='0 to num_processes - 1')
  args, rest = parser.parse_known_args(argv)
  try:
    overrides = read_overrides(rest)
  except ValueError as error:
    parser.error(str(error))
  flags = (word.partition('=') for word in argv)
  args.given = {flag for flag, equals, value in flags if value or not equals}
  args.given |= {'--config'} if overrides else set()
  return args, overrides


def read_overrides(words):
  """The overrides `{key: text}` that words of the command line make.

  They are `--config.key=text`, `--config.key text`, and of a key that is true or false also
  `--config.key` and `--noconfig.key`.

  Raises:
    ValueError: another flag, or one whose value is missing or not wanted.
  """
  from vit_jax import config as config_lib

  overrides, words = {}, list(words)
  while words:
    word = words.pop(0)
    found = re.fullmatch(r'--(no)?config\.([^=]+)(=.*)?', word, re.DOTALL)
    if not found:
      raise ValueError(f'unknown argument {word}; config keys are given as --config.<key>=<value>')
    negated, key, text = found.groups()
    if negated and (text or not config_lib.is_switch(key)):
      raise ValueError(f'{word}: --no is for keys that are true or false, without a value')
    if negated:
      overrides[key] = 'false'
    elif text:
      overrides[key] = text[1:]
    elif words and not words[0].startswith('--'):
      overrides[key] = words.pop(0)
    elif config_lib.is_switch(key):
      overrides[key] = 'true'
    else:
      raise ValueError(f'{word} needs a value')
  return overrides


def check_flags(args):
  """Raises ValueError for a flag that the mode would pass over."""
  for flag, modes in TAKEN_BY.items():
    if flag in args.given and args.mode not in modes:
      hint = '; training takes --config.init' if flag == '--init' else ''
      raise ValueError(f'{flag} is for {", ".join(modes)}, not for --mode={args.mode}{hint}.')


def keep_compiled():
  """Has JAX, not imported yet, keep what it compiles for the next run on this machine."""
  cache = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  folder = pathlib.Path(cache).expanduser() / 'vit_jax' / 'compiled'
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(folder))


def main(argv):
  args, overrides = parse(argv)
  keep_compiled()
  log.setLevel(logging.INFO)
  log.propagate = False
  log.handlers = [Console(logging.INFO)]
  try:
    mode = choose('--mode', args.mode, MODES)
    check_flags(args)
    for name in ('workdir', 'out'):  # an unset variable leaves an empty one
      setattr(args, name, local(text) if (text := getattr(args, name)) else None)
    if args.init and (args.workdir or args.config):
      raise ValueError('--init is for weights as they are: leave --workdir and --config out.')
    if args.init and args.step:
      raise ValueError('--step chooses a checkpoint of a --workdir: leave it out with --init.')
    if args.workdir is None and not args.init and args.mode != 'inspect':
      raise ValueError('--workdir is missing: where checkpoints and records are or shall be.')
    from vit_jax import limits
    from vit_jax.distributed import backend, devices

    devices.start_up()
    with backend.needed(), limits.memory_for(f'--mode={args.mode}'):
      code = mode(args, overrides)
    if sys.stdout:
      sys.stdout.flush()
    return code
  except BrokenPipeError:  # whoever reads has read enough, as `head` does
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left to flush
    return 141  # as a shell has it of what SIGPIPE ends
  except (ValueError, OSError, FloatingPointError, MemoryError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    goes_on = ' The same command resumes from what was saved.' if args.mode == 'train' else ''
    print(f'Interrupted.{goes_on}', file=sys.stderr)
    return 130


def interrupt(_, frame):
  """The first Ctrl-C ends what is being done in order; the second ends it at once.

  So does the first one during an import, which may swallow what is raised in it.
  """
  while frame:
    if frame.f_code.co_filename.startswith('<frozen importlib'):
      leave('Interrupted.')
    frame = frame.f_back
  signal.signal(signal.SIGINT, lambda *_: leave('Interrupted again: ending at once.'))
  raise KeyboardInterrupt


def leave(message):
  """Ends this process: a checkpoint that is being written does not appear, those before stay."""
  os.write(sys.stderr.fileno(), f'{message}\n'.encode())
  os._exit(130)


def as_bytes(error):
  """How to print what the terminal has no letters for: as a file's name has it, else escaped."""
  try:
    return codecs.lookup_error('surrogateescape')(error)
  except UnicodeEncodeError:
    return codecs.backslashreplace_errors(error)


if __name__ == '__main__':
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else the shell ignores it
    signal.signal(signal.SIGINT, interrupt)
  if sys.stdout:  # not closed, as by >&-
    codecs.register_error('as_bytes', as_bytes)
    sys.stdout.reconfigure(errors='as_bytes')
  sys.exit(main(sys.argv[1:]))
