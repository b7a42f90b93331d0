"""Trains students: the images of the teacher, exact resuming, cached logits, wrong teachers."""

import copy
import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import assert_equal, call, error, init_params, run_model, small_config
import vit_jax
from vit_jax import inherit, opening
from vit_jax.augment import pipeline
from vit_jax.data.source import Source
from vit_jax.distributed import devices, sharding
from vit_jax.evaluation import teaching
from vit_jax.experiment import mesh_for
from vit_jax.optim.objectives import distilled, heads
from vit_jax.training import closed_form, loop, state, tracing, trainer
from vit_jax.training.loop import Run
from vit_jax.training.step import loss_fn, make_train_step
from vit_jax.workdir import stored, trained, writer

KEY = jax.random.key(3)
TOKEN = {'model.pool': 'distilled', 'model.num_registers': '1', 'distill.kind': 'hard'}
STILL = {'augment.flip.probability': '0'}  # nothing random changes an image
SGD = {'optimizer.name': 'sgd', 'optimizer.lr': '0.1'}  # Adam would enlarge rounding errors
SOURCE = Source({}, tuple(f'pattern {i}' for i in range(10)), 3, None)
MIXED = {'augment.mix.probability': '1'}


@pytest.fixture(scope='session')
def teacher(trained):
  """The workdir of a teacher that is deeper than its students, and sees smaller images."""
  return trained[0]


def student(teacher, **overrides):
  settings = {'distill.teacher': str(teacher), 'distill.temperature': '2'}
  settings |= {'model.depth': '1', 'data.image_size': '12', 'data.mean': '0.4', 'data.std': '0.3'}
  return small_config(**settings | overrides)


def randomized(params):
  """Adds noise to all parameters, because a head of zeros would hide gradients."""
  draw = np.random.RandomState(0).normal
  return jax.tree.map(lambda x: np.asarray(x + 0.1 * draw(size=x.shape), np.float32), params)


def opened(teacher, **overrides):
  """Returns an experiment, random parameters, and a batch of 8 images."""
  exp, training = opening.from_config(student(teacher, **overrides))
  params = randomized(init_params(exp.model, jnp.zeros((1, *exp.image_shape))))
  first = training.train.some(range(8))
  batch = {'image': first.image_NHWC, 'label': first.label_N, 'example': jnp.arange(8)}
  return exp, params, batch


@pytest.mark.slow
def test_the_teacher_sees_the_augmented_images_at_its_own_size(teacher):
  exp, params, batch = opened(teacher, **MIXED)
  seen, blank, frozen = [], jnp.zeros((8, 8, 8, 3)), {'teacher': exp.teacher.params}
  spy = dataclasses.replace(exp.teacher, normalize=lambda x: seen.append(x) or blank)
  spying = dataclasses.replace(exp, teacher=spy)

  @jax.jit
  def images(batch):
    """Returns the images of the teacher, the augmented images, and the weights of the mixing."""
    loss_fn(batch, params, frozen, KEY, None, spying)
    arguments = exp.config.augment.to_dict()
    image_key, _ = jax.random.split(KEY)
    return *seen, *pipeline.augment_and_mix(
      image_key, batch['example'], batch['image'], arguments, early=None
    )

  found, want, own_B = images(batch)
  np.testing.assert_array_equal(found, want)
  assert (np.asarray(want) != batch['image']).any() and (own_B < 1).any()

  model, weights = vit_jax.load(teacher)
  image_BHWC = jax.image.resize(batch['image'] / 255.0, (8, 8, 8, 3), 'cubic')
  want = run_model(model, weights, (image_BHWC - 0.5) / 0.5)
  found = jax.jit(exp.teacher.logits)(frozen, batch)
  np.testing.assert_allclose(found, want, atol=1e-4)
  assert abs(found).max() > 0.5


