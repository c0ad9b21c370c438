"""Sweeps: their jobs, and that any kill leaves the table as it would be."""

import itertools
import json
import math
import os
import pathlib
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time

from absl.testing import flagsaver
from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from benchmarks import peers
from nanomoe import sweep as sweep_lib
from nanomoe.config import schema
from nanomoe.run import shares
from nanomoe.sweeps import (
  estimate,
  grid,
  jobs,
  outcomes,
  plan,
  runner,
  search,
  slurm,
  stopping,
  table,
)
from nanomoe.sweeps.jobs import Job
from nanomoe.sweeps.outcomes import Point
from tests import runs
from tests.shrunk import ROOT, TINY, mostly_slow
from trainers.errors import UserError

CONFIG = 'configs/base.py'
SWEEP = [sys.executable, '-m', 'nanomoe.sweep', f'--config={CONFIG}']

# Stands for nanomoe.main: trains by appending losses to metrics.jsonl. Each
# start ends with the next exit code; -1 is a loop that a signal must end.
STAND_IN = """
import fcntl, json, os, pathlib, signal, sys, time
directory, codes, losses, seconds = pathlib.Path(sys.argv[1]), *sys.argv[2:]
starts = directory / 'starts'
number = len(starts.read_text()) if starts.exists() else 0
starts.write_text('.' * (number + 1))
(directory / 'cores').write_text(str(len(os.sched_getaffinity(0))))
code = int(codes.split(',')[number])
(directory / 'metrics.jsonl').write_text('')
for step, loss in enumerate(json.loads(losses), 1):
  time.sleep(float(seconds))
  with open(directory / 'metrics.jsonl', 'a') as f:
    f.write(json.dumps({'step': step, 'val/cross_entropy': loss}) + chr(10))
if code == 3:
  result = {'status': 'diverged', 'stop_reason': 'too many refused updates'}
else:
  result = {'status': 'running' if code else 'done'}
(directory / 'result.json').write_text(json.dumps(result))
if code == 2:
  print('error: config.x=1: it is wrong', file=sys.stderr)
if code < 0:
  os.kill(os.getpid(), -code)
sys.exit(code)
"""


class StandIn(Job):
  """Job whose config is the exit codes, losses and seconds of its process."""

  def words(self, workdir):
    code = [sys.executable, '-c', STAND_IN]
    return [*code, str(workdir), *self.config.split(';')]

  def status(self, workdir):
    path = workdir / 'result.json'
    status = json.loads(path.read_text())['status'] if path.exists() else ''
    return status if status in jobs.ENDED else ''


def stand_in(name, codes='0', losses=(), seconds=0.0):
  return StandIn(name, f'{codes};{json.dumps(list(losses))};{seconds}')


def statuses(found):
  return {outcome.name: outcome.status for outcome in found}


def starts(directory, *names):
  return [len((directory / name / 'starts').read_text()) for name in names]


@pytest.fixture(autouse=True)
def _flags():
  """Flags that a test sets are those of no other test."""
  saved = flagsaver.save_flag_values(sweep_lib._FLAGS)
  yield
  flagsaver.restore_flag_values(saved, sweep_lib._FLAGS)


# The jobs.

AXES = st.dictionaries(
  st.sampled_from(['seed', 'batch_size', 'num_train_steps', 'eval_iters']),
  st.lists(st.integers(1, 99), min_size=1, max_size=4, unique=True),
  max_size=3,
)


@settings(deadline=None)
@given(AXES)
def test_a_grid_is_the_product_of_its_values(values):
  texts = [f'{key}={",".join(map(str, v))}' for key, v in values.items()]
  found = grid.expand(grid.parse(texts), [])
  assert [tuple(map(int, item.values())) for item in found] == [
    *itertools.product(*values.values())
  ]
  assert all([*item] == [*values] for item in found)
  assert grid.expand(grid.from_mapping(values), []) == found


@pytest.mark.parametrize(
  ('text', 'values'),
  [
    ('seed=0..2', ['0', '1', '2']),
    ('seed=-1..1', ['-1', '0', '1']),
    ('seed=7..7,9', ['7', '9']),
    ('a=1e2..101', ['100', '101']),
    ('a=x', ['x']),
    ('a=', ['']),
    ('a=b=c', ['b=c']),
    ('data.path=../a..b,../c', ['../a..b', '../c']),
    ('a=[1,2],(3,4)', ['[1,2]', '(3,4)']),
    ("a='1,2',{'b':1,'c':2}", ["'1,2'", "{'b':1,'c':2}"]),
  ],
)
def test_values_of_an_axis(text, values):
  (axis,) = grid.parse([text])
  assert axis.values() == values


def test_each_assignment_of_a_sweep_function_has_the_whole_grid():
  start = [{'batch_size': '1'}, {'batch_size': '2'}]
  found = grid.expand(grid.parse(['seed=0,1']), start)
  assert [(x['batch_size'], x['seed']) for x in found] == [
    *itertools.product('12', '01')
  ]


TEXTS = st.text(st.characters(codec='utf-8'), max_size=200)
CHANGES = st.dictionaries(
  st.sampled_from([*schema.FIELDS, 'callbacks.a.b', 'callbacks.c.b']),
  TEXTS | st.integers() | st.floats() | st.booleans() | st.none(),
  max_size=12,
)


