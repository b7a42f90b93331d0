"""Trains on your own images in `<path>/<class>/*`, or in `<path>/train/` and `<path>/test/`.

    python main.py --config=configs/folder.py:small --config.data.source=folder:photos \\
        --workdir=runs/photos

`cifar10.py` lists the variants. A new run chooses batch size, epochs, warm-up and learning rate
from the number of images, and logs its choices. `b16` and `l16` resize the images to 224 pixels.
The other variants resize them to 32, 64, 128 or 224 pixels, depending on the median size of the
images.
"""

from configs import cifar10, finetune


def get_config(variant='small'):
  config = cifar10.get_config(variant)
  config.data.source = 'folder:'
  config.data.mean = config.data.std = None  # taken from `init`, else 0.5
  config.data.cache = 'auto'
  config.progressive.sizes, config.progressive.until = (), ()  # `coffee` and `laptop` set both
  if variant not in ('b16', 'l16'):
    config.data.image_size = None  # 32 to 224 pixels, with patches of 4 to 16
  finetune.follow_data(config)
  return config
