"""The train step and the loop around it.

Decisions:
  * Randomness folds (seed, step) and then the example's position in the batch: no key is
    stored, and no draw depends on devices or micro-batches.
  * Accuracy counts an image that is mixed of two under its own label, even where more of it is of
    the other: with mixup and cutmix it says little.
  * Metrics are read one step late, so that the device never waits for the host.
  * A checkpoint is saved only once the loss of its step was read and found finite.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import logging
import math
import pathlib
import re
import sys
import time

from clu import parameter_overview, platform
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import optax
import tqdm

from vit_jax import (
  checkpoint,
  cluster,
  data,
  evaluate,
  experiment,
  image,
  limits,
  optim,
  output,
  progress,
  sharding,
  state,
  trained,
  writer,
)
from vit_jax import config as config_lib
from vit_jax.check import check
from vit_jax.paths import local

log = logging.getLogger(__name__)

TrainStep = Callable[[state.TrainState, dict], tuple[state.TrainState, dict]]
# `(experiment, training, mesh, workdir) -> result`
Procedure = Callable[
  [experiment.Experiment, experiment.Training, jax.sharding.Mesh, pathlib.Path], dict
]

OWN = ('data.dir', 'data.workers', 'data.threads')  # keys that each process may have its own of

DETERMINISTIC = {'xla_gpu_deterministic_ops': True}  # XLA's name for it


def make_train_step(
  exp: experiment.Experiment, training: experiment.Training, mesh: jax.sharding.Mesh
) -> TrainStep:
  """The jitted step `(state, batch) -> (state, metrics)`; the state's buffers are donated.

  The metrics are `score` (sums over the batch), `grad_norm` (before clipping),
  `learning_rate` (the one applied) and, where the batch has `bad`, `bad_images`: their number.
  """
  config = exp.config
  parts = config.micro_batches or exp.micro_batches(mesh, config.batch_size)

  def loss_fn(trained, frozen, part, key, early):
    loss_B, logits_BL = exp.training_loss(trained | frozen, part, key, early)
    score = evaluate.training_score(logits_BL, part['label'], loss_B)
    return loss_B.sum() / config.batch_size, score

  def gradient(part, trained, frozen, key, early):
    """A micro-batch's share of the gradient of the mean loss, and its metrics."""
    grads, score = jax.grad(loss_fn, has_aux=True)(trained, frozen, part, key, early)
    return sharding.keep(mesh, grads), score

  gradients = sharding.add_up(gradient, mesh, parts)

  def train_step(old, batch):
    key = jax.random.fold_in(jax.random.key(config.seed), old.step)
    batch = batch | {'example': jnp.arange(config.batch_size)}
    bad_B = batch.pop('bad', None)
    trained, frozen = optim.split(old.params, config.freeze)
    early = old.step < training.early_steps if training.early_steps < training.steps else None
    grads, score = gradients(batch, trained, frozen, key, early)
    updates, opt_state = training.optimizer.update(grads, old.opt_state, trained)
    trained = optax.apply_updates(trained, updates)
    ema = old.ema
    if ema is not None:
      average, constant = optim.split(ema, config.freeze)
      # A short run, too, forgets the weights that it began with.
      decay = jnp.minimum(config.ema, (1 + old.step) / (10 + old.step))
      ema = optax.incremental_update(trained, average, 1 - decay) | constant
    metrics = {
      'score': score,
      'grad_norm': optax.global_norm(grads),
      'learning_rate': training.schedule(old.step),
    }
    if bad_B is not None:
      metrics['bad_images'] = bad_B.sum()
    new = state.TrainState(old.step + 1, trained | frozen, opt_state, ema)
    return sharding.keep(mesh, new), metrics

  options = DETERMINISTIC if config.deterministic and jax.default_backend() == 'gpu' else None
  return jax.jit(train_step, donate_argnums=0, compiler_options=options)