@pytest.mark.slow_after_first
@pytest.mark.parametrize('kind', ['soft', 'hard'])
def test_the_loss_is_the_weighted_mean_of_labels_and_teacher(teacher, kind):
  overrides = STILL | {'distill.kind': kind, 'distill.weight': '0.3', 'model.stochastic_depth': '0'}
  exp, params, batch = opened(teacher, **overrides)
  frozen = {'teacher': exp.teacher.params}

  @jax.jit
  def compute(params, frozen, batch):
    logits_BL = exp.logits(params, batch), exp.teacher.logits(frozen, batch)
    return *loss_fn(batch, params, frozen, KEY, None, exp), *logits_BL

  loss, score, *logits = compute(params, frozen, batch)
  z_BL, t_BL = (np.asarray(x_BL, np.float64) for x_BL in logits)
  log_p = lambda x_BL: x_BL - np.log(np.exp(x_BL).sum(1, keepdims=True))
  rows, label_B = np.arange(8), np.asarray(batch['label'])
  taught_B = {
    'soft': 4 * (np.exp(log_p(t_BL / 2)) * (log_p(t_BL / 2) - log_p(z_BL / 2))).sum(1),
    'hard': -log_p(z_BL)[rows, t_BL.argmax(1)],
  }[kind]
  want = (0.7 * -log_p(z_BL)[rows, label_B] + 0.3 * taught_B).sum() / 32
  assert float(loss) == pytest.approx(want, rel=1e-5)
  assert float(score.accuracy.compute()) == (z_BL.argmax(1) == label_B).mean()
  assert (taught_B > 0.1).any()


@pytest.mark.slow
@pytest.mark.parametrize('weight, own', [('0', 0), ('1', 1)])
def test_each_head_learns_from_its_own_targets_only(teacher, weight, own):
  exp, params, batch = opened(teacher, **TOKEN | {'distill.weight': weight})
  frozen = {'teacher': exp.teacher.params}
  grad = lambda params: loss_fn(batch, params, frozen, KEY, None, exp)[0]
  kernel = jax.jit(jax.grad(grad))(params)['head']['kernel']
  class_head, distillation_head = np.split(np.asarray(kernel), 2)
  taught, untaught = (class_head, distillation_head)[:: -1 if own else 1]
  assert abs(taught).max() > 1e-3 and not untaught.any()


@pytest.mark.slow
def test_the_training_scores_are_those_of_the_mean_of_both_heads(teacher):
  exp, params, batch = opened(teacher, **STILL | TOKEN)
  params |= {'teacher': exp.teacher.params}
  both = jax.jit(lambda params, batch: heads(exp, params, batch, KEY))(params, batch)
  found = jax.jit(lambda params, batch: distilled(exp, params, batch, KEY)[1])(params, batch)
  np.testing.assert_allclose(found, (both[0] + both[1]) / 2, atol=1e-5)
  assert abs(found - both[0]).max() > 0.1


@pytest.mark.slow
def test_without_a_teacher_a_distillation_token_is_trained_as_before(teacher):
  exp, params, batch = opened(teacher, **TOKEN)
  alone = dataclasses.replace(exp, teacher=None)
  split = jax.jit(
    lambda params, batch: (heads(alone, params, batch, KEY), heads(exp, params, batch, KEY))
  )
  (first, second), both = split(params, batch)
  np.testing.assert_array_equal(first, second)
  np.testing.assert_allclose((both[0] + both[1]) / 2, first, atol=1e-5)
  assert abs(both[0] - both[1]).max() > 0.01


@pytest.mark.slow
def test_a_student_equal_to_its_teacher_learns_nothing(teacher):
  overrides = {'init': str(teacher), 'distill.weight': '1', 'model.stochastic_depth': '0'}
  overrides |= {'data.image_size': '8', 'data.mean': 'None', 'data.std': 'None'}
  overrides |= {'model.depth': '2'}
  exp, training = opening.from_config(student(teacher, **overrides))
  first = training.train.some(range(8))
  batch = {'image': first.image_NHWC, 'label': first.label_N, 'example': jnp.arange(8)}
  frozen = {'teacher': exp.teacher.params}
  function = lambda params: loss_fn(batch, params, frozen, KEY, None, exp)[0]
  loss, grads = jax.jit(jax.value_and_grad(function))(training.params)
  assert abs(float(loss)) < 1e-6
  assert max(abs(x).max() for x in jax.tree.leaves(grads)) < 1e-6


