"""Exact evaluation: each example counts exactly once, for any batch size and number of devices.

Padding at the end of the last batch is not counted.
"""

from collections.abc import Mapping
import pathlib

import jax
import numpy as np

from vit_jax import limits, opening, storage
from vit_jax.data import Split, identity
from vit_jax.distributed import check_same, inference_mesh, is_first, replicate, start_up
from vit_jax.evaluation.answers import (
  EvalStep,
  calibrate,
  log_calibration,
  make_eval_step,
  score_examples,
  trust,
)
from vit_jax.evaluation.data import (
  check_data_given,
  load_split,
  load_validation,
  open_test,
  request_for,
)
from vit_jax.evaluation.real import real_labels
from vit_jax.opening import Request
from vit_jax.workdir import save_calibration, write_json

# Prefixes of the config keys that change what the model computes from an image. If the user
# overrides such a key, the fitted calibration is not saved.
INPUT = (
  'model.', 'data.image_size', 'data.crop', 'data.stretch', 'data.interpolation', 'data.mean',
  'data.std', 'masked.',
)  # fmt: skip


def score_split(
  eval_step: EvalStep,
  params: dict,
  examples: Split,
  batch_size: int,
  mesh: jax.sharding.Mesh,
  **extra: np.ndarray,
) -> dict[str, float]:
  """Evaluates a split: returns a dict with mean loss, accuracies and number of examples.

  If images can have several labels, the dict also has the mean average precision and the mean F1.
  If the model has no classes, the dict has no accuracies. The methods `means` of `Scores`,
  `Labelled` and `Losses` describe the keys. `answer_split` describes the arguments.
  """
  return score_examples(eval_step, params, examples, batch_size, mesh, **extra).means()


def evaluate(
  workdir: str | pathlib.Path | None,
  overrides: Mapping[str, object] | None = None,
  *,
  init: str | pathlib.Path = '',
  step: str | int = '',
  classes: str | pathlib.Path | None = None,
  max_patches: int | None = None,
) -> dict[str, object]:
  """Evaluates a model on the split that `data.eval_split` names.

      vit_jax.evaluate('runs/digits', step='last')['accuracy']
      data = {'data.source': 'folder:imagenet'}
      vit_jax.evaluate(None, data, init='google/vit-base-patch16-224')['accuracy']

  The result for a workdir is also written to `eval.json` in the workdir.

  Args:
    workdir: folder of a training run; None if `init` is given.
    overrides: dotted config keys and their values, e.g. `{'eval_batch_size': 64}`. With `init`,
      they must set `data.source`.
    init: published weights, if there is no workdir: anything that `vit_jax.load` reads.
    step: checkpoint to evaluate: `best`, `last` or a number. The default is the checkpoint with the
      best validation accuracy, or the last one if no checkpoint has a validation accuracy.
    classes: npz file with text embeddings of the classes, for weights of CLIP or SigLIP in `init`.
      `optim/zero_shot.py` describes the file.
    max_patches: maximum number of patches of an image; each image then keeps its aspect ratio.
      None: all images are resized to `data.image_size`.

  Returns:
    A dict with `loss`, `examples` (the number of test images) and, if the model has classes,
    `accuracy` and further measures. `evaluate_checkpoint` describes all keys.

  Raises:
    ValueError: the weights do not exist, or the dataset or the overrides do not fit the weights. Or
      both `workdir` and `init` are given, or neither is.
  """
  request = request_for(workdir, init, step, overrides, classes, max_patches)
  start_up()
  return evaluate_checkpoint(request)


@limits.memory_for('Evaluation')
def evaluate_checkpoint(request: Request) -> dict[str, object]:
  """Evaluates the model that a request names, and writes the result to `eval.json` of its workdir.

  If the checkpoint has no calibration (temperature or thresholds), a calibration is first fitted on
  the validation split of the run. If the request sets `max_patches`, nothing is fitted. The fitted
  calibration is saved, unless the request overrides a key that changes what the model computes from
  an image (`INPUT`).

  Published weights have no workdir, so nothing is fitted or written for them. If the workdir cannot
  be written, a warning is logged.

  Returns:
    A dict with `step` (step number of the checkpoint; None for published weights), `source` (the
    dataset) and `split` (the test split), the values of `score_split`, and the measures of `trust`.
    For a model without classes, the loss is the only measure. The dict has these keys only if they
    apply:
    `left_out`: number of test images that are not scored, because the weights were trained on them.
    `max_patches`: the value in the request.
    `overrides`: the overridden config keys that begin with an entry of `INPUT`, and their values.
  """
  check_data_given(request)
  # For zero-shot weights, a head is built from text embeddings of the dataset's classes.
  classes = 'data' if request.zero_shot else 'any' if request.workdir else 'weights'
  exp, params, loaded = opening.open_model(request, classes)
  batch_size = exp.config.eval_batch_size
  mesh = inference_mesh(batch_size)
  params, eval_step = replicate(mesh, params), make_eval_step(exp, mesh)
  calibration = exp.calibration
  changed = {key: text for key, text in request.overrides.items() if key.startswith(INPUT)}
  val = None
  if request.workdir and exp.objective.labels and not calibration.examples and not exp.pack:
    val = load_validation(exp, request.workdir, loaded)
  if val is not None:
    check_same('data', {'val': len(val)})
    calibration = calibrate(eval_step, params, val, batch_size, mesh)
    log_calibration(loaded, calibration)
    if not changed:
      with storage.tolerated():
        save_calibration(request.workdir, loaded, calibration)
  source, left_out = open_test(exp)
  split = exp.config.data.eval_split
  examples = load_split(exp, split, source)
  check_same('data', identity(source, {split: examples}))
  extra = real_labels(exp, split, source, len(examples))
  scores = score_examples(eval_step, params, examples, batch_size, mesh, calibration, **extra)
  result = {'step': loaded, 'source': exp.config.data.source, 'split': split} | scores.means()
  result |= {'left_out': left_out} if left_out else {}
  result |= {'max_patches': exp.pack.most} if exp.pack else {}
  result |= {'overrides': changed} if changed else {}
  result |= trust(scores, source.class_names, calibration)
  if request.workdir and is_first():
    with storage.tolerated():
      write_json(request.workdir / 'eval.json', result)
  return result
