"""Updates that are not finite, or spikes: refused, counted, and undone."""

import logging

from clu import periodic_actions
import numpy as np
import optax
import pytest
from regression import Rows, bits, host, make_trainer

from faults.conftest import steps_of
from tests.runs import At, Reports, metrics_of, result_of
from trainers import callbacks
from trainers.callbacks import Callback
from trainers.step import Spikes

NAN, INF = np.nan, np.inf


def make(workdir, poison, *extra, patience=3, every=4, **changes):
  """Of 16 steps; `poison`: {batch: what y is there}."""
  max_rollbacks = changes.pop('max_rollbacks', 0)
  listed = [
    callbacks.Evaluation(every, 'mse'),
    callbacks.RefusedUpdates(patience, max_rollbacks),
    *extra,
    callbacks.Checkpoints(every),
    callbacks.Result({}, 24, 'mse', {}),
  ]
  return make_trainer(
    workdir,
    **{
      'dataset': Rows(poison),
      'num_train_steps': 16,
      'log_interval': 2,
      'callbacks': listed,
      **changes,
    },
  )


@pytest.mark.fault(
  promised='state bitwise unchanged but for the counters; counted and logged'
)
@pytest.mark.parametrize(
  ('value', 'told'),
  [
    pytest.param(
      NAN, 'loss nan', marks=pytest.mark.fault(injected='NaN in a batch')
    ),
    pytest.param(
      INF, 'loss inf', marks=pytest.mark.fault(injected='infinity in a batch')
    ),
    pytest.param(
      1e19,
      'norm inf',
      marks=pytest.mark.fault(injected='a gradient whose square overflows'),
    ),
  ],
)
def test_a_refused_update(tmp_path, caplog, happened, value, told):
  caplog.set_level(logging.WARNING)
  states = []
  trainer = make(
    tmp_path,
    {5: value},
    At(lambda loop: states.append(host(loop.state)), 5, 6, 7),
    ema_decay=0.5,
    spikes=Spikes(100.0, 2),
  )
  assert trainer.fit() == 'done'
  before, after, then = states
  parts = ('params', 'opt_state', 'model_state', 'average', 'recent_losses')
  for name in parts:
    assert bits(getattr(before, name)) == bits(getattr(after, name)), name
    assert bits(getattr(then, name)) != bits(getattr(after, name)), name
  assert [int(s.skipped) for s in states] == [0, 1, 1]
  assert [int(s.skipped_in_a_row) for s in states] == [0, 1, 0]
  (line,) = [r.getMessage() for r in caplog.records]
  assert line.startswith('step 6: ')
  assert told in line
  assert result_of(tmp_path)['skipped_updates'] == 1
  happened(f'{line}; skipped_updates 1')


@pytest.mark.fault(
  injected='NaN from batch 9 on, for ever',
  promised='stops as diverged (exit 3); no state after that is kept',
)
@pytest.mark.parametrize(
  'keep_latest', [1, pytest.param(2, marks=pytest.mark.slow)]
)
def test_k_in_a_row_stop(tmp_path, happened, keep_latest):
  poison = dict.fromkeys(range(9, 99), NAN)
  trainer = make(tmp_path, poison, patience=5, every=2, keep_latest=keep_latest)
  assert trainer.fit() == 'diverged'
  # Steps 10 to 14 are refused: that is known two later. What was saved since
  # is put aside.
  assert trainer.step == 16
  assert steps_of(tmp_path)[-1] == 8
  aside = tmp_path / 'undone_checkpoints'
  assert {p.name for p in aside.iterdir()} <= {'10', '12', '14', '16'}
  assert result_of(tmp_path)['status'] == 'diverged'
  # The cause is removed: the run goes on, from before it.
  again = make(tmp_path, {}, patience=5, every=2, keep_latest=keep_latest)
  assert again.fit() == 'done'
  whole = make_trainer(num_train_steps=16)
  whole.fit()
  assert bits(host(again.state.params)) == bits(host(whole.state.params))
  happened('diverged at step 16; 8 is the newest that is kept')


