"""What visitors of a served page read about a model, without the demo's packages."""

import dataclasses
import json
import shutil
import types

import pytest

from vit_jax import opening
from vit_jax.inference.about import about, classes_text
from vit_jax.workdir import Calibration


def test_many_classes_are_counted_and_the_first_ones_named():
  names = tuple(f'c{i}' for i in range(1234))
  task = types.SimpleNamespace(class_names=names, multi_label=False)
  text = classes_text(types.SimpleNamespace(task=task))
  assert text.startswith('The model knows 1,234 classes: c0, c1, ')
  assert ', c29 and 1,204 more. An image of anything else still gets one' in text
  task = types.SimpleNamespace(class_names=names[:30], multi_label=True)
  text = classes_text(types.SimpleNamespace(task=task))
  assert ', c29. An image of anything else can still get some of these labels.' in text


def test_only_an_accuracy_on_the_data_of_the_model_is_stated(trained, tmp_path):
  workdir = shutil.copytree(trained[0], tmp_path / 'run')
  exp, _, step = opening.from_workdir(workdir)
  scores = {'step': step, 'split': 'test', 'examples': 9, 'accuracy': 0.5}
  scores |= {'accuracy_interval': [0.4, 0.6], 'source': exp.config.data.source}
  others = {'source': 'folder:other'}, {'step': step - 1}, {'overrides': {'data.crop': '0.5'}}
  stated = []
  for changed in ({}, *others):
    (workdir / 'eval.json').write_text(json.dumps(scores | changed))
    stated.append(not about(exp, step, workdir)['Accuracy'].startswith('Not measured'))
  assert stated == [True, False, False, False]


@pytest.mark.parametrize('overrides, measured, stated', [
    ({'data.image_size': '16'}, {}, False), ({'model.patch_size': '2'}, {}, False),
    ({'data.image_size': '16'}, {'data.image_size': '16'}, True),
    ({'data.image_size': '16'}, {'data.image_size': 16}, True),
    ({'data.image_size': '16'}, {'data.image_size': '32'}, False),
    ({'eval_batch_size': '8'}, {}, True), ({}, {'data.image_size': '16'}, False),
])  # fmt: skip
def test_only_an_accuracy_with_the_overrides_of_the_page_is_stated(
  trained, tmp_path, overrides, measured, stated
):
  workdir = shutil.copytree(trained[0], tmp_path / 'run')
  exp, _, step = opening.from_workdir(workdir)
  scores = {'step': step, 'split': 'test', 'examples': 9, 'accuracy': 0.5}
  scores |= {'accuracy_interval': [0.4, 0.6], 'source': exp.config.data.source}
  scores |= {'overrides': measured} if measured else {}
  (workdir / 'eval.json').write_text(json.dumps(scores))
  found = about(exp, step, workdir, overrides)['Accuracy']
  assert found.startswith('Not measured') != stated


@pytest.mark.parametrize('several', [False, True])
def test_a_calibration_without_the_overrides_of_the_page_is_no_calibration(trained, several):
  exp = opening.from_workdir(trained[0])[0]
  fitted = Calibration(2.0, (0.3,) * 10 if several else None, examples=9)
  task = dataclasses.replace(exp.task, multi_label=several)
  exp = dataclasses.replace(exp, calibration=fitted, task=task)
  said = 'without the config overrides of this page'
  assert said in about(exp, 1, None, {'data.image_size': '16'})['Probabilities']
  assert said not in about(exp, 1, None, {'eval_batch_size': '8'})['Probabilities']
  if not several:
    text = about(exp, 1, None, {'data.image_size': '16'})['Probabilities']
    assert text.startswith('Not calibrated: the temperature 2 was fitted')
