"""Reads and writes timm's `VisionTransformer`: `model.safetensors` and `config.json`.

Decisions:
  * A config's `model_args` override the arguments of its architecture name (`timm_names.py`),
    which override timm's defaults.
  * Written files use the name `vit_base_patch16_224` and list every argument, so that timm
    overrides all defaults of that name.
"""

from collections.abc import Mapping
import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

from vit_jax.model import ViT
from vit_jax.names import choose, pair
from vit_jax.weights import timm_names
from vit_jax.weights.formats import (
  Preprocessing,
  Pretrained,
  Weights,
  refuse,
  upright,
  write_params,
)
from vit_jax.weights.layouts import (
  CONV,
  SAME,
  image_channels,
  rows,
  torch_fused,
  torch_linear,
  torch_norm,
)

POOLS = {'token': 'cls', 'avg': 'gap', 'map': 'map', '': 'none'}  # timm's name: our name
ACTIVATIONS = {'gelu': 'gelu', 'gelu_tanh': 'gelu_tanh', 'quick_gelu': 'quick_gelu'}
CROP_MODES = {'center': False, 'squash': True}  # timm's name: our `stretch`
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def fuse(ours: str, parts: tuple[str, ...], theirs: str) -> list[tuple]:
  """Returns the rows of `torch_fused` for a layer with this name in timm."""
  return torch_fused(ours, parts, (f'{theirs}.weight', f'{theirs}.bias'))


TABLE = [
  ('cls', 'cls_token', SAME),
  ('registers', 'reg_token', SAME),
  ('pos_embedding', 'pos_embed', SAME),
  ('embedding/kernel', 'patch_embed.proj.weight', CONV),
  ('embedding/bias', 'patch_embed.proj.bias', SAME),
  *torch_norm('pre_norm', 'norm_pre'),
  *torch_norm('block_{i}/attention_norm', 'blocks.{i}.norm1'),
  *fuse('block_{i}/attention', ('query', 'key', 'value'), 'blocks.{i}.attn.qkv'),
  *torch_norm('block_{i}/attention/query_norm', 'blocks.{i}.attn.q_norm'),
  *torch_norm('block_{i}/attention/key_norm', 'blocks.{i}.attn.k_norm'),
  *torch_linear('block_{i}/attention/out', 'blocks.{i}.attn.proj', axes=2),
  ('block_{i}/attention_scale', 'blocks.{i}.ls1.gamma', SAME),
  *torch_norm('block_{i}/mlp_norm', 'blocks.{i}.norm2'),
  *torch_linear('block_{i}/mlp/up', 'blocks.{i}.mlp.fc1'),
  *torch_linear('block_{i}/mlp/down', 'blocks.{i}.mlp.fc2'),
  ('block_{i}/mlp_scale', 'blocks.{i}.ls2.gamma', SAME),
  ('map/query', 'attn_pool.latent', SAME),
  *torch_linear('map/attention/query', 'attn_pool.q'),
  *fuse('map/attention', ('key', 'value'), 'attn_pool.kv'),
  *torch_linear('map/attention/out', 'attn_pool.proj', axes=2),
  *torch_norm('map/mlp_norm', 'attn_pool.norm'),
  *torch_linear('map/mlp/up', 'attn_pool.mlp.fc1'),
  *torch_linear('map/mlp/down', 'attn_pool.mlp.fc2'),
  *torch_linear('head', 'head'),
]

DEFAULTS = dict(
  img_size=224,
  patch_size=16,
  in_chans=3,
  num_classes=1000,
  global_pool='token',
  embed_dim=768,
  depth=12,
  num_heads=12,
  mlp_ratio=4.0,
  qkv_bias=True,
  qk_norm=False,
  init_values=None,
  class_token=True,
  no_embed_class=False,
  reg_tokens=0,
  pre_norm=False,
  fc_norm=None,
  act_layer='gelu',
  norm_epsilon=1e-6,  # not an argument of timm, where norm_layer sets it
)
# Arguments for which only one value is supported.
ONLY = dict(
  final_norm=True,
  norm_layer=None,
  pool_include_prefix=False,
  pos_embed='learn',
  proj_bias=True,
  scale_attn_norm=False,
  scale_mlp_norm=False,
)
NEUTRAL = {  # arguments that do not affect the output: for training, or for other image sizes
  'attn_drop_rate', 'drop_path_rate', 'drop_rate', 'dynamic_img_pad', 'dynamic_img_size',
  'fix_init', 'patch_drop_rate', 'pos_drop_rate', 'proj_drop_rate', 'strict_img_size',
  'weight_init',
}  # fmt: skip


