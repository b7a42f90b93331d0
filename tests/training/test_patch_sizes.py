"""Tests training with a random patch size in each step (FlexiViT)."""

import collections
import itertools

import jax
import numpy as np
import pytest

from tests.conftest import assert_equal, check_resumes_exactly, small_config
from vit_jax import experiment, opening
from vit_jax.data import train_batches
from vit_jax.distributed import batch_sharding
from vit_jax.evaluation import exact
from vit_jax.inference import cost, summary
from vit_jax.training import loop, step, trainer
from vit_jax.training.state import init_state
from vit_jax.workdir import stored, writer

FLEXIBLE = {'patch_sizes': '2,4,8', 'data.train_split': 'train[:512]', 'batch_size': '16'}
FLEXIBLE |= {'data.eval_split': 'test[:32]', 'eval_every': '0'}


def test_draws_depend_on_seed_and_step_alone_and_are_uniform():
  sizes = ((2, 2), (4, 4), (8, 8))
  drawn = [loop.draw_patch(sizes, 7, step) for step in range(1, 3001)]
  counts = collections.Counter(drawn)
  assert set(counts) == set(sizes) and all(abs(n - 1000) < 100 for n in counts.values())
  assert drawn[1234] == loop.draw_patch(sizes, 7, 1235)
  assert drawn != [loop.draw_patch(sizes, 8, step) for step in range(1, 3001)]
  pairs = collections.Counter(itertools.pairwise(drawn))  # neighbouring steps are independent
  assert all(abs(n - 333) < 70 for n in pairs.values())


def test_a_run_draws_patch_sizes_with_its_seed():
  exp, training = opening.from_config(small_config(seed='7', **FLEXIBLE))
  run = loop.Run(exp, training, None, None, None, None, {})
  drawn = [loop.draw_patch(exp.patch_sizes, 7, step) for step in range(1, 33)]
  assert [run.sizes_of(step) for step in range(1, 33)] == [((8, 8), patch) for patch in drawn]


@pytest.fixture(scope='module')
def flexible(tmp_path_factory):
  """A run with three patch sizes: (workdir, patch size of each compiled step)."""
  workdir, compiled = tmp_path_factory.mktemp('flexible'), []
  real = loop.compile_step

  def compiles(exp, *args):
    compiled.append(exp.model.patch_size)
    return real(exp, *args)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, 'compile_step', compiles)
    trainer.train(small_config(**FLEXIBLE), workdir)
  return workdir, compiled


@pytest.mark.slow
def test_a_run_learns_at_every_patch_size_with_one_set_of_weights(flexible):
  workdir, compiled = flexible
  assert compiled == [(2, 2), (4, 4), (8, 8)]  # once each, the longest sequence first
  _, params, _ = stored.load_checkpoint(workdir)
  assert params['embedding']['kernel'].shape[:2] == (4, 4)
  assert params['pos_embedding'].shape == (1, 4, 16)
  for size in ('2', '4', '8'):
    found = exact.evaluate(workdir, {'model.patch_size': size, 'data.eval_split': 'test'})
    assert found['accuracy'] > 0.2  # of 256 images; chance: 0.1
  asked = {'model.patch_size': '4'}
  assert exact.evaluate(workdir) | {'overrides': asked} == exact.evaluate(workdir, asked)
  with pytest.raises(ValueError, match='does not divide into patches of 3x3'):
    exact.evaluate(workdir, {'model.patch_size': '3'})


@pytest.mark.long
def test_a_killed_run_resumes_bit_for_bit(tmp_path):
  (tmp_path / 'unused').mkdir()
  settings = {'patch_sizes': '2,8', 'micro_batches': '2', 'ema': '0.9', 'eval_every': '0'}
  check_resumes_exactly(settings, tmp_path / 'unused', tmp_path)


def prepared(**overrides):
  exp, training = opening.from_config(small_config(**FLEXIBLE | overrides))
  mesh = experiment.mesh_for(exp.config)
  return exp, training, mesh


