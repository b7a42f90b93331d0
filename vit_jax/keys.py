"""The table of all config keys: default, type, unit, range and meaning.

Defaults, overrides, checks, `--help_config` and `docs/config.md` come from `KEYS`. An extension
adds its own keys before a config is made:

    KEYS['augment.mine.strength'] = Key(0.0, 'strength of my augmentation; 0: none', range=(0, 1))
"""

from collections.abc import Collection
import dataclasses


@dataclasses.dataclass(frozen=True)
class Key:
  """What the project knows about one key.

  Attributes:
    default: its value in `default_config()`; None where weights, a variant or a device decide.
    help: meaning and special values, in a line.
    unit: of its value; empty for a name, a switch or a plain number.
    kind: type of its values; needed only where the default is None.
    range: (lowest, highest) value, both included.
    choices: valid names, or the name of their registry in `check.REGISTRIES`.
    may_change: whether a run may change it when it resumes.
  """

  default: object
  help: str
  unit: str = ''
  kind: type | None = None
  range: tuple[float, float] | None = None
  choices: str | Collection[str] = ''
  may_change: bool = False

  def __post_init__(self):
    kind = self.kind or type(self.default)
    if kind not in (bool, int, float, str, tuple):
      raise ValueError(
        f'Key({self.default!r}): its values need a kind: bool, int, float, str or tuple.'
      )
    object.__setattr__(self, 'kind', kind)


SHARE = (0, 1)
DECAY = (0, 0.9999999)  # 1 would keep the first value for ever
COUNT = (1, 1e6)
STEPS = (0, 1e9)

TRAINING = {
  'seed': Key(
    0, 'decides the initial weights, the order of the data and every draw', range=(0, 2**32 - 1)
  ),
  'epochs': Key(
    100.0, 'passes over the training split; more on a finished run add a cycle', range=(0, 1e6)
  ),
  'batch_size': Key(256, 'size of a batch over all devices and processes', 'examples', range=COUNT),
  'micro_batches': Key(
    None,
    'parts that a batch is computed in, one after another; None: 1 on an accelerator, and on a CPU '
    'as many as fit the cache',
    kind=int,
    range=COUNT,
    may_change=True,
  ),
  'eval_batch_size': Key(
    256, 'size of a batch in evaluation', 'examples', range=COUNT, may_change=True
  ),
  'log_every': Key(50, 'interval of training metrics', 'steps', range=STEPS, may_change=True),
  'eval_every': Key(
    1000, 'interval of evaluations; 0: only at the end', 'steps', range=STEPS, may_change=True
  ),
  'checkpoint_every': Key(
    1000, 'interval of checkpoints; 0: only at the end', 'steps', range=STEPS, may_change=True
  ),
  'keep_checkpoints': Key(
    2, 'newest checkpoints to keep, besides the best one by val_split', range=COUNT, may_change=True
  ),
  'init': Key('', 'weights to start from: anything that `vit_jax.load` reads; empty: random'),
  'init_resize': Key(
    'bilinear', 'how the positions of `init` are resized to the patch grid', choices='RESIZES'
  ),
  'freeze': Key('', 'backbone: train only the head, without dropout; empty: all', choices='FREEZE'),
  'sweep': Key(
    (), 'with freeze: learning rates to try; the best one on val_split then trains on all of train'
  ),
  'ema': Key(
    0.0, 'maximum EMA decay per step; evaluation uses the averaged weights; 0: none', range=DECAY
  ),
  'deterministic': Key(
    False, 'same bits in every run on the same GPUs, but slower; always so on CPUs', may_change=True
  ),
  'progressive.sizes': Key(
    (), 'heights of smaller images to train on first; empty: none', 'pixels'
  ),
  'progressive.until': Key((), 'share of the run at which each of progressive.sizes ends'),
  'mesh.data': Key(
    -1, 'devices that share the batch; -1: all that remain, 1 if another is -1', may_change=True
  ),
  'mesh.fsdp': Key(
    1, 'devices that share the batch, parameters and optimizer state', may_change=True
  ),
  'mesh.tensor': Key(1, 'devices that share attention heads and MLP units', may_change=True),
}

