"""Every key that a config has, and how one is overridden, saved and compared.

An experiment in `configs/` starts from `default_config()` and changes what it must. `experiment.py`
builds everything from a config. Leaves such as the model and the data know no config. The modes
read the few keys that they act on, e.g. `data.eval_split`.
"""

import ast
import collections
from collections.abc import Iterator, Mapping, Sequence
import contextlib
import copy
import difflib
import importlib.machinery
import inspect
import json
import pathlib
import re
import traceback
import types

from ml_collections import ConfigDict, config_dict

from vit_jax.storage import local


def default_config() -> ConfigDict:
  """A ViT for 32x32 images with every key at its default.

  None: as the weights of `init` have it; without them as the variant, then `ViT`, has it.
  """
  c = ConfigDict()
  c.seed = 0  # of the initial weights, the order of the data and every random draw
  c.epochs = 100.0  # passes over the training split; more on a finished run add a cycle
  c.batch_size = 256  # examples a step, over all devices and processes
  c.micro_batches = config_dict.placeholder(int)  # of a batch, one after the other; None: as
  # suits the device, 1 on an accelerator and what stays in the cache on a CPU
  c.eval_batch_size = 256  # examples
  c.log_every = 50  # steps between lines of training metrics
  c.eval_every = 1000  # steps between evaluations; 0: at the end only
  c.checkpoint_every = 1000  # steps between checkpoints; 0: at the end only
  c.keep_checkpoints = 2  # newest checkpoints kept, beside the best where there is val_split
  c.init = ''  # weights to start from, all that `vit_jax.load` reads; empty: random ones
  c.init_resize = 'bilinear'  # of their positions to the image's grid: bilinear, bicubic or paper
  c.freeze = ''  # backbone: only the head is trained, and nothing drops out; empty: everything is
  c.sweep = ()  # with freeze: learning rates of which the best on val_split trains on all of train
  c.ema = 0.0  # decay a step of the averaged weights that are evaluated, at most: it is less in
  # the first steps; 0: no averaging

  c.progressive = ConfigDict()  # train on smaller images first, over which positions are stretched
  c.progressive.sizes = ()  # their heights, pixels, the widths in proportion; empty: none
  c.progressive.until = ()  # share of the run that each lasts to; data.image_size follows the last

  c.deterministic = False  # of the same seed on the same GPUs, the same bits, more slowly; CPUs
  # give them anyway

  c.mesh = ConfigDict()  # devices along each axis; -1: all that remain
  c.mesh.data = -1  # each with a share of the batch; 1 where another is -1
  c.mesh.fsdp = 1  # likewise, and with a share of parameters and optimizer state
  c.mesh.tensor = 1  # each with a share of attention's heads and the MLP's hidden units

  c.data = ConfigDict()
  c.data.source = 'tfds:cifar10'  # tfds:<name>, folder:<path>, digits or synthetic
  c.data.dir = ''  # where TFDS data lies, or what a folder's path starts from
  c.data.train_split = 'train'  # trained on
  c.data.val_split = ''  # held out of train, to choose the best checkpoint; empty: none
  c.data.eval_split = 'test'  # tested on
  c.data.real_labels = ''  # of --mode=eval on ImageNet: path of ReaL's labels, real.json, by which
  # predictions are counted too
  c.data.image_size = (32, 32)  # height and width that the model sees, pixels
  c.data.mean = config_dict.placeholder(tuple)  # taken away, of each channel or of all; images
  # are in [0, 1]; None without init: 0.5
  c.data.std = config_dict.placeholder(tuple)  # divided by after that; None without init: 0.5
  c.data.interpolation = 'bicubic'  # of files to the model's size: bicubic, bilinear, lanczos, ...
  c.data.crop = 1.0  # part of a file's shorter side that is kept, about the centre
  c.data.stretch = False  # scale height and width by themselves, instead of cutting the longer one
  c.data.skip_bad_images = False  # leave out what can't be decoded, instead of stopping
  c.data.cache = 'auto'  # memory, or stream: decoded again in every epoch; auto: memory if it is
  # enough and training sees the same batches; memory keeps images that are all of one smaller size
  c.data.workers = 0  # streamed: processes that decode, beside each that trains; 0: that one does
  c.data.threads = config_dict.placeholder(int)  # streamed: that decode, in each process; None: one
  # a core, shared among the workers, and 16 at most

  c.augment = ConfigDict()  # by name, each with its arguments; applied in this order
  c.augment.pad_crop = ConfigDict({'padding': 0})  # border, pixels; 0: no crop
  c.augment.pad_crop.mode = 'reflect'  # what fills the border: reflect or constant (black)
  c.augment.flip = ConfigDict({'probability': 0.0})  # of mirroring left to right
  c.augment.resized_crop = ConfigDict({'min_area': 1.0})  # least share of the image; 1: no crop
  c.augment.resized_crop.max_aspect = 4 / 3  # of the longer side to the shorter; where examples
  # are streamed, this crop is of the file, and not of what was made of it
  c.augment.rand_augment = ConfigDict({'num_layers': 0})  # operations an image; 0: none
  c.augment.rand_augment.magnitude = 9.0  # strength, from 0 to 10; in big_vision's space to 30
  c.augment.rand_augment.mstd = 0.5  # standard deviation of the strength
  c.augment.rand_augment.probability = 0.5  # of an operation taking place; the paper: 1
  c.augment.rand_augment.space = 'standard'  # what is drawn from: standard, timm, wide or
  # big_vision
  c.augment.trivial_augment = ConfigDict({'probability': 0.0})  # of one operation; the paper: 1
  c.augment.erasing = ConfigDict({'probability': 0.0})  # of noise in the place of a rectangle
  c.augment.erasing.min_area = 0.02  # of the rectangle, as a share of the image
  c.augment.erasing.max_area = 1 / 3  # likewise
  c.augment.erasing.max_aspect = 10 / 3  # of the longer side to the shorter
  c.augment.mix = ConfigDict({'probability': 0.0})  # of an image being mixed with its neighbour
  c.augment.mix.mixup_alpha = 0.8  # of the Beta that the weight is drawn from; 0: no mixup
  c.augment.mix.cutmix_alpha = 1.0  # of the Beta that the area is drawn from; 0: no cutmix
  c.augment.mix.switch = 0.5  # probability of cutmix, else mixup
  c.augment.off_for_last = 0.0  # share of the run, at its end, with crops and flips only; 0: none

  c.model = ConfigDict()
  c.model.variant = config_dict.placeholder(str)  # of vit.VARIANTS, patch size after the slash;
  # None without init: B/16
  c.model.patch_size = config_dict.placeholder(tuple)  # (height, width), pixels
  c.model.width = config_dict.placeholder(int)  # size of a token
  c.model.depth = config_dict.placeholder(int)  # encoder blocks
  c.model.num_heads = config_dict.placeholder(int)  # attention heads
  c.model.head_dim = config_dict.placeholder(int)  # size of a head; None: width / num_heads
  c.model.mlp_dim = config_dict.placeholder(int)  # hidden width of the MLP
  c.model.pool = config_dict.placeholder(str)  # cls, gap, map, cls_gap or distilled
  c.model.class_token = config_dict.placeholder(bool)  # whether there is one; None: if the pool
  # reads it
  c.model.position = config_dict.placeholder(str)  # learned, sincos, rope or none
  c.model.position_prefix = config_dict.placeholder(str)  # tokens with a learned position beside
  # the patches: cls, none or all
  c.model.num_registers = config_dict.placeholder(int)  # tokens added to the patches
  c.model.representation_size = config_dict.placeholder(int)  # of the pre-logits; None: none, or
  # those of the weights of `init`, which a new head does without
  c.model.dropout = 0.0  # rate
  c.model.attention_dropout = 0.0  # rate, on the attention weights
  c.model.stochastic_depth = 0.0  # rate at the last block, rising linearly from 0
  c.model.layer_scale = config_dict.placeholder(float)  # initial value; None: no LayerScale
  c.model.pre_norm = config_dict.placeholder(bool)  # LayerNorm before the first block, as CLIP
  c.model.norm_after_pool = config_dict.placeholder(bool)  # the last LayerNorm follows the pooling
  c.model.qkv_bias = config_dict.placeholder(bool)  # of queries, keys and values
  c.model.qk_norm = config_dict.placeholder(bool)  # LayerNorm on queries and keys
  c.model.activation = config_dict.placeholder(str)  # gelu_tanh (the paper's code), gelu
  # (PyTorch's models) or quick_gelu (CLIP)
  c.model.norm_epsilon = config_dict.placeholder(float)  # of LayerNorm
  c.model.resnet = config_dict.placeholder(tuple)  # units a stage of a hybrid's stem; None: none
  c.model.resnet_width = config_dict.placeholder(int)  # channels of its root
  c.model.dtype = 'float32'  # of the computation: float32 or bfloat16; weights are float32
  c.model.remat = 'none'  # what is computed again to save memory: none, dots or full

  c.optimizer = ConfigDict()
  c.optimizer.name = 'adamw'  # adamw, muon or sgd
  c.optimizer.lr = 1e-3  # peak learning rate
  c.optimizer.weight_decay = 0.05  # times the learning rate, on matrices only
  c.optimizer.b1 = 0.9  # adamw, muon: decay of the first moment
  c.optimizer.b2 = 0.999  # adamw, muon: decay of the second moment
  c.optimizer.momentum = 0.9  # sgd, muon
  c.optimizer.moment_dtype = 'float32'  # of the first moment: float32, or bfloat16 to save memory
  c.optimizer.layer_decay = 1.0  # of the learning rate, from each layer to the one below it
  c.optimizer.clip = 1.0  # global norm that gradients are scaled down to; 0: no clipping

  c.schedule = ConfigDict()
  c.schedule.name = 'cosine'  # cosine, linear (both to 0) or constant
  c.schedule.warmup = 5.0  # epochs of linear warm-up; at most a fifth of the run

  c.loss = ConfigDict()
  c.loss.name = 'softmax'  # cross-entropy over the classes, or sigmoid: of each class by itself
  c.loss.label_smoothing = 0.0  # share of the target spread over all classes
  return c.lock()


