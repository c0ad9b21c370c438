"""Writers of trackers: a CSV table, and real runs of W&B and MLflow."""

import configparser
import csv
import json
import math
import os
import signal
import subprocess
import time

import numpy as np
import pytest

from benchmarks import peers
from nanomoe import experiment
from tests import runs
from tests.shrunk import ROOT, TINY
from trainers.errors import UserError
from trainers.writers.csv_table import Csv
from trainers.writers.run_writer import TensorBoardLayout
from trainers.writers.tracker import Journal
from trainers.writers.writers import Writer, Writers


def read(path):
  """{step: {metric: value}} of a CSV table."""
  with path.open(newline='') as file:
    return {
      int(row.pop('step')): {k: float(v) for k, v in row.items() if v}
      for row in csv.DictReader(file)
    }


@pytest.fixture
def table(tmp_path):
  """Returns a function that opens the table after a step."""
  opened = []

  def start(step):
    writer = Csv(tmp_path)
    writer.start(step, {})
    opened.append(writer)
    return writer

  yield start
  for writer in opened:
    writer.close()


def test_a_step_is_a_row_and_a_new_metric_a_column(table, tmp_path):
  writer = table(0)
  writer.write_scalars(1, {'b': 1.0})
  writer.write_scalars(1, {'a': np.float32(0.5), 'b': 2.0})
  writer.write_scalars(2, {'a': math.pi})
  writer.write_scalars(2, {'c': np.array(1e-30)})
  assert (tmp_path / 'metrics.csv').read_text().count('step') == 1
  assert read(tmp_path / 'metrics.csv') == {
    1: {'a': 0.5, 'b': 2.0},
    2: {'a': math.pi, 'c': 1e-30},
  }


@pytest.mark.parametrize('cut', [0, 1, 3])
def test_a_resumed_table_has_each_step_once(table, tmp_path, cut):
  """Also if a kill left a part of the last row."""
  path = tmp_path / 'metrics.csv'
  writer = table(0)
  for step in (1, 2, 3):
    writer.write_scalars(step, {'loss': step / 10})
  path.write_bytes(path.read_bytes()[: -cut or None])
  writer = table(2)
  writer.write_scalars(2, {'val': 7.0})  # A hook that was left to run.
  writer.write_scalars(3, {'loss': 33.0})
  assert read(path) == {
    1: {'loss': 0.1},
    2: {'loss': 0.2, 'val': 7.0},
    3: {'loss': 33.0},
  }


def test_a_shorter_row_replaces_a_longer_one(table, tmp_path):
  writer = table(0)
  writer.write_scalars(1, {'a': 0.123456789, 'b': 1.0})
  writer.write_scalars(1, {'a': 1.0})
  assert read(tmp_path / 'metrics.csv') == {1: {'a': 1.0, 'b': 1.0}}


def test_any_table_of_numbers_is_kept(table, tmp_path, rng):
  """Against a dict: random metrics, restarts and repeated steps."""
  expected: dict = {}
  writer, step = table(0), 0
  for _ in range(200):
    if rng.random() < 0.1:
      step = int(rng.integers(0, step + 1))
      writer.close()
      writer = table(step)
      expected = {k: v for k, v in expected.items() if k <= step}
    step += int(rng.integers(0, 2))
    names = rng.choice(list('abcdefgh'), 3)
    values = {str(name): float(rng.normal()) for name in names}
    writer.write_scalars(step, values)
    expected.setdefault(step, {}).update(values)
  assert read(tmp_path / 'metrics.csv') == expected


def test_a_table_is_a_file_of_the_workdir(tmp_path):
  for name in ('../other.csv', 'a/b.csv'):
    with pytest.raises(ValueError, match='name='):
      Csv(tmp_path, name)


def test_a_journal_keeps_what_training_does_not_repeat(tmp_path):
  journal = Journal(tmp_path / 'journal')
  assert not list(journal.keep(0))
  for step in (1, 2, 3):
    values = {'x': float('nan'), 'y': step}
    journal.add({'step': step, 'kind': 'scalars', 'values': values})
  with (tmp_path / 'journal' / 'journal.jsonl').open('a') as file:
    file.write('{"step": 2, "ki')  # As a kill leaves it.
  kept = list(Journal(tmp_path / 'journal').keep(2))
  assert [record['step'] for record in kept] == [1, 2]
  assert kept[0]['values'] == {'x': None, 'y': 1}
  assert list(journal.keep(9)) == kept


def test_writers_are_told_where_a_run_begins(tmp_path):
  calls = []

  class Mine(Writer):
    def start(self, step, hparams):
      calls.append((step, dict(hparams)))

    def write_scalars(self, step, scalars):
      calls.append((step, dict(scalars)))

  writers = Writers(tmp_path, [Mine()], TensorBoardLayout(hparams={'lr': 0.1}))
  writers.start(0, 0)
  writers.write(1, {'loss': 0.5})
  writers.start(0, 0)  # A rollback.
  writers.close('done')
  assert calls == [(0, {'lr': 0.1}), (1, {'loss': 0.5}), (0, {'lr': 0.1})]


