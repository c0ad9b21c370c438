"""Learning rates that nobody expects are logged."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from regression import Rows, make_trainer

from nanomoe import schedules
from nanomoe.config import help
from tests.runs import At
from tests.shrunk import mostly_slow
from trainers import callbacks

PEAK = 0.05


def plug_in(learning_rate, num_train_steps):
  return lambda n: learning_rate * (1 - jnp.minimum(n / num_train_steps, 1.0))


DECAYING = {
  'warmup_cosine': functools.partial(
    schedules.warmup_cosine, warmup_steps=2, final_fraction=0.0
  ),
  'linear': functools.partial(schedules.linear, warmup_steps=2),
  'wsd': functools.partial(schedules.wsd, warmup_steps=2, decay_steps=4),
  'a plug-in': plug_in,
}


def train(workdir, schedule, *, until=None, last=8, **changes):
  """Trains to the step `last`; stops after the step `until`."""
  stop = At(lambda loop: loop.stop('enough'), until)
  trainer = make_trainer(
    workdir,
    schedule=schedule,
    num_train_steps=last,
    callbacks=[callbacks.Checkpoints(100), *([stop] if until else [])],
    **changes,
  )
  assert trainer.fit() == 'done'
  return trainer


@pytest.mark.slow
@pytest.mark.reported('extended')
@pytest.mark.fault(
  promised='one line: the learning rates before and after, and their steps'
)
@pytest.mark.parametrize(
  'name',
  [
    pytest.param(
      name,
      marks=pytest.mark.fault(injected=f'a finished run, extended: {name}'),
    )
    for name in DECAYING
  ],
)
def test_an_extended_run(tmp_path, warnings, happened, name):
  short, long = (DECAYING[name](PEAK, num) for num in (8, 40))
  train(tmp_path, short)
  assert warnings() == []
  train(tmp_path, long, last=40)
  (line,) = warnings()
  for word in (
    f'{float(short(7)):.4g}',
    f'{float(long(8)):.4g}',
    'step 8',
    '9',
  ):
    assert word in line
  assert 'num_train_steps is 40' in line
  happened(f'from {float(short(7)):.4g} to {float(long(8)):.4g}')


@pytest.mark.reported('extended')
@pytest.mark.fault(
  injected='resuming as before: in a warm-up, in a decay, after a refusal',
  promised='no line',
)
@pytest.mark.parametrize('name', mostly_slow(DECAYING, 'warmup_cosine'))
@pytest.mark.parametrize('until', mostly_slow([1, 3, 6], 3))
def test_a_resumed_run(tmp_path, warnings, happened, name, until):
  schedule = DECAYING[name](PEAK, 8)
  dataset = Rows({2: np.nan, 3: np.nan})
  train(tmp_path, schedule, until=until, dataset=dataset)
  train(tmp_path, schedule, dataset=dataset)
  assert warnings() == []
  happened('nothing was logged')


@pytest.mark.reported('extended')
@pytest.mark.fault(
  injected='a run extended whose learning rate stays or falls',
  promised='no line',
)
@pytest.mark.parametrize(('before', 'after'), [(PEAK, PEAK), (PEAK, PEAK / 2)])
def test_a_rate_that_does_not_rise(tmp_path, warnings, happened, before, after):
  train(tmp_path, schedules.constant(before))
  train(tmp_path, schedules.constant(after), last=9)
  assert warnings() == []
  happened('nothing was logged')


@pytest.mark.reported('warmup')
@pytest.mark.fault(promised='one line that names the key and the limit')
@pytest.mark.parametrize(
  ('make', 'keys'),
  [
    pytest.param(
      functools.partial(make, warmup_steps=steps),
      (f'warmup_steps={steps}', 'num_train_steps=8'),
      marks=pytest.mark.fault(
        injected=f'{make.__name__}: {steps} updates of warm-up in 8'
      ),
    )
    for make in (schedules.warmup_cosine, schedules.linear, schedules.wsd)
    for steps in (8, 100)
  ]
  + [
    pytest.param(
      functools.partial(schedules.wsd, warmup_steps=3, decay_steps=6),
      ('decay_steps=6', 'warmup_steps=3', 'at most 5', 'num_train_steps=8'),
      marks=pytest.mark.fault(injected='wsd: 3 + 6 updates in 8'),
    )
  ],
)
def test_a_schedule_longer_than_the_run(warnings, happened, make, keys):
  make(PEAK, 8)
  (line,) = warnings()
  assert line.startswith(f'optimizer.schedule.{keys[0]}: ')
  assert all(key in line for key in keys)
  happened('one line')


@pytest.mark.reported('warmup')
@pytest.mark.fault(
  injected='schedules that just fit', promised='nothing is logged'
)
def test_a_schedule_that_fits(warnings, happened):
  for make in DECAYING.values():
    make(PEAK, 8)
  schedules.wsd(PEAK, 8, warmup_steps=3, decay_steps=5)
  schedules.linear(PEAK, 8, warmup_steps=7)
  schedules.linear(PEAK, 8, warmup_steps=0)
  schedules.constant(PEAK)
  assert warnings() == []
  happened('nothing was logged')


@pytest.mark.reported('warmup')
@pytest.mark.fault(
  injected='the first update of a warm-up',
  promised='its learning rate is 0, as --help says',
)
def test_the_first_update(happened):
  for name in ('warmup_cosine', 'linear', 'wsd'):
    schedule = DECAYING[name](PEAK, 8)
    rates = [float(schedule(n)) for n in range(3)]
    np.testing.assert_allclose(rates, [0, PEAK / 2, PEAK], rtol=1e-6)
  text = ' '.join(help.keys().split())
  assert 'the first update has learning rate 0' in text
  happened('0, and half of its peak at the second of two')