DATA = {
  'data.source': Key('tfds:cifar10', '`tfds:<name>`, `folder:<path>`, `digits` or `synthetic`'),
  'data.dir': Key(
    '', 'folder of TFDS data, or base of a relative `folder:<path>`', may_change=True
  ),
  'data.train_split': Key('train', 'split to train on'),
  'data.val_split': Key('', 'split of held-out examples that choose the best checkpoint'),
  'data.eval_split': Key('test', 'split to test on', may_change=True),
  'data.real_labels': Key(
    '', 'path of real.json; --mode=eval on ImageNet then also scores ReaL labels', may_change=True
  ),
  'data.image_size': Key((32, 32), 'height and width of the input of the model', 'pixels'),
  'data.mean': Key(
    None,
    'mean to subtract, per channel or one for all, with pixels in [0, 1]; None: that of `init`, '
    'else 0.5',
    kind=tuple,
  ),
  'data.std': Key(
    None,
    'standard deviation to divide by, like data.mean; None: that of `init`, else 0.5',
    kind=tuple,
  ),
  'data.interpolation': Key(
    'bicubic', 'filter that resizes files to the input size', choices='INTERPOLATIONS'
  ),
  'data.crop': Key(1.0, 'share of the shorter side that the central crop keeps', range=(0.01, 1)),
  'data.stretch': Key(False, 'resize without keeping the aspect ratio, instead of cropping'),
  'data.skip_bad_images': Key(False, 'skip unreadable images instead of stopping', may_change=True),
  'data.cache': Key(
    'auto',
    'stream: decode again in each epoch; auto: memory if the images fit and training sees the '
    'same batches',
    choices=('auto', 'memory', 'stream'),
  ),
  'data.workers': Key(
    0, 'streaming: decoding processes; 0: the training process', range=(0, 1e3), may_change=True
  ),
  'data.threads': Key(
    None,
    'streaming: decoding threads per process; None: one per core, 16 at most',
    kind=int,
    range=(1, 1e3),
    may_change=True,
  ),
}

AUGMENT = {  # augmentations are applied in this order
  'augment.pad_crop.padding': Key(
    0, 'border added before a random crop; 0: no crop', 'pixels', range=(0, 1e3)
  ),
  'augment.pad_crop.mode': Key('reflect', 'what fills the border', choices='PAD_MODES'),
  'augment.flip.probability': Key(0.0, 'probability of a horizontal flip', range=SHARE),
  'augment.resized_crop.min_area': Key(
    1.0, 'smallest share of the image that a random crop keeps; 1: no crop', range=(0.001, 1)
  ),
  'augment.resized_crop.max_aspect': Key(
    4 / 3, 'highest ratio of the longer side of the crop to the shorter', range=(1, 100)
  ),
  'augment.rand_augment.num_layers': Key(0, 'operations per image; 0: none', range=(0, 100)),
  'augment.rand_augment.magnitude': Key(
    9.0, 'mean strength of an operation, 0 to 10; in the space big_vision 0 to 30'
  ),
  'augment.rand_augment.mstd': Key(0.5, 'standard deviation of the strength', range=(0, 100)),
  'augment.rand_augment.probability': Key(
    0.5, 'probability that an operation is applied; 1 in the paper', range=SHARE
  ),
  'augment.rand_augment.space': Key('standard', 'set of operations', choices='SPACES'),
  'augment.trivial_augment.probability': Key(
    0.0, 'probability of one random operation; 1 in the paper', range=SHARE
  ),
  'augment.erasing.probability': Key(
    0.0, 'probability that noise replaces a random rectangle', range=SHARE
  ),
  'augment.erasing.min_area': Key(0.02, 'smallest rectangle, share of the image', range=SHARE),
  'augment.erasing.max_area': Key(1 / 3, 'largest rectangle, share of the image', range=SHARE),
  'augment.erasing.max_aspect': Key(
    10 / 3, 'highest ratio of the longer side of the rectangle to the shorter', range=(1, 100)
  ),
  'augment.mix.probability': Key(
    0.0, 'probability that an image is mixed with the next one in the batch', range=SHARE
  ),
  'augment.mix.mixup_alpha': Key(
    0.8, 'parameter of the Beta distribution of mixup weights; 0: no mixup', range=(0, 1e3)
  ),
  'augment.mix.cutmix_alpha': Key(
    1.0, 'parameter of the Beta distribution of cutmix areas; 0: no cutmix', range=(0, 1e3)
  ),
  'augment.mix.switch': Key(0.5, 'probability of cutmix instead of mixup', range=SHARE),
  'augment.off_for_last': Key(
    0.0, 'share of the run, at its end, with only crops and flips', range=SHARE
  ),
}

