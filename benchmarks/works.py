"""What `benchmarks.speed` measures: which model, which way, at which size.

A work builds from a config of this project; its peers build the same model from the same
sizes.
"""

import dataclasses

from ml_collections import ConfigDict

from vit_jax import cli
from vit_jax import config as config_lib

NUM_CLASSES = 10  # those of the synthetic images
# Of all contestants: one batch seen a thousand times would be learned, and gradients near zero
# are denormal numbers, which a CPU computes slowly.
LEARNING_RATE = 1e-6


@dataclasses.dataclass(frozen=True)
class Work:
  """Attributes:

  config: what it builds from, as `--config` takes it.
  mode: `train` (forward, backward, AdamW) or `inference`.
  batch_size: images a step.
  dtype: of the computation.
  peers: contestants beside this project.
  overrides: of the config, beyond those of `settings`.
  """

  config: str
  mode: str
  batch_size: int
  dtype: str
  peers: tuple[str, ...]
  overrides: tuple[tuple[str, str], ...] = ()

  @property
  def name(self) -> str:
    """Such as `B/16 inference`."""
    return f'{settings(self).model.variant} {self.mode}'


def settings(work: Work) -> ConfigDict:
  """The work's config, without what makes one step differ from another.

  No dropout of any kind, no clipping, no average and none but light augmentation, which the peers
  would have to repeat; AdamW, which they have.
  """
  config = cli.load_file(work.config)
  overrides = {
    'batch_size': str(work.batch_size),
    'data.source': 'synthetic',
    'data.train_split': 'train[:256]',  # over and over
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
  """Keyword arguments that every peer builds its model from."""
  from vit_jax import experiment, names  # which bring JAX: not into a peer's process

  config = settings(work)
  height, width = names.pair(config.data.image_size)
  task = experiment.Task(tuple(map(str, range(NUM_CLASSES))), (height, width), 3)
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
  """Floating-point operations for an image, `{'inference': ..., 'train': ...}`.

  Of matrix products alone, a multiplication and an addition as two. The gradient costs two
  products for each, but one for the patches, whose own gradient nobody needs.
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
GPU_PEERS = ('timm_compiled', 'huggingface_compiled', 'plain_linen')

CIFAR, DTYPE = 'configs/cifar10.py', 'float32'
ERF = (('model.activation', 'gelu'),)  # as Hugging Face and timm have it for these models
WORKS = {
  'cpu': (
    Work(f'{CIFAR}:tiny', 'train', 256, DTYPE, CPU_PEERS),
    Work(f'{CIFAR}:tiny', 'inference', 256, DTYPE, CPU_PEERS),
    Work(f'{CIFAR}:small', 'train', 128, DTYPE, CPU_PEERS),
    Work(f'{CIFAR}:small', 'inference', 128, DTYPE, CPU_PEERS),
    Work(f'{CIFAR}:b16', 'train', 4, DTYPE, HUB_PEERS, ERF),
    Work(f'{CIFAR}:b16', 'inference', 8, DTYPE, HUB_PEERS, ERF),
  ),
  'gpu': (
    Work(f'{CIFAR}:b16', 'train', 256, 'bfloat16', GPU_PEERS, ERF),
    Work(f'{CIFAR}:b16', 'inference', 512, 'bfloat16', GPU_PEERS, ERF),
    Work(f'{CIFAR}:l16', 'train', 128, 'bfloat16', GPU_PEERS, ERF),
    Work(f'{CIFAR}:l16', 'inference', 256, 'bfloat16', GPU_PEERS, ERF),
    Work(f'{CIFAR}:small', 'train', 1024, 'bfloat16', ('timm_compiled', 'plain_linen')),
    Work(f'{CIFAR}:small', 'inference', 2048, 'bfloat16', ('timm_compiled', 'plain_linen')),
  ),
}


def dry(work: Work) -> Work:
  """The same work at a size that any CPU does at once: to see that a script runs."""
  tiny = {'image_size': '32', 'depth': '1', 'width': '64', 'mlp_dim': '64', 'num_heads': '4'}
  overrides = [(f'{"data" if key == "image_size" else "model"}.{key}', tiny[key]) for key in tiny]
  return dataclasses.replace(work, batch_size=4, overrides=work.overrides + tuple(overrides))
