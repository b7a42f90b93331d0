"""Opens datasets, and reads their splits in batches."""

from vit_jax.data.batching import Plan, Split, eval_batches, train_batches
from vit_jax.data.folder import Files, is_searched
from vit_jax.data.image import (
  EXTENSIONS,
  INTERPOLATIONS,
  BadImage,
  Fit,
  decode_image,
  fit_image,
  has_image_name,
  open_header,
  save_png,
)
from vit_jax.data.label_rows import count_labels
from vit_jax.data.loading import Reading, decide_cache, differs, open_split, report_split
from vit_jax.data.memory import Examples, Features, check_memory, common_size
from vit_jax.data.source import (
  Source,
  first_size,
  identity,
  multi_hot,
  own_size,
  read_file,
  unlabelled,
)
from vit_jax.data.sources import SOURCES, check_apart, look_up_source, open_source
from vit_jax.data.splits import num_examples, overlap

__all__ = [
  'EXTENSIONS',
  'INTERPOLATIONS',
  'SOURCES',
  'BadImage',
  'Examples',
  'Features',
  'Files',
  'Fit',
  'Plan',
  'Reading',
  'Source',
  'Split',
  'check_apart',
  'check_memory',
  'common_size',
  'count_labels',
  'decide_cache',
  'decode_image',
  'differs',
  'eval_batches',
  'first_size',
  'fit_image',
  'has_image_name',
  'identity',
  'is_searched',
  'look_up_source',
  'multi_hot',
  'num_examples',
  'open_header',
  'open_source',
  'open_split',
  'overlap',
  'own_size',
  'read_file',
  'report_split',
  'save_png',
  'train_batches',
  'unlabelled',
]
