"""Trains on scikit-learn's digits of 8x8 pixels: 1,437 training images, 360 test images.

    python main.py --config=configs/digits.py --workdir=runs/digits

The test accuracy is 99.17% (mean of 5 seeds). A run takes 30 seconds on 2 CPU cores
(results/digits.json).
"""

from vit_jax.config import default_config


def get_config():
  config = default_config()
  config.epochs = 75.0
  config.batch_size = 16
  config.eval_batch_size = 360
  config.log_every = 50
  config.eval_every = 1000
  config.checkpoint_every = 2000
  config.data.source = 'digits'
  config.data.image_size = (8, 8)
  config.augment.pad_crop.padding = 1
  config.augment.pad_crop.mode = 'constant'  # black, like the border of the scans
  config.augment.mix.probability = 0.5
  config.augment.off_for_last = 0.2
  config.model.variant = 'tiny/2'
  config.model.mlp_dim = 96
  config.model.pool = 'gap'
  config.model.position = 'rope'
  config.optimizer.lr = 3e-3
  config.optimizer.b2 = 0.99
  config.optimizer.weight_decay = 0.2
  config.ema = 0.998
  config.loss.label_smoothing = 0.1
  return config
