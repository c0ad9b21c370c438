"""The loop, on a linear regression: `trainers` alone, no language model."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from regression import Regression, Rows, bits, host, make_trainer, mean_square
from tensorboard.backend.event_processing import plugin_event_accumulator

from tests.runs import At, Reports, metrics_of
from trainers import callbacks
from trainers.callbacks import Callback
from trainers.errors import UserError
from trainers.writers.tensorboard import SummaryWriter

ROOT = pathlib.Path(__file__).parent.parent
HOOKS = [name for name in vars(Callback) if name.startswith('on_')]


class Recorder(Callback):
  """Appends (name, hook, step) to `events` at every hook."""

  def __init__(self, events, name=''):
    def record(hook):
      return lambda loop, *_: events.append((name, hook, loop.step))

    for hook in HOOKS:
      setattr(self, hook, record(hook))


class Counter(Callback):
  """The steps it saw, as checkpoints remember them and as they happened."""

  def __init__(self, calls=None):
    self.calls = [] if calls is None else calls
    self.steps = []

  def on_train_step_end(self, loop):
    self.calls.append(loop.step)
    self.steps.append(loop.step)

  def state_dict(self):
    return {'steps': list(self.steps)}

  def load_state_dict(self, state):
    self.steps = list(state['steps'])


# What is learned.


def test_finds_the_least_squares_solution():
  batch = Rows().batch(0)
  # Padding: of weight 0, whatever it holds.
  batch['weight'][5:], batch['y'][5:] = 0, 1e6

  class OneBatch(Rows):
    def train_batch(self, index, rows):
      return batch

  trainer = make_trainer(
    dataset=OneBatch(),
    optimizer=optax.sgd(0.15, 0.8),
    num_train_steps=500,
    log_interval=500,
  )
  assert trainer.fit() == 'done'
  roots = np.sqrt(batch['weight'])[:, None].astype(np.float64)
  x = np.hstack([batch['x'], np.ones((8, 1))])
  wanted = np.linalg.lstsq(
    roots * x, roots[:, 0] * batch['y'].astype(np.float64), rcond=None
  )[0]
  found = np.append(trainer.state.params['w'], trainer.state.params['b'])
  np.testing.assert_allclose(found, wanted, atol=2e-4)


def test_an_update_is_the_gradient_step_that_numpy_takes():
  params = []
  trainer = make_trainer(
    optimizer=optax.sgd(0.1),
    num_train_steps=4,
    callbacks=[
      At(lambda loop: params.append(host(loop.state.params)), 1, 2, 3, 4)
    ],
  )
  trainer.fit()
  for index in range(1, 4):
    batch = Rows().batch(index)
    old = params[index - 1]
    errors = batch['x'] @ old['w'] + old['b'] - batch['y']
    slope = 2 * batch['weight'] * errors / batch['weight'].sum()
    np.testing.assert_allclose(
      params[index]['w'], old['w'] - 0.1 * slope @ batch['x'], rtol=1e-4
    )
    np.testing.assert_allclose(
      params[index]['b'], old['b'] - 0.1 * slope.sum(), rtol=1e-4
    )


def test_noise_differs_by_step_and_seed_and_repeats():
  def losses(seed):
    rows = []
    make_trainer(
      task=Regression(noise=1.0),
      optimizer=optax.sgd(0.0),
      dataset=SameRows(),
      num_train_steps=3,
      seed=seed,
      callbacks=[
        At(
          lambda loop: rows.append(float(loop.metrics['train/loss'].total)),
          1,
          2,
          3,
        )
      ],
    ).fit()
    return rows

  class SameRows(Rows):
    def train_batch(self, index, rows):
      return self.batch(0)

  first = losses(0)
  assert len(set(first)) == 3
  assert losses(0) == first
  assert not set(losses(1)) & set(first)


# Hooks.


def test_exactly_n_updates_and_each_step_is_seen_once():
  seen = []

  def look(loop):
    seen.append(loop.step)
    assert int(loop.state.step) == int(loop.state.batch_index) == loop.step
    loss = mean_square(before[-1], [Rows().batch(loop.step - 1)])
    total, count = host(loop.metrics['train/loss'])
    assert total / count == pytest.approx(loss, rel=1e-4)
    before.append(host(loop.state.params))

  before = []
  trainer = make_trainer(
    callbacks=[Start(before), At(look, *range(100))], num_train_steps=11
  )
  assert trainer.fit() == 'done'
  assert seen == list(range(1, 12))
  assert trainer.step == int(trainer.state.step) == 11
  # One `advance` per update, each with its own batch: 0..10.
  rows = sum(float(Rows().batch(i)['weight'].sum()) for i in range(11))
  assert float(trainer.state.model_state['rows']) == rows


class Start(Callback):
  """Appends a copy of the first parameters to `params`."""

  def __init__(self, params):
    self.params = params

  def on_fit_start(self, loop):
    self.params.append(host(loop.state.params))


def test_hooks_run_in_order(tmp_path):
  events = []
  make_trainer(
    tmp_path,
    num_train_steps=5,
    log_interval=2,
    callbacks=[
      Recorder(events, 'a'),
      callbacks.Evaluation(2, 'mse'),
      callbacks.Checkpoints(4),
      Recorder(events, 'b'),
    ],
  ).fit()
  # Every hook: first a, then b; the hooks that others cause lie between.
  a = [event[1:] for event in events if event[0] == 'a']
  b = [event[1:] for event in events if event[0] == 'b']
  assert sorted(a) == sorted(b)
  first = [('on_fit_start', 0), ('on_train_step_end', 1)]
  assert a[:2] == first
  assert a[-1] == b[-1] == ('on_fit_end', 5)
  assert [e for e in events if e[1] == 'on_train_step_end'] == [
    (name, 'on_train_step_end', step)
    for step in range(1, 6)
    for name in ('a', 'b')
  ]
  for name in 'ab':
    mine = [(hook, step) for n, hook, step in events if n == name]
    assert [s for h, s in mine if h == 'on_log'] == [2, 4, 5]
    assert [s for h, s in mine if h == 'on_eval_end'] == [2, 4, 5]
    # The save of step 4 is known to be on the disk when that of 5 begins.
    assert [s for h, s in mine if h == 'on_checkpoint'] == [5, 5]
    # No step's report comes after the next step's hook.
    assert mine.index(('on_log', 2)) < mine.index(('on_train_step_end', 3))
  step4 = [e for e in events if e[2] == 4]
  assert step4 == [
    ('a', 'on_train_step_end', 4),
    ('a', 'on_log', 4),
    ('b', 'on_log', 4),
    ('a', 'on_eval_end', 4),
    ('b', 'on_eval_end', 4),
    ('b', 'on_train_step_end', 4),
  ]


def test_logs_the_weighted_mean_of_each_interval(tmp_path):
  logged = []

  class Log(Callback):
    def on_log(self, loop, metrics):
      logged.append(loop.step)
      metrics['mine'] = 10.0 * loop.step

  first = []
  make_trainer(
    tmp_path,
    optimizer=optax.sgd(0.0),
    num_train_steps=7,
    callbacks=[Start(first), Log()],
    schedule=lambda count: count * 0.25,
  ).fit()
  lines = metrics_of(tmp_path)
  assert logged == [line['step'] for line in lines] == [3, 6, 7]
  for line, indices in zip(lines, [(0, 1, 2), (3, 4, 5), (6,)], strict=True):
    loss = mean_square(first[0], [Rows().batch(i) for i in indices])
    assert line['train/loss'] == pytest.approx(loss, rel=1e-5)
    assert line['train/mse'] == pytest.approx(loss, rel=1e-5)
    assert line['mine'] == 10 * line['step']
    # Of the interval's last update, which is number `step`, from 0.
    assert line['learning_rate'] == 0.25 * (line['step'] - 1)
    assert line['skipped_updates'] == 0


def test_logs_the_gradient_norm():
  norms = []

  class Log(Callback):
    def on_log(self, loop, metrics):
      norms.append(metrics['gradient_norm'])

  first = []
  make_trainer(
    num_train_steps=1, log_interval=1, callbacks=[Start(first), Log()]
  ).fit()
  batch, (params,) = Rows().batch(0), first
  errors = batch['x'] @ params['w'] + params['b'] - batch['y']
  slope = 2 * batch['weight'] * errors / batch['weight'].sum()
  norm = np.linalg.norm(np.append(slope @ batch['x'], slope.sum()))
  assert norms == [pytest.approx(norm, rel=1e-4)]


def test_evaluates_without_noise_as_one_weighted_mean(tmp_path):
  params, values = [], []

  def evaluate(loop):
    params.append(host(loop.state.params))
    values.append(loop.evaluate('val'))

  make_trainer(
    tmp_path,
    task=Regression(noise=5.0),
    num_train_steps=4,
    callbacks=[At(evaluate, 2, 3)],
  ).fit()
  batches = [Rows().batch(1000 + i) for i in range(3)]
  for before, metrics in zip(params, values, strict=True):
    wanted = mean_square(before, batches)
    assert metrics == {'val/mse': pytest.approx(wanted, rel=1e-5)}
  written = [line for line in metrics_of(tmp_path) if 'val/mse' in line]
  assert written == [
    {'step': step, **metrics}
    for step, metrics in zip((2, 3), values, strict=True)
  ]


def test_an_evaluation_of_nothing_is_an_error():
  class Empty(Rows):
    def eval_batches(self, split, rows):
      return iter(())

  trainer = make_trainer(
    dataset=Empty(), callbacks=[At(lambda loop: loop.evaluate('test'), 1)]
  )
  with pytest.raises(ValueError, match='batch'):
    trainer.fit()


def test_periodic_actions_of_clu_are_callbacks():
  # After `trainers`, which frees it of TensorFlow.
  from clu import periodic_actions  # noqa: PLC0415

  reports, calls = Reports(), []
  make_trainer(
    num_train_steps=7,
    callbacks=[
      periodic_actions.ReportProgress(
        num_train_steps=7, every_steps=3, writer=reports
      ),
      periodic_actions.PeriodicCallback(
        every_steps=2, callback_fn=lambda step, t: calls.append(step)
      ),
    ],
  ).fit()
  assert reports.steps == [3, 6, 7]
  assert calls == [2, 4, 6]


def test_a_hook_may_replace_the_state():
  def reset(loop):
    loop.update_state(
      lambda s: s.replace(params=jax.tree.map(jnp.zeros_like, s.params))
    )

  trainer = make_trainer(num_train_steps=6, callbacks=[At(reset, 6)])
  trainer.fit()
  assert not np.any(trainer.state.params['w'])
  reset_early = make_trainer(
    num_train_steps=6, callbacks=[At(reset, 5)], optimizer=optax.sgd(0.1)
  )
  reset_early.fit()
  batch = Rows().batch(5)
  slope = -2 * batch['weight'] * batch['y'] / batch['weight'].sum()
  np.testing.assert_allclose(
    reset_early.state.params['w'], -0.1 * slope @ batch['x'], rtol=1e-4
  )


def test_stop_ends_after_the_step_and_the_first_reason_stands():
  calls = []

  def stop(loop):
    loop.stop('first')
    loop.stop('second', 'diverged')

  trainer = make_trainer(callbacks=[At(stop, 4), Counter(calls)])
  assert trainer.fit() == 'done'
  assert trainer.stop_reason == 'first'
  assert calls == [1, 2, 3, 4]
  assert int(trainer.state.step) == 4


def test_metrics_reach_the_given_writers_too(tmp_path):
  inside, outside = tmp_path / 'run', tmp_path / 'other'
  inside.mkdir()
  make_trainer(
    inside, writers=[SummaryWriter(outside)], checkpointer=None
  ).fit()
  for directory, tag in ((inside / 'train', 'loss'), (outside, 'train/loss')):
    assert [step for step, _ in scalars(directory, tag)] == [3, 6, 9, 11]


def scalars(directory, tag) -> list[tuple[int, float]]:
  events = plugin_event_accumulator.EventAccumulator(str(directory))
  events.Reload()
  return [(e.step, e.tensor_proto.float_val[0]) for e in events.Tensors(tag)]


# Updates that are not finite.


def test_an_update_that_is_not_finite_is_refused():
  """Its loss and gradient are: what the optimizer makes of them is not."""

  def rate(count):
    return jnp.where(count == 2, jnp.inf, 0.05)

  trainer = make_trainer(
    optimizer=optax.sgd(rate), schedule=rate, num_train_steps=5
  )
  trainer.fit()
  assert trainer.state.skipped == 3  # The counter stays at 2.
  assert np.isfinite(trainer.state.params['w']).all()


@pytest.mark.parametrize('value', [np.nan, np.inf, 1e30])
def test_a_non_finite_update_leaves_no_trace(value):
  """1e30 is finite; the gradient's square is not."""
  states = []
  trainer = make_trainer(
    dataset=Rows({2: value}),
    num_train_steps=5,
    callbacks=[At(lambda loop: states.append(host(loop.state)), *range(9))],
  )
  trainer.fit()
  before, refused = states[1], states[2]
  for name in ('params', 'opt_state', 'model_state'):
    assert bits(getattr(before, name)) == bits(getattr(refused, name))
    assert bits(getattr(states[3], name)) != bits(getattr(refused, name))
  assert [int(s.skipped) for s in states] == [0, 0, 1, 1, 1]
  assert [int(s.step) for s in states] == [1, 2, 3, 4, 5]
  assert [int(s.batch_index) for s in states] == [1, 2, 3, 4, 5]
  assert np.all(np.isfinite(trainer.state.params['w']))


