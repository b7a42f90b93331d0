"""Tests the cost of a config against closed formulas and XLA's numbers for compiled programs."""

import dataclasses
import functools
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import works
from tests.conftest import DATA, call, error, small_config
import vit_jax
from vit_jax import config as config_lib
from vit_jax import experiment, opening
from vit_jax.distributed import add_up, devices
from vit_jax.experiment import assemble
from vit_jax.inference import cost, summary
from vit_jax.opening import Request
from vit_jax.optim import plan as plan_lib
from vit_jax.training import init_state, tracing
from vit_jax.training.step import loss_fn


def summarize(**overrides):
  exp, examples, notes = summary.summary_of_config(small_config(**overrides))
  return cost.measure(exp, examples, notes)


def part(found, name):
  return next(part for part in found.parts if part.module == name)


@pytest.mark.slow
@pytest.mark.slow_after_first
@pytest.mark.parametrize('variant', ['tiny', 'b16'])
def test_flops_equal_the_closed_formulas_of_the_benchmarks(variant):
  work = works.Work(f'configs/cifar10.py:{variant}', 'train', 8, 'bfloat16', ())
  config = works.settings(work)
  exp, examples, _ = summary.summary_of_config(config)
  found = cost.measure(exp, examples)
  want = works.flops(**works.sizes(work))
  assert found.parts[-1].gflops == pytest.approx(want['inference'] / 1e9, rel=1e-12)
  assert found.train_flops == want['train']
  config_lib.override(config, 'model.remat', 'full')
  again = cost.measure(summary.summary_of_config(config)[0], examples)
  assert want['train'] < again.train_flops < want['train'] + want['inference']


@pytest.mark.slow
@pytest.mark.parametrize('fields', [
    {'model.pool': 'map', 'model.num_registers': '3'},
    {'model.resnet': '1,1', 'model.patch_size': '16', 'data.image_size': '32'},
], ids=['map', 'hybrid'])  # fmt: skip
def test_flops_are_at_least_80_percent_of_the_count_of_xla(fields):
  sizes = {'model.width': '64', 'model.mlp_dim': '256'}
  exp = summary.summary_of_config(small_config(**sizes | fields))[0]
  image = jax.ShapeDtypeStruct((1, *exp.image_shape), jnp.float32)
  variables = jax.eval_shape(exp.model.init, jax.random.key(0), image)
  theirs = jax.jit(exp.model.apply).lower(variables, image).cost_analysis()['flops']
  ours = cost.measure(exp, None).parts[-1].gflops * 1e9
  assert 0.8 * theirs < ours <= theirs


def test_parameters_and_state_have_the_expected_size(trained):
  _, result = trained
  found = summarize(**{'ema': '0.9'})
  assert found.parts[-1].parameters == result['params']
  assert sum(p.parameters for p in found.parts[:-1]) == result['params']
  size = 4 * result['params']
  assert found.state_bytes['params'] == found.state_bytes['averages'] == size
  assert found.state_bytes['gradients'] == size
  assert 2 * size <= found.state_bytes['optimizer'] < 2 * size + 100  # plus two counters
  assert part(found, 'block_*/mlp').parameters == 2 * (2 * 16 * 32 + 16 + 32)
  half = summarize(**{'optimizer.moment_dtype': 'bfloat16'})
  assert half.state_bytes['optimizer'] < 1.5 * size + 100 and not half.state_bytes['averages']
  assert (found.steps, found.warmup) == (result['steps'], 6)