def two_steps(teacher, parts=1, shape=None, **overrides):
  """Returns the plan, and parameters and metrics after two steps."""
  sizes = {f'mesh.{axis}': str(size) for axis, size in (shape or {'data': 1}).items()}
  config = student(teacher, micro_batches=str(parts), **sizes, **overrides)
  exp, training = opening.from_config(config)
  mesh = mesh_for(exp.config)
  exp, training = teaching.with_teacher(exp, training, mesh, pathlib.Path('none'))
  now = state.init_state(exp, training, mesh)
  now = now.replace(params=sharding.place_params(mesh, randomized(jax.device_get(now.params))))
  step = make_train_step(exp, training, mesh)
  batches = loop.train_batches(training.train, 32, 0, 0, sharding.batch_sharding(mesh))
  for _ in range(2):
    now, metrics = step(now, next(batches), teacher=training.teacher)
  return training, jax.device_get(now.params), jax.device_get(metrics)


@pytest.mark.long
@pytest.mark.parametrize(
  'parts, shape', [(4, {'data': 1}), (2, {'data': 2}), (1, {'data': 1, 'fsdp': 2})]
)
def test_micro_batches_and_devices_do_not_change_a_student(teacher, parts, shape, monkeypatch):
  monkeypatch.setattr(sharding, 'SPLIT_FROM', 256)
  overrides = MIXED | TOKEN | SGD | {'model.dropout': '0.1'}
  _, want, metrics = two_steps(teacher, **overrides)
  training, found, same = two_steps(teacher, parts, shape, **overrides)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, want)
  assert float(same['grad_norm']) == pytest.approx(float(metrics['grad_norm']), rel=1e-4)
  kernel = training.teacher['block_0']['mlp']['up']['kernel']
  assert kernel.addressable_shards[0].data.size == kernel.size // shape.get('fsdp', 1)


@pytest.mark.slow
@pytest.mark.slow_after_first
@pytest.mark.parametrize('overrides', [MIXED, STILL | TOKEN], ids=['augmented', 'cached'])
def test_a_student_resumes_bit_for_bit(teacher, tmp_path, overrides):
  overrides = overrides | {'ema': '0.9', 'checkpoint_every': '8'}
  whole = trainer.train(student(teacher, **overrides), tmp_path / 'whole')

  def stop(*_):
    raise KeyboardInterrupt

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Run, 'log', lambda self, step, *_: stop() if step == 24 else None)
    with pytest.raises(KeyboardInterrupt):
      trainer.train(student(teacher, **overrides), tmp_path / 'cut')
  assert stored.latest_step(tmp_path / 'cut') == 16
  resumed = trainer.train(student(teacher, **overrides), tmp_path / 'cut')
  assert resumed['test_loss'] == whole['test_loss'] and resumed['steps'] == 32
  for item in ('params', 'state'):
    assert_equal(*(stored.restore_item(tmp_path / name, 32, item) for name in ('whole', 'cut')))


@pytest.mark.slow
def test_cached_logits_give_the_same_student_as_a_teacher_in_each_step(teacher, tmp_path):
  cached = trainer.train(student(teacher, **STILL | SGD), tmp_path / 'cached')
  real = inherit.open_teacher

  def uncached(*arguments):
    found, names = real(*arguments)
    assert found.cached
    return dataclasses.replace(found, cached=False), names

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(inherit, 'open_teacher', uncached)
    plain = trainer.train(student(teacher, **STILL | SGD), tmp_path / 'plain')
  assert (tmp_path / 'cached' / 'features').exists()
  assert not (tmp_path / 'plain' / 'features').exists()
  a, b = (stored.load_checkpoint(tmp_path / name)[1] for name in ('cached', 'plain'))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), a, b)
  lines = [writer.read_metrics(tmp_path / run) for run in ('cached', 'plain')]
  for a, b in zip(*lines, strict=True):
    assert a['step'] == b['step'] and a['loss'] == pytest.approx(b['loss'], abs=1e-4)
  assert cached['test_accuracy'] == pytest.approx(plain['test_accuracy'], abs=0.01)


