"""Measures few-shot accuracy: how well a classifier works with few training images per class.

The classifier is fitted to features of the frozen backbone. It is one of `CLASSIFIERS`: the
closed-form regression of the ViT paper (Section 4.1), or k-NN. The number of shots is the number of
training images per class.

Decisions:
  * The training images for a small number of shots are also used for every larger number of shots.
  * Only the drawn training images and the test split are decoded and turned into features. So the
    training split is streamed, whatever `data.cache` says.
"""

import dataclasses
import functools
import logging

import numpy as np

from vit_jax import opening, storage
from vit_jax.data import Features, Split, open_split, overlap, report_split
from vit_jax.distributed import inference_mesh, replicate
from vit_jax.evaluation import data, features
from vit_jax.experiment import Experiment
from vit_jax.names import choose
from vit_jax.opening import Request
from vit_jax.optim import CLASSIFIERS, L2
from vit_jax.workdir import write_json

log = logging.getLogger(__name__)

SHOTS = (1, 5, 10, 25)  # numbers of training images per class
SEEDS = (0, 1, 2)  # random seeds; the training images are drawn once with each seed
PART = 2000  # maximum number of training images in memory at a time


def draw_shots(
  label_N: np.ndarray, class_names: tuple[str, ...], shots: int, seed: int
) -> np.ndarray:
  """Draws `shots` random images of each class; returns their indices, int `[L, shots]`.

  No image is drawn twice. With the same seed, the result for fewer shots is equal to the first
  columns of the result for more shots.

  Args:
    label_N: class of each image; -1 for an image that must not be drawn.
    class_names: names of the L classes, for messages.
    shots: number of images per class.
    seed: random seed.

  Raises:
    ValueError: a class has fewer than `shots` images.
  """
  random = np.random.RandomState(seed)
  rows = []
  for label, name in enumerate(class_names):
    index = random.permutation(np.flatnonzero(label_N == label))
    if len(index) < shots:
      raise ValueError(
        f'{shots} shots need {shots} images of each class, but the class {name!r} has {len(index)} '
        'in data.train_split. Use a larger split.'
      )
    rows.append(index[:shots])
  return np.stack(rows)


def draw_readable(
  train: Split, class_names: tuple[str, ...]
) -> tuple[list[np.ndarray], np.ndarray]:
  """Draws training images of every class, once for each of `SEEDS`, and skips unreadable images.

  The number of images per class is the largest number in `SHOTS` for which every class has enough
  images. An unreadable image is replaced by another image of its class. (In training, it is
  replaced by the next image of the split, which may belong to a different class.)

  Args:
    train: training split.
    class_names: names of the L classes, in the order of the labels.

  Returns:
    A list with one array of indices `[L, shots]` for each seed, as `draw_shots` returns them.
    The indices of all drawn images, sorted and without duplicates.

  Raises:
    ValueError: a class has no readable image.
  """
  label_N, checked = train.label_N.copy(), np.empty(0, int)
  while True:
    count_L = np.bincount(label_N[label_N >= 0], minlength=len(class_names))[: len(class_names)]
    fewest = count_L.min()
    most = max([shots for shots in SHOTS if shots <= fewest], default=min(SHOTS))
    drawn = [draw_shots(label_N, class_names, most, seed) for seed in SEEDS]
    needed = np.unique(drawn)
    unknown = np.setdiff1d(needed, checked)
    readable = [train.readable(part) for part in in_parts(unknown)]
    bad = unknown[~np.concatenate([np.ones(0, bool), *readable])]
    if not len(bad):
      break
    label_N[bad] = -1
    checked = np.union1d(checked, unknown)
  if most < max(SHOTS):
    log.warning(
      'Skipping tests with more than %d shots: class %s has only %d training image(s).',
      most,
      class_names[count_L.argmin()],
      fewest,
    )
  return drawn, needed


def in_parts(index_N: np.ndarray) -> list[np.ndarray]:
  """Divides indices into arrays of at most `PART`, so that the decoded images fit into memory."""
  return [index_N[i : i + PART] for i in range(0, len(index_N), PART)]


def classifier_accuracy(classifier: str, known: Features, tested: Features, classes: int) -> float:
  """Fits a classifier to training features, and returns its accuracy on test features, 0 to 1.

  Args:
    classifier: one of `CLASSIFIERS`.
    known: features of training images.
    tested: features of test images.
    classes: number of classes.
  """
  entry = CLASSIFIERS[classifier]
  head = entry.fit(known.feature_ND, known.label_N, classes)
  score_ML = entry.scores(tested.feature_ND, head, classes)
  return float((score_ML.argmax(axis=1) == tested.label_N).mean())