class Meter:
  """Averages training metrics between two log lines, and times training alone."""

  def __init__(self):
    self._reset()

  def _reset(self) -> None:
    self._scores, self._seconds, self._waited, self._learning_rate = [], 0.0, 0.0, 0.0
    self._bad = []
    self._started = time.perf_counter()

  def pause(self) -> None:
    """Something other than training follows."""
    self._seconds += time.perf_counter() - self._started

  def go_on(self) -> None:
    """Training follows."""
    self._started = time.perf_counter()

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """The next batch is fetched meanwhile."""
    began = time.perf_counter()
    yield
    self._waited += time.perf_counter() - began

  def add(self, step: int, metrics: dict) -> None:
    """Reads the metrics of a step, once the device has them.

    Raises:
      FloatingPointError: the loss or the gradient is not finite.
    """
    metrics = jax.device_get(metrics)
    loss = evaluate.summarize([metrics['score']])['loss']
    for name, value in (('loss', loss), ('gradient norm', metrics['grad_norm'])):
      if not math.isfinite(value):
        raise FloatingPointError(
          f'The {name} of step {step} is {value}: training diverged. Checkpoints of steps '
          'before it are whole; try a smaller optimizer.lr or a longer schedule.warmup.'
        )
    self._scores.append(metrics['score'])
    self._bad += [metrics['bad_images']] if 'bad_images' in metrics else []
    self._learning_rate = float(metrics['learning_rate'])

  def read(self) -> dict[str, float]:
    """The means since the last reading; the clock must run.

    `data_wait` is the share of the time in which the loop waited for its next batch.
    """
    self.pause()
    values = evaluate.summarize(self._scores)
    values['images_per_second'] = round(values['examples'] / self._seconds, 1)
    values['data_wait'] = round(self._waited / self._seconds, 4)
    values['learning_rate'] = self._learning_rate
    if self._bad:
      values['bad_images'] = int(sum(self._bad))
    self._reset()
    return values


@limits.memory_for('Training')
def train(
  config: ConfigDict, workdir: str | pathlib.Path, procedure: Procedure | None = None
) -> dict:
  """Trains, or resumes, until `config.epochs` are done; returns what `result.json` holds.

  Args:
    config: from `configs/`, or `config.default_config()` changed.
    workdir: folder of checkpoints and records; a run in it is resumed.
    procedure: how to train once the data is open; None: `fit`, after `record`.

  Raises:
    ValueError: a config, data or workdir that does not work; the message says why.
    FloatingPointError: training diverged; the last good checkpoint stays.
    limits.OutOfMemory: the message says which keys to change.
    cluster.Preempted: it was asked to stop, and has saved.
  """
  workdir = local(workdir)
  sharding.start_up()
  check(config)
  mine = config_lib.flatten(config)
  cluster.check_same('config', {key: mine[key] for key in mine if key not in OWN})
  with writer.held(workdir):
    finished, saved, cycles = begin(config, workdir)
    if finished:
      return finished
    mesh = experiment.make_mesh(config)
    exp, training = experiment.from_config(config, saved, cycles, trained.of_run(workdir))
    if procedure:
      return procedure(exp, training, mesh, workdir)
    record(exp, workdir, training.test)
    return fit(exp, training, mesh, workdir)


def begin(
  config: ConfigDict, workdir: pathlib.Path
) -> tuple[dict | None, ConfigDict | None, tuple[int, ...]]:
  """Checks a config against the run in a workdir, which must be held.

  Returns:
    The result of a run that is finished, else None; the config of one that has begun, else None;
    and the last steps of its earlier cycles.

  Raises:
    ValueError: the workdir holds another run, or can't be written into.
  """
  checkpoint.set_aside_damaged(workdir)
  start, finished, saved, cycles = checkpoint.latest_step(workdir), None, None, ()
  if start is not None:
    item = checkpoint.restore_item(workdir, start, 'config')
    saved = config_lib.from_dict(item['config'])
    config_lib.check_same_run(saved, config, workdir)
    cycles = add_cycle(config, item, start, workdir)
    finished = cluster.from_first(lambda: finished_result(config, workdir))
    if finished and finished.get('steps') != start:  # its last checkpoint is gone
      finished = None
  if not finished:
    cluster.from_first(lambda: output.check_folder(workdir))
    if start is not None:
      check_rules(item, workdir)
  return finished, saved, cycles


