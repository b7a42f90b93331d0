"""Your own images: `<path>/<class>/*`, or `<path>/train/<class>/*` beside `<path>/test/`.

    python main.py --config=configs/folder.py:small --config.data.source=folder:photos \
        --workdir=runs/photos
"""

from configs import cifar10


def get_config(variant='small'):
  config = cifar10.get_config(variant)
  config.data.source = 'folder:'
  config.data.mean = config.data.std = None  # those of `init`, or 0.5
  return config