@pytest.mark.parametrize(
  'axis', ['fsdp', *(pytest.param(x, marks=pytest.mark.slow) for x in ('data', 'tensor'))]
)
def test_the_state_is_the_bytes_that_one_device_holds_in_training(axis):
  sizes = {'data': 1, axis: 2}
  config = small_config(**{
    'model.width': '64', 'model.mlp_dim': '256', 'model.depth': '1', 'ema': '0.9',
    'micro_batches': '1', **{f'mesh.{name}': str(size) for name, size in sizes.items()},
  })  # fmt: skip
  exp, training = opening.from_config(config)
  mesh = experiment.mesh_for(exp.config)
  now = init_state(exp, training, mesh)
  example = {'image': np.zeros((32, 8, 8, 3), np.uint8), 'label': np.zeros(32, np.int32)}
  batch = example | {'example': np.arange(32)}
  gradient = jax.grad(functools.partial(loss_fn, exp=exp), argnums=1, has_aux=True)
  add = jax.jit(
    lambda params: add_up(gradient, mesh, 1)(batch, params, {}, jax.random.key(0), None)
  )
  trees = {
    'params': now.params, 'gradients': add(now.params)[0], 'optimizer': now.opt_state,
    'averages': now.ema, 'teacher': None,
  }  # fmt: skip
  held = {
    name: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
    for name, tree in trees.items()
  }
  found = cost.measure(exp, 1024)
  assert found.state_bytes == held
  whole = 4 * found.parts[-1].parameters
  assert held['params'] == whole if axis == 'data' else held['params'] < 0.7 * whole


def test_inspect_reports_the_warmup_of_the_first_cycle():
  exp, _, _ = summary.summary_of_config(small_config(epochs='3'))
  found = cost.measure(exp, 1024, cycles=(32,))
  assert (found.steps, found.warmup) == (96, 6)  # a fifth of 32
  assert found.notes == (
    'After step 32, the learning rate warms up again, to 0.5 times optimizer.lr.',
  )


def test_inspect_of_a_finished_run_with_more_epochs_shows_both_cycles(trained):
  request = opening.Request(trained[0], overrides={'epochs': '3'})
  found = summary.summary_of(request)
  assert (found.steps, found.warmup) == (96, 6)
  assert 'After step 32, the learning rate warms up again' in found.notes[0]
  with pytest.raises(ValueError, match='already at step 32, but a run with epochs=0.5'):
    summary.summary_of(opening.Request(trained[0], overrides={'epochs': '0.5'}))


@pytest.mark.slow
@pytest.mark.parametrize('fields', [{}, {'model.remat': 'full'}], ids=['kept', 'remat'])
def test_activations_are_close_to_the_memory_of_a_compiled_step(fields):
  sizes = {'model.width': '64', 'model.mlp_dim': '256', 'data.image_size': '32'}
  exp = summary.summary_of_config(small_config(**sizes | fields))[0]
  function = jax.jit(jax.grad(tracing.loss(exp, 64))), jax.jit(jax.grad(tracing.loss(exp, 128)))
  params = jax.eval_shape(exp.model.init, jax.random.key(0), jnp.zeros((1, *exp.image_shape)))[
    'params'
  ]
  small, large = (
    f.lower(params, {}, *tracing.batch(exp, n)).compile().memory_analysis().temp_size_in_bytes
    for f, n in zip(function, (64, 128))
  )
  ours = cost.measure(exp, None).parts[-1].activations_mib * 2**20
  compiled = (large - small) / 64
  if fields:  # recomputed activations also take memory, for one block at a time
    assert ours < compiled < summarize(**sizes).parts[-1].activations_mib * 2**20
  else:
    assert 0.6 * compiled < ours < 1.6 * compiled


def test_the_text_gives_flops_and_bytes_in_the_named_units():
  found = summarize()
  text, step = cost.as_text(found), 32 * found.train_flops  # 32 steps of 32 images
  assert f'Compute per training step: {step / 1e12:.4g} TFLOPs for a batch of 32.' in text
  assert f'Steps: 32 in 1 epochs, {32 * step / 1e15:.4g} PFLOPs in all.' in text
  held = sum(found.state_bytes.values()) + found.activation_bytes
  assert f'State and activations on each device: {held / 2**20:,.1f} MiB.' in text


