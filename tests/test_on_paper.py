"""The calculated needs of TPU pods agree with closed forms and with what a run estimates."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from benchmarks import compile as compile_lib
from benchmarks import on_paper, pods
from tests.conftest import ROOT
from vit_jax import config as config_lib
from vit_jax.distributed import SHARE, compiled_for
from vit_jax.training import compiling
from vit_jax.training.compiling import Plan
from vit_jax.workdir import writer

V5E, V5P = pods.CHIPS['v5e'], pods.CHIPS['v5p']
ONCE = Plan(1, 'none')
# B/16 with 1,000 classes. Arrays with fewer than 4,096 numbers are not split. In a block, these are
# six biases (four of attention) and two norms. Outside of the blocks, these are a norm, the biases
# and the class token.
PARAMS = 86_567_656
UNSPLIT = 12 * (4 * 768 + 3072 + 768 + 2 * 2 * 768) + 2 * 768 + 768 + 1000 + 768


@pytest.fixture(scope='module')
def b16():
  """B/16 with simple FLOPs and activations."""
  overrides = pods.settings('B/16')
  config = config_lib.override_all(config_lib.default_config(), overrides)
  exp, training = compile_lib.build(config)
  flops = {'none': 100 * 10**9, 'dots': 110 * 10**9, 'full': 130 * 10**9}
  kept = {'none': 120e6, 'dots': 40e6, 'full': 20e6}
  return pods.Model(exp, compile_lib.shapes_of(exp, training), flops, kept)


@pytest.mark.parametrize('fsdp', [1, 2, 8, 64])
def test_the_state_has_12_bytes_for_each_parameter(b16, fsdp):
  size = pods.memory(b16, pods.mesh_of(64 // fsdp, fsdp), ONCE)['state']
  unsplit = UNSPLIT if fsdp > 1 else 0
  counters = size - 12 * ((PARAMS - unsplit) / fsdp + unsplit)
  assert 0 <= counters <= 32  # the step, and the optimizer's counts of steps


def test_memory_counts_gradients_images_and_activations(b16):
  mesh, image = pods.mesh_of(64, 1), 224 * 224 * 3
  once, twice = (pods.memory(b16, mesh, Plan(parts, 'none')) for parts in (1, 2))
  assert once['gradients_and_images'] == 4 * PARAMS + 64 * image
  assert twice['gradients_and_images'] == 2 * once['gradients_and_images']
  assert once['activations'] == 64 * 120e6 and twice['activations'] == 32 * 120e6


@pytest.mark.slow
def test_memory_is_what_a_run_estimates(monkeypatch):
  monkeypatch.setitem(pods.IMAGES, 'model.depth', '1')
  model, mesh = pods.study.__wrapped__('Ti/16'), pods.mesh_of(16, 4)
  with compiled_for(pods.TPU):
    need = compiling.estimator(model.exp, mesh, model.state)
    plans = compiling.possible_plans(model.exp, mesh)
    assert len(plans) > 3
    for plan in plans:
      assert sum(pods.memory(model, mesh, plan).values()) == pytest.approx(sum(need(plan)))


def test_a_chip_sends_as_many_bytes_as_in_a_ring():
  # A ring sums 8 arrays in 7 rounds of one eighth each, and distributes the sums in 7 more.
  assert pods.sent('all-reduce', 800, 8) == 14 * 100
  assert pods.sent('all-gather', 800, 8) == pods.sent('reduce-scatter', 800, 8) == 7 * 100
  assert pods.sent('all-reduce', 800, 1) == 0


def test_without_fsdp_a_step_sums_gradients_once_in_float32(b16):
  for parts in (1, 4):
    seconds = pods.step(b16, V5P, pods.mesh_of(64, 1), Plan(parts, 'none'))
    assert seconds['sending'] == pytest.approx(2 * 63 / 64 * 4 * PARAMS / 600e9)
    assert seconds['products'] == pytest.approx(64 * 100e9 / (0.5 * 459e12))


def test_with_fsdp_each_micro_batch_gathers_weights_and_sums_gradients(b16):
  split = PARAMS - UNSPLIT
  gathered = 2 * 2 * split * 7 / 8  # in bfloat16, forward and backward
  scattered = 2 * split * 7 / 8
  summed = 2 * 3 / 4 * 2 * split / 8 + 2 * 31 / 32 * 4 * UNSPLIT
  want = (gathered + scattered + summed) / 200e9
  for parts in (1, 4):
    seconds = pods.step(b16, V5E, pods.mesh_of(4, 8), Plan(parts, 'none'))
    assert seconds['sending'] == pytest.approx(parts * want)
  assert seconds['overlapped'] == max(seconds['products'], seconds['sending'])
  assert seconds['one_after_the_other'] == seconds['products'] + seconds['sending']


def test_between_slices_a_chip_sends_only_its_share_of_the_sum(b16):
  seconds = pods.step(b16, V5E, pods.mesh_of(1024, 1), ONCE)['sending']
  whole = 4 * PARAMS
  links, network = 2 * 255 / 256 * whole / 200e9, 2 * 3 / 4 * whole / 256 / 3.125e9
  assert seconds == pytest.approx(links + network)
  one_slice = pods.step(b16, V5P, pods.mesh_of(1024, 1), ONCE)['sending']
  assert one_slice == pytest.approx(2 * 1023 / 1024 * whole / 600e9)


@pytest.mark.parametrize(('memory', 'want'), [(4e9, 1), (1.6e9, 2), (0.65e9, 4), (0.3e9, 8)])
def test_fsdp_is_the_smallest_power_of_two_that_fits(b16, memory, want):
  # State and two sets of gradients need 20 bytes per parameter, and an image 20 MB with `full`.
  chip = dataclasses.replace(V5E, memory=memory / SHARE)
  if want == 8:
    with pytest.raises(ValueError, match='B/16 does not fit on 4 chips'):
      pods.choose(b16, chip, 4)
    return
  mesh, plan, _ = pods.choose(b16, chip, 8)
  assert dict(mesh.shape) == {'data': 8 // want, 'fsdp': want, 'tensor': 1}
  assert sum(pods.memory(b16, mesh, plan).values()) <= memory


def test_of_the_plans_that_fit_the_fastest_is_chosen(b16):
  # On 8 chips, 512 images need 61 GB of activations, or 20 GB with `dots`.
  fits = lambda memory: pods.choose(b16, dataclasses.replace(V5E, memory=memory / SHARE), 8)[1:]
  assert fits(70e9) == (Plan(1, 'none'), Plan(1, 'none'))
  assert fits(33.5e9) == (Plan(2, 'none'), Plan(2, 'none'))  # more parts send no more bytes


def test_with_fsdp_more_remat_can_be_faster_than_more_micro_batches(b16):
  # With fsdp=4, the state and two copies of gradients and images need 0.59 GB. The activations of
  # an image need 120 MB with `none`, 40 MB with `dots`, or 20 MB with `full`.
  slow = dataclasses.replace(V5E, memory=0.8e9 / SHARE, link=1e9)
  mesh, best, own = pods.choose(b16, slow, 8)
  assert mesh.shape['fsdp'] == 4 and own == Plan(512, 'none') and best == Plan(64, 'full')


def test_chips_with_the_same_part_share_a_save():
  of = lambda *shape: {'x': jax.ShapeDtypeStruct(shape, jnp.float32)}
  mesh = pods.mesh_of(4, 2)
  assert pods.copied(mesh, of(96, 128), 1) == 96 * 128 * 4 // 8  # 2 parts, each for 4 chips
  assert pods.copied(mesh, of(96, 128), 8) == 96 * 128 * 4
  assert pods.copied(mesh, of(8), 1) == 4  # not split by fsdp: one of 8 numbers per chip
  assert pods.copied(mesh, of(5), 1) == pods.copied(mesh, of(5), 8) == 5 * 4  # not divisible
  assert pods.copied(mesh, of(), 4) == 4


def test_a_save_copies_each_byte_of_the_state_once(b16):
  size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
  for sizes in ((8, 1), (4, 16), (1, 64)):
    mesh = pods.mesh_of(*sizes)
    assert pods.copied(mesh, b16.state, mesh.size) == size(b16.state)
    assert pods.copied(mesh, b16.state, 1) >= size(b16.state) / mesh.size


def test_a_save_says_whether_the_gathered_state_fits_a_host(b16):
  state = 12 * PARAMS
  found = pods.save(b16, V5E, pods.mesh_of(2, 4), 1e9)['gathered']
  assert found['fits_the_host'] and found['host_gb'] == pytest.approx(2 * state / 1e9)
  assert found['seconds_written'] == pytest.approx(state / 1e9)
  assert found['seconds_blocked'] == pytest.approx(state / 10e9 + state * 3 / 4 / 200e9)
  small = dataclasses.replace(V5E, host=2e9)
  assert not pods.save(b16, small, pods.mesh_of(2, 4), 1e9)['gathered']['fits_the_host']


def test_a_row_reads_the_input_of_the_fastest_possible_step(b16, monkeypatch):
  monkeypatch.setattr(on_paper, 'study', lambda variant: b16)
  row = on_paper.row('B/16', 'v5p', 64, 1e9)
  seconds = 64 * 100e9 / (0.5 * 459e12)  # 64 images on a chip; 4 chips on a host
  assert row['images_per_second_of_host'] == pytest.approx(4 * 64 / seconds)
  megabytes = row['input_bytes_per_second_of_host'] / 1e6
  assert megabytes == pytest.approx(4 * 64 / seconds * 0.1154, rel=1e-3)


def test_compiled_collectives_give_a_ratio_of_one_if_they_are_as_assumed(b16, monkeypatch):
  monkeypatch.setattr(on_paper, 'study', lambda variant: b16)
  compiled = {
    'model': 'B/16', 'pod': 'v5e:8x8', 'mesh': {'data': 64, 'fsdp': 1, 'tensor': 1},
    'remat': 'none', 'flops': 2 * 64 * 100e9, 'peak_bytes': 12 * PARAMS,
    'collectives': [{'kind': 'all-reduce', 'group': 64, 'count': 1, 'bytes': 4 * PARAMS}],
  }  # fmt: skip
  found = on_paper.compare(compiled)
  assert found['sent_ratio'] == pytest.approx(1) and found['flops_ratio'] == 0.5
  assert found['memory_ratio'] * compiled['peak_bytes'] == found['gib_calculated'] * 2**30


def test_the_docs_have_the_calculated_table():
  result = writer.read_json(on_paper.PATH)
  assert len(result['rows']) == len(on_paper.MODELS) * len(pods.CHIPS) * len(on_paper.COUNTS)
  assert on_paper.table(result) in (ROOT / 'docs' / 'benchmarks.md').read_text(encoding='utf-8')


def test_the_table_marks_a_host_with_too_little_memory():
  result = writer.read_json(on_paper.PATH)
  gathered = result['rows'][0]['save']['gathered']
  gathered |= {'host_gb': 500.0, 'gb_of_host': 192.0, 'fits_the_host': False}
  assert '| 500 of 192: too much |' in on_paper.table(result).splitlines()[2]


@pytest.mark.parametrize('rate', ['0', '-1', 'nan', 'inf', 'fast'])
def test_the_rate_of_a_bucket_is_above_zero(rate, capsys):
  with pytest.raises(SystemExit, match='2'):
    on_paper.parse([f'--bucket={rate}'])
  assert f"expected a number above 0, got '{rate}'" in capsys.readouterr().err


def test_assumed_bytes_of_an_image_are_the_mean_of_imagenet():
  assert math.isclose(on_paper.JPEG, 110e3, rel_tol=0.05)
