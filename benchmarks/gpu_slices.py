"""The measurements of `benchmarks.gpu`, which are called slices.

A slice is a measurement that runs in its own process. The function of a slice has the signature
`(folder, toy) -> result`. It may keep files in `folder`, and finds them there when it is called
again. The result can be saved as JSON. With `toy`, the function is a test that takes only seconds
on a CPU.
"""

import dataclasses
import importlib.util
import os
import pathlib
import shutil
import sys
import time

import jax
import jax.numpy as jnp

from benchmarks import collect, contestants, faults, gpu_pack, photos, recipes, speed, works
from benchmarks import input as input_lib
from vit_jax import cli
from vit_jax.distributed import num_cores, target
from vit_jax.model import flash, flash_obstacle, plain, select_kernel
from vit_jax.model.attention import with_gradient
from vit_jax.training import trial
from vit_jax.workdir import stored, writer

TOKENS = (
  196,  # 224 pixels, patches of 16, without a class token
  197,  # with a class token
  256,  # 224 pixels, patches of 14, without a class token
  257,  # with a class token
  577,  # 384 pixels, patches of 16, with a class token
)
BATCH, HEADS, HEAD_SIZE = 64, 12, 64  # B/16
DROPOUT = 0.1
TOY_WITH_PEERS = 'B/16 train'  # at toy size, other implementations run only this workload

# Overrides for a training run of some seconds, for slices that train at toy size.
TINY = {
    'data.image_size': '8', 'data.source': 'synthetic', 'data.train_split': 'train[:50%]',
    'data.eval_split': 'test[:64]', 'epochs': '0.5', 'batch_size': '64', 'schedule.warmup': '0',
    'model.depth': '1', 'model.width': '32', 'model.mlp_dim': '32', 'model.patch_size': '4',
    'model.num_heads': '4', 'augment.rand_augment.num_layers': '0',
}  # fmt: skip


class Skipped(Exception):
  """Reason why a slice cannot be measured on this machine."""


def attention(folder: pathlib.Path, toy: bool) -> dict:
  """Measures the errors and the times of cuDNN's attention and of `plain`, both in bfloat16.

  The reference for the errors is `plain` in float32, on the same inputs. On a CPU, the kernel for
  CPUs is tested instead of cuDNN's kernel.
  """
  del folder
  obstacle = flash_obstacle(target(), jnp.bfloat16, HEAD_SIZE)
  if obstacle and not toy:
    raise Skipped(f'cuDNN cannot compute this attention, because {obstacle}')
  name, fused = ('with_gradient', with_gradient) if obstacle else ('cudnn', flash)
  batch, heads = (2, 2) if toy else (BATCH, HEADS)
  rows = [
    compare(fused, (batch, tokens, heads, HEAD_SIZE), inputs)
    for tokens in ((16, 17) if toy else TOKENS)
    for inputs in trial.INPUTS
  ]
  return {'kernel': name, 'tolerance': trial.TOLERANCE, 'rows': rows} | {
    'dropout': with_dropout((batch, 17 if toy else 197, heads, HEAD_SIZE)),
    'right': all(row['error'] <= trial.TOLERANCE for row in rows),
  }


def compare(fused, shape: tuple[int, int, int, int], inputs: str) -> dict:
  """Returns the errors and the milliseconds of a fused kernel and of `plain`, for one shape.

  `error` is the largest of the errors of the fused kernel (see `trial.errors`). It is NaN if one of
  them is NaN.
  """
  given = trial.draw(shape, jnp.bfloat16, *trial.INPUTS[inputs])
  wanted = trial.reference(given)
  row = {'tokens': shape[1], 'batch': shape[0], 'inputs': inputs}
  for name, kernel in (('fused', fused), ('plain', plain)):
    errors = trial.errors(trial.value_and_gradients(kernel)(*given), wanted)
    seconds = trial.duration(kernel, shape, jnp.bfloat16)
    row[name] = {'errors': errors, 'milliseconds': 1e3 * seconds}
  return row | {'error': float(jnp.max(jnp.array(list(row['fused']['errors'].values()))))}


def with_dropout(shape: tuple[int, int, int, int]) -> dict:
  """Returns which kernel computes attention with dropout, its error and its milliseconds."""
  query, key, value, _ = trial.draw(shape, jnp.bfloat16, 1, 0)
  kernel = select_kernel('auto', query, key, drops=True)
  batch, tokens, heads, _ = shape
  keep_BKNN = jax.random.bernoulli(jax.random.key(1), 1 - DROPOUT, (batch, heads, tokens, tokens))
  run = jax.jit(lambda *qkv: kernel(*qkv, keep_BKNN, DROPOUT))
  with jax.default_matmul_precision('highest'):
    want = run(*(x.astype(jnp.float32) for x in (query, key, value)))
  error = float(jnp.abs(run(query, key, value) - want).max() / jnp.abs(want).max())
  began = time.perf_counter()
  for _ in range(trial.REPEATS):
    out = run(query, key, value)
  jax.block_until_ready(out)
  milliseconds = 1e3 * (time.perf_counter() - began) / trial.REPEATS
  name = getattr(kernel, '__name__', str(kernel))
  return {'tokens': tokens, 'kernel': name, 'error': error, 'forward_milliseconds': milliseconds}


