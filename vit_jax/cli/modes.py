"""Lists all modes of the command line."""

from vit_jax.cli import (
  eval,
  export,
  fewshot,
  inspect,
  predict,
  profile,
  serve,
  train,
  verify,
  visualize,
)

MODES = {  # {name: Mode}
  'train': train.MODE,
  'eval': eval.MODE,
  'fewshot': fewshot.MODE,
  'predict': predict.MODE,
  'visualize': visualize.MODE,
  'export': export.MODE,
  'serve': serve.MODE,
  'inspect': inspect.MODE,
  'profile': profile.MODE,
  'verify': verify.MODE,
}
