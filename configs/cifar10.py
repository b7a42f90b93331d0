"""Trains on CIFAR-10 from scratch, with a model for 32x32 or 224x224 pixels.

    python main.py --config=configs/cifar10.py:tiny --workdir=runs/c10 \\
        --config.data.dir=~/tensorflow_datasets

| variant | pixels | machine, time | accuracy |
| --- | --- | --- | --- |
| `coffee` | 32 | 2 CPU cores, 13 minutes | 81.7% |
| `laptop` | 32 | 2 CPU cores, 46 minutes | 84.2% |
| `tiny` | 32 | 2 CPU cores, 93 minutes | 83.2% |
| `small`, `wide`, `deep` | 32 | made for a GPU | not measured yet |
| `b16`, `l16` | 224 | made for a GPU | not measured yet |

The accuracy is measured on the test images. In a shorter run, with 20 epochs and without
RandAugment, `tiny` reaches 80.0% in 9 minutes. `small`, `wide` and `deep` follow published recipes
for models of their size.

The times depend on the processor, because the number of epochs is fixed. The machines and
the experiments are described in results/README.md and results/notes.md.
"""

from vit_jax.config import default_config
from vit_jax.names import choose

VARIANTS = {
    'coffee': 'tiny', 'laptop': 'tiny', 'tiny': 'tiny', 'small': 'small', 'wide': 'wide',
    'deep': 'small', 'b16': 'B/16', 'l16': 'L/16',
}  # fmt: skip


def get_config(variant='tiny'):
  config = default_config()
  config.model.variant = choose('variant', variant, VARIANTS)
  config.model.pool = 'gap'
  config.data.mean = (0.4914, 0.4822, 0.4465)
  config.data.std = (0.2470, 0.2435, 0.2616)
  config.augment.pad_crop.padding = 4
  config.augment.flip.probability = 0.5
  config.loss.label_smoothing = 0.1
  config.log_every = 50
  config.optimizer.b2 = 0.99

  if VARIANTS[variant] == 'tiny':
    config.optimizer.name = 'muon'
    config.optimizer.lr = 1e-2
    config.optimizer.momentum = 0.95
    config.schedule.warmup = 2.0
    config.augment.rand_augment.num_layers = 1
    config.augment.rand_augment.magnitude = 5.0
    config.augment.off_for_last = 0.2
    config.epochs = 100.0
    if variant in ('coffee', 'laptop'):
      config.model.num_heads = 2
      config.model.position = 'sincos'
      # Steps with small images take less time.
      config.progressive.sizes, config.progressive.until = (12, 16, 24), (0.4, 0.75, 0.92)
      config.optimizer.lr = 7e-3
      config.optimizer.weight_decay = 0.12
      config.schedule.name = 'linear'
      config.schedule.warmup = 1.0
    if variant == 'coffee':  # 0.2M parameters
      config.epochs = 45.0
      config.model.width, config.model.mlp_dim, config.model.depth = 80, 160, 4
    elif variant == 'laptop':  # 0.8M parameters
      config.epochs = 50.0
      config.model.width, config.model.mlp_dim, config.model.depth = 128, 256, 6
      config.augment.rand_augment.num_layers = 2
      config.augment.rand_augment.magnitude = 7.0
      config.augment.mix.probability = 0.3
  elif variant in ('small', 'wide', 'deep'):
    config.epochs = 1000.0 if variant == 'deep' else 600.0
    config.batch_size = 512
    config.optimizer.lr = 1.1e-3
    config.optimizer.weight_decay = 0.06
    config.schedule.warmup = 10.0
    config.ema = 0.9998
    config.model.stochastic_depth = 0.1
    config.augment.rand_augment.num_layers = 2
    config.augment.mix.probability = 1.0
    config.augment.off_for_last = 0.4
    if variant == 'deep':  # 9.5M parameters
      config.model.depth = 12
      config.model.mlp_dim = 1024
  else:  # the ViT paper's models: a class token, and images enlarged to 224 pixels
    config.model.pool = 'cls'
    config.data.image_size = (224, 224)
    config.data.cache = 'memory'  # images are augmented at 32 pixels, then enlarged
    config.data.mean = config.data.std = (0.5,)
    config.model.dropout = 0.1
    config.model.dtype = 'bfloat16'
    config.optimizer.weight_decay = 0.1
  return config
