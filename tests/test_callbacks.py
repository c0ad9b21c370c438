"""Each callback: alone where it decides, in a run where it matters."""

import json
import logging
import math
import re
import types

from clu import profiler
import numpy as np
import optax
import pytest
from regression import Rows, bits, host, make_trainer

from tests.runs import lines_of, result_of
from trainers import callbacks
from trainers.callbacks import Callback
from trainers.callbacks.group import Callbacks
from trainers.checkpoint.checkpointer import Checkpointer, SaveError
from trainers.errors import UserError
from trainers.metrics import Score

NAN, INF = math.nan, math.inf


def directories(workdir):
  return {int(path.name) for path in (workdir / 'checkpoints').iterdir()}


class StubLoop(types.SimpleNamespace):
  """What Evaluation and EarlyStopping use of a trainer."""

  def __init__(self):
    super().__init__(step=0, num_train_steps=99, score=None, best=None)
    self.stops = []

  def stop(self, reason):
    self.stops.append(self.step)


def scored(values, *hooks):
  """The loop after evaluations of these values, at steps 1, 2, ..."""
  loop = StubLoop()
  for step, value in enumerate(values, 1):
    loop.step = step
    for hook in hooks:
      hook.on_eval_end(loop, 'val', {'val/x': value})
  return loop


# Evaluation.


@pytest.mark.parametrize(
  ('values', 'best'),
  [
    ([3.0, 1.0, 2.0], Score(2, 1.0)),
    ([2.0, 2.0], Score(1, 2.0)),  # The first of equals.
    ([NAN, 2.0, NAN], Score(2, 2.0)),
    ([2.0, -INF, INF], Score(1, 2.0)),
    ([NAN, INF], None),
  ],
)
def test_the_best_is_the_lowest_finite_value(values, best):
  loop = scored(values, callbacks.Evaluation(1, 'x'))
  assert loop.best == best
  assert loop.score.step == len(values)


def test_the_best_so_far_is_a_metric():
  loop, evaluation, found = StubLoop(), callbacks.Evaluation(1, 'x'), []
  for value in (NAN, 3.0, 4.0, 2.0):
    metrics = {'val/x': value}
    evaluation.on_eval_end(loop, 'val', metrics)
    found.append(metrics.get('val/best_x'))
  assert found == [None, 3.0, 3.0, 2.0]


def test_other_splits_are_not_monitored():
  loop = StubLoop()
  callbacks.Evaluation(1, 'x').on_eval_end(loop, 'train', {'train/x': 1.0})
  assert loop.score is None


def test_evaluates_every_few_steps_and_at_the_end(tmp_path):
  make_trainer(
    tmp_path,
    num_train_steps=7,
    checkpointer=None,
    callbacks=[callbacks.Evaluation(3, 'mse')],
  ).fit()
  steps = [line['step'] for line in lines_of(tmp_path) if 'val/mse' in line]
  assert steps == [3, 6, 7]


def test_only_a_new_best_is_marked(caplog):
  caplog.set_level(logging.INFO)
  scored([2.0, 3.0, 1.0, NAN], callbacks.Evaluation(1, 'x'))
  marks = ['★' in record.getMessage() for record in caplog.records]
  assert marks == [True, False, True, False]


# EarlyStopping.


@pytest.mark.parametrize(
  ('patience', 'values', 'stops'),
  [
    (2, [3.0, 4.0, 3.0], [3]),
    (2, [3.0, 4.0, 2.0, 5.0], []),
    (2, [3.0, 4.0, 2.0, 5.0, 2.5], [5]),
    (2, [NAN, NAN], [2]),
    (2, [5.0, NAN, 4.0, NAN], []),
    (1, [3.0, 3.0], [2]),
    (0, [1.0, 2.0, 3.0, 4.0], []),
  ],
)
def test_stops_after_evaluations_without_a_new_best(patience, values, stops):
  early = callbacks.EarlyStopping(patience)
  assert scored(values, callbacks.Evaluation(1, 'x'), early).stops == stops


def test_early_stopping_ignores_other_splits():
  early, loop = callbacks.EarlyStopping(1), StubLoop()
  loop.step, loop.score, loop.best = 9, Score(8, 2.0), Score(7, 1.0)
  early.on_eval_end(loop, 'test', {})
  assert loop.stops == []