class Steps(Callback):
  """The steps that it remembers."""

  def __init__(self):
    self.steps, self.calls = [], []

  def on_train_step_end(self, loop):
    self.steps.append(loop.step)
    self.calls.append(loop.step)

  def state_dict(self):
    return {'steps': list(self.steps)}

  def load_state_dict(self, state):
    self.steps = list(state['steps'])


BAD = {9: NAN, 10: NAN, 11: NAN}


@pytest.mark.fault(
  injected='NaN in three batches in a row, max_rollbacks=1',
  promised='back to the last good checkpoint, on with other data; one value '
  'per step in metrics.jsonl; CLU actions go on',
)
def test_rolls_back_and_skips_the_data(tmp_path, caplog, happened):
  caplog.set_level(logging.WARNING)
  steps, reports, called = Steps(), Reports(), []
  states = {}
  trainer = make(
    tmp_path,
    BAD,
    steps,
    periodic_actions.ReportProgress(every_steps=3, writer=reports),
    periodic_actions.PeriodicCallback(
      every_steps=5, callback_fn=lambda step, t: called.append(step)
    ),
    At(lambda loop: states.update({loop.step: host(loop.state)}), 8, 9),
    max_rollbacks=1,
  )
  assert trainer.fit() == 'done'
  assert (trainer.step, trainer.num_rollbacks) == (16, 1)
  # Batches 9 to 11 were steps 10 to 12, which is known two later. The second
  # time, step 9 has batch 14.
  assert steps.calls == [*range(1, 14), *range(9, 17)]
  assert steps.steps == list(range(1, 17))
  assert int(trainer.state.batch_index) == 22
  assert int(trainer.state.skipped) == 0
  batch, old, new = Rows().batch(14), states[8], states[9]
  np.testing.assert_allclose(
    new.opt_state[0].nu['w'] - 0.999 * old.opt_state[0].nu['w'],
    0.001 * gradient(old.params, batch) ** 2,
    rtol=1e-2,
    atol=1e-6,
  )
  metrics = metrics_of(tmp_path)
  logged = [m['step'] for m in metrics if 'train/loss' in m]
  assert logged == [2, 4, 6, 8, 10, 12, 14, 16]
  assert [m['step'] for m in metrics if 'val/mse' in m] == [4, 8, 12, 16]
  assert all(v is not None for m in metrics for v in m.values())
  assert reports.steps[-2:] == [12, 15]
  assert called[-2:] == [10, 15]
  result = result_of(tmp_path)
  assert (result['rollbacks'], result['skipped_updates']) == (1, 0)
  (line,) = [r.getMessage() for r in caplog.records if 'back from' in r.message]
  assert line.startswith('3 updates in a row')
  assert 'from step 14 to 8' in line
  happened(f'{line}; done at 16, batch_index 22')


@pytest.mark.fault(
  injected='NaN in the last batches; a rollback when the finished run goes on',
  promised='back to the last good checkpoint, and to the end',
)
def test_rolls_back_from_the_end(tmp_path, happened):
  class Back(Callback):
    """Stands behind what saves: a run that goes on calls it once more."""

    armed = False

    def on_train_step_end(self, loop):
      if self.armed and not loop.num_rollbacks:
        loop.roll_back('wanted')

  def run():
    poison = {10: NAN, 11: NAN}
    listed = [callbacks.Checkpoints(4), Back()]
    trainer = make_trainer(
      tmp_path, dataset=Rows(poison), num_train_steps=12, callbacks=listed
    )
    assert trainer.fit() == 'done'
    return trainer

  run()
  Back.armed = True
  trainer = run()
  assert (trainer.step, trainer.num_rollbacks) == (12, 1)
  assert int(trainer.state.skipped) == 0
  assert int(trainer.state.batch_index) == 16
  happened('back from step 12 to 8, and done at 12')


def gradient(params, batch):
  """Of w, by NumPy."""
  errors = batch['x'] @ params['w'] + params['b'] - batch['y']
  slope = 2 * batch['weight'] * errors / batch['weight'].sum()
  return slope @ batch['x']


