"""Reads and writes Hugging Face's configs: `config.json` and the configs of image processors.

In this package, a model consists of a body (embedding, encoder) and a top (e.g. a head).

Decisions:
  * `Kind` holds all properties that differ between model types. The tables of all kinds are in
    `hf_names.py` and `hf_towers.py`.
  * `processor_config.json` is preferred to `preprocessor_config.json`, as in transformers. Since
    version 5, transformers writes only `processor_config.json` for processors of images and texts.
"""

from collections.abc import Callable, Collection, Mapping
import dataclasses
import logging
import pathlib
from typing import NamedTuple

import numpy as np

from vit_jax.model import ViT
from vit_jax.names import choose, pair
from vit_jax.weights.formats import ODD, Preprocessing, load_json

log = logging.getLogger(__name__)

ACTIVATIONS = {  # Hugging Face name: our name; if several map to one name, the first is written
  'gelu': 'gelu',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'gelu_new': 'gelu_tanh',
  'gelu_fast': 'gelu_tanh',
  'quick_gelu': 'quick_gelu',
  'silu': 'silu',
  'swish': 'silu',
}
RESAMPLING = {0: 'nearest', 1: 'lanczos', 2: 'bilinear', 3: 'bicubic', 4: 'box', 5: 'hamming'}

# Fields that do not affect the output. They are for training, for other heads or for the library
# itself. Older versions of transformers also wrote fields for text generation into every config.
NEUTRAL = {
    'add_cross_attention', 'apply_layernorm', 'architectures', 'attention_dropout',
    'attention_probs_dropout_prob', 'bad_words_ids', 'begin_suppress_tokens', 'bos_token_id',
    'chunk_size_feed_forward', 'cross_attention_hidden_size', 'decoder_start_token_id',
    'diversity_penalty', 'do_sample', 'drop_path_rate', 'dropout', 'dtype', 'early_stopping',
    'encoder_no_repeat_ngram_size', 'encoder_stride', 'eos_token_id',
    'exponential_decay_length_penalty', 'finetuning_task', 'forced_bos_token_id',
    'forced_eos_token_id', 'gradient_checkpointing', 'hidden_dropout_prob', 'id2label',
    'initializer_factor', 'initializer_range', 'interpolate_antialias', 'interpolate_offset',
    'is_decoder', 'is_encoder_decoder', 'label2id', 'length_penalty', 'max_length', 'min_length',
    'model_type', 'no_repeat_ngram_size', 'num_beam_groups', 'num_beams', 'num_labels',
    'num_return_sequences', 'out_features', 'out_indices', 'output_attentions',
    'output_hidden_states', 'output_scores', 'pad_token_id', 'padding', 'pooler_act',
    'pooler_output_size', 'pos_embed_jitter', 'pos_embed_rescale', 'pos_embed_shift', 'prefix',
    'problem_type', 'pruned_heads', 'remove_invalid_values', 'repetition_penalty',
    'reshape_hidden_states', 'return_class_token', 'return_dict', 'return_dict_in_generate',
    'sep_token_id', 'stage_names', 'suppress_tokens', 'task_specific_params', 'temperature',
    'tf_legacy_loss', 'tie_encoder_decoder', 'tie_word_embeddings', 'tokenizer_class', 'top_k',
    'top_p', 'torch_dtype', 'torchscript', 'transformers_version', 'typical_p', 'use_bfloat16',
    'use_cache', 'use_mask_token',
}  # fmt: skip

# For each attribute of `ViT`, the values that a model of any kind can have. `Kind.holds` overrides
# these values.
HOLDS = {
  'activation': tuple(dict.fromkeys(ACTIVATIONS.values())),
  'position': ('learned',),
  'representation_size': (None,),
  'projection': (None,),
  'cosine': (False,),
  'pre_norm': (False,),
  'norm_after_pool': (False,),
  'key_bias': (None,),
  'qk_norm': (False,),
  'out_norm': (False,),
  'resnet': (None,),
  'has_class': (True,),
}


class Top(NamedTuple):
  """Layers of an architecture after the body (embedding, encoder), such as a head.

  Attributes:
    rows: rows of the name table (`layouts.py`) for these layers.
    fields: `(config) -> dict` returns the attributes of `ViT` for these layers.
  """

  rows: list[tuple]
  fields: Callable[[dict], dict]