@pytest.mark.slow
def test_logits_belong_to_their_examples(teacher, tmp_path):
  exp, training = opening.from_config(student(teacher, **STILL))
  mesh = devices.make_mesh(32)
  exp, training = teaching.with_teacher(exp, training, mesh, tmp_path)
  assert training.teacher is None  # the devices do not hold the teacher
  batches = loop.train_batches(training.train, 32, 0, 30, sharding.batch_sharding(mesh))
  run = jax.jit(exp.teacher.logits)
  for _ in range(3):  # into the second epoch
    batch = next(batches)
    without = {name: x for name, x in batch.items() if name != 'teacher'}
    want = run({'teacher': exp.teacher.params}, without)
    np.testing.assert_allclose(batch['teacher'], want, atol=1e-4)
  batches.close()


@pytest.mark.slow
def test_cached_logits_of_a_knn_head_and_of_a_scaled_head_are_those_of_the_model(trained, tmp_path):
  knn = closed_form.classifier_config(opening.Request(trained[0]), 'knn')
  trainer.train(knn, tmp_path / 'knn')
  trainer.train(small_config(**{'model.cosine': 'true'}), tmp_path / 'scaled')
  for name in ('knn', 'scaled'):
    exp, training = opening.from_config(student(tmp_path / name, **STILL))
    first = training.train.some(range(50))
    logits_NL = teaching.compute_logits(exp, first, devices.make_mesh(8), tmp_path / 'features')
    batch = {'image': first.image_NHWC}
    want = jax.jit(exp.teacher.logits)({'teacher': exp.teacher.params}, batch)
    np.testing.assert_allclose(logits_NL, want, atol=1e-3)
    assert abs(logits_NL).max() > 0.1


@pytest.mark.slow
def test_published_weights_teach_images_smaller_than_their_patches(tmp_path, monkeypatch):
  monkeypatch.setattr(teaching, 'ROWS', 3)  # three parts of the eight images
  path = 'tests/fixtures/hf_deit'  # patches of 7x7 pixels
  four = dataclasses.replace(SOURCE, class_names=tuple('abcd'))
  found, _ = inherit.open_teacher(student(path, **STILL), four)
  exp, training = opening.from_config(student('', **STILL, **{'data.image_size': '4'}))
  exp, first = dataclasses.replace(exp, teacher=found), training.train.some(range(8))
  logits_NL = teaching.compute_logits(exp, first, devices.make_mesh(8), tmp_path)
  want = jax.jit(found.logits)({'teacher': found.params}, {'image': first.image_NHWC})
  np.testing.assert_allclose(logits_NL, want, atol=1e-4)
  assert abs(logits_NL).max() > 0.1


@pytest.mark.parametrize('overrides, cached', [
  (STILL, True), ({}, False), (STILL | {'data.skip_bad_images': 'true'}, False),
  (STILL | {'augment.mix.probability': '0.1'}, False),
])  # fmt: skip
def test_logits_are_cached_only_if_every_example_keeps_its_image(teacher, overrides, cached):
  assert inherit.open_teacher(student(teacher, **overrides), SOURCE)[0].cached == cached


@pytest.fixture
def taught(teacher, tmp_path):
  """A finished student and a copy of its teacher: (workdir, teacher's workdir)."""
  copied = shutil.copytree(teacher, tmp_path / 'teacher')
  trainer.train(student(copied, epochs='0.25'), tmp_path / 'student')
  return tmp_path / 'student', copied


