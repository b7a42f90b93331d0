"""Writes a data set with several labels per image: two images side by side, with both labels.

    python -m benchmarks.pairs --source=folder:cifar10 --out=pairs
    python main.py --config=configs/folder.py:tiny --config.data.source=labels:pairs/labels.csv \
        --config.data.image_size=32,64 --workdir=runs/pairs

Each split is paired with itself, so no image is in two splits. Every eighth picture has only its
left half and one label, and every sixteenth is black and has no label.
"""

import csv
import pathlib

import numpy as np
from PIL import Image

from benchmarks.arguments import Parser, count
from vit_jax.data import Reading, Source, fit_image, num_examples, open_source, open_split


def write_pairs(source: Source, out: pathlib.Path, limits: dict[str, int], size: int) -> None:
  """Writes `out/labels.csv` and the pictures `out/<split>/*.png`, each `size` x twice `size`.

  Args:
    source: images with one label each.
    out: folder to write into.
    limits: maximum number of pictures in each split; all images are used by the names of `limits`.
    size: height of a picture.
  """
  out.mkdir(parents=True)
  with (out / 'labels.csv').open('w', encoding='utf-8', newline='') as file:
    rows = csv.writer(file)
    rows.writerow(('path', 'label', 'split'))
    for split, most in limits.items():
      (out / split).mkdir()
      total = num_examples(source.pieces(split))
      order = np.random.RandomState(0).permutation(total)
      examples = open_split(Reading('memory', fit_image), source, split, (size, size))
      for i in range(min(most, total // 2)):
        pair = examples.some(order[2 * i : 2 * i + 2])
        shown = 0 if i % 16 == 15 else 1 if i % 8 == 7 else 2
        pixels = np.concatenate(pair.image_NHWC, axis=1)
        pixels[:, shown * size :] = 0
        name = f'{split}/{i:05}.png'
        Image.fromarray(pixels if source.channels == 3 else pixels[..., 0]).save(out / name)
        labels = {source.class_names[label] for label in pair.label_N[:shown]}
        rows.writerow((name, ';'.join(sorted(labels)), split))


def main() -> None:
  parser = Parser(__spec__, __doc__)
  parser.add_argument('--source', required=True, help='data.source of images with one label each')
  parser.add_argument('--out', type=pathlib.Path, required=True, help='folder to create')
  parser.add_argument('--size', type=count, default=32, help='height of a picture')
  parser.add_argument('--train', type=count, default=25_000, help='most training pictures')
  parser.add_argument('--test', type=count, default=5_000, help='most test pictures')
  args = parser.parse_args()
  if args.out.exists():
    parser.error(f'{args.out} already exists')
  source = open_source(args.source, '', (args.size, args.size))
  write_pairs(source, args.out, {'train': args.train, 'test': args.test}, args.size)


if __name__ == '__main__':
  main()
