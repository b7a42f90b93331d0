"""Evaluates models, computes features, and measures few-shot accuracy."""

from vit_jax.evaluation.answers import (
  calibrate_run,
  make_eval_step,
  score_examples,
  trust,
)
from vit_jax.evaluation.data import (
  check_data_given,
  load_split,
  open_data,
  open_test,
  request_for,
)
from vit_jax.evaluation.exact import INPUT, evaluate, evaluate_checkpoint, score_split
from vit_jax.evaluation.features import cached_features, compute_features, make_feature_step
from vit_jax.evaluation.few_shot import fewshot
from vit_jax.evaluation.files import PathLike, find_images
from vit_jax.evaluation.forward import make_inference_step, map_files, probabilities, read_image
from vit_jax.evaluation.measures import coverage_curve, reliability
from vit_jax.evaluation.multilabel import given_labels
from vit_jax.evaluation.scoring import Losses, Scores, quality, summarize, training_score
from vit_jax.evaluation.teaching import with_teacher

__all__ = [
  'INPUT',
  'Losses',
  'PathLike',
  'Scores',
  'cached_features',
  'calibrate_run',
  'check_data_given',
  'compute_features',
  'coverage_curve',
  'evaluate',
  'evaluate_checkpoint',
  'fewshot',
  'find_images',
  'given_labels',
  'load_split',
  'make_eval_step',
  'make_feature_step',
  'make_inference_step',
  'map_files',
  'open_data',
  'open_test',
  'probabilities',
  'quality',
  'read_image',
  'reliability',
  'request_for',
  'score_examples',
  'score_split',
  'summarize',
  'training_score',
  'trust',
  'with_teacher',
]