@settings(deadline=None)
@given(st.lists(CHANGES, min_size=2, max_size=4))
def test_names_are_short_safe_and_unique(changes):
  names = [jobs.name(c) for c in changes]
  for name, c in zip(names, changes, strict=True):
    assert re.fullmatch(r'[A-Za-z0-9._+,=~-]{1,100}', name)
    assert name not in ('.', '..')
    assert name == jobs.name(dict(reversed(c.items())))
  # As texts, for NaN is not equal to itself.
  distinct = {json.dumps(c, sort_keys=True) for c in changes}
  assert len(set(names)) == len(distinct)


def test_a_name_has_the_shortest_end_of_a_key_that_no_other_key_has():
  name = jobs.name({'seed': 0, 'optimizer.learning_rate': 3e-4})
  assert name == 'learning_rate=0.0003,seed=0'
  name = jobs.name({'callbacks.non_finite.patience': 2, 'moe.router.type': 'X'})
  assert name == 'non_finite.patience=2,router.type=X'


def test_a_job_has_the_config_of_its_command(tmp_path):
  from nanomoe.config import overrides as config_lib  # noqa: PLC0415

  (job,) = jobs.make(
    CONFIG, [('moe.top_k', '1')], [{'optimizer.learning_rate': '3e-4'}]
  )
  assert job.changes == {'optimizer.learning_rate': 3e-4}
  words = job.words(tmp_path)
  rest, overrides = config_lib.split_arguments(words[3:])
  assert rest == ['-q', f'--config={CONFIG}', f'--workdir={tmp_path}']
  config = config_lib.apply(config_lib.load_file(CONFIG), overrides)
  assert config.to_dict() == job.load().to_dict()
  assert config.moe.top_k == 1
  assert config.optimizer.learning_rate == 3e-4


@pytest.mark.parametrize(
  ('words', 'lines'),
  [
    ([], ['--over']),
    (['--over=optimizer.lerning_rate=1,2'], ['optimizer.learning_rate']),
    (['--over=moe.top_k=b', '--over=seed=0,a'], ["'b'", "'a'"]),
    (['--over=seed=2..0'], ['seed=2..0']),
    (['--over=seed'], ['KEY=VALUE']),
    (['--over=seed=0,,1'], ['empty']),
    (['--over=seed=0,0'], ['seed=0']),
    (['--over=seed=0', '--over=seed=1'], ['twice']),
    (['--over=seed=0..20000'], ['10000']),
    (['--over=seed=1..200', '--over=batch_size=1..200'], ['40000']),
    (['--over=optimizer.learning_rate=1e-4..1e-2'], ['--search=random']),
    (['--over=seed=0', '--config.seed=1'], ['--config.seed']),
    (['--over=moe.top_k=1,99'], ['top_k']),
    (['--over=data.path=/no/file,/no/text'], ['/no/file', '/no/text']),
    (['--over=seed=0', '--num_jobs=2'], ['--num_jobs=2']),
    (['--over=seed=0', '--search=random'], ['--num_jobs']),
    (['--over=seed=0,1', '--search=random', '--num_jobs=3'], ['only 2']),
    (
      ['--over=moe.activation=1..2', '--search=random', '--num_jobs=1'],
      ['moe.activation'],
    ),
    (['--over=seed=0', '--out=/proc/none'], ['--out=/proc/none']),
    (['--over=seed=0', '--out='], ['--out=: it is empty']),
    (["--over=data.path='/a,/b"], ['not closed']),
    (
      ['--over=moe.top_k=90..99', '--search=random', '--num_jobs=2'],
      ['top_k'],
    ),
    (['--over=moe.top_k=1000..1099'], [*['top_k'] * 20, 'and 80 more']),
    (
      ['--over=seed=0', '--launcher=slurm', '--early_stopping=median'],
      ['--early_stopping=median'],
    ),
  ],
)
def test_a_mistake_is_a_line_and_nothing_starts(words, lines, tmp_path):
  out = [f'--out={tmp_path}/out'] * (not any('--out' in w for w in words))
  with pytest.raises(UserError) as error:
    sweep_lib.main(
      sweep_lib._parse(['sweep', f'--config={CONFIG}', *words, *out])
    )
  assert len(error.value.problems) == len(lines)
  for problem, part in zip(error.value.problems, lines, strict=True):
    assert part in problem
    assert '\n' not in problem
  assert not (tmp_path / 'out').exists()


def test_a_run_that_is_not_the_job_is_refused(tmp_path):
  (job,) = jobs.make(CONFIG, [], [{'seed': '0'}])
  (tmp_path / job.name).mkdir()
  values = job.load().to_dict()
  (tmp_path / job.name / 'config.json').write_text(json.dumps(values))
  jobs.check_directories([job], tmp_path)
  for key, was in (('batch_size', 32), ('optimizer.learning_rate', 0.0003)):
    (other,) = jobs.make(CONFIG, [(key, '3')], [{'seed': '0'}])
    with pytest.raises(
      UserError, match=rf'seed=0: {key} was {was}.*choose another --out'
    ):
      jobs.check_directories([other], tmp_path)
  (longer,) = jobs.make(CONFIG, [('num_train_steps', '9999')], [{'seed': '0'}])
  jobs.check_directories([longer], tmp_path)


