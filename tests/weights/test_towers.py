"""Tests the image towers of CLIP and SigLIP.

The fixtures `hf_clip` and `hf_siglip` hold whole models, written by transformers.
"""

import json
import logging

import numpy as np
from PIL import Image
import pytest
from safetensors.numpy import load_file, save_file

from tests.conftest import DATA, call, run_model
import vit_jax
from vit_jax import config as config_lib
from vit_jax.inference import exporting, prediction
from vit_jax.opening import Request
from vit_jax.weights import hf, hf_towers
from vit_jax.weights.formats import Preprocessing

FAMILIES = ('hf_clip', 'hf_siglip')


def stored(name):
  """Returns the arrays of `io.npz`: images, their embeddings, and the logits of transformers."""
  return np.load(DATA / name / 'io.npz')


def copied(name, folder, change=lambda arrays: None, **fields):
  """Copies a fixture with changed arrays, and a config whose fields are updated by `fields`."""
  folder.mkdir(exist_ok=True)
  arrays = load_file(DATA / name / 'model.safetensors')
  change(arrays)
  save_file(arrays, folder / 'model.safetensors')
  config = json.loads((DATA / name / 'config.json').read_text())
  vision = config['vision_config'] | fields.pop('vision_config', {})
  (folder / 'config.json').write_text(json.dumps(config | {'vision_config': vision} | fields))
  return folder


# Reading.


@pytest.mark.parametrize('name', FAMILIES)
def test_tokens_are_the_default_and_the_text_tower_is_named_in_the_log(name, caplog):
  with caplog.at_level(logging.INFO):
    model, params = vit_jax.load(DATA / name)
  (text,) = [row.getMessage() for row in caplog.records if 'text_model' in row.getMessage()]
  assert 'text_model (' in text and 'logit_scale' in text and len(text) < 250
  tokens = run_model(model, params, stored(name)['image'])
  assert tokens.shape == (2, 16 + (name == 'hf_clip'), 24)
  assert not {'projection', 'map', 'head'} & params.keys()


def test_pooled_features_of_a_model_without_a_pooling_are_its_class_token():
  pooled = vit_jax.load(DATA / 'hf_backbone', features='pooled')
  tokens = vit_jax.load(DATA / 'hf_backbone')
  image = np.load(DATA / 'hf_backbone' / 'io.npz')['image']
  want = run_model(*tokens, image)[:, 0]
  np.testing.assert_allclose(run_model(*pooled, image), want, atol=1e-6)
  with pytest.raises(ValueError, match="features: unknown 'all'"):
    vit_jax.load(DATA / 'hf_backbone', features='all')


def test_a_new_head_replaces_the_projection_as_in_the_paper():
  loaded = vit_jax.load(DATA / 'hf_clip', num_classes=5)
  assert loaded.model.projection is None and 'projection' not in loaded.params
  assert loaded.params['head']['kernel'].shape == (24, 5)


