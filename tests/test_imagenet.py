"""The recipes of ImageNet against the numbers that were published."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import imagenet
from vit_jax import config as config_lib
from vit_jax import experiment, sources
from vit_jax.check import check

TRAIN = {'imagenet2012': 1_268_355, 'imagenet21k': 14_058_000}  # images in 99% of each

# Epochs, batch, learning rate, decay, dropout, clip, schedule; steps that follow from them.
PAPERS = {
  's16,plain': (90, 1024, 1e-3, 0.1, 0.0, 1.0, 'cosine', 111_477),
  'b16,paper': (300, 4096, 3e-3, 0.3, 0.1, 1.0, 'cosine', 92_897),
  'l16,i21k': (90, 4096, 1e-3, 0.03, 0.1, 0.0, 'linear', 308_892),
  'b16,medium2': (300, 4096, 1e-3, 0.1, 0.0, 1.0, 'cosine', 92_897),
}


@pytest.mark.parametrize('variant', PAPERS)
def test_a_recipe_is_the_papers(variant):
  config = imagenet.get_config(variant)
  epochs, batch, rate, decay, dropout, clip, schedule, steps = PAPERS[variant]
  optimizer, model = config.optimizer, config.model
  assert (config.epochs, config.batch_size, config.schedule.name) == (epochs, batch, schedule)
  assert (optimizer.name, optimizer.b1, optimizer.b2) == ('adamw', 0.9, 0.999)
  assert (optimizer.lr, optimizer.weight_decay, optimizer.clip) == (rate, decay, clip)
  assert (model.dropout, model.stochastic_depth, model.attention_dropout) == (dropout, 0, 0)
  assert config.augment.resized_crop.min_area == 0.05 and config.augment.flip.probability == 0.5
  assert tuple(config.data.image_size) == (224, 224) and round(224 / config.data.crop) == 256
  examples = TRAIN['imagenet21k' if 'i21k' in variant else 'imagenet2012']
  assert experiment.length(config, examples) == (steps, 10_000)


# (mixup p, RandAugment (n, m)), AugReg, Section 3; that of `plain` is its light2.
AUGREG = {
  'light1': (0, (2, 0)), 'light2': (0.2, (2, 10)), 'medium1': (0.2, (2, 15)),
  'medium2': (0.5, (2, 15)), 'strong1': (0.5, (2, 20)), 'strong2': (0.8, (2, 20)),
  'plain': (0.2, (2, 10)),
}  # fmt: skip


@pytest.mark.parametrize('name', AUGREG)
def test_augmentation_is_that_of_augreg(name):
  config = imagenet.get_config(f's16,{name}')
  check(config)
  drawn, mix = config.augment.rand_augment, config.augment.mix
  mixup, (layers, magnitude) = AUGREG[name]
  assert (drawn.num_layers, drawn.magnitude, drawn.space) == (layers, magnitude, 'big_vision')
  assert (drawn.probability, drawn.mstd) == (1, 0)
  assert mix.probability == bool(mixup) and (mix.mixup_alpha, mix.cutmix_alpha)[:2] == (
    mixup or 0.8,
    0 if mixup else 1,
  )


@pytest.mark.parametrize('spec, min_area', [
    ('imagenet.py:s16', 0.05), ('imagenet.py:b16,strong2', 0.05),
    ('finetune.py:b16,imagenet2012', 0.05), ('linear_probe.py:b16,imagenet2012', None),
])  # fmt: skip
def test_imagenet_is_streamed_and_cropped_from_its_files(spec, min_area):
  config = config_lib.load_file(f'configs/{spec}')
  source = sources.Source({'train': 1_281_167}, ('a', 'b'), 3, None)
  config = experiment.decide_cache(config, source, 'train', (224, 224))
  split = experiment.open_split(config, source, 'train', (224, 224), None, to_train=True)
  assert len(split) == 1_281_167 and split.size == (224, 224)
  assert (split.crop or {}).get('min_area') == min_area


def test_weight_decay_is_that_of_big_vision():
  """It takes `wd` of the weights a step, scaled by the schedule but not by the rate: 1e-4."""
  recipe = experiment.recipe(imagenet.get_config('s16'), TRAIN['imagenet2012'])
  params = {'head': {'kernel': jnp.full((2, 3), 2.0), 'bias': jnp.full(3, 2.0)}}
  optimizer = recipe['optimizer']
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zeros, optimizer.init(params), params)
  first = 1 / 10_000  # of the schedule
  np.testing.assert_allclose(updates['head']['kernel'], -1e-4 * first * 2.0, rtol=1e-5)
  np.testing.assert_array_equal(updates['head']['bias'], 0)


@pytest.mark.parametrize('variant, message', [
    ('s15', 'model'), ('tiny', 'model'), ('s16,medium', 'medium1'), ('s16,plain,adamw', 'recipe'),
])  # fmt: skip
def test_what_is_no_recipe_is_said(variant, message):
  with pytest.raises(ValueError, match=message):
    imagenet.get_config(variant)
