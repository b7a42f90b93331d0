"""Tests DINOv3, gated DINOv2 and EVA-02: damaged files, changed configs, and every mode."""

import json
import re
import shutil

import jax.export
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.conftest import DATA, call, check_resumes_exactly, run_model
from tests.weights.test_init import fine_tuning
import vit_jax
from vit_jax import opening
from vit_jax.figures import maps, visualize
from vit_jax.inference import exporting
from vit_jax.model import pooled
from vit_jax.opening import Request
from vit_jax.weights import flatten_params, hf
from vit_jax.weights.formats import Preprocessing

FAMILIES = ['hf_dinov2_swiglu', 'hf_dinov3', 'timm_dinov2_swiglu', 'timm_eva02']
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def write(folder, arrays, config):
  """Writes a folder of weights."""
  save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()},
            folder / 'model.safetensors')  # fmt: skip
  (folder / 'config.json').write_text(json.dumps(config))


def read(name):
  """Returns the arrays and the config of a fixture."""
  config = json.loads((DATA / name / 'config.json').read_text())
  return load_file(DATA / name / 'model.safetensors'), config


DAMAGES = {
  'missing': lambda arrays, name: arrays.pop(name),
  'wrong shape': lambda arrays, name: arrays.update({name: np.concatenate([arrays[name]] * 2)}),
  'extra': lambda arrays, name: arrays.update({f'{name}_extra': arrays[name]}),
  'not finite': lambda arrays, name: arrays.update({name: arrays[name] * np.nan}),
  'integers': lambda arrays, name: arrays.update({name: arrays[name].astype(np.int32)}),
}


@pytest.mark.parametrize('name', FAMILIES)
def test_thirty_damaged_files_are_refused_by_the_name_of_the_array(name, tmp_path):
  draw, count = np.random.RandomState(0), 0
  whole, config = read(name)
  names = sorted(array for array in whole if 'mask_token' not in array)
  for damage in DAMAGES.values():
    for array in draw.choice(names, 6, replace=False):
      arrays = dict(whole)
      damage(arrays, array)
      write(tmp_path, arrays, config)
      with pytest.raises(ValueError, match=re.escape(array)) as error:
        vit_jax.load(tmp_path)
      assert str(tmp_path) in str(error.value)
      count += 1
  assert count == 30


