"""Pretrains on images without labels, as a masked autoencoder: `<model>,<dataset>`.

    python main.py --config=configs/mae.py:tiny,cifar10 --workdir=runs/mae \\
        --config.data.dir=~/tensorflow_datasets
    python main.py --config=configs/mae.py:b16,folder --config.data.source=images:photos \\
        --workdir=runs/mae

`finetune.py` lists the models and datasets. Labels are ignored. The data source `images:<path>`
reads any folder of images, with or without class folders. We have measured only `tiny`, on images
of 32 pixels (docs/pretraining.md). To train a classifier, start a second run from the weights in
the workdir:

    python main.py --config=configs/finetune.py:b16,folder --config.init=runs/mae \\
        --config.data.source=folder:photos --workdir=runs/photos

The models for 224 pixels use the recipe of MAE (He et al. 2021, 2111.06377, Section 4, Table 8):
  * 75% of the patches are hidden; the decoder has 8 blocks of width 512;
  * AdamW with b2 = 0.95, weight decay 0.05, and a learning rate of 2.4e-3, which is
    1.5e-4 * 4,096 / 256 (if you change `batch_size`, also scale `optimizer.lr`);
  * a batch size of 4,096, and 800 epochs: 40 of warm-up, then cosine decay;
  * random crops of at least 20% of the image area (as in the paper's code), and flips.

Choices of this project, not of the paper:
  * average pooling of the patch tokens; the paper finds it as good as a class token (Appendix A.1);
  * random crops are resized with a filter close to bilinear; the paper's code uses bicubic;
  * pixels are scaled to -1 to 1; the paper's code normalizes each channel;
  * the frequencies of the sine-cosine positions are those of big_vision;
  * patches of 14 pixels for `h14`; bfloat16 for the models at 224 pixels;
  * the whole recipe of `tiny` and `small`, including their decoder of 2 blocks;
  * for `folder`, a new run chooses batch size, epochs, warm-up and learning rate, as in
    `finetune.py`.
"""

from configs import cifar10, finetune
from vit_jax.config import default_config
from vit_jax.names import choose

DECODERS = {'tiny': (48, 2, 4), 'small': (128, 2, 4)}  # width, blocks, heads
LARGE = (512, 8, 16)


def parse(variant):
  parts = variant.split(',')
  if len(parts) != 2:
    raise ValueError(f'variant {variant!r} must be <model>,<dataset>, e.g. tiny,cifar10.')
  choose('model', parts[0], finetune.MODELS)
  choose('dataset', parts[1], finetune.DATASETS)
  return parts


def get_config(variant='tiny,cifar10'):
  model, dataset = parse(variant)
  config, small = default_config(), model in finetune.SMALL
  config.objective = 'masked'
  for key, value in zip(('width', 'depth', 'heads'), DECODERS.get(model, LARGE)):
    config.masked[f'decoder_{key}'] = value
  config.model.variant = finetune.MODELS[model]
  config.model.pool = 'gap'
  config.model.position = 'sincos'
  data = finetune.DATASETS[dataset]
  config.data.source = 'images:' if dataset == 'folder' else data['source']
  config.data.eval_split = data['test']
  config.data.cache = data.get('cache', 'auto')
  config.augment.flip.probability = 0.5
  config.augment.pad_crop.padding = data['padding']
  if not data['padding']:
    config.augment.resized_crop.min_area = 0.2
  config.log_every = 50
  config.optimizer.b2 = 0.95
  config.optimizer.weight_decay = 0.05
  if small:
    config.epochs = 100.0
    config.batch_size = 256
    config.optimizer.lr = 1e-3
    config.schedule.warmup = 5.0
  else:
    config.epochs = 800.0
    config.batch_size = 4096
    config.optimizer.lr = 2.4e-3
    config.optimizer.clip = 0.0
    config.schedule.warmup = 40.0
    config.data.image_size = (224, 224)
    config.model.dtype = 'bfloat16'
  if small and dataset == 'cifar10':  # as in `cifar10.py`, whose runs can start from these weights
    recipe = cifar10.get_config(model)
    config.data.mean, config.data.std = recipe.data.mean, recipe.data.std
  if dataset == 'folder':
    finetune.follow_data(config)
    # Holds out the same images for validation as `finetune.py`. So a second run with `finetune.py`
    # can validate on images that this run was not trained on.
    config.data.train_split = config.data.val_split = None
  return config
