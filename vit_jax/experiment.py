"""Builds the model, the loss and the augmentations of a run from its config."""

from collections.abc import Callable, Sequence
import copy
import dataclasses
import functools

import jax
from ml_collections import ConfigDict
import numpy as np

import vit_jax
from vit_jax import config as config_lib
from vit_jax.augment import AUGMENTATIONS, active, augment, augment_and_mix, mixes, normalize
from vit_jax.check import check_channels
from vit_jax.data import Fit, Reading, Source, fit_image
from vit_jax.distributed import SHARE, Fitted, make_mesh, memory_limit, micro_batches, shares
from vit_jax.model import (
  Packer,
  ViT,
  applied,
  check_adapter,
  check_parameters,
  kept_bytes,
  make,
  merged,
  stretched,
)
from vit_jax.names import accepted, pair
from vit_jax.optim import (
  CLASSIFIERS,
  Objective,
  Teacher,
  check_classifier,
  check_stages,
  check_weights,
  choose_loss,
  objective_of,
  split_frozen,
)
from vit_jax.workdir import Calibration, Task, TrainingFiles

# Values of these keys if neither the config nor `init` sets them.
DEFAULTS = {'model.variant': 'B/16', 'data.mean': (0.5,), 'data.std': (0.5,)}


@dataclasses.dataclass(frozen=True)
class Experiment:
  """The model that a config describes, with the functions that training and evaluation need.

  `fit` resizes an image on the host. `names` lists the files that the weights were trained on; None
  if no list was recorded. Only training needs `teacher` and `weight_L`, the weights of the
  classes in the loss. Both are None if the run does not use them. `calibration` turns logits into
  probabilities. `parts` is the number of micro-batches with which a training step fits into memory;
  None if not computed. `pack` pads images that keep their aspect ratio; None if all images are
  resized to one shape.
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
  teacher: Teacher | None = None
  calibration: Calibration = dataclasses.field(default_factory=Calibration)
  parts: int | None = None
  weight_L: np.ndarray | None = None
  pack: Packer | None = None

  @property
  def objective(self) -> Objective:
    """The entry of `OBJECTIVES` that the config selects; it defines what training minimises."""
    return objective_of(self.config)

  @property
  def chosen_attention(self) -> str:
    """The kernel that the run chose for `model.attention=auto`; `auto` if the run chose none."""
    return self.model.attention if self.config.model.attention == 'auto' else 'auto'

  @property
  def sees_images(self) -> bool:
    """Whether batches contain images; False if they contain features of images."""
    return True

  @property
  def augments(self) -> bool:
    """Whether the config enables any augmentation."""
    return bool(active(self.config.augment))

  @property
  def mixes(self) -> bool:
    """Whether training mixes images in pairs (mixup or cutmix)."""
    return mixes(self.config.augment)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """Shape (H, W, C) of the model's input."""
    return (*pair(self.config.data.image_size), self.task.channels)

  @property
  def reading(self) -> Reading:
    """Settings for reading the splits."""
    data, crop = self.config.data, self.config.augment.resized_crop
    cropped = AUGMENTATIONS['resized_crop'].on(crop)
    crop, skip = crop.to_dict() if cropped else None, data.skip_bad_images
    if self.pack:  # `pack` cannot be sent to worker processes
      return Reading('stream', self.fit, crop, skip, 0, data.threads, self.pack)
    return Reading(data.cache, self.fit, crop, skip, data.workers, data.threads)

  @property
  def patch_sizes(self) -> tuple[tuple[int, int], ...]:
    """Patch sizes of the training steps, from the smallest to the largest."""
    return tuple(sorted(map(pair, self.config.patch_sizes))) or (self.model.patch_size,)

  def at(
    self, size: tuple[int, int] | None = None, patch_size: int | Sequence[int] | None = None
  ) -> 'Experiment':
    """Returns an experiment for another image size and patch size, with the same parameters.

    A size that is None stays unchanged. The positions are stretched to the new grid of patches,
    and the patch embedding is resized. If images are stored at the size of the model's input, their
    stored size becomes `size`.
    """
    own, own_patch = pair(self.config.data.image_size), self.model.patch_size
    size, patch = size or own, pair(patch_size or own_patch, 'model.patch_size')
    if (size, patch) == (own, own_patch):
      return self
    config = copy.deepcopy(self.config)
    config.data.image_size, config.model.patch_size = size, patch
    config.progressive.sizes = config.progressive.until = config.patch_sizes = ()
    stored_size = size if self.task.stored_size == own else self.task.stored_size
    return dataclasses.replace(
      self,
      config=config,
      task=dataclasses.replace(self.task, stored_size=stored_size),
      model=stretched(self.model, own, patch),
      normalize=functools.partial(self.normalize, size=size),
    )

  def logits(self, params: dict, batch: dict, key: jax.Array | None = None) -> jax.Array:
    """Computes the logits `[B, L]` of a batch of uint8 images.

    Args:
      params: parameters of the model, and of its adapter if it has one.
      batch: `image` `[B, H, W, C]`. In a training step, also `example` `[B]`: the index of each
        image in the whole batch. The index selects the random numbers for the image.
      key: random key for dropout in a training step; None at inference.
    """
    if key is None:
      params = merged(params, self.config)
      return self.model.apply({'params': params}, self.normalize(batch['image']))
    with applied(params, self.config):
      return self.model.apply(
        {'params': params},
        self.normalize(batch['image']),
        train=not self.config.freeze,  # a frozen backbone runs as at inference
        example_B=batch['example'],
        rngs={'dropout': key},
      )

  def split(self, params: dict) -> tuple[dict, dict]:
    """Returns the parameters that this config trains, and the frozen parameters, as two dicts."""
    if self.config.classifier:
      return {}, params
    return split_frozen(params, self.config.freeze, self.config.adapt)

  def probabilities(self, params: dict, image_BHWC: jax.Array) -> jax.Array:
    """Computes the probability of each class, `[B, L]`, for uint8 images `[B, H, W, C]`.

    The logits are divided by the temperature before the softmax. If images can have several labels,
    or `calibration.sigmoid` is True, the probabilities are the sigmoid of the logits instead.
    """
    logits_BL = self.logits(params, {'image': image_BHWC})
    if self.task.multi_label or self.calibration.sigmoid:
      return jax.nn.sigmoid(logits_BL)
    return jax.nn.softmax(logits_BL / self.calibration.temperature)

  def micro_batches(self, mesh: jax.sharding.Mesh, batch_size: int, backward: bool = False) -> int:
    """Returns the fastest number of micro-batches on a device, without or with a backward pass.

    If each device gets an even number of images, images that are mixed in pairs stay together.
    """
    size, patch = self.image_shape, self.model.patch_size
    patches = self.pack.most if self.pack else (size[0] // patch[0]) * (size[1] // patch[1])
    together = group(self.config) if batch_size // shares(mesh) % 2 == 0 else 1
    stores_all = backward and not (self.config.freeze or self.config.patch_sizes)
    kept = kept_bytes(self.model, patches) if stores_all else 0
    return micro_batches(mesh, batch_size, patches, self.model.width, together, kept)

  def training_parts(self, mesh: jax.sharding.Mesh) -> int:
    """Returns the number of micro-batches of a training step."""
    given = self.config.micro_batches or self.parts
    return given or self.micro_batches(mesh, self.config.batch_size, backward=True)

  def budget(self, mesh: jax.sharding.Mesh) -> float | None:
    """Returns the bytes that a program may use on each device; None if no limit is known."""
    limit = (self.config.device_memory or 0) * 2**30 or memory_limit(mesh)
    return SHARE * limit if limit else None

  def fitted(
    self, build: Callable[[int], Callable], mesh: jax.sharding.Mesh, held: int = 0
  ) -> Fitted:
    """Returns a forward pass `(batch, params) -> result` that fits into memory.

    Args:
      build: `build(n)` returns the jitted function that divides a batch into n micro-batches.
      mesh: mesh of the devices.
      held: bytes that arrays other than batch and parameters occupy on each device.
    """
    budget, best = self.budget(mesh), functools.partial(self.micro_batches, mesh)
    return Fitted(build, mesh, best, budget and budget - held)

  def saved(self) -> dict:
    """Returns the description of the run that `Checkpoints.save` stores in each checkpoint."""
    return {
      'version': vit_jax.__version__,
      'config': config_lib.to_dict(self.config),
      'imports': list(config_lib.imports),
      'task': dataclasses.asdict(self.task),
      'attention': self.chosen_attention,
      'plan': self.parts and {'micro_batches': self.parts, 'remat': self.model.remat},
      'teacher': self.teacher and self.teacher.digest,
      'names': self.names.item(),
      'inherited_splits': self.names.inherited_splits,
    }


def assemble(config: ConfigDict, task: Task) -> Experiment:
  """Builds the model and its functions, and checks that the model fits the images.

  Raises:
    ValueError: the config does not describe a valid model, the model does not fit the images, or
      the loss or the classifier does not fit the labels.
  """
  if not objective_of(config).labels:
    task = dataclasses.replace(task, class_names=(), multi_label=False)
  loss = 'sigmoid' if task.multi_label else 'softmax'
  config = config_lib.fill(config, DEFAULTS | {'loss.name': loss})
  fields = dict(config.model)
  fields['patch_size'] = fields['patch_size'] and pair(fields['patch_size'])
  if config.classifier and CLASSIFIERS[config.classifier].stores:
    fields['examples'] = task.train_examples or None  # 0 before the images are counted
  model = make(fields.pop('variant'), len(task.class_names) or None, **fields)
  check_channels(config, task.channels)
  keys, geometry = dict(config.loss), {}
  loss = choose_loss(keys.pop('name'), task.multi_label)
  check_classifier(config.classifier, task.multi_label)
  check_weights(keys.pop('class_weights'), task.class_names)
  if task.stored_size == pair(config.data.image_size):  # a smaller stored image is not cropped
    geometry = dict(crop=config.data.crop, stretch=config.data.stretch)
  arguments = config.augment.to_dict()
  if config.data.cache == 'stream':  # the decoder on the host already crops
    arguments['resized_crop']['min_area'] = AUGMENTATIONS['resized_crop'].off
  experiment = Experiment(
    config,
    task,
    model,
    functools.partial(loss, **accepted(loss, keys)),
    functools.partial(augment, arguments=arguments),
    functools.partial(augment_and_mix, arguments=arguments),
    functools.partial(
      normalize, size=pair(config.data.image_size), mean=config.data.mean, std=config.data.std
    ),
    functools.partial(fit_image, interpolation=config.data.interpolation, **geometry),
  )
  check_parameters(model, experiment.image_shape)
  check_adapter(model, experiment.image_shape, config.adapt, config)
  check_stages(config, model)
  return experiment


def assemble_for(config: ConfigDict, source: Source) -> Experiment:
  """Builds the experiment for a dataset whose images the host resizes to the model's input size."""
  size = pair(config.data.image_size)
  task = Task(source.class_names, size, source.channels, multi_label=source.multi_label)
  return assemble(config, task)


def group(config: ConfigDict) -> int:
  """Returns how many consecutive examples must be on one device: 2 for mixup and cutmix, else 1."""
  return 2 if mixes(config.augment) else 1


def mesh_for(config: ConfigDict) -> jax.sharding.Mesh:
  """Returns the mesh of devices that the config describes.

  Raises:
    ValueError: the devices cannot form this mesh, or the batch cannot be divided over the devices.
  """
  return make_mesh(**division(config), shape=dict(config.mesh))


def division(config: ConfigDict) -> dict[str, int]:
  """Returns the arguments `batch_size`, `micro_batches` and `group` of `devices.make_mesh`."""
  parts = config.micro_batches or 1
  return dict(batch_size=config.batch_size, micro_batches=parts, group=group(config))