def test_a_run_is_done_if_it_has_the_config_and_the_steps(tmp_path):
  (job,) = jobs.make(CONFIG, [('num_train_steps', '9')], [{'seed': '0'}])
  values = job.load().to_dict()
  values['moe']['dispatch'] = 'dense'  # What 'auto' has become.

  def status(step=9, kind='done', reason='', **changes):
    (tmp_path / 'config.json').write_text(json.dumps({**values, **changes}))
    result = {'status': kind, 'step': step, 'stop_reason': reason}
    (tmp_path / 'result.json').write_text(json.dumps(result))
    return job.status(tmp_path)

  assert job.status(tmp_path) == ''
  assert status() == 'done'
  assert status(num_train_steps=8) == ''
  # Killed after the config of more steps was written.
  assert status(step=8) == ''
  assert status(step=8, reason='no new best') == 'done'
  assert status(step=8, kind='diverged', reason='NaN') == 'diverged'
  assert status(kind='interrupted') == ''
  (tmp_path / 'result.json').write_text('{')
  assert job.status(tmp_path) == ''


def config_file(directory, sweep):
  path = directory / 'mine.py'
  path.write_text(
    'from configs import base\n'
    'def get_config():\n'
    '  return base.get_config()\n'
    f'def sweep():\n{sweep}\n'
  )
  return path


def test_a_config_file_can_yield_its_jobs(tmp_path, capsys):
  path = config_file(
    tmp_path,
    '  for rate in (1e-3, 3e-4):\n'
    "    yield {'optimizer.learning_rate': rate, 'model.bias': False}",
  )
  words = [f'--config={path}', '--over', 'seed=0..1', f'--out={tmp_path}/out']
  assert sweep_lib._parse(['sweep', *words, '--launcher=slurm']) == []
  assert sweep_lib.main([]) == 0
  capsys.readouterr()
  rows = json.loads((tmp_path / 'out/sweep.json').read_text())['jobs']
  assert [row['name'] for row in rows] == [
    f'bias=false,learning_rate={rate},seed={seed}'
    for rate, seed in itertools.product((0.001, 0.0003), (0, 1))
  ]


@pytest.mark.parametrize(
  ('sweep', 'part'),
  [
    ('  yield 3', 'dicts'),
    ('  return 1 / 0', 'ZeroDivisionError'),
    ("  yield {'seeed': 1}", "'seed'"),
    ("  yield {'seed': 1}", '--over'),
    ('  yield from ()', 'yields no job'),
    ('  while True:\n    yield {}', 'must end'),
    ("  yield {'init_from': None}", 'init_from=None'),
  ],
)
def test_a_mistake_in_a_sweep_function_is_a_line(sweep, part, tmp_path):
  path = config_file(tmp_path, sweep)
  with pytest.raises(UserError) as error:
    sweep_lib.sweep(path, {'seed': '0..1'}, out=tmp_path / 'out')
  (line,) = error.value.problems
  assert part in line


def test_a_value_of_a_sweep_function_keeps_its_type(tmp_path):
  path = config_file(
    tmp_path,
    '  import numpy as np\n'
    "  yield {'optimizer': {'beta1': np.float64(0.5)}, 'init_from': '/a,b'}\n"
    "  yield {'moe.router.names': np.array([1, 2]), 'moe.router.text': '5'}",
  )
  made = plan.make(str(path), [], [], str(tmp_path), plan.Options())
  assert [dict(job.overrides) for job in made.jobs] == [
    {'optimizer.beta1': '0.5', 'init_from': '/a,b'},
    {'moe.router.names': '[1, 2]', 'moe.router.text': "'5'"},
  ]
  assert made.jobs[1].values['moe.router.text'] == '5'


def test_a_comma_within_quotes_belongs_to_a_text():
  (axis,) = grid.parse(["""data.path='/t/a,b.txt',/t/c,"" """.strip()])
  assert axis.values() == ['/t/a,b.txt', '/t/c', '']
  (axis,) = grid.parse(["moe.router.names='a',['b','c']"])
  assert axis.values() == ["'a'", "['b','c']"]


# Random search.


def test_random_draws_are_reproducible_and_in_range():
  axes = grid.parse(
    [
      'optimizer.learning_rate=1e-4..1e-1',
      'optimizer.weight_decay=0..0.5',
      'moe.num_experts=2..5',
      'moe.activation=gelu,relu2',
    ]
  )
  found = search.dimensions(axes)

  def make(drawn):
    return stand_in('job')

  drawn = search.random(found, 400, 3, make)
  assert search.random(found, 40, 3, make) == drawn[:40]
  assert search.random(found, 40, 4, make) != drawn[:40]
  values = {key: [item[key] for item in drawn] for key in drawn[0]}
  assert set(values['moe.num_experts']) == set('2345')
  assert set(values['moe.activation']) == {'gelu', 'relu2'}
  rates = np.array(values['optimizer.learning_rate'], float)
  assert (rates >= 1e-4).all()
  assert (rates <= 1e-1).all()
  # The logarithm is uniform on [-4, -1]: its mean and its deviation.
  logs = np.log10(rates)
  assert logs.mean() == pytest.approx(-2.5, abs=5 * 0.866 / 20)
  assert logs.std() == pytest.approx(3 / math.sqrt(12), rel=0.1)
  decays = np.array(values['optimizer.weight_decay'], float)
  assert decays.mean() == pytest.approx(0.25, abs=5 * 0.144 / 20)