HF_CHANGES = [
  (dict(hidden_size=48), r'has shape .*, expected'),
  (dict(num_hidden_layers=3), 'layer.2.* missing'),
  (dict(num_hidden_layers=1), 'layer.1.*not part of the model'),
  (dict(num_attention_heads=5), 'not divisible'),
  (dict(num_attention_heads=None), 'num_attention_heads is None, expected int'),
  (dict(hidden_act='relu'), "hidden_act: unknown 'relu'"),
  (dict(num_register_tokens=3), r'register_tokens: has shape \(1, 2, 24\), expected \(1, 3, 24\)'),
  (dict(num_register_tokens=-1), 'num_registers must not be negative'),
  (dict(num_register_tokens=0), 'register_tokens: not part of the model'),
  (dict(num_channels=1), 'mean: expected 1 or 1 numbers'),
  (dict(patch_size=14), r'expected \(24, 3, 14, 14\)|has 4 patches, but the file has positions'),
  (dict(layer_norm_eps='1e-5'), "layer_norm_eps is '1e-5', expected float"),
  (dict(layerscale_value='big'), "layerscale_value is 'big', expected float"),
  (dict(model_type='vit'), 'model_type=vit does not fit the architecture'),
  (dict(architectures=['DINOv3ConvNextModel']), "architecture: unknown 'DINOv3ConvNextModel'"),
  (dict(norm_type='rms'), 'unsupported fields: norm_type'),
]
CHANGES = {
  'hf_dinov3': [
    *HF_CHANGES,
    (dict(num_attention_heads=4), 'head size divisible by 4, got 6'),
    (dict(intermediate_size=48), r'expected \(48, 24\)'),
    (dict(use_gated_mlp=False), 'gate_proj.*not part of the model'),
    (dict(use_gated_mlp='no'), "use_gated_mlp is 'no', expected bool"),
    (dict(query_bias=False), 'value_bias=True with query_bias=False is not supported'),
    (dict(query_bias=False, value_bias=False), 'q_proj.bias: not part of the model'),
    (dict(key_bias=True), 'k_proj.bias: missing'),
    (dict(key_bias=0), 'key_bias is 0, expected bool'),
    (dict(proj_bias=False), 'proj_bias=False .*is not supported, only proj_bias=True'),
    (dict(mlp_bias=False), 'mlp_bias=False .*is not supported, only mlp_bias=True'),
    (dict(rope_theta=0), 'rope_theta must be positive'),
    (dict(rope_theta=None), 'rope_theta is None, expected float'),
    (dict(rope_theta='100'), "rope_theta is '100', expected float"),
    (dict(rope_parameters={'rope_theta': 100.0}), 'unsupported fields: rope_parameters'),
    (dict(model_type='dinov2', architectures=['Dinov2Model']), 'unsupported fields: .*rope_theta'),
    (dict(image_size=0), 'image_size: expected one or two positive integers'),
  ],
  'hf_dinov2_swiglu': [
    *HF_CHANGES,
    (dict(use_swiglu_ffn=False), 'mlp.fc1.bias: missing'),
    (dict(use_swiglu_ffn=1), 'use_swiglu_ffn is 1, expected bool'),
    (dict(mlp_ratio=4), r'mlp.weights_in.weight: has shape \(64, 24\), expected \(128, 24\)'),
    (dict(qkv_bias=False), 'query.bias: not part of the model'),
  ],
  'timm_dinov2_swiglu': [
    (dict(mlp_ratio=4), r'mlp.fc1.weight: has shape \(64, 24\), expected \(96, 24\)'),
    (dict(mlp_layer='GluMlp'), "mlp_layer: unknown 'GluMlp'"),
    (dict(mlp_layer=None), r'mlp.fc2.weight: has shape \(24, 32\), expected \(24, 64\)'),
    (dict(act_layer='relu'), "act_layer: unknown 'relu'"),
    (dict(swiglu_mlp=True), "unsupported argument 'swiglu_mlp'"),
    (dict(reg_tokens=1), 'reg_token: has shape'),
    (dict(init_values=None), 'ls1.gamma: not part of the model'),
  ],
  'timm_eva02': [
    (dict(embed_dim=48), 'expected'),
    (dict(depth=3), 'blocks.2.* missing'),
    (dict(num_heads=4), 'head size divisible by 4, got 6'),
    (dict(mlp_ratio=4), r'expected \(96, 24\)'),
    (dict(img_size=28), 'has 16 patches, but the file has positions for 24'),
    (dict(qkv_bias=False), 'q_proj.bias: not part of the model'),
    (dict(qkv_fused=True), 'attn.qkv.weight: missing'),
    (dict(qk_norm=True), 'qk_norm=True is not supported'),
    (dict(swiglu_mlp='no'), "swiglu_mlp is 'no', expected bool"),
    (dict(swiglu_mlp=False), 'arguments is not supported: .*scale_mlp=True, swiglu_mlp=False'),
    (dict(scale_mlp=False), 'mlp.fc1.weight: missing'),
    (dict(swiglu_align_to=64), r'expected \(64, 24\)'),
    (dict(scale_attn_inner=False), 'attn.norm.weight: not part of the model'),
    (dict(attn_type='rope'), "attn_type='rope' is not supported"),
    (dict(init_values=0.1), 'gamma_1: missing'),
    (dict(attn_only_layer_scale=True), 'attn_only_layer_scale=True is not supported'),
    (dict(num_kv_heads=1), 'num_kv_heads=1 is not supported'),
    (dict(use_rot_pos_emb=False, use_abs_pos_emb=False), 'arguments is not supported'),
    (dict(use_abs_pos_emb=False), 'arguments is not supported: use_abs_pos_emb=False'),
    (dict(rope_type='mixed'), 'arguments is not supported: .*rope_type=mixed'),
    (dict(rope_type='dinov3'), 'arguments is not supported: .*rope_type=dinov3'),
    (dict(rope_rotate_half=True), 'arguments is not supported: .*rope_rotate_half=True'),
    (dict(rope_grid_offset=0.5), 'rope_grid_offset=0.5 is not supported'),
    (dict(rope_grid_indexing='xy'), "rope_grid_indexing='xy' is not supported"),
    (dict(rope_temperature=0), 'rope_theta must be positive'),
    (dict(rope_temperature=None), 'config.json: a key is missing, or its value'),
    (dict(ref_feat_shape=[0, 3]), 'ref_feat_shape: expected one or two positive integers'),
    (dict(global_pool='map'), 'arguments is not supported: .*global_pool=map'),
    (dict(use_post_norm=True), 'use_post_norm=True is not supported'),
    (dict(use_fc_norm=True), 'fc_norm.weight: missing'),
    (dict(class_token=False), 'reads the class token'),
    (dict(no_embed_class=True), 'has 24 patches, but the file has positions for 25'),
    (dict(num_reg_tokens=2), 'positions for 22|reg_token: missing'),
    (dict(use_pre_transformer_norm=True), 'norm_pre.weight: missing'),
    (dict(fc_norm=True), "unsupported argument 'fc_norm'"),
  ],
}


