"""The history of a run: metrics by step, seconds, and damaged files."""

import fcntl
import json

import numpy as np
import pytest

from configs import base
from nanomoe.run import history
from trainers.errors import UserError


@pytest.fixture
def make(tmp_path):
  """Returns a function that writes a run with these records."""

  def write(*records, raw=b''):
    (tmp_path / 'config.json').write_text(
      json.dumps(base.get_config().to_dict())
    )
    lines = ''.join(json.dumps(record) + '\n' for record in records)
    (tmp_path / 'metrics.jsonl').write_bytes(lines.encode() + raw)
    return tmp_path

  return write


def test_a_series_has_the_steps_of_its_metric(make):
  run = history.read(
    make(
      {'step': 10, 'train/loss': 3.0},
      {'step': 10, 'val/loss': 2.5, 'val/load': [0.5, 0.5]},
      {'step': 20, 'train/loss': None},
    )
  )
  assert run.names() == ['train/loss', 'val/load', 'val/loss']
  steps, values = run.series('train/loss')
  np.testing.assert_array_equal(steps, [10, 20])
  np.testing.assert_array_equal(values, [3.0, np.nan])
  assert run.series('val/load').values.shape == (1, 2)
  with pytest.raises(UserError, match=r"'val/accuracy'.*val/loss"):
    run.series('val/accuracy')


def test_a_metric_that_is_no_number_hides_no_other(make, caplog):
  run = history.read(
    make(
      {'step': 1, 'val/note': 'warm', 'val/loss': 2.0},
      {'step': 2, 'val/ragged': [1.0], 'val/loss': 1.0},
      {'step': 3, 'val/ragged': [1.0, 2.0]},
    )
  )
  assert list(run.all_series()) == ['val/loss']
  assert 'val/note' in caplog.text and 'val/ragged' in caplog.text


def test_seconds_are_summed_over_the_recorded_speeds(make):
  run = history.read(
    make(
      {'step': 10, 'steps_per_sec': 2.0},  # 5 seconds.
      {'step': 40, 'steps_per_sec': 10.0},  # 3 more.
    )
  )
  seconds = run.train_seconds(np.array([0, 5, 10, 25, 40, 41]))
  np.testing.assert_allclose(seconds, [0, 2.5, 5, 6.5, 8, np.nan])


@pytest.mark.parametrize('raw', [b'nonsense\n', b'[]\n', b'{"step": "1"}\n'])
def test_a_damaged_line_is_named(make, raw):
  workdir = make({'step': 1}, raw=raw)
  with pytest.raises(UserError, match=r'metrics.jsonl, line 2: .*damaged'):
    history.read(workdir)


def test_the_incomplete_last_line_is_left_out(make):
  workdir = make({'step': 1, 'a': 1.0}, raw=b'{"step": 2, "a": 1')
  assert len(history.read(workdir).records) == 1
  workdir = make({'step': 1, 'a': 1.0}, raw=b'{"step": 2, "a": 1.0}')
  assert len(history.read(workdir).records) == 2


def test_a_run_in_progress_is_recognized(make):
  workdir = make({'step': 1})
  assert not history.read(workdir).is_running
  with (workdir / 'log.txt').open('w') as log:
    fcntl.flock(log, fcntl.LOCK_EX)
    assert history.read(workdir).is_running
  assert not history.read(workdir).is_running


def test_what_is_no_run_has_one_line(tmp_path):
  with pytest.raises(UserError, match='there is no run'):
    history.read(tmp_path)


def test_a_damaged_result_is_named(make):
  workdir = make({'step': 1})
  assert history.read(workdir).result == {}
  (workdir / 'result.json').write_text('{')
  with pytest.raises(UserError, match=r'result.json: the file is damaged'):
    history.read(workdir)