def test_values_that_do_not_go_together_are_drawn_again():
  axes = grid.parse(['moe.num_experts=2..4', 'moe.top_k=1..4'])
  options = plan.Options(search='random', num_jobs=9)
  made = plan.make(CONFIG, axes, [], 'out', options)
  found = {
    (job.values['moe.num_experts'], job.values['moe.top_k'])
    for job in made.jobs
  }
  assert found == {(n, k) for n in (2, 3, 4) for k in range(1, n + 1)}


# The median stopping rule.


def stops_in_order(curves, min_runs):
  """Stops of runs that train one after the other, by the paper's words."""
  kept, found = [], []
  for curve in curves:
    stop = None
    for at in range(1, len(curve) + 1):
      means = [
        statistics.fmean(other[:at]) for other in kept if len(other) >= at
      ]
      is_poor = len(means) >= min_runs and (
        min(curve[:at]) > statistics.median(means)
      )
      if is_poor:
        stop = at
        break
    kept.append(curve[:stop])
    found.append(stop)
  return found


# Enough runs that some are decided upon before others have begun.
CURVES = st.lists(
  st.lists(st.sampled_from([1.0, 2.0, 3.0]), min_size=1, max_size=3),
  min_size=4,
  max_size=7,
)


@settings(deadline=None, max_examples=300)
@given(CURVES, st.data())
def test_the_median_rule_does_not_depend_on_the_order_of_events(curves, data):
  expected = stops_in_order(curves, stopping.MIN_RUNS)
  whole = [[Point(*pair) for pair in enumerate(c, 1)] for c in curves]
  final = [stopping.Progress(points, True) for points in whole]
  assert stopping.stops(final) == expected
  # What is decided early is decided as it is at the end.
  lengths = [data.draw(st.integers(0, len(points))) for points in whole]
  early = [
    stopping.Progress(points[:length], False)
    for points, length in zip(whole, lengths, strict=True)
  ]
  for now, then in zip(stopping.stops(early), expected, strict=True):
    assert now in (None, then)


def test_a_loss_that_is_not_finite_is_the_worst():
  good = [stopping.Progress([Point(1, 2.0)], True)] * stopping.MIN_RUNS
  bad = stopping.Progress([Point(1, math.nan)], True)
  assert stopping.stops([*good, bad])[-1] == 1
  assert stopping.stops([bad] * 9)[-1] is None


@pytest.mark.parametrize('num_parallel', [1, 4])
def test_poor_jobs_stop_at_the_same_step_side_by_side(num_parallel, tmp_path):
  good = [stand_in(f'good{i}', losses=(2.0, 1.0)) for i in range(3)]
  # Its process would take 20 seconds.
  poor = stand_in('poor', '0', (3.0, *[0.0] * 400), 0.05)
  last = stand_in('last', losses=(1.5, 1.0))
  begin = time.monotonic()
  sweep = [*good, poor, last]
  found = runner.run(
    sweep, tmp_path, num_parallel=num_parallel, early_stopping='median'
  )
  assert time.monotonic() - begin < 15
  assert [x.status for x in found] == [*['done'] * 3, 'stopped', 'done']
  assert found[3].step == 1
  assert found[3].best_val_loss == 3.0
  again = runner.run(sweep, tmp_path, early_stopping='median')
  assert again == found
  assert starts(tmp_path, 'poor') == [1]


# The runner.


def test_done_jobs_are_skipped_and_failures_are_isolated(tmp_path):
  sweep = [
    stand_in('bad', '2,1,0'),
    stand_in('killed', '-9,0'),
    stand_in('interrupted', '75,0'),
    stand_in('diverged', '3', [5.0, None]),
    stand_in('good', '0', [3.0, 2.0, 2.5]),
    stand_in('crashed', '-6,0'),
  ]
  found = runner.run(sweep, tmp_path)
  assert statuses(found) == {x.name: x.name for x in sweep} | {
    'bad': 'failed',
    'crashed': 'failed',
    'good': 'done',
  }
  assert found[0].reason == 'config.x=1: it is wrong'
  assert 'SIGKILL' in found[1].reason
  assert found[3].reason == 'too many refused updates'
  assert found[3].best_val_loss == 5.0
  assert found[5].reason == 'crashed by SIGABRT'
  assert found[4] == ('good', 'done', 3, 2.5, 2.0, 2, '')
  assert table.best(found) == found[4]
  found = runner.run(sweep, tmp_path)
  assert [x.status for x in found] == [
    *('failed', 'done', 'done', 'diverged', 'done', 'done')
  ]
  # The second start has printed nothing.
  assert found[0].reason == 'exit code 1'
  found = str(runner.run(sweep, tmp_path))  # NaN is not equal to itself.
  assert str(runner.run(sweep, tmp_path)) == found
  assert str(runner.collect(sweep, tmp_path)) == found
  assert starts(tmp_path, *(x.name for x in sweep)) == [3, 2, 2, 1, 1, 2]