@pytest.mark.fault(
  injected='a crash, or SIGTERM, after a rollback or just before it',
  promised='resumed, bitwise the same end',
)
@pytest.mark.parametrize(
  ('how', 'step'),
  [
    ('crash', 12),
    *(
      pytest.param(how, step, marks=pytest.mark.slow)
      for how in ('crash', 'signal')
      for step in (9, 10, 11, 12, 13, 14, 15)
      if (how, step) != ('crash', 12)
    ),
  ],
)
def test_a_rollback_is_resumed_exactly(tmp_path, happened, how, step):
  def run(workdir, *extra):
    return make(workdir, BAD, *extra, max_rollbacks=2, keep_latest=1)

  (tmp_path / 'whole').mkdir()
  whole = run(tmp_path / 'whole')
  assert whole.fit() == 'done'

  def stop(loop):
    if how == 'crash':
      raise ZeroDivisionError
    loop.interrupt.name = 'SIGTERM'

  workdir = tmp_path / 'run'
  workdir.mkdir()
  first = run(workdir, At(stop, step))
  if how == 'crash':
    with pytest.raises(ZeroDivisionError):
      first.fit()
  else:
    assert first.fit() == 'interrupted'
  second = run(workdir)
  assert second.fit() == 'done'
  assert bits(host(second.state)) == bits(host(whole.state))
  assert metrics_of(workdir) == metrics_of(tmp_path / 'whole')
  assert second.num_rollbacks == whole.num_rollbacks == 1
  happened(f'{how} at step {step}: equal, 1 rollback')


@pytest.mark.fault(
  injected='NaN from batch 9 on, for ever, max_rollbacks=2',
  promised='two rollbacks, then it stops as diverged (exit 3)',
)
def test_rollbacks_are_limited(tmp_path, happened):
  poison = dict.fromkeys(range(9, 99), NAN)
  trainer = make(tmp_path, poison, max_rollbacks=2)
  assert trainer.fit() == 'diverged'
  assert trainer.stop_reason == (
    '3 updates in a row were refused, after 2 rollbacks'
  )
  assert result_of(tmp_path)['rollbacks'] == 2
  assert steps_of(tmp_path)[-1] == 8
  happened(f'diverged: {trainer.stop_reason}')


@pytest.mark.fault(
  injected='NaN from the first batch on, max_rollbacks=2',
  promised='there is nothing to go back to: it stops as diverged, and says so',
)
@pytest.mark.slow
def test_nothing_to_go_back_to(tmp_path, happened):
  poison = dict.fromkeys(range(99), NAN)
  trainer = make(tmp_path, poison, max_rollbacks=2, every=2)
  assert trainer.fit() == 'diverged'
  assert 'no good checkpoint is left' in trainer.stop_reason
  assert trainer.num_rollbacks == 0
  # None of what was saved is worth going on from: it begins anew.
  assert steps_of(tmp_path) == []
  again = make(tmp_path, {})
  assert again.fit() == 'done'
  whole = make_trainer(num_train_steps=16)
  whole.fit()
  assert bits(host(again.state.params)) == bits(host(whole.state.params))
  happened(trainer.stop_reason)


@pytest.mark.fault(
  injected='a rollback while the newest checkpoint is damaged',
  promised='the one before it is used',
)
def test_a_rollback_past_damage(tmp_path, happened):
  def damage(loop):
    loop.checkpointer.wait()
    (tmp_path / 'checkpoints' / '8' / 'meta' / 'metadata').write_text('{')

  trainer = make(tmp_path, BAD, At(damage, 9), max_rollbacks=1, keep_latest=3)
  assert trainer.fit() == 'done'
  assert (trainer.step, int(trainer.state.batch_index)) == (16, 26)
  happened('from step 14 back to 4')


@pytest.mark.fault(
  injected='a rollback while all checkpoints are damaged',
  promised='it stops as diverged (exit 3), and each is named',
)
def test_a_rollback_past_all_damage(tmp_path, caplog, happened):
  def damage(loop):
    loop.checkpointer.wait()
    for step in steps_of(tmp_path):
      path = tmp_path / 'checkpoints' / str(step)
      (path / 'meta' / 'metadata').write_text('{')

  trainer = make(tmp_path, BAD, At(damage, 9), max_rollbacks=1, keep_latest=3)
  assert trainer.fit() == 'diverged'
  assert 'no good checkpoint is left' in trainer.stop_reason
  for step in (4, 8):
    assert f'checkpoint {step} is damaged' in caplog.text
  # They stay where they are: nothing begins anew.
  assert steps_of(tmp_path) == [4, 8]
  happened(f'diverged: {trainer.stop_reason}')


