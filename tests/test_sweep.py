"""Sweeps go on where they were; a study's runs are what they say."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from benchmarks import (
  ablation,
  config_runs,
  precision_curves,
  results,
  routing_study,
  sweep,
)
from benchmarks.sweep import Run
from nanomoe import experiment
from nanomoe.config import overrides as config_lib
from nanomoe.config import schema
from nanomoe.model import parameters as parameters_lib
from tests.shrunk import TINY

# Stands for nanomoe.main: each start of it has the next exit code.
STAND_IN = """
import json, pathlib, sys
directory = pathlib.Path(sys.argv[2])
directory.mkdir(exist_ok=True)
starts = directory / 'starts'
number = len(starts.read_text()) if starts.exists() else 0
starts.write_text('.' * (number + 1))
code = int(sys.argv[3].split(',')[number])
result = {'status': 'running' if code else 'done', 'argv': sys.argv}
(directory / 'result.json').write_text(json.dumps(result))
sys.exit(code)
"""


class StandIn(Run):
  """Its config is the exit codes of its starts."""

  def words(self, directory):
    code = [sys.executable, '-c', STAND_IN]
    return [*code, '-q', str(directory), self.config]


@pytest.fixture
def starts(tmp_path):
  def of(*names):
    return [len((tmp_path / name / 'starts').read_text()) for name in names]

  return of


def test_what_is_done_is_skipped_and_the_rest_goes_on(tmp_path, starts):
  runs = {
    'good': StandIn('0'),
    'bad': StandIn('2,3,0'),
    'killed': StandIn('-9,0'),
  }
  assert sweep.train(runs, tmp_path) == ['bad', 'killed']
  assert sweep.train(runs, tmp_path) == ['bad']
  assert sweep.train(runs, tmp_path) == []
  assert sweep.train(runs, tmp_path) == []
  assert starts(*runs) == [1, 3, 2]
  log = (tmp_path / 'sweep.log').read_text()
  assert log.count('exit code') == 6


def test_a_run_that_was_interrupted_ends_the_sweep(tmp_path, starts):
  runs = {'stopped': StandIn('75,0'), 'later': StandIn('0')}
  with pytest.raises(KeyboardInterrupt):
    sweep.train(runs, tmp_path)
  assert not (tmp_path / 'later').exists()
  assert sweep.train(runs, tmp_path) == []
  assert starts(*runs) == [2, 1]


def test_other_words_mean_another_end(tmp_path, starts):
  """More steps, for example: what is there goes on, or refuses."""
  assert sweep.train({'a': StandIn('0')}, tmp_path) == []
  assert sweep.train({'a': StandIn('0,0')}, tmp_path) == []
  assert starts('a') == [2]


def test_a_run_whose_sweep_was_killed_is_waited_for(tmp_path):
  runs = {'a': StandIn('2')}
  words = runs['a'].words(tmp_path / 'a')
  result = json.dumps({'status': 'done', 'argv': words[2:]})
  (tmp_path / 'a').mkdir()
  script = (
    'import fcntl, pathlib, sys, time\n'
    'directory = pathlib.Path(sys.argv[1])\n'
    'log = open(directory / "log.txt", "w")\n'
    'fcntl.flock(log, fcntl.LOCK_EX)\n'
    'print("locked", flush=True)\n'
    'time.sleep(0.5)\n'
    '(directory / "result.json").write_text(sys.argv[2])\n'
  )
  with subprocess.Popen(
    [sys.executable, '-c', script, tmp_path / 'a', result],
    stdout=subprocess.PIPE,
  ) as other:
    other.stdout.readline()
    assert sweep.train(runs, tmp_path) == []
  assert not (tmp_path / 'a' / 'starts').exists()


def test_an_interrupted_sweep_lets_its_run_save(tmp_path):
  """One signal, for Ctrl-C is not for its group: a second would end it."""
  script = (
    'import os, pathlib, signal, sys\n'
    'both = {signal.SIGINT, signal.SIGTERM}\n'
    'signal.pthread_sigmask(signal.SIG_BLOCK, both)\n'  # None comes too soon.
    'pathlib.Path(sys.argv[1]).touch()\n'
    'while signal.sigtimedwait(both, 60 if not sys.argv[2:] else 0.3):\n'
    '  sys.argv.append("again")\n'
    '  with open(sys.argv[1], "a") as f: f.write(f"{os.getpgrp()} saved.")\n'
  )
  path = tmp_path / 'saved'

  def interrupt():
    while not path.exists():
      time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)

  # A shell's background jobs ignore it.
  old = signal.signal(signal.SIGINT, signal.default_int_handler)
  threading.Thread(target=interrupt).start()
  try:
    with open(tmp_path / 'log', 'w') as log, pytest.raises(KeyboardInterrupt):
      sweep._call([sys.executable, '-c', script, str(path)], log)
  finally:
    signal.signal(signal.SIGINT, old)
  group, told = path.read_text().split()
  assert int(group) != os.getpgrp()
  assert told == 'saved.'


def test_the_words_of_a_run_are_its_config(tmp_path):
  changes = {'moe.top_k': 1, 'moe.router.type': 'Softmax', 'data.path': ''}
  run = Run('configs/quick.py', changes, seed=7)
  rest, overrides = config_lib.split_arguments(run.words(tmp_path)[2:])
  assert rest[1:] == [
    '-q',
    '--config=configs/quick.py',
    f'--workdir={tmp_path}',
  ]
  file = config_lib.load_file('configs/quick.py')
  config = config_lib.apply(file, overrides)
  own = {**changes, 'seed': 7}
  flat = dict(schema.flatten(config.to_dict()))
  assert {key: flat[key] for key in own} == own
  assert run.load().to_dict() == {**config.to_dict(), 'seed': 0}


def test_figures_of_a_run_are_those_it_logged(tmp_path):
  metrics = [
    {'step': 2, 'train/loss': 5.0, 'train/cross_entropy': 4.0},
    {'step': 4, 'train/loss': 4.0, 'train/cross_entropy': 3.0},
    {'step': 4, 'val/cross_entropy': 3.5, 'val/bits_per_char': 5.0},
    {'step': 6, 'val/cross_entropy': 2.5, 'val/bits_per_char': 4.0},
  ]
  changes = {'moe.router.type': 'ExpertChoice', 'data.path': tmp_path / 'text'}
  run = Run('configs/base.py', {**TINY, **changes})
  result = {**dict.fromkeys(results._KEPT, 1), 'vocab_size': 5}
  for name, status in (('done', 'done'), ('half', 'interrupted')):
    directory = tmp_path / name
    directory.mkdir()
    (directory / 'metrics.jsonl').write_text(
      '\n'.join(map(json.dumps, metrics))
    )
    (directory / 'result.json').write_text(
      json.dumps({**result, 'status': status, 'argv': run.words(directory)[2:]})
    )
  runs = {'done': run, 'half': run, 'not begun': run}
  figures = sweep.gather(runs, tmp_path)
  assert list(figures) == ['done']
  got = figures['done']
  assert [list(row.values()) for row in got['rows']] == [
    [4, 3.0, 3.5, 5.0],
    [6, 3.0, 2.5, 4.0],
  ]
  assert got['last'] == {'val/cross_entropy': 2.5, 'val/bits_per_char': 4.0}
  assert got['is_causal'] is False
  assert got['changes']['data.path'] == 'text'
  assert got['gflop'] > 0
  assert json.loads(json.dumps(figures)) == figures


def parameters(config, **model):
  config.model.update(model)
  task = experiment.build_task(experiment.resolve_auto(config), 65)
  batch = {'inputs': jnp.zeros((1, config.block_size), jnp.int32)}
  params, _ = jax.eval_shape(task.init, jax.random.key(0), batch)
  return parameters_lib.count(params, config.moe.top_k)


@pytest.mark.parametrize('name', routing_study.VARIANTS)
def test_a_variant_of_routing_has_the_active_parameters_of_all(name):
  """And all have as many in all, but for what routers and dense layers are."""
  counted, dense, wide = (
    parameters(routing_study.RUNS[f'{n}-0'].load(), num_layers=1)
    for n in (name, 'dense', 'dense_total')
  )
  total = wide['num_params']
  if name not in ('dense', 'dense_total'):
    assert counted['num_params'] == pytest.approx(total, rel=0.02)
  if name != 'dense_total':
    assert counted['num_active_params'] == pytest.approx(
      dense['num_active_params'], rel=0.03
    )


def test_runs_of_a_study_differ_in_what_they_are_named_after():
  seen = {}
  for study in (ablation, routing_study, precision_curves):
    for name, run in study.RUNS.items():
      assert name.rpartition('-')[2] == str(run.seed)
      key = json.dumps([run.config, run.changes, run.seed], sort_keys=True)
      assert seen.setdefault((study, key), name) == name


@pytest.mark.parametrize('name', config_runs.CONFIGS)
def test_a_config_uses_for_a_token_about_what_base_does(name):
  counted = parameters(config_runs.RUNS[name].load())
  # 4 layers of attention, two experts of 512 and a router of 4, by hand.
  attention = 4 * (128 * 128 + 128)
  experts = 2 * (2 * 128 * 512 + 512 + 128) + 4 * 128
  layers = 4 * (attention + experts)
  assert counted['num_active_params'] == pytest.approx(layers, rel=0.1)