OPENAI = json.loads("""{
  "_name_or_path": "openai/clip-vit-base-patch32", "architectures": ["CLIPModel"],
  "initializer_factor": 1.0, "logit_scale_init_value": 2.6592, "model_type": "clip",
  "projection_dim": 512, "text_config_dict": null, "torch_dtype": "float32",
  "transformers_version": null, "vision_config_dict": null,
  "text_config": {"_name_or_path": "", "add_cross_attention": false, "bad_words_ids": null},
  "vision_config": {
    "_name_or_path": "", "add_cross_attention": false, "architectures": null,
    "attention_dropout": 0.0, "bad_words_ids": null, "bos_token_id": null,
    "chunk_size_feed_forward": 0, "cross_attention_hidden_size": null,
    "decoder_start_token_id": null, "diversity_penalty": 0.0, "do_sample": false, "dropout": 0.0,
    "early_stopping": false, "encoder_no_repeat_ngram_size": 0, "eos_token_id": null,
    "finetuning_task": null, "forced_bos_token_id": null, "forced_eos_token_id": null,
    "hidden_act": "quick_gelu", "hidden_size": 768, "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "image_size": 224, "initializer_factor": 1.0, "initializer_range": 0.02,
    "intermediate_size": 3072, "is_decoder": false, "is_encoder_decoder": false,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "layer_norm_eps": 1e-05, "length_penalty": 1.0,
    "max_length": 20, "min_length": 0, "model_type": "clip_vision_model",
    "no_repeat_ngram_size": 0, "num_attention_heads": 12, "num_beam_groups": 1, "num_beams": 1,
    "num_hidden_layers": 12, "num_return_sequences": 1, "output_attentions": false,
    "output_hidden_states": false, "output_scores": false, "patch_size": 32, "prefix": null,
    "problem_type": null, "pruned_heads": {}, "remove_invalid_values": false,
    "repetition_penalty": 1.0, "return_dict": true, "return_dict_in_generate": false,
    "sep_token_id": null, "task_specific_params": null, "temperature": 1.0,
    "tie_encoder_decoder": false, "tie_word_embeddings": true, "tokenizer_class": null,
    "top_k": 50, "top_p": 1.0, "torch_dtype": null, "torchscript": false,
    "transformers_version": "4.16.0.dev0", "typical_p": 1.0, "use_bfloat16": false}}
""")
OPENAI_PROCESSOR = dict(  # of older versions, in which a number is the shorter side
  crop_size=224, do_center_crop=True, do_normalize=True, do_resize=True,
  feature_extractor_type='CLIPFeatureExtractor', image_mean=[0.48145466, 0.4578275, 0.40821073],
  image_std=[0.26862954, 0.26130258, 0.27577711], resample=3, size=224,
)  # fmt: skip
SIGLIP = dict(
  architectures=['SiglipModel'], initializer_factor=1.0, model_type='siglip',
  text_config={'model_type': 'siglip_text_model', 'vocab_size': 256000}, torch_dtype='float32',
  transformers_version='4.49.0.dev0', vision_config={'model_type': 'siglip_vision_model'},
)  # fmt: skip
SIGLIP_PROCESSOR = dict(
  do_convert_rgb=None, do_normalize=True, do_rescale=True, do_resize=True, image_mean=[0.5] * 3,
  image_processor_type='SiglipImageProcessor', image_std=[0.5] * 3, resample=2,
  processor_class='SiglipProcessor', rescale_factor=1 / 255, size={'height': 224, 'width': 224},
)  # fmt: skip


@pytest.mark.parametrize('config, processor, want, prepared', [
    (OPENAI, OPENAI_PROCESSOR,
     dict(patch_size=(32, 32), activation='quick_gelu', projection=512, norm_epsilon=1e-5),
     Preprocessing((224, 224), hf_towers.MEAN, hf_towers.STD)),
    (OPENAI | {'vision_config': None, 'projection_dim': 768,  # as LAION's
               'vision_config_dict': {'hidden_size': 1280, 'hidden_act': 'gelu', 'patch_size': 14}},
     {}, dict(patch_size=(14, 14), activation='gelu', projection=768, width=1280, mlp_dim=3072),
     Preprocessing((224, 224), hf_towers.MEAN, hf_towers.STD)),
    (SIGLIP, SIGLIP_PROCESSOR,
     dict(patch_size=(16, 16), activation='gelu_tanh', pool='map', norm_epsilon=1e-6),
     Preprocessing((224, 224), (0.5,) * 3, (0.5,) * 3, 'bilinear', stretch=True)),
    (SIGLIP | {'vision_config': {'image_size': 384, 'vision_use_head': False}}, None,
     dict(pool='none', width=768), Preprocessing((384, 384), stretch=True)),
])  # fmt: skip
def test_configs_from_the_hub_are_read(config, processor, want, prepared, tmp_path):
  if processor is not None:
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(processor))
  found = hf.read_hf(tmp_path, config, {})
  assert {name: found.fields[name] for name in want} == want
  assert found.preprocessing == prepared


def test_the_processor_inside_a_processor_of_images_and_texts_is_read(tmp_path):
  inside = OPENAI_PROCESSOR | {'image_mean': [0.1, 0.2, 0.3], 'size': {'shortest_edge': 28}}
  folder = copied('hf_clip', tmp_path)
  (folder / 'preprocessor_config.json').write_text(json.dumps(OPENAI_PROCESSOR))
  text = json.dumps({'image_processor': inside | {'crop_size': 28}, 'processor_class': 'CLIP'})
  (folder / 'processor_config.json').write_text(text)
  found = vit_jax.load(folder).preprocessing
  assert (found.mean, found.size, found.stretch) == ((0.1, 0.2, 0.3), (28, 28), False)


# Damaged files and unsupported configs.