def check_rules(item: dict, workdir: pathlib.Path) -> None:
  """Raises ValueError for a run of 0.1.0 that depends on a rule that has changed since.

  `experiment.from_config` refuses those on folders, of which other files are held out now.

  Args:
    item: the item `config` of the newest checkpoint. 0.1.0 wrote no version into it.
    workdir: of the run.
  """
  optimizer, data = item['config']['optimizer'], item['config']['data']
  changed = {
    'Muon decayed neither the embedding nor the head': optimizer['name'] == 'muon',
    'data.crop left some images whole': data['cache'] == 'memory' and data['crop'] < 1,
  }
  reasons = [reason for reason, depends in changed.items() if depends]
  if 'version' not in item and reasons:
    raise ValueError(
      f'{workdir} holds a run of version 0.1.0, in which {" and ".join(reasons)}. It can be '
      'evaluated and used, but not resumed. Start a new run in another --workdir, from these '
      f'weights if you like: --config.init={workdir}'
    )


def add_cycle(config: ConfigDict, item: dict, start: int, workdir: pathlib.Path) -> tuple[int, ...]:
  """The last steps of a run's earlier cycles; more epochs on a finished run add one.

  Args:
    config: the one given.
    item: the item `config` of the newest checkpoint.
    start: the step of this checkpoint.
    workdir: of the run.

  Raises:
    ValueError: other epochs for a run that is not finished, or fewer for one that is.
  """
  saved, examples = config_lib.from_dict(item['config']), item['task']['train_examples']
  then, now = experiment.length(saved, examples), experiment.length(config, examples)
  cycles = tuple(item.get('cycles', ()))
  if now == then:
    return cycles
  if start < then:
    raise ValueError(
      f'{workdir} is at step {start} of {then}: epochs={saved.epochs:g} can not become '
      f'{config.epochs:g} before the run is finished, because the learning rate of each step '
      f'depends on it. Resume with --config.epochs={saved.epochs:g}; more epochs are possible '
      'once the run is finished.'
    )
  if now < start:
    raise ValueError(
      f'{workdir} is at step {start} already, and epochs={config.epochs:g} ends at step {now}: '
      f'give more than epochs={saved.epochs:g}, or another --workdir.'
    )
  return (*cycles, then) if then else ()


def fit(
  exp: experiment.Experiment,
  training: experiment.Training,
  mesh: jax.sharding.Mesh,
  workdir: pathlib.Path,
  **notes: object,
) -> dict:
  """Runs the loop in a workdir, from where it stands there; returns its result.

  Args:
    exp: what is trained.
    training: on what and how, and from which weights.
    mesh: of the devices.
    workdir: a folder that is held.
    **notes: put into `result.json` as they are.
  """
  config, start = exp.config, checkpoint.latest_step(workdir)
  with (
    intact(workdir),
    cluster.Preemption() as preemption,  # also while the others end
    (writer.Writer if cluster.is_first() else writer.Silent)(workdir, start or 0) as records,
    checkpoint.Checkpoints(workdir, config.keep_checkpoints) as checkpoints,
  ):
    return Run(exp, training, mesh, records, checkpoints, preemption, notes).run()


@contextlib.contextmanager
def intact(workdir: pathlib.Path) -> Iterator[None]:
  """Adds to an `output.Unwritten` what is left of the run in a workdir."""
  try:
    yield
  except output.Unwritten as error:
    whole = next(iter(checkpoint.steps(workdir)), None)
    left = 'No checkpoint had been saved: the same command starts again.'
    if whole is not None:
      left = f'The checkpoint of step {whole} is whole: the same command resumes from it.'
    raise output.Unwritten(f'{error} {left}') from error


