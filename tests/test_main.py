"""The main job as a process: what a user types, and what is left behind."""

import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.runs import lines_of, metrics_of, result_of
from tests.shrunk import ROOT
from trainers.checkpoint import reader

RESULT_KEYS = {
  'status',
  'step',
  'num_params',
  'num_active_params',
  'corpus',
  'train_loss',
  'val_loss',
  'val_bits_per_char',
  'best_val_loss',
  'best_step',
  'train_seconds',
  'steps_per_sec',
  'tokens_per_sec',
  'peak_memory_bytes',
  'versions',
  'devices',
  'cpu',
  'argv',
  'revision',
}
METRIC_KEYS = {
  'train/loss',
  'train/cross_entropy',
  'train/aux_loss',
  'val/cross_entropy',
  'val/bits_per_char',
  'val/aux_loss',
  'learning_rate',
  'gradient_norm',
  'steps_per_sec',
  'tokens_per_sec',
}


def _num_lines(workdir):
  path = workdir / 'metrics.jsonl'
  return path.read_text().count('\n') if path.exists() else 0


def _num_starts(log):
  return log.read_text().count('watch it') if log.exists() else 0


def _checkpoint(workdir, step):
  """{leaf: array} of a checkpoint, read by Orbax alone."""
  code = (
    'import sys, numpy as np, orbax.checkpoint as ocp\n'
    'tree = ocp.StandardCheckpointer().restore(sys.argv[1])\n'
    'np.savez(sys.argv[2], **tree)'
  )
  path = workdir / 'checkpoints' / str(step) / 'arrays'
  subprocess.run(
    [sys.executable, '-c', code, path, workdir / 'leaves.npz'],
    check=True,
    capture_output=True,
  )
  return dict(np.load(workdir / 'leaves.npz'))


def test_output_tells_what_happens(finished):
  workdir, process = finished
  out = process.stdout
  assert str(workdir) in out
  assert f'tensorboard --logdir {workdir.parent}' in out
  assert '★' in out
  assert 'steps/s' in out and 'tokens/s' in out and 'ETA' in out
  assert (workdir / 'sample.txt').read_text() in out
  log = (workdir / 'log.txt').read_text()
  assert 'moe.w_in' in log or 'moe/w_in' in log  # The table of parameters.


def test_workdir_is_the_contract(finished, corpus):
  workdir, _ = finished
  names = {p.name for p in workdir.iterdir()}
  assert names >= {
    'config.json',
    'vocabulary.json',
    'log.txt',
    'checkpoints',
    'metrics.jsonl',
    'sample.txt',
    'result.json',
  }
  assert any(name.startswith('events.out.tfevents') for name in names)
  assert not any(name.endswith('.tmp') for name in names)
  config = json.loads((workdir / 'config.json').read_text())
  assert config['precision'] in ('float32', 'bfloat16')
  assert config['moe']['dispatch'] == 'dropless'
  vocabulary = json.loads((workdir / 'vocabulary.json').read_text())
  assert vocabulary['characters'] == ''.join(sorted(set(corpus.read_text())))
  text = (workdir / 'sample.txt').read_text()
  assert len(text) == 20
  assert set(text) <= set(vocabulary['characters'])
  steps = {p.name for p in (workdir / 'checkpoints').iterdir()}
  best = str(result_of(workdir)['best_step'])
  assert steps == {'8', '12', best}


def test_every_file_of_a_run_is_documented(finished):
  workdir, _ = finished
  files = runpy.run_path(str(ROOT / 'docs' / 'reference.py'))['FILES']
  named = {name.rstrip('/') for name in files}
  for path in workdir.iterdir():
    assert path.name in named or path.name.startswith('events.out.tfevents.')


def test_metrics_are_flat_and_once_per_step_and_kind(finished):
  workdir, _ = finished
  metrics = lines_of(workdir)
  train = [m for m in metrics if 'train/loss' in m]
  val = [m for m in metrics if 'val/cross_entropy' in m]
  assert [m['step'] for m in train] == [2, 4, 6, 8, 10, 12]
  assert [m['step'] for m in val] == [4, 8, 12]
  assert len(metrics) == 9
  assert {key for m in metrics for key in m} >= METRIC_KEYS
  for m in val:
    nats, bits = m['val/cross_entropy'], m['val/bits_per_char']
    assert bits == pytest.approx(nats / np.log(2), rel=1e-5)
  for m in train:
    assert m['learning_rate'] == pytest.approx(3e-4)
    total = m['train/cross_entropy'] + 0.01 * m['train/aux_loss']
    assert m['train/loss'] == pytest.approx(total, rel=1e-5)


def test_result_agrees_with_the_metrics(finished):
  workdir, _ = finished
  result, metrics = result_of(workdir), lines_of(workdir)
  assert set(result) >= RESULT_KEYS
  val = {
    m['step']: m['val/cross_entropy']
    for m in metrics
    if 'val/cross_entropy' in m
  }
  assert (result['status'], result['step']) == ('done', 12)
  assert result['val_loss'] == val[12]
  assert result['best_val_loss'] == min(val.values())
  assert val[result['best_step']] == result['best_val_loss']
  assert result['num_params'] == sum(
    leaf.size
    for name, leaf in _checkpoint(workdir, 12).items()
    if name.startswith('state.params.')
  )
  assert 1e7 < result['peak_memory_bytes'] < 1e11
  assert result['corpus'] == 'text.txt'