@pytest.mark.slow
def test_a_checkpoint_names_the_teacher_and_does_not_contain_it(taught, capsys):
  workdir, copied = taught
  saved = stored.newest_config(workdir)
  found = stored.load_checkpoint(copied)[1]
  leaves = jax.tree_util.tree_leaves_with_path(found)
  assert saved['teacher'] == inherit.digest(found) and len(leaves) > 10
  params = stored.restore_item(workdir, 8, 'params')
  assert sorted(params) == sorted(stored.restore_item(copied, 32, 'params').keys() - {'block_1'})
  shutil.rmtree(copied)  # only training needs the teacher
  assert not call(capsys, '--mode=eval', f'--workdir={workdir}')[0]
  assert 'Teacher: not included' in call(capsys, '--mode=inspect', f'--workdir={workdir}')[1]
  assert 'no such file' in error(capsys, f'--workdir={workdir}', '--config.epochs=0.5')


@pytest.mark.slow
def test_a_changed_teacher_is_refused(teacher, taught, tmp_path):
  workdir, copied = taught
  more = student(copied, epochs='0.5')
  trainer.train(copy.deepcopy(more), shutil.copytree(workdir, tmp_path / 'same'))
  shutil.rmtree(copied)
  trainer.train(small_config(seed='1', epochs='0.1'), copied)
  with pytest.raises(ValueError, match='distill.teacher=.* changed since this run began .SHA-256'):
    trainer.train(copy.deepcopy(more), workdir)
  with pytest.raises(ValueError, match='different config(.|\n)*distill.teacher'):
    trainer.train(student(teacher, epochs='0.5'), workdir)


@pytest.mark.parametrize('source, message', [
  ({'class_names': tuple('abc')}, r'has 10 classes \(pattern 0, pattern 1, .*\), but '
   r'data.source=synthetic has 3 \(a, b, c\). '
   'Classes in only one of the two lists: a, b, c, pattern 0'),
  ({'class_names': SOURCE.class_names[::-1]}, 'The order differs. Use a teacher'),
  ({'channels': 1}, r'expects images with 3 channel\(s\), but the images of .* have 1'),
])  # fmt: skip
def test_a_teacher_for_other_data_is_refused(teacher, source, message):
  with pytest.raises(ValueError, match=message):
    inherit.open_teacher(student(teacher), dataclasses.replace(SOURCE, **source))


def test_a_teacher_without_a_head_is_refused(capsys, tmp_path):
  path = 'tests/fixtures/hf_backbone'
  with pytest.raises(ValueError, match=f'distill.teacher={path} has no head, so it cannot teach'):
    inherit.open_teacher(student(path), SOURCE)


@pytest.mark.parametrize('several', [False, True])
def test_a_teacher_that_was_trained_with_the_sigmoid_loss_is_refused(teacher, monkeypatch, several):
  found = inherit.read_weights(str(teacher))
  run = copy.deepcopy(found.run)
  run['config']['loss']['name'] = 'softmax' if several else 'sigmoid'
  found = dataclasses.replace(found, run=None if several else run, multi_label=several)
  monkeypatch.setattr(inherit, 'read_weights', lambda path: found)
  with pytest.raises(ValueError, match='was trained with the loss sigmoid, as for images with'):
    inherit.open_teacher(student(teacher), SOURCE)


def test_unnamed_classes_are_compared_by_their_number(teacher):
  path = 'tests/fixtures/hf_classifier'
  found = vit_jax.load(path)
  count = found.model.num_classes
  named = found.class_names or tuple(map(str, range(count)))
  size = {'data.image_size': '32'}
  taught, _ = inherit.open_teacher(
    student(path, **size), dataclasses.replace(SOURCE, class_names=named)
  )
  assert taught.model.num_classes == count


