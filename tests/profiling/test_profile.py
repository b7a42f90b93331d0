"""Tests where `--mode=profile` says that the time of a training step goes."""

import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import small_config
from vit_jax.cli import main
from vit_jax.profiling import as_table, profile
from vit_jax.profiling.operations import Operation, kind_of, operations
from vit_jax.profiling.table import UNKNOWN, Profile, summarize_time
from vit_jax.profiling.timeline import IDLE, WAIT, Span, Trace, divide


def known(**opcodes):
  return {
    name: Operation(code.replace('_', '-'), frozenset(), '', name) for name, code in opcodes.items()
  }


def test_running_operations_share_the_time_equally_and_the_rest_is_idle():
  trace = Trace([Span('a', 10, 40), Span('b', 30, 50)], [Span(WAIT, 45, 60)], Span('', 0, 100))
  times = divide(trace, known(a='dot', b='fusion'))
  assert times == {IDLE: 10 + 40, 'a': 20 + 5, 'b': 5 + 10, WAIT: 10}


def test_collectives_and_loops_count_only_while_nothing_else_runs():
  operations = [Span('loop', 0, 90), Span('all', 20, 60), Span('a', 10, 30)]
  times = divide(
    Trace(operations, [], Span('', 0, 90)), known(loop='while', all='all_reduce', a='dot')
  )
  assert times == {'loop': 10 + 30, 'a': 20, 'all': 30}


def test_two_runs_of_an_operation_at_the_same_time_count_once():
  trace = Trace([Span('a', 0, 30), Span('a', 10, 40), Span('b', 20, 40)], [], Span('', 0, 40))
  assert divide(trace, known(a='dot', b='dot')) == {'a': 20 + 10, 'b': 10}


def test_parts_add_up_to_the_whole_for_random_spans():
  random = np.random.default_rng(0)
  names = {f'{i}': code for i, code in enumerate(['dot', 'while', 'all_gather', 'fusion'])}
  for _ in range(20):
    begins = random.integers(-100, 1000, 40)
    spans = [
      Span(str(i % 5), begin, begin + size)  # the program does not know operation 4
      for i, (begin, size) in enumerate(zip(begins, random.integers(0, 200, 40)))
    ]
    times = divide(Trace(spans, [Span(WAIT, 300, 900)], Span('', 0, 1000)), known(**names))
    assert sum(times.values()) == pytest.approx(1000)


def test_unknown_operations_and_the_overhead_of_loops_are_not_attributed():
  times = {'loop': 2e6, 'a': 3e6, 'strange': 4e6, IDLE: 1e6}
  kinds, longest = summarize_time(times, known(loop='while', a='dot'), steps=2)
  assert kinds[UNKNOWN] == 3
  assert kinds['matrix products'] == 1.5
  assert kinds[IDLE] == 0.5
  assert longest == [('a', 'matrix products', 1.5)]


def test_the_longest_operations_are_summed_over_the_blocks():
  paths = {f'{part}{i}': f'block_{i}/mlp/{part}' for part in ('up', 'down') for i in range(3)}
  operations = {name: Operation('dot', frozenset(), '', path) for name, path in paths.items()}
  times = {name: 1e6 if 'up' in name else 2e6 for name in operations}
  _, longest = summarize_time(times, operations, steps=2)
  assert longest == [
    ('block_*/mlp/down', 'matrix products', 3.0), ('block_*/mlp/up', 'matrix products', 1.5)
  ]  # fmt: skip


def test_the_table_gives_shares_of_the_recorded_step():
  times = {'matrix products': 6.0, IDLE: 2.0}
  text = as_table(Profile(8.0, 5.0, 3, '2 cpu', times, [('mlp/dot', 'matrix products', 4.0)]))
  lines = [line.split() for line in text.splitlines()]
  assert 'takes 8 ms while it is recorded, and 5 ms otherwise.' in text
  assert ['6.000', '75.0%', 'matrix', 'products'] in lines
  assert ['8.000', '100.0%', 'sum'] in lines
  assert ['4.000', '50.0%', 'mlp/dot', '(matrix', 'products)'] in lines


def test_kinds_follow_from_the_compiled_program():
  def function(x, w):
    with jax.named_scope('block_3/mlp'):
      y = x @ w
    with jax.named_scope('optimizer'):
      return jnp.cumsum(jnp.sort(y, axis=0), axis=0)

  x = jnp.ones((64, 64))
  found = operations(jax.jit(function).lower(x, x).compile().as_text())
  kinds = {op.label: kind_of(op) for op in found.values()}
  assert kinds['block_*/mlp/dot_general'] == 'matrix products'
  assert {kind for label, kind in kinds.items() if label.startswith('optimizer')} == {'optimizer'}


