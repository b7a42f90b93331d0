"""Trains on your own images in `<path>/<class>/*`, or in `<path>/train/` and `<path>/test/`.

    python main.py --config=configs/folder.py:small --config.data.source=folder:photos \\
        --workdir=runs/photos

The variants are those in `cifar10.py`. A new run chooses batch size, epochs, warm-up and learning
rate from the number of images, and logs its choices. `tiny`, `small`, `wide` and `deep` resize the
images to 32, 64, 128 or 224 pixels, depending on the median size of the images. `b16` and `l16`
always use 224 pixels.
"""

from configs import cifar10, finetune


def get_config(variant='small'):
  config = cifar10.get_config(variant)
  config.data.source = 'folder:'
  config.data.mean = config.data.std = None  # taken from `init`, else 0.5
  config.data.cache = 'auto'
  config.progressive.sizes, config.progressive.until = (), ()  # `coffee` has some for 32 pixels
  if variant not in ('b16', 'l16'):
    config.data.image_size = None  # 32 to 224 pixels, with patches of 4 to 16
  finetune.follow_data(config)
  return config