@pytest.mark.slow
@pytest.mark.parametrize('patch', [(2, 2), (8, 8)])
def test_micro_batches_do_not_change_a_step_at_another_patch_size(patch):
  exp, training, mesh = prepared(**{'model.stochastic_depth': '0'})
  batch = next(train_batches(training.train, 16, 0, 0, batch_sharding(mesh)))
  found = []
  for parts in (1, 4):
    exp.config.micro_batches = parts
    function = step.make_train_step(exp.at(patch_size=patch), training, mesh)
    found.append(function(init_state(exp, training, mesh), dict(batch)))
  (one, first), (other, second) = found
  assert float(first['grad_norm']) == pytest.approx(float(second['grad_norm']), rel=1e-4)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), one.params, other.params)


@pytest.mark.slow
def test_a_step_at_the_own_patch_size_is_the_step_of_an_ordinary_run():
  exp, training, mesh = prepared()
  ordinary, *_ = prepared(patch_sizes='()')
  assert exp.at(patch_size=4) is exp
  batch = next(train_batches(training.train, 16, 0, 0, batch_sharding(mesh)))
  states = [
    step.make_train_step(e, training, mesh)(init_state(e, training, mesh), dict(batch))[0]
    for e in (exp, ordinary)
  ]
  assert_equal(states[0].params, states[1].params)


def fixed(patch_size):
  """Returns the experiment with one patch size."""
  exp, *_ = summary.summary_of_config(small_config(**FLEXIBLE | {'patch_sizes': '()'}))
  return exp.at(patch_size=patch_size)


@pytest.mark.slow
def test_inspect_reports_the_mean_compute_and_the_largest_activations():
  exp, *_ = summary.summary_of_config(small_config(**FLEXIBLE))
  found = cost.measure(exp, 512)
  each = [cost.measure(fixed(n), 512) for n in (2, 4, 8)]
  assert found.train_flops == sum(one.train_flops for one in each) // 3
  assert found.run_flops == 16 * 32 * found.train_flops
  assert found.parts[-1].activations_mib == each[0].parts[-1].activations_mib
  assert found.parts[-1].gflops == each[1].parts[-1].gflops  # the forward pass of an evaluation
  assert 'draws one of the patch sizes 2x2, 4x4, 8x8' in cost.as_text(found)


@pytest.mark.slow
def test_logged_flops_are_those_of_the_drawn_sizes(flexible):
  """Speed times FLOPs per image, as the log gives it; the sizes of steps 1 to 8 are known."""
  workdir, _ = flexible
  lines = [line for line in writer.read_metrics(workdir) if line['split'] == 'train']
  exp, *_ = summary.summary_of_config(small_config(**FLEXIBLE))
  flops = {p: cost.measure(fixed(p), 512).train_flops for p in exp.patch_sizes}
  for line in lines:
    steps = range(line['step'] - 7, line['step'] + 1)
    mean = np.mean([flops[loop.draw_patch(exp.patch_sizes, 0, step)] for step in steps])
    found = line['tflops_per_device'] * 2 * 1e12 / line['images_per_second']  # two devices
    assert found == pytest.approx(mean, rel=0.01)


@pytest.mark.parametrize('overrides, message', [
    ({'patch_sizes': '2,2'}, 'expected positive integers .*, each only once'),
    ({'patch_sizes': '2,0'}, 'expected positive integers .*, each only once'),
    ({'patch_sizes': '2.5'}, 'expected positive integers .*, each only once'),
    ({'patch_sizes': '2,3'}, 'images of 8x8 pixels do not divide into patches of 3x3'),
    ({'patch_sizes': '8', 'progressive.sizes': '4', 'progressive.until': '0.5'}, 'images of 4x4'),
    ({'patch_sizes': '2', 'freeze': 'backbone'}, 'cannot be combined with freeze=backbone'),
    ({'patch_sizes': '32', 'data.image_size': '32', 'model.resnet': '1', 'model.patch_size': '4'},
     'patches of a hybrid model'),
    ({'patch_sizes': '2', 'objective': 'masked'}, 'the decoder predicts patches of one size'),
])  # fmt: skip
def test_patch_sizes_that_no_step_can_use_are_refused(overrides, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    trainer.train(small_config(**overrides), tmp_path / 'run')
