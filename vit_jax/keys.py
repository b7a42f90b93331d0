"""Defines all config keys: default, type, unit, range and meaning.

`KEYS` is the basis of defaults, overrides, checks, `--help_config` and `docs/config.md`. A module
given by `--import` can add its own keys:

    KEYS['augment.mine.strength'] = Key(0.0, 'strength of my augmentation; 0: none', range=(0, 1))
"""

from collections.abc import Collection
import dataclasses


@dataclasses.dataclass(frozen=True)
class Key:
  """Description of one config key.

  Attributes:
    default: value in `default_config()`; None: the value is set later, e.g. from the weights.
    help: meaning of the key and of its special values, in one line.
    unit: unit of the value; empty for a name, a switch or a plain number.
    kind: type of the values; required only if the default is None.
    range: (lowest, highest) valid value, both included.
    choices: valid names, or the name of a registry in `check.REGISTRIES` that has these names.
    may_change: whether the user can change the value when a run is resumed.
    open: whether the user can set the key to None, although its default is not None. A new run then
      chooses a value that suits its data (`sizing.py`).
  """

  default: object
  help: str
  unit: str = ''
  kind: type | None = None
  range: tuple[float, float] | None = None
  choices: str | Collection[str] = ''
  may_change: bool = False
  open: bool = False

  def __post_init__(self):
    kind = self.kind or type(self.default)
    if kind not in (bool, int, float, str, tuple):
      raise ValueError(f'Key({self.default!r}): set `kind` to bool, int, float, str or tuple.')
    object.__setattr__(self, 'kind', kind)


SHARE = (0, 1)
DECAY = (0, 0.9999999)  # a decay of 1 would keep the first value forever
COUNT = (1, 1e6)
STEPS = (0, 1e9)