NOTHING = Top([], lambda c: {})


@dataclasses.dataclass(frozen=True)
class Kind:
  """A `model_type` of Hugging Face.

  Attributes:
    rows: for each possible value of `ViT.mlp`, the name table of the body (`layouts.py`).
    defaults: default of each config field that affects the output.
    fields: `(config, origin) -> dict` returns attributes of `ViT`, without the attributes that
      `read_hf` finds for every kind. `origin` is the config's path, for messages.
    config: `(model) -> dict` returns the config fields to write, without the fields that
      `save_hf` writes for every kind.
    holds: for each attribute of `ViT`, the values that a model of this kind can have, or None for
      any value. These values override `HOLDS`. See `formats.refuse`.
    prepared: fields of `Preprocessing` to use if no file describes the image processor.
    processor: values for keys that are missing in the config of the image processor.
    prefix: prefix of the names of the body's arrays. A file that contains only a body is also read
      if its names have no prefix.
    bare: whether `save_hf` omits the prefix if it writes only a body.
    ignored: patterns for the names of arrays that are not read, because they belong to parts that
      `ViT` does not have.
    body: `(config, origin) -> dict` returns the config of the body, which can be a part of
      `config.json`.
    square: whether a model can be written only if its images and patches are square.
  """

  rows: Mapping[str, list[tuple]]
  defaults: dict
  fields: Callable[[dict, str], dict]
  config: Callable[[ViT], dict]
  holds: dict
  prepared: dict
  processor: dict = dataclasses.field(default_factory=dict)
  prefix: str = ''
  bare: bool = True
  ignored: tuple[str, ...] = (r'(\w+\.)?pooler\..*', r'(\w+\.)?embeddings\.mask_token')
  body: Callable[[dict, str], dict] = lambda config, origin: config
  square: bool = False


def complete(config: dict, kind: Kind, origin: str) -> dict:
  """Returns the config of a model's body (see `Kind.body`), with defaults for missing fields.

  Args:
    config: content of `config.json`.
    kind: kind of the model.
    origin: path of the config, for messages.

  Raises:
    ValueError: a field is not supported, is null, or has another type than its default: only one of
      the two is a bool, or only one of them is a string.
  """
  config = kind.body(config, origin)
  check_fields(config, kind.defaults, origin)
  c = kind.defaults | config
  for name, default in kind.defaults.items():
    given, expected = type(c[name]), type(default)
    if c[name] is None or any((given is one) != (expected is one) for one in (bool, str)):
      raise ValueError(
        f'{origin}: unexpected value: {name} is {c[name]!r}, expected {expected.__name__}.'
      )
  return c


def check_fields(config: dict, known: Collection[str], origin: str) -> None:
  """Raises ValueError for unknown fields, unless they are private (`_x`), None or False."""
  odd = {name for name, x in config.items() if not (x is None or x is False or name[:1] == '_')}
  if unknown := sorted(odd - set(known) - NEUTRAL):
    raise ValueError(f'{origin}: unsupported fields: {", ".join(unknown)}.')


def activation_name(activation: str) -> str:
  """Returns the Hugging Face name of an activation."""
  return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == activation)


def preprocessing(
  folder: pathlib.Path,
  size: tuple[int, int],
  patch: tuple[int, int],
  kind: Kind,
) -> Preprocessing:
  """Returns the preprocessing that the image processor's config in a folder describes.

  The image size in this config is used if it is a multiple of the patch size; otherwise, `size` is
  used. The two sizes can differ. For example, DINOv2 has positions for 518 pixels, but expects
  images of 224 pixels.

  Args:
    folder: folder of the weights.
    size: (height, width) in pixels that the position embeddings are for.
    patch: (height, width) of a patch.
    kind: the kind of the model, which has defaults for missing values.

  Raises:
    ValueError: the file is damaged, or describes steps that `Preprocessing` cannot represent.
  """
  path, p = find_processor(folder)
  if p is None:
    found = Preprocessing(size, **kind.prepared)
    facts = (f'{k}={v}' for k, v in dataclasses.asdict(found).items() if v is not None)
    log.warning('%s is missing. Using the preprocessing %s.', path, ', '.join(facts))
    return found
  try:
    found = processing(kind.processor | p, size, str(path))
  except ODD as error:
    raise ValueError(f'{path}: a key is missing, or its value is wrong ({error!r}).') from error
  fits = all(n % d == 0 for n, d in zip(found.size, patch))
  return found if fits else dataclasses.replace(found, size=size)