TRUE, FALSE = ('true', 't', '1'), ('false', 'f', '0')  # as absl has them

# What a run may change when it is resumed: how it trains, not what. Epochs: `resume.add_cycle`.
MAY_CHANGE = (
    'micro_batches', 'eval_batch_size', 'log_every', 'eval_every', 'checkpoint_every',
    'keep_checkpoints', 'deterministic', 'mesh.data', 'mesh.fsdp', 'mesh.tensor', 'data.dir',
    'data.eval_split', 'data.real_labels', 'data.workers', 'data.threads', 'data.skip_bad_images',
    'model.remat',
)  # fmt: skip


def unset(config: Mapping) -> set[str]:
  """The keys that a run's `init` or its data decide, and that the config leaves open."""
  keys = {key for key in flatten(default_config()) if key.startswith('model.')}
  values = flatten(config)
  left = {key for key in keys | {'data.mean', 'data.std'} if values[key] is None}
  return left | ({'data.cache'} if values['data.cache'] == 'auto' else set())


def load_file(spec: str) -> ConfigDict:
  """The config of `path/to/file.py` or `path/to/file.py:variant`.

  Raises:
    ValueError: no such file, no `get_config` in it, a variant that it doesn't have, or whatever
      it raises itself; the message names the file and its line.
  """
  path, _, variant = str(local(spec)).partition(':')
  if not pathlib.Path(path).is_file():
    near = difflib.get_close_matches(path, map(str, pathlib.Path('configs').glob('*.py')), n=3)
    raise ValueError(f'--config: no file {path!r}.{hint(near)}')
  with located(path):
    get_config = run_file(path).get('get_config')
  if not callable(get_config):
    raise ValueError(f'--config: {path} defines no function get_config().')
  if variant and not inspect.signature(get_config).parameters:
    raise ValueError(f'--config: {path} has no variants; got {variant!r}.')
  with located(path):
    config = get_config(variant) if variant else get_config()
  if not isinstance(config, ConfigDict):
    raise ValueError(f'--config: get_config() of {path} must return the config it changed.')
  for key in flatten(config):
    if not is_key(key):
      raise ValueError(f'--config: {path} sets {unknown(key)}')
  return config