PREFIX = 'vision_model.'
LAYER = f'{PREFIX}encoder.layers.1.'
SHARED = [f'{LAYER}{name}' for name in ('self_attn.q_proj.weight', 'mlp.fc1.bias')] + [
  f'{PREFIX}post_layernorm.weight',
  f'{PREFIX}embeddings.position_embedding.weight',
]
ONLY = {
  'hf_clip': [f'{PREFIX}pre_layrnorm.bias', 'visual_projection.weight'],
  'hf_siglip': [f'{PREFIX}head.probe', f'{PREFIX}head.attention.in_proj_weight'],
}
CHANGES = {  # of an array
  'missing': lambda arrays, name: arrays.pop(name),
  'longer': lambda arrays, name: arrays.update({name: np.concatenate([arrays[name]] * 2)}),
  'not finite': lambda arrays, name: arrays.update({name: arrays[name] * np.nan}),
}
EXTRA = {
  'hf_clip': (f'{PREFIX}embeddings.patch_embedding.bias', f'{PREFIX}head.probe'),
  'hf_siglip': (f'{PREFIX}embeddings.class_embedding', 'visual_projection.weight'),
}
VISION = [  # changed fields of `vision_config`, with a part of the message
  (dict(hidden_size=48), 'expected'),
  (dict(num_hidden_layers=3), 'layers.2.*: missing'),
  (dict(num_hidden_layers='2'), 'unexpected value'),
  (dict(num_attention_heads=5), 'not divisible'),
  (dict(hidden_act='relu'), "hidden_act: unknown 'relu'"),
  (dict(image_size=21), '9 patches'),
  (dict(patch_size=14), 'patches'),
  (dict(patch_size=0), 'positive integers'),
  (dict(num_channels=1), 'expected'),
  (dict(num_channels=0), 'num_channels must be a positive integer, got 0'),
  (dict(num_channels='3'), "num_channels is '3', expected int"),
  (dict(layer_norm_eps='small'), 'unexpected value'),
  (dict(use_masks=True), 'unsupported fields: use_masks'),
  (dict(model_type='siglip2_vision_model'), 'expected model_type='),
]
CONFIG = {
  'hf_clip': [
    (dict(projection_dim=24), 'visual_projection.weight: has shape'),
    (dict(projection_dim='12'), "projection_dim is '12', expected int"),
    (dict(architectures=['CLIPForImageClassification']), 'architecture: unknown'),
    (dict(architectures=['CLIPVisionModel']), 'does not fit the architecture'),
    (dict(model_type='siglip'), 'does not fit the architecture'),
    (dict(use_masks=True), 'unsupported fields: use_masks'),
  ],
  'hf_siglip': [
    (dict(vision_config=dict(vision_use_head=False)), 'head.probe: not part of the model'),
    (dict(vision_config=dict(vision_use_head='no')), "vision_use_head is 'no', expected bool"),
    (dict(architectures=['SiglipForImageClassification']), 'architecture: unknown'),
    (dict(projection_dim=24), 'unsupported fields: projection_dim'),
    (dict(model_type='siglip2'), 'NaFlex models'),
    (dict(model_type='siglip3'), "model_type: unknown 'siglip3'"),
  ],
}


@pytest.mark.parametrize('name', FAMILIES)
def test_damaged_and_unsupported_towers_are_refused(name, tmp_path):
  cases = [
    (lambda arrays, array=array, change=change: change(arrays, array), {}, f'{array}|positions for')
    for array in SHARED + ONLY[name]
    for change in (CHANGES.values() if array in ONLY[name] else [*CHANGES.values()][:2])
  ]
  for array in EXTRA[name]:
    add = lambda arrays, array=array: arrays.update({array: np.zeros(3, np.float32)})
    cases.append((add, {}, f'{array}: not part of the model'))
  cases += [(lambda arrays: None, dict(vision_config=f), text) for f, text in VISION]
  cases += [(lambda arrays: None, fields, text) for fields, text in CONFIG[name]]
  assert len(cases) >= 30
  for i, (change, fields, message) in enumerate(cases):
    folder = copied(name, tmp_path / str(i), change, **fields)
    with pytest.raises(ValueError, match=message) as raised:
      vit_jax.load(folder)
    assert str(folder) in str(raised.value) or 'model.num_heads' in str(raised.value), message


def test_towers_that_hugging_face_cannot_hold_are_refused(tmp_path):
  for name, grid, fields, message in (
    ('hf_clip', (2, 4), {}, '14x28 pixels.*both must be square'),
    ('hf_clip', (4, 4), dict(qk_norm=True), 'model.qk_norm=True'),
    ('hf_siglip', (4, 4), dict(pool='gap'), "model.pool='gap': only 'map', 'none'"),
  ):
    loaded = vit_jax.load(DATA / name, grid=grid, features='pooled')
    model, preprocessing = loaded.model.clone(**fields), loaded.preprocessing
    with pytest.raises(ValueError, match='cannot hold this model:\n .*' + message):
      hf.save_hf(model, loaded.params, tmp_path, preprocessing, None, False)