def find_processor(folder: pathlib.Path) -> tuple[pathlib.Path, dict | None]:
  """Returns the path of the image processor's config, and its content (None without such a file).

  Raises:
    ValueError: a file is not valid JSON, or not a JSON object.
  """
  whole, own = (folder / name for name in ('processor_config.json', 'preprocessor_config.json'))
  if whole.is_file():
    found = load_json(whole).get('image_processor')
    if isinstance(found, dict):
      return whole, found
  return own, load_json(own) if own.is_file() else None


def processing(p: dict, size: tuple[int, int], origin: str) -> Preprocessing:
  """Converts the config of an image processor to a `Preprocessing`.

  If `size` in the config is a single number, both height and width have this value. However, if
  `default_to_square` is False, only the shorter side has this value.

  Args:
    p: config of the image processor.
    size: (height, width) to use if the config gives only a shorter side or no size.
    origin: path of the config, for messages.

  Raises:
    ValueError: the processor does not scale pixels to [0, 1].
  """
  if not p.get('do_rescale', True) or not np.isclose(p.get('rescale_factor', 1 / 255), 1 / 255):
    raise ValueError(f'{origin}: pixels must be scaled by rescale_factor=1/255.')
  normal = p.get('do_normalize', True)
  resized, cropped = p.get('size', 224), p.get('crop_size')
  if isinstance(resized, int) and not p.get('default_to_square', True):
    resized = {'shortest_edge': resized}
  stretch = not isinstance(resized, dict) or 'shortest_edge' not in resized
  crop = 1.0
  if cropped is not None and p.get('do_center_crop', True):
    crop = min(edge(cropped) / edge(resized), 1.0)
    size = both(cropped)
  elif stretch and 'size' in p:
    size = both(resized)
  return Preprocessing(
    size,
    tuple(p['image_mean']) if normal else (0.0,),
    tuple(p['image_std']) if normal else (1.0,),
    choose(f'{origin}: resample', p.get('resample', 2), RESAMPLING),
    crop,
    stretch,
  )


def edge(size) -> int:
  """Returns the shorter side in pixels from a value of `size` in an image processor's config."""
  if isinstance(size, dict):
    return size.get('shortest_edge') or min(size['height'], size['width'])
  return size if isinstance(size, int) else min(size)


def both(size) -> tuple[int, int]:
  """Returns (height, width) from a value of `size` in an image processor's config."""
  return (size['height'], size['width']) if isinstance(size, dict) else pair(size)


def processor_config(p: Preprocessing, channels: int) -> dict:
  """Returns the contents of the `preprocessor_config.json` that describes a preprocessing.

  Raises:
    ValueError: no image processor of Hugging Face can do this preprocessing.
  """
  height, width = p.size
  if height != width and not p.stretch:
    raise ValueError(
      'hf: Hugging Face image processors can only crop squares, but the images are '
      f'{height}x{width}. Save with a preprocessing that has stretch=True, or use format timm.'
    )
  resized = {'height': round(height / p.crop), 'width': round(width / p.crop)}
  config = dict(
    image_processor_type='ViTImageProcessor',
    do_resize=True,
    do_rescale=True,
    rescale_factor=1 / 255,
    do_normalize=True,
    image_mean=list(p.mean) * (channels if len(p.mean) == 1 else 1),
    image_std=list(p.std) * (channels if len(p.std) == 1 else 1),
    resample=next(number for number, name in RESAMPLING.items() if name == p.interpolation),
    size=resized,
  )
  if not p.stretch or p.crop < 1:  # crop after resizing
    config |= dict(
      image_processor_type='BitImageProcessor',
      do_center_crop=True,
      do_convert_rgb=channels == 3,
      crop_size={'height': height, 'width': width},
      size=resized if p.stretch else {'shortest_edge': min(resized.values())},
    )
  return config
