"""Compares how fast this project, tf.data and PyTorch's DataLoader load JPEGs into batches.

    python -m benchmarks.input      # 6 minutes on 2 cores; results/input.json

All loaders do the same work on the same 20,000 JPEGs of about 400x350 pixels. They read a file,
decode it, crop a random 8 to 100 % of its area, and scale the crop to 224x224 with anti-aliasing.
The result is uint8 images in batches of 128.

Each loader runs in its own process and may use all cores. Loaders take turns of a few seconds, so
that other programs on the machine affect all loaders equally. `images_per_second_per_core` is the
number of images divided by the CPU seconds of a process and its children. On a shared machine,
elapsed time would favour the loader with the most threads. A ratio is this project's rate divided
by the rate of another loader. The file has the median ratio over the rounds, by CPU time and by
elapsed time. Loaders that are not installed are skipped.

The benchmark measures four more numbers:
  * the milliseconds that each available decoder takes in one thread;
  * how fast this project gathers batches of images that are already in memory;
  * the memory of all processes of this project's loader, over three epochs;
  * the share of time that a ViT S/16 waits for its data when it trains on these files.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
import functools
import importlib.util
import io
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from PIL import Image

from benchmarks import arguments, collect, photos
from vit_jax import config as config_lib
from vit_jax.data import batching, sources, stream
from vit_jax.data import image as image_lib
from vit_jax.data.memory import Examples
from vit_jax.distributed import cluster, devices, sharding
from vit_jax.training import trainer
from vit_jax.workdir import writer

COUNT = 20_000
SIZE = (224, 224)
BATCH = 128
CROP = {'min_area': 0.08, 'max_aspect': 4 / 3}
ROUNDS = 5
WARM, TURN = 1.0, 4.0  # seconds of a turn: first to warm up, then to measure


TRAINED = {  # config of the training run that measures the wait for data
    'model.variant': 'S/16', 'model.pool': 'gap', 'batch_size': '8', 'eval_batch_size': '16',
    'data.image_size': '224', 'data.cache': 'stream', 'data.eval_split': 'test[:16]',
    'augment.resized_crop.min_area': '0.08', 'augment.flip.probability': '0.5',
    'log_every': '20', 'eval_every': '0', 'checkpoint_every': '0',
}  # fmt: skip
STEPS = 20


def ours(folder: pathlib.Path, workers: int = 0, split: str = 'train+test') -> Iterator[int]:
  """Yields the batch sizes of this project's loader with `data.cache=stream`."""
  source = sources.open_source(f'folder:{folder}', '', SIZE)
  arguments = dict(size=SIZE, fit=image_lib.fit_image, crop=CROP, workers=workers)
  arguments |= dict(threads=stream.best_threads(workers))
  examples = stream.open_stream(source, split, **arguments)
  over_batch = sharding.batch_sharding(devices.make_mesh(BATCH))
  for batch in batching.train_batches(examples, BATCH, 0, 0, over_batch):
    yield len(jax.block_until_ready(batch['image']))


def tfdata(folder: pathlib.Path, antialias: bool = True) -> Iterator[int]:
  """Loads batches of the photos with tf.data; yields the number of images in each batch.

  As in TensorFlow's models and big_vision, only the cropped part of a JPEG is decoded.
  """
  import tensorflow as tf

  def load(file):
    encoded = tf.io.read_file(file)
    begin, size, _ = tf.image.sample_distorted_bounding_box(
      tf.io.extract_jpeg_shape(encoded), tf.zeros([0, 0, 4]), area_range=(CROP['min_area'], 1),
      aspect_ratio_range=(3 / 4, 4 / 3), min_object_covered=0, use_image_if_no_bounding_boxes=True,
    )  # fmt: skip
    window = tf.concat([begin[:2], size[:2]], axis=0)
    part = tf.io.decode_and_crop_jpeg(encoded, window, channels=3)
    part = tf.image.resize(part, SIZE, antialias=antialias)
    return tf.cast(tf.clip_by_value(tf.round(part), 0, 255), tf.uint8)

  files = tf.data.Dataset.from_tensor_slices(sorted(map(str, folder.rglob('*.jpg'))))
  files = files.shuffle(COUNT, seed=0).repeat()
  batches = files.map(load, num_parallel_calls=tf.data.AUTOTUNE).batch(BATCH).prefetch(2)
  for batch in batches.as_numpy_iterator():
    yield len(batch)