@pytest.mark.slow_after_first
@pytest.mark.parametrize('name', FAMILIES)
def test_every_changed_field_of_a_config_is_refused(name, tmp_path):
  arrays, config = read(name)
  write(tmp_path, arrays, config)
  loaded = vit_jax.load(tmp_path)
  for changed, message in CHANGES[name]:
    if 'model_args' in config:
      changed = dict(model_args=config['model_args'] | changed)
    (tmp_path / 'config.json').write_text(json.dumps(config | changed))
    with pytest.raises(ValueError, match=message):
      vit_jax.load(tmp_path)
  assert loaded.model.num_registers == {'timm_eva02': 0}.get(name, 2)


TRAINING_ONLY = dict(
  attention_dropout=0.1, drop_path_rate=0.3, initializer_range=1.0, pos_embed_jitter=1.5,
  pos_embed_rescale=None, pos_embed_shift=0.2, apply_layernorm=False, reshape_hidden_states=False,
  out_features=['stage1'], out_indices=[1], return_class_token=True, dtype='bfloat16',
)  # fmt: skip


def test_fields_of_pre_training_change_nothing(tmp_path):
  arrays, config = read('hf_dinov3')
  del config['architectures']  # then the model type decides
  arrays |= {'embeddings.mask_token': np.ones((1, 1, 24), np.float32)}
  write(tmp_path, arrays, config | TRAINING_ONLY)
  loaded, own = vit_jax.load(tmp_path), vit_jax.load(DATA / 'hf_dinov3')
  assert loaded.model == own.model and loaded.ignored == ('embeddings.mask_token',)


def test_a_file_without_registers_may_have_an_empty_array_of_them(tmp_path):
  arrays, config = read('hf_dinov3')
  arrays['embeddings.register_tokens'] = np.zeros((1, 0, 24), np.float32)
  write(tmp_path, arrays, config | dict(num_register_tokens=0))
  loaded = vit_jax.load(tmp_path)
  assert loaded.model.num_prefix == 1 and 'registers' not in loaded.params


