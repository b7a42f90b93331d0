"""Forward passes use as few micro-batches as fit into the memory of each device."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.conftest import small_config
from vit_jax import evaluation
from vit_jax.distributed import Fitted, concatenate, inference_mesh, replicate
from vit_jax.evaluation import make_inference_step, probabilities
from vit_jax.experiment import assemble
from vit_jax.limits import OutOfMemory
from vit_jax.training.state import init_params
from vit_jax.workdir import Task

pytestmark = pytest.mark.slow  # these tests train small models

WIDE = {'model.width': '32', 'model.mlp_dim': '512', 'data.image_size': '16'}


@pytest.fixture(scope='module')
def model():
  """Returns an experiment, its parameters on the devices, 64 images, and the mesh."""
  exp = assemble(small_config(**WIDE), Task(('a', 'b'), (16, 16), 3))
  mesh = inference_mesh(64)
  params = jax.jit(lambda: init_params(exp.model, exp.image_shape, 0))()
  images = np.random.RandomState(0).randint(0, 256, (64, 16, 16, 3)).astype(np.uint8)
  return exp, replicate(mesh, jax.device_get(params)), images, mesh


def limited(exp, mib):
  """Returns the experiment with a memory limit."""
  config = exp.config.copy_and_resolve_references()
  config.device_memory = mib / 1024
  return dataclasses.replace(exp, config=config)


def test_a_pass_with_less_memory_has_more_micro_batches_and_the_same_result(model):
  exp, params, images, mesh = model
  counts = {}
  results = {}
  for mib in (1000, 1.3):
    limited_exp = limited(exp, mib)

    def build(parts, mib=mib, exp=limited_exp):
      counts[mib] = parts
      return jax.jit(concatenate(probabilities(exp), mesh, parts))

    results[mib] = np.asarray(limited_exp.fitted(build, mesh)(images, params))
  assert counts[1.3] > counts[1000]
  np.testing.assert_allclose(results[1.3], results[1000], rtol=1e-5)
  plain = np.asarray(make_inference_step(exp, mesh, probabilities(exp))(images, params))
  np.testing.assert_allclose(results[1000], plain, rtol=1e-5)


def test_a_pass_is_compiled_once_for_each_batch_size(model):
  exp, params, images, mesh = model
  built = []
  build = lambda parts: built.append(parts) or jax.jit(concatenate(probabilities(exp), mesh, parts))
  step = limited(exp, 1000).fitted(build, mesh)
  for batch in (images, images, images[:32], images):
    assert step(batch, params).shape == (len(batch), 2)
  assert len(built) == 2


def test_a_model_that_does_not_fit_says_so(model):
  exp, params, images, mesh = model
  step = make_inference_step(limited(exp, 0.01), mesh, probabilities(exp))
  with pytest.raises(
    OutOfMemory, match='micro-batches, it needs .* the limit is .* Lower data.image_size'
  ):
    step(images, params)


def test_memory_that_other_arrays_hold_is_subtracted(model):
  exp, params, images, mesh = model
  build = lambda parts: jax.jit(concatenate(probabilities(exp), mesh, parts))
  limited(exp, 100).fitted(build, mesh)(images, params)
  with pytest.raises(OutOfMemory):
    limited(exp, 100).fitted(build, mesh, held=90 * 2**20)(images, params)


def test_a_pass_that_runs_out_of_memory_is_repeated_once_with_twice_the_micro_batches(model):
  exp, params, images, mesh = model
  tried = []

  class Failing(Fitted):
    def _fit(self, counts, *args):
      count, function = super()._fit(counts, *args)
      tried.append(count)
      if len(tried) > 1:
        return count, function

      def full(batch, params):
        raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory')

      return count, full

  build = lambda parts: jax.jit(concatenate(probabilities(exp), mesh, parts))
  step = Failing(build, mesh, lambda rows: 1, 100 * 2**20)
  assert step(images, params).shape == (64, 2)
  assert len(tried) == 2 and tried[1] >= 2 * tried[0]


def test_evaluation_and_prediction_obey_the_limit(trained):
  few = {'device_memory': '1e-5'}
  with pytest.raises(OutOfMemory, match='does not fit into memory'):
    evaluation.evaluate(trained[0], few)
  assert evaluation.evaluate(trained[0], {'device_memory': '1'}) == evaluation.evaluate(trained[0])
