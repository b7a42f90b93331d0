"""The training loop.

Decisions:
  * The host reads a step's metrics after it starts the next step, so no device waits for the host.
  * Before a log line, evaluation or checkpoint, the host waits for the step and checks its loss.
"""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import functools
import logging
import time

import jax
import numpy as np
import tqdm

from vit_jax import progress
from vit_jax.data import Split, train_batches
from vit_jax.distributed import (
  Preempted,
  Preemption,
  batch_sharding,
  few_devices,
  from_first,
  size_on_device,
)
from vit_jax.evaluation import make_eval_step, quality, score_split
from vit_jax.experiment import Experiment, division
from vit_jax.optim import Training, warmup_steps
from vit_jax.training.compiling import Compiled, compile_step
from vit_jax.training.meter import Meter
from vit_jax.training.state import TrainState, start_state
from vit_jax.workdir import Checkpoints, Silent, Writer

log = logging.getLogger(__name__)

# Scores and their names in messages. Only data with several labels per image has the second score.
SCORES = {'accuracy': 'accuracy', 'mean_average_precision': 'mean average precision'}

PATCH_DRAWS = 1  # separates the draws of patch sizes from other draws with the same seed

Size = tuple[int, int]  # (height, width) in pixels


@dataclasses.dataclass
class Run:
  """A training run, which starts from its newest checkpoint, or at step 0 without a checkpoint.

  Attributes:
    exp: experiment to train.
    training: data, steps, optimizer and initial weights.
    mesh: mesh of the devices.
    records: writer of metrics.
    checkpoints: checkpoints in the workdir.
    preemption: tells whether the run was asked to stop.
    notes: additional fields for `result.json`.
  """

  exp: Experiment
  training: Training
  mesh: jax.sharding.Mesh
  records: Writer | Silent
  checkpoints: Checkpoints
  preemption: Preemption
  notes: dict[str, object]

  def __post_init__(self):
    self.config = self.exp.config
    self.began = time.perf_counter()  # start time; `run` subtracts the seconds of earlier sessions

  def run(self) -> dict:
    """Trains to the end, and returns the content of `result.json`."""
    few = few_devices(**division(self.config))
    if few:
      log.warning(few)
    train_state, seconds = start_state(self.exp, self.training, self.mesh, self.checkpoints)
    self.began -= seconds
    size = functools.partial(size_on_device, self.mesh)
    other = size(train_state) - size(train_state.params) + size(self.training.teacher)
    self.eval_step = make_eval_step(self.exp, self.mesh, held=other)
    start, steps = int(train_state.step), self.training.steps
    if start < steps:
      self.log_cycle()
      train_state, scores = self.loop(train_state, start, steps)
    else:
      if self.checkpoints.latest() is None:
        self.save(train_state)
      scores = self.evaluate_start(start, train_state)
    return self.finish(train_state, scores)

  def loop(self, train_state: TrainState, start: int, steps: int):
    """Runs steps `start + 1` to `steps`; returns the state and the latest scores of each split."""
    config, examples = self.config, self.training.train
    over_batch = batch_sharding(self.mesh)
    batches = train_batches(examples, config.batch_size, config.seed, start, over_batch)
    scores = self.evaluate_start(start, train_state) if self.owes_evaluation(start) else {}
    with contextlib.ExitStack() as stack:
      stack.enter_context(contextlib.closing(batches))  # stops the data readers
      batch, (size, patch) = next(batches), self.sizes_of(start + 1)
      programs = self.compile(size, train_state, batch)
      meter = Meter(self.mesh, config.model.dtype)
      bar = stack.enter_context(progress.counter(initial=start, total=steps, unit='step'))
      for step in range(start + 1, steps + 1):
        if step > start + 1:
          with meter.waiting():
            batch = next(batches)
        earlier, (size, patch) = size, self.sizes_of(step)
        if size != earlier:
          with meter.paused():
            programs = self.compile(size, train_state, batch)
        train_state, metrics = programs[patch].step(train_state, batch, self.training.teacher)
        if step == start + 1:
          jax.block_until_ready(metrics)  # the call returns before the device is done
          log.info('First step done.')
        meter.add(step, metrics, programs[patch])
        bar.update()
        stop = self.preemption.is_due() and step < steps
        events = self.due(step)
        if not events and not stop:
          continue
        meter.flush()
        if 'log' in events or stop:  # a stop must not lose the metrics of the last steps
          self.log(step, meter.read(), bar)
        if stop:  # no evaluation now, because time can be short; the resumed run evaluates
          self.save(train_state)
          self.checkpoints.wait()
          raise Preempted(f'The run was asked to stop: step {step} of {steps} is saved.')
        with meter.paused():
          scores = self.save_and_evaluate(step, train_state, events) or scores
    return train_state, scores

  def save_and_evaluate(self, step: int, train_state: TrainState, events: set[str]) -> dict:
    """Does what `events` (from `due`) contains; returns the scores of each split, or no scores."""
    if 'save' in events:  # before the evaluation, which can fail or be killed
      self.save(train_state)
    scores = self.evaluate(step, train_state) if 'eval' in events else {}
    if 'save' in events:
      self.rate(step, scores)
    return scores

  def compile(self, size: Size, train_state: TrainState, batch: dict) -> dict[Size, Compiled]:
    """Compiles the step for an image size; returns `{patch size: Compiled}` for all patch sizes.

    The memory plan for the smallest patches becomes the run's plan. These patches give the longest
    sequence of tokens, so a plan that fits them also fits all other patch sizes.
    """
    programs = {}
    for patch in self.exp.patch_sizes:
      # The host passes images of one size in all stages of the run; the device resizes the images.
      exp = dataclasses.replace(self.exp.at(size, patch), task=self.exp.task)
      found = compile_step(exp, self.training, self.mesh, train_state, batch)
      model = self.exp.model.clone(remat=found.exp.model.remat)
      self.exp = dataclasses.replace(self.exp, parts=found.exp.parts, model=model)
      programs[patch] = found
    return programs

  def log_cycle(self) -> None:
    """Logs the latest learning-rate cycle, if a finished run was extended to more epochs."""
    if not (cycles := self.training.cycles):
      return
    begin, end, name = cycles[-1], self.training.steps, self.config.schedule.name
    warmup = warmup_steps(self.config, len(self.training.train), end - begin)
    peak = self.training.schedule(begin + max(warmup - 1, 0))  # a sweep ignores optimizer.lr
    log.info(
        'Learning-rate cycle %d, steps %d to %d: %d steps of warm-up to a rate of %g, then %s. '
        'Images are only cropped and flipped.', len(cycles) + 1, begin + 1, end, warmup, peak, name,
    )  # fmt: skip

  def owes_evaluation(self, start: int) -> bool:
    """Returns whether the run was stopped before the evaluation that is due after step `start`."""
    due = start > 0 and 'eval' in self.due(start)
    return due and not from_first(lambda: self.records.find(start, 'test'))

  def evaluate_start(self, start: int, train_state: TrainState) -> dict[str, dict]:
    """Evaluates the state from which the run starts, and writes and returns the scores."""
    self.records.keep(lambda line: line['split'] == 'train' or line['step'] != start)
    scores = self.evaluate(start, train_state)
    self.rate(start, scores)
    return scores

  def sizes_of(self, step: int) -> tuple[Size, Size]:
    """Returns image size and patch size of a step, both (height, width); the first step is 1."""
    size = next(size for end, size in self.training.stages if step <= end)
    return size, draw_patch(self.exp.patch_sizes, self.config.seed, step)

  def due(self, step: int) -> set[str]:
    """Returns what is due after this step: any of `log`, `eval` and `save`.

    With a validation split, `eval` is due whenever `save` is due, because the validation accuracy
    decides which checkpoint is the best.
    """
    config, last = self.config, step == self.training.steps
    every = {'log': config.log_every, 'eval': config.eval_every, 'save': config.checkpoint_every}
    events = {name for name, n in every.items() if last or (n and step % n == 0)}
    return events | {'eval'} if 'save' in events and self.training.val else events

  def log(self, step: int, values: dict[str, float], bar: tqdm.tqdm) -> None:
    """Writes a line of training metrics, and shows them in the progress bar."""
    self.records.write(step, 'train', **values)
    bar.set_postfix_str(
      f'loss {values["loss"]:.3f}, '
      + (f'accuracy {values["accuracy"]:.1%}, ' if 'accuracy' in values else '')
      + f'{values["images_per_second"]:,.0f} images/s'
      + (f', MFU {values["mfu"]:.1%}' if 'mfu' in values else '')
    )

  def evaluate(self, step: int, train_state: TrainState) -> dict[str, dict]:
    """Evaluates the validation and test splits, and writes and returns their scores."""
    scores = {}
    for split in ('val', 'test'):
      examples = getattr(self.training, split)
      if examples is None:
        continue
      values = self.score(train_state.eval_params, examples)
      if train_state.ema is not None:  # for comparison, also the raw weights
        raw = self.score(train_state.params, examples)
        values |= {f'raw_{name}': raw[name] for name in ('loss', *SCORES) if name in raw}
      self.records.write(step, split, **values)
      shown = ', '.join(
        [f'{text} {values[name]:.2%}' for name, text in SCORES.items() if name in values]
        + [f'loss {values["loss"]:.4f}']
      )
      log.info('Step %d: %s %s on %d examples.', step, split, shown, values['examples'])
      scores[split] = values
    return scores

  def score(self, params: dict, examples: Split) -> dict[str, float]:
    """Evaluates weights on a split: returns the loss, the scores and the number of examples."""
    return score_split(self.eval_step, params, examples, self.config.eval_batch_size, self.mesh)

  def rate(self, step: int, scores: dict[str, dict]) -> None:
    """Tells `checkpoints` the validation score of a checkpoint, if there is a validation split."""
    if 'val' in scores:
      self.checkpoints.rate(step, quality(scores['val']))

  def save(self, train_state: TrainState) -> None:
    """Saves a checkpoint: the training state, and the facts that a resumed run needs."""
    saved = self.exp.saved() | {
      'cycles': self.training.cycles,
      'devices': devices_of(self.mesh),
      'seconds': time.perf_counter() - self.began,
    }
    self.records.flush()
    self.checkpoints.save(train_state, saved)

  def finish(self, train_state: TrainState, scores: dict[str, dict]) -> dict:
    """Waits until the last checkpoint is on disk; returns the content of `result.json`."""
    self.checkpoints.wait()
    result = {
      **named('test', scores['test']),
      'test_loss': scores['test']['loss'],
      'examples': scores['test']['examples'],
      'steps': int(train_state.step),
      'seconds': round(time.perf_counter() - self.began, 1),
      'params': sum(leaf.size for leaf in jax.tree.leaves(train_state.params)),
      'config': self.exp.saved()['config'],
    } | self.notes
    if 'val' in scores:
      result |= named('val', scores['val'])
      result |= from_first(lambda: self.last_and_best(result['steps']))
    return result

  def last_and_best(self, last: int) -> dict[str, dict]:
    """Returns step and scores of the last checkpoint and of the best one, by validation score."""

    def accuracies(step):
      found = {split: self.records.find(step, split) for split in ('val', 'test')}
      return {'step': step} | named('val', found['val']) | named('test', found['test'])

    return {'last': accuracies(last), 'best': accuracies(self.checkpoints.best())}


def devices_of(mesh: jax.sharding.Mesh) -> dict[str, object]:
  """Returns the facts that affect rounding: device kind, number of processes, shape of the mesh.

  The number of processes matters, because it changes the order of sums over devices.
  """
  kind = mesh.devices.flat[0].device_kind
  return {'kind': kind, 'processes': jax.process_count(), **mesh.shape}


def draw_patch(sizes: Sequence[Size], seed: int, step: int) -> Size:
  """Returns the patch size of a step, drawn at random from `sizes`.

  The draw depends only on seed and step, so it is equal in all processes and after a resume.
  """
  # NumPy guarantees that RandomState's numbers never change.
  return sizes[np.random.RandomState([seed, step, PATCH_DRAWS]).randint(len(sizes))]


def named(split: str, values: Mapping[str, float]) -> dict[str, float | None]:
  """Returns the scores under names such as `test_accuracy`; a missing accuracy becomes None."""
  return {f'{split}_accuracy': values.get('accuracy')} | {
    f'{split}_{name}': values[name] for name in SCORES if name in values
  }
