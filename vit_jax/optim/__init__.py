"""Objectives, losses, optimizers, schedules, and the training plan of a run."""

from vit_jax.optim.class_weights import check_weights, parse_weights, training_weights
from vit_jax.optim.classifiers import CLASSIFIERS, L2, check_classifier
from vit_jax.optim.distill import DISTILLATIONS, Teacher
from vit_jax.optim.losses import LOSSES, choose_loss
from vit_jax.optim.masked import as_images, as_patches, evaluation_key, fill_in, statistics
from vit_jax.optim.objectives import (
  OBJECTIVES,
  Objective,
  objective_of,
  objective_params,
  without_objective,
)
from vit_jax.optim.optimizers import (
  FREEZE,
  MOMENT_DTYPES,
  OPTIMIZERS,
  split_frozen,
)
from vit_jax.optim.plan import (
  LATER_PEAK,
  Stages,
  Training,
  announce,
  check_stages,
  image_stages,
  num_steps,
  plan_training,
  training_recipe,
  warmup_epochs,
  warmup_steps,
)
from vit_jax.optim.schedules import SCHEDULES
from vit_jax.optim.zero_shot import TextClasses

__all__ = [
  'CLASSIFIERS',
  'DISTILLATIONS',
  'FREEZE',
  'L2',
  'LATER_PEAK',
  'LOSSES',
  'MOMENT_DTYPES',
  'OBJECTIVES',
  'OPTIMIZERS',
  'SCHEDULES',
  'Objective',
  'Stages',
  'Teacher',
  'TextClasses',
  'Training',
  'announce',
  'as_images',
  'as_patches',
  'check_classifier',
  'check_stages',
  'check_weights',
  'choose_loss',
  'evaluation_key',
  'fill_in',
  'image_stages',
  'num_steps',
  'objective_of',
  'objective_params',
  'parse_weights',
  'plan_training',
  'split_frozen',
  'statistics',
  'training_recipe',
  'training_weights',
  'warmup_epochs',
  'warmup_steps',
  'without_objective',
]