def test_failures_of_earlier_calls_are_listed(tmp_path):
  by_sweep, by_slurm = stand_in('sweep', '2'), stand_in('slurm', '0')
  sweep = [by_sweep, by_slurm]
  runner.run(
    [by_sweep],
    tmp_path,
    record=lambda *found: table.write(tmp_path, {}, *found),
  )
  (tmp_path / 'slurm').mkdir()
  (tmp_path / 'slurm' / 'result.json').write_text(
    json.dumps({'status': 'failed', 'error': 'OSError: no disk'})
  )
  found = runner.collect(sweep, tmp_path)
  assert statuses(found) == {'sweep': 'failed', 'slurm': 'failed'}
  assert [x.reason for x in found] == [
    'config.x=1: it is wrong',
    'OSError: no disk',
  ]


def test_a_job_that_cannot_start_stops_no_other(tmp_path):
  (tmp_path / 'bad').mkdir()
  (tmp_path / 'bad' / 'output.txt').mkdir()
  found = runner.run([stand_in('bad'), stand_in('good')], tmp_path)
  assert statuses(found) == {'bad': 'failed', 'good': 'done'}
  assert 'cannot be started' in found[0].reason


def test_jobs_side_by_side_divide_the_cores(tmp_path, monkeypatch):
  cores = shares.cores()
  sweep = [stand_in(str(i), seconds=0.2, losses=[1.0]) for i in range(4)]
  num_parallel = min(len(cores), 4)
  runner.run(sweep, tmp_path, num_parallel=num_parallel)
  for job in sweep:
    used = int((tmp_path / job.name / 'cores').read_text())
    assert used == len(cores) // num_parallel


def test_jobs_side_by_side_divide_the_gpus(tmp_path, monkeypatch):
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,7')

  class Prints(StandIn):
    def words(self, workdir):
      code = 'import os, time; print(os.environ["CUDA_VISIBLE_DEVICES"])'
      return [sys.executable, '-c', f'{code}; time.sleep(0.5)']

  runner.run([Prints(x, '') for x in 'ab'], tmp_path, num_parallel=2)
  outputs = [(tmp_path / x / outcomes.OUTPUT).read_text() for x in 'ab']
  assert outputs == ['4\n', '7\n']


def test_jobs_share_too_few_gpus(tmp_path, monkeypatch):
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,7')
  names = 'CUDA_VISIBLE_DEVICES', 'XLA_PYTHON_CLIENT_PREALLOCATE'

  class Prints(StandIn):
    def words(self, workdir):
      code = f'import os, time; print(*[os.environ[x] for x in {names}])'
      return [sys.executable, '-c', f'{code}; time.sleep(0.5)']

  runner.run([Prints(x, '') for x in 'abc'], tmp_path, num_parallel=3)
  outputs = [(tmp_path / x / outcomes.OUTPUT).read_text() for x in 'abc']
  assert outputs == ['4 false\n', '7 false\n', '4 false\n']


def test_a_changed_config_file_fails_its_jobs(corpus, tmp_path):
  config = tmp_path / 'mine.py'
  config.write_text((ROOT / CONFIG).read_text())
  (job,) = jobs.make(str(config), _pairs(corpus), [{'seed': '1'}])
  workdir = tmp_path / job.name
  workdir.mkdir()
  result = {'status': 'done', 'step': TINY['num_train_steps']}
  (workdir / 'result.json').write_text(json.dumps(result))

  def status_of_a_run_now():
    values = job.load().to_dict()
    (workdir / 'config.json').write_text(json.dumps(values))
    return job.status(workdir)

  assert status_of_a_run_now() == 'done'
  with config.open('a') as file:
    file.write('_before = get_config\n\n\ndef get_config():\n')
    file.write('  config = _before()\n  config.moe.z_weight = 0.5\n')
    file.write('  return config\n')
  assert status_of_a_run_now() == ''
  slot = runner._Slot(0, 0)
  found = runner._Runner([job], tmp_path)._failure(slot, 0)
  assert found == (
    'failed',
    f'{config} has changed since the jobs were checked',
  )