def speed_of(name: str, folder: pathlib.Path, toy: bool) -> dict:
  """Measures the GPU workload `name` of `benchmarks.speed`."""
  del folder
  work = next(work for work in works.WORKS['gpu'] if work.name == name)
  os.environ.update(speed.ENVIRONMENT)
  found = speed.in_a_process(rates)
  if not toy:
    return found | {'works': [speed.measure(work)]}
  os.environ['TORCHDYNAMO_DISABLE'] = '1'  # otherwise PyTorch compiles for most of a minute
  peers = work.peers if name == TOY_WITH_PEERS else ()
  small = dataclasses.replace(works.dry(work), peers=peers)
  return found | {'works': [speed.measure(small, rounds=1, turn=0.01)]}


def rates() -> dict:
  """Returns the machine and its peak speed."""
  name = contestants.machine()['machine']
  peak, source = speed.peak(name, 0.0)
  if not peak:
    peak, source = speed.peak(name, contestants.matmul_rate('jax'))
  return {'machine': name, 'peak_flops_per_second': peak, 'peak_is': source}


def exact(dtype: str, folder: pathlib.Path, toy: bool) -> dict:
  """Compares the final states of runs with the same config, bit for bit.

  Two runs train without interruption. The others are killed and resumed.

  The runs use `deterministic=True`. Each run compiles its own programs, to test that XLA makes the
  same choices in every compilation. At toy size, the runs share compiled programs.
  """
  os.environ['JAX_ENABLE_COMPILATION_CACHE'] = 'true' if toy else 'false'
  faults.multiprocessing.get_context('forkserver').set_forkserver_preload(
    ['vit_jax.training.trainer']
  )
  flags = [
      *faults.FLAGS, '--config.data.source=synthetic', '--config.epochs=3',
      '--config.deterministic=True', f'--config.model.dtype={dtype}',
  ]  # fmt: skip
  if toy:  # AdamW compiles faster than Muon
    flags += ['--config.optimizer.name=adamw', '--config.checkpoint_every=8', '--config.epochs=2']
  first, second = (folder / f'whole{i}' for i in range(2))
  for path in folder.iterdir():  # deletes unfinished runs of an earlier call, which was stopped
    if path.is_dir() and not (path / 'result.json').exists():
      shutil.rmtree(path)
  for workdir in (first, second):
    faults.finish(workdir, 1, flags)
  want = faults.fingerprint(first)
  kills = [faults.kill(folder, i, 1, want, flags) for i in range(1 if toy else 3)]
  return {
    'dtype': dtype,
    'attention': (stored.newest_config(first) or {}).get('attention'),
    'same': faults.fingerprint(second) == want,
    'kills': kills,
    'resumed_exactly': sum(kill['identical'] for kill in kills),
  }


def accuracy(name: str, folder: pathlib.Path, toy: bool) -> dict:
  """Trains a recipe with seed 0; exits with code 75 if a signal stops it."""
  recipe, workdir = recipes.RECIPES[name], folder / 'seed0'
  changes = recipe.overrides | {'data.source': f'folder:{gpu_pack.IMAGES.resolve()}'}
  if toy:
    changes |= TINY
  elif not gpu_pack.IMAGES.exists():
    raise Skipped(
      f'{gpu_pack.DATA} is missing. To write it, run: make gpu-pack DATA=<CIFAR-10 folder>'
    )
  train(recipe.config, changes, workdir)
  return collect.summary(collect.command(recipe.config, recipe.overrides), [workdir]) | {
    'last_metrics': last_metrics(workdir)
  }


def train(config: str, changes: dict[str, object], workdir: pathlib.Path) -> None:
  """Starts or resumes a run in this process. If `main.py` fails, exits with its exit code."""
  flags = [f'--config.{key}={value}' for key, value in changes.items()]
  if code := cli.main([f'--config={config}', f'--workdir={workdir}', *flags]):
    sys.exit(code)


def last_metrics(workdir: pathlib.Path) -> dict:
  """Returns the last metrics of training, such as `images_per_second` and `mfu`."""
  lines = [line for line in writer.read_metrics(workdir) if line['split'] == 'train']
  return lines[-1] if lines else {}


def images(folder: pathlib.Path, toy: bool) -> dict:
  """Measures how fast JPEGs of ImageNet's size are decoded, and how long B/16 waits for them."""
  for name in ('grain', 'cv2'):
    if importlib.util.find_spec(name) is None:
      raise Skipped(f'{name} is not installed')
  count, files = (600 if toy else 10_000), folder / 'photos'
  if not (folder / 'written').exists():
    shutil.rmtree(files, ignore_errors=True)  # left by an earlier call that was stopped
    photos.make(files, count)
    (folder / 'written').touch()
  names, rounds = (['ours'], 1) if toy else (['ours', 'ours_workers'], 2)
  turns = input_lib.race(files, names, rounds)
  batch = 16 if toy else 256
  changes = {
      'data.source': f'folder:{files.resolve()}', 'data.train_split': 'train',
      'data.val_split': '', 'data.eval_split': f'test[:{batch}]', 'data.cache': 'stream',
      'batch_size': batch, 'eval_batch_size': batch, 'epochs': 3 / 32 if toy else 3,
      'log_every': 1 if toy else 20, 'eval_every': 0, 'checkpoint_every': 0,
      'schedule.warmup': 0,
  }  # fmt: skip
  if toy:
    changes |= {'model.depth': 1, 'model.width': 64, 'model.mlp_dim': 64, 'model.num_heads': 1}
  train('configs/imagenet.py:b16', changes, folder / 'b16')
  return {
    'images': count,
    'cores': num_cores(),
    'image_size': list(input_lib.SIZE),
    'images_per_second': input_lib.medians(turns, 0),
    'images_per_second_per_core': input_lib.medians(turns, 1),
    'training': {'variant': 'B/16', 'batch_size': batch} | last_metrics(folder / 'b16'),
  }
