"""The routing alarm: its start, its end, its actions, and a real collapse."""

import json
import logging
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import collapse
from nanomoe import experiment
from nanomoe.callbacks import RoutingAlarm
from trainers.state import TrainState

EVEN = [[1, 1, 1, 1], [1, 1, 1, 1]]
DEAD = [[1, 1, 1, 1], [2, 1, 0, 1]]  # Expert 2 of layer 1.


class Loop(types.SimpleNamespace):
  """Part of a trainer that RoutingAlarm uses."""

  def __init__(self, aux_weight=0.0):
    none = types.SimpleNamespace(init=lambda params: ())
    state = TrainState.create((), {'aux_weight': jnp.float32(aux_weight)}, none)
    super().__init__(step=0, state=state, writer=self, texts={}, stops=[])

  def update_state(self, fn):
    self.state = fn(self.state)

  def write_texts(self, step, texts):
    self.texts.setdefault(step, []).append(texts['routing_alarm'])

  def stop(self, reason, status):
    self.stops.append((self.step, status, reason))

  @property
  def weight(self):
    return round(float(self.state.model_state['aux_weight']), 6)


def drive(alarm, loop, windows, early=False):
  """Returns [(alarms, weight) after the step that follows each log].

  A log comes after the hooks of its step, or, if `early`, before them: where
  something else asked for it.
  """
  found = []
  for load, vio in windows:
    for _ in range(9):
      loop.step += 1
      alarm.on_train_step_end(loop)
    loop.step += 1
    metrics = {'train/expert_load': load, 'train/max_vio': [vio, 0.0]}
    if early:
      alarm.on_log(loop, metrics)
    alarm.on_train_step_end(loop)
    if not early:
      alarm.on_log(loop, metrics)
    found.append((metrics['routing_alarms'], loop.weight))
  return found


def start(alarm, loop):
  alarm.on_fit_start(loop)
  return alarm


def test_a_dead_expert_is_told_once_and_by_name(caplog):
  """The expert is dead for 30 steps at step 40, and again from step 60 on."""
  loop = Loop()
  alarm = start(RoutingAlarm(4, 2, dead_steps=30), loop)
  windows = [EVEN, DEAD, DEAD, DEAD, DEAD, EVEN, DEAD, DEAD, EVEN]
  caplog.set_level(logging.INFO)
  found = drive(alarm, loop, [(load, 0.0) for load in windows])
  assert [alarms for alarms, _ in found] == [0, 0, 0, 1, 1, 0, 0, 0, 0]
  told = [r.getMessage() for r in caplog.records if r.levelname == 'WARNING']
  wanted = 'step 40: routing alarm: layer 1, expert 2: no token since step 10'
  assert told == [wanted]
  assert loop.texts == {40: [wanted]}
  [ended] = [r.getMessage() for r in caplog.records if r.levelname == 'INFO']
  assert ended.startswith('step 60: ')
  assert loop.weight == 0 and not loop.stops


@pytest.mark.parametrize(
  ('experts', 'top_k', 'given', 'limit'),
  [(4, 2, None, 0.9), (8, 1, None, 6.3), (4, 4, None, 0), (8, 1, 2.0, 2.0)],
)
def test_a_limit_of_max_vio(experts, top_k, given, limit):
  loop = Loop()
  alarm = start(RoutingAlarm(experts, top_k, max_vio=given), loop)
  vios = [0.99 * limit, 1.01 * limit + 1e-3, limit * 0.5]
  found = drive(alarm, loop, [(EVEN, vio) for vio in vios])
  assert [alarms for alarms, _ in found] == [0, 1, 0]
  assert loop.texts == {
    20: [
      f'step 20: routing alarm: layer 0: MaxVio above {limit:g} since step 10'
    ]
  }


@pytest.mark.parametrize('early', [False, True])
def test_the_weight_is_raised_every_dead_steps_up_to_its_limit(early, caplog):
  """The weight changes at the step after the log, early or late."""
  loop = Loop()
  options = {'factor': 3.0, 'min_weight': 0.1, 'max_weight': 1.0}
  alarm = start(RoutingAlarm(4, 2, 'raise', 20, None, **options), loop)
  windows = [(EVEN, vio) for vio in [0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1]]
  found = drive(alarm, loop, windows, early)
  # Of step 20, 40, 70 and 90, each known to the next log.
  weights = [0, 0, 0.1, 0.1, 0.3, 0.3, 0.3, 0.9, 0.9, 1.0, 1.0, 1.0]
  assert [weight for _, weight in found] == pytest.approx(weights)
  loop.step += 1
  alarm.on_train_step_end(loop)
  raised = {step: text for step, text in loop.texts.items() if step % 10}
  assert list(raised) == [21, 41, 71, 91]
  [text] = raised[71]
  assert re.search(r'^step 71: .* 0\.3 .* 0\.9$', text)
  assert re.search(r' 1; max_weight is 1$', caplog.text, re.MULTILINE)
  weight = loop.state.model_state['aux_weight']
  assert weight.aval == jnp.float32(1).aval  # Nothing is compiled again.


def test_a_larger_weight_is_not_lowered():
  loop = Loop(5.0)
  alarm = start(RoutingAlarm(4, 2, 'raise', 10), loop)
  assert drive(alarm, loop, [(EVEN, 1)] * 3) == [(1, 5.0)] * 3