@pytest.mark.parametrize(
  ('kind', 'package'), [('Wandb', 'wandb'), ('MLflow', 'mlflow')]
)
def test_a_missing_package_is_one_line(
  kind, package, tiny, tmp_path, monkeypatch
):
  monkeypatch.setitem(__import__('sys').modules, package, None)
  monkeypatch.setenv('MLFLOW_ALLOW_FILE_STORE', 'true')
  with pytest.raises(UserError) as error:
    experiment.build_writers(tiny({'writers.mine.type': kind}), tmp_path)
  (line,) = error.value.problems
  assert line.startswith('writers.mine: ')
  assert f'nanomoe[{package}]' in line


def test_a_writer_has_a_short_name(tiny, tmp_path):
  config = tiny({'writers.table.type': 'Csv', 'writers.table.name': 'a.csv'})
  (writer,) = experiment.build_writers(config, tmp_path)
  assert isinstance(writer, Csv)


TRACKED = {
  'writers.a.type': 'Csv',
  'writers.b.type': 'Wandb',
  'writers.c.type': 'MLflow',
  'checkpoint.keep_latest': 5,
}


def _environment():
  """The interpreter and the variables of a run with real trackers."""
  options = configparser.ConfigParser()
  options.read(ROOT / 'setup.cfg')
  ours = options['options']['install_requires'].split('\n')[1:]
  python = peers.python_with('trackers', ['wandb', 'mlflow', *ours])
  return python, peers.environment(ours=True)


@pytest.mark.slow
def test_real_trackers_continue_after_kills(corpus, tmp_path):
  """Each has every step once, with the values of metrics.jsonl."""
  python, environment = _environment()
  workdir = tmp_path / 'run'
  values = {**TINY, **TRACKED, 'data.path': corpus, 'num_train_steps': 400}
  values['eval_interval'] = 40
  words = [
    *(python, '-m', 'nanomoe.main', '--config=configs/base.py'),
    f'--workdir={workdir}',
    *(f'--config.{key}={value}' for key, value in values.items()),
  ]

  def kill_after(step):
    process = subprocess.Popen(words, cwd=ROOT, env=environment)
    deadline = time.monotonic() + 600
    while _last_step(workdir) < step:
      assert process.poll() is None
      assert time.monotonic() < deadline
      time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()

  kill_after(90)
  kill_after(170)
  first = json.loads((workdir / 'wandb.json').read_text())
  # Another learning rate: superseded steps get other values.
  words += ['--config.optimizer.learning_rate=1e-3']
  finished = subprocess.run(
    words, cwd=ROOT, env=environment, capture_output=True, text=True
  )
  assert finished.returncode == 0, finished.stderr
  assert 'failed' not in finished.stderr
  process = subprocess.run(
    [python, ROOT / 'tests/reference/read_trackers.py', workdir],
    env=environment,
    capture_output=True,
    text=True,
    check=True,
  )
  found = json.loads(process.stdout)
  expected = _scalars(workdir)
  assert read(workdir / 'metrics.csv') == expected
  result = runs.result_of(workdir)

  wandb = found['wandb']
  assert wandb['id'] == first['id']
  history = {
    int(step): {k: v for row in rows for k, v in row.items() if k in names}
    for step, rows in wandb['history'].items()
    if (names := set(expected.get(int(step), {})))
  }
  assert history == expected
  assert all(len(rows) == 1 for rows in wandb['history'].values())
  assert wandb['config']['optimizer.learning_rate']['value'] == 1e-3
  assert wandb['summary']['best_val_loss'] == result['best_val_loss']
  assert wandb['summary']['status'] == 'done'
  assert wandb['exit'] == 0
  assert {'.png', '.html'} <= set(wandb['media'])

  mlflow = found['mlflow']
  by_step: dict = {}
  for name, points in mlflow['history'].items():
    assert len({step for step, _ in points}) == len(points), name
    for step, value in points:
      if not name.startswith('result/'):
        by_step.setdefault(step, {})[name] = value
  assert by_step == expected
  assert mlflow['params']['optimizer.learning_rate'] == '0.001'
  assert mlflow['status'] == 'FINISHED'
  last = mlflow['history']['result/best_val_loss'][-1]
  assert last[1] == result['best_val_loss']
  assert mlflow['tags']['result.status'] == 'done'
  kinds = {os.path.splitext(path)[1] for path in mlflow['files']}
  assert kinds == {'.png', '.txt'}


def _last_step(workdir) -> int:
  try:
    lines = (workdir / 'metrics.jsonl').read_bytes().split(b'\n')[:-1]
  except FileNotFoundError:
    return 0
  return json.loads(lines[-1])['step'] if lines else 0


def _scalars(workdir) -> dict:
  """{step: {metric: value}} of metrics.jsonl, vectors by element."""
  found: dict = {}
  for line in runs.lines_of(workdir):
    cells = found.setdefault(line.pop('step'), {})
    for name, value in line.items():
      values = {name: value}
      if isinstance(value, list):
        values = {f'{name}/{i}': x for i, x in enumerate(value)}
      cells.update({k: v for k, v in values.items() if np.ndim(v) == 0})
  return found