def test_early_stopping_remembers():
  first = callbacks.EarlyStopping(3)
  loop = scored([1.0, 2.0, 2.0], callbacks.Evaluation(1, 'x'), first)
  second = callbacks.EarlyStopping(3)
  second.load_state_dict(json.loads(json.dumps(first.state_dict())))
  assert loop.stops == []
  loop.step, loop.score = 4, Score(4, 2.0)
  second.on_eval_end(loop, 'val', {})
  assert loop.stops == [4]


def test_a_run_stops_early(tmp_path):
  trainer = make_trainer(
    tmp_path,
    optimizer=optax.sgd(-0.01),  # Uphill: the first evaluation is the best.
    num_train_steps=50,
    callbacks=[
      callbacks.Evaluation(2, 'mse'),
      callbacks.EarlyStopping(3),
      callbacks.Checkpoints(2),
      callbacks.Result({}, 1, 'mse', {}),
    ],
  )
  assert trainer.fit() == 'done'
  assert trainer.step == 8
  assert directories(tmp_path) == {2, 6, 8}  # The best, and the newest two.
  result = result_of(tmp_path)
  assert (result['best_step'], result['step']) == (2, 8)
  assert '2' in result['stop_reason']


# Checkpoints.


def test_saves_every_few_steps_and_at_the_end(tmp_path):
  """And tells of each when it is on the disk."""
  saved, checkpoints = [], tmp_path / 'checkpoints'

  class Saves(Callback):
    def on_checkpoint(self, loop, step):
      assert str(step) in [p.name for p in checkpoints.iterdir()]
      saved.append(step)

  make_trainer(
    tmp_path,
    num_train_steps=7,
    callbacks=[callbacks.Checkpoints(3), Saves()],
  ).fit()
  assert saved == [3, 6, 7]
  assert directories(tmp_path) == {6, 7}


class Broken(Checkpointer):
  """Saves of the steps in `bad` fail when they start."""

  def __init__(self, directory, bad):
    super().__init__(directory)
    self.bad = bad

  def save(self, step, *args, **kwargs):
    if step in self.bad:
      raise SaveError(f'step {step}: no space left')
    super().save(step, *args, **kwargs)


def test_a_save_that_fails_does_not_end_training(tmp_path, caplog):
  trainer = make_trainer(
    tmp_path,
    num_train_steps=6,
    checkpointer=Broken(tmp_path / 'checkpoints', {2}),
    callbacks=[callbacks.Checkpoints(2)],
  )
  assert trainer.fit() == 'done'
  assert directories(tmp_path) == {4, 6}
  assert 'no space left' in caplog.text


@pytest.mark.parametrize('listed', [[callbacks.Checkpoints(2)], []])
def test_a_last_state_that_cannot_be_saved_is_told(tmp_path, listed):
  trainer = make_trainer(
    tmp_path,
    num_train_steps=6,
    checkpointer=Broken(tmp_path / 'checkpoints', {6}),
    callbacks=[*listed, callbacks.Result({}, 1, 'mse', {})],
  )
  assert trainer.fit() == 'unsaved'
  assert 'no space left' in trainer.stop_reason
  assert result_of(tmp_path)['status'] == 'unsaved'


# RefusedUpdates.


def test_checkpoints_keep_the_old_name_of_a_renamed_callback():
  """A subclass, which has a name of its own, does not inherit the old one."""

  class Mine(callbacks.RefusedUpdates):
    pass

  group = Callbacks([callbacks.RefusedUpdates(3), Mine(3)])
  assert group.names == ['StopOnNonFinite', 'Mine']
  state = {**group[0].state_dict(), 'num_in_a_row': 2}
  group.load_state_dict({'StopOnNonFinite': state})
  assert group[0].num_in_a_row == 2
  assert group[1].num_in_a_row == 0


@pytest.mark.parametrize(
  ('patience', 'poison', 'last'),
  [
    (3, {4, 5, 6}, 'diverged'),
    (3, {4, 5, 7, 8}, 'done'),
    (3, {4, 5, 7, 8, 9}, 'diverged'),
    (1, {0}, 'diverged'),
    (0, set(range(20)), 'done'),
    (3, {17, 18, 19}, 'diverged'),  # The last three steps.
    (3, {18, 19}, 'done'),
  ],
)
def test_stops_after_refused_updates_in_a_row(patience, poison, last):
  trainer = make_trainer(
    dataset=Rows(dict.fromkeys(poison, NAN)),
    num_train_steps=20,
    log_interval=100,
    callbacks=[callbacks.RefusedUpdates(patience)],
  )
  assert trainer.fit() == last
  if last == 'done':
    assert trainer.step == 20
  else:  # Soon: within the steps that may be under way.
    assert max(poison) < trainer.step <= max(poison) + 4
  assert int(trainer.state.skipped) == len(
    [i for i in poison if i < trainer.step]
  )