class Photos:
  """PyTorch dataset of the JPEGs in a folder; crops like torchvision's RandomResizedCrop."""

  def __init__(self, folder):
    self.files = sorted(folder.rglob('*.jpg'))

  def __len__(self):
    return len(self.files)

  def __getitem__(self, i):
    import torch

    opened = Image.open(self.files[i])
    box = image_lib.random_part(torch.rand(4).tolist(), opened.height, opened.width, **CROP)
    part = opened.convert('RGB').resize(SIZE[::-1], Image.Resampling.BILINEAR, box)
    return torch.from_numpy(np.array(part))


def torch_loader(folder: pathlib.Path) -> Iterator[int]:
  """Yields the batch sizes of PyTorch's DataLoader with one worker process per core."""
  from torch.utils.data import DataLoader

  loader = DataLoader(
    Photos(folder), BATCH, shuffle=True, num_workers=cluster.num_cores(), persistent_workers=True
  )
  for batch in itertools.chain.from_iterable(itertools.repeat(loader)):
    yield len(batch)


CONTESTANTS = {  # name: (required module, function that yields batch sizes)
  'ours': ('grain', ours),
  'ours_workers': ('grain', functools.partial(ours, workers=cluster.num_cores())),
  'tfdata': ('tensorflow', tfdata),
  'tfdata_without_antialiasing': ('tensorflow', functools.partial(tfdata, antialias=False)),
  'torch': ('torch', torch_loader),
}


def family() -> list:
  """Returns this process and all its descendants."""
  import psutil  # installed as a dependency of Grain

  return [psutil.Process(), *psutil.Process().children(recursive=True)]


def cpu_seconds() -> float:
  """Returns the CPU seconds that this process and its descendants have used so far."""
  return sum(sum(process.cpu_times()[:2]) for process in family())


def serve(name: str, folder: str) -> None:
  """Runs a contestant in this process: one turn for every line of standard input.

  Each turn prints images per second of elapsed time and images per second of CPU time.
  """
  batches = CONTESTANTS[name][1](pathlib.Path(folder))
  next(batches)
  print('ready', flush=True)
  for _ in sys.stdin:
    end = time.perf_counter() + WARM
    while time.perf_counter() < end:
      next(batches)
    began, computed, count = time.perf_counter(), cpu_seconds(), 0
    while time.perf_counter() < began + TURN:
      count += next(batches)
    seconds = time.perf_counter() - began, cpu_seconds() - computed
    print(*(count / n for n in seconds), flush=True)
  batches.close()


def race(
  folder: pathlib.Path, names: Iterable[str], rounds: int = ROUNDS
) -> dict[str, list[tuple[float, float]]]:
  """Returns, for each contestant, the two rates that `serve` printed in each round."""
  quiet = os.environ | {'TF_CPP_MIN_LOG_LEVEL': '3', 'JAX_PLATFORMS': 'cpu'}
  pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=quiet)
  rates, running = {}, {}
  for name in names:
    needs, _ = CONTESTANTS[name]
    if importlib.util.find_spec(needs) is None:
      print(f'Skipped {name}: {needs} is not installed.')
      continue
    running[name] = subprocess.Popen([*COMMAND, 'serve', name, str(folder)], **pipes)
    assert running[name].stdout.readline() == 'ready\n', f'{name} failed'
  for _ in range(rounds):
    for name, process in running.items():
      process.stdin.write('go\n')
      process.stdin.flush()
      found = map(float, process.stdout.readline().split())
      rates.setdefault(name, []).append(tuple(found))
  for process in running.values():
    process.stdin.close()
    process.wait()
  return rates