def saved_config(workdir: pathlib.Path, overrides: dict[str, str]) -> ConfigDict:
  """The config of the run in a workdir, with overrides.

  It is that of the newest checkpoint, and `config.json` only where there is no checkpoint. The
  epochs of a cycle that has saved no checkpoint yet are also those of `config.json`.

  Raises:
    ValueError: there is no run.
  """
  item = checkpoint.newest_config(workdir)
  written = cluster.from_first(lambda: writer.read_json(workdir / 'config.json'))
  saved = item['config'] if item else written
  if item and written:
    steps = experiment.length(config_lib.from_dict(saved), item['task']['train_examples'])
    if item['step'] == steps:  # finished, so nothing but more epochs can have been begun
      saved = saved | {'epochs': max(saved['epochs'], written.get('epochs', 0))}
  if saved is None:
    raise ValueError(
      f'{workdir} holds no run to go on with: give --config, e.g. configs/digits.py.'
    )
  return config_lib.override_all(config_lib.from_dict(saved), overrides)


def finished_result(config: ConfigDict, workdir: pathlib.Path) -> dict | None:
  """`result.json` of a run that has done `config.epochs` and no more; None of any other."""
  result = writer.read_json(workdir / 'result.json')
  try:
    then = config_lib.from_dict(result['config'])
  except (TypeError, KeyError, ValueError):  # none, damaged, or another version's
    return None
  same = then.epochs == config.epochs and then.data.eval_split == config.data.eval_split
  return result if same else None


