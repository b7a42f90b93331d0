"""Lowers the training step of every accelerator config for GPUs and TPUs, on a CPU."""

import json

import pytest

from benchmarks import compile, hlo
from vit_jax import config as config_lib

FORWARD, BACKWARD = '__cudnn$fmhaSoftmax', '__cudnn$fmhaSoftmaxBackward'
HALF = '--config.model.dtype=bfloat16'
# (config, tokens, depth of the model if its steps use flash attention on a GPU, else 0)
CONFIGS = [
  ('configs/cifar10.py:small', 64, 0),  # float32
  (f'configs/cifar10.py:small {HALF}', 64, 7),
  (f'configs/cifar10.py:wide {HALF}', 64, 8),
  (f'configs/cifar10.py:deep {HALF}', 64, 12),
  ('configs/cifar10.py:b16', 197, 12),
  ('configs/cifar10.py:l16', 197, 24),
  ('configs/finetune.py:b16,cifar10', 577, 12),
  ('configs/finetune.py:l16,cifar10', 577, 24),
  ('configs/imagenet.py:s16', 196, 12),
  ('configs/imagenet.py:b16', 197, 12),
  ('configs/imagenet.py:l16', 197, 24),
  ('configs/imagenet.py:h14', 257, 32),
  ('configs/imagenet.py:b16 --config.model.attention=plain', 197, 0),
  ('configs/imagenet.py:b16 --config.model.attention_dropout=0.1', 197, 0),
]


def check(config, tokens, depth):
  """Asserts that the step of a config uses one kernel for each block and direction."""
  found = compile.lower(config, 'cuda')
  assert found['tokens'] == tokens
  assert found['kernels'] == ({FORWARD: depth, BACKWARD: depth} if depth else {})


@pytest.mark.slow_after_first
@pytest.mark.parametrize('spec, tokens, depth', CONFIGS)
def test_two_blocks_lower_for_a_gpu(spec, tokens, depth):
  config = config_lib.override_all(
    compile.load(spec, 8), {'model.depth': '2', 'micro_batches': '0'}
  )
  check(config, tokens, depth and 2)


@pytest.mark.slow
@pytest.mark.parametrize('spec, tokens, depth', CONFIGS)
def test_whole_models_lower_for_a_gpu_and_a_tpu(spec, tokens, depth):
  config = compile.load(spec, 8)
  check(config, tokens, depth)
  assert compile.lower(config, 'tpu')['kernels'] == {}


def test_lower_prints_a_line_of_json(capsys):
  flags = ['--lower=tpu', '--config=configs/cifar10.py:b16 --config.model.depth=1', '--batch=2']
  compile.main(flags)
  (line,) = capsys.readouterr().out.splitlines()
  assert json.loads(line) == {'tokens': 197, 'dtype': 'bfloat16', 'kernels': {}}


@pytest.mark.parametrize('flags, message', [
    (['--lower=cuda'], 'need --config'),
    (['--config=configs/cifar10.py:b16'], '--config needs --lower=cuda'),
    (['--lower=cuda', '--target=h200', '--config=x'], '--lower runs without a compiler'),
    (['--target=h300', '--config=x'], 'or a TPU and its topology, such as v5e:2x2.'),
])  # fmt: skip
def test_flags_that_do_not_fit_together_are_refused(flags, message, capsys):
  with pytest.raises(SystemExit, match='2'):
    compile.parse(flags)
  assert message in capsys.readouterr().err


def test_the_time_of_a_tpu_is_the_sum_of_its_estimated_cycles():
  text = '"estimated_cycles":"3000000" x\n "estimated_cycles":"1500"'
  assert hlo.modelled_seconds(text, 'v5e:2x2') == 0.002
  assert hlo.modelled_seconds(text, 'h200') is None
