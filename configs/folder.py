"""Trains on your own images in `<path>/<class>/*`, or in `<path>/train/` and `<path>/test/`.

    python main.py --config=configs/folder.py:small --config.data.source=folder:photos \
        --workdir=runs/photos

The variants are those in `cifar10.py`. The result depends on your images.
"""

from configs import cifar10


def get_config(variant='small'):
  config = cifar10.get_config(variant)
  config.data.source = 'folder:'
  config.data.mean = config.data.std = None  # taken from `init`, else 0.5
  return config