TRAINING = {
  'seed': Key(
    0, 'random seed of initial weights, data order and all random draws', range=(0, 2**32 - 1)
  ),
  'epochs': Key(
    100.0, 'passes over the training split; raise it to extend a finished run; None: '
    'recipe.epochs, or more epochs if recipe.epochs gives fewer than 300 training steps',
    range=(0, 1e6), open=True,
  ),
  'batch_size': Key(
    256, 'training batch size over all devices and hosts; None: recipe.batch_size, or a smaller '
    'size if the training split has fewer images or recipe.batch_size gives fewer than 300 '
    'training steps', 'examples', range=COUNT, open=True,
  ),
  'micro_batches': Key(
    None, 'number of micro-batches into which each device splits its part of the batch, to save '
    'memory; None: the smallest number for which a training step fits into memory; on a CPU, the '
    'number can be larger, so that a step takes less time', kind=int,
    range=COUNT, may_change=True,
  ),
  'device_memory': Key(
    None, 'memory of each device; programs may use 90% of it; None: the memory that JAX reports; '
    'CPUs report no number, so programs on a CPU have no limit', 'GiB', kind=float,
    range=(1e-6, 1e6), may_change=True,
  ),
  'eval_batch_size': Key(
    256, 'evaluation batch size over all devices and hosts', 'examples', range=COUNT,
    may_change=True,
  ),
  'log_every': Key(
    50, 'interval between logs of training metrics; 0: only at the end', 'steps', range=STEPS,
    may_change=True,
  ),
  'eval_every': Key(
    1000, 'interval between evaluations; 0: only at the end; if data.val_split is set, there is '
    'also an evaluation at each checkpoint', 'steps', range=STEPS, may_change=True,
  ),
  'checkpoint_every': Key(
    1000, 'interval between checkpoints; 0: only at the end; None: a tenth of the run, or the '
    'value of the run that is resumed', 'steps', range=STEPS, may_change=True, open=True,
  ),
  'keep_checkpoints': Key(
    2, 'number of newest checkpoints to keep; a run also keeps the checkpoint with the best result '
    'on data.val_split, and the last checkpoint before each increase of epochs', range=COUNT,
    may_change=True,
  ),
  'init': Key(
    '', 'weights to start from: a file, folder, workdir or Hugging Face Hub name, as in '
    '`vit_jax.load`; empty: random weights',
  ),
  'init_resize': Key(
    'bilinear', 'method that resizes the position embedding of `init`; hf: as for CLIP and SigLIP '
    'in the library transformers; paper: as in the code of the ViT paper',
    choices='RESIZES',
  ),
  'objective': Key(
    None, 'what the model learns to predict; supervised: the labels; distilled: the labels and the '
    'outputs of distill.teacher; masked: the hidden patches of images, without labels; None: '
    'distilled if distill.teacher is set, else supervised', kind=str, choices='OBJECTIVES',
  ),
  'freeze': Key(
    '', 'backbone: train only the head, without dropout; empty: train all layers', choices='FREEZE'
  ),
  'adapt': Key(
    '', 'lora: keep the `init` weights fixed, and train only the head and a low-rank update that '
    'is added to each weight matrix in attention and MLP; empty: no such update',
    choices='ADAPTERS',
  ),
  'classifier': Key(
    '', 'how to compute a head from features of the `init` weights, without training (needs '
    'epochs=0); ridge: least squares in closed form; knn: votes of the nearest training images; '
    'empty: train the model', choices='CLASSIFIERS',
  ),
  'sweep': Key(
    (), 'with freeze=backbone: learning rates to compare on data.val_split; a final run then '
    'trains with the best learning rate on data.train_split and data.val_split together; '
    'empty: use optimizer.lr, without a comparison',
  ),
  'ema': Key(
    0.0, 'decay per step of the moving average (EMA) of the weights; the decay is lower at the '
    'start of the run; evaluation uses the averaged weights; 0: no averaging', range=DECAY,
  ),
  'deterministic': Key(
    False, 'make repeated runs on the same GPUs bit-identical, but slower; runs on CPUs are always '
    'bit-identical', may_change=True,
  ),
  'patch_sizes': Key(
    (), 'patch sizes from which each training step draws one (FlexiViT); stored weights and '
    'evaluation use model.patch_size; empty: only model.patch_size', 'pixels',
  ),
  'lora.rank': Key(
    8, 'with adapt=lora: rank of the update `A B` of a weight matrix, which is the number of '
    'columns of A and of rows of B', range=(1, 1e4),
  ),
  'lora.scale': Key(
    1.0, 'with adapt=lora: factor of the update `A B`; alpha / r in the LoRA paper',
    range=(1e-6, 1e6),
  ),
  'masked.share': Key(
    0.75, 'with objective=masked: fraction of the patches that are hidden', range=(0.01, 0.99)
  ),
  'masked.decoder_width': Key(
    512, 'with objective=masked: number of values in a token of the decoder'
  ),
  'masked.decoder_depth': Key(
    8, 'with objective=masked: number of blocks of the decoder', range=(1, 1000)
  ),
  'masked.decoder_heads': Key(
    16, 'with objective=masked: number of attention heads of the decoder'
  ),
  'progressive.sizes': Key(
    (), 'heights of the smaller images with which the run begins, in the order of use; each is at '
    'most the height in data.image_size; empty: all images have the size data.image_size', 'pixels',
  ),
  'progressive.until': Key(
    (), 'one value for each size in progressive.sizes: the fraction of the run at which training '
    'with this size ends; after the last value, images have the size data.image_size',
  ),
  'mesh.data': Key(
    -1, 'number of devices over which the batch is split; -1: all remaining devices, or 1 if '
    'mesh.fsdp or mesh.tensor is -1', may_change=True,
  ),
  'mesh.fsdp': Key(
    1, 'number of devices over which batch, parameters and optimizer state are split; -1: all '
    'remaining devices', may_change=True,
  ),
  'mesh.tensor': Key(
    1, 'number of devices over which attention heads and MLP units are split; -1: all remaining '
    'devices', may_change=True,
  ),
}  # fmt: skip