@pytest.mark.parametrize('every_steps', [4, 1])
def test_a_diverged_end_is_not_saved(tmp_path, every_steps):
  """Batches from index 5 on are poison: steps 6, 7 and 8 are refused."""
  trainer = make_trainer(
    tmp_path,
    dataset=Rows(dict.fromkeys(range(5, 50), INF)),
    num_train_steps=50,
    keep_latest=50,
    callbacks=[
      callbacks.RefusedUpdates(3),
      callbacks.Checkpoints(every_steps),
      callbacks.Result({}, 1, 'mse', {}),
    ],
  )
  assert trainer.fit() == 'diverged'
  assert trainer.step not in directories(tmp_path)
  assert 4 in directories(tmp_path)
  result = result_of(tmp_path)
  assert result['status'] == 'diverged'
  assert '3' in result['stop_reason']


def test_refused_updates_are_counted_across_a_resume(tmp_path):
  """Two before it and one after it are three in a row."""

  class Pause(Callback):
    def on_train_step_end(self, loop):
      if loop.step == 5:
        loop.stop('a pause')

  for pause in ([Pause()], []):
    trainer = make_trainer(
      tmp_path,
      dataset=Rows(dict.fromkeys((3, 4, 5), NAN)),
      num_train_steps=20,
      callbacks=[callbacks.RefusedUpdates(3), *pause],
    )
    status = trainer.fit()
  assert status == 'diverged'
  assert trainer.step <= 10


# Progress.


def test_progress_adds_speed_and_tells_the_step(tmp_path, caplog):
  caplog.set_level(logging.INFO)
  make_trainer(
    tmp_path,
    num_train_steps=6,
    log_interval=2,
    checkpointer=None,
    callbacks=[callbacks.Progress(tokens_per_step=24)],
  ).fit()
  lines = lines_of(tmp_path)
  assert [line['step'] for line in lines] == [2, 4, 6]
  for line in lines:
    assert line['steps_per_sec'] > 0
    ratio = line['tokens_per_sec'] / line['steps_per_sec']
    assert ratio == pytest.approx(24)
  told = [r.getMessage() for r in caplog.records if r.name.endswith('progress')]
  for line, text in zip(lines, told, strict=True):
    assert f'{line["step"]}/6' in text
    assert f'{line["train/loss"]:.4f}' in text


# ParameterOverview.


def test_the_overview_names_every_parameter(caplog):
  caplog.set_level(logging.DEBUG)
  make_trainer(
    num_train_steps=1, callbacks=[callbacks.ParameterOverview()]
  ).fit()
  (text,) = [
    r.getMessage() for r in caplog.records if r.name.endswith('overview')
  ]
  rows = {
    line.split('|')[1].strip() for line in text.splitlines() if '|' in line
  }
  assert {'w', 'b'} <= rows
  assert re.search(r'Total: 4(\.0)? ', text)  # Three weights and a bias.


# Result.


def result_callback():
  return callbacks.Result({'corpus': 'rows'}, 24, 'mse', {'again': 'mse'})


def test_the_result_of_a_run_that_is_done(tmp_path):
  started = {}

  class Peek(Callback):
    def on_train_step_end(self, loop):
      started.update(result_of(tmp_path))

  trainer = make_trainer(
    tmp_path,
    callbacks=[
      callbacks.Evaluation(4, 'mse'),
      Peek(),
      result_callback(),
    ],
  )
  trainer.fit()
  assert started['status'] == 'running'
  assert started['corpus'] == 'rows'
  assert started['val_loss'] is None
  result, lines = result_of(tmp_path), lines_of(tmp_path)
  val = {line['step']: line['val/mse'] for line in lines if 'val/mse' in line}
  assert result['status'] == 'done'
  assert result['step'] == 11
  assert result['train_loss'] == lines[-2]['train/loss']
  assert result['val_loss'] == result['again'] == val[11]
  assert result['best_val_loss'] == min(val.values())
  assert result['best_step'] == min(val, key=val.get)
  assert result['skipped_updates'] == 0
  # The first step's time is compilation: ten were timed.
  assert result['steps_per_sec'] * result['train_seconds'] == pytest.approx(10)
  assert result['tokens_per_sec'] == pytest.approx(24 * result['steps_per_sec'])
  assert result['peak_memory_bytes'] > 1e6


