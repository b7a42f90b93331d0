"""A linear classifier on a frozen backbone: `<model>,<dataset>`, as in `finetune.py`.

    python main.py --config=configs/linear_probe.py:b16,cifar10 --config.init=ViT-B_16.npz \\
        --workdir=runs/b16_c10_probe

Each rate of `sweep` trains on the first 98% of train and is scored on the last 2%, the best then
trains on all of it. Nothing touches the images, so the backbone runs once over each, at 224 pixels
(32 for tiny and small). SGD without weight decay; the rates are this project's choice.

Measured for `tiny,folder` alone, from Tiny-ImageNet to CIFAR-10 in 10 epochs: 62.2%
(results/transfer.json).
"""

from configs import finetune


def get_config(variant='b16,cifar10'):
  model, dataset, _ = finetune.parse(variant)
  config = finetune.get_config(f'{model},{dataset}')
  config.freeze = 'backbone'
  config.sweep = (0.01, 0.03, 0.1, 0.3, 1.0)
  config.epochs = 50.0
  config.schedule.warmup = 0.0
  config.data.train_split = 'train[:98%]'
  config.data.val_split = 'train[98%:]'
  if model not in finetune.SMALL:
    config.data.image_size = (224, 224)
  config.augment.flip.probability = 0.0
  config.augment.pad_crop.padding = 0
  config.augment.resized_crop.min_area = 1.0
  config.optimizer.lr = 0.1  # where there is no sweep
  return config