DATA = {
  'data.source': Key(
    'tfds:cifar10', 'dataset: `tfds:<name>`, `folder:<path>`, `images:<path>` (without labels), '
    '`labels:<csv or jsonl file>`, `digits` or `synthetic`',
  ),
  'data.dir': Key(
    '', 'for TFDS datasets: folder of the data; empty: $TFDS_DATA_DIR or ~/tensorflow_datasets; '
    'for other sources: folder at which relative paths start; empty: paths in a label file start '
    'at the folder of the label file, other paths at the current folder', may_change=True,
  ),
  'data.train_split': Key(
    'train', 'training split, e.g. `train[:98%]`; None: the split train, without the images that '
    'data.val_split=None holds out', open=True,
  ),
  'data.val_split': Key(
    '', 'held-out split that selects the best checkpoint, or the learning rate of a sweep; empty: '
    'no such split; None: the validation split of the dataset; if the dataset has none: the last '
    '10% of train if data.train_split is None, else no such split', open=True,
  ),
  'data.eval_split': Key('test', 'test split', may_change=True),
  'data.real_labels': Key(
    '', 'path of real.json, the reassessed labels (ReaL) of the ImageNet validation images; '
    '--mode=eval then also reports the accuracy with these labels; empty: no such labels',
    may_change=True,
  ),
  'data.image_size': Key(
    (32, 32), 'height and width of the model input; None: taken from `init`, else 32, 64, 128 or '
    '224, depending on the size of the training images, and rounded down to a multiple of the '
    'patch size if one is set', 'pixels', open=True,
  ),
  'data.mean': Key(
    None, 'mean that is subtracted from the pixels, which are in [0, 1]: one value per channel, '
    'or one value for all channels; None: taken from `init`, else 0.5', kind=tuple,
  ),
  'data.std': Key(
    None, 'standard deviation by which pixels are divided after data.mean is subtracted: one '
    'value per channel, or one value for all channels; None: taken from `init`, else 0.5',
    kind=tuple,
  ),
  'data.interpolation': Key(
    'bicubic', 'filter that resizes images to the input size; random area crops of streamed images '
    'are always resized with a filter close to bilinear', choices='INTERPOLATIONS',
  ),
  'data.crop': Key(
    1.0, 'side of the central crop, as a fraction of the shorter side of the image; with '
    'data.stretch=True, the crop keeps this fraction of both sides; 1: the whole side',
    range=(0.01, 1),
  ),
  'data.stretch': Key(
    False, 'resize images without keeping the aspect ratio, instead of cropping the longer side'
  ),
  'data.skip_bad_images': Key(False, 'skip unreadable images instead of stopping', may_change=True),
  'data.cache': Key(
    'auto', 'memory: decode all images once and keep them in memory; stream: decode them in each '
    'epoch; auto: memory if the images fit into half of the RAM and the training batches would be '
    'the same as with stream, else stream', choices=('auto', 'memory', 'stream'),
  ),
  'data.workers': Key(
    0, 'with data.cache=stream: number of worker processes that decode images; 0: the training '
    'process decodes them', range=(0, 1e3), may_change=True,
  ),
  'data.threads': Key(
    None, 'with data.cache=stream: number of decoding threads per process; None: the number of CPU '
    'cores, divided by data.workers if workers are used, but at most 16', kind=int,
    range=(1, 1e3), may_change=True,
  ),
}  # fmt: skip