DINOV3_PROCESSOR = dict(  # as on the Hub
  crop_size=None, default_to_square=True, device=None, disable_grouping=None, do_center_crop=None,
  do_convert_rgb=None, do_normalize=True, do_rescale=True, do_resize=True,
  image_mean=list(IMAGENET[0]), image_processor_type='DINOv3ViTImageProcessorFast',
  image_std=list(IMAGENET[1]), input_data_format=None, resample=2, rescale_factor=1 / 255,
  return_tensors=None, size={'height': 224, 'width': 224},
)  # fmt: skip


@pytest.mark.parametrize('with_file', [True, False])
def test_dinov3_images_are_stretched_bilinearly(with_file, tmp_path):
  if with_file:
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(DINOV3_PROCESSOR))
  config = dict(model_type='dinov3_vit', architectures=['DINOv3ViTModel'])
  found = hf.read_hf(tmp_path, config, {})
  assert found.preprocessing == Preprocessing((224, 224), *IMAGENET, 'bilinear', 1.0, True)
  assert found.fields['width'] == 384 and found.fields['norm_epsilon'] == 1e-5


def test_dinov3_takes_images_of_every_size():
  loaded = vit_jax.load(DATA / 'hf_dinov3', grid=(3, 5))
  assert loaded.preprocessing.size == (21, 35) and 'pos_embedding' not in loaded.params
  for size in ((21, 35), (14, 7)):
    tokens = run_model(loaded.model, loaded.params, np.zeros((1, *size, 3), np.float32))
    assert tokens.shape == (1, 3 + size[0] * size[1] // 49, 24)


def test_a_new_head_reads_the_normalised_class_token():
  loaded = vit_jax.load(DATA / 'hf_dinov3', num_classes=5)
  assert loaded.model.pool == 'cls' and loaded.params['head']['kernel'].shape == (24, 5)
  io = np.load(DATA / 'hf_dinov3' / 'io.npz')
  body = loaded.model.clone(num_classes=None)
  params = {name: x for name, x in loaded.params.items() if name != 'head'}
  features = run_model(body, params, io['image'])
  np.testing.assert_allclose(features, io['output'][:, 0], atol=2e-5)
  with pytest.raises(ValueError, match=r'cannot hold this model:\n  model.num_classes=5'):
    vit_jax.save(*loaded, '/nowhere', format='hf', preprocessing=loaded.preprocessing)


@pytest.mark.slow_after_first
@pytest.mark.parametrize('name', ['hf_dinov3', 'timm_eva02'])
def test_a_model_without_its_rotation_gives_other_outputs(name):
  """The tolerance of the comparison with the original outputs is 2e-5."""
  loaded, io = vit_jax.load(DATA / name), np.load(DATA / name / 'io.npz')
  still = {'hf_dinov3': 'none', 'timm_eva02': 'learned'}[name]
  for fields in (dict(position=still), dict(rope_theta=60.0)):
    output = run_model(loaded.model.clone(**fields), loaded.params, io['image'])
    assert np.abs(output - io['output']).max() > 1e-3


@pytest.mark.slow_after_first
@pytest.mark.parametrize('name', FAMILIES)
def test_attention_maps_and_rollout_show_every_patch(name):
  loaded, image = vit_jax.load(DATA / name), np.load(DATA / name / 'io.npz')['image']
  model = pooled(loaded.model)
  found = maps.attention_summary(model, loaded.params, image)
  grid = maps.grid_of(model, image)
  assert found['heads'].shape == (2, 2, 3, *grid) and found['rollout'].shape == (2, *grid)
  assert (found['rollout'] > 0).all() and (found['rollout'].sum(axis=(1, 2)) < 1).all()


@pytest.mark.slow
@pytest.mark.slow_after_first
@pytest.mark.parametrize('form', ['stablehlo', 'onnx'])
@pytest.mark.parametrize('name', FAMILIES)
def test_programs_give_the_original_outputs(name, form, tmp_path):
  if form == 'onnx':
    pytest.importorskip('jax2onnx', reason='needs requirements-onnx.txt')
  exporting.export(DATA / name, form, tmp_path / 'out')
  exp, params, _ = opening.open_model(Request(init=str(DATA / name)), 'any')
  size = exp.image_shape[:2]
  image_BHWC = np.random.RandomState(0).randint(0, 256, (3, *size, 3), np.uint8)
  want = run_model(exp.model, params, exp.normalize(image_BHWC))
  if form == 'stablehlo':
    data = bytearray((tmp_path / 'out' / 'model.stablehlo').read_bytes())
    found = jax.export.deserialize(data).call(image_BHWC)
  else:
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / 'out' / 'model.onnx')
    found = session.run(None, {'image': image_BHWC})[0]
  np.testing.assert_allclose(found, want, atol=2e-4 * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.slow_after_first
@pytest.mark.parametrize('name', FAMILIES)
def test_every_mode_works(name, capsys, tmp_path):
  init, size = str(DATA / name), {'data.image_size': '28'}
  flags = [f'--init={init}', '--config.data.source=synthetic', '--config.data.image_size=28']
  code, out, _ = call(capsys, '--mode=fewshot', *flags)
  assert not code and float(out.splitlines()[-1].split()[2].rstrip('%')) > 30  # of 10 classes

  probe = fine_tuning(init, size | {'freeze': 'backbone', 'optimizer.lr': '0.1'})
  assert vit_jax.train(probe, tmp_path / 'probe')['test_accuracy'] > 0.3

  lora = {'adapt': 'lora', 'lora.rank': '2', 'optimizer.name': 'muon', 'optimizer.lr': '0.01'}
  result = vit_jax.train(fine_tuning(init, size | lora), tmp_path / 'tuned')
  loaded, own = vit_jax.load(tmp_path / 'tuned'), vit_jax.load(init, grid=(4, 4))
  kernel = 'block_1/mlp/gate/kernel'
  assert not np.array_equal(*(flatten_params(x.params)[kernel] for x in (loaded, own)))
  assert loaded.model.position == own.model.position and loaded.model.mlp == own.model.mlp
  assert vit_jax.evaluate(tmp_path / 'tuned')['accuracy'] == result['test_accuracy']

  drawn = visualize(Request(tmp_path / 'tuned'))
  assert {'heads.png', 'rollout.png', 'distance.png'} <= {file.name for file in drawn}, drawn


@pytest.mark.slow
@pytest.mark.slow_after_first
@pytest.mark.parametrize('fields', [
    {'model.mlp': 'gated', 'model.activation': 'silu', 'model.position': 'rope_unit'},
    {'model.mlp': 'gated_norm', 'model.out_norm': 'true', 'model.position': 'learned_rope',
     'model.key_bias': 'false', 'model.pool': 'cls', 'optimizer.name': 'muon'},
])  # fmt: skip
def test_training_from_scratch_learns_and_resumes(fields, tmp_path):
  (tmp_path / 'init').mkdir()
  whole, _ = check_resumes_exactly(fields, tmp_path / 'init', tmp_path)
  assert whole['test_accuracy'] > 0.2


@pytest.mark.slow
def test_a_workdir_with_a_gated_model_can_be_copied_and_exported(tmp_path):
  fields = {'model.mlp': 'gated', 'model.activation': 'gelu', 'model.pool': 'cls'}
  vit_jax.train(fine_tuning('', {'model.variant': 'tiny', 'epochs': '0'} | fields), tmp_path / 'a')
  shutil.copytree(tmp_path / 'a', tmp_path / 'b')
  exporting.export(tmp_path / 'b', 'timm', tmp_path / 'out')
  loaded, own = vit_jax.load(tmp_path / 'out'), vit_jax.load(tmp_path / 'a')
  assert loaded.model.mlp == 'gated' and loaded.model.activation == 'gelu'
  for name, leaf in flatten_params(own.params).items():
    np.testing.assert_array_equal(flatten_params(loaded.params)[name], leaf)