class Run:
  """The loop: from the newest checkpoint, or the beginning, to the end."""

  def __init__(self, exp, training, mesh, records, checkpoints, preemption, notes):
    self.exp, self.training, self.mesh = exp, training, mesh
    self.records, self.checkpoints, self.notes = records, checkpoints, notes
    self.preemption = preemption
    self.config = exp.config
    self.eval_step = evaluate.make_eval_step(exp, mesh)
    self.began = time.perf_counter()  # of the whole run: moved back by what was done before

  def run(self) -> dict:
    """Trains to the end and writes `result.json`."""
    few = sharding.few_devices(**experiment.division(self.config))
    if few:
      log.warning(few)
    train_state = self.initial_state()
    start, steps = int(train_state.step), self.training.steps
    if start < steps:
      self.log_cycle()
      train_state, scores = self.loop(train_state, start, steps)
    else:
      scores = self.evaluate_start(start, train_state)
      if self.checkpoints.latest() is None:
        self.save(train_state, scores)
    return self.finish(train_state, scores)

  def loop(self, train_state: state.TrainState, start: int, steps: int):
    """Steps `start + 1` to `steps`; returns the state and the last scores."""
    config, examples = self.config, self.training.train
    over_batch = sharding.over_batch(self.mesh)
    batches = data.train_batches(examples, config.batch_size, config.seed, start, over_batch)
    scores = self.evaluate_start(start, train_state) if self.owes_evaluation(start) else {}
    late = None
    with contextlib.ExitStack() as stack:
      stack.enter_context(contextlib.closing(batches))  # which ends what reads them
      batch, size = next(batches), self.size_of(start + 1)
      train_step, meter = self.compile(train_state, batch, size), Meter()
      bar = stack.enter_context(progress.counter(initial=start, total=steps, unit='step'))
      for step in range(start + 1, steps + 1):
        if step > start + 1:
          with meter.waiting():
            batch = next(batches)
        if self.size_of(step) != size:
          meter.pause()
          size = self.size_of(step)
          train_step = self.compile(train_state, batch, size)
          meter.go_on()
        train_state, metrics = train_step(train_state, batch)
        if step == start + 1:
          jax.block_until_ready(metrics)  # once, for whoever waits for it
          log.info('First step done.')
        if late:
          meter.add(*late)
        late = step, metrics
        bar.update()
        stop = self.preemption.is_due() and step < steps
        events = self.due(step)
        if not events and not stop:
          continue
        meter.add(*late)
        late = None
        if 'log' in events:
          self.log(step, meter.read(), bar)
        if stop:  # an evaluation may take longer than there is time: the next start makes up for it
          self.save(train_state, {})
          self.checkpoints.wait()
          raise cluster.Preempted(f'Asked to stop: step {step} of {steps} is saved.')
        meter.pause()
        if 'save' in events and not self.training.val:  # first: bad data would end the evaluation
          self.save(train_state, {})
        if 'eval' in events:
          scores = self.evaluate(step, train_state)
        if 'save' in events and self.training.val:
          self.save(train_state, scores)
        meter.go_on()
    return train_state, scores

  def log_cycle(self) -> None:
    """Logs what the cycle that more epochs have added does."""
    if not (cycles := self.training.cycles):
      return
    config, begin, end = self.config, cycles[-1], self.training.steps
    warmup = experiment.warmup_steps(config, len(self.training.train), end - begin)
    log.info(
        'Cycle %d, steps %d to %d: %d steps of warm-up to a learning rate of %g, then %s; crops '
        'and flips only.', len(cycles) + 1, begin + 1, end, warmup,
        experiment.LATER_PEAK * config.optimizer.lr, config.schedule.name,
    )  # fmt: skip

  def owes_evaluation(self, start: int) -> bool:
    """Whether the run was asked to stop after a step that an evaluation is due after."""
    due = start > 0 and 'eval' in self.due(start)
    return due and not cluster.from_first(lambda: self.records.find(start, 'test'))

  def evaluate_start(self, start: int, train_state: state.TrainState) -> dict[str, dict]:
    """Evaluates the checkpoint that the run resumes from, which was saved before that."""
    self.records.keep(lambda line: line['split'] == 'train' or line['step'] != start)
    scores = self.evaluate(start, train_state)
    self.checkpoints.rate(start, scores.get('val', {}).get('accuracy'))
    return scores

  def initial_state(self) -> state.TrainState:
    """From the newest checkpoint, else from the weights of `init`, else random."""
    fresh = state.init_state(
      self.exp.model,
      self.training.optimizer,
      self.exp.image_shape,
      self.config.seed,
      self.config.ema > 0,
      self.mesh,
      self.config.freeze,
    )
    if self.checkpoints.latest() is not None:
      leaves, saved = self.checkpoints.restore(fresh)
      self.began -= saved['seconds']
      restored = sharding.place(jax.tree.unflatten(jax.tree.structure(fresh), leaves), fresh)
      log.info('Going on from step %d.', restored.step)
      return restored
    overview = parameter_overview.get_parameter_overview(fresh.params, include_stats=False)
    writer.DETAILS.info('%s', overview)
    if self.training.params is None:
      return fresh
    weights = sharding.place(self.training.params, fresh.params)
    ema = jax.tree.map(jnp.copy, weights) if self.config.ema else None
    return fresh.replace(params=weights, ema=ema)

  def size_of(self, step: int) -> tuple[int, int]:
    """(height, width) of the images of a step, the first being 1."""
    return next(size for end, size in self.training.stages if step <= end)

  def compile(self, train_state: state.TrainState, batch: dict, size: tuple[int, int]) -> TrainStep:
    """Compiles ahead, so that images per second are those of training alone."""
    began, exp = time.perf_counter(), self.exp.at(size)
    with progress.announced('Compiling the training step ...'):
      step = make_train_step(exp, self.training, self.mesh).lower(train_state, batch).compile()
    seconds = time.perf_counter() - began
    devices = f'{self.mesh.size} {jax.default_backend()} device(s)'
    log.info(
        'Compiled in %.1f s for images of %dx%d; training %d steps on %s.',
        seconds, *size, self.training.steps, devices,
    )  # fmt: skip
    platform.work_unit().set_notes(f'{self.config.model.variant} on {devices}')
    return step

  def due(self, step: int) -> set[str]:
    """What follows this step; a checkpoint needs the held-out score that it is chosen by."""
    config, last = self.config, step == self.training.steps
    every = {'log': config.log_every, 'eval': config.eval_every, 'save': config.checkpoint_every}
    events = {name for name, n in every.items() if last or (n and step % n == 0)}
    return events | {'eval'} if 'save' in events and self.training.val else events

  def log(self, step: int, values: dict[str, float], bar: tqdm.tqdm) -> None:
    """A line of training metrics."""
    self.records.write(step, 'train', **values)
    bar.set_postfix_str(
      f'loss {values["loss"]:.3f}, accuracy {values["accuracy"]:.1%}, '
      f'{values["images_per_second"]:,.0f} images/s'
    )

  def evaluate(self, step: int, train_state: state.TrainState) -> dict[str, dict]:
    """The scores of each split that is not trained on, written to the records."""
    scores = {}
    for split in ('val', 'test'):
      examples = getattr(self.training, split)
      if examples is None:
        continue
      values = self.score(train_state.eval_params, examples)
      if train_state.ema is not None:  # the weights that are not averaged, to compare
        raw = self.score(train_state.params, examples)
        values |= {f'raw_{name}': raw[name] for name in ('loss', 'accuracy')}
      self.records.write(step, split, **values)
      log.info(
          'Step %d: %s accuracy %.2f%%, loss %.4f on %d examples.',
          step, split, 100 * values['accuracy'], values['loss'], values['examples'],
      )  # fmt: skip
      scores[split] = values
    return scores

  def score(self, params: dict, examples: experiment.Split) -> dict[str, float]:
    """Loss and accuracies of these weights."""
    return evaluate.evaluate(
      self.eval_step, params, examples, self.config.eval_batch_size, self.mesh
    )

  def save(self, train_state: state.TrainState, scores: dict[str, dict]) -> None:
    """A checkpoint, with the held-out accuracy where there is one: never that on test."""
    saved = self.exp.saved() | {
      'cycles': self.training.cycles,
      'seconds': time.perf_counter() - self.began,
    }
    self.checkpoints.save(train_state, saved, scores.get('val', {}).get('accuracy'))

  def finish(self, train_state: state.TrainState, scores: dict[str, dict]) -> dict:
    """Writes `result.json`, once the last checkpoint is on disk."""
    self.checkpoints.wait()
    result = {
      'test_accuracy': scores['test']['accuracy'],
      'test_loss': scores['test']['loss'],
      'examples': scores['test']['examples'],
      'steps': int(train_state.step),
      'seconds': round(time.perf_counter() - self.began, 1),
      'params': sum(leaf.size for leaf in jax.tree.leaves(train_state.params)),
      'config': config_lib.to_dict(self.config),
    } | self.notes
    if 'val' in scores:
      result['val_accuracy'] = scores['val']['accuracy']
      result |= cluster.from_first(lambda: self.last_and_best(result['steps']))
    self.records.result(result)
    return result

  def last_and_best(self, last: int) -> dict[str, dict]:
    """Step and accuracies of the last checkpoint, and of the best by validation accuracy."""

    def accuracies(step):
      splits = {'val_accuracy': 'val', 'test_accuracy': 'test'}
      found = {name: self.records.find(step, split) for name, split in splits.items()}
      return {'step': step} | {name: line.get('accuracy') for name, line in found.items()}

    return {'last': accuracies(last), 'best': accuracies(self.checkpoints.best())}


