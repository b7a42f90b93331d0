"""What visitors of a served page read about a model, without the demo's packages."""

import json
import shutil

from vit_jax import opening
from vit_jax.inference.about import about


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
