"""Losses, optimizers, schedules, and the training plan of a run."""

from vit_jax.optim.class_weights import check_weights, parse_weights, training_weights, weighted
from vit_jax.optim.classifiers import CLASSIFIERS, L2
from vit_jax.optim.distill import DISTILLATIONS, Teacher, split_head
from vit_jax.optim.losses import LOSSES, choose_loss
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
  'OPTIMIZERS',
  'SCHEDULES',
  'Stages',
  'Teacher',
  'TextClasses',
  'Training',
  'announce',
  'check_weights',
  'choose_loss',
  'image_stages',
  'num_steps',
  'parse_weights',
  'plan_training',
  'split_frozen',
  'split_head',
  'training_recipe',
  'training_weights',
  'warmup_epochs',
  'warmup_steps',
  'weighted',
]