@pytest.mark.parametrize('overrides, message', [
  ({'freeze': 'backbone'}, 'distill.teacher cannot be combined with freeze'),
  ({'loss.name': 'sigmoid'}, 'distill.teacher cannot be combined with loss.name=sigmoid'),
  (TOKEN | {'model.representation_size': '8'}, 'cannot be combined with model.representation_size'),
  ({'distill.kind': 'sofd'}, "distill.kind: unknown 'sofd'. Did you mean soft"),
  ({'distill.temperature': '0'}, 'distill.temperature must be from 0.01'),
  ({'distill.weight': '1.5'}, 'distill.weight must be from 0 to 1'),
  ({'distill.teacher': '/nowhere'}, '/nowhere: no such file or folder'),
])  # fmt: skip
def test_wrong_keys_are_rejected_and_leave_no_files(teacher, tmp_path, overrides, message):
  with pytest.raises(ValueError, match=message):
    trainer.train(student(teacher, **overrides), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_images_that_the_teacher_was_trained_on_are_not_test_images(teacher):
  names = trained.TrainingFiles(own_splits=(('synthetic', 'test'),))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(inherit, 'names_of', lambda loaded: names)
    with pytest.raises(ValueError, match="'test' shares examples with 'test' of synthetic"):
      opening.from_config(student(teacher))
  exp, _ = opening.from_config(student(teacher))
  assert exp.names.inherited_splits == (('synthetic', 'train'),)


def test_inherited_files_of_two_trainings_are_joined():
  files = lambda *numbers: np.array(numbers, np.uint64)
  one = trained.TrainingFiles(files(1), files(2), files(9), (('a', 'train'),))
  two = trained.TrainingFiles(files(2, 3), files(4), files(8), (('b', 'train'),), (('c', 'x'),))
  both = one.with_inherited(two)
  assert_equal(both.all_N, files(1, 2, 3, 4))
  assert_equal(both.own_N, files(1))
  assert_equal(both.shared_N, files(8, 9))
  assert both.all_splits == (('a', 'train'), ('b', 'train'), ('c', 'x'))


@pytest.mark.slow
@pytest.mark.parametrize('overrides, runs', [({}, 1), (MIXED, 1), (TOKEN, 1), (STILL, 0)])
def test_flops_of_a_step_include_one_pass_of_the_teacher(teacher, overrides, runs):
  exp, params, _ = opened(teacher, **overrides)
  alone = dataclasses.replace(exp, teacher=None)
  image = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
  forward = tracing.forward_flops(exp.teacher.model, exp.teacher.params, image).total()
  found, without = (tracing.model_flops(e, params) for e in (exp, alone))
  assert forward > 0 and found - without == runs * forward


@pytest.mark.slow
def test_inspect_reports_the_teacher(teacher, capsys):
  flags = ['--mode=inspect', '--config=tests/small.py', f'--config.distill.teacher={teacher}']
  _, out, _ = call(capsys, *flags)
  count = sum(x.size for x in jax.tree.leaves(stored.load_checkpoint(teacher)[1]))
  assert f'{count:,} parameters. A training step includes its forward pass' in out
  assert f'teacher {4 * count / 2**20:,.1f} MiB' in out
  _, out, _ = call(capsys, *flags, '--config.augment.flip.probability=0')
  assert 'Teacher: its logits are computed once' in out and 'teacher 0' not in out


@pytest.mark.long
def test_a_student_comes_closer_to_its_teacher_than_without_one(teacher, tmp_path):
  overrides = {'distill.weight': '1', 'epochs': '3', 'eval_every': '0'}
  trainer.train(student(teacher, **overrides), tmp_path / 'taught')
  alone = student('', epochs='3', eval_every='0')
  trainer.train(alone, tmp_path / 'alone')
  exp, _, batch = opened(teacher)
  decision_B = exp.teacher.logits({'teacher': exp.teacher.params}, batch).argmax(1)
  agree = {}
  for name in ('taught', 'alone'):
    run, params, _ = opening.from_workdir(tmp_path / name)
    logits_BL = run.logits(params, batch)
    agree[name] = float(jax.nn.log_softmax(logits_BL)[jnp.arange(8), decision_B].mean())
  assert agree['taught'] > agree['alone'], json.dumps(agree)