AUGMENT = {  # augmentations are applied in this order
  'augment.pad_crop.padding': Key(
    0, 'border added on each side before a random crop; 0: no crop', 'pixels', range=(0, 1e3)
  ),
  'augment.pad_crop.mode': Key(
    'reflect', 'contents of the border; reflect: the mirrored image; constant: black',
    choices='PAD_MODES',
  ),
  'augment.flip.probability': Key(0.0, 'probability of a horizontal flip', range=SHARE),
  'augment.resized_crop.min_area': Key(
    1.0, 'smallest fraction of the image area that a random crop keeps; 1: no crop',
    range=(0.001, 1),
  ),
  'augment.resized_crop.max_aspect': Key(
    4 / 3, 'highest ratio of the longer to the shorter side of the crop', range=(1, 100)
  ),
  'augment.rand_augment.num_layers': Key(
    0, 'number of random operations per image; 0: no RandAugment', range=(0, 100)
  ),
  'augment.rand_augment.magnitude': Key(
    9.0, 'mean strength of an operation: 0 to 10, or 0 to 30 with space=big_vision'
  ),
  'augment.rand_augment.mstd': Key(
    0.5, 'standard deviation of the strength of an operation', range=(0, 100)
  ),
  'augment.rand_augment.probability': Key(
    0.5, 'probability that each operation is applied; 1 in the RandAugment paper', range=SHARE
  ),
  'augment.rand_augment.space': Key(
    'standard', 'set of operations and the ranges of their strengths; standard: operations of the '
    'RandAugment paper; timm, big_vision: as in these libraries; wide: as in TrivialAugment',
    choices='SPACES',
  ),
  'augment.trivial_augment.probability': Key(
    0.0, 'probability that one random operation is applied; 1 in the TrivialAugment paper; 0: off',
    range=SHARE,
  ),
  'augment.erasing.probability': Key(
    0.0, 'probability that noise replaces a random rectangle', range=SHARE
  ),
  'augment.erasing.min_area': Key(
    0.02, 'smallest area of the rectangle, as a fraction of the image', range=SHARE
  ),
  'augment.erasing.max_area': Key(
    1 / 3, 'largest area of the rectangle, as a fraction of the image', range=SHARE
  ),
  'augment.erasing.max_aspect': Key(
    10 / 3, 'highest ratio of the longer to the shorter side of the rectangle', range=(1, 100)
  ),
  'augment.mix.probability': Key(
    0.0, 'probability that an image is mixed with its neighbour in the batch', range=SHARE
  ),
  'augment.mix.mixup_alpha': Key(
    0.8, 'alpha of the Beta distribution of mixup weights; 0: no mixup', range=(0, 1e3)
  ),
  'augment.mix.cutmix_alpha': Key(
    1.0, 'alpha of the Beta distribution of cutmix areas; 0: no cutmix', range=(0, 1e3)
  ),
  'augment.mix.switch': Key(
    0.5, 'probability that an image is mixed by cutmix instead of mixup; used only if both alphas '
    'are above 0', range=SHARE,
  ),
  'augment.off_for_last': Key(
    0.0, 'length of the last part of the run, in which images are only cropped and flipped, as a '
    'fraction of the run; 0: no such part', range=SHARE,
  ),
}  # fmt: skip