MODEL = {  # None: taken from the `init` weights if given, else from the variant, else from `ViT`
  'model.variant': Key(
    None, 'a name in `VARIANTS`, then a slash and the patch size; None: B/16', kind=str
  ),
  'model.patch_size': Key(None, 'height and width of a patch', 'pixels', kind=tuple),
  'model.width': Key(None, 'size of a token', kind=int),
  'model.depth': Key(None, 'number of encoder blocks', kind=int),
  'model.num_heads': Key(None, 'number of attention heads', kind=int),
  'model.head_dim': Key(None, 'size of an attention head; None: width / num_heads', kind=int),
  'model.mlp_dim': Key(None, 'hidden width of the MLP', kind=int),
  'model.pool': Key(None, 'how tokens become one vector', kind=str, choices='POOLS'),
  'model.class_token': Key(
    None, 'whether there is a class token; None: if the pooling reads it', kind=bool
  ),
  'model.position': Key(None, 'position embedding', kind=str, choices='POSITIONS'),
  'model.position_prefix': Key(
    None,
    'tokens besides the patches that have a learned position',
    kind=str,
    choices='POSITION_PREFIXES',
  ),
  'model.num_registers': Key(None, 'number of register tokens', kind=int),
  'model.representation_size': Key(
    None, 'width of the pre-logits layer; None: no such layer, or that of `init`', kind=int
  ),
  'model.dropout': Key(0.0, 'dropout rate, below 1'),
  'model.attention_dropout': Key(0.0, 'dropout rate of attention weights, below 1'),
  'model.stochastic_depth': Key(
    0.0, 'rate of stochastic depth in the last block, rising linearly from 0; below 1'
  ),
  'model.layer_scale': Key(None, 'initial value of LayerScale; None: no LayerScale', kind=float),
  'model.pre_norm': Key(None, 'LayerNorm before the first block, as in CLIP', kind=bool),
  'model.norm_after_pool': Key(None, 'last LayerNorm after the pooling', kind=bool),
  'model.qkv_bias': Key(None, 'bias of queries, keys and values', kind=bool),
  'model.qk_norm': Key(None, 'LayerNorm on queries and keys', kind=bool),
  'model.activation': Key(
    None,
    "of the MLP: gelu_tanh in the paper's code, gelu in PyTorch's models, quick_gelu in CLIP",
    kind=str,
    choices='ACTIVATIONS',
  ),
  'model.norm_epsilon': Key(None, 'epsilon of LayerNorm', kind=float, range=SHARE),
  'model.resnet': Key(None, 'units per stage of the ResNet stem of a hybrid', kind=tuple),
  'model.resnet_width': Key(None, 'channels of the root of the ResNet stem', kind=int),
  'model.dtype': Key(
    'float32', 'type of the computation; parameters are float32', choices=('float32', 'bfloat16')
  ),
  'model.remat': Key(
    'none',
    'what the backward pass recomputes to save memory',
    choices='REMAT',
    may_change=True,
  ),
}

OPTIMIZER = {
  'optimizer.name': Key('adamw', 'optimizer', choices='OPTIMIZERS'),
  'optimizer.lr': Key(1e-3, 'peak learning rate', range=(0, 1e38)),
  'optimizer.weight_decay': Key(
    0.05, 'weight decay of matrices, multiplied by the learning rate', range=(0, 1e6)
  ),
  'optimizer.b1': Key(0.9, 'adamw, muon: decay of the first moment', range=DECAY),
  'optimizer.b2': Key(0.999, 'adamw, muon: decay of the second moment', range=DECAY),
  'optimizer.momentum': Key(0.9, 'sgd, muon: momentum', range=DECAY),
  'optimizer.moment_dtype': Key(
    'float32', 'type of the first moment; bfloat16 saves memory', choices='MOMENT_DTYPES'
  ),
  'optimizer.layer_decay': Key(
    1.0, 'factor of the learning rate from each layer to the one below', range=(1e-6, 1)
  ),
  'optimizer.clip': Key(
    1.0, 'global norm that gradients are clipped to; 0: no clipping', range=(0, 1e38)
  ),
  'schedule.name': Key('cosine', 'decay of the learning rate', choices='SCHEDULES'),
  'schedule.warmup': Key(
    5.0, 'linear warm-up, a fifth of the run at most', 'epochs', range=(0, 1e6)
  ),
  'loss.name': Key(
    'softmax', 'cross-entropy over the classes, or of each class separately', choices='LOSSES'
  ),
  'loss.label_smoothing': Key(
    0.0, 'share of the target that is spread over all classes', range=SHARE
  ),
}

KEYS: dict[str, Key] = TRAINING | DATA | AUGMENT | MODEL | OPTIMIZER
