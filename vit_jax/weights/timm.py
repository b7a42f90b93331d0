"""Reads and writes timm's `VisionTransformer` and `Eva`: `model.safetensors` and `config.json`.

Decisions:
  * The arguments of timm's class come from the config's `model_args`, else from the architecture
    name (`timm_names.py`), else from timm's defaults.
  * A written config names an architecture that timm knows, and lists every argument, so that timm
    ignores the defaults of the architecture. A config has no arguments for the norm and the kind of
    gated MLP. So the named architecture must be one that has the right norm and MLP.
  * If a file lacks the biases of keys, they are not replaced by zeros, because fine-tuning would
    change the zeros.
"""

from collections.abc import Mapping
import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

from vit_jax.model import ViT
from vit_jax.names import choose, pair
from vit_jax.weights import timm_heads, timm_names
from vit_jax.weights.formats import (
  Preprocessing,
  Pretrained,
  Weights,
  refuse,
  write_params,
)
from vit_jax.weights.layouts import (
  CONV,
  SAME,
  VECTOR,
  Row,
  check_depth,
  fused,
  image_channels,
  interleaved,
  linear,
  rows,
  torch_fused,
  torch_linear,
  torch_norm,
)
from vit_jax.weights.usage import label_lines, upright

CROP_MODES = {'center': False, 'squash': True}  # timm's name: our `stretch`
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

# Rows of the name table for both classes of timm. Rows for parts that a model lacks are skipped.
COMMON = [
  ('cls', 'cls_token', SAME),
  ('pos_embedding', 'pos_embed', SAME),
  ('embedding/kernel', 'patch_embed.proj.weight', CONV),
  ('embedding/bias', 'patch_embed.proj.bias', SAME),
  *torch_norm('pre_norm', 'norm_pre'),
  *torch_norm('block_{i}/attention_norm', 'blocks.{i}.norm1'),
  *torch_linear('block_{i}/attention/out', 'blocks.{i}.attn.proj', axes=2),
  *torch_norm('block_{i}/mlp_norm', 'blocks.{i}.norm2'),
  *torch_linear('block_{i}/mlp/down', 'blocks.{i}.mlp.fc2'),
]
VIT = [  # additional rows for `VisionTransformer`
  *torch_fused('block_{i}/attention', ('query', 'key', 'value'), 'blocks.{i}.attn.qkv'),
  *torch_norm('block_{i}/attention/query_norm', 'blocks.{i}.attn.q_norm'),
  *torch_norm('block_{i}/attention/key_norm', 'blocks.{i}.attn.k_norm'),
  ('block_{i}/attention_scale', 'blocks.{i}.ls1.gamma', SAME),
  ('block_{i}/mlp_scale', 'blocks.{i}.ls2.gamma', SAME),
  ('map/query', 'attn_pool.latent', SAME),
  *torch_linear('map/attention/query', 'attn_pool.q'),
  *torch_fused('map/attention', ('key', 'value'), 'attn_pool.kv'),
  *torch_linear('map/attention/out', 'attn_pool.proj', axes=2),
  *torch_norm('map/mlp_norm', 'attn_pool.norm'),
  *torch_linear('map/mlp/up', 'attn_pool.mlp.fc1'),
  *torch_linear('map/mlp/down', 'attn_pool.mlp.fc2'),
]


def eva_rows(a: dict) -> list[tuple]:
  """Returns the rows of the name table for timm's `Eva`; `a` has the timm model's arguments."""
  ours, theirs = 'block_{i}/attention', 'blocks.{i}.attn'
  turned = (lambda layout: layout) if a['rope_rotate_half'] else interleaved
  kernels = dict(query=turned(linear()), key=turned(linear()), value=linear())
  biases = dict(query=turned(VECTOR), value=VECTOR)
  if a['qkv_fused']:
    names = [f'{ours}/{part}/kernel' for part in kernels]
    inner = [(names, f'{theirs}.qkv.weight', fused(*kernels.values()))]
    inner += [(f'{ours}/{x}/bias', f'{theirs}.{x[0]}_bias', biases[x]) for x in biases]
  else:
    inner = [(f'{ours}/{x}/kernel', f'{theirs}.{x[0]}_proj.weight', kernels[x]) for x in kernels]
    inner += [(f'{ours}/{x}/bias', f'{theirs}.{x[0]}_proj.bias', biases[x]) for x in biases]
  return [
    *inner,
    *((f'{ours}/out_norm/{a}', f'{theirs}.norm.{b}', VECTOR) for a, b in NORM_NAMES),
    ('block_{i}/attention_scale', 'blocks.{i}.gamma_1', SAME),
    ('block_{i}/mlp_scale', 'blocks.{i}.gamma_2', SAME),
  ]


