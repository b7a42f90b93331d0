"""How well a backbone's features separate classes of which a few images are known.

Paper, Section 4.1: a regularised least-squares regression from frozen features onto {-1, 1}^L
targets, solved in closed form. All else is as in big_vision's `evaluators/fewshot_lsr.py`: each
feature centred and divided by its standard deviation (plus 1e-5) over the images drawn, a
constant feature of 100 for the bias, the strength 2^10 of the L2 penalty on all of it, the
bias's too, and the images of fewer shots among those of more.

Decisions:
  * It is solved on the host in float64, in the smaller of the two forms: among examples where
    they are fewer than features.
  * Only the images drawn, and all of the test split, go through the backbone.
"""

import logging

import numpy as np

from vit_jax import opening, storage
from vit_jax.data import Split, overlap
from vit_jax.distributed import inference_mesh, replicate
from vit_jax.evaluation import data, features
from vit_jax.experiment import Experiment
from vit_jax.opening import Request
from vit_jax.workdir import write_json

log = logging.getLogger(__name__)

SHOTS = (1, 5, 10, 25)  # images of each class
SEEDS = (0, 1, 2)  # of the draw
L2 = 2.0**10
BIAS = 100.0  # so large that the penalty hardly touches it


def draw_shots(
  label_N: np.ndarray, class_names: tuple[str, ...], shots: int, seed: int
) -> np.ndarray:
  """The indices `[L, shots]` of images drawn without replacement, a row a class.

  With the same seed, fewer shots are the first columns of more.

  Raises:
    ValueError: a class has fewer images than shots.
  """
  random = np.random.RandomState(seed)
  rows = []
  for label, name in enumerate(class_names):
    index = random.permutation(np.flatnonzero(label_N == label))
    if len(index) < shots:
      raise ValueError(
        f'{shots} shots need {shots} images of each class, and {name!r} has {len(index)} in '
        'data.train_split: take a larger split.'
      )
    rows.append(index[:shots])
  return np.stack(rows)


def draw_readable(
  train: Split, class_names: tuple[str, ...]
) -> tuple[list[np.ndarray], np.ndarray]:
  """For each of `SEEDS` the `draw_shots` of as many of `SHOTS` as all classes have, and its images.

  A bad image that is to be skipped counts as none, so that another one of its class is drawn: the
  next one in the split, which training would take, may be of another class.

  Raises:
    ValueError: a class has no image.
  """
  label_N, checked = train.label_N.copy(), np.empty(0, int)
  while True:
    fewest = np.bincount(label_N[label_N >= 0], minlength=len(class_names))[
      : len(class_names)
    ].min()
    most = max([shots for shots in SHOTS if shots <= fewest], default=min(SHOTS))
    drawn = [draw_shots(label_N, class_names, most, seed) for seed in SEEDS]
    needed = np.unique(drawn)
    unknown = np.setdiff1d(needed, checked)
    bad = unknown[~train.readable(unknown)]
    if not len(bad):
      break
    label_N[bad] = -1
    checked = np.union1d(checked, unknown)
  if most < max(SHOTS):
    log.warning('No more than %d shots: a class has %d images.', most, fewest)
  return drawn, needed


def solve(x_ND: np.ndarray, y_NL: np.ndarray, l2: float) -> np.ndarray:
  """The w `[D, L]` that minimises `|x w - y|^2 + l2 |w|^2`, in float64."""
  x_ND, y_NL = np.asarray(x_ND, np.float64), np.asarray(y_NL, np.float64)
  examples, width = x_ND.shape
  if examples < width:
    return x_ND.T @ np.linalg.solve(x_ND @ x_ND.T + l2 * np.eye(examples), y_NL)
  return np.linalg.solve(x_ND.T @ x_ND + l2 * np.eye(width), x_ND.T @ y_NL)


def regression_accuracy(
  train_ND: np.ndarray, label_N: np.ndarray, test_MD: np.ndarray, test_label_M: np.ndarray
) -> float:
  """The share of test examples that the regression on the training examples gets right."""
  train_ND, test_MD = train_ND.astype(np.float64), test_MD.astype(np.float64)
  mean_D, std_D = train_ND.mean(axis=0), train_ND.std(axis=0) + 1e-5

  def prepare(x_ND):
    return np.pad((x_ND - mean_D) / std_D, ((0, 0), (0, 1)), constant_values=((0, 0), (0, BIAS)))

  target_NL = 2.0 * np.eye(label_N.max() + 1)[label_N] - 1
  w_DL = solve(prepare(train_ND), target_NL, L2)
  return float(((prepare(test_MD) @ w_DL).argmax(axis=1) == test_label_M).mean())


def score_backbone(exp: Experiment, params: dict) -> dict:
  """Few-shot accuracies of a backbone on the experiment's data.

  Args:
    exp: `data.train_split` is drawn from, and all of `data.eval_split` tested on, but for images
      that the backbone was trained on.
    params: of its model; the head is not used.

  Returns:
    `{'shots': {'1': {'mean': ..., 'std': ..., 'accuracy': [one a seed]}, ...}, 'examples': ...,
    'l2': ...}`; the standard deviation is that of the population. `left_out` is as `evaluate`
    has it.

  Raises:
    ValueError: a class has no image, or the splits share examples.
  """
  config = exp.config
  source, splits = data.open_data(exp), config.data
  if overlap(source.pieces(splits.train_split), source.pieces(splits.eval_split)):
    raise ValueError(
      f'data.train_split={splits.train_split!r} shares examples with '
      f'data.eval_split={splits.eval_split!r}: the shots would be tested on themselves.'
    )
  unseen, left_out = data.open_test(exp, source)
  train, test = data.load_splits(exp, (source, splits.train_split), (unseen, splits.eval_split))
  drawn, needed = draw_readable(train, exp.task.class_names)
  mesh = inference_mesh(config.eval_batch_size)
  step = features.make_feature_step(exp, mesh)
  params = replicate(mesh, params)
  compute = lambda examples: features.compute(step, params, examples, config.eval_batch_size, mesh)
  known, tested = compute(train.some(needed)), compute(test)
  scores = {}
  for shots in (n for n in SHOTS if n <= drawn[0].shape[1]):
    values = []
    for index_LS in drawn:
      index = index_LS[:, :shots].ravel()
      chosen = known.some(np.searchsorted(needed, index))
      values.append(
        regression_accuracy(chosen.image_NHWC, chosen.label_N, tested.image_NHWC, tested.label_N)
      )
    scores[str(shots)] = {'mean': np.mean(values), 'std': np.std(values), 'accuracy': values}
  result = {'shots': scores, 'examples': len(tested), 'l2': L2}
  return result | ({'left_out': left_out} if left_out else {})


def fewshot(request: Request) -> dict:
  """Few-shot accuracies of a workdir's checkpoint, also in its `fewshot.json` if possible.

  Published weights are tested on the data of the overrides, and nothing is written.
  """
  exp, params, loaded = opening.open_model(request, 'data')
  result = score_backbone(exp, params)
  if request.workdir:
    result = {'step': loaded} | result
    try:
      write_json(request.workdir / 'fewshot.json', result)
    except storage.Unwritten as error:  # the workdir may be another's, or archived
      log.warning('%s The result is printed only.', error)
  return result
