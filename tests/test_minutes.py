"""Jobs of equal minutes: their steps, their names, and the same jobs again."""

import pytest

from nanomoe import compare
from nanomoe.sweeps import estimate, minutes
from tests.shrunk import ROOT
from trainers.errors import UserError

CONFIGS = [str(ROOT / 'configs' / f'{x}.py') for x in ('dense', 'base')]
PER_STEP = {
  'dense': 0.1,
  'base': 0.25,
}  # Seconds of a step, on a quiet machine.


@pytest.fixture
def timed(monkeypatch):
  """Replaces the timing of steps; returns the configs that were timed."""
  calls = []

  def timed(job, num_steps):
    assert num_steps == estimate.TIMED_STEPS
    name = next(x for x in PER_STEP if job.config.endswith(f'{x}.py'))
    calls.append(name)
    slower = 1.5 if len(calls) <= 2 else 1.0  # The first turn is disturbed.
    tokens = job.values['batch_size'] * job.values['block_size']
    return estimate.Speed(0.0, PER_STEP[name] * slower / tokens, 0.0)

  monkeypatch.setattr(estimate, 'timed', timed)
  return calls


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -1.0, 0.0])
def test_minutes_are_a_positive_number(value, timed, tmp_path):
  with pytest.raises(UserError, match='--minutes='):
    compare.train(CONFIGS, minutes=value, out=tmp_path / 'out')
  assert not timed


def test_each_config_gets_the_steps_of_the_minutes(timed, tmp_path):
  jobs = minutes.make(CONFIGS, 2, 0.5, [('moe.z_weight', '0.1')], tmp_path)
  assert timed == ['dense', 'base'] * 2
  assert [job.name for job in jobs] == [
    f'{name},seed={seed}' for seed in (0, 1) for name in ('dense', 'base')
  ]
  for job, num_steps in zip(jobs, [300, 120] * 2, strict=True):
    config = job.load()
    assert config.num_train_steps == num_steps
    assert config.eval_interval == num_steps // 10
    assert config.moe.z_weight == 0.1
  assert [job.load().seed for job in jobs] == [0, 0, 1, 1]


def test_a_second_call_has_the_same_jobs(timed, tmp_path, monkeypatch):
  first = minutes.make(CONFIGS, 1, 0.5, [], tmp_path)
  monkeypatch.setitem(PER_STEP, 'dense', 9.0)
  again = minutes.make(CONFIGS, 2, 0.5, [], tmp_path)
  assert again[:2] == first
  assert len(timed) == 4
  for other in ([('moe.z_weight', '0.1')], 0.25):
    given = (other, 0.5) if isinstance(other, list) else ([], other)
    with pytest.raises(UserError, match='other configs or minutes'):
      minutes.make(CONFIGS, 1, given[1], given[0], tmp_path)
  (tmp_path / minutes.FILE).write_text('{')
  with pytest.raises(UserError, match='damaged'):
    minutes.make(CONFIGS, 1, 0.5, [], tmp_path)


def test_keys_that_the_command_sets_are_refused(timed, tmp_path):
  for key in ('seed', 'num_train_steps'):
    with pytest.raises(UserError, match=f'--config.{key}: '):
      minutes.make(CONFIGS, 1, 0.5, [(key, '3')], tmp_path)
  with pytest.raises(UserError, match='names of the files'):
    minutes.make([CONFIGS[0]] * 2, 1, 0.5, [], tmp_path)
  with pytest.raises(UserError, match='at least two'):
    compare.train(CONFIGS[:1], out=tmp_path)
  assert not timed