NORM_NAMES = (('scale', 'weight'), ('bias', 'bias'))
PLAIN_MLP = torch_linear('block_{i}/mlp/up', 'blocks.{i}.mlp.fc1')
PACKED_MLP = torch_fused('block_{i}/mlp', ('gate', 'up'), 'blocks.{i}.mlp.fc1')
SPLIT_MLP = [
  *torch_linear('block_{i}/mlp/gate', 'blocks.{i}.mlp.fc1_g'),
  *torch_linear('block_{i}/mlp/up', 'blocks.{i}.mlp.fc1_x'),
  *torch_norm('block_{i}/mlp/hidden_norm', 'blocks.{i}.mlp.norm'),
]


def timm_table(a: dict, pool: str, norm_after_pool: bool, depth: int) -> list[Row]:
  """Returns the name table (`layouts.py`) of a file.

  Args:
    a: arguments of timm's model.
    pool, norm_after_pool, depth: attributes of `ViT`.
  """
  if 'swiglu_mlp' not in a:
    own, mlp = VIT, PACKED_MLP if a['mlp_layer'] else PLAIN_MLP
  else:
    packed = SPLIT_MLP if a['scale_mlp'] or a['swiglu_align_to'] else PACKED_MLP
    own, mlp = eva_rows(a), packed if a['swiglu_mlp'] else PLAIN_MLP
  norm = torch_norm('norm', 'fc_norm' if norm_after_pool else 'norm')
  head = timm_heads.TWO_HEADS if pool == 'distilled' else timm_heads.ONE_HEAD
  return rows([*COMMON, *own, *mlp, *norm, *head], depth)


def read_timm(folder: pathlib.Path, config: dict, arrays: Mapping[str, np.ndarray]) -> Weights:
  """Returns the weights of a folder with a timm `config.json`.

  Raises:
    ValueError: the architecture, or an argument, is not supported.
  """
  origin = f'{folder}/config.json'
  about = config.get('pretrained_cfg') or config  # older files have these keys at the top level
  a = arguments(origin, config)
  patch, image = (pair(a[name], f'{origin}: {name}') for name in ('patch_size', 'img_size'))
  pools = timm_heads.pools_of(config['architecture'])
  pool = choose(f'{origin}: global_pool', a['global_pool'], pools)
  after_pool = next((a[x] for x in ('fc_norm', 'use_fc_norm') if a.get(x) is not None), None)
  after_pool = pool == 'gap' if after_pool is None else bool(after_pool)
  read_fields = timm_names.eva_fields if 'swiglu_mlp' in a else timm_names.vision_fields
  own = read_fields(a, origin)
  own['num_registers'] += pool == 'distilled'  # the distillation token
  labels = about.get('label_names') or config.get('label_names') or about.get('labels') or None
  if not isinstance(labels, (list, type(None))):
    raise TypeError(f'label_names: expected a list, got {type(labels).__name__}')
  names = tuple(map(str, labels)) if labels else None
  own |= timm_heads.head_fields(a['num_classes'] or None, arrays, own['pre_norm'], names)
  timm_heads.warn_of_clip(origin, config['architecture'], about, own, bool(names))
  prefix = 'none' if a['no_embed_class'] else 'all' if own['num_registers'] else 'cls'
  fields = own | dict(
    patch_size=patch,
    width=a['embed_dim'],
    depth=a['depth'],
    num_heads=a['num_heads'],
    pool=pool,
    class_token=a['class_token'],
    position_prefix=prefix,
    layer_scale=a['init_values'],
    norm_after_pool=after_pool,
    qkv_bias=a['qkv_bias'],
    norm_epsilon=a['norm_epsilon'],
  )
  check_depth(origin, a['depth'], arrays)
  grid = image[0] // patch[0], image[1] // patch[1]
  return Weights(
    origin=str(folder),
    arrays=arrays,
    rows=timm_table(a, pool, after_pool, fields['depth']),
    fields=fields,
    channels=a['in_chans'],
    preprocessing=Preprocessing(
      (grid[0] * patch[0], grid[1] * patch[1]),
      tuple(about.get('mean', IMAGENET['mean'])),
      tuple(about.get('std', IMAGENET['std'])),
      about.get('interpolation', 'bicubic'),
      about.get('crop_pct') or 0.875,
      choose(f'{origin}: crop_mode', about.get('crop_mode') or 'center', CROP_MODES),
    ),
    grid=grid,
    class_names=names,
  )


