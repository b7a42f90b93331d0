"""Fine-tunes pretrained weights: `<model>,<dataset>` or `<model>,<dataset>,<recipe>`.

    python main.py --config=configs/finetune.py:b16,cifar10 \\
        --config.init=google/vit-base-patch16-224-in21k --workdir=runs/b16_c10
    python main.py --config=configs/finetune.py:b16,cifar10,adamw --config.init=... --workdir=...
    python main.py --config=configs/finetune.py:b16,cifar10,lora --config.init=... --workdir=...

We have measured only `tiny,folder`: weights trained on Tiny-ImageNet were fine-tuned on CIFAR-10 at
32 pixels for 10 epochs (results/transfer.json). The test accuracy is 75.8% with the default recipe,
and 76.3% with the recipe `adamw`. With `configs/folder.py:tiny`, it was 78.0% from the same
weights, and 61.1% from random weights. `folder.py:tiny` used AdamW then, and now uses Muon.

The default recipe, `sgd`, comes from the ViT paper (2010.11929, Table 4 and B.1.1):
  * SGD with momentum 0.9, batch size 512, no weight decay, gradients clipped to global norm 1;
  * cosine decay after 500 steps of warm-up, as in the paper's code;
  * images of 384 pixels;
  * if the weights and the data have different classes, a new head that starts at zero;
  * 10,000 steps on CIFAR, 20,000 on ImageNet.

The paper's authors chose the learning rate from {0.001, 0.003, 0.01, 0.03} for CIFAR and from
{0.003, 0.01, 0.03, 0.06} for ImageNet. They measured the accuracy with each rate on a held-out part
of the training split (2% for CIFAR, 1% for ImageNet). The final run used the whole training split.
With these flags, a run holds out 2% of CIFAR, and measures the accuracy with the learning rate
0.01:

    --config.data.train_split='train[:98%]' --config.data.val_split='train[98%:]' \\
        --config.optimizer.lr=0.01

The recipe `adamw` uses AdamW with the settings of MAE (2111.06377, Table 9): layer-wise
learning-rate decay 0.75, weight decay 0.05, label smoothing 0.1 and stochastic depth 0.1. Unlike
MAE, it uses no RandAugment, mixup or cutmix. Batch size, steps, warm-up, gradient clipping, crops
and image size are the same as in `sgd`.

The recipe `lora` freezes the weights of the backbone. It trains the head and a low-rank update of
each kernel in attention and MLP, with rank 8 (Hu et al. 2021, 2106.09685). We tried it with `tiny`
and one seed. Weights trained on Tiny-ImageNet were fine-tuned on 1,630 CIFAR-10 images, for 611
steps with a batch size of 32. On 370 held-out images, the accuracy was 58.9% with a learning rate
of 0.001, 58.4% with 0.003, and 61.1% with 0.01. The recipe `adamw`, with a learning rate of 0.001,
reached 59.2%. The uncertainty is larger than these differences.

Choices of this project, not of the paper:
  * horizontal flips; on CIFAR also a border of 4 pixels and a random crop of the original size;
  * for `folder`, a new run chooses batch size, epochs and warm-up from the number of images, and
    the learning rate from the batch size;
  * bfloat16 for the models at 384 pixels;
  * 378 pixels for `h14`, because 384 is not a multiple of 14.

ImageNet is not kept in memory, so its images are decoded again in each epoch. As in the paper's
code, random crops of ImageNet images keep at least 5% of the image area.
"""

from vit_jax.config import default_config
from vit_jax.names import choose

MODELS = {
  'tiny': 'tiny',
  'small': 'small',
  'ti16': 'Ti/16',
  's16': 'S/16',
  's32': 'S/32',
  'b16': 'B/16',
  'b32': 'B/32',
  'l16': 'L/16',
  'l32': 'L/32',
  'h14': 'H/14',
}
SMALL = ('tiny', 'small')  # models for 32x32 images

BATCH_SIZE = 512