def record(
  exp: experiment.Experiment, workdir: pathlib.Path, test: experiment.Split | None = None
) -> None:
  """Writes `config.json`, and `examples/` of the test images, once the data has been checked.

  The workdir must be held: these are the first files that a run writes.

  Raises:
    ValueError: the run can't be resumed with this data.
  """
  cluster.check_same('data', dataclasses.asdict(exp.task))
  experiment.check_same_data(exp, workdir)
  if cluster.is_first():
    writer.write_json(workdir / 'config.json', config_lib.to_dict(exp.config))
    if test is not None:
      save_examples(exp, test, workdir)


def save_examples(
  exp: experiment.Experiment, test: experiment.Split, workdir: pathlib.Path
) -> None:
  """A few images of the test split as PNG files, to try `predict` on."""
  folder = workdir / 'examples'
  folder.mkdir(parents=True, exist_ok=True)
  first = test.some(range(min(8, len(test))))
  for i, (image_HWC, label) in enumerate(zip(first.image_NHWC, first.label_N)):
    known = sys.getfilesystemencoding()  # which may lack some letters
    name = exp.task.class_names[label].encode(known, 'replace').decode(known)
    name = re.sub(r'\W+', '-', name)
    image.save(image_HWC, folder / f'{i}_{name}.png')