# Spikes.


def test_a_run_goes_on_with_another_factor(tmp_path):
  def run(num_train_steps, factor):
    trainer = make(
      tmp_path,
      {17: 1e4},
      num_train_steps=num_train_steps,
      spikes=Spikes(factor, 5),
    )
    trainer.fit()
    return int(trainer.state.skipped)

  assert run(16, 0.0) == 0
  assert run(24, 3.0) == 1


def losses_of(trainer_batches, window, factor):
  """Which of `losses` are refused, by NumPy: [bool]."""
  recent, refused = [], []
  for loss in trainer_batches:
    full = len(recent) >= window
    bad = full and loss > factor * np.median(recent[-window:])
    refused.append(bool(bad))
    if not bad:
      recent.append(loss)
  return refused


@pytest.mark.fault(
  injected='three batches whose loss is 100 times the others',
  promised='refused against a rolling median that they never enter, also after '
  'a restart',
)
@pytest.mark.parametrize('stop', [0, 9])
def test_spikes_are_refused(tmp_path, happened, stop):
  class Spiky(Rows):
    def train_batch(self, index, rows):
      batch = super().train_batch(index, rows)
      if index in (2, 8, 9, 11):  # 2: there is no median yet.
        batch['y'] = batch['y'] + 300
      return batch

  seen, states = {}, {}

  def look(loop):
    total, count = host(loop.metrics['train/loss'])
    seen[loop.step] = float(total / count)
    states[loop.step] = host(loop.state)

  def run(*extra):
    return make(
      tmp_path,
      {},
      At(look, *range(1, 17)),
      *extra,
      dataset=Spiky(),
      optimizer=optax.sgd(1e-4),
      patience=0,
      spikes=Spikes(3.0, 5),
    )

  if stop:
    run(At(lambda loop: loop.stop('a pause'), stop)).fit()
  trainer = run()
  assert trainer.fit() == 'done'
  refused = [False] + [
    bool(states[s].skipped > states[s - 1].skipped) for s in range(2, 17)
  ]
  losses = [seen[s] for s in range(1, 17)]
  assert refused == losses_of(losses, 5, 3.0)
  assert [s for s in range(1, 17) if refused[s - 1]] == [9, 10, 12]
  for step in (9, 10, 12):
    before, after = states[step - 1], states[step]
    assert bits(before.params) == bits(after.params)
    assert bits(before.recent_losses) == bits(after.recent_losses)
  assert int(trainer.state.skipped) == 3
  happened('steps 9, 10 and 12 refused; as NumPy says')


@pytest.mark.fault(
  injected='spikes in three batches in a row, max_rollbacks=1',
  promised='as NaN: back, and on with other data',
)
def test_spikes_in_a_row_roll_back(tmp_path, happened):
  trainer = make(
    tmp_path,
    dict.fromkeys((9, 10, 11), 1e6),
    spikes=Spikes(20.0, 5),
    max_rollbacks=1,
  )
  assert trainer.fit() == 'done'
  assert (trainer.num_rollbacks, int(trainer.state.skipped)) == (1, 0)
  happened('1 rollback, done at step 16')


@pytest.mark.fault(
  injected='an evaluation after the state diverged without NaN in gradients',
  promised='the best and its checkpoint stay those of before',
)
def test_a_diverged_state_is_never_the_best(tmp_path, happened):
  """The learning rate of step 9 throws the parameters away, finitely."""
  rates = optax.piecewise_constant_schedule(0.01, {8: 1e9})
  trainer = make(
    tmp_path,
    {},
    optimizer=optax.sgd(rates),
    schedule=rates,
    keep_latest=1,
  )
  trainer.fit()
  result = result_of(tmp_path)
  assert result['best_step'] == 8
  assert 8 in steps_of(tmp_path)
  happened(f'best_step 8 of checkpoints {steps_of(tmp_path)}')