def score_backbone(exp: Experiment, params: dict, classifier: str = 'ridge') -> dict:
  """Measures the few-shot accuracies of a backbone on the experiment's dataset.

  Training images are drawn from `data.train_split`. The test images are `data.eval_split` without
  the images that the backbone was trained on.

  Args:
    exp: the experiment.
    params: parameters of the experiment's model; the head is not used.
    classifier: one of `CLASSIFIERS`.

  Returns:
    A dict with these keys:
    `shots`: `{'1': {'mean': ..., 'std': ..., 'accuracy': [...]}, '5': ...}`. The keys are numbers
      of training images per class. `accuracy` has one value, 0 to 1, for each of `SEEDS`. `std` is
      the standard deviation of these values.
    `examples`: the number of test images.
    `classifier`: name of the classifier. With `ridge`, `l2` is the weight of the L2 penalty.
    `left_out`: number of test images left out because they were used in training; absent if 0.

  Raises:
    ValueError: a class has no readable training image, the two splits share examples, or images can
      have several labels.
  """
  train, test, left_out = open_both(exp)
  drawn, needed = draw_readable(train, exp.task.class_names)
  batch_size = exp.config.eval_batch_size
  mesh = inference_mesh(batch_size)
  step = features.make_feature_step(exp, mesh)
  params = replicate(mesh, params)
  compute = lambda examples: features.compute_features(step, params, examples, batch_size, mesh)
  parts = [compute(train.some(part)) for part in in_parts(needed)]
  known = functools.reduce(lambda a, b: a.joined(b), parts)
  tested = compute(test)
  scores = {}
  for shots in (n for n in SHOTS if n <= drawn[0].shape[1]):
    values = []
    for index_LS in drawn:
      index = index_LS[:, :shots].ravel()
      chosen = known.some(np.searchsorted(needed, index))
      values.append(classifier_accuracy(classifier, chosen, tested, len(exp.task.class_names)))
    scores[str(shots)] = over_seeds(values)
  result = {'shots': scores, 'examples': len(tested), 'classifier': classifier}
  result |= {'l2': L2} if classifier == 'ridge' else {}
  return result | ({'left_out': left_out} if left_out else {})


def open_both(exp: Experiment) -> tuple[Split, Split, int]:
  """Returns the training split, the test split, and the number of test images that are left out.

  Raises:
    ValueError: the two splits share examples, or images can have several labels.
  """
  if exp.task.multi_label:
    raise ValueError(
      'Few-shot accuracy is defined for one label per image, but these images can have several. '
      'Train a linear probe instead: --config=configs/linear_probe.py.'
    )
  source, splits = data.open_data(exp), exp.config.data
  if overlap(source.pieces(splits.train_split), source.pieces(splits.eval_split)):
    raise ValueError(
      f'data.train_split={splits.train_split!r} shares examples with '
      f'data.eval_split={splits.eval_split!r}, so training images would be used for testing. '
      'Choose splits that do not overlap.'
    )
  unseen, left_out = data.open_test(exp, source)
  streamed = dataclasses.replace(exp.reading, cache='stream')
  train = open_split(streamed, source, splits.train_split, exp.task.stored_size)
  report_split(splits.train_split, train)
  test = data.load_split(exp, splits.eval_split, unseen)
  return train, test, left_out


def over_seeds(values: list[float]) -> dict:
  """Returns the accuracies of the seeds, their mean, and their (sample) standard deviation."""
  return {'mean': np.mean(values), 'std': np.std(values, ddof=1), 'accuracy': values}


def fewshot(request: Request, classifier: str = 'ridge') -> dict:
  """Measures the few-shot accuracies of a model, and writes them to `fewshot.json` in its workdir.

  If the workdir cannot be written, a warning is logged. Published weights have no workdir, so their
  result is only returned. For published weights, the overrides in the request must name the
  dataset.

  Args:
    request: names the model: a checkpoint of a workdir, or published weights.
    classifier: one of `CLASSIFIERS`.

  Returns:
    The dict of `score_backbone`. For a checkpoint, the dict also contains `step`, the
    step number.
  """
  choose('--classifier', classifier, CLASSIFIERS)
  data.check_data_given(request)
  exp, params, loaded = opening.open_model(request, 'data')
  result = score_backbone(exp, params, classifier)
  if request.workdir:
    result = {'step': loaded} | result
    try:
      write_json(request.workdir / 'fewshot.json', result)
    except storage.Unwritten as error:  # the workdir may be read-only
      log.warning('%s The result is only printed.', error)
  return result
