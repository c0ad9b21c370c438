"""Writers of trackers: a CSV table, and real runs of W&B and MLflow."""

import configparser
import csv
import json
import math
import signal
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import peers
from nanomoe import experiment
from tests.shrunk import ROOT
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
  monkeypatch.setitem(sys.modules, package, None)
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


# Start, stop, learning rate and end of each process. The first one is killed
# after step 9, and its newest checkpoint is that of step 6.
STARTS = [(0, 9, 1, 'kill'), (6, 8, 2, 'interrupted'), (8, 12, 3, 'done')]


@pytest.fixture(scope='module')
def python():
  """The interpreter of an environment with the real packages."""
  options = configparser.ConfigParser()
  options.read(ROOT / 'setup.cfg')
  ours = options['options']['install_requires'].split('\n')[1:]
  return peers.python_with('trackers', ['wandb', 'mlflow', *ours])


def _tracked(python, workdir, kind) -> tuple[dict, list[str]]:
  """Returns what a tracker has of three starts, and its id at each."""
  environment = peers.environment(ours=True)
  reference = ROOT / 'tests' / 'reference'
  ids = []
  for start in STARTS:
    words = [python, reference / 'track.py', workdir, kind, *map(str, start)]
    directory = workdir.parent / str(start[0])
    directory.mkdir()
    process = subprocess.run(
      words, env=environment, capture_output=True, text=True, cwd=directory
    )
    killed = start[-1] == 'kill'
    assert process.returncode == (-signal.SIGKILL if killed else 0)
    assert 'failed' not in process.stderr, process.stderr
    ids.append((workdir / f'{kind.lower()}.json').read_text())
  process = subprocess.run(
    [python, reference / 'read_trackers.py', workdir, kind.lower()],
    env=environment,
    capture_output=True,
    text=True,
  )
  assert process.returncode == 0, process.stderr
  return json.loads(process.stdout), ids


def _expected() -> dict[int, dict[str, float]]:
  """Scalars by step: of the start that did the step last."""
  found = {}
  for start, stop, factor, _ in STARTS:
    for step in range(start + 1, stop + 1):
      loss = float(step * factor)
      found[step] = {
        'train/loss': loss,
        'train/load/0': loss,
        'train/load/1': 1.0,
        **({} if step % 2 else {'val/loss': -loss, 'val/accuracy@5': loss}),
      }
  return {step: cells for step, cells in found.items() if step <= 12}


@pytest.mark.slow
def test_wandb_has_each_step_once_after_a_kill(python, tmp_path):
  found, ids = _tracked(python, tmp_path / 'run', 'Wandb')
  assert len(set(ids)) == 1
  assert json.loads(ids[0])['id'] == found['id']
  assert all(len(rows) == 1 for rows in found['history'].values())
  history = {int(step): rows[0] for step, rows in found['history'].items()}
  expected = _expected()
  assert set(history) == set(expected)
  for step, cells in expected.items():
    assert cells.items() <= history[step].items()
    # An image or a text has keys such as 'loads.path'.
    names = {key.partition('.')[0] for key in history[step]}
    assert names & {'loads', 'sample'} == (
      set() if step % 2 else {'loads', 'sample'}
    )
  assert found['config']['optimizer.learning_rate'] == 3
  assert found['summary']['best_val_loss'] == 0.5
  assert found['summary']['status'] == 'done'
  assert found['exit'] == 0
  assert found['media'] == ['.html'] * 6 + ['.png'] * 6


@pytest.mark.slow
def test_mlflow_has_each_step_once_after_a_kill(python, tmp_path):
  found, ids = _tracked(python, tmp_path / 'run', 'MLflow')
  assert len(set(ids)) == 1
  assert json.loads(ids[0])['run_id'] == found['id']
  history = found['history']
  assert history.pop('result/best_val_loss') == [[12, 0.5]]
  assert history.pop('result/step') == [[12, 12]]
  by_step: dict = {}
  for name, points in history.items():
    for step, value in points:
      assert name not in by_step.setdefault(step, {})
      by_step[step][name] = value
  # MLflow has no "@" in the names of metrics.
  assert by_step == {
    step: {name.replace('@', '_'): x for name, x in cells.items()}
    for step, cells in _expected().items()
  }
  assert found['params'] == {'optimizer.learning_rate': '3.0', 'seed': '0'}
  assert found['status'] == 'FINISHED'
  assert found['tags']['result.status'] == 'done'
  steps = range(2, 13, 2)
  assert found['files'] == [
    *(f'images/loads/{step:08d}-0.png' for step in steps),
    *(f'texts/sample/{step:08d}.txt' for step in steps),
  ]
