"""Trains on CIFAR-100 from scratch, with the variants of `cifar10.py`.

    python main.py --config=configs/cifar100.py:small --workdir=runs/c100 \\
        --config.data.dir=~/tensorflow_datasets

We have not measured the accuracy of this config yet.
"""

from configs import cifar10


def get_config(variant='tiny'):
  config = cifar10.get_config(variant)
  config.data.source = 'tfds:cifar100'
  config.data.mean = (0.5071, 0.4865, 0.4409)
  config.data.std = (0.2673, 0.2564, 0.2762)
  return config