# Other uses.


@pytest.fixture(scope='module', name='photos')
def photo_folder(tmp_path_factory):
  """An image folder with a test split of two of the three classes, in another order than NAMES."""
  top = tmp_path_factory.mktemp('photos')
  draw = np.random.RandomState(0)
  for split in ('train', 'test'):
    for label in ('a bird', 'cat'):
      for i in range(3):
        path = top / split / label / f'{split}_{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.randint(0, 256, (28, 28, 3), np.uint8)).save(path)
  return top


def features_of(name, files, kind):
  """Returns features of image files that have the model's size."""
  loaded = vit_jax.load(DATA / name, features=kind)
  p = loaded.preprocessing
  pixels = np.stack([np.asarray(Image.open(file)) for file in files]) / 255
  image_BHWC = ((pixels - p.mean) / p.std).astype(np.float32)
  return run_model(loaded.model, loaded.params, image_BHWC)


@pytest.mark.slow_after_first
@pytest.mark.parametrize('name', FAMILIES)
def test_features_of_files_are_the_embeddings(name, photos):
  files = sorted(photos.glob('test/*/*.png'))
  for kind, shape in (
    ('pooled', (6, 12 if name == 'hf_clip' else 24)),
    ('tokens', (6, 16 + (name == 'hf_clip'), 24)),
  ):
    found, _ = prediction.features(Request(None, str(DATA / name)), files, kind)
    assert found['feature'].shape == shape
    np.testing.assert_allclose(found['feature'], features_of(name, files, kind), atol=2e-5)


def tuning(name, photos, **overrides):
  """Returns the config of two steps of fine-tuning on the image folder."""
  config = config_lib.default_config()
  settings = {
      'init': str(DATA / name), 'data.source': f'folder:{photos}', 'data.image_size': '28',
      'epochs': '2', 'batch_size': '6', 'eval_batch_size': '6', 'eval_every': '0',
      'checkpoint_every': '0', 'optimizer.lr': '1e-3',
  }  # fmt: skip
  for key, text in (settings | overrides).items():
    config_lib.override(config, key, text)
  return config


@pytest.mark.slow
@pytest.mark.slow_after_first
@pytest.mark.parametrize('freeze', ['', 'backbone'])
@pytest.mark.parametrize('name', FAMILIES)
def test_towers_are_fine_tuned_probed_and_resized(name, freeze, photos, tmp_path):
  config = tuning(name, photos, freeze=freeze, **{'data.image_size': '28,42'})
  result = vit_jax.train(config, tmp_path / 'run')
  assert result['config']['model']['projection'] is None and result['examples'] == 6
  loaded = vit_jax.load(tmp_path / 'run')
  assert loaded.params['pos_embedding'].shape[1] == 24 + (name == 'hf_clip')
  own = vit_jax.load(DATA / name, grid=(4, 6), features='pooled')
  same = np.array_equal(
    own.params['block_0']['mlp']['up']['kernel'], loaded.params['block_0']['mlp']['up']['kernel']
  )
  assert same == bool(freeze)


@pytest.mark.slow
@pytest.mark.slow_after_first
@pytest.mark.parametrize('name', FAMILIES)
def test_towers_classify_by_few_shots_and_have_pictures(name, photos, tmp_path, capsys):
  source = f'--config.data.source=folder:{photos}'
  code, out, _ = call(
    capsys, '--mode=fewshot', f'--init={DATA / name}', source, '--classifier=knn',
    f'--out={tmp_path / "knn"}',
  )  # fmt: skip
  assert not code and 'Test accuracy' in out
  code, out, _ = call(
    capsys, '--mode=visualize', f'--init={DATA / name}', f'--images={photos / "test"}',
    f'--out={tmp_path / "look"}',
  )  # fmt: skip
  assert not code and (tmp_path / 'look' / 'report.html').is_file(), out


def test_exporting_a_whole_model_writes_its_image_tower(tmp_path):
  for name in FAMILIES:
    exporting.export(DATA / name, 'hf', tmp_path / name)
    before = load_file(DATA / name / 'model.safetensors')
    after = load_file(tmp_path / name / 'model.safetensors')
    kept = {key for key in before if key.startswith(('vision_model.', 'visual_projection.'))}
    assert after.keys() == kept
    assert all(np.array_equal(after[key], before[key]) for key in kept)
    text = (tmp_path / name / 'README.md').read_text()
    assert ('image_embeds' if name == 'hf_clip' else 'pooler_output') in text