def test_a_frozen_backbone_keeps_only_features():
  found = summarize(freeze='backbone')
  assert part(found, 'block_*/mlp').activations_mib == 0
  kept = found.parts[-1].activations_mib * 2**20
  assert 4 * 16 <= kept < 4 * 16 + 4 * 20  # the features, and the arrays for the loss of 10 classes
  assert found.state_bytes['gradients'] == 4 * (16 * 10 + 10)
  forward, head = found.parts[-1].gflops, part(found, 'head').gflops
  assert found.train_flops == pytest.approx((forward + head) * 1e9)


def test_remat_dots_keeps_nothing_that_grows_with_the_square_of_the_tokens():
  fields = {'model.remat': 'dots', 'model.depth': '1'}
  few, many = (  # 16 and 64 tokens
    part(summarize(**fields, **{'data.image_size': size}), 'block_*/attention')
    for size in ('16', '32')
  )
  assert many.activations_mib == pytest.approx(4 * few.activations_mib, rel=0.01)


def test_an_array_in_two_shapes_counts_once():
  def program(scale, x):
    y = jnp.sin(x) * scale
    return y.reshape(2, 3), y, y.reshape(6, 1), scale * 2

  closed = jax.make_jaxpr(program)(jnp.ones(()), jnp.ones((6,)))
  found = list(tracing.residuals(closed.jaxpr, closed.jaxpr.invars[1:]))
  assert [size for _, size in found] == [24]  # outputs that do not depend on an image do not count


def test_a_device_holds_one_micro_batch_at_a_time():
  whole = summarize(micro_batches='1')
  parts = summarize(micro_batches='4')
  assert whole.devices == parts.devices == 2
  assert (whole.at_once, parts.at_once) == (16, 4)
  assert whole.activation_bytes == pytest.approx(4 * parts.activation_bytes, abs=4)
  assert whole.activation_bytes == round(16 * whole.parts[-1].activations_mib * 2**20)


def test_devices_that_split_the_heads_hold_every_image_of_the_batch():
  found = summarize(**{'micro_batches': '1', 'mesh.data': '1', 'mesh.tensor': '2'})
  assert (found.devices, found.at_once) == (2, 32)


@pytest.mark.slow
def test_mixing_images_does_not_change_the_cost():
  sizes = {'augment.flip.probability': '0', 'model.stochastic_depth': '0'}
  plain, mixed = summarize(**sizes), summarize(**sizes | {'augment.mix.probability': '1'})
  assert mixed.train_flops == plain.train_flops
  np.testing.assert_allclose(
    mixed.parts[-1].activations_mib, plain.parts[-1].activations_mib, rtol=0.02
  )


def test_the_summary_allocates_no_parameters():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  found = summarize(**{'model.width': '8192', 'model.mlp_dim': '32768', 'model.depth': '1'})
  assert found.state_bytes['params'] > 3 * 2**30
  assert (
    resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 2**10
  )  # ru_maxrss is in KiB


@pytest.mark.slow
def test_missing_data_is_replaced_by_assumptions_and_not_created(tmp_path):
  found = summarize(**{'data.source': 'folder:photos', 'data.dir': str(tmp_path)})
  assert 'assuming 1,000 classes of RGB images' in cost.as_text(found)
  assert found.steps is None and 'unknown without the data' in cost.as_text(found)
  found = summarize(**{'data.source': 'tfds:cifar100', 'data.dir': str(tmp_path / 'none')})
  assert len(found.exp.task.class_names) == 100 and found.steps is None and not found.notes
  assert not list(tmp_path.iterdir())
  prepared = {'data.source': 'tfds:mini', 'data.dir': str(DATA / 'tfds'), 'batch_size': '4'}
  assert summarize(**prepared).steps


def test_without_data_epochs_replace_the_steps(tmp_path):
  missing = {'data.source': 'folder:photos', 'data.dir': str(tmp_path), 'epochs': '20'}
  text = cost.as_text(summarize(**missing, **{'schedule.warmup': '2.5'}))
  assert 'Steps: unknown without the data; the run has 20 epochs.' in text
  assert 'Learning rate: warm-up to 0.01 in 2.5 epochs, then cosine.' in text
  text = cost.as_text(summarize(**missing, **{'schedule.warmup': '9'}))
  assert 'warm-up to 0.01 in 4 epochs' in text  # a fifth of the run
  for overrides in (missing, {'data.source': 'synthetic'}):
    text = cost.as_text(summarize(**overrides, **{'schedule.warmup': '0'}))
    assert 'Learning rate: 0.01, no warm-up, then cosine.' in text