@pytest.mark.parametrize('status', ['pending', 'done'])
def test_the_default_directory_is_that_of_an_unfinished_sweep(
  status, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  facts = {'config': 'configs/base.py', 'over': {'seed': ['0']}}
  today = pathlib.Path(plan._default('configs/base.py', facts))
  before = today.with_name('sweep-base-20200102')
  before.mkdir(parents=True)
  rows = {'jobs': [{'status': status, 'overrides': {}}]}
  (before / table.FILE).write_text(json.dumps({**facts, **rows}))
  expected = before if status == 'pending' else today
  assert pathlib.Path(plan._default('configs/base.py', facts)) == expected
  other = facts | {'over': {'seed': ['0..9']}}
  today.mkdir()
  (today / table.FILE).write_text(json.dumps({**facts, **rows}))
  assert plan._default('configs/base.py', facts) == str(today)
  assert plan._default('configs/base.py', other) == f'{today}-2'
  (today / table.FILE).write_text('{')  # Damage stops no other sweep.
  assert plan._default('configs/base.py', other) == f'{today}-2'


@pytest.mark.parametrize(
  ('over', 'words'),
  [
    ('seed=0..100000000000000000000', '64 bits'),
    ('optimizer.learning_rate=1e-4..1e999', 'finite'),
  ],
)
def test_ends_of_a_search_that_cannot_be_drawn(over, words):
  with pytest.raises(UserError, match=words):
    search.dimensions(grid.parse([over]))


def test_two_sweeps_in_a_directory_are_refused(tmp_path):
  with (
    runner._opened_log(tmp_path),
    pytest.raises(UserError, match=r'another sweep'),
  ):
    runner.run([stand_in('a')], tmp_path)


SWEEPS_STAND_INS = """
import pathlib, sys
from nanomoe.run import cli
from nanomoe.sweeps import runner
from tests.test_sweep import stand_in
def main(_):
  sweep = [stand_in(x, '0,0', [1.0] * 8, 0.1) for x in 'abc']
  runner.run(sweep, pathlib.Path(sys.argv[1]), num_parallel=2)
  return 0
cli.run(main, lambda words: words)
"""


def test_jobs_of_a_killed_sweep_end_and_the_next_sweep_waits(tmp_path):
  """A process of the killed sweep may still hold the output of its job."""
  sweep = [stand_in('a', '0,0')]
  (tmp_path / 'a').mkdir()
  script = (
    'import fcntl, pathlib, sys, time\n'
    'directory = pathlib.Path(sys.argv[1])\n'
    f'log = open(directory / "{outcomes.OUTPUT}", "w")\n'
    'fcntl.flock(log, fcntl.LOCK_EX)\n'
    'print("locked", flush=True)\n'
    'time.sleep(0.5)\n'
    '(directory / "result.json").write_text(\'{"status": "done"}\')\n'
  )
  with subprocess.Popen(
    [sys.executable, '-c', script, tmp_path / 'a'], stdout=subprocess.PIPE
  ) as other:
    assert other.stdout
    other.stdout.readline()
    assert statuses(runner.run(sweep, tmp_path)) == {'a': 'done'}
  assert not (tmp_path / 'a' / 'starts').exists()


@pytest.mark.parametrize(
  'number', mostly_slow([signal.SIGINT, signal.SIGKILL], signal.SIGKILL)
)
def test_a_signal_ends_the_jobs_of_a_sweep(number, tmp_path):
  """Ctrl-C ends the sweep with 75; also kill -9 leaves no job behind."""
  process = subprocess.Popen(
    [sys.executable, '-c', SWEEPS_STAND_INS, str(tmp_path)],
    cwd=ROOT,
    stderr=subprocess.PIPE,
    # A shell's background jobs ignore SIGINT.
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
  )
  while not all((tmp_path / x / 'metrics.jsonl').exists() for x in 'ab'):
    time.sleep(0.05)
    assert process.poll() is None
  process.send_signal(number)
  code = process.wait(timeout=20)
  assert code == (75 if number == signal.SIGINT else -signal.SIGKILL)
  assert process.stderr
  process.stderr.close()
  deadline = time.monotonic() + 10
  while any(outcomes.is_running(tmp_path / x) for x in 'ab'):
    assert time.monotonic() < deadline
    time.sleep(0.05)
  sweep = [stand_in(x, '0,0', [1.0] * 8, 0.1) for x in 'abc']
  found = runner.run(sweep, tmp_path, num_parallel=3)
  assert set(statuses(found).values()) == {'done'}
  assert starts(tmp_path, 'a', 'b', 'c') == [2, 2, 1]


def test_an_interrupted_sweep_lets_its_jobs_save(tmp_path):
  """Each job gets one signal: a second one would end it before it saved."""
  script = (
    'import os, pathlib, signal, sys\n'
    'both = {signal.SIGINT, signal.SIGTERM}\n'
    'signal.pthread_sigmask(signal.SIG_BLOCK, both)\n'
    'path = pathlib.Path(sys.argv[1]) / "saved"\n'
    'path.touch()\n'
    'while signal.sigtimedwait(both, 60 if not sys.argv[2:] else 0.3):\n'
    '  sys.argv.append("again")\n'
    '  with open(path, "a") as f: f.write(f"{os.getpgrp()} saved.")\n'
  )

  class Saves(StandIn):
    def words(self, workdir):
      return [sys.executable, '-c', script, str(workdir)]

  path = tmp_path / 'a' / 'saved'

  def interrupt():
    while not path.exists():
      time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)

  # A shell's background jobs ignore it.
  old = signal.signal(signal.SIGINT, signal.default_int_handler)
  threading.Thread(target=interrupt).start()
  try:
    with pytest.raises(KeyboardInterrupt):
      runner.run([Saves('a', '')], tmp_path)
  finally:
    signal.signal(signal.SIGINT, old)
  group, told = path.read_text().split()
  assert int(group) != os.getpgrp()
  assert told == 'saved.'


