"""Vision Transformers in JAX: train, evaluate, predict and export. See README.md.

model = vit_jax.make('B/16', num_classes=10)
result = vit_jax.train(config, workdir)
accuracy = vit_jax.evaluate(workdir)['accuracy']
for row in vit_jax.predict(workdir, ['cat.png', 'photos/']): print(row)
"""

import importlib
import os
import threading

# Without this setting, etils (a library for files in buckets) would import TensorFlow.
os.environ.setdefault('EPATH_USE_TF', '0')

_PUBLIC = {  # imported on first use, because a model needs no data or checkpoint libraries
  'ViT': 'model.vit',
  'Encoder': 'model.encoder',
  'make': 'model.variants',
  'block_tokens': 'model.encoder',
  'load': 'weights.pretrained',
  'save': 'inference.exporting',
  'default_config': 'config',
  'train': 'training.trainer',
  'evaluate': 'evaluation.exact',
  'predict': 'inference.prediction',
}

__all__ = list(_PUBLIC)
__version__ = '0.2.0'

_importing = threading.RLock()  # JAX cannot be imported in several threads at the same time


def __getattr__(name: str):
  if name not in ('figures', *_PUBLIC):
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  with _importing:
    if name == 'figures':  # the public subpackage
      return importlib.import_module(f'{__name__}.{name}')
    return getattr(importlib.import_module(f'{__name__}.{_PUBLIC[name]}'), name)
