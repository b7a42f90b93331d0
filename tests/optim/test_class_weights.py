"""Compares weights of classes with scikit-learn, and weighted losses with PyTorch and float64."""

import functools
import types

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from vit_jax.optim import class_weights, losses, objectives

NAMES = ('ant', 'cat, big', 'dog')
DRAW = np.random.RandomState(0)
LOGITS = (DRAW.normal(size=(8, 3)) * 3).astype(np.float32)
LABEL = np.array([0, 0, 0, 1, 1, 2, 0, 0])
HOT = DRAW.randint(0, 2, (8, 3)).astype(np.uint8)
WEIGHT = np.array([0.5, 1.25, 2.0], np.float32)


def test_balanced_weights_equal_scikit_learns():
  label = DRAW.choice(3, 500, p=(0.7, 0.25, 0.05))
  want = compute_class_weight('balanced', classes=np.arange(3), y=label)
  found = class_weights.class_weights('balanced', np.bincount(label), NAMES)
  np.testing.assert_allclose(found, want, rtol=1e-6)


def test_weights_have_the_mean_1_over_all_labels():
  count_L = np.array([70, 25, 5])
  for text in ('balanced', 'dog=9', 'ant=2,cat, big=3,dog=0.1'):
    weight_L = class_weights.class_weights(text, count_L, NAMES)
    np.testing.assert_allclose(weight_L @ count_L / 100, 1, rtol=1e-6)
  doubled = class_weights.class_weights('ant=2,cat, big=2,dog=8', count_L, NAMES)
  np.testing.assert_allclose(doubled, class_weights.class_weights('dog=4', count_L, NAMES))


def test_a_class_without_images_does_not_change_the_others():
  with_empty = class_weights.class_weights('balanced', np.array([70, 0, 5]), NAMES)
  without = class_weights.class_weights('balanced', np.array([70, 5]), NAMES[::2])
  np.testing.assert_allclose(with_empty[[0, 2]], without)


@pytest.mark.parametrize('text, message', [
    ('balance', "'balance': expected \"none\", \"balanced\", or positive weights"),
    ('cow=2', "class: unknown 'cow'"), ('dog=-1', 'positive'), ('dog=x', 'positive'),
    ('dog=2,ant', 'positive'), ('', 'positive'), ('dog=nan', 'positive'), ('dog=inf', 'positive'),
])  # fmt: skip
def test_bad_weights_are_refused(text, message):
  with pytest.raises(ValueError, match=message):
    class_weights.class_weights(text, np.array([1, 1, 1]), NAMES)


@pytest.mark.slow
def test_a_weighted_loss_multiplies_each_image_by_the_weight_of_its_class():
  for name in ('softmax', 'sigmoid'):
    loss = losses.LOSSES[name]
    found = class_weights.weighted(loss, WEIGHT)(jnp.asarray(LOGITS), jnp.asarray(LABEL))
    plain = loss(jnp.asarray(LOGITS), jnp.asarray(LABEL))
    np.testing.assert_allclose(found, WEIGHT[LABEL] * plain, rtol=1e-6)
  assert class_weights.weighted(losses.softmax, None) is losses.softmax


def test_both_labels_of_a_mixed_image_have_the_weight_of_their_class():
  own_B = np.linspace(0, 1, 8).astype(np.float32)
  exp = types.SimpleNamespace(loss=losses.softmax, weight_L=WEIGHT, mixes=True)
  found = objectives.label_loss(exp, jnp.asarray(LOGITS), {'label': LABEL, 'own': own_B})
  z = LOGITS.astype(np.float64)
  loss_BL = WEIGHT * (np.log(np.exp(z).sum(1, keepdims=True)) - z)
  other = LABEL.reshape(-1, 2)[:, ::-1].ravel()  # neighbours are mixed in pairs
  rows = np.arange(8)
  want = own_B * loss_BL[rows, LABEL] + (1 - own_B) * loss_BL[rows, other]
  np.testing.assert_allclose(found, want, rtol=1e-5)


