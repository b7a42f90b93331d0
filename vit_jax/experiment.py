"""The model, the loss and the augmentations of a run, from its config.

`opening.py` opens the data and the weights around them.
"""

from collections.abc import Callable
import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import vit_jax
from vit_jax import config as config_lib
from vit_jax.augment import (
  AUGMENTATIONS,
  active,
  augment,
  augment_and_mix,
  mixes,
  normalize,
)
from vit_jax.data import Fit, Reading, fit_image
from vit_jax.distributed import make_mesh, micro_batches, shares
from vit_jax.model import ViT, make
from vit_jax.names import pair
from vit_jax.optim import LOSSES, image_stages
from vit_jax.workdir import TrainingFiles

# What the keys that `init` may decide are without it.
DEFAULTS = {'model.variant': 'B/16', 'data.mean': (0.5,), 'data.std': (0.5,)}


@dataclasses.dataclass(frozen=True)
class Task:
  """What the training data decided; travels in the checkpoint.

  Attributes:
    class_names: name of each label; none where weights without a head are looked at.
    stored_size: (height, width) that images are fitted to on the host.
    channels: 1 (grey) or 3 (RGB).
    train_examples: size of the training split, which the order of examples hangs on.
    fingerprint: of the names and labels in the source's `train`; empty where unknown.
  """

  class_names: tuple[str, ...]
  stored_size: tuple[int, int]
  channels: int
  train_examples: int = 0
  fingerprint: str = ''

  @classmethod
  def load(cls, saved: dict) -> 'Task':
    """From the JSON of a checkpoint."""
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A config made concrete. `loss`, `augment` and `augment_and_mix` have their arguments bound.

  `names` is of the files that the weights were trained on; None where a run kept none.
  """

  config: ConfigDict
  task: Task
  model: ViT
  loss: Callable[[jax.Array, jax.Array], jax.Array]
  augment: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
  augment_and_mix: Callable[..., tuple[jax.Array, jax.Array]]
  normalize: Callable[[jax.Array], jax.Array]
  fit: Fit
  names: TrainingFiles | None = dataclasses.field(default_factory=TrainingFiles)

  @property
  def augments(self) -> bool:
    """Whether training may change an image."""
    return bool(active(self.config.augment))

  @property
  def mixes(self) -> bool:
    """Whether training mixes images, and with them the losses of their labels."""
    return mixes(self.config.augment)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, C) of the model's input."""
    return (*pair(self.config.data.image_size), self.task.channels)

  @property
  def reading(self) -> Reading:
    """How its splits are read."""
    data, crop = self.config.data, self.config.augment.resized_crop
    cropped = AUGMENTATIONS['resized_crop'].on(crop)
    return Reading(
      data.cache,
      self.fit,
      crop.to_dict() if cropped else None,
      data.skip_bad_images,
      data.workers,
      data.threads,
    )

  def at(self, size: tuple[int, int]) -> 'Experiment':
    """The same, of the same parameters, seeing all images at another size (height, width).

    Positions stay those of the old size, stretched over the new one's patches. Files are fitted to
    the new size, where they were to the old.
    """
    own = pair(self.config.data.image_size)
    if size == own:
      return self
    config = copy.deepcopy(self.config)
    config.data.image_size = size
    config.progressive.sizes = config.progressive.until = ()
    grid = tuple(n // patch for n, patch in zip(own, self.model.patch_size))
    stored_size = size if self.task.stored_size == own else self.task.stored_size
    return dataclasses.replace(
      self,
      config=config,
      task=dataclasses.replace(self.task, stored_size=stored_size),
      model=self.model.clone(position_grid=self.model.position_grid or grid),
      normalize=functools.partial(self.normalize, size=size),
    )

  def logits(self, params: dict, batch: dict, key: jax.Array | None = None) -> jax.Array:
    """Logits `[B, L]` of a batch of uint8 images.

    Args:
      params: of the model.
      batch: `image` `[B, H, W, C]`; with a key also `example` `[B]`, the positions that draws
        derive from.
      key: of what drops out in a step of training; None at inference.
    """
    if key is None:
      return self.model.apply({'params': params}, self.normalize(batch['image']))
    return self.model.apply(
      {'params': params},
      self.normalize(batch['image']),
      train=not self.config.freeze,  # what is frozen is a function that is only evaluated
      example_B=batch['example'],
      rngs={'dropout': key},
    )

  def micro_batches(self, mesh: jax.sharding.Mesh, batch_size: int) -> int:
    """How many parts each device best takes its share of a batch in.

    Where images mix, neighbours stay together, as far as the share is of an even number.
    """
    height, width, _ = self.image_shape
    patches = (height // self.model.patch_size[0]) * (width // self.model.patch_size[1])
    together = group(self.config) if batch_size // shares(mesh) % 2 == 0 else 1
    return micro_batches(mesh, batch_size, patches, self.model.width, together)

  def saved(self) -> dict:
    """What a checkpoint holds of it; see `Checkpoints.save`."""
    return {
      'version': vit_jax.__version__,
      'config': config_lib.to_dict(self.config),
      'imports': list(config_lib.imports),
      'task': dataclasses.asdict(self.task),
      'names': self.names.item(),
      'inherited_splits': self.names.inherited_splits,
    }


def assemble(config: ConfigDict, task: Task) -> Experiment:
  """The model and its functions, checked on an abstract image.

  Raises:
    ValueError: a model that can't be, or does not fit the images.
  """
  config = config_lib.fill(config, DEFAULTS)
  fields = dict(config.model)
  if fields['patch_size'] is not None:
    fields['patch_size'] = pair(fields['patch_size'])
  model = make(fields.pop('variant'), len(task.class_names) or None, **fields)
  for name in ('mean', 'std'):
    values = config.data[name]
    if len(values) not in (1, task.channels) or (name == 'std' and min(values) <= 0):
      raise ValueError(
        f'data.{name}={values}: the images have {task.channels} channel(s), so it needs 1 or '
        f'{task.channels} values{", all positive" if name == "std" else ""}.'
      )
  loss, geometry = dict(config.loss), {}
  if task.stored_size == pair(config.data.image_size):  # else images are kept small, and whole
    geometry = dict(crop=config.data.crop, stretch=config.data.stretch)
  arguments = config.augment.to_dict()
  if config.data.cache == 'stream':  # the file is cropped, while it is decoded
    arguments['resized_crop']['min_area'] = AUGMENTATIONS['resized_crop'].off
  experiment = Experiment(
    config,
    task,
    model,
    functools.partial(LOSSES[loss.pop('name')], **loss),
    functools.partial(augment, arguments=arguments),
    functools.partial(augment_and_mix, arguments=arguments),
    functools.partial(
      normalize,
      size=pair(config.data.image_size),
      mean=config.data.mean,
      std=config.data.std,
    ),
    functools.partial(fit_image, interpolation=config.data.interpolation, **geometry),
  )
  jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *experiment.image_shape)))
  for _, size in image_stages(config, 0):
    if any(n % patch for n, patch in zip(size, model.patch_size)):
      raise ValueError(
        f'progressive.sizes: images of {size[0]}x{size[1]} pixels do not divide into patches of '
        f'{model.patch_size[0]}x{model.patch_size[1]}.'
      )
  return experiment


def group(config: ConfigDict) -> int:
  """How many neighbours of a batch stay on one device and in one micro-batch: those that mix."""
  return 2 if mixes(config.augment) else 1


def mesh_for(config: ConfigDict) -> jax.sharding.Mesh:
  """Of the devices that the config asks for, and that its batch divides over.

  Raises:
    ValueError: there is none such.
  """
  return make_mesh(**division(config), shape=dict(config.mesh))


def division(config: ConfigDict) -> dict[str, int]:
  """How a batch may be divided over devices, as `devices.make_mesh` takes it."""
  return {
    'batch_size': config.batch_size,
    'micro_batches': config.micro_batches or 1,
    'group': group(config),
  }