@pytest.mark.parametrize(
  'line, label, kind',
  [
    (
      'fusion(%a), kind=kLoop, calls=%inner, metadata={op_name="jit(train_step)/jvp(ViT)/'
      'Encoder_0/block_3/attention/query/dot_general"}',
      'block_*/attention/query/dot_general',
      'matrix products',
    ),
    (
      'fusion(%a), kind=kLoop, calls=%inner, metadata={op_name="jit(train_step)/jvp(ViT)/'
      'Encoder_0/block_3/attention/out/dot_general"}',
      'block_*/attention/out/dot_general',
      'matrix products',
    ),
    (
      'fusion(%a), kind=kLoop, calls=%inner, metadata={op_name="jit(train_step)/'
      'transpose(jvp(ViT))/Encoder_0/block_3/attention/BKEQ,BKNQ->BKEN/dot_general"}',
      'block_*/attention/BKEQ,BKNQ->BKEN/dot_general, backward',
      'attention',
    ),
    ('custom-call(%a), custom_call_target="__cudnn$fmhaSoftmax"', 'custom-call', 'attention'),
    ('custom-call(%a), custom_call_target="__onednn$matmul"', 'custom-call', 'matrix products'),
    (
      'select(%a, %a), metadata={op_name="jit(train_step)/augment/vmap(flip)/select_n"}',
      'augment/flip/select_n',
      'augmentation',
    ),
    ('custom-call(%a), custom_call_target="__cublas$gemm"', 'custom-call', 'matrix products'),
    ('all-reduce-start(%a), to_apply=%add', 'all-reduce-start', 'collectives'),
    ('copy(%a)', 'copy', 'normalisation, elementwise, copies'),
  ],
)
def test_an_operation_has_a_short_name_and_a_kind(line, label, kind):
  text = f"""%inner (p: f32[4]) -> f32[4] {{
  ROOT %dot.1 = f32[4]{{0}} dot(%p, %p), lhs_contracting_dims={{}}
}}
ENTRY %main (p: f32[4]) -> f32[4] {{
  %x.1 = (f32[4]{{0:T(8,128)}}, /*index=5*/f32[4]{{0}}) {line}
}}"""
  operation = operations(text)['x.1']
  assert (operation.label, kind_of(operation)) == (label, kind)


@pytest.mark.slow
def test_a_profile_attributes_the_measured_time_of_a_step(tmp_path):
  found = profile(small_config(), tmp_path)
  assert sum(found.kinds.values()) == pytest.approx(found.step_ms, rel=0.05)
  assert found.kinds[UNKNOWN] < 0.1 * found.step_ms
  for kind in ('attention', 'matrix products', 'optimizer'):
    assert found.kinds[kind] > 0, kind
  assert any(label.startswith('block_*/') for label, *_ in found.longest)
  assert json.loads((tmp_path / 'profile' / 'profile.json').read_text())['steps'] == found.steps
  (perfetto,) = tmp_path.rglob('perfetto_trace.json.gz')
  check_perfetto(json.loads(gzip.decompress(perfetto.read_bytes())))
  assert f'{found.step_ms:.4g} ms' in as_table(found)


def check_perfetto(trace):
  """Checks the trace against Chrome's Trace Event Format, which Perfetto opens."""
  complete = [event for event in trace['traceEvents'] if event.get('ph') == 'X']
  assert {'recorded steps', WAIT, 'train'} <= {event['name'] for event in complete}
  for event in complete:
    assert event['ts'] >= 0 and event['dur'] >= 0
    assert isinstance(event['pid'], int) and isinstance(event['tid'], int)


@pytest.mark.slow
def test_profiling_a_run_does_not_change_the_run(tmp_path, capsys):
  config = ['--config=tests/small.py', f'--workdir={tmp_path}']
  assert not main(config)
  before = contents(tmp_path)
  capsys.readouterr()
  assert not main(['--mode=profile', f'--workdir={tmp_path}'])
  assert 'longest operations' in capsys.readouterr().out
  assert contents(tmp_path) == before


def contents(folder):
  files = (p for p in folder.rglob('*') if p.is_file() and 'profile' not in p.parts)
  return {p: p.read_bytes() for p in files}


def test_a_frozen_backbone_is_refused(tmp_path):
  config = small_config()
  config.freeze = 'backbone'
  with pytest.raises(ValueError, match='To profile the model, add --config.freeze='):
    profile(config, tmp_path)
  assert not any(tmp_path.iterdir())
