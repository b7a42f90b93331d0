"""What trained weights are used for: predictions, exports, a demo, and what a model costs."""

import importlib

_PUBLIC = {  # imported when asked for: `serve` needs Gradio, and a prediction no model card
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