@pytest.mark.parametrize('hook', ['on_train_step_end', 'on_fit_end'])
def test_the_result_of_a_run_that_fails(tmp_path, hook):
  """Also if it is what another callback does at the end that fails."""

  def fail(loop):
    if loop.step == 5:
      raise ZeroDivisionError('mine')

  bomb = Callback()
  setattr(bomb, hook, fail)
  trainer = make_trainer(
    tmp_path, num_train_steps=5, callbacks=[bomb, result_callback()]
  )
  with pytest.raises(ZeroDivisionError):
    trainer.fit()
  result = result_of(tmp_path)
  assert result['status'] == 'failed'
  assert result['step'] == 5
  if hook == 'on_train_step_end':
    assert 'ZeroDivisionError' in result['error']
    assert 'mine' in result['error']


def test_the_result_of_a_run_without_any_timed_step(tmp_path):
  make_trainer(tmp_path, num_train_steps=1, callbacks=[result_callback()]).fit()
  result = result_of(tmp_path)
  assert result['steps_per_sec'] is None
  assert result['best_step'] is None


def test_times_add_up_over_a_resume(tmp_path):
  class Pause(Callback):
    def on_train_step_end(self, loop):
      if loop.step == 4:
        loop.stop('a pause')

  seconds = []
  for pause in ([Pause()], []):
    make_trainer(tmp_path, callbacks=[*pause, result_callback()]).fit()
    seconds.append(result_of(tmp_path)['train_seconds'])
  assert seconds[1] > seconds[0] > 0
  # Steps 2..4 before the pause, 6..11 after it.
  rate = result_of(tmp_path)['steps_per_sec']
  assert rate * seconds[1] == pytest.approx(9)


def test_a_result_that_cannot_be_written_does_not_end_training(
  tmp_path, caplog
):
  (tmp_path / 'result.json').mkdir()
  trainer = make_trainer(
    tmp_path, num_train_steps=2, callbacks=[result_callback()]
  )
  assert trainer.fit() == 'done'
  assert 'result.json' in caplog.text


def test_callbacks_change_nothing_that_is_learned(tmp_path):
  plain, busy = (
    make_trainer(),
    make_trainer(
      tmp_path,
      callbacks=[
        callbacks.ParameterOverview(),
        callbacks.Progress(24),
        callbacks.Evaluation(2, 'mse'),
        callbacks.EarlyStopping(0),
        callbacks.RefusedUpdates(2),
        callbacks.Checkpoints(3),
        result_callback(),
      ],
    ),
  )
  plain.fit()
  busy.fit()
  assert bits(host(plain.state)) == bits(host(busy.state))
  assert np.all(np.isfinite(plain.state.params['w']))


def test_early_stopping_counts_an_evaluation_once(tmp_path):
  """Another split that is evaluated at the same step is not one more."""

  class Both(Callback):
    def on_train_step_end(self, loop):
      if loop.step % 2 == 0:
        loop.evaluate('test')

  stopping = callbacks.EarlyStopping(3)
  trainer = make_trainer(
    optimizer=optax.sgd(-0.01),  # Uphill: the first evaluation is the best.
    callbacks=[callbacks.Evaluation(2, 'mse'), stopping, Both()],
  )
  assert trainer.fit() == 'done'
  assert (trainer.step, stopping.num_worse) == (8, 3)


@pytest.mark.parametrize(
  'make',
  [callbacks.EarlyStopping, callbacks.RefusedUpdates, callbacks.Profile],
)
def test_a_negative_number_is_refused(make):
  with pytest.raises(ValueError, match='=-1 must be >= 0'):
    make(-1)


@pytest.mark.parametrize('hook', ['on_log', 'on_eval_end'])
def test_only_the_end_of_a_step_may_save(tmp_path, hook):
  """Elsewhere some hooks of the step are half done."""
  saver = Callback()
  setattr(saver, hook, lambda loop, *args: loop.checkpoint())
  trainer = make_trainer(
    tmp_path, callbacks=[callbacks.Evaluation(2, 'mse'), saver]
  )
  with pytest.raises(RuntimeError, match='on_train_step_end'):
    trainer.fit()


def test_hooks_may_add_numbers_of_any_kind(tmp_path):
  class Adds(Callback):
    def on_log(self, loop, metrics):
      metrics.update(a=np.float32(1.5), b=np.arange(2), c=None)

  make_trainer(tmp_path, callbacks=[Adds()]).fit()
  line = json.loads((tmp_path / 'metrics.jsonl').read_text().splitlines()[-1])
  assert (line['a'], line['b'], line['c']) == (1.5, [0, 1], None)


