"""Processes agree: here they are threads, with a store in memory."""

import json
import random
import sys
import threading
import time
import types

import jax
import pytest

from trainers.errors import PeerError, UserError
from trainers.runtime import failures, processes, watchdog
from trainers.runtime.processes import Group
from trainers.runtime.stop import Stop
from trainers.signals import Interrupt


class Memory:
  """A store like that of JAX's coordination service."""

  def __init__(self):
    self.values: dict[str, str] = {}
    self._changed = threading.Condition()

  def key_value_set(self, key, value, /):
    with self._changed:
      if key in self.values:
        raise jax.errors.JaxRuntimeError(f'ALREADY_EXISTS: {key}')
      self.values[key] = value
      self._changed.notify_all()

  def blocking_key_value_get(self, key, timeout_ms, /):
    with self._changed:
      if self._changed.wait_for(lambda: key in self.values, timeout_ms / 1000):
        return self.values[key]
    raise jax.errors.JaxRuntimeError(f'DEADLINE_EXCEEDED: {key}')

  def key_value_try_get(self, key, /):
    with self._changed:
      if key in self.values:
        return self.values[key]
    raise jax.errors.JaxRuntimeError(f'NOT_FOUND: {key}')

  def key_value_delete(self, key, /):
    with self._changed:
      for other in list(self.values):
        if other == key or other.startswith(f'{key}/'):
          del self.values[other]

  def fail(self, process=1, code=1):
    report = {'process': process, 'text': 'boom', 'code': code}
    self.key_value_set(failures.KEY, json.dumps(report))


@pytest.fixture
def quick_switches(monkeypatch):
  """Threads take turns often, and waits are short."""
  monkeypatch.setattr(processes, '_WAIT_MS', 50)
  before = sys.getswitchinterval()
  sys.setswitchinterval(1e-5)
  yield
  sys.setswitchinterval(before)


def together(size, act):
  """Returns act(i) of `size` threads; fails if one of them waits for ever."""
  results = [None] * size

  def run(i):
    try:
      results[i] = act(i)
    except Exception as error:
      results[i] = error

  threads = [
    threading.Thread(target=run, args=[i], daemon=True) for i in range(size)
  ]
  for thread in threads:
    thread.start()
  end = time.monotonic() + 60
  for thread in threads:
    thread.join(max(end - time.monotonic(), 0))
  assert not any(thread.is_alive() for thread in threads)
  return results


def outcome(call):
  """The value of a call; of an error its kind, words and exit code."""
  try:
    return call()
  except Exception as error:
    return type(error), str(error), getattr(error, 'code', None)


@pytest.mark.parametrize('size', [2, 3, 5])
def test_all_gather_the_same(quick_switches, size):
  store = Memory()

  def act(i):
    group = Group('g', store, i, size)
    found = []
    for n in range(30):
      if random.random() < 0.3:
        time.sleep(random.random() / 1000)
      found.append(group.gather({'process': i, 'round': n}))
    return found

  results = together(size, act)
  wanted = [
    [{'process': i, 'round': n} for i in range(size)] for n in range(30)
  ]
  assert results == [wanted] * size
  # All but the last round, which process 0 cannot know to be read.
  assert {key.split('/')[1] for key in store.values} == {'29'}


@pytest.mark.parametrize('size', [2, 4])
@pytest.mark.parametrize('bad', [0, 1])
@pytest.mark.parametrize(
  ('error', 'code'), [(UserError('seed=1: bad'), 2), (OSError('full'), 1)]
)
def test_a_check_raises_on_all(quick_switches, size, bad, error, code):
  store = Memory()

  def act(i):
    group = Group('g', store, i, size)
    first = outcome(lambda: group.check(error if i == bad else None))
    return first, outcome(lambda: group.check(None)), group.gather(i)

  results = together(size, act)
  words = f'process {bad}: {error}'
  for i, (found, second, values) in enumerate(results):
    own = type(error), str(error), None
    assert found == (own if i == bad else (PeerError, words, code))
    assert second is None
    assert values == list(range(size))


def test_each_raises_its_own_error(quick_switches):
  store = Memory()
  errors = [None, OSError('one'), OSError('two')]
  results = together(
    3,
    lambda i: outcome(lambda: Group('g', store, i, 3).check(errors[i])),
  )
  assert results == [
    (PeerError, 'process 1: one', 1),
    (OSError, 'one', None),
    (OSError, 'two', None),
  ]