@pytest.mark.parametrize('smoothing', [0.0, 0.2])
def test_weighted_positive_labels_equal_float64(smoothing):
  loss = functools.partial(losses.sigmoid, label_smoothing=smoothing)
  found = class_weights.weighted(loss, WEIGHT)(jnp.asarray(LOGITS), jnp.asarray(HOT))
  p = 1 / (1 + np.exp(-LOGITS.astype(np.float64)))
  target = (1 - smoothing) * HOT + smoothing * HOT.sum(1, keepdims=True) / 3
  weight_BL = np.where(HOT, WEIGHT, 1)  # a smoothed target of a class that the image lacks has none
  want = -(weight_BL * target * np.log(p) + (1 - target) * np.log(1 - p)).sum(1)
  np.testing.assert_allclose(found, want, rtol=1e-5)
  unweighted = loss(jnp.asarray(LOGITS), jnp.asarray(HOT))
  np.testing.assert_allclose(
    unweighted,
    class_weights.weighted(loss, np.ones(3))(jnp.asarray(LOGITS), jnp.asarray(HOT)),
    1e-6,
  )


def test_one_hot_labels_have_the_loss_of_their_number():
  loss = functools.partial(losses.sigmoid, label_smoothing=0.1)
  hot = np.eye(3, dtype=np.uint8)[LABEL]
  ours, theirs = (loss(jnp.asarray(LOGITS), jnp.asarray(label)) for label in (hot, LABEL))
  np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_the_loss_of_mixed_targets_is_the_mean_of_the_losses():
  """Training mixes the losses of both images; with a binary cross-entropy, both are equal."""
  loss, share = losses.sigmoid, 0.3
  other = HOT[::-1]
  mixed = share * HOT + (1 - share) * other
  ours = share * loss(jnp.asarray(LOGITS), jnp.asarray(HOT)) + (1 - share) * loss(
    jnp.asarray(LOGITS), jnp.asarray(other)
  )
  np.testing.assert_allclose(ours, loss(jnp.asarray(LOGITS), jnp.asarray(mixed)), rtol=1e-5)


def test_weighted_losses_equal_pytorchs():
  torch = pytest.importorskip('torch')
  functional, weight = torch.nn.functional, torch.tensor(WEIGHT)
  want = functional.cross_entropy(
    torch.tensor(LOGITS), torch.tensor(LABEL), weight=weight, reduction='none'
  )
  run = lambda loss, label: class_weights.weighted(loss, WEIGHT)(jnp.asarray(LOGITS), label)
  np.testing.assert_allclose(run(losses.softmax, jnp.asarray(LABEL)), want, rtol=1e-5)
  want = functional.binary_cross_entropy_with_logits(
    torch.tensor(LOGITS), torch.tensor(HOT).float(), pos_weight=weight, reduction='none'
  )
  np.testing.assert_allclose(run(losses.sigmoid, jnp.asarray(HOT)), want.sum(1), rtol=1e-5)


def test_the_mean_over_the_training_split_equals_pytorchs_weighted_mean():
  torch = pytest.importorskip('torch')
  raw = {'ant': 3.0, 'cat, big': 1.0, 'dog': 7.0}
  text = ','.join(f'{name}={value}' for name, value in raw.items())
  weight_L = class_weights.class_weights(text, np.bincount(LABEL), NAMES)
  found = class_weights.weighted(losses.softmax, weight_L)(jnp.asarray(LOGITS), jnp.asarray(LABEL))
  want = torch.nn.functional.cross_entropy(
    torch.tensor(LOGITS), torch.tensor(LABEL), weight=torch.tensor(list(raw.values()))
  )
  np.testing.assert_allclose(found.mean(), want, rtol=1e-5)


def test_only_some_losses_accept_several_labels():
  assert losses.choose_loss('sigmoid', several=True) is losses.sigmoid
  assert losses.choose_loss('softmax', several=False) is losses.softmax
  with pytest.raises(ValueError, match='loss.name=softmax expects one label.*loss.name to sigmoid'):
    losses.choose_loss('softmax', several=True)


def test_evaluation_ignores_the_weights_of_the_classes():
  exp = types.SimpleNamespace(
    logits=lambda params, batch: jnp.asarray(LOGITS), loss=losses.softmax, weight_L=WEIGHT
  )
  found = objectives.classified(exp, {}, {'label': jnp.asarray(LABEL)})
  z = LOGITS.astype(np.float64)
  want = np.log(np.exp(z).sum(1)) - z[np.arange(8), LABEL]
  np.testing.assert_allclose(found['loss'], want, rtol=1e-5)
  np.testing.assert_array_equal(found['logits'], LOGITS)