def test_a_table_has_a_row_for_each_job_and_the_reasons():
  found = [
    outcomes.Outcome('a', 'done', 20, 2.5, 2.25, 10),
    outcomes.Outcome('b', 'failed', reason='x=1: it is wrong'),
    outcomes.Outcome('c', 'diverged', 5, math.nan, math.nan, 5, 'NaN'),
  ]
  lines = table.text(found).splitlines()
  assert lines[2].split() == ['a', 'done', '20', '2.500000', '2.250000', '10']
  assert lines[3].split() == ['b', 'failed']
  assert lines[6] == 'best: a'
  assert lines[8:] == ['b: failed: x=1: it is wrong', 'c: diverged: NaN']


# The command.


def words_of(corpus, out, *more, changes=None):
  values = {**TINY, 'data.path': corpus, **(changes or {})}
  given = [f'--config.{key}={value}' for key, value in values.items()]
  return [*SWEEP, f'--out={out}', *given, *more]


@pytest.mark.slow
def test_a_killed_sweep_ends_with_the_losses_of_an_undisturbed_run(
  finished, corpus, tmp_path, run
):
  workdir, _ = finished
  seed = json.loads((workdir / 'config.json').read_text())['seed']
  words = words_of(corpus, tmp_path / 'out', f'--over=seed={seed}')
  process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL)
  metrics = tmp_path / 'out' / f'seed={seed}' / 'metrics.jsonl'
  while not metrics.exists() or not metrics.read_text().count('\n'):
    assert process.poll() is None
    time.sleep(0.02)
  process.kill()
  process.wait()
  again = run(words, timeout=300)
  assert again.returncode == 0, again.stderr
  assert f'best: seed={seed}' in again.stdout
  (row,) = json.loads((tmp_path / 'out/sweep.json').read_text())['jobs']
  points = outcomes.curve(workdir)
  assert (row['step'], row['val_loss']) == points[-1]
  assert row['best_val_loss'] == min(point.loss for point in points)
  assert runs.metrics_of(metrics.parent) == runs.metrics_of(workdir)


@pytest.mark.slow
def test_a_dry_run_lists_jobs_and_measures_finished_runs(
  finished, tmp_path, capsys
):
  workdir, _ = finished
  (tmp_path / 'seed=0').symlink_to(workdir)
  # Another worker may have trained the run, on its copy of the text.
  trained = json.loads((workdir / 'config.json').read_text())
  corpus = trained['data']['path']
  words = words_of(corpus, tmp_path, '--over=seed=0..2', '--dry_run')
  assert sweep_lib.main(sweep_lib._parse(words[2:])) == 0
  out = capsys.readouterr().out
  assert re.search(r'seed=0 +done', out)
  assert re.search(r'seed=2 +pending', out)
  assert '2 of 3 jobs are left' in out
  assert not (tmp_path / 'seed=1').exists()
  assert not (tmp_path / table.FILE).exists()
  # A job of equal size takes as long as the run did.
  all_jobs = [
    Job(name, CONFIG, [('seed', name[-1]), *_pairs(corpus)])
    for name in ('seed=0', 'seed=1', 'seed=2')
  ]
  found = estimate.make(all_jobs, all_jobs[1:], tmp_path, num_parallel=2)
  seconds = runs.result_of(workdir)['seconds_by_phase']
  assert found.seconds == pytest.approx(sum(seconds.values()))


def _pairs(corpus):
  return [(k, str(v)) for k, v in {**TINY, 'data.path': corpus}.items()]


# SLURM.

SBATCH = r"""#!/usr/bin/env bash
# Stands for sbatch: runs the tasks of an array one after the other.
set -e
array=$(sed -n 's/^#SBATCH --array=\([^%]*\).*/\1/p' "$1")
for part in ${array//,/ }; do
  for task in $(seq "${part%-*}" "${part#*-}"); do
    SLURM_ARRAY_TASK_ID=$task SLURM_JOB_ID=9$task bash "$1" || true
  done
done
"""
SRUN = '#!/usr/bin/env bash\nexec "$@"\n'
SCONTROL = '#!/usr/bin/env bash\necho "$@" >> "$RECORD.requeued"\n'
PYTHON = r"""#!/usr/bin/env bash
# Stands for Python; the second job is interrupted.
printf '%s\n' "$PWD" "$@" END >> "$RECORD"
[[ "$*" == *seed=1* ]] && exit 75
exit 0
"""


@pytest.mark.parametrize('has_srun', [True, False])
def test_the_array_script_runs_each_job_that_is_left(
  corpus, tmp_path, capsys, monkeypatch, has_srun
):
  out = tmp_path / "it's 100% mine"
  bin_directory = tmp_path / 'bin'
  bin_directory.mkdir()
  tools = {'sbatch': SBATCH}
  if has_srun:
    tools |= {'srun': SRUN, 'scontrol': SCONTROL}
  for name, text in {**tools, 'py': PYTHON}.items():
    (bin_directory / name).write_text(text)
    (bin_directory / name).chmod(0o755)
  words = words_of(corpus, out, '--over=seed=0..2', '--launcher=slurm')
  monkeypatch.chdir(ROOT)
  assert sweep_lib.main(sweep_lib._parse([*words[2:], '--jobs=2'])) == 0
  command = capsys.readouterr().out
  assert not (out / 'seed=0').exists()
  script = (out / slurm.FILE).read_text()
  assert '#SBATCH --array=0-2%2\n' in script
  environ = {
    **os.environ,
    'PATH': f'{bin_directory}:{os.environ["PATH"]}',
    'PYTHON': str(bin_directory / 'py'),
    'RECORD': str(tmp_path / 'record'),
  }
  subprocess.run(['bash', '-c', command], env=environ, cwd='/', check=True)
  record = (tmp_path / 'record').read_text()
  *starts_of_jobs, rest = record.split('\nEND\n')
  assert not rest
  changes = [{'seed': str(seed)} for seed in range(3)]
  expected = jobs.make(CONFIG, _pairs(corpus), changes)
  for job, text in zip(expected, starts_of_jobs, strict=True):
    assert text.splitlines() == [str(ROOT), *job.words(out / job.name)[1:]]
  if has_srun:
    assert (tmp_path / 'record.requeued').read_text() == 'requeue 91\n'


