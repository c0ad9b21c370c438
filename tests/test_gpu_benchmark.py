"""The script that measures a GPU, at small sizes on a CPU."""

import json
import os
import sys

import numpy as np
import pytest

from benchmarks import gpu, gpu_layers
from nanomoe.moe.dispatch.registry import DISPATCH


def test_the_parts_take_less_than_nine_minutes():
  assert gpu.LIMITS.keys() == gpu.PARTS.keys()
  assert sum(gpu.LIMITS.values()) + 20 < 9 * 60


@pytest.mark.parametrize('load', gpu_layers.LOADS)
def test_experts_of_a_token_are_distinct(load):
  size = gpu_layers.TINY
  expert = gpu_layers.choose(load, size)
  assert expert.shape == (size.num_tokens, size.top_k)
  assert all(len(set(row)) == size.top_k for row in expert)
  count = np.bincount(expert.ravel(), minlength=size.num_experts)
  assert (count[size.top_k :] == 0).all() == (load == 'empty')
  if load == 'skewed':
    assert count[0] > 1.2 * expert.size / size.num_experts


@pytest.mark.slow
def test_all_parts_run_at_small_sizes_as_processes(tmp_path, run):
  words = [sys.executable, '-m', 'benchmarks.gpu', '--tiny', '--steps=2']
  process = run([*words, f'--out={tmp_path}'], timeout=540)
  assert process.returncode == 0, process.stderr
  assert os.listdir(tmp_path) == ['gpu_tiny.json']
  found = json.loads((tmp_path / 'gpu_tiny.json').read_text())
  assert found['tiny'] and found['device']['platform'] == 'cpu'
  assert set(found['statuses'].values()) == {0}
  assert set(found['seconds']) == set(gpu.PARTS)
  for part in gpu.PARTS:
    assert found[part]['errors'] == {}
    assert found[part]['rows']
  for row in found['train']['rows']:
    assert row['tokens_per_sec'] > 0 and row['active_flops'] > 0
    assert row['mfu'] is None  # A CPU has another peak.
    assert row['temporary_bytes'] > 0 and row['finite']
    assert 'device_peak_bytes' in row
  rows = found['parity']['rows']
  assert {row['dispatch'] for row in rows} == set(DISPATCH)
  assert len(rows) == len(DISPATCH) * len(gpu_layers.LOADS) * 2
  for row in rows:
    largest = max(row['from_oracle'].values())
    assert largest < (1e-5 if row['precision'] == 'float32' else 0.05)
    assert row['finite']
  for row in found['layers']['rows']:
    assert row['random']['median_sec'] > 0 and row['skewed']['median_sec'] > 0
    assert row['active_flops'] > 0
  for row in found['base']['rows']:
    assert row['step_sec'] > 0 and row['waiting']['samples'] == 2


@pytest.mark.slow
def test_a_cpu_is_refused_without_tiny(run, tmp_path):
  words = [sys.executable, '-m', 'benchmarks.gpu', '--part=base']
  process = run([*words, f'--out={tmp_path}'])
  assert process.returncode == 2
  assert process.stderr.splitlines()[-1].startswith('error: --part=base: ')