def read_timm(folder: pathlib.Path, config: dict, arrays: Mapping[str, np.ndarray]) -> Weights:
  """Returns the weights of a folder with a timm `config.json`.

  Raises:
    ValueError: the architecture, or an argument, is not supported.
  """
  origin = f'{folder}/config.json'
  about = config.get('pretrained_cfg') or config  # older files are not nested
  a = arguments(origin, config)
  patch, image = (pair(a[name], f'{origin}: {name}') for name in ('patch_size', 'img_size'))
  pool = choose(f'{origin}: global_pool', a['global_pool'], POOLS)
  has_class, registers = a['class_token'], a['reg_tokens']
  after_pool = a['fc_norm'] if a['fc_norm'] is not None else pool == 'gap'
  fields = dict(
    num_classes=a['num_classes'] or None,
    patch_size=patch,
    width=a['embed_dim'],
    depth=a['depth'],
    num_heads=a['num_heads'],
    mlp_dim=int(a['embed_dim'] * a['mlp_ratio']),
    pool=pool,
    class_token=has_class,
    position_prefix=('none' if a['no_embed_class'] else 'all' if registers else 'cls'),
    num_registers=registers,
    layer_scale=a['init_values'],
    pre_norm=a['pre_norm'],
    norm_after_pool=bool(after_pool),
    qkv_bias=a['qkv_bias'],
    qk_norm=a['qk_norm'],
    activation=choose(f'{origin}: act_layer', a['act_layer'], ACTIVATIONS),
    norm_epsilon=a['norm_epsilon'],
  )
  grid = image[0] // patch[0], image[1] // patch[1]
  labels = next((about[k] for k in ('label_names', 'labels') if about.get(k)), None)
  if not isinstance(labels, (list, type(None))):
    raise TypeError(f'label_names: expected a list, got {type(labels).__name__}')
  return Weights(
    origin=str(folder),
    arrays=arrays,
    rows=rows([*TABLE, *torch_norm('norm', 'fc_norm' if after_pool else 'norm')], fields['depth']),
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
    class_names=tuple(labels) if labels else None,
  )


def arguments(origin: str, config: dict) -> dict:
  """Returns every argument of timm's model, including the image size of the weights.

  Raises:
    ValueError: the architecture is unknown, or an argument is not supported.
  """
  own, name = config.get('model_args') or {}, config['architecture']
  known = timm_names.arguments_of(name)
  if known is None and not {'embed_dim', 'depth', 'num_heads'} <= set(own):
    raise ValueError(
      f'{origin}: unknown architecture {name!r}, and model_args does not give embed_dim, depth and '
      'num_heads.'
    )
  given = (known or {}) | {
    key: config[key] for key in ('num_classes', 'global_pool') if key in config
  }
  about = config.get('pretrained_cfg') or config
  if 'input_size' in about:
    given['img_size'] = tuple(about['input_size'][1:])
  given |= own
  for key, value in given.items():
    if key in ONLY and value != ONLY[key]:
      raise ValueError(f'{origin}: {key}={value!r} is not supported, only {ONLY[key]!r}.')
    if key not in set(DEFAULTS) | set(ONLY) | NEUTRAL:
      raise ValueError(f'{origin}: model_args has the unsupported argument {key!r}.')
  return DEFAULTS | given


HOLDS = {
  'representation_size': (None,),
  'position': ('learned',),
  'resnet': (None,),
  'norm_epsilon': (1e-6,),
  'pool': tuple(POOLS.values()),
  'projection': (None,),
  'cosine': (False,),
}


def save_timm(
  model: ViT,
  params: dict,
  folder: pathlib.Path,
  preprocessing: Preprocessing,
  class_names: tuple[str, ...] | None,
) -> None:
  """Writes `model.safetensors` and `config.json`.

  Raises:
    ValueError: timm's `VisionTransformer` cannot hold the model.
  """
  refuse('timm', model, HOLDS)
  if model.num_registers:
    refuse('timm', model, {'position_prefix': ('none', 'all')})
  if model.head_size * model.num_heads != model.width:
    refuse('timm', model, {'head_dim': (None, model.width // model.num_heads)})
  ratio = model.mlp_dim / model.width
  if int(model.width * ratio) != model.mlp_dim:  # timm rounds down
    ratio = np.nextafter(ratio, np.inf).item()
  model_args = dict(
    img_size=list(preprocessing.size),
    patch_size=list(model.patch_size),
    in_chans=params['embedding']['kernel'].shape[2],
    embed_dim=model.width,
    depth=model.depth,
    num_heads=model.num_heads,
    mlp_ratio=ratio,
    global_pool=next(theirs for theirs, ours in POOLS.items() if ours == model.pool),
    class_token=model.has_class,
    no_embed_class=model.position_prefix == 'none',
    reg_tokens=model.num_registers,
    init_values=model.layer_scale,
    pre_norm=model.pre_norm,
    fc_norm=model.norm_after_pool,
    qkv_bias=model.qkv_bias,
    qk_norm=model.qk_norm,
    act_layer=model.activation,
  )
  about = pretrained_cfg(preprocessing, model_args['in_chans'], model.num_classes or 0)
  if class_names:
    about['label_names'] = list(class_names)
  config = dict(
    architecture='vit_base_patch16_224',
    num_classes=model.num_classes or 0,
    global_pool=model_args['global_pool'],
    model_args=model_args,
    pretrained_cfg=about,
  )
  table = [*TABLE, *torch_norm('norm', 'fc_norm' if model.norm_after_pool else 'norm')]
  arrays = write_params(rows(table, model.depth), params)
  save_file(arrays, folder / 'model.safetensors', metadata={'format': 'pt'})
  (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')


def pretrained_cfg(p: Preprocessing, channels: int, num_classes: int) -> dict:
  """Returns timm's `pretrained_cfg`, which describes the preprocessing."""
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
  return f"""from PIL import Image, ImageOps
import timm

model = timm.create_model('local-dir:.', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
{upright(image_channels(loaded.params))}
output = model(transform(image)[None])[0]
{show}"""
