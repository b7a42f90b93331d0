"""Lists every named model with its number of parameters, published weights and tests.

python -m benchmarks.zoo     # writes docs/models.md
"""

import argparse
import json
import pathlib
import sys

import jax
import jax.numpy as jnp

from benchmarks import arguments
from vit_jax.model import variants
from vit_jax.model.vit import ViT
from vit_jax.weights import hf, timm
from vit_jax.weights.layouts import param_shapes

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Names of every ViT, DeiT, EVA and DINOv3 of timm 1.0.31; the value is None if it cannot be loaded.
TIMM_NAMES = ROOT / 'tests/fixtures/timm_names.json'
PIXELS = 224

ABOUT = f"""# Models

This page lists the models that you can build or load by name. The column `parameters` gives the
number of parameters in millions, for images of {PIXELS}x{PIXELS} pixels and a head of 1,000
classes. There are two exceptions: `tiny`, `small` and `wide` are for images of 32x32 pixels and 10
classes. DINOv3 models in Hugging Face's format have no head. The command `python -m benchmarks.zoo`
builds the models, counts their parameters and writes this page.

We have not tested the full-size published files, because we had no access to them. Instead, we
tested the formats with small models, in two ways:

- `tests/fixtures/` holds weights and outputs of small models. The original code of each format
  wrote these files. `test_pretrained.py` checks that this project computes the same outputs from
  the weights.
- `test_pretrained_live.py` creates models of Hugging Face and timm with random weights. It checks
  that this project computes the same outputs and gradients as Hugging Face and timm.

The column `published` gives the names of files in the bucket `gs://vit_models/`. The column `tests`
names what covers the model or its format: a folder in `tests/fixtures/`, a test, or a file with
tests.

"""

# Published files and tests of their format, by the name passed to `vit_jax.make`.
PAPER = 'paper: `imagenet21k/ViT-{0}.npz`, `imagenet21k+imagenet2012/ViT-{0}.npz`'
AUGREG = 'AugReg: `augreg/{0}-*.npz`'
SAM = 'SAM, GSAM: `sam/ViT-{0}.npz`, `gsam/ViT-{0}.npz`'
TOKEN, GAP, HYBRID = 'paper_token', 'paper_gap', 'paper_hybrid'
VARIANTS = {
  'Ti/16': (AUGREG, TOKEN),
  'S/16': (f'{AUGREG}; {SAM}', TOKEN),
  'S/32': (f'{AUGREG}; {SAM}', TOKEN),
  'B/8': (AUGREG, TOKEN),
  'B/16': (f'{PAPER}; {AUGREG}; {SAM}', TOKEN),
  'B/32': (f'{PAPER}; {AUGREG}; {SAM}', TOKEN),
  'L/16': (f'{PAPER}; {AUGREG}; {SAM}', TOKEN),
  'L/32': (f'{PAPER}; {SAM}', TOKEN),
  'H/14': (PAPER, TOKEN),
  'g/14': ('none', 'test_every_pool_and_position'),
  'G/14': ('none', 'test_every_pool_and_position'),
  'R+Ti/32': (
    'AugReg: `augreg/R_Ti_16-*.npz` (the file name says 16; the patch size is 32)',
    'paper_hybrid_root',
  ),
  'R26+S/32': ('AugReg: `augreg/R26_S_32-*.npz`', HYBRID),
  'R26+B/32': ('paper: `imagenet21k/R26+ViT-B_32.npz`', HYBRID),
  'R50+B/16': ('paper: `imagenet21k/R50+ViT-B_16.npz`', HYBRID),
  'R50+L/32': (
    'paper: `imagenet21k/R50+ViT-L_32.npz`; AugReg: `augreg/R50_L_32-*.npz`',
    HYBRID,
  ),
}
SMALL = {
  'tiny': 'trained in this project, see `results/`',
  'small': 'trained in this project for 20 epochs only, see `results/`',
  'wide': 'not trained yet',
}

HUGGING_FACE = {  # class: (example on the Hub, or '' if we know none; test)
  'ViTForImageClassification': ('google/vit-base-patch16-224', 'hf_classifier'),
  'ViTModel': ('google/vit-base-patch16-224-in21k', 'hf_backbone'),
  'DeiTForImageClassification': ('', 'test_hugging_face'),
  'DeiTForImageClassificationWithTeacher': (
    'facebook/deit-base-distilled-patch16-224',
    'test_hugging_face',
  ),
  'DeiTModel': ('facebook/deit-base-distilled-patch16-224', 'test_hugging_face'),
  'Dinov2ForImageClassification': (
    'facebook/dinov2-base-imagenet1k-1-layer',
    'test_hugging_face',
  ),
  'Dinov2Model': ('facebook/dinov2-base', 'test_hugging_face'),
  'Dinov2WithRegistersForImageClassification': (
    'facebook/dinov2-with-registers-base-imagenet1k-1-layer',
    'test_hugging_face',
  ),
  'Dinov2WithRegistersModel': ('facebook/dinov2-with-registers-base', 'test_hugging_face'),
  'DINOv3ViTModel': ('facebook/dinov3-vitb16-pretrain-lvd1689m', 'test_dinov3'),
  'CLIPModel': ('openai/clip-vit-base-patch32', 'hf_clip'),
  'CLIPVisionModelWithProjection': ('openai/clip-vit-base-patch32', 'test_image_towers'),
  'CLIPVisionModel': ('openai/clip-vit-base-patch32', 'test_image_towers'),
  'SiglipModel': ('google/siglip2-base-patch16-224', 'hf_siglip'),
  'SiglipVisionModel': ('google/siglip-base-patch16-224', 'test_image_towers'),
}


