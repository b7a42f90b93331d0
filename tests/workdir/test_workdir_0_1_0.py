"""Checks that a digits workdir of version 0.1.0 (commit 715197c) loads, scores and resumes.

Its run was killed at step 710 of 718, after the checkpoint of step 700. `workdir_0_1_0.npz` holds
8 test images, the logits of 0.1.0 for them, and the final weights after 0.1.0 resumed the run.
"""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from tests.conftest import DATA, run_model, small_config
import vit_jax
from vit_jax import cli, opening
from vit_jax.experiment import Experiment
from vit_jax.training import resume, trainer
from vit_jax.workdir import stored


@pytest.fixture
def workdir(tmp_path):
  return shutil.copytree(DATA / 'workdir_0_1_0', tmp_path / 'run')


@pytest.fixture(scope='module')
def reference():
  return dict(np.load(DATA / 'workdir_0_1_0.npz'))


def test_weights_give_the_logits_of_0_1_0(workdir, reference):
  exp, params, step = opening.from_workdir(workdir)
  assert step == 700
  logits_BL = jax.jit(exp.logits)(params, {'image': reference['image']})
  np.testing.assert_allclose(logits_BL, reference['logits'], rtol=1e-4, atol=1e-5)
  model, params = vit_jax.load(workdir)
  assert run_model(model, params, np.zeros((1, 8, 8, 1))).shape == (1, 10)


@pytest.mark.slow
def test_old_workdir_can_be_evaluated(workdir, capsys):
  assert not cli.main(['--mode=eval', f'--workdir={workdir}'])
  assert capsys.readouterr().out.startswith('step 700, loss 1.5287')


@pytest.mark.slow
def test_old_workdir_resumes_to_the_final_weights_of_0_1_0(workdir, reference):
  result = trainer.train(resume.saved_config(workdir, {}), workdir)
  assert result['steps'] == 718
  for path, leaf in jax.tree_util.tree_leaves_with_path(stored.load_checkpoint(workdir)[1]):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    np.testing.assert_allclose(leaf, reference[f'resumed/{name}'], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(('key', 'value'), [('optimizer.name', 'muon'), ('data.crop', '0.9')])
def test_a_run_of_0_1_0_that_depends_on_an_old_rule_is_not_resumed(
  tmp_path, monkeypatch, key, value
):
  saved = Experiment.saved
  config = small_config(**{key: value, 'epochs': '0.5', 'data.cache': 'memory'})
  with monkeypatch.context() as patch:
    unversioned = lambda exp: {k: v for k, v in saved(exp).items() if k != 'version'}
    patch.setattr(Experiment, 'saved', unversioned)
    trainer.train(config, tmp_path)
  assert trainer.train(config, tmp_path)['steps'] == 16  # it had finished, so nothing is trained
  config.epochs = 1.0
  with pytest.raises(ValueError, match=r'0\.1\.0, in which (Muon|data\.crop) .* --config\.init='):
    trainer.train(config, tmp_path)


def test_a_run_of_0_1_0_that_enlarged_its_images_differently_is_not_resumed(workdir):
  exp = opening.from_workdir(workdir)[0]
  resume.check_same_data(exp, workdir)
  enlarged = dataclasses.replace(exp, task=dataclasses.replace(exp.task, stored_size=(9, 9)))
  with pytest.raises(ValueError, match=r'0\.1\.0, in which small images .* --config\.init='):
    resume.check_same_data(enlarged, workdir)