MODEL = {  # None: taken from the `init` weights if given, else from the variant, else from `ViT`
  'model.variant': Key(
    None, 'model size (a name in `VARIANTS`) and patch size, e.g. S/32; None: taken from `init`, '
    'else B/16', kind=str,
  ),
  'model.patch_size': Key(None, 'height and width of a patch', 'pixels', kind=tuple),
  'model.width': Key(None, 'number of values in a token', kind=int),
  'model.depth': Key(None, 'number of encoder blocks', kind=int),
  'model.num_heads': Key(None, 'number of attention heads', kind=int),
  'model.head_dim': Key(None, 'size of an attention head; None: width / num_heads', kind=int),
  'model.mlp': Key(
    None, 'formula of the hidden units of the MLP, with the input x, the weights W and V, and '
    'f = model.activation; plain: f(x W); gated: f(x W) * (x V), which is SwiGLU if f is silu; '
    'gated_norm: gated, followed by a LayerNorm', kind=str, choices='MLPS',
  ),
  'model.mlp_dim': Key(None, 'number of hidden units of the MLP', kind=int),
  'model.pool': Key(
    None, 'method that pools the tokens of an image into one vector; cls: class token; gap: mean '
    'of the patch tokens; map: attention with a learned query; cls_gap: cls and gap, concatenated; '
    'distilled: class token and distillation token, concatenated', kind=str, choices='POOLS',
  ),
  'model.class_token': Key(
    None, 'whether to use a class token; None: only if model.pool reads it', kind=bool
  ),
  'model.position': Key(
    None, 'type of position embedding; sincos: fixed sines and cosines; rope: rotary; rope_unit: '
    'rotary as in DINOv3; learned_rope: learned and rotary as in EVA-02', kind=str,
    choices='POSITIONS',
  ),
  'model.position_prefix': Key(
    None, 'which of the tokens in front of the patch tokens have a learned position; cls: only the '
    'class token; none: no token; all: class token and registers', kind=str,
    choices='POSITION_PREFIXES',
  ),
  'model.rope_theta': Key(
    None, 'base of the frequencies of rotary positions', kind=float, range=(1e-6, 1e9)
  ),
  'model.rope_grid': Key(
    None, 'with model.position=learned_rope: patch grid (down, across) to which the coordinates of '
    'the patches of each image are scaled; None: model.position_grid if set, else the grid of the '
    'images', 'patches', kind=tuple,
  ),
  'model.position_grid': Key(
    None, 'size of the patch grid (down, across) for which position embeddings are made; the '
    'embeddings are stretched for images with another grid; None: taken from `init`, else the grid '
    'of the images', 'patches', kind=tuple,
  ),
  'model.num_registers': Key(None, 'number of register tokens', kind=int),
  'model.representation_size': Key(
    None, 'width of the pre-logits layer; None: taken from `init`, else no such layer', kind=int
  ),
  'model.projection': Key(
    None, 'width of a bias-free linear layer after the pooling, as in CLIP; None: taken from '
    '`init`, else no such layer', kind=int,
  ),
  'model.cosine': Key(
    None, 'scale the input of the head to length 1, as for zero-shot classification', kind=bool
  ),
  'model.dropout': Key(0.0, 'dropout rate, below 1'),
  'model.attention_dropout': Key(0.0, 'dropout rate of attention weights, below 1'),
  'model.stochastic_depth': Key(
    0.0, 'stochastic-depth rate of the last block, below 1; the rate rises linearly from 0 at the '
    'first block',
  ),
  'model.layer_scale': Key(
    None, 'initial value of LayerScale; None: taken from `init`, else no LayerScale', kind=float
  ),
  'model.pre_norm': Key(None, 'apply a LayerNorm before the first block, as in CLIP', kind=bool),
  'model.norm_after_pool': Key(None, 'apply the last LayerNorm after the pooling', kind=bool),
  'model.qkv_bias': Key(None, 'add a bias to queries, keys and values', kind=bool),
  'model.key_bias': Key(
    None, 'add a bias to keys; None: taken from `init`, else the same as model.qkv_bias', kind=bool
  ),
  'model.out_norm': Key(
    None, 'apply a LayerNorm before the output projection of attention', kind=bool
  ),
  'model.qk_norm': Key(None, 'apply LayerNorm to queries and keys', kind=bool),
  'model.activation': Key(
    None, 'activation function of the MLP; the code of the ViT paper uses gelu_tanh, PyTorch '
    'models use gelu, CLIP uses quick_gelu, and SwiGLU uses silu', kind=str,
    choices='ACTIVATIONS',
  ),
  'model.norm_epsilon': Key(None, 'epsilon of LayerNorm', kind=float, range=SHARE),
  'model.resnet': Key(None, 'number of units in each stage of the ResNet stem', kind=tuple),
  'model.resnet_width': Key(None, 'channels of the root block of the ResNet stem', kind=int),
  'model.dtype': Key(
    'float32', 'number format of computations; parameters stay float32; with float32, products of '
    'matrices use TF32 on recent NVIDIA GPUs and bfloat16 inputs on TPUs, unless you set the '
    'environment variable JAX_DEFAULT_MATMUL_PRECISION=highest',
    choices=('float32', 'bfloat16'),
  ),
  'model.remat': Key(
    None, 'activations that the backward pass recomputes to save memory; none: nothing; dots: all '
    'except the results of products with weights; full: all activations inside a block; None: the '
    'run chooses one, and uses dots or full only if more micro-batches do not save enough memory; '
    'a resumed run keeps its value',
    kind=str, choices='REMAT', may_change=True,
  ),
  'model.attention': Key(
    'auto', 'attention kernel; plain: XLA; cudnn: flash attention on NVIDIA GPUs; auto: the '
    'fastest kernel that gives correct results', choices='ATTENTION', may_change=True,
  ),
}  # fmt: skip