@pytest.mark.parametrize('name', ['hf_backbone', 'hf_clip', 'hf_siglip'])
def test_weights_without_a_head_are_inspected_without_one(name, capsys):
  code, out, err = call(capsys, '--mode=inspect', f'--init={DATA / name}')
  assert not code, err
  model, params = vit_jax.load(DATA / name, features='pooled')
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert f'Trained parameters: {count:,} of {count:,}.' in out and 'no labels' in out
  assert 'Note: These weights have no head, so the numbers do not include a head.' in out
  image = jax.ShapeDtypeStruct((1, *vit_jax.load(DATA / name).preprocessing.size, 3), jnp.float32)
  compiled = jax.jit(model.apply).lower({'params': params}, image).cost_analysis()
  found = summary.summary_of(Request(init=str(DATA / name))).parts[-1].gflops * 1e9
  assert 0.6 * compiled['flops'] < found <= compiled['flops']


@pytest.mark.slow
def test_inspect_summarises_workdirs_configs_and_weights(capsys, trained, tmp_path):
  workdir, result = trained
  code, out, _ = call(capsys, '--mode=inspect', f'--workdir={workdir}')
  assert not code and f'{result["params"]:,}' in out and f'Steps: {result["steps"]}' in out
  flags = ['--mode=inspect', '--config=configs/digits.py', f'--workdir={tmp_path}/run']
  code, out, _ = call(capsys, *flags, '--config.model.depth=1', '--config.epochs=1')
  assert not code and '| block_*/attention ' in out and 'Steps: 90 in 1 epochs' in out
  assert not list(tmp_path.iterdir())
  code, out, _ = call(capsys, '--mode=inspect', f'--init={DATA / "timm_map"}')
  assert not code and '| map ' in out and 'Training numbers assume the default config' in out
  assert 'needs --config' in error(capsys, '--mode=inspect')
  assert 'holds no run' in error(capsys, '--mode=inspect', f'--workdir={tmp_path}')
  assert 'Did you mean cifar10' in error(capsys, *flags, '--config.data.source=tfds:cifr10')
  assert 'a different config' in error(capsys, *flags[:2], f'--workdir={workdir}')


@pytest.mark.slow
def test_the_number_of_devices_follows_the_batch_size(trained, tmp_path, monkeypatch):
  monkeypatch.setattr(devices, '_one_per_core', True)
  workdir, _ = trained
  found = summary.summary_of(Request(workdir))
  same = summary.summary_of(Request(config=small_config()))
  assert cost.as_text(found) == cost.as_text(same)
  more = summary.summary_of(Request(workdir, overrides={'batch_size': '64', 'micro_batches': '2'}))
  published = summary.summary_of(
    Request(init=str(DATA / 'timm_map'), overrides={'batch_size': '128'})
  )
  assert [s.devices for s in (found, more, published)] == [1, 2, 2]
  (tmp_path / 'config.json').write_bytes((workdir / 'config.json').read_bytes())
  assert cost.as_text(summary.summary_of(Request(tmp_path))) == cost.as_text(
    same
  )  # no checkpoint yet


def test_steps_and_warmup_are_rounded_down():
  config = small_config()
  assert plan_lib.num_steps(config, 1000) == 31  # 31.25 batches
  assert plan_lib.warmup_steps(config, 1000, 31) == 6  # at most a fifth of the steps


def test_enlarging_images_does_not_count_as_work_of_the_model():
  exp = summary.summary_of_config(small_config())[0]
  task = dataclasses.replace(exp.task, stored_size=(4, 4))
  enlarged = assemble(exp.config, task)  # enlarging uses matrix products, too
  assert cost.measure(enlarged, None).train_flops == cost.measure(exp, None).train_flops