def test_fewer_steps_than_were_done_are_refused(tmp_path):
  make_trainer(tmp_path, num_train_steps=4).fit()
  with pytest.raises(UserError, match='num_train_steps=3'):
    make_trainer(tmp_path, num_train_steps=3).fit()


def test_hooks_are_known_by_name_when_others_come(tmp_path):
  """A callback that is added on resume neither skips nor repeats another."""
  seen = []

  class Sees(Callback):
    def on_train_step_end(self, loop):
      seen.append(loop.step)

  class Pause(Callback):
    def on_train_step_end(self, loop):
      loop.stop('a pause')

  class More(Callback):
    pass

  save = callbacks.Checkpoints(1)
  make_trainer(tmp_path, callbacks=[Sees(), save, Pause()]).fit()
  make_trainer(
    tmp_path, callbacks=[More(), More(), Sees(), save], num_train_steps=3
  ).fit()
  assert seen == [1, 2, 3]


# Profile.


def traces(directory):
  return list(directory.glob('plugins/profile/*/*.xplane.pb'))


@pytest.mark.parametrize(
  ('num_steps', 'steps'), [(3, 'steps 5 to 7'), (99, 'steps 1 to 11')]
)
def test_a_profile_is_of_its_steps(tmp_path, caplog, num_steps, steps):
  """Or of all that there are."""
  caplog.set_level(logging.INFO)
  profile = callbacks.Profile(num_steps, delay=4)
  make_trainer(tmp_path, checkpointer=None, callbacks=[profile]).fit()
  [trace] = traces(tmp_path)
  assert trace.stat().st_size > 1000
  assert [m for m in caplog.messages if f'profile of {steps}:' in m]


def test_a_profile_after_a_resume(tmp_path, caplog):
  """Of the last steps, where fewer are left than it waits."""
  caplog.set_level(logging.INFO)
  save = callbacks.Checkpoints(5)
  make_trainer(tmp_path, num_train_steps=5, callbacks=[save]).fit()
  again = [save, callbacks.Profile(2)]
  make_trainer(tmp_path, callbacks=again).fit()
  assert len(traces(tmp_path)) == 1
  assert [m for m in caplog.messages if 'profile of steps 10 to 11:' in m]
  make_trainer(tmp_path, callbacks=[save, callbacks.Profile(2)]).fit()
  assert len(traces(tmp_path)) == 1  # There was no step to do.


def test_a_profile_is_kept_when_training_fails_inside_it(tmp_path):
  class Fails(Callback):
    def on_train_step_end(self, loop):
      if loop.step == 3:
        raise RuntimeError('broken')

  profile = callbacks.Profile(9, delay=1)
  trainer = make_trainer(
    tmp_path, checkpointer=None, callbacks=[profile, Fails()]
  )
  with pytest.raises(RuntimeError, match='broken'):
    trainer.fit()
  assert len(traces(tmp_path)) == 1


def test_two_profiles_at_once_do_not_end_training(tmp_path, caplog):
  both = [callbacks.Profile(2), callbacks.Profile(2)]
  trainer = make_trainer(tmp_path, checkpointer=None, callbacks=both)
  assert trainer.fit() == 'done'
  assert [m for m in caplog.messages if 'no profile is taken' in m]
  assert len(traces(tmp_path)) == 1


def test_a_profile_that_cannot_be_written_does_not_end_training(
  tmp_path, caplog
):
  (tmp_path / 'plugins').write_text('in the way')
  trainer = make_trainer(
    tmp_path, checkpointer=None, callbacks=[callbacks.Profile(2)]
  )
  try:
    assert trainer.fit() == 'done'
    assert [m for m in caplog.messages if 'could not be written' in m]
  finally:
    (tmp_path / 'plugins').unlink()
    profiler.stop()  # JAX still holds it: no other could begin.


def test_a_profile_that_training_cuts_short_is_kept(tmp_path):
  from clu import periodic_actions  # noqa: PLC0415 (after trainers)

  profile = periodic_actions.Profile(
    logdir=tmp_path / 'profile', first_profile=9, num_profile_steps=99
  )
  assert make_trainer(callbacks=[profile]).fit() == 'done'
  traces = list((tmp_path / 'profile').rglob('*.xplane.pb'))
  assert len(traces) == 1
  assert traces[0].stat().st_size > 0
