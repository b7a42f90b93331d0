"""Compares losses of distillation with PyTorch in float64, closed forms and exact properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import init_params, run_model
from vit_jax.model import POOLS, variants
from vit_jax.optim import distill

RANDOM = np.random.RandomState(0)
LOGITS, TEACHER = 3 * RANDOM.normal(size=(2, 6, 10)).astype(np.float32)


def softmax(x_BL):
  e_BL = np.exp(x_BL.astype(np.float64) - x_BL.max(1, keepdims=True))
  return e_BL / e_BL.sum(1, keepdims=True)


def gradient(loss):
  return np.asarray(jax.jit(jax.grad(lambda logits_BL: loss(logits_BL).sum()))(LOGITS))


@pytest.mark.slow
@pytest.mark.parametrize('temperature', [1.0, 3.0])
def test_losses_and_gradients_equal_pytorchs_in_float64(temperature):
  torch = pytest.importorskip('torch')
  functional = torch.nn.functional
  theirs = torch.tensor(LOGITS.astype(np.float64), requires_grad=True)
  teacher = torch.tensor(TEACHER.astype(np.float64))
  kl_BL = functional.kl_div(
    functional.log_softmax(theirs / temperature, 1),
    functional.log_softmax(teacher / temperature, 1),
    reduction='none',
    log_target=True,
  )
  wanted = {
    'soft': temperature**2 * kl_BL.sum(1),
    'hard': functional.cross_entropy(theirs, teacher.argmax(1), reduction='none'),
  }
  ours = {
    'soft': lambda x: distill.soft(x, TEACHER, temperature),
    'hard': lambda x: distill.hard(x, TEACHER),
  }
  assert ours.keys() == distill.DISTILLATIONS.keys()
  for kind, want in wanted.items():
    np.testing.assert_allclose(ours[kind](LOGITS), want.detach(), rtol=2e-5)
    (slope,) = torch.autograd.grad(want.sum(), theirs)
    np.testing.assert_allclose(gradient(ours[kind]), slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('temperature', [0.5, 1.0, 4.0])
def test_soft_targets_pull_by_the_difference_of_the_two_softmaxes(temperature):
  want = temperature * (softmax(LOGITS / temperature) - softmax(TEACHER / temperature))
  found = gradient(lambda x: distill.soft(x, TEACHER, temperature))
  np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def test_at_a_high_temperature_soft_targets_match_the_centred_logits():
  """Hinton et al. 2015, 1503.02531, equation 4, times T^2."""
  centred = lambda x_BL: x_BL - x_BL.mean(1, keepdims=True)
  found = gradient(lambda x: distill.soft(x, TEACHER, 300.0))
  want = (centred(LOGITS) - centred(TEACHER)) / LOGITS.shape[1]
  np.testing.assert_allclose(found, want, atol=0.02)
  assert abs(want).max() > 0.5


def test_a_student_that_agrees_has_no_loss_and_no_gradient():
  soft = lambda x: distill.soft(x, LOGITS + 7, 2.0)  # a softmax ignores the constant
  np.testing.assert_allclose(soft(LOGITS), 0, atol=1e-5)
  np.testing.assert_allclose(gradient(soft), 0, atol=1e-5)


def test_hard_targets_are_the_teachers_decision():
  want = -np.log(softmax(LOGITS)[np.arange(6), TEACHER.argmax(1)])
  np.testing.assert_allclose(distill.hard(LOGITS, TEACHER), want, rtol=1e-5)


def test_the_weight_is_the_share_of_the_teachers_loss():
  kind = lambda logits_BL, teacher_BL: jnp.full(6, 5.0)
  teacher = distill.Teacher(None, {}, None, kind, weight=0.3, cached=False, digest='')
  np.testing.assert_allclose(teacher.loss(np.full(6, 2.0), LOGITS, TEACHER), 0.7 * 2 + 0.3 * 5)


@pytest.mark.slow
def test_the_two_heads_average_to_the_head_of_the_model():
  model = variants.make('tiny', num_classes=10, pool='distilled', num_registers=1, depth=1)
  image_BHWC = jnp.asarray(RANDOM.normal(size=(3, 8, 8, 3)).astype(np.float32))
  params = init_params(model, image_BHWC)
  draw = lambda x: RANDOM.normal(size=x.shape).astype(np.float32)
  params = params | {'head': jax.tree.map(draw, params['head'])}
  feature_BD = run_model(model.clone(num_classes=None), params, image_BHWC)
  both = distill.split_head(feature_BD, params['head'])
  logits_BL = run_model(model, params, image_BHWC)
  np.testing.assert_allclose((both[0] + both[1]) / 2, logits_BL, atol=1e-5)
  first_BD = feature_BD.at[:, 48:].set(0)  # without the distillation token
  other = distill.split_head(first_BD, params['head'])
  np.testing.assert_array_equal(other[0], both[0])
  assert POOLS['distilled'].distills and abs(other[1] - both[1]).max() > 0.1