def follow_data(config):
  """Sets batch size, epochs, warm-up, learning rate and checkpoint interval to None.

  The recipe's original values are stored in the keys `recipe.*`. A new run then computes its own
  values from its number of images and from these keys.
  """
  for key in ('batch_size', 'epochs'):
    config.recipe[key], config[key] = config[key], None
  config.recipe.warmup, config.schedule.warmup = config.schedule.warmup, None
  config.recipe.lr, config.optimizer.lr = config.optimizer.lr, None
  config.checkpoint_every = None


def passes(steps, examples):
  """Converts steps of `BATCH_SIZE` examples to epochs over a training split of `examples`."""
  return steps * BATCH_SIZE / examples


CIFAR = dict(
  test='test',
  epochs=passes(10_000, 50_000),
  warmup=passes(500, 50_000),
  padding=4,
  cache='memory',  # images are augmented at 32 pixels, then enlarged
)
DATASETS = {  # source, test split, epochs, warm-up epochs and cropping
  'cifar10': CIFAR | dict(source='tfds:cifar10'),
  'cifar100': CIFAR | dict(source='tfds:cifar100'),
  'imagenet2012': dict(
    source='tfds:imagenet2012',
    test='validation',
    epochs=passes(20_000, 1_281_167),
    warmup=passes(500, 1_281_167),
    padding=0,
    min_area=0.05,
    cache='stream',
  ),
  'folder': dict(source='folder:', test='test', epochs=20.0, warmup=1.0, padding=0),
}


def sgd(config):
  config.optimizer.name = 'sgd'
  config.optimizer.lr = 0.03
  config.optimizer.weight_decay = 0.0


def adamw(config):
  config.optimizer.name = 'adamw'
  config.optimizer.lr = 1e-3 * BATCH_SIZE / 256
  config.optimizer.weight_decay = 0.05
  config.optimizer.layer_decay = 0.75
  config.loss.label_smoothing = 0.1
  config.model.stochastic_depth = 0.1


def lora(config):
  config.adapt = 'lora'
  config.optimizer.name = 'adamw'
  config.optimizer.lr = 1e-3
  config.optimizer.weight_decay = 0.05
  config.loss.label_smoothing = 0.1


RECIPES = {'sgd': sgd, 'adamw': adamw, 'lora': lora}


def parse(variant):
  """Splits a variant such as `b16,cifar10` into `(model, dataset, recipe)`; default recipe: `sgd`.

  The three parts are keys of `MODELS`, `DATASETS` and `RECIPES`.

  Raises:
    ValueError: the variant does not have two or three parts, or a name is unknown.
  """
  parts = variant.split(',')
  if len(parts) not in (2, 3):
    raise ValueError(
      f'variant {variant!r} must be <model>,<dataset> or <model>,<dataset>,<recipe>, e.g. '
      'b16,cifar10 or b16,folder,lora.'
    )
  model, dataset, recipe = [*parts, 'sgd'][:3]
  choose('model', model, MODELS)
  choose('dataset', dataset, DATASETS)
  choose('recipe', recipe, RECIPES)
  return model, dataset, recipe


def get_config(variant='b16,cifar10'):
  model, dataset, recipe = parse(variant)
  config = default_config()
  config.model.variant = MODELS[model]
  if model not in SMALL:
    config.data.image_size = (378, 378) if model == 'h14' else (384, 384)
    config.model.dtype = 'bfloat16'

  data = DATASETS[dataset]
  config.data.source = data['source']
  config.data.eval_split = data['test']
  config.augment.flip.probability = 0.5
  config.augment.pad_crop.padding = data['padding']
  config.augment.resized_crop.min_area = data.get('min_area', 1.0)
  config.data.cache = data.get('cache', 'auto')

  config.batch_size = BATCH_SIZE
  config.epochs = data['epochs']
  config.schedule.warmup = data['warmup']
  config.log_every = 50
  config.optimizer.clip = 1.0
  RECIPES[recipe](config)
  if dataset == 'folder':
    follow_data(config)
    if recipe == 'lora':  # its learning rate was tried with a batch size of 32
      config.recipe.lr *= (BATCH_SIZE / 32) ** 0.5
    config.data.train_split = config.data.val_split = None
  return config