def arguments(origin: str, config: dict) -> dict:
  """Returns the value of every argument of timm's model, including `img_size`.

  Args:
    origin: path of the config, for messages.
    config: content of `config.json`.

  Raises:
    ValueError: the architecture is unknown, or an argument is not supported.
  """
  own, name = config.get('model_args') or {}, config['architecture']
  known = timm_names.arguments_of(name)
  if known is None and not {'embed_dim', 'depth', 'num_heads'} <= set(own):
    raise ValueError(
      f'{origin}: unknown architecture {name!r}. For an unknown architecture, model_args must give '
      'embed_dim, depth and num_heads.'
    )
  given = (known or {}) | {
    key: config[key] for key in ('num_classes', 'global_pool') if key in config
  }
  about = config.get('pretrained_cfg') or config
  if 'input_size' in about:
    given['img_size'] = tuple(about['input_size'][1:])
  given |= own
  defaults, only = timm_names.VIT, timm_names.VIT_ONLY
  if timm_names.is_eva(name):
    defaults, only = timm_names.EVA, timm_names.EVA_ONLY
  for key, value in given.items():
    if key in only and value != only[key]:
      raise ValueError(f'{origin}: {key}={value!r} is not supported, only {only[key]!r}.')
    if type(defaults.get(key)) is bool and type(value) is not bool:
      raise ValueError(f'{origin}: unexpected value: {key} is {value!r}, expected bool.')
    if key not in set(defaults) | set(only) | timm_names.NEUTRAL:
      raise ValueError(f'{origin}: model_args has the unsupported argument {key!r}.')
  return defaults | given


def save_timm(
  model: ViT,
  params: dict,
  folder: pathlib.Path,
  preprocessing: Preprocessing,
  class_names: tuple[str, ...] | None,
) -> None:
  """Writes `model.safetensors` and `config.json` into a folder.

  All arguments except `folder` are attributes of `Pretrained`.

  Raises:
    ValueError: neither timm's `VisionTransformer` nor timm's `Eva` can hold the model.
  """
  architecture, own = timm_names.arguments_for(model)
  if model.num_registers and model.position != 'rope_unit':
    refuse('timm', model, {'position_prefix': ('none', 'all')})
  if model.head_size * model.num_heads != model.width:
    refuse('timm', model, {'head_dim': (None, model.width // model.num_heads)})
  model_args = own | dict(
    img_size=list(preprocessing.size),
    patch_size=list(model.patch_size),
    in_chans=params['embedding']['kernel'].shape[2],
    embed_dim=model.width,
    depth=model.depth,
    num_heads=model.num_heads,
    global_pool=next(theirs for theirs, ours in timm_names.POOLS.items() if ours == model.pool),
    class_token=model.has_class,
    no_embed_class=model.position_prefix == 'none',
    init_values=model.layer_scale,
    qkv_bias=model.qkv_bias,
  )
  about = pretrained_cfg(preprocessing, model_args['in_chans'], model.num_classes or 0)
  about |= {'label_names': list(class_names)} if class_names else {}
  config = dict(
    architecture=architecture,
    num_classes=model.num_classes or 0,
    global_pool=model_args['global_pool'],
    model_args=model_args,
    pretrained_cfg=about,
  )
  own = arguments('timm', config)
  names = timm_table(own, model.pool, model.norm_after_pool, model.depth)
  save_file(write_params(names, params), folder / 'model.safetensors', metadata={'format': 'pt'})
  (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')


def pretrained_cfg(p: Preprocessing, channels: int, num_classes: int) -> dict:
  """Returns timm's `pretrained_cfg`, which describes the preprocessing, as a dict."""
  return dict(
    input_size=[channels, *p.size],
    fixed_input_size=True,
    interpolation=p.interpolation,
    crop_pct=p.crop,
    crop_mode='squash' if p.stretch else 'center',
    mean=list(p.mean) * (channels if len(p.mean) == 1 else 1),
    std=list(p.std) * (channels if len(p.std) == 1 else 1),
    num_classes=num_classes,
  )


def run_timm(loaded: Pretrained) -> str:
  """Returns Python code that loads the files with timm and applies the model."""
  show = 'print(output)'
  if loaded.class_names:
    show = "print(model.pretrained_cfg['label_names'][output.argmax()])"
  if loaded.multi_label:
    show = f"""logits = output
{label_lines(loaded)}
for i in labels:
  print(model.pretrained_cfg['label_names'][i])"""
  torch = '\nimport torch' if loaded.multi_label else ''
  return f"""from PIL import Image, ImageOps
import timm{torch}

model = timm.create_model('local-dir:.', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
{upright(image_channels(loaded.params))}
output = model(transform(image)[None])[0]
{show}"""