def pillow(encoded: bytes, choose: Callable) -> np.ndarray:
  """Decodes with Pillow, at a reduced size if possible, and scales with Pillow."""
  opened = Image.open(io.BytesIO(encoded))
  left, top, right, bottom = box = choose(opened.height, opened.width)
  high, wide = (n * edge / side for n, edge, side in zip(
      (opened.height, opened.width), SIZE, (bottom - top, right - left)))  # fmt: skip
  whole = opened.size
  opened.draft(None, (int(np.ceil(wide)), int(np.ceil(high))))
  scale = opened.width / whole[0]
  part = opened.resize(SIZE[::-1], Image.Resampling.BILINEAR, tuple(scale * edge for edge in box))
  return np.asarray(part)


def simplejpeg(encoded: bytes, choose: Callable) -> np.ndarray:
  """Decodes with simplejpeg, a binding of libjpeg-turbo, and scales with Pillow.

  simplejpeg has to read the header in a separate call.
  """
  import simplejpeg

  box = choose(*simplejpeg.decode_jpeg_header(encoded)[:2])
  whole = Image.fromarray(simplejpeg.decode_jpeg(encoded))
  return np.asarray(whole.resize(SIZE[::-1], Image.Resampling.BILINEAR, box))


def simplejpeg_opencv(encoded: bytes, choose: Callable) -> np.ndarray:
  """Decodes with simplejpeg and scales with OpenCV."""
  import simplejpeg

  box = choose(*simplejpeg.decode_jpeg_header(encoded)[:2])
  return image_lib.scale_part(simplejpeg.decode_jpeg(encoded), box, SIZE)


def opencv(encoded: bytes, choose: Callable) -> np.ndarray:
  """Decodes and scales with OpenCV, as this project does."""
  return image_lib.decode_part(encoded, 'a file', 3, choose, SIZE)


DECODERS = {
  'pillow': ('PIL', pillow),
  'opencv': ('cv2', opencv),
  'simplejpeg_and_pillow': ('simplejpeg', simplejpeg),
  'simplejpeg_and_opencv': ('simplejpeg', simplejpeg_opencv),
}


def decoders(folder: pathlib.Path, count: int = 100) -> dict[str, float]:
  """Returns the median CPU milliseconds that each decoder takes to decode and crop one file."""
  files = [file.read_bytes() for file in sorted(folder.rglob('*.jpg'))[:count]]
  chosen = [
    functools.partial(image_lib.random_part, stream.draw_uniform(0, i), **CROP)
    for i in range(len(files))
  ]
  times = {}
  for _ in range(ROUNDS):
    for name, (needs, decode) in DECODERS.items():
      if importlib.util.find_spec(needs):
        began = time.process_time()
        for encoded, choose in zip(files, chosen):
          decode(encoded, choose)
        seconds = time.process_time() - began
        times.setdefault(name, []).append(1e3 * seconds / len(files))
  return {name: round(statistics.median(values), 3) for name, values in times.items()}


