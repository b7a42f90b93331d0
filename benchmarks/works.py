"""The workloads of `benchmarks.speed`: model, mode and sizes.

This project builds its model from the config of a workload. The other implementations, called
peers, build the same model from the result of `sizes`.
"""

import dataclasses

from ml_collections import ConfigDict

from vit_jax import cli
from vit_jax import config as config_lib

NUM_CLASSES = 10  # number of classes of the synthetic images
# Learning rate of all implementations. With a larger rate, a model would fit its only batch
# perfectly within a thousand steps. The gradients would then become denormal numbers, which slow
# down a CPU.
LEARNING_RATE = 1e-6


@dataclasses.dataclass(frozen=True)
class Work:
  """A workload that this project and other implementations run.

  Attributes:
    config: config file, as passed to `--config`.
    mode: `train` (forward, backward, AdamW) or `inference`.
    batch_size: images per step.
    dtype: dtype of the computation.
    peers: names of the other implementations that run it, as in `contestants.CONTESTANTS`.
    overrides: config overrides in addition to the ones in `settings`.
  """

  config: str
  mode: str
  batch_size: int
  dtype: str
  peers: tuple[str, ...]
  overrides: tuple[tuple[str, str], ...] = ()

  @property
  def name(self) -> str:
    """Name of the workload, such as `B/16 inference`."""
    return f'{settings(self).model.variant} {self.mode}'


def settings(work: Work) -> ConfigDict:
  """Returns the config of a workload, without features that the other implementations lack.

  Dropout, stochastic depth, label smoothing, gradient clipping and EMA are off. The only
  augmentations are crops and flips. The optimizer is AdamW, which all implementations have.
  """
  config = cli.load_file(work.config)
  overrides = {
    'batch_size': str(work.batch_size),
    'data.source': 'synthetic',
    'data.train_split': 'train[:256]',  # the same images in every epoch
    'data.eval_split': 'test[:1]',
    'epochs': '100',
    'model.dropout': '0',
    'model.stochastic_depth': '0',
    'model.dtype': work.dtype,
    'ema': '0',
    'augment.rand_augment.num_layers': '0',
    'augment.mix.probability': '0',
    'optimizer.name': 'adamw',
    'optimizer.clip': '0',
    'optimizer.lr': str(LEARNING_RATE),
    'loss.label_smoothing': '0',
  }
  config_lib.override_all(config, overrides | dict(work.overrides))
  return config


def sizes(work: Work) -> dict:
  """Returns the keyword arguments from which the other implementations build their models."""
  from vit_jax import experiment, names  # imported here to keep JAX out of PyTorch's processes
  from vit_jax.workdir import Task

  config = settings(work)
  height, width = names.pair(config.data.image_size)
  task = Task(tuple(map(str, range(NUM_CLASSES))), (height, width), 3)
  model = experiment.assemble(config, task).model
  assert height == width and model.patch_size[0] == model.patch_size[1]
  return {
    'image_size': height,
    'patch_size': model.patch_size[0],
    'width': model.width,
    'depth': model.depth,
    'num_heads': model.num_heads,
    'head_dim': model.head_size,
    'mlp_dim': model.mlp_dim,
    'activation': model.activation,
    'pool': model.pool,
    'num_classes': NUM_CLASSES,
  }


def flops(
  image_size: int,
  patch_size: int,
  width: int,
  depth: int,
  num_heads: int,
  head_dim: int,
  mlp_dim: int,
  pool: str,
  num_classes: int,
  **_,
) -> dict[str, int]:
  """Returns the floating-point operations for an image, `{'inference': ..., 'train': ...}`.

  Only matrix products count. A multiplication and an addition are two operations. The gradient
  needs two products for each product of the forward pass. The patch embedding needs only one,
  because the gradient of the image is not computed.
  """
  patches = (image_size // patch_size) ** 2
  tokens = patches + (pool == 'cls')
  embedding = patches * 3 * patch_size**2 * width
  heads = num_heads * head_dim
  block = tokens * (4 * width * heads + 2 * width * mlp_dim) + 2 * tokens**2 * heads
  forward = 2 * (embedding + depth * block + width * num_classes)
  return {'inference': forward, 'train': 3 * forward - 2 * embedding}


CPU_PEERS = ('torch_eager', 'torch_compiled', 'plain_linen')
HUB_PEERS = ('huggingface_eager', 'huggingface_compiled', 'plain_linen')
GPU_PEERS = ('timm_compiled', 'huggingface_compiled')  # only two: all share the GPU's memory

CIFAR, DTYPE = 'configs/cifar10.py', 'float32'
ERF = (('model.activation', 'gelu'),)  # the activation of these models in Hugging Face and timm
WORKS = {
  'cpu': (
    Work(f'{CIFAR}:tiny', 'train', 256, DTYPE, CPU_PEERS),
    Work(f'{CIFAR}:tiny', 'inference', 256, DTYPE, CPU_PEERS),
    Work(f'{CIFAR}:small', 'train', 128, DTYPE, CPU_PEERS),
    Work(f'{CIFAR}:small', 'inference', 128, DTYPE, CPU_PEERS),
    Work(f'{CIFAR}:b16', 'train', 4, DTYPE, HUB_PEERS, ERF),
    Work(f'{CIFAR}:b16', 'inference', 8, DTYPE, HUB_PEERS, ERF),
  ),
  'cpu_bfloat16': (
    Work(f'{CIFAR}:small', 'train', 128, 'bfloat16', CPU_PEERS),
    Work(f'{CIFAR}:small', 'inference', 128, 'bfloat16', CPU_PEERS),
    Work(f'{CIFAR}:b16', 'train', 4, 'bfloat16', HUB_PEERS, ERF),
    Work(f'{CIFAR}:b16', 'inference', 8, 'bfloat16', HUB_PEERS, ERF),
  ),
  'gpu': (
    Work(f'{CIFAR}:b16', 'train', 256, 'bfloat16', GPU_PEERS, ERF),
    Work(f'{CIFAR}:b16', 'inference', 512, 'bfloat16', (*GPU_PEERS, 'plain_linen'), ERF),
    Work(f'{CIFAR}:l16', 'train', 64, 'bfloat16', GPU_PEERS, ERF),
    Work(f'{CIFAR}:l16', 'inference', 256, 'bfloat16', (*GPU_PEERS, 'plain_linen'), ERF),
    Work(f'{CIFAR}:small', 'train', 1024, 'bfloat16', ('timm_compiled', 'plain_linen')),
    Work(f'{CIFAR}:small', 'inference', 2048, 'bfloat16', ('timm_compiled', 'plain_linen')),
  ),
}


def dry(work: Work) -> Work:
  """Returns the workload at a tiny size, to test that the benchmark runs on any machine."""
  tiny = {'image_size': '32', 'depth': '1', 'width': '64', 'mlp_dim': '64', 'num_heads': '4'}
  overrides = [(f'{"data" if key == "image_size" else "model"}.{key}', tiny[key]) for key in tiny]
  return dataclasses.replace(work, batch_size=4, overrides=work.overrides + tuple(overrides))