def run_file(path: str) -> dict[str, object]:
  """Runs a Python file; returns what it defines."""
  loader = importlib.machinery.SourceFileLoader('experiment_config', path)
  module = types.ModuleType(loader.name)
  module.__file__ = path
  exec(loader.source_to_code(loader.get_data(path), path), module.__dict__)
  return module.__dict__


@contextlib.contextmanager
def located(path: str) -> Iterator[None]:
  """Turns what a config file raises into a ValueError that names the file and its line."""
  try:
    yield
  except Exception as error:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
      lines.append(error.lineno)  # nothing of the file has run
    line = f', line {lines[-1]}' if lines else ''
    raise ValueError(f'--config: {path}{line}: {explain(error)}') from error


def explain(error: Exception) -> str:
  """What to say of an error that a config file raised."""
  inner = next((cause for cause in error.args if isinstance(cause, KeyError)), error)
  # What ml_collections says of a key that is not there, and then of all those that are.
  absent = re.match(r"""Key "(.+?)" does not exist|'(.+?)'(\n|$)""", str([*inner.args, ''][0]))
  if isinstance(inner, KeyError) and absent:
    return unknown(absent[1] or absent[2])
  return str(error) if isinstance(error, ValueError) else f'{type(error).__name__}: {error}'


def is_key(key: str) -> bool:
  """Whether it is a dotted key of every config."""
  return key in flatten(default_config())


def is_switch(key: str) -> bool:
  """Whether it is a key that is true or false."""
  return is_key(key) and kind_of(key) is bool


def kind_of(key: str) -> type:
  """The type of a key's values."""
  section, _, leaf = key.rpartition('.')
  config = default_config()
  return (config[section] if section else config).get_type(leaf)


