"""Compares random models of Hugging Face and timm with ours: outputs, gradients, round trips.

These tests are skipped without `pip install -r requirements-peers.txt` (and `timm`). timm does not
need torchvision here: `torchvision_stand_in.py` stands in for it.
"""

import dataclasses
import json
import re

import jax
import numpy as np
from PIL import Image
import pytest

from tests.conftest import DATA, ROOT
from tests.weights.torchvision_stand_in import import_timm
from vit_jax import inherit, opening
from vit_jax.data import image as image_lib
from vit_jax.inference import exporting
from vit_jax.model import ACTIVATIONS, RESIZES, ViT, pooled
from vit_jax.weights import hf, hf_config, layouts, pretrained

torch = pytest.importorskip('torch', reason='needs requirements-peers.txt: torch')

IMAGE = np.random.RandomState(0).normal(size=(2, 16, 24, 3)).astype(np.float32)


def perturb(module):
  """Randomises all parameters, including biases, scales and tokens."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for parameter in module.parameters():
      parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
  return module.eval()


def torch_output(module, read, image_BHWC):
  """Returns the output, and the gradient of its weighted sum with respect to the image."""
  image = torch.tensor(image_BHWC.transpose(0, 3, 1, 2)).contiguous().requires_grad_()
  output = read(module(image))
  weight = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
  (gradient,) = torch.autograd.grad((output * weight).sum(), image)
  return output.detach().numpy(), gradient.numpy().transpose(0, 2, 3, 1)


def our_output(model, params, image_BHWC):
  def weighted(image):
    output = model.apply({'params': params}, image)
    weight = np.linspace(-1, 1, output.size, dtype=np.float32).reshape(output.shape)
    return (output * weight).sum(), output

  gradient, output = jax.grad(weighted, has_aux=True)(image_BHWC)
  return output, gradient


def check(theirs, folder, read, image=IMAGE):
  """Asserts that our output and gradient equal theirs; returns the loaded weights."""
  loaded = pretrained.load(folder)
  for ours, want in zip(our_output(*loaded, image), torch_output(theirs, read, image)):
    np.testing.assert_allclose(ours, want, atol=2e-5 * max(1, np.abs(want).max()))
  return loaded


HF = {
  'ViTForImageClassification': {},
  'ViTModel': {'hidden_act': 'gelu_pytorch_tanh'},
  'DeiTForImageClassification': {'qkv_bias': False},
  'DeiTForImageClassificationWithTeacher': {},
  'DeiTModel': {},
  'Dinov2ForImageClassification': {},
  'Dinov2Model': {'qkv_bias': False},
  'Dinov2WithRegistersForImageClassification': {'num_register_tokens': 3},
  'Dinov2WithRegistersModel': {},
}
SWIGLU = {'Dinov2Model': {'use_swiglu_ffn': True}}
SWIGLU['Dinov2WithRegistersForImageClassification'] = {'use_swiglu_ffn': True, 'mlp_ratio': 3}


@pytest.mark.slow
@pytest.mark.slow_after_first
@pytest.mark.parametrize('name, fields', [*HF.items(), *SWIGLU.items()])
def test_hugging_face(name, fields, tmp_path):
  transformers = pytest.importorskip('transformers', reason='needs requirements-peers.txt')
  kind = getattr(transformers, name)
  image = IMAGE
  sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
  if name.startswith('Dinov2'):
    del sizes['intermediate_size']
    sizes['mlp_ratio'] = 2
    image = IMAGE[:, :, :16]  # DINOv2 in transformers only takes square images
  config = kind.config_class(
    **sizes | fields, image_size=image.shape[1:3], patch_size=8, num_labels=5
  )
  theirs = perturb(kind(config))
  theirs.save_pretrained(tmp_path / 'theirs')
  headed = 'Classification' in name
  read = lambda output: output.logits if headed else output.last_hidden_state
  loaded = check(theirs, tmp_path / 'theirs', read, image)

  exporting.save(
    *loaded,
    tmp_path / 'ours',
    format='hf',
    preprocessing=dataclasses.replace(
      loaded.preprocessing, stretch=True
    ),  # the image is not square
    class_names=tuple('abcde') if headed else None,
  )
  again = kind.from_pretrained(tmp_path / 'ours').eval()
  if name != 'DeiTForImageClassificationWithTeacher':  # its two biases became one
    own = theirs.state_dict()
    for key, value in again.state_dict().items():
      assert torch.equal(value, own[key]) or 'pooler' in key or 'mask_token' in key, key
  ours, want = (torch_output(module, read, image)[0] for module in (again, theirs))
  np.testing.assert_allclose(ours, want, atol=2e-5)
  assert not headed or again.config.id2label == dict(enumerate('abcde'))


DINOV3 = {  # the fields in which published models differ; 7B has no bias of queries and values
  's16': {},
  's16plus': {'use_gated_mlp': True, 'hidden_act': 'silu'},
  '7b16': {'use_gated_mlp': True, 'hidden_act': 'silu', 'query_bias': False, 'value_bias': False},
  'no_registers': {'num_register_tokens': 0, 'rope_theta': 30.0, 'layer_norm_eps': 1e-3},
  'key_bias': {'key_bias': True, 'num_attention_heads': 4, 'patch_size': 4},
}


def dinov3(**fields):
  """Returns a random DINOv3 of transformers, with heads of size 16."""
  transformers = pytest.importorskip('transformers', reason='needs requirements-peers.txt')
  sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
  sizes |= dict(patch_size=8, num_register_tokens=4, image_size=32)
  config = transformers.DINOv3ViTConfig(**sizes | fields)
  return perturb(transformers.DINOv3ViTModel(config))


@pytest.mark.long
@pytest.mark.parametrize('name', DINOV3)
def test_dinov3(name, tmp_path):
  theirs = dinov3(**DINOV3[name])
  theirs.save_pretrained(tmp_path / 'theirs')
  draw = np.random.RandomState(0)
  for size in ((32, 32), (16, 16), (24, 40)):  # the file is for 32 pixels, but any size works
    image = draw.normal(size=(2, *size, 3)).astype(np.float32)
    for read in (lambda out: out.last_hidden_state, lambda out: out.pooler_output):
      loaded = pretrained.load(tmp_path / 'theirs')
      want = torch_output(theirs, read, image)
      if want[0].ndim == 2:
        loaded = dataclasses.replace(loaded, model=pooled(loaded.model))
      found = our_output(*loaded, image)
      np.testing.assert_allclose(found[0], want[0], atol=2e-5)
      np.testing.assert_allclose(found[1], want[1], atol=1e-4)
      still = loaded.model.clone(position='none')  # without its rotation
      assert np.abs(our_output(still, loaded.params, image)[0] - want[0]).max() > 1e-3

  exporting.save(
    *loaded, tmp_path / 'ours', format='hf', preprocessing=loaded.preprocessing
  )  # fmt: skip
  again, own = type(theirs).from_pretrained(tmp_path / 'ours').eval(), theirs.state_dict()
  for key, value in again.state_dict().items():
    assert torch.equal(value, own[key]) or 'mask_token' in key, key
  for field, value in DINOV3[name].items():
    assert getattr(again.config, field) == value, field


PUBLISHED = {  # sizes of the published models, from their paper (2508.10104, Table 2) and configs
  's16': dict(),
  's16plus': dict(use_gated_mlp=True, hidden_act='silu'),
  'b16': dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
  'l16': dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16
  ),
  'h16plus': dict(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
    use_gated_mlp=True, hidden_act='silu',
  ),
  '7b16': dict(
    hidden_size=4096, intermediate_size=8192, num_hidden_layers=40, num_attention_heads=32,
    use_gated_mlp=True, hidden_act='silu', query_bias=False, value_bias=False,
  ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('name', PUBLISHED)
def test_published_sizes_of_dinov3_have_the_arrays_of_transformers(name, tmp_path):
  """Compares names and shapes; no array is allocated."""
  transformers = pytest.importorskip('transformers', reason='needs requirements-peers.txt')
  config = transformers.DINOv3ViTConfig(**PUBLISHED[name], num_register_tokens=4)
  with torch.device('meta'):
    theirs = transformers.DINOv3ViTModel(config)
  want = {
    key.removeprefix('model.'): tuple(value.shape)
    for key, value in theirs.state_dict().items()
    if 'mask_token' not in key
  }
  weights = hf.read_hf(tmp_path, json.loads(config.to_json_string(use_diff=False)), {})
  shapes = layouts.param_shapes(ViT(**weights.fields), (32, 32, 3))
  found = {}
  for row in weights.rows:
    if set(row.ours) <= set(shapes):
      arrays = [np.broadcast_to(np.float32(0), shapes[name]) for name in row.ours]
      found |= zip(row.theirs, (x.shape for x in row.layout.write(arrays)))
  assert found == want


TEXT = dict(
  hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9,
  max_position_embeddings=4, eos_token_id=8,
)  # fmt: skip
TOWERS = [
  ('CLIPVisionModel', dict(hidden_act='gelu')),
  ('CLIPVisionModelWithProjection', dict(projection_dim=12)),
  ('CLIPModel', {}),
  ('SiglipVisionModel', {}),
  ('SiglipVisionModel', dict(vision_use_head=False, hidden_act='gelu', layer_norm_eps=1e-5)),
  ('SiglipModel', {}),
]


def towers_of(transformers, name, fields):
  """Returns a random model with an image tower of 2 blocks, for images of 32x32 pixels."""
  sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
  sizes |= dict(image_size=32, patch_size=8)
  kind = getattr(transformers, name)
  if 'Vision' in name:
    return perturb(kind(kind.config_class(**sizes, **fields)))
  own = dict(projection_dim=12) if name == 'CLIPModel' else {}
  text = TEXT | ({} if own else dict(projection_size=32))
  return perturb(kind(kind.config_class(text_config=text, vision_config=sizes | fields, **own)))


@pytest.mark.slow
@pytest.mark.slow_after_first
@pytest.mark.parametrize('size', [(32, 32), (48, 48), (24, 40)])
@pytest.mark.parametrize('name, fields', TOWERS)
def test_image_towers(name, fields, size, tmp_path):
  transformers = pytest.importorskip('transformers', reason='needs requirements-peers.txt')
  theirs = towers_of(transformers, name, fields)
  theirs.save_pretrained(tmp_path / 'theirs')
  tower = getattr(theirs, 'vision_model', theirs)
  image = np.random.RandomState(0).normal(size=(2, *size, 3)).astype(np.float32)

  def tokens(x):
    found = tower(x, interpolate_pos_encoding=True).last_hidden_state
    return tower.post_layernorm(found) if name.startswith('CLIP') else found

  def pooled(x):
    if name in ('CLIPModel', 'SiglipModel'):
      return theirs.get_image_features(x, interpolate_pos_encoding=True).pooler_output
    found = theirs(x, interpolate_pos_encoding=True)
    return getattr(found, 'image_embeds', None) if 'With' in name else found.pooler_output

  grid = tuple(n // 8 for n in size)
  for function, features in ((tokens, 'tokens'), (pooled, 'pooled')):
    if features == 'pooled' and not fields.get('vision_use_head', True):
      continue  # transformers has no pooled features
    loaded = pretrained.load(tmp_path / 'theirs', grid=grid, resize='hf', features=features)
    (output, gradient), (want, slope) = (
      our_output(*loaded, image),
      torch_output(function, lambda output: output, image),
    )
    np.testing.assert_allclose(output, want, atol=2e-5 * max(1, np.abs(want).max()))
    np.testing.assert_allclose(gradient, slope, atol=1e-4 * max(1, np.abs(slope).max()))


@pytest.mark.slow
@pytest.mark.parametrize('name, fields', TOWERS)
def test_image_towers_are_written_for_transformers(name, fields, tmp_path):
  transformers = pytest.importorskip('transformers', reason='needs requirements-peers.txt')
  theirs = towers_of(transformers, name, fields)
  theirs.save_pretrained(tmp_path / 'theirs')
  exporting.export(tmp_path / 'theirs', 'hf', tmp_path / 'ours')
  config = json.loads((tmp_path / 'ours' / 'config.json').read_text())
  kind = {'CLIPModel': 'CLIPVisionModelWithProjection', 'SiglipModel': 'SiglipVisionModel'}
  assert config['architectures'] == [kind.get(name, name)]
  again, about = getattr(transformers, kind.get(name, name)).from_pretrained(
    tmp_path / 'ours', output_loading_info=True
  )
  assert not any(about.values())
  bare = lambda model: {
    key.removeprefix('vision_model.'): value for key, value in model.state_dict().items()
  }
  want = {key: x for key, x in bare(theirs).items() if 'text' not in key and 'logit' not in key}
  own = bare(again)
  assert own.keys() == want.keys()
  assert all(torch.equal(own[key], want[key]) for key in own)


@pytest.mark.slow
@pytest.mark.parametrize('before, after', [((4, 4), (6, 6)), ((7, 7), (3, 5)), ((5, 5), (5, 9))])
def test_positions_are_resized_as_in_transformers(before, after):
  table = np.random.RandomState(0).normal(size=(*before, 7)).astype(np.float32)
  want = torch.nn.functional.interpolate(
    torch.tensor(table).permute(2, 0, 1)[None], after, mode='bicubic', align_corners=False
  )
  want = want[0].permute(1, 2, 0).numpy()
  np.testing.assert_allclose(RESIZES['hf'](table, after), want, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['CLIPModel', 'SiglipModel'])
def test_zero_shot_logits_and_probabilities_equal_those_of_transformers(name, tmp_path):
  transformers = pytest.importorskip('transformers', reason='needs requirements-peers.txt')
  theirs = towers_of(transformers, name, {})
  tokens = torch.tensor([[1, 2, 8], [3, 4, 8], [5, 6, 8], [7, 1, 8]])
  names = [f'class {i}' for i in range(4)]
  with torch.no_grad():
    theirs.logit_scale.fill_(4.6)
    if name == 'SiglipModel':
      theirs.logit_bias.fill_(-12.3)
    embeddings = theirs.get_text_features(tokens).pooler_output
    arrays = dict(names=names, embeddings=embeddings, logit_scale=theirs.logit_scale.exp())
    if name == 'SiglipModel':
      arrays['logit_bias'] = theirs.logit_bias.detach()
    np.savez(tmp_path / 'classes.npz', **arrays)
  theirs.save_pretrained(tmp_path / 'theirs')
  pixels = np.random.RandomState(0).randint(0, 256, (2, 32, 32, 3), np.uint8)
  exp, params = opening.from_init(str(tmp_path / 'theirs'), {}, zero_shot=tmp_path / 'classes.npz')
  assert exp.task.class_names == tuple(names)
  image = torch.tensor(np.asarray(exp.normalize(pixels)).transpose(0, 3, 1, 2))
  with torch.no_grad():
    want = theirs(input_ids=tokens, pixel_values=image).logits_per_image
  ours = exp.logits(params, {'image': pixels})
  np.testing.assert_allclose(ours, want, atol=2e-5 * np.abs(want.numpy()).max())
  probability = torch.sigmoid(want) if name == 'SiglipModel' else want.softmax(dim=1)
  np.testing.assert_allclose(exp.probabilities(params, pixels), probability, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['hf_clip', 'hf_siglip'])
def test_the_program_of_the_docs_writes_the_classes(name, tmp_path, monkeypatch):
  transformers = pytest.importorskip('transformers', reason='needs requirements-peers.txt')
  page = (ROOT / 'docs' / 'weights.md').read_text(encoding='utf-8')
  program = re.search(r'`make_classes\.py`.*?```python\n(.*?)```', page, re.S)[1]
  program = program.replace('google/siglip2-base-patch16-224', str(DATA / name))
  program = program.replace("['cat', 'dog', 'bird']", "['cat', 'dog', 'a bird']")

  class Tokenizer:
    @staticmethod
    def from_pretrained(path):
      return Tokenizer()

    def __call__(self, texts, return_tensors, padding, max_length=None):
      assert texts == ['a photo of a cat', 'a photo of a dog', 'a photo of a a bird']
      assert (padding, max_length) == (('max_length', 64) if 'siglip' in name else (True, None))
      return {'input_ids': torch.tensor([[1, 2, 8], [3, 4, 8], [5, 6, 8]])}

  monkeypatch.setattr(transformers, 'AutoTokenizer', Tokenizer)
  monkeypatch.chdir(tmp_path)
  exec(compile(program, 'make_classes.py', 'exec'), {})
  found, want = np.load('classes.npz'), np.load(DATA / name / 'classes.npz')
  assert {*found} == {*want}
  assert found['names'].tolist() == want['names'].tolist()
  for key in {*want} - {'names'}:
    np.testing.assert_allclose(found[key], want[key], rtol=1e-5, atol=1e-6)
  inherit.open_classes(tmp_path / 'classes.npz')


TIMM = [
  {},
  {'qkv_bias': False, 'num_classes': 0},
  {'pre_norm': True, 'act_layer': 'quick_gelu'},
  {'reg_tokens': 3},
  {'reg_tokens': 2, 'no_embed_class': True, 'init_values': 0.2},
  {'architecture': 'deit3_small_patch16_224'},
  {'global_pool': 'avg', 'mlp_ratio': 2.572},
  {'global_pool': 'avg', 'fc_norm': False, 'class_token': False},
  {'global_pool': 'map', 'class_token': False, 'reg_tokens': 1, 'qk_norm': True},
  {'global_pool': 'map', 'act_layer': 'gelu_tanh'},
  {'mlp_ratio': 4.7, 'act_layer': 'silu', 'architecture': 'vit_giant_patch14_dinov2'},
]
EVA = [
  {},
  {'swiglu_mlp': True, 'use_rot_pos_emb': True, 'ref_feat_shape': [4, 4]},
  {
    'swiglu_mlp': True, 'scale_mlp': True, 'scale_attn_inner': True, 'qkv_fused': False,
    'use_rot_pos_emb': True, 'ref_feat_shape': [2, 2], 'global_pool': 'token',
  },
  {'use_rot_pos_emb': True, 'init_values': 0.3, 'qkv_bias': False, 'num_classes': 0,
   'global_pool': 'token'},
  {
    'use_rot_pos_emb': True, 'num_reg_tokens': 2, 'no_embed_class': True, 'use_fc_norm': False,
    'rope_temperature': 50, 'mlp_ratio': 2.6,
  },
  {'architecture': 'vit_small_patch16_dinov3_qkvb', 'global_pool': 'token'},
  {'architecture': 'vit_small_plus_patch16_dinov3', 'mlp_ratio': 1.3},
]  # fmt: skip


def check_timm(timm, architecture, arguments, theirs, tmp_path):
  """Compares a model of timm with ours, also at a second size, and after a round trip."""
  from safetensors.torch import save_file

  theirs, folder = perturb(theirs), tmp_path / 'theirs'
  folder.mkdir()
  state = {name: array.contiguous() for name, array in theirs.state_dict().items()}
  save_file(state, folder / 'model.safetensors')
  config = dict(architecture=architecture, model_args=arguments)
  (folder / 'config.json').write_text(json.dumps(config))
  if not arguments['num_classes']:
    theirs.forward = theirs.forward_features
  loaded = check(theirs, folder, lambda output: output)
  exporting.save(
    *loaded, tmp_path / 'ours', format='timm', preprocessing=loaded.preprocessing
  )  # fmt: skip
  again = timm.create_model(f'local-dir:{tmp_path / "ours"}', pretrained=True).eval()
  return theirs, again


def timm_module():
  try:
    return import_timm()
  except ImportError as error:
    pytest.skip(f'needs timm: {error}')


SMALL = dict(img_size=[16, 24], patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)


@pytest.mark.slow
@pytest.mark.parametrize('fields', TIMM, ids=lambda fields: '-'.join(fields) or 'plain')
def test_timm(fields, tmp_path):
  timm = timm_module()
  arguments = SMALL | fields
  architecture = arguments.pop('architecture', 'vit_custom')
  if architecture == 'vit_custom':
    theirs = timm.models.VisionTransformer(**arguments)
  else:
    theirs = timm.create_model(architecture, **arguments)
  theirs, again = check_timm(timm, architecture, arguments, theirs, tmp_path)
  own = theirs.state_dict()
  assert again.state_dict().keys() == own.keys()
  assert all(torch.equal(value, own[key]) for key, value in again.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize('fields', EVA, ids=lambda fields: '-'.join(fields) or 'plain')
def test_timm_eva(fields, tmp_path):
  timm = timm_module()
  arguments = dict(mlp_ratio=4 * 2 / 3) | SMALL | fields
  architecture = arguments.pop('architecture', 'eva_giant_patch14_224')
  theirs = timm.create_model(architecture, **arguments)
  theirs, again = check_timm(timm, architecture, arguments, theirs, tmp_path)
  image = torch.tensor(IMAGE.transpose(0, 3, 1, 2))
  call = lambda model: (
    model.forward_features(image) if not fields.get('num_classes', 5) else model(image)
  )
  torch.testing.assert_close(call(again), call(theirs), atol=1e-5, rtol=1e-5)
  loaded = pretrained.load(tmp_path / 'theirs', grid=(4, 2))  # other positions, not square
  resized = timm.create_model(architecture, **arguments | {'img_size': [32, 16]}).eval()
  state = theirs.state_dict()
  if 'pos_embed' in state:
    prefix = 0 if arguments.get('no_embed_class') else 1
    state['pos_embed'] = torch.tensor(loaded.params['pos_embedding'])
    assert state['pos_embed'].shape[1] == 8 + prefix
  resized.load_state_dict(state)
  image = np.random.RandomState(1).normal(size=(2, 32, 16, 3)).astype(np.float32)
  if not arguments['num_classes']:
    resized.forward = resized.forward_features
  for ours, want in zip(our_output(*loaded, image), torch_output(resized, lambda x: x, image)):
    np.testing.assert_allclose(ours, want, atol=2e-5 * max(1, np.abs(want).max()))


@pytest.mark.parametrize('fields', [
    dict(size={'height': 24, 'width': 32}, resample=2),
    dict(size={'height': 24, 'width': 32}, resample=3),
])  # fmt: skip
def test_image_preparation_matches_the_hugging_face_processor(fields, tmp_path):
  transformers = pytest.importorskip('transformers', reason='needs requirements-peers.txt')
  kind = getattr(transformers, 'ViTImageProcessorPil', transformers.ViTImageProcessor)
  processor = kind(**fields, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7])
  pixels = np.random.RandomState(0).randint(0, 256, (50, 70, 3), np.uint8)
  want = processor(Image.fromarray(pixels), return_tensors='np')['pixel_values'][0]
  p = hf_config.processing(json.loads(processor.to_json_string()), (24, 32), 'processor')
  ours = image_lib.fit_image(Image.fromarray(pixels), p.size, p.interpolation, p.crop, p.stretch)
  ours = (ours / 255 - np.array(p.mean)) / np.array(p.std)
  np.testing.assert_allclose(ours, want.transpose(1, 2, 0), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('name', hf_config.ACTIVATIONS)
def test_activations_equal_those_of_hugging_face_with_the_same_name(name):
  activations = pytest.importorskip('transformers.activations', reason='needs transformers')
  x = np.linspace(-5, 5, 101, dtype=np.float32)
  want = activations.ACT2FN[name](torch.tensor(x)).numpy()
  np.testing.assert_allclose(ACTIVATIONS[hf_config.ACTIVATIONS[name]](x), want, atol=1e-6)


@pytest.mark.slow
@pytest.mark.slow_after_first
@pytest.mark.parametrize('kind, resize', [('Dinov2', 'hf'), ('Dinov2WithRegisters', 'bicubic')])
def test_the_documented_resize_of_dinov2_equals_that_of_transformers(kind, resize, tmp_path):
  transformers = pytest.importorskip('transformers', reason='needs requirements-peers.txt')
  sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2)
  config = getattr(transformers, f'{kind}Config')(image_size=56, patch_size=7, **sizes)
  theirs = perturb(getattr(transformers, f'{kind}Model')(config))
  theirs.save_pretrained(tmp_path)
  image = np.random.RandomState(0).normal(size=(2, 28, 28, 3)).astype(np.float32)
  want, _ = torch_output(theirs, lambda output: output.last_hidden_state, image)
  errors = {
    name: np.abs(our_output(*pretrained.load(tmp_path, grid=(4, 4), resize=name), image)[0] - want)
    for name in ('bilinear', 'bicubic', 'hf')
  }
  assert errors.pop(resize).max() < 2e-5 < 1e-2 < min(error.max() for error in errors.values())
