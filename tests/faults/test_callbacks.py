"""A callback that fails: all else ends as it should, and its error is told."""

import threading
import time

from clu import periodic_actions
import pytest
from regression import make_trainer

from faults.conftest import fault
from nanomoe import experiment
from tests.runs import Reports, result_of
from trainers import callbacks
from trainers.callbacks import Callback
from trainers.callbacks.periodic import PeriodicActionCallback
from trainers.errors import UserError


class Watch(Callback):
  """What it was told of the end."""

  def __init__(self):
    self.errors, self.ended = [], 0

  def on_exception(self, loop, error):
    self.errors.append(error)

  def on_fit_end(self, loop):
    self.ended += 1


class Bomb(Callback):
  """Raises in one hook, once it is past step 3."""

  def __init__(self, hook, error):
    def explode(*args):
      if hook in ('on_fit_start', 'state_dict') or args[0].step >= 3:
        raise error

    setattr(self, hook, explode)


HOOKS = [
  'on_fit_start',
  'on_train_step_end',
  'on_log',
  'on_eval_end',
  'on_checkpoint',
  'on_fit_end',
  'state_dict',
]
PROMISED = (
  'the error is what the caller sees; all others get on_exception, then '
  'on_fit_end; result.json says failed'
)


def listed(*extra):
  return [
    callbacks.Evaluation(2, 'mse'),
    *extra,
    callbacks.Checkpoints(2),
    callbacks.Result({}, 24, 'mse', {}),
  ]


@pytest.mark.parametrize(
  ('hook', 'error'),
  [
    pytest.param(
      hook,
      error,
      marks=fault(f'{type(error).__name__} in {hook}', PROMISED),
      id=f'{hook}-{type(error).__name__}',
    )
    for hook, error in [
      *((hook, ZeroDivisionError('mine')) for hook in HOOKS),
      *((hook, SystemExit('mine')) for hook in ('on_log', 'on_fit_end')),
    ]
  ],
)
def test_an_exception_in_a_hook(tmp_path, happened, hook, error):
  before, after = Watch(), Watch()
  closed = threading.active_count()
  trainer = make_trainer(
    tmp_path, callbacks=listed(before, Bomb(hook, error), after)
  )
  with pytest.raises(type(error), match='mine') as raised:
    trainer.fit()
  assert raised.value is error
  for watch in (before, after):
    assert watch.errors == [error]
    assert watch.ended == 1
  result = result_of(tmp_path)
  assert result['status'] == 'failed'
  assert 'mine' in result['error']
  end = time.monotonic() + 20  # A writer's thread is told to end, no more.
  while threading.active_count() > closed + 1 and time.monotonic() < end:
    time.sleep(0.01)
  assert threading.active_count() <= closed + 1
  happened('told, failed, both others ended')


@fault(
  'an exception in on_exception and in on_fit_end, after another error',
  'the first error is what the caller sees; the others are logged',
)
@pytest.mark.parametrize('later', [ValueError('later'), SystemExit('later')])
def test_exceptions_on_the_way_out(tmp_path, warnings, happened, later):
  class Worse(Callback):
    def on_train_step_end(self, loop):
      raise ZeroDivisionError('first')

    def on_exception(self, loop, error):
      raise later

    def on_fit_end(self, loop):
      raise later

  watch = Watch()
  trainer = make_trainer(tmp_path, callbacks=listed(Worse(), watch))
  with pytest.raises(ZeroDivisionError, match='first'):
    trainer.fit()
  assert [str(e) for e in watch.errors] == ['first']
  assert watch.ended == 1
  assert sum('later' in line for line in warnings()) == 2
  happened('first is raised; later is logged twice')


@fault(
  'a callback whose state in the checkpoint is of another version',
  "the callback's error is what the caller sees; the checkpoints stay",
)
def test_a_state_that_does_not_fit(tmp_path, happened):
  class Counts(Callback):
    old = True

    def state_dict(self):
      return {'old': 1}

    def load_state_dict(self, state):
      if not self.old:
        raise KeyError('new')

  make_trainer(tmp_path, callbacks=listed(Counts())).fit()
  before = sorted(p.name for p in (tmp_path / 'checkpoints').iterdir())
  Counts.old, watch = False, Watch()
  trainer = make_trainer(
    tmp_path, num_train_steps=14, callbacks=listed(Counts(), watch)
  )
  with pytest.raises(KeyError, match='new'):
    trainer.fit()
  assert len(watch.errors) == watch.ended == 1
  assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == before
  happened('KeyError; nothing was removed')


@fault(
  'an error in a dataset, in the thread that prefetches',
  'it is what the caller sees; every callback ends',
)
def test_an_exception_in_the_data(tmp_path, happened):
  from regression import Rows  # noqa: PLC0415

  class Breaks(Rows):
    def train_batch(self, index, rows):
      if index == 5:
        raise OSError('the disk is gone')
      return super().train_batch(index, rows)

  watch = Watch()
  trainer = make_trainer(tmp_path, dataset=Breaks(), callbacks=listed(watch))
  with pytest.raises(OSError, match='the disk is gone'):
    trainer.fit()
  assert trainer.step == 5
  assert len(watch.errors) == watch.ended == 1
  happened('raised at step 5')