def test_a_schedule_is_read_at_the_number_of_updates(tmp_path):
  """Of what the optimizer counts: a refused update is not one."""
  make_trainer(
    tmp_path,
    dataset=Rows({2: np.nan}),
    num_train_steps=5,
    log_interval=1,
    schedule=lambda count: count * 1.0,
  ).fit()
  lines = metrics_of(tmp_path)
  assert [line['learning_rate'] for line in lines] == [0, 1, 2, 2, 3]
  assert [line['skipped_updates'] for line in lines] == [0, 0, 1, 1, 1]
  assert [line['train/loss'] is None for line in lines] == [
    False,
    False,
    True,
    False,
    False,
  ]


# Errors.


# Stopping and resuming.

STEPS = list(range(1, 12))


class Run:
  """The trainer that the tests below start twice, in one directory."""

  def __init__(self, workdir, *extra, dataset=None, calls=None):
    self.before = Counter(calls)
    self.after = Counter()
    self.trainer = make_trainer(
      workdir,
      task=Regression(noise=0.1),
      dataset=dataset or Rows({2: np.nan}),
      ema_decay=0.5,
      eval_weights='average',
      callbacks=[
        callbacks.Progress(24),
        callbacks.Evaluation(4, 'mse'),
        self.before,
        callbacks.Checkpoints(4),
        self.after,
        callbacks.Result({}, 24, 'mse', {}),
        *extra,
      ],
    )