def test_neither_tensorflow_nor_torch_is_imported(finished):
  """-X importtime names every module that the whole run imported."""
  _, process = finished
  modules = {
    line.rpartition('|')[2].strip().split('.')[0]
    for line in process.stderr.splitlines()
    if line.startswith('import time:')
  }
  assert {'jax', 'clu', 'tensorboard', 'orbax'} <= modules
  assert not {'tensorflow', 'torch', 'tensorboardX'} & modules


def test_a_finished_run_has_nothing_to_do(finished, run):
  workdir, _ = finished
  metrics, result = lines_of(workdir), result_of(workdir)
  _, meta = reader.read(workdir / 'checkpoints', 'latest')
  begun = time.monotonic()
  again = run([sys.executable, '-m', 'nanomoe.main', f'--workdir={workdir}'])
  seconds = time.monotonic() - begun
  assert again.returncode == 0, again.stderr
  assert lines_of(workdir) == metrics
  after = result_of(workdir)
  unchanged = {
    k
    for k in result
    if 'sec' not in k and k not in ('argv', 'peak_memory_bytes', 'revision')
  }
  assert {k: after[k] for k in unchanged} == {k: result[k] for k in unchanged}
  # What was trained until the last save still counts; then a start is added.
  earlier = meta['callbacks']['Result']['earlier']['seconds_by_phase']['train']
  assert 0 < earlier <= after['train_seconds'] <= earlier + seconds


def _wait_for(condition, process, seconds=100):
  end = time.monotonic() + seconds
  while not condition() and process.poll() is None:
    assert time.monotonic() < end
    time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.optimized
def test_killed_three_times_ends_bitwise_equal(finished, command, tmp_path):
  """kill -9 at random moments; resumed without --config."""
  expected, _ = finished
  workdir = tmp_path / 'killed'
  seed = int(os.environ.get('NANOMOE_TEST_SEED', time.time()))
  print(f'NANOMOE_TEST_SEED={seed} repeats this')
  chance = random.Random(seed)
  words = command(f'--workdir={workdir}')
  log = workdir / 'log.txt'
  for kill in range(3):
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
    _wait_for(lambda n=kill + 1: _num_starts(log) == n, process)
    done = _num_lines(workdir)
    if chance.random() < 0.8:  # Else while it is starting.
      goal = min(done + chance.randint(1, 3), 8)
      _wait_for(lambda goal=goal: _num_lines(workdir) >= goal, process)
    time.sleep(chance.uniform(0, 0.2))
    process.kill()
    process.wait()
    words = [sys.executable, '-m', 'nanomoe.main', f'--workdir={workdir}']
  subprocess.run(
    words, cwd=ROOT, check=True, timeout=100, stdout=subprocess.DEVNULL
  )
  assert metrics_of(workdir) == metrics_of(expected)
  actual, wanted = _checkpoint(workdir, 12), _checkpoint(expected, 12)
  assert actual.keys() == wanted.keys()
  for name, leaf in wanted.items():
    np.testing.assert_array_equal(actual[name], leaf, err_msg=name)
    assert actual[name].dtype == leaf.dtype
  text = (workdir / 'sample.txt').read_text()
  assert text == (expected / 'sample.txt').read_text()


@pytest.mark.parametrize(
  'number',
  [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
)
def test_interrupted_saves_and_exits_75(finished, command, tmp_path, number):
  """In the middle of an evaluation that would take minutes."""
  expected, _ = finished
  workdir = tmp_path / 'interrupted'
  many = {'eval_iters': 100_000, 'eval_interval': 3}
  process = subprocess.Popen(
    command(f'--workdir={workdir}', changes=many),
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )
  log = workdir / 'metrics.jsonl'
  _wait_for(lambda: log.exists() and '"step": 2' in log.read_text(), process)
  time.sleep(2)
  process.send_signal(number)
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 75, out
  assert (result_of(workdir)['status'], result_of(workdir)['step']) == (
    'interrupted',
    3,
  )
  # Goes on with short evaluations, and ends where the other run did.
  words = [sys.executable, '-m', 'nanomoe.main', f'--workdir={workdir}']
  words += ['--config.eval_iters=2', '--config.eval_interval=4']
  subprocess.run(
    words, cwd=ROOT, check=True, timeout=100, stdout=subprocess.DEVNULL
  )
  assert lines_of(workdir)[-1] == lines_of(expected)[-1]


@pytest.mark.slow
def test_diverged_exits_3_and_keeps_the_last_good_state(run, command, tmp_path):
  workdir = tmp_path / 'diverged'
  process = run(
    command(
      f'--workdir={workdir}',
      changes={
        'optimizer.learning_rate': 1e38,
        'num_train_steps': 100,
        'eval_interval': 100,
        'callbacks.non_finite.patience': 3,
      },
    )
  )
  assert process.returncode == 3, process.stderr
  result = result_of(workdir)
  assert result['status'] == 'diverged'
  assert result['skipped_updates'] >= 3
  assert result['step'] < 20
  assert not list((workdir / 'checkpoints').iterdir())
  lines = (workdir / 'metrics.jsonl').read_text()
  assert 'NaN' not in lines and 'Infinity' not in lines and 'null' in lines