OPTIMIZER = {
  'optimizer.name': Key(
    'adamw', 'optimizer; sgd: with momentum; muon: Muon for weight matrices in blocks, AdamW '
    'for all other parameters', choices='OPTIMIZERS',
  ),
  'optimizer.lr': Key(
    1e-3, 'peak learning rate; None: recipe.lr x r for sgd, recipe.lr x sqrt(r) for the other '
    'optimizers, where r is batch_size / recipe.batch_size', range=(0, 1e38), open=True,
  ),
  'optimizer.weight_decay': Key(
    0.05, 'weight decay of weight matrices; each step also subtracts learning rate x weight_decay '
    'x weight', range=(0, 1e6),
  ),
  'optimizer.b1': Key(
    0.9, "for adamw and muon: decay rate of AdamW's first moment", range=DECAY
  ),
  'optimizer.b2': Key(
    0.999, "for adamw and muon: decay rate of AdamW's second moment", range=DECAY
  ),
  'optimizer.momentum': Key(0.9, 'for sgd and muon: decay rate of the momentum', range=DECAY),
  'optimizer.moment_dtype': Key(
    'float32', 'number format of the first moment and of the momentum; bfloat16 saves memory',
    choices='MOMENT_DTYPES',
  ),
  'optimizer.layer_decay': Key(
    1.0, 'learning rate of a layer, divided by the learning rate of the layer above it; the head '
    'has the full rate; 1: all layers have the same rate', range=(1e-6, 1),
  ),
  'optimizer.clip': Key(
    1.0, 'maximum global norm of the gradients; 0: no clipping', range=(0, 1e38)
  ),
  'schedule.name': Key(
    'cosine', 'kind of learning-rate decay after the warm-up', choices='SCHEDULES'
  ),
  'schedule.warmup': Key(
    5.0, 'length of the linear warm-up, which is limited to a fifth of the run; None: '
    'epochs x recipe.warmup / recipe.epochs', 'epochs', range=(0, 1e6), open=True,
  ),
  'loss.name': Key(
    None, 'softmax: cross-entropy over all classes; sigmoid: binary cross-entropy of each class; '
    'None: sigmoid if images can have several labels, else softmax', kind=str, choices='LOSSES',
  ),
  'loss.class_weights': Key(
    'none', 'weights of the classes in the training loss; none: all equal; balanced: inversely '
    'proportional to the number of training labels of the class; cat=2,dog=0.5: weights of the '
    'named classes, and 1 for all other classes',
  ),
  'loss.label_smoothing': Key(
    0.0, 'fraction of the target probability that is spread evenly over all classes', range=SHARE,
  ),
  'distill.teacher': Key(
    '', 'trained model (the teacher) whose predictions the run also learns; the value has the same '
    'form as `init`; empty: no teacher',
  ),
  'distill.kind': Key(
    'soft', "soft: learn the teacher's probabilities; hard: learn the class that the teacher "
    'chooses', choices='DISTILLATIONS',
  ),
  'distill.weight': Key(
    0.5, 'weight w of the distillation loss; the loss of the labels has the weight 1 - w',
    range=SHARE,
  ),
  'distill.temperature': Key(
    1.0, 'with distill.kind=soft: divisor of the logits of teacher and student; a value above 1 '
    'gives unlikely classes more weight', range=(0.01, 1e3),
  ),
}  # fmt: skip

RECIPE = {  # only a new run reads these keys, to choose values for keys that are None
  'recipe.batch_size': Key(
    256, 'with batch_size=None: largest batch size that a new run may choose; exceeded only if the '
    'devices cannot divide so few examples', 'examples', range=COUNT, may_change=True,
  ),
  'recipe.epochs': Key(
    100.0, 'with epochs=None: smallest number of epochs that a new run may choose', range=(0, 1e6),
    may_change=True,
  ),
  'recipe.warmup': Key(
    5.0, 'with schedule.warmup=None: length of the warm-up in a run of recipe.epochs epochs',
    'epochs', range=(0, 1e6), may_change=True,
  ),
  'recipe.lr': Key(
    1e-3, 'with optimizer.lr=None: learning rate for batches of recipe.batch_size', range=(0, 1e38),
    may_change=True,
  ),
}  # fmt: skip

KEYS: dict[str, Key] = TRAINING | RECIPE | DATA | AUGMENT | MODEL | OPTIMIZER
