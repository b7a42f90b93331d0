"""Trains on ImageNet from scratch: `<model>` or `<model>,<recipe>`.

    python main.py --config=configs/imagenet.py:s16 --workdir=runs/s16 \\
        --config.data.dir=~/tensorflow_datasets
    python main.py --config=configs/imagenet.py:b16,medium2 --workdir=runs/b16_medium2
    python main.py --config=configs/imagenet.py:l16,i21k --config.data.source=folder:imagenet21k \\
        --workdir=runs/l16_i21k

This project has not trained these recipes. Their authors report these accuracies on ImageNet:
  * `plain`: 76.5% with S/16 in 90 epochs, 80.0% in 300 epochs (`--config.epochs=300`).
  * `paper`: 77.91% with B/16, 76.53% with L/16.
  * `i21k`: 83.97% with B/16, 85.15% with L/16.

The accuracies of `paper` and `i21k` are from Table 5 of Dosovitskiy et al. 2020, after fine-tuning
at 384 pixels (as in `configs/finetune.py`). The recipes come from these papers:

| recipe | default for | paper | section |
| --- | --- | --- | --- |
| `plain` | `s16` | Beyer et al. 2022, 2205.01580 | Section 2 and its code |
| `paper` | all other models | Dosovitskiy et al. 2020, 2010.11929 | Table 3, 'ImageNet' |
| `i21k` | | Dosovitskiy et al. 2020, 2010.11929 | Table 3, 'ImageNet-21k' |
| `light1` to `strong2` | | Steiner et al. 2021 (AugReg), 2106.10270 | Section 3 and its code |

For each model, AugReg's code uses one of the recipes `light1` to `strong2`: `medium2` for S/16,
B/32, B/16 and L/16, `light2` for S/32, and `light1` for Ti/16.

Choices of this project, where the papers and their code differ or leave a choice:
  * All recipes hold out the last 1% of the training split, to choose the best checkpoint.
  * The model computes in bfloat16; parameters stay float32.
  * The mixup weight is drawn for each image, not once per batch.
  * Images are resized with bilinear interpolation.
  * `i21k` uses one class per image and a softmax loss. It needs a folder with
    `<path>/train/<class>/*` and `<path>/test/<class>/*`. The warm-up is set in epochs: it has
    10,000 steps for 14.2 million images in `train/`, and more steps for more images.

If a batch of 4,096 images does not fit into memory, each device splits its part of the batch into
micro-batches (`--config.micro_batches`).
"""

import functools

from configs import finetune
from vit_jax.config import default_config
from vit_jax.model import variants
from vit_jax.names import choose

MODELS = {k: v for k, v in finetune.MODELS.items() if k not in finetune.SMALL}
EXAMPLES = {'imagenet2012': 0.99 * 1_281_167, 'imagenet21k': 0.99 * 14_200_000}
WARMUP = 10_000  # steps, in all recipes


def plain(config):
  config.epochs = 90.0
  config.batch_size = 1024
  config.model.pool = 'gap'
  config.model.position = 'sincos'
  augreg(config, layers=2, magnitude=10.0, mixup=0.2)


def paper(config):
  config.model.dropout = 0.1
  config.optimizer.lr = 3e-3
  config.optimizer.weight_decay = 0.3


def i21k(config):
  config.data.source = 'folder:'
  config.data.eval_split = 'test'
  config.epochs = 90.0
  config.model.dropout = 0.1
  config.optimizer.lr = 1e-3
  config.optimizer.weight_decay = 0.03
  config.optimizer.clip = 0.0  # according to Table 3's caption, only ImageNet used clipping
  config.schedule.name = 'linear'


def augreg(config, layers, magnitude, mixup):
  config.optimizer.lr = 1e-3
  config.optimizer.weight_decay = 0.1  # multiplied by lr; AugReg's code sets the product, 1e-4
  config.optimizer.moment_dtype = 'bfloat16'
  config.augment.rand_augment.num_layers = layers
  config.augment.rand_augment.magnitude = magnitude
  config.augment.rand_augment.mstd = 0.0
  config.augment.rand_augment.probability = 1.0
  config.augment.rand_augment.space = 'big_vision'
  if mixup:
    config.augment.mix.probability = 1.0
    config.augment.mix.mixup_alpha = mixup
    config.augment.mix.cutmix_alpha = 0.0


AUGREG = {  # RandAugment's layers and magnitude, mixup's alpha
  'light1': (2, 0.0, 0.0),
  'light2': (2, 10.0, 0.2),
  'medium1': (2, 15.0, 0.2),
  'medium2': (2, 15.0, 0.5),
  'strong1': (2, 20.0, 0.5),
  'strong2': (2, 20.0, 0.8),
}
RECIPES = {'plain': plain, 'paper': paper, 'i21k': i21k} | {
  name: functools.partial(augreg, layers=layers, magnitude=magnitude, mixup=mixup)
  for name, (layers, magnitude, mixup) in AUGREG.items()
}


def get_config(variant='s16'):
  model, *recipe = variant.split(',')
  choose('model', model, MODELS)
  recipe = ','.join(recipe) or ('plain' if model == 's16' else 'paper')
  choose('recipe', recipe, RECIPES)

  config = default_config()
  config.model.variant = MODELS[model]
  config.model.pool = 'cls'
  config.model.representation_size = variants.variant_fields(MODELS[model])['width']
  config.model.dtype = 'bfloat16'
  config.epochs = 300.0
  config.batch_size = 4096
  config.eval_batch_size = 1024
  config.log_every = 50
  config.eval_every = config.checkpoint_every = 2500
  config.data.source = 'tfds:imagenet2012'
  config.data.train_split = 'train[:99%]'
  config.data.val_split = 'train[99%:]'
  config.data.eval_split = 'validation'
  config.data.image_size = (224, 224)
  config.data.crop = 224 / 256
  config.data.interpolation = 'bilinear'
  config.data.cache = 'stream'  # random crops need the original files
  config.augment.flip.probability = 0.5
  config.augment.resized_crop.min_area = 0.05
  config.optimizer.clip = 1.0
  RECIPES[recipe](config)
  examples = EXAMPLES['imagenet21k' if recipe == 'i21k' else 'imagenet2012']
  config.schedule.warmup = WARMUP * config.batch_size / examples
  return config