# Slow tests.


def _children(pid: int) -> list[int]:
  found = []
  for path in pathlib.Path('/proc').glob('[0-9]*/stat'):
    try:
      parent = path.read_text().rpartition(')')[2].split()[1]
    except OSError:
      continue
    if int(parent) == pid:
      found.append(int(path.parent.name))
  return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='it reads /proc')
def test_a_sweep_killed_at_random_moments_has_the_table_of_a_calm_one(
  corpus, tmp_path, run
):
  def words(name):
    return words_of(
      corpus,
      tmp_path / name,
      '--over=optimizer.learning_rate=1e-5,1e-3',
      '--over=seed=0..2',
      '--jobs=2',
      '--early_stopping=median',
    )

  calm = run(words('calm'), timeout=600)
  assert calm.returncode == 0, calm.stderr
  rng = random.Random(0)
  kills = 0
  while True:
    process = subprocess.Popen(
      words('killed'), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    while kills < 5 and process.poll() is None:
      time.sleep(rng.uniform(0.5, 6))
      victims = _children(process.pid) if kills % 2 else [process.pid]
      if victims and process.poll() is None:
        os.kill(rng.choice(victims), signal.SIGKILL)
        kills += 1
    out, _ = process.communicate(timeout=600)
    if process.returncode == 0:
      break
    assert process.returncode in (1, -signal.SIGKILL)
  assert kills >= 2  # A quick machine is done before the fifth.
  assert out == calm.stdout
  first, second = (
    (tmp_path / name / table.FILE).read_text() for name in ('calm', 'killed')
  )
  assert first == second


OPTUNA = """
import json, pathlib, sys
from nanomoe.sweeps import grid, jobs, runner, search
from tests.test_sweep import StandIn
out, num_parallel, limit = pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:4])
texts = ['optimizer.learning_rate=1e-4..1e-1', 'moe.num_experts=2..16',
         'moe.activation=gelu,relu2']
found = search.dimensions(grid.parse(texts))
pairs = []
def make(drawn):
  (job,) = jobs.make('configs/base.py', [('moe.top_k', '1')], [drawn])
  rate = job.changes['optimizer.learning_rate']
  loss = (rate - 0.01) ** 2 + (drawn['moe.activation'] == 'gelu')
  # Stand-ins that train for different times.
  seconds = (len(job.name) % 3) / 20
  config = f'0,0,0,0;{json.dumps([loss])};{seconds}'
  return StandIn(job.name, config, job.overrides, job.changes)
ask = search.optuna_ask(found, limit, 0, num_parallel, make)
facts = {'search': 'optuna'}
def record(all_jobs, outcomes):
  from nanomoe.sweeps import table
  table.write(out, facts, all_jobs, outcomes)
given = [make(drawn) for drawn in search.stored(out, facts)]
for outcome in runner.run(given, out, num_parallel=num_parallel, ask=ask,
                          record=record):
  print(*outcome)
"""


@pytest.mark.slow
@pytest.mark.parametrize('num_parallel', [3])
def test_a_killed_optuna_sweep_asks_for_the_same_jobs(num_parallel, tmp_path):
  python = peers.python_with('optuna', ['optuna==5.0.0'])
  # Everything but Optuna is that of the tests.
  path = [str(ROOT), *[p for p in sys.path if p.endswith('site-packages')]]
  environ = {**os.environ, 'PYTHONPATH': ':'.join(path)}

  def start(name, limit=16):
    out = tmp_path / name
    out.mkdir(exist_ok=True)
    words = [python, '-c', OPTUNA, out, str(num_parallel), str(limit)]
    return subprocess.Popen(
      words, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True
    )

  calm, _ = start('calm').communicate(timeout=300)
  assert len(calm.splitlines()) == 16
  rng = random.Random(0)
  for _ in range(5):
    with start('killed') as process:
      time.sleep(rng.uniform(1.5, 5))
      process.kill()
  # A sweep with fewer jobs is the beginning of one with more.
  start('killed', 8).communicate(timeout=300)
  killed, _ = start('killed').communicate(timeout=300)
  assert killed == calm
  rows = [line.split() for line in calm.splitlines()]
  assert all(row[1] == 'done' for row in rows)
  # Later suggestions are better than the first ones, which are random.
  losses = [float(row[4]) for row in rows]
  assert statistics.fmean(losses[10:]) < statistics.fmean(losses[:10])