def test_a_stop_stands_until_another_action_is_chosen():
  loop = Loop()
  alarm = start(RoutingAlarm(4, 2, 'stop', 20), loop)
  drive(alarm, loop, [(EVEN, 0), (DEAD, 0), (DEAD, 0), (DEAD, 0)])
  [(step, status, reason)] = loop.stops
  assert (step, status) == (31, 'collapsed')
  assert reason == 'layer 1, expert 2: no token since step 10'
  saved = json.loads(json.dumps(alarm.state_dict()))
  for action, stops in [('stop', [(31, 'collapsed', reason)]), ('raise', [])]:
    again, loop = RoutingAlarm(4, 2, action, 20), Loop()
    again.load_state_dict(saved)
    loop.step = 31
    start(again, loop)
    assert loop.stops == stops
  loop.step = 30
  drive(again, loop, [(DEAD, 0), (DEAD, 0)])
  assert loop.weight == 0.01  # It acted on the first log.


@pytest.mark.parametrize('cut', range(1, 8))
def test_what_is_remembered_is_all_that_matters(cut):
  windows = [(EVEN, 0), (DEAD, 0), (DEAD, 0), (DEAD, 1), (DEAD, 1)]
  windows += [(DEAD, 0), (EVEN, 0), (EVEN, 1)]
  whole, parts = Loop(), Loop()
  alarm = start(RoutingAlarm(4, 2, 'raise', 20), whole)
  expected = drive(alarm, whole, windows)
  first = start(RoutingAlarm(4, 2, 'raise', 20), parts)
  found = drive(first, parts, windows[:cut])
  second = RoutingAlarm(4, 2, 'raise', 20)
  second.load_state_dict(json.loads(json.dumps(first.state_dict())))
  found += drive(start(second, parts), parts, windows[cut:])
  assert found == expected
  assert max(weight for _, weight in found) > 0.01
  assert parts.texts == whole.texts
  assert second.state_dict() == alarm.state_dict()


def test_a_collapse_is_told_in_one_line(caplog):
  loop = Loop()
  load = np.eye(64)[[0, 0]]
  alarm = start(RoutingAlarm(64, 1, dead_steps=10), loop)
  assert drive(alarm, loop, [(load, 63.0)]) == [(2 * 63 + 1, 0)]
  [text] = caplog.messages
  assert text.count('no token since step 0') == 8
  assert text.endswith('; and 119 more')


def test_without_experts_there_is_no_alarm():
  metrics = {'train/loss': 1.0}
  start(RoutingAlarm(4, 2), Loop()).on_log(Loop(), metrics)
  assert metrics == {'train/loss': 1.0}


@pytest.mark.parametrize(
  ('argument', 'value'),
  [
    ('action', 'panic'),
    ('dead_steps', 0),
    ('max_vio', -1.0),
    ('factor', 1.0),
    ('min_weight', 0.0),
    ('min_weight', 2.0),
  ],
)
def test_arguments_that_are_refused(argument, value):
  with pytest.raises(ValueError, match=argument):
    RoutingAlarm(4, 2, **{argument: value})


# In runs.


@pytest.mark.slow
def test_a_run_that_is_interrupted_raises_what_it_would_have(tiny, tmp_path):
  """Every window alarms; the interrupt falls between a log and its action."""
  changes = {
    'num_train_steps': 8,
    'sample.num_tokens': 0,
    'callbacks.routing_alarm.action': 'raise',
    'callbacks.routing_alarm.max_vio': 0.0,
    'callbacks.routing_alarm.dead_steps': 2,
  }

  def run(name, **more):
    trainer = experiment.build(tiny(changes | more), tmp_path / name)
    assert trainer.fit() == 'done'
    return trainer

  whole = run('whole')
  # After the logs of steps 2, 4 and 6.
  assert whole.state.model_state['aux_weight'] == pytest.approx(0.08)
  run('parts', num_train_steps=4)
  parts = run('parts')
  jax.tree.map(np.testing.assert_array_equal, parts.state, whole.state)
  names = {type(c).__name__: c for c in parts.callbacks}
  for callback in whole.callbacks:
    if type(callback).__name__ in ('RoutingAlarm', 'LoadHistory'):
      own = names[type(callback).__name__].state_dict()
      assert own == callback.state_dict()
  lines = [
    (tmp_path / name / 'metrics.jsonl').read_text().splitlines()
    for name in ('whole', 'parts')
  ]
  weights = [
    [
      (x['step'], x['train/aux_weight'], x['routing_alarms'])
      for x in map(json.loads, some)
      if 'train/aux_weight' in x
    ]
    for some in lines
  ]
  assert weights[0] == weights[1]
  logged = [weight for _, weight, _ in weights[0]]
  assert logged == pytest.approx([0.01, 0.02, 0.04, 0.08])


@pytest.mark.slow
def test_a_collapse_stops_the_run(tmp_path):
  """The run stops soon, is saved, and records the reason."""
  found = collapse.run('stop', tmp_path / 'run')
  assert found['status'] == 'collapsed'
  assert found['step'] <= 60
  result = json.loads((tmp_path / 'run' / 'result.json').read_text())
  assert result['status'] == 'collapsed'
  assert 'MaxVio above 6.3' in result['stop_reason']
  assert result['step'] == found['step']
  [saved] = (tmp_path / 'run' / 'checkpoints').iterdir()
  assert saved.name == str(found['step'])


@pytest.mark.slow
def test_a_raised_weight_brings_the_experts_back(tmp_path):
  """Seven of eight experts stay dead with 'warn', none with 'raise'."""
  nothing, raised = (
    collapse.run(action, tmp_path / action)['logs']
    for action in ('warn', 'raise')
  )
  assert max(max(x['dead_experts']) for x in raised) > 0.5
  assert min(nothing[-1]['dead_experts']) > 0.8
  assert nothing[-1]['alarms'] > 10 and raised[-1]['alarms'] == 0
  assert raised[-1]['dead_experts'] == [0, 0]
  assert min(raised[-1]['load_entropy']) > 0.95 * np.log(8)
  assert max(nothing[-1]['load_entropy']) < 0.1 * np.log(8)
  assert raised[-1]['aux_weight'] > 0.02