# CLU's periodic actions.


@pytest.mark.parametrize(
  'every_steps',
  [
    pytest.param(
      n,
      marks=fault(
        f'a periodic action of CLU every {n} steps', 'refused, by name'
      ),
    )
    for n in (0, -1)
  ],
)
def test_a_period_that_is_none(tiny, tmp_path, happened, every_steps):
  with pytest.raises(UserError) as error:
    experiment.build(
      tiny(
        {
          'callbacks.a.type': 'clu.periodic_actions.ReportProgress',
          'callbacks.a.every_steps': every_steps,
        }
      ),
      tmp_path,
    )
  (line,) = error.value.problems
  assert f'every_steps={every_steps}' in line
  assert 'ReportProgress' in line
  happened(line)


@fault(
  'an error in the last call of an asynchronous PeriodicCallback of CLU',
  'the run fails with it: CLU would tell it at the next call alone',
)
def test_the_last_error_in_the_background(tmp_path, happened):
  def fails(step, t):
    raise ZeroDivisionError('in the background')

  action = periodic_actions.PeriodicCallback(
    on_steps=[11], callback_fn=fails, execute_async=True
  )
  watch = Watch()
  trainer = make_trainer(tmp_path, callbacks=listed(action, watch))
  with pytest.raises(ZeroDivisionError, match='in the background'):
    trainer.fit()
  assert len(watch.errors) == 1
  happened('raised by fit()')


def traces(directory):
  return list(directory.rglob('*.xplane.pb'))


def clu_profile(directory, first, **arguments):
  return periodic_actions.Profile(
    logdir=directory / 'profile',
    first_profile=first,
    profile_duration_ms=None,
    **{'num_profile_steps': 2, **arguments},
  )


@fault(
  "a profile of CLU whose first step is before the run's first step, resumed",
  'it is taken, as many steps after the start',
)
def test_a_profile_that_would_never_start(tmp_path, happened):
  make_trainer(tmp_path, num_train_steps=5).fit()
  profile = clu_profile(tmp_path, 2)
  trainer = make_trainer(tmp_path, callbacks=[profile], num_train_steps=12)
  assert trainer.fit() == 'done'
  assert len(traces(tmp_path)) == 1
  happened('one trace')


@fault('a profile of CLU that begins after the last step', 'told; no crash')
def test_a_profile_that_never_starts(tmp_path, warnings, happened):
  trainer = make_trainer(callbacks=[clu_profile(tmp_path, 99)])
  assert trainer.fit() == 'done'
  (line,) = warnings()
  assert 'no profile is taken: it would begin at step 99' in line
  assert not traces(tmp_path)
  happened(line)


@pytest.mark.parametrize(
  'kind',
  [
    pytest.param(
      kind,
      marks=fault(
        f'training fails inside a profile, {kind}',
        'the trace is written; the error is told',
      ),
    )
    for kind in ('ours', "CLU's")
  ],
)
def test_a_profile_that_never_ends(tmp_path, happened, kind):
  class Fails(Callback):
    def on_train_step_end(self, loop):
      if loop.step == 4:
        raise ZeroDivisionError('mine')

  profile = (
    callbacks.Profile(99, delay=1)
    if kind == 'ours'
    else clu_profile(tmp_path, 2, num_profile_steps=99)
  )
  trainer = make_trainer(tmp_path, callbacks=[profile, Fails()])
  with pytest.raises(ZeroDivisionError, match='mine'):
    trainer.fit()
  assert len(traces(tmp_path)) == 1
  happened('one trace, and the error')


@fault('a profile of CLU that cannot be written', 'told; the run ends as done')
def test_a_profile_that_cannot_be_written(
  tmp_path, warnings, happened, monkeypatch
):
  from clu import profiler  # noqa: PLC0415

  real = profiler.stop

  def stop():
    real()
    raise RuntimeError('no space')

  monkeypatch.setattr(profiler, 'stop', stop)
  profile = clu_profile(tmp_path, 2, num_profile_steps=99)
  assert make_trainer(callbacks=[profile]).fit() == 'done'
  (line,) = warnings()
  assert 'the profile could not be written: no space' in line
  happened(line)


def test_an_action_of_clu_without_a_period_is_taken():
  """Its own clock decides: it acts at each step if no second has to pass."""
  reports = Reports()
  action = periodic_actions.ReportProgress(
    every_steps=None, every_secs=0.0, writer=reports
  )
  assert isinstance(PeriodicActionCallback(action).action, type(action))
  assert make_trainer(callbacks=[action], num_train_steps=4).fit() == 'done'
  assert reports.steps == [2, 3, 4]  # The first call starts the clock.