def unknown(key: str) -> str:
  """What to say of a key that no config has: the nearest ones."""
  named = collections.defaultdict(list)  # keys, by what they may be taken for
  for name in flatten(default_config()):
    section, _, leaf = name.rpartition('.')
    for words in {name, leaf}:
      named[words].append(name)
    if section:
      named[section] = [section]
  near = [name for name in named if name.startswith(key + '.')]
  near = near or named.get(key.rpartition('.')[2])
  if not near:
    close = difflib.get_close_matches(key, named, n=3)
    near = list(dict.fromkeys(name for words in close for name in named[words]))
  return f'{key}: there is no such key.{hint(near)}'


def hint(near: Sequence[str]) -> str:
  """The question after a mistyped name; nothing without near ones."""
  return f' Did you mean {" or ".join(near)}?' if near else ''


def override(config: ConfigDict, key: str, text: str) -> None:
  """Sets a dotted key from the command line, in the key's own type.

  Raises:
    ValueError: an unknown key, with the nearest valid ones, or a value of another type.
  """
  if not is_key(key):
    raise ValueError(f'--config.{unknown(key)}')
  kind, default = kind_of(key), flatten(default_config())[key]
  try:
    value = parse(text, kind, optional=default is None)
  except (ValueError, SyntaxError):
    example = {int: '8', float: '0.1', bool: 'true', tuple: '0.1,0.2'}[kind]
    example = ','.join(map(str, default)) if kind is tuple and default else example
    raise ValueError(
      f'--config.{key}: got {text!r}, expected {kind.__name__}, e.g. {example}.'
    ) from None
  section, _, leaf = key.rpartition('.')
  holder = config[section] if section else config
  with holder.unlocked():
    holder[leaf] = value


def override_all(config: ConfigDict, overrides: Mapping[str, str]) -> ConfigDict:
  """The config with every one of these set in it; see `override`."""
  for key, text in overrides.items():
    override(config, key, text)
  return config


def parse(text: str, kind: type, optional: bool = False):
  """The value that `text` writes; tuples as `32,32`, `(32, 32)` or `32`, an int also as `1e3`."""
  if optional and (text == 'None' or (kind is not str and text == 'none')):
    return None  # as a word, `none` is a choice: model.position=none
  if kind is bool:
    if text.lower() not in (*TRUE, *FALSE):
      raise ValueError(text)
    return text.lower() in TRUE
  if kind is int and not text.strip().lstrip('+-').isdecimal():
    number = float(text)
    if not number.is_integer():
      raise ValueError(text)
    return int(number)
  if kind is tuple:
    value = ast.literal_eval(text)
    value = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not all(isinstance(item, (int, float)) for item in value):
      raise ValueError(text)
    return value
  return kind(text)


def flatten(config: Mapping, prefix: str = '') -> dict[str, object]:
  """`{'data.source': ..., ...}`, tuples as lists, as JSON gives them back."""
  flat = {}
  for name, value in config.items():
    if isinstance(value, (Mapping, ConfigDict)):
      flat |= flatten(value, f'{prefix}{name}.')
    else:
      flat[prefix + name] = list(value) if isinstance(value, tuple) else value
  return flat


def to_dict(config: ConfigDict) -> dict:
  """Plain values that JSON can hold."""
  return json.loads(config.to_json())


def from_dict(saved: Mapping) -> ConfigDict:
  """A config from what `to_dict` gave; keys younger than it keep their defaults.

  Raises:
    ValueError: a key that this version does not know.
  """
  config = default_config()
  unknown = sorted(set(flatten(saved)) - set(flatten(config)))
  if unknown:
    raise ValueError(f'The saved config has keys that this version lacks: {", ".join(unknown)}.')

  def put(target, values):
    for name, value in values.items():
      if isinstance(value, Mapping):
        put(target[name], value)
      else:
        target[name] = tuple(value) if isinstance(value, list) else value

  try:
    put(config, saved)
  except TypeError as error:
    raise ValueError(f'The saved config does not fit this version: {error}') from error
  return config


def fill(config: ConfigDict, values: Mapping[str, object]) -> ConfigDict:
  """A copy with the values of these dotted keys where the config leaves them open."""
  config = copy.deepcopy(config)
  for key in unset(config) & set(values):
    section, _, name = key.rpartition('.')
    config[section][name] = values[key]
  return config


def check_same_run(saved: ConfigDict, given: ConfigDict, workdir: object) -> None:
  """Raises ValueError where a workdir's run can't go on under the config given."""
  before, now = flatten(saved), flatten(given)
  differences = [
    f'  {key}: {before[key]!r} there, {now[key]!r} given'
    for key in before
    if before[key] != now[key] and key not in {'epochs', *MAY_CHANGE, *unset(given)}
  ]
  if differences:
    raise ValueError(
      f'{workdir} holds a run with another config:\n' + '\n'.join(differences) + '\nGive the '
      'same values, or another --workdir. What may change: ' + ', '.join(MAY_CHANGE) + ', and '
      'more epochs once the run is finished.'
    )