def in_memory(size: int = 50_000, batch: int = 512) -> float:
  """Returns how many 32x32 images are gathered per second, in the best of ten rounds."""
  draw = np.random.RandomState(0)
  pixels = draw.randint(0, 256, (size, 32, 32, 3), np.uint8)
  examples = Examples(pixels, draw.randint(0, 10, size).astype(np.int32))
  over_batch = sharding.batch_sharding(devices.make_mesh(batch))
  batches, rates = batching.train_batches(examples, batch, 0, 0, over_batch), []
  for _ in range(2 * ROUNDS):
    began = time.perf_counter()
    for found in itertools.islice(batches, size // batch):
      jax.block_until_ready(found)
    rates.append(size // batch * batch / (time.perf_counter() - began))
  return max(rates)


def resident(workers: int, folder: str) -> None:
  """Streams an eighth of the files for three epochs; prints each epoch's peak resident bytes."""
  split = 'train[:12.5%]+test[:12.5%]'
  batches, held = ours(pathlib.Path(folder), workers, split), [[], [], []]
  for step in range(3 * COUNT // 8 // BATCH):
    next(batches)
    if step % 3 == 0:
      resident = sum(process.memory_info().rss for process in family())
      held[step * BATCH // (COUNT // 8)].append(resident)
  batches.close()
  print(json.dumps(list(map(max, held))))


def train(folder: str) -> None:
  """Prints the metrics of `STEPS` training steps."""
  config = config_lib.default_config()
  epochs = STEPS * int(TRAINED['batch_size']) / (0.8 * COUNT)  # a fifth of the files is held out
  overrides = TRAINED | {'data.source': f'folder:{folder}', 'epochs': str(epochs)}
  for key, text in overrides.items():
    config_lib.override(config, key, text)
  with tempfile.TemporaryDirectory() as workdir:
    workdir = pathlib.Path(workdir)
    trainer.train(config, workdir)
    (line,) = [line for line in writer.read_metrics(workdir) if line['split'] == 'train']
  assert line['step'] == STEPS
  print(json.dumps({name: line[name] for name in ('images_per_second', 'data_wait')}))


def alone(*arguments: object) -> object:
  """Runs a task in its own process and returns what it prints, parsed as JSON."""
  environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
  command = [*COMMAND, *map(str, arguments)]
  child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
  return json.loads(child.stdout.splitlines()[-1])


COMMAND = [sys.executable, '-m', 'benchmarks.input']


def parse(argv: list[str]) -> argparse.Namespace:
  """Parses the task: without arguments, `main` measures everything; child processes get a task."""
  parser = arguments.Parser(__spec__, __doc__)
  parser.set_defaults(task=main)
  tasks = parser.add_subparsers(
    metavar='task', parser_class=argparse.ArgumentParser, help='task of a child process'
  )
  for task in (serve, resident, train):
    child = tasks.add_parser(task.__name__)
    child.set_defaults(task=task)
    if task is serve:
      child.add_argument('name', choices=CONTESTANTS)
    elif task is resident:
      child.add_argument('workers', type=arguments.count)
    child.add_argument('folder')
  return parser.parse_args(argv)


def medians(rounds: dict[str, list], i: int) -> dict[str, float]:
  """Returns each contestant's median rate, per elapsed second (i=0) or CPU second (i=1)."""
  return {
    name: round(statistics.median(turn[i] for turn in turns), 1) for name, turns in rounds.items()
  }


def ratios(rounds: dict[str, list], i: int) -> dict[str, float]:
  """Returns the median ratios of this project's rate to other loaders' rates; i as in `medians`."""
  return {
    f'ratio_to_{name}': round(
      statistics.median(own[i] / turn[i] for own, turn in zip(rounds['ours'], turns)), 3
    )
    for name, turns in rounds.items()
    if not name.startswith('ours')
  }


def main() -> None:
  load, cores = os.getloadavg()[0], cluster.num_cores()
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    print(f'Making {COUNT:,} JPEGs ...', flush=True)
    photos.make(folder, COUNT)
    sizes = [file.stat().st_size for file in folder.rglob('*.jpg')]
    milliseconds = decoders(folder)
    rounds = race(folder, CONTESTANTS)
    trained = alone('train', folder)
    held = {workers: alone('resident', workers, folder) for workers in (0, cores)}
  result = ratios(rounds, 1) | {
    'images_per_second_per_core': medians(rounds, 1),
    'images_per_second': medians(rounds, 0),
    'by_the_clock': ratios(rounds, 0),
    'training': {'variant': 'S/16', 'batch_size': 8, 'steps': STEPS} | trained,
    'resident_megabytes_in_three_epochs': {
      f'{workers} workers': [round(most / 2**20) for most in epochs]
      for workers, epochs in held.items()
    },
    'memory_growth': round(max(epochs[2] / epochs[0] for epochs in held.values()) - 1, 4),
    'cores': cores,
    'images': len(sizes),
    'mean_bytes': round(statistics.mean(sizes)),
    'image_size': list(SIZE),
    'batch_size': BATCH,
    'rounds': {
      name: [[round(rate, 1) for rate in turn] for turn in turns] for name, turns in rounds.items()
    },
    'decode_and_crop_milliseconds': milliseconds,
    'in_memory_images_per_second': round(in_memory()),
    'load_before': load,
    **collect.circumstances(),
  }
  writer.write_json(collect.RESULTS / 'input.json', result)
  print(json.dumps(result, indent=2))


if __name__ == '__main__':
  found = vars(parse(sys.argv[1:]))
  found.pop('task')(**found)
