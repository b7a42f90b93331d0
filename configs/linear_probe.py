"""Trains a linear classifier on a frozen backbone: `<model>,<dataset>`, as in `finetune.py`.

    python main.py --config=configs/linear_probe.py:b16,cifar10 \\
        --config.init=google/vit-base-patch16-224-in21k --workdir=runs/b16_c10_probe

We have measured only `tiny`, with a head trained on CIFAR-10. The test accuracy was 62.2% with a
backbone trained on Tiny-ImageNet (10 epochs, results/transfer.json). With a backbone that was
pretrained without labels (50 epochs, results/masked.json), it was 44.8%.

For each learning rate in the config key `sweep`, a run trains a head on the first 98% of the
training split. It measures the head's accuracy on the last 2%. For `folder`, the accuracy is
measured on the data's own validation split or, without one, on 10% of the training images. The
final run trains a head on all images of both parts, with the best learning rate. Images are not
augmented, so the backbone processes each image only once, at 224 pixels (32 for `tiny` and
`small`). The optimizer is SGD without weight decay. The learning rates are a choice of this
project, not of a paper.
"""

from configs import finetune


def get_config(variant='b16,cifar10'):
  model, dataset, _ = finetune.parse(variant)
  if variant.count(',') > 1:
    raise ValueError(f'variant {variant!r} must be <model>,<dataset>, e.g. b16,cifar10.')
  config = finetune.get_config(f'{model},{dataset}')
  config.freeze = 'backbone'
  config.sweep = (0.01, 0.03, 0.1, 0.3, 1.0)
  config.schedule.warmup = 0.0
  if dataset == 'folder':
    config.recipe.epochs = 50.0
    config.checkpoint_every = 1000
  else:
    config.epochs = 50.0
    config.data.train_split, config.data.val_split = 'train[:98%]', 'train[98%:]'
  if model not in finetune.SMALL:
    config.data.image_size = (224, 224)
  config.augment.flip.probability = 0.0
  config.augment.pad_crop.padding = 0
  config.augment.resized_crop.min_area = 1.0
  config.optimizer.lr = 0.1  # used only if `sweep` is empty
  return config
