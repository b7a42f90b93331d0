"""What visitors of a served page read about a model, without the demo's packages."""

import json
import shutil
import types

from vit_jax import opening
from vit_jax.inference.about import about, classes_text


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
