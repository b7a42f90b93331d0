"""Uses trained weights for predictions, exports and a demo page, and estimates a model's cost."""

import importlib

_PUBLIC = {  # imported on first use, because only `serve` needs Gradio
  'as_text': 'cost',
  'export': 'exporting',
  'features': 'prediction',
  'predict_files': 'prediction',
  'print_predictions': 'prediction',
  'serve': 'server',
  'summary_of': 'summary',
}

__all__ = list(_PUBLIC)


def __getattr__(name: str):
  if name not in _PUBLIC:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(f'{__name__}.{_PUBLIC[name]}'), name)
