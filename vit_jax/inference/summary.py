"""Estimates the cost of a config, a run or published weights, for `--mode=inspect`."""

import dataclasses

from ml_collections import ConfigDict

from vit_jax import config as config_lib
from vit_jax import inherit, opening
from vit_jax.check import check
from vit_jax.data import Source, look_up_source, num_examples
from vit_jax.experiment import Experiment, assemble_for
from vit_jax.inference.cost import Summary, measure
from vit_jax.opening import Request
from vit_jax.sizing import choose_open, image_size
from vit_jax.training import add_cycle, saved_config
from vit_jax.workdir import latest_step, newest_config

ASSUMED = tuple(f'class {i}' for i in range(1000))  # classes if the dataset is unavailable
# Notes for published weights.
OF_WEIGHTS = 'Training numbers assume the default config and your --config.<key> flags.'
HEADLESS = 'These weights have no head, so the numbers do not include a head.'


def summary_of(request: Request) -> Summary:
  """Estimates what training costs, for a config, a run, or published weights.

  `request` names the config, the workdir of the run, or the published weights.

  Raises:
    ValueError: the config is not valid, or the request names no config, workdir or weights.
  """
  config, workdir, init = request.config, request.workdir, request.init
  if not (config or workdir or init):
    raise ValueError('--mode=inspect needs --config, the --workdir of a run, or --init.')
  if init:
    asked = config_lib.override_all(config_lib.default_config(), request.overrides)
  else:
    asked = config or saved_config(workdir, request.overrides)
  check(asked)
  if init or (workdir and latest_step(workdir) is not None):
    if init:
      exp, _ = opening.from_init(init, request.overrides, 'any')
      notes, cycles = (OF_WEIGHTS,) + (HEADLESS,) * (exp.model.num_classes is None), ()
    else:
      exp, *_ = opening.from_workdir(workdir, request.overrides, config, request.step)
      newest = newest_config(workdir)
      notes, cycles = (), tuple(newest.get('cycles', ()))
      if exp.config.epochs != newest['config']['epochs']:
        cycles = add_cycle(exp.config, newest, latest_step(workdir), workdir)
    return measure(exp, exp.task.train_examples or None, notes, cycles)
  exp, examples, notes = summary_of_config(asked)
  return measure(exp, examples, notes)


def summary_of_config(config: ConfigDict) -> tuple[Experiment, int | None, tuple[str, ...]]:
  """Builds the experiment of a config, without downloading data or reading images.

  Returns:
    The experiment.
    The number of training examples; None if it is unknown.
    Sentences about the assumptions if the dataset was not found; else empty.

  Raises:
    ValueError: the model is not valid, or `data.source` names an unknown dataset.
  """
  data, examples, notes = config.data, None, ()
  source = look_up_source(data.source, data.dir, image_size(config))
  config = choose_open(config, source)
  if source is None:
    source = Source({}, ASSUMED, 3, None)
    notes = (f'{data.source} was not found: assuming {len(ASSUMED):,} classes of RGB images.',)
  if source.sizes:
    examples = num_examples(source.pieces(config.data.train_split))
  if config.init:
    config, *_ = inherit.open_init(config, source)
  exp = assemble_for(config, source)
  if not notes:  # the classes are known
    exp = dataclasses.replace(exp, teacher=inherit.open_teacher(config, source)[0])
  return exp, examples, notes