def test_process_0_alone_makes(quick_switches):
  store, made = Memory(), []

  def act(i):
    group = Group('g', store, i, 3)

    def make():
      made.append(i)
      return [1, 'a']

    def fail():
      made.append(i)
      raise UserError('no room')

    return group.first(make), outcome(lambda: group.first(fail))

  results = together(3, act)
  assert made == [0, 0]
  assert [value for value, _ in results] == [[1, 'a']] * 3
  assert [error for _, error in results] == [
    (UserError, 'no room', None),
    (PeerError, 'process 0: no room', 2),
    (PeerError, 'process 0: no room', 2),
  ]


def test_one_process_decides_alone():
  group = Group('g')
  assert group.is_first
  assert group.gather(1) == [1]
  assert group.first(lambda: 2) == 2
  group.check(None)
  with pytest.raises(OSError, match='x'):
    group.check(OSError('x'))


@pytest.mark.parametrize('i', [0, 1])
def test_none_waits_for_a_process_that_failed(quick_switches, i):
  store = Memory()
  store.fail(code=7)
  (found,) = together(
    1, lambda _: outcome(lambda: Group('g', store, i, 2).gather(0))
  )
  assert found[0] is PeerError
  assert 'process 1' in found[1]
  assert found[2] == 7


def test_the_first_report_of_a_failure_counts():
  store = Memory()
  assert failures.of_peer(store) is None
  store.fail(code=3)
  failures.report(store, ValueError('later'))
  failure = failures.of_peer(store)
  assert failure is not None
  assert failure.code == 3


def test_own_failures_are_not_those_of_peers():
  store = Memory()
  failures.report(store, ValueError('mine'))  # This is process 0.
  assert failures.of_peer(store) is None


NUM_POLLS = 40


@pytest.mark.parametrize('seed', range(60))
def test_all_stop_at_the_same_poll(quick_switches, seed):
  chance = random.Random(seed)
  size = chance.choice([2, 3, 4])
  # Polls before which processes get a signal; a few are at the same time.
  signals = {
    i: chance.randrange(1, NUM_POLLS // 2)
    for i in chance.sample(range(size), chance.randint(1, size))
  }
  pauses = [chance.choice([0, 0, 1e-4, 1e-3]) for _ in range(size)]
  store = Memory()
  interrupts = [Interrupt() for _ in range(size)]

  def act(i):
    own = random.Random(f'{seed} {i}')
    stop = Stop(interrupts[i], store, i, size)
    for number in range(1, 10_000):
      if number == signals.get(i):
        interrupts[i].name = 'SIGTERM'
      if stop.poll():
        return number
      time.sleep(own.random() * pauses[i])
    return None

  found = together(size, act)
  assert len(set(found)) == 1, found
  assert found[0] is not None
  assert found[0] > min(signals.values()) - 1
  assert [interrupt.name for interrupt in interrupts] == ['SIGTERM'] * size


def test_polls_without_a_signal_exchange_nothing():
  store = Memory()
  stop = Stop(Interrupt(), store, 0, 2)
  assert not any(stop.poll() for _ in range(100))
  assert store.values == {}


def test_one_process_stops_at_once():
  interrupt = Interrupt()
  stop = Stop(interrupt)
  assert not stop.poll()
  interrupt.name = 'SIGINT'
  assert stop.poll()


def test_a_stop_does_not_wait_for_a_process_that_failed(quick_switches):
  store = Memory()
  interrupt = Interrupt()
  stop = Stop(interrupt, store, 0, 2)
  interrupt.name = 'SIGTERM'

  def act(_):
    while True:  # Until its thread has seen the signal.
      stop.poll()
      time.sleep(0.001)
      if 'stop/0' in store.values and failures.KEY not in store.values:
        store.fail(code=5)

  (found,) = together(1, lambda i: outcome(lambda: act(i)))
  assert found[0] is PeerError
  assert found[2] == 5


@pytest.mark.parametrize('num_beats', [0, 1, 4])
def test_a_watchdog_ends_a_process_without_progress(monkeypatch, num_beats):
  now, left, codes = 0.0, num_beats, []

  def sleep(seconds):
    nonlocal now, left
    now += seconds / 2
    if left:
      left -= 1
      watchdog.beat()
    now += seconds / 2

  clock = types.SimpleNamespace(monotonic=lambda: now, sleep=sleep)
  monkeypatch.setattr(watchdog, 'time', clock)
  monkeypatch.setattr(watchdog, '_last', -100.0)
  monkeypatch.setattr(watchdog.faulthandler, 'dump_traceback', lambda _: None)
  watchdog.start(10.0, codes.append).join(60)
  assert codes == [watchdog.EXIT_CODE]
  # The last beat is the bound before the end, and so is the start.
  assert now - watchdog._last == pytest.approx(10)
  assert now >= 10 + 5 * min(num_beats, 1)
