"""Writes JPEGs of about 400x350 pixels for benchmarks with data larger than memory.

    python -m benchmarks.photos folder 20000      # train/<class>/*.jpg, 1.5 GB

Images are parts of larger noise images. As in photographs, the noise has lower amplitude at higher
frequency. With this JPEG quality, a file has 0.55 bytes per pixel, as in ImageNet. Every call
writes the same files.
"""

import argparse
import concurrent.futures
import pathlib
import sys

import numpy as np
from PIL import Image

from benchmarks import arguments

CLASSES = 100
CANVAS = 1024  # pixels
QUALITY = 90


def canvas(seed: int) -> np.ndarray:
  """Returns a uint8 image of noise, `[CANVAS, CANVAS, 3]`."""
  draw = np.random.RandomState(seed)
  y, x = np.meshgrid(np.fft.fftfreq(CANVAS), np.fft.rfftfreq(CANVAS), indexing='ij')
  falling = 1 / np.maximum(np.hypot(y, x), 1 / CANVAS)
  grey, *colours = (
    np.fft.irfft2(np.fft.rfft2(draw.randn(CANVAS, CANVAS)) * falling) for _ in range(4)
  )
  pixels = np.stack([grey / grey.std() + 0.3 * colour / colour.std() for colour in colours], axis=2)
  return np.clip(128 + 50 * pixels, 0, 255).astype(np.uint8)


def make(folder: pathlib.Path, count: int) -> None:
  """Writes `count` images of different shapes and sizes, spread evenly over the classes."""
  canvases = [canvas(seed) for seed in range(8)]
  for label in range(CLASSES):
    (folder / 'train' / f'{label:03}').mkdir(parents=True)

  def write(i):
    draw = np.random.RandomState([1, i])
    height, width = draw.randint(250, 450), draw.randint(300, 500)
    top, left = draw.randint(CANVAS - height), draw.randint(CANVAS - width)
    window = canvases[i % len(canvases)][top : top + height, left : left + width]
    image = Image.fromarray(window if draw.rand() < 0.5 else window[:, ::-1])
    image.save(folder / 'train' / f'{i % CLASSES:03}' / f'{i}.jpg', quality=QUALITY)

  with concurrent.futures.ThreadPoolExecutor() as pool:
    list(pool.map(write, range(count)))


def parse(argv: list[str]) -> argparse.Namespace:
  parser = arguments.Parser(__spec__, __doc__)
  parser.add_argument('folder', type=pathlib.Path, help='output folder')
  parser.add_argument('count', type=arguments.count, help='number of images')
  args = parser.parse_args(argv)
  if (args.folder / 'train').exists():
    parser.error(f'{args.folder}/train already exists and is not replaced; choose another folder')
  return args


def main(argv: list[str]) -> None:
  args = parse(argv)
  make(args.folder, args.count)


if __name__ == '__main__':
  main(sys.argv[1:])