def result_of(workdir):
  result = json.loads((workdir / 'result.json').read_text())
  clock = ('sec', 'memory')
  return {k: v for k, v in result.items() if not any(c in k for c in clock)}


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A run that nothing interrupts: its directory and its last state."""
  workdir = tmp_path_factory.mktemp('whole')
  run = Run(workdir)
  assert run.trainer.fit() == 'done'
  return workdir, bits(host(run.trainer.state))


def terminate(loop=None):
  os.kill(os.getpid(), signal.SIGTERM)


def crash(loop):
  raise ZeroDivisionError('crash')


@pytest.mark.parametrize(
  ('how', 'step'),
  [
    ('stop', 7),
    ('stop', 8),
    ('signal', 1),
    ('signal', 6),
    ('crash', 1),
    ('crash', 7),
  ],
)
def test_resumes_exactly(tmp_path, whole, how, step):
  """Step 6 ends a log interval; 8 has an evaluation and a checkpoint.

  After a crash at 7, the report of step 6 is superseded: 4 was saved.
  """
  action = {
    'stop': lambda loop: loop.stop('a pause'),
    'signal': terminate,
    'crash': crash,
  }[how]
  calls = []
  first = Run(tmp_path, At(action, step), calls=calls)
  if how == 'crash':
    with pytest.raises(ZeroDivisionError):
      first.trainer.fit()
  else:
    status = {'stop': 'done', 'signal': 'interrupted'}[how]
    assert first.trainer.fit() == status
    assert first.trainer.step == step
    if how == 'signal':
      assert 'SIGTERM' in result_of(tmp_path)['stop_reason']
  second = Run(tmp_path, calls=calls)
  assert second.trainer.fit() == 'done'
  assert bits(host(second.trainer.state)) == whole[1]
  assert metrics_of(tmp_path) == metrics_of(whole[0])
  assert result_of(tmp_path) == result_of(whole[0])
  assert second.before.steps == second.after.steps == STEPS
  if how == 'crash':  # From the newest checkpoint before it, or from nothing.
    saved = {1: 0, 7: 4}[step]
    assert calls == [*STEPS[:step], *STEPS[saved:]]
  else:
    assert calls == STEPS
  for split, tag in (('train', 'loss'), ('val', 'mse')):
    found, expected = scalars(tmp_path / split, tag), whole[0] / split
    assert str(found) == str(scalars(expected, tag))


def test_only_hooks_after_the_checkpoint_run_again(tmp_path):
  """At step 4: those before it are in it, those after it are not."""
  first = Run(tmp_path, At(lambda loop: loop.stop('a pause'), 4))
  first.trainer.fit()
  assert first.before.calls == first.after.calls == [1, 2, 3, 4]
  second = Run(tmp_path)
  second.trainer.fit()
  assert second.before.calls == STEPS[4:]
  assert second.after.calls == STEPS[3:]
  assert second.before.steps == second.after.steps == STEPS


def test_a_signal_ends_an_evaluation_and_it_is_done_again(tmp_path, whole):
  poison = {2: np.nan}
  evaluations = []

  def during_eval():
    evaluations.append(0)
    if len(evaluations) == 2:  # That of step 8.
      terminate()

  calls = []
  first = Run(tmp_path, calls=calls, dataset=Rows(poison, during_eval))
  assert first.trainer.fit() == 'interrupted'
  assert first.trainer.step == 8
  assert [m['step'] for m in metrics_of(tmp_path) if 'val/mse' in m] == [4]
  second = Run(tmp_path, calls=calls)
  assert second.trainer.fit() == 'done'
  assert calls == second.before.steps == second.after.steps == STEPS
  assert bits(host(second.trainer.state)) == whole[1]
  assert metrics_of(tmp_path) == metrics_of(whole[0])
  assert result_of(tmp_path) == result_of(whole[0])


def test_hooks_that_run_again_find_the_metrics_of_their_step(tmp_path):
  """As those of `RefusedUpdates` do, wherever it is listed."""

  def record(loop):
    found.append(float(loop.metrics['train/loss'].total))

  found = []
  for stop in (True, False):
    make_trainer(
      tmp_path,
      num_train_steps=5,
      callbacks=[
        callbacks.Checkpoints(4),
        At(record, 4),
        callbacks.RefusedUpdates(3),
        *[At(lambda loop: loop.stop('a pause'), 4)] * stop,
      ],
    ).fit()
  assert len(found) == 2
  assert found[0] == found[1]


def test_a_run_that_is_done_stays_as_it_is(tmp_path, whole):
  first = Run(tmp_path)
  first.trainer.fit()
  second = Run(tmp_path)
  assert second.trainer.fit() == 'done'
  assert second.before.calls == []
  assert bits(host(second.trainer.state)) == whole[1]
  assert metrics_of(tmp_path) == metrics_of(whole[0])
  assert result_of(tmp_path) == result_of(whole[0])


def test_a_run_that_stopped_early_stays_as_it_is(tmp_path):
  """A kill after its last checkpoint must not make it train on."""
  states = []
  for _ in range(2):
    trainer = make_trainer(
      tmp_path,
      optimizer=optax.sgd(-0.01),  # Uphill: the first evaluation is the best.
      callbacks=[
        callbacks.Evaluation(2, 'mse'),
        callbacks.EarlyStopping(2),
        callbacks.Checkpoints(2),
      ],
    )
    assert trainer.fit() == 'done'
    states.append(bits(host(trainer.state)))
    assert trainer.step == 6
  assert states[0] == states[1]


def test_callbacks_of_one_class_keep_their_own_state(tmp_path):
  def counters():
    return [Counter(), Counter()]

  first, late = counters(), At(lambda loop: loop.stop('a pause'), 2)
  first[1].steps = ['its own']
  make_trainer(tmp_path, callbacks=[*first, late]).fit()
  second = counters()
  make_trainer(tmp_path, callbacks=second).fit()
  assert second[0].steps == STEPS
  assert second[1].steps == ['its own', *STEPS]


def test_other_data_is_refused(tmp_path):
  make_trainer(tmp_path, num_train_steps=2).fit()
  other = Rows()
  other.fingerprint = 'other rows'
  with pytest.raises(UserError, match=r'(?s)other rows.*rows'):
    make_trainer(tmp_path, dataset=other).fit()


class Larger(Rows):
  fingerprint = 'larger rows'

  def batch(self, index):
    batch = super().batch(index)
    return {**batch, 'y': 10 * batch['y']}


def test_the_best_of_other_data_is_the_best_no_more(tmp_path):
  """Nothing would be better than what an easier text once gave."""

  def best(num_train_steps, **changes):
    listed = [callbacks.Evaluation(2, 'mse'), callbacks.Checkpoints(2)]
    trainer = make_trainer(
      tmp_path, num_train_steps=num_train_steps, callbacks=listed, **changes
    )
    trainer.fit()
    return trainer.best

  before = best(2)
  after = best(4, dataset=Larger(), allow_changed=['data'])
  assert (before.step, after.step) == (2, 4)
  assert after.value > before.value


def test_a_callback_that_is_added_later_sees_no_step_0():
  seen = []

  class Seen(Callback):
    def on_train_step_end(self, loop):
      seen.append(loop.step)

  trainer = make_trainer(num_train_steps=2)
  trainer.callbacks.append(Seen())
  trainer.fit()
  assert seen == [1, 2]


def test_a_checkpoint_needs_a_checkpointer():
  trainer = make_trainer(callbacks=[callbacks.Checkpoints(2)])
  with pytest.raises(ValueError, match='checkpointer'):
    trainer.fit()


# The steady state.


@pytest.fixture
def guarded():
  """(on, off) callbacks: between them, an implicit transfer is an error."""

  def on(loop):
    jax.config.update('jax_transfer_guard', 'disallow')
    with pytest.raises(Exception, match=r'[Dd]isallowed'):
      jnp.add(loop.state.params['b'], np.ones(2))

  def off(loop=None):
    jax.config.update('jax_transfer_guard', None)

  yield on, off
  off()


def test_the_steady_state_has_no_implicit_transfers(tmp_path, guarded):
  on, off = guarded
  trainer = make_trainer(
    tmp_path,
    num_train_steps=20,
    ema_decay=0.9,
    callbacks=[
      At(on, 3),
      callbacks.Progress(24),
      callbacks.RefusedUpdates(2),
      At(off, 18),
    ],
  )
  assert trainer.fit() == 'done'


def test_one_program_serves_all_steps():
  traces = []

  class Traced(Regression):
    def loss(self, *args, **kwargs):
      traces.append(0)
      return super().loss(*args, **kwargs)

  counts = []
  make_trainer(
    task=Traced(),
    callbacks=[At(lambda loop: counts.append(len(traces)), 2, 11)],
  ).fit()
  assert counts[0] == counts[1]


# What the package leans on.


def test_imports_neither_tensorflow_nor_the_model(tmp_path):
  script = (
    'import sys, pkgutil, importlib, trainers\n'
    'for m in pkgutil.walk_packages(trainers.__path__, "trainers."):\n'
    '  importlib.import_module(m.name)\n'
    'from clu import metric_writers, periodic_actions\n'
    'metric_writers.create_default_writer(sys.argv[1]).close()\n'
    'bad = {"tensorflow", "nanomoe", "configs", "torch"}\n'
    'print(sorted(bad & {m.partition(".")[0] for m in sys.modules}))\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', script, tmp_path],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert (done.returncode, done.stdout.strip()) == (0, '[]'), done.stderr
  assert list(tmp_path.glob('events.out.tfevents.*'))