def size(width: int, mlp_dim: int, depth: int, heads: int, **others: object) -> dict:
  """Returns the config fields of a DINOv3 that differ from transformers' defaults."""
  return others | dict(
    hidden_size=width,
    intermediate_size=mlp_dim,
    num_hidden_layers=depth,
    num_attention_heads=heads,
    num_register_tokens=4,
    model_type='dinov3_vit',
  )


GATED = dict(use_gated_mlp=True, hidden_act='silu')
DINOV3 = {  # config fields by the name on the Hub, without the name of the training data
  'dinov3-vits16': size(384, 1536, 12, 6),
  'dinov3-vits16plus': size(384, 1536, 12, 6, **GATED),
  'dinov3-vitb16': size(768, 3072, 12, 12),
  'dinov3-vitl16': size(1024, 4096, 24, 16),
  'dinov3-vith16plus': size(1280, 5120, 32, 20, **GATED),
  'dinov3-vit7b16': size(4096, 8192, 40, 32, **GATED, query_bias=False, value_bias=False),
}


def parameters(model: ViT, pixels: int = PIXELS) -> int:
  """Counts a model's parameters. All blocks have equally many, so only two blocks are built."""
  size = [pixels // p * p for p in model.patch_size]
  count = lambda depth: sum(
    int(jnp.prod(jnp.array(shape)))
    for shape in param_shapes(model.clone(depth=depth), (*size, 3)).values()
  )
  first = count(1)
  return first + (model.depth - 1) * (count(2) - first)


def millions(count: int) -> str:
  return f'{count / 1e6:.2f}'


def dinov3_model(name: str) -> ViT:
  """Returns the model with a name from `DINOV3`, without a head."""
  return ViT(**hf.read_hf(pathlib.Path(name), DINOV3[name], {}).fields)


def timm_model(name: str) -> ViT:
  """Returns our model for the timm architecture `name`, with 1,000 classes."""
  return ViT(**timm.read_timm(pathlib.Path(name), {'architecture': name}, {}).fields)


def tables() -> str:
  """Returns the text of docs/models.md."""
  lines = [ABOUT + "## This project's names\n", '| name | parameters | published | tests |']
  lines += ['| --- | --- | --- | --- |']
  for name, (published, test) in VARIANTS.items():
    files = published.format(name.replace('/', '_'))
    count = millions(parameters(variants.make(name, 1000)))
    lines.append(f'| `{name}` | {count} | {files} | `{test}` |')
  for name, trained in SMALL.items():
    count = millions(parameters(variants.make(name, 10, pool='gap'), 32))
    lines.append(f'| `{name}` (32, 10 classes) | {count} | {trained} | `test_main` |')
  lines += [
    '\n## Hugging Face\n',
    'You can load models of these classes of the library transformers, whatever their size. The '
    'folder that you load must contain `config.json` and the weights in safetensors format.\n',
  ]
  lines += ['| class | example | tests |', '| --- | --- | --- |']
  for name, (example, test) in HUGGING_FACE.items():
    lines.append(f'| `{name}` | {f"`{example}`" if example else "none known"} | `{test}` |')
  lines += [
    '\nThe Hub names of DINOv3 models are `facebook/<name>-pretrain-<data>`, with a name from this '
    'table. Before the first download, you must accept the license of DINOv3 on the Hub. DINOv3 '
    'models have no head.\n',
    '| name | parameters | tests |',
    '| --- | --- | --- |',
  ]
  lines += [
    f'| `{name}` | {millions(parameters(dinov3_model(name)))} | `hf_dinov3` |' for name in DINOV3
  ]
  names = json.loads(TIMM_NAMES.read_text(encoding='utf-8'))
  known = [name for name in sorted(names) if names[name]]
  lines += ['\n## timm\n']
  lines += [
    f'This project can load models with {len(known)} architecture names of timm. The Hub names of '
    'the published weights are `timm/<name>.<tag>`, with a name from this table. The Hub names '
    'lack `quickgelu_`. A folder that timm saved can have any architecture name if its '
    '`config.json` contains `model_args`. '
    '`test_timms_names_stand_for_its_arguments` checks that the dimensions for every name are the '
    'same as in timm. The tests `test_timm` and `test_timm_eva`, and the tests with the fixtures '
    '`timm_*`, compare outputs with timm.\n',
    '| name | parameters |',
    '| --- | --- |',
  ]
  lines += [f'| `{name}` | {millions(parameters(timm_model(name)))} |' for name in known]
  absent = ', '.join(f'`{name}`' for name in sorted(names) if not names[name])
  lines += [
    '',
    'The following models of timm cannot be loaded, because they have parts that the `ViT` of this '
    'project lacks, such as RMSNorm, parallel blocks, or a norm after each residual branch: '
    f'{absent}.',
  ]
  return '\n'.join(lines) + '\n'


def parse(argv: list[str]) -> argparse.Namespace:
  """Parses `--help` and refuses other arguments."""
  return arguments.Parser(__spec__, __doc__).parse_args(argv)


def main(argv: list[str]) -> None:
  parse(argv)
  with jax.default_device(jax.devices('cpu')[0]):
    (ROOT / 'docs' / 'models.md').write_text(tables(), encoding='utf-8')


if __name__ == '__main__':
  main(sys.argv[1:])
